"""`Member` is one replica's place in its group: it gets chunks, gives contributions, and receives the sum of all.

    with Member.join(address, secret, name, identity, chunks=16, ...) as member:
        member.offer_state(make_state)
        if member.needs_state():
            step, state = member.receive_state()
        while step < steps:
            work = member.start(step)
            mine = sum_over(work.chunks)
            while isinstance(result := member.exchange(mine), MoreWork):  # another member was lost
                mine = mine + sum_over(result.chunks)
            apply(result)
            step += 1
        member.leave(finished=True)

Its methods are called from one thread. They raise a `GroupError` when the membership has ended.
"""

from __future__ import annotations

import socket
import sys
import zlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from jaxtrain.hetero.control import Control, ask_to_join
from jaxtrain.hetero.exchange import Exchange
from jaxtrain.hetero.landing import Bulk, Landing
from jaxtrain.hetero.membership import (
    Assignment,
    Contribution,
    Event,
    GroupChanged,
    GroupError,
    Identity,
    MoreWork,
    Total,
)
from jaxtrain.hetero.peers import Peer, Peers
from jaxtrain.hetero.roll import Roll
from jaxtrain.hetero.seats import Application, Replay
from jaxtrain.hetero.wire import BLOCK_BYTES, check_secret, format_address, parse_address
from zarr_store.crash import crashpoint
from zarr_store.errors import InvalidInput

__all__ = ["Member"]

Buffer = bytes | bytearray | memoryview


