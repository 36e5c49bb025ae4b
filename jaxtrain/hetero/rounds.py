"""`Round` sums the vectors of all members in one attempt of a step: each member sums one slice and sends it to all.

With n members, a vector of R bytes costs each of them 2 (n - 1) / n × R bytes in each direction, the least that is
possible. A slice is added in the order of the members, so all get the same bytes, and the same as in any other run with
the same contributions. Slices travel in blocks: while one is received, the one before is added and sent on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.hetero.wire import BLOCK_BYTES

__all__ = ["Round", "slice_bounds"]

Vector = npt.NDArray[np.float32]
_ALIGNED = 16
_BLOCK = BLOCK_BYTES // 4


def slice_bounds(size: int, members: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each member's slice; starts are multiples of 16 numbers.

    >>> slice_bounds(100, 3)
    [(0, 32), (32, 64), (64, 100)]
    """
    cuts = [size * number // members // _ALIGNED * _ALIGNED for number in range(members)]
    return list(zip(cuts, [*cuts[1:], size], strict=True))


class Round:
    """One attempt to sum the vectors of a step.

    Args:
        key: (step, attempt).
        numbers: Numbers of all members, in their order.
        own: Number of this member.
        idle: Members without a chunk: nothing is sent or added of them, but they receive the sum and add their slice.
        total: Memory for the sum, float32 (R,).
        parts: Memory for what the others send of this member's slice: float32 (members - 1, at least its length).
    """

    def __init__(
        self,
        key: tuple[int, int],
        numbers: Sequence[int],
        own: int,
        *,
        idle: Collection[int] = (),
        total: Vector,
        parts: Vector,
    ) -> None:
        self.key = key
        self._numbers, self._own = list(numbers), own
        self._total = total
        self._bounds = dict(zip(numbers, slice_bounds(len(total), len(numbers)), strict=True))
        start, stop = self._bounds[own]
        self._length = stop - start
        self._others = [number for number in numbers if number != own]
        self._adding = [number for number in numbers if number not in idle]
        self._parts = {
            number: parts[row, : self._length] for row, number in enumerate(self._others) if number not in idle
        }
        self._got_part = dict.fromkeys(self._parts, 0)
        self._got_sum = dict.fromkeys(self._others, 0)
        self._added = 0
        self._vector: Vector | None = None

    @property
    def others(self) -> list[int]:
        """Numbers of the other members."""
        return list(self._others)

    def contribute(self, vector: Vector) -> list[tuple[int, dict[str, Any], memoryview]]:
        """Take this member's vector, and return the messages with its parts for the others.

        The first block of each comes first, from the next member on, so that not all send to the same one.
        """
        self._vector = vector
        if self._own not in self._adding:
            return []
        at = self._numbers.index(self._own)
        turn = [*self._numbers[at + 1 :], *self._numbers[:at]]
        longest = max((self._bounds[number][1] - self._bounds[number][0] for number in turn), default=0)
        return [
            (number, self._header("part", offset), _bytes(vector[start + offset : min(start + offset + _BLOCK, stop)]))
            for offset in range(0, longest, _BLOCK)
            for number in turn
            for start, stop in (self._bounds[number],)
            if start + offset < stop
        ]

    def _header(self, kind: str, offset: int) -> dict[str, Any]:
        return {"kind": kind, "s": self.key[0], "a": self.key[1], "o": offset}

    def place(self, number: int, header: Mapping[str, Any], length: int) -> memoryview | None:
        """Return the memory for a block of another member; None if it does not belong to this round."""
        is_part = header["kind"] == "part"
        if number not in (self._got_part if is_part else self._got_sum) or length % 4:
            return None
        if is_part:
            target, got = self._parts[number], self._got_part[number]
        else:
            target, got = self._total[slice(*self._bounds[number])], self._got_sum[number]
        offset, count = int(header["o"]), length // 4
        if offset != got or offset + count > len(target):
            return None
        return _bytes(target[offset : offset + count])

    def arrived(self, number: int, header: Mapping[str, Any], length: int) -> None:
        """Count a complete block of `length` bytes of a part or of a sum."""
        got = self._got_part if header["kind"] == "part" else self._got_sum
        got[number] += length // 4

    def _ready(self) -> int:
        """Return the end of the part of this member's slice that can be added: whole blocks that all have sent."""
        if self._vector is None:
            return 0
        got = min(self._got_part.values(), default=self._length)
        return got if got == self._length else got // _BLOCK * _BLOCK

    @property
    def can_add(self) -> bool:
        """Whether `add` has something to do."""
        return self._ready() > self._added

    @property
    def complete(self) -> bool:
        """Whether the whole sum is there."""
        return self._added == self._length and all(
            got == self._bounds[number][1] - self._bounds[number][0] for number, got in self._got_sum.items()
        )

    def add(self, send: Callable[[int, dict[str, Any], memoryview], None]) -> None:
        """Add the blocks of this member's slice that all have sent, and send each block of the sum to all others."""
        assert self._vector is not None
        start, stop = self._bounds[self._own]
        own, total = self._vector[start:stop], self._total[start:stop]
        until = self._ready()
        while self._added < until:
            block = slice(self._added, min(self._added + _BLOCK, until))
            terms = [(own if number == self._own else self._parts[number])[block] for number in self._adding]
            out = total[block]
            with np.errstate(all="ignore"):  # the training loop handles what is not finite
                if len(terms) > 1:
                    np.add(terms[0], terms[1], out=out)
                else:
                    np.copyto(out, terms[0])
                for term in terms[2:]:
                    np.add(out, term, out=out)
            for number in self._others:
                send(number, self._header("sum", block.start), _bytes(out))
            self._added = block.stop


def _bytes(array: Vector) -> memoryview:
    return array.data.cast("B")
