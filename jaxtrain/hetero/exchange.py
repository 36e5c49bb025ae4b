"""`Exchange` is a member's part in the sum of a step: it gives its contribution, and waits for the total.

A step is attempted again, with other members and other chunks, when a member is lost before all hold the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.hetero.control import Control
from jaxtrain.hetero.landing import Landing
from jaxtrain.hetero.membership import Contribution, MoreWork, Total
from jaxtrain.hetero.peers import Peers
from jaxtrain.hetero.roll import Roll
from jaxtrain.hetero.rounds import Round, slice_bounds
from zarr_store.crash import crashpoint
from zarr_store.errors import InvalidInput

__all__ = ["Exchange"]


class Exchange:
    """One member's part in the current step.

    Args:
        number: Number of this member.
        roll: The members of the group.
        control: The connection with the coordinator.
        peers: The connections with the others.
        landing: Where their blocks go.

    Attributes:
        step: Number of the step.
        chunks: Chunks of this member; more once another one is lost.
    """

    def __init__(self, number: int, roll: Roll, control: Control, peers: Peers, landing: Landing) -> None:
        self._number, self._roll = number, roll
        self._control, self._peers, self._landing = control, peers, landing
        self._size: int | None = None
        self._total: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._parts: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._idle: frozenset[int] = frozenset()
        self._attempt = 0
        self.step = 0
        self.chunks: tuple[int, ...] = ()

    def begin(self, message: Mapping[str, Any]) -> None:
        """Begin the step that a message names."""
        self._roll.take(message)
        self._take_attempt(message)

    def run(self, contribution: Contribution) -> Total | MoreWork:
        """Return the total of the step, or the chunks to do first; see `Member.exchange`."""
        self._check(contribution)
        while (message := self._control.next(wait=False)) is not None:  # another member may be lost already
            self._hear(message)
        while True:
            more = tuple(sorted(set(self.chunks) - set(contribution.chunks)))
            if more:
                return MoreWork(self.step, more)
            total = self._attempt_to_sum(contribution)
            if total is not None:
                return total

    def _check(self, contribution: Contribution) -> None:
        vector = contribution.vector
        if vector.dtype != np.float32 or vector.ndim != 1 or not vector.flags.c_contiguous or not vector.size:
            raise InvalidInput(f"expected a contiguous float32 vector, got {vector.dtype} of shape {vector.shape}")
        if contribution.step != self.step:
            raise InvalidInput(f"expected a contribution to step {self.step}, got one to step {contribution.step}")
        other = set(contribution.chunks) - set(self.chunks)
        if other or len(set(contribution.chunks)) != len(contribution.chunks):
            raise InvalidInput(f"expected chunks {self.chunks}, each once, got {contribution.chunks}")

    def _hear(self, message: Mapping[str, Any]) -> None:
        """Process the message that the current step is attempted again with other members."""
        if message["kind"] == "again" and message["step"] == self.step:
            self._roll.take(message)
            self._peers.reconnect()
            self._take_attempt(message)

    def _attempt_to_sum(self, contribution: Contribution) -> Total | None:
        """Exchange slices in the current attempt; None if there is another one."""
        crashpoint("before contributing")
        summing = self._open_round(contribution.vector)
        self._report(contribution)
        peers = {peer.number: peer for peer in self._roll.order}
        for number, header, block in summing.contribute(contribution.vector):
            self._peers.send(peers[number], summing.key, header, block)
        crashpoint("after contributing")
        vector, told = self._total, False
        if not summing.others:
            vector = contribution.vector

        def send(number: int, header: dict[str, Any], block: memoryview) -> None:
            self._peers.send(peers[number], summing.key, header, block)

        while True:
            if not told and (summing.complete or not summing.others):
                crashpoint("before it has the sum")
                self._control.tell({"kind": "have", "step": self.step, "attempt": self._attempt})
                crashpoint("after it has the sum")
                told = True
            # once the sum is there, only a message can change anything
            message = self._control.next() if told else self._control.next(lambda: summing.can_add or summing.complete)
            if message is None:
                if summing.can_add:
                    crashpoint("before adding")
                    summing.add(send)
            elif message["kind"] == "commit" and message["step"] == self.step:
                self._roll.take(message)
                self._landing.expect_round(None)
                return self._total_of(message, vector)
            elif message["kind"] == "again":
                self._hear(message)
                return None

    def _report(self, contribution: Contribution) -> None:
        """Tell the coordinator what this member contributes."""
        message = {
            "kind": "contributed",
            "step": self.step,
            "attempt": self._attempt,
            "chunks": sorted(contribution.chunks),
            "size": contribution.vector.size,
            "weight": float(contribution.weight),
            "sums": {str(name): float(value) for name, value in contribution.sums.items()},
            "seconds": [float(value) for value in contribution.chunk_seconds],
        }
        self._control.tell(message)

    def _open_round(self, vector: npt.NDArray[np.float32]) -> Round:
        """Return the round of this attempt; it may have received blocks already."""
        self._size = vector.size
        summing = self._landing.round
        if summing is None or summing.key != (self.step, self._attempt):
            summing = self._post_round()
        return summing

    def _post_round(self) -> Round:
        """Allocate memory for the blocks of this attempt and accept them."""
        assert self._size is not None
        numbers = [peer.number for peer in self._roll.order]
        longest = max(stop - start for start, stop in slice_bounds(self._size, len(numbers)))
        rows = len(numbers) - 1
        # A late block of an attempt that failed may still be received into its memory: another attempt gets new memory.
        if self._attempt or self._parts.shape != (rows, longest):
            self._parts = np.empty((rows, longest), np.float32)
        if rows and (self._attempt or self._total.size != self._size):
            self._total = np.empty(self._size, np.float32)
        summing = Round(
            (self.step, self._attempt), numbers, self._number, idle=self._idle, total=self._total, parts=self._parts
        )
        self._landing.expect_round(summing)
        return summing

    def _total_of(self, message: Mapping[str, Any], vector: npt.NDArray[np.float32]) -> Total:
        weight, sums = 0.0, dict[str, float]()
        shares, seconds = dict[str, tuple[int, ...]](), dict[str, float]()
        for name, part in message["parts"]:
            weight += part["weight"]
            shares[name] = tuple(part["chunks"])
            for key, value in part["sums"].items():
                sums[key] = sums.get(key, 0.0) + value
            if part["seconds"]:
                seconds[name] = sum(part["seconds"]) / len(part["seconds"])
        crashpoint("committed")
        return Total(self.step, vector, weight, sums, shares, seconds)

    def _take_attempt(self, message: Mapping[str, Any]) -> None:
        self.step, self._attempt = int(message["step"]), int(message["attempt"])
        self.chunks, self._idle = tuple(message["chunks"]), frozenset(message["idle"])
        self._peers.keep(peer.number for peer in self._roll.order)
        self._peers.purge((self.step, self._attempt))
        self._landing.expect_bulk(None)
        if self._size is not None:
            self._post_round()