class Member:
    """One replica's place in its group. Made by `join`."""

    def __init__(
        self,
        control: Control,
        application: Application,
        number: int,
        listener: socket.socket,
        *,
        key: bytes,
        group: str,
    ) -> None:
        self._control, self._application, self._number = control, application, number
        self._listener = listener
        self._make_state: Callable[[], Buffer] | None = None
        self._landing = Landing(control.wake)
        self._peers = Peers(
            application.name, listener, key=key, group=group, number=number, silence_s=application.silence_s,
            place=self._landing.place, arrived=self._landing.arrived,
            lost=lambda number, why: control.tell({"kind": "lost", "number": number, "why": why}),
        )  # fmt: skip
        self._roll = Roll()
        self._exchange = Exchange(number, self._roll, control, self._peers, self._landing)
        self._closed = False

    @classmethod
    def join(
        cls,
        address: str,
        secret: str,
        name: str,
        identity: Identity,
        *,
        chunks: int,
        limit: int | None = None,
        state_step: int | None = None,
        silence_s: float = 8.0,
        replay: Replay | None = None,
        announce: str | None = None,
        wait_s: float = 60.0,
    ) -> Self:
        """Join the group of a coordinator.

        Args:
            address: host:port of the coordinator.
            secret: The secret of the group.
            name: Name of this member; no two members have the same.
            identity: Digests of what all members must have in common.
            chunks: Number of chunks of a step.
            limit: Most chunks of a step that this machine's memory allows; None is no limit.
            state_step: The step before which this process's state stands; None if it has none. The group begins at the
                newest state of those that form it; all others receive it.
            silence_s: Seconds without a sign of life after which this process, or the coordinator, counts as dead.
            replay: Recorded chunks of each member by step (their numbers, or how many), of a run that is repeated. A
                step is repeated where all its members are there again; others that are there get no chunk in it.
            announce: Host, or host:port, at which other members reach this process, where that is not the address from
                which it reaches the coordinator.
            wait_s: Seconds to wait for the coordinator.

        Raises:
            Refused: The group does not take this process; the message says what differs.
            RunFinished: The run has reached its end.
            AccessError: The coordinator cannot be reached, or has another secret.
        """
        key = check_secret(secret)
        if sys.byteorder != "little":
            raise InvalidInput("expected a little-endian machine: vectors are exchanged in the byte order of memory")
        listeners: list[socket.socket] = []

        def make(sock: socket.socket) -> Application:
            for old in listeners:
                old.close()
            listener, own = _listen(sock, announce)
            listeners[:] = [listener]
            return Application(name, own, identity, chunks, limit, state_step, silence_s, replay or {})

        try:
            sock, answer = ask_to_join(address, key, make, max(wait_s, 2 * silence_s))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        control = Control(sock, address, name, silence_s)
        application = Application(name, "", identity, chunks, limit, state_step, silence_s)
        member = cls(
            control, application, int(answer["number"]), listeners[0], key=key, group=str(answer["group"])
        )  # fmt: skip
        control.start()
        return member

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """Name of this member."""
        return self._application.name

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all members, in the order in which contributions are added."""
        return tuple(peer.name for peer in self._roll.order)

    @property
    def leader(self) -> str:
        """Name of the member that writes logs and checkpoints."""
        return self._roll.leader

    # ── state ──

    def needs_state(self) -> bool:
        """Wait until the group is formed; return whether this process must receive its state from another member."""
        while True:
            message = self._wait()
            if message["kind"] == "formed":
                self._roll.take(message)
                return bool(message["state"])

    def offer_state(self, make: Callable[[], Buffer]) -> None:
        """Register the function that makes the bytes of the current state, for `start` if a newcomer needs them."""
        self._make_state = make

    def receive_state(self) -> tuple[int, memoryview]:
        """Wait for the state of another member.

        Returns:
            The step that comes next, and the bytes that the other's function made.

        Raises:
            GroupError: The state arrived damaged, or the membership has ended.
        """
        self._control.tell({"kind": "want"})
        step, bulk = -1, Bulk(0, "")
        while (message := self._control.next(lambda: self._landing.bulk_complete)) is not None:
            if message["kind"] == "take":
                step = int(message["step"])
                bulk = Bulk(int(message["from"]), f"state {step}")
                self._landing.expect_bulk(bulk)
        self._landing.expect_bulk(None)
        if bulk.data is None or not bulk.intact:
            raise GroupError("the state from another member arrived damaged: join again")
        crashpoint("the state was received")
        self._control.tell({"kind": "taken", "step": step})
        return step, bulk.data.data

    def _give_state(self, message: Mapping[str, Any]) -> None:
        if self._make_state is None:
            raise InvalidInput("a newcomer needs the state: call offer_state before start")
        number, name, address = message["to"]
        self._send_bulk([Peer(int(number), str(name), str(address))], f"state {message['step']}", self._make_state())

    # ── a step ──

    def start(self, step: int) -> Assignment:
        """Wait until all members are ready for a step, and newcomers have their state; return this member's chunks.

        Raises:
            GroupError: The membership has ended.
        """
        crashpoint("before ready")
        self._control.tell({"kind": "ready", "step": step})
        while True:
            message = self._wait()
            if message["kind"] == "give":
                self._give_state(message)
            elif message["kind"] == "begin":
                break
        self._exchange.begin(message)
        return Assignment(
            step=self._exchange.step,
            chunks=self._exchange.chunks,
            members=self.members,
            leader=self._roll.leader,
            shares={str(name): int(share) for name, share in message["shares"].items()},
            events=tuple(Event(kind, at, member, reason) for kind, at, member, reason in message["events"]),
            epoch=self._roll.epoch,
        )

    def exchange(self, contribution: Contribution) -> Total | MoreWork:
        """Add this member's contribution to those of the others, and wait until the step is complete.

        Args:
            contribution: The sum over all chunks that this member has to do in this step.

        Returns:
            The total, or more chunks to do first, if another member was lost.

        Raises:
            GroupError: The membership has ended. No member has got the total, unless its step was complete.
            InvalidInput: The contribution is not of this step, or has other chunks.
        """
        return self._exchange.run(contribution)

    # ── small and large values of all ──

    def gather(self, name: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what every member gave under this name, by member, in their order. Called by all, between two steps.

        Raises:
            GroupChanged: A member was lost meanwhile. Nobody got a result; all may repeat the call.
        """
        crashpoint("before gathering")
        self._control.tell({"kind": "gather", "name": name, "epoch": self._roll.epoch, "values": dict(values)})
        crashpoint("after gathering")
        while True:
            message = self._wait()
            if message["kind"] == "gathered" and message["name"] == name:
                return {str(member): dict(found) for member, found in message["values"]}
            if message["kind"] == "changed" and message["name"] == name:
                self._roll.take(message)
                error = GroupChanged(
                    f"the members changed while {name} was gathered; now they are {', '.join(self.members)}"
                )
                error.members, error.leader = self.members, self._roll.leader
                raise error

    def exchange_sums(self, name: str, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over all members, added in their order; for example of a validation that they share.

        Raises:
            GroupChanged: A member was lost meanwhile, and its part with it: divide the work again, and repeat.
        """
        total: dict[str, float] = {}
        for found in self.gather(name, {key: float(value) for key, value in sums.items()}).values():
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def broadcast(self, name: str, value: Buffer | None) -> memoryview:
        """Return the leader's value; all members get it, or none. Called by all, between two steps.

        Args:
            name: Names the value; not used before.
            value: The leader's value; the values of other members are ignored.

        Raises:
            GroupChanged: A member was lost meanwhile. Nobody got the value; all may repeat the call under another name.
        """
        source = next(peer for peer in self._roll.order if peer.name == self._roll.leader)
        if source.number == self._number:
            if value is None:
                raise InvalidInput(f"expected a value for {name} from {self.name}, which is the leader")
            others = [peer for peer in self._roll.order if peer.number != self._number]
            self._send_bulk(others, f"value {name}", value)
            self.gather(f"received {name}", {"intact": True})
            return memoryview(value).cast("B")
        bulk = Bulk(source.number, f"value {name}")
        self._landing.expect_bulk(bulk)
        while (message := self._control.next(lambda: self._landing.bulk_complete)) is not None:
            if message["kind"] == "gone" and message["number"] == source.number:
                break
        self._landing.expect_bulk(None)
        found = self.gather(f"received {name}", {"intact": bulk.complete and bulk.intact})
        if not all(values.get("intact") for values in found.values()):
            raise GroupError(f"{name} from {self._roll.leader} arrived damaged at a member: join again")
        assert bulk.data is not None
        return bulk.data.data

    def _send_bulk(self, peers: list[Peer], key: str, value: Buffer) -> None:
        data = memoryview(value).cast("B")
        crc = zlib.crc32(data)
        for offset in range(0, len(data), BLOCK_BYTES):
            header = {"kind": "bulk", "k": key, "o": offset, "n": len(data), "c": crc}
            for peer in peers:
                self._peers.send(peer, key, header, data[offset : offset + BLOCK_BYTES])

    def _wait(self) -> dict[str, Any]:
        message = self._control.next()
        assert message is not None
        return message

    # ── the end ──

    def leave(self, *, finished: bool = False) -> None:
        """Leave the group between two steps; the others go on.

        Args:
            finished: The run has reached its end: nobody is waited for, and newcomers are sent away.
        """
        if not self._closed:
            self._control.tell({"kind": "leave", "finished": finished})
            self._close(politely=True)

    def close(self) -> None:
        """End all connections; the others find this member lost, unless it has left."""
        if not self._closed:
            self._close(politely=False)

    def _close(self, *, politely: bool) -> None:
        self._closed = True
        self._landing.close()
        self._peers.close()
        self._control.close(politely=politely)
        self._peers.join()


def _listen(control: socket.socket, announce: str | None) -> tuple[socket.socket, str]:
    """Return a socket for other members, and the address at which they reach it.

    Without an announced address it is open at the interface alone by which the coordinator is reached.
    """
    here = control.getsockname()[0]
    if announce is None:
        listener = socket.create_server((here, 0), family=control.family, backlog=128)
        return listener, format_address(here, listener.getsockname()[1])
    named = ":" in announce.rpartition("]")[2] and not (announce.count(":") > 1 and not announce.startswith("["))
    host, port = parse_address(announce if named else format_address(announce.strip("[]"), 0))
    try:
        listener = socket.create_server(("", port), family=control.family, backlog=128)
    except OSError as error:
        raise InvalidInput(
            f"this member cannot listen at port {port} ({error}): announce another port, or none"
        ) from error
    return listener, format_address(host, port or listener.getsockname()[1])
