"""`StepSum` is the sum of a step as the group sees it: who contributes which chunks, and whether all hold the total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.hetero.seats import Seat

__all__ = ["StepSum"]


class StepSum:
    """The contributions to the step under way, in its newest attempt."""

    def __init__(self) -> None:
        self._step = self._attempt = 0
        self._size: int | None = None
        self._order: list[int] = []
        self._parts: dict[int, tuple[str, dict[str, Any]]] = {}

    @property
    def key(self) -> dict[str, int]:
        """Step and attempt, as messages name them."""
        return {"step": self._step, "attempt": self._attempt}

    def begin(self, step: int) -> None:
        """Begin a step."""
        self._step, self._attempt, self._parts = step, 0, {}

    def try_again(self) -> None:
        """Begin a new attempt of the step."""
        self._attempt += 1
        self._parts = {}

    def open(self, active: Sequence[Seat]) -> None:
        """Expect contributions of these members, in their order."""
        self._order = [seat.number for seat in active]

    def is_of(self, message: Mapping[str, Any]) -> bool:
        """Return whether a message belongs to this attempt."""
        return (message["step"], message["attempt"]) == (self._step, self._attempt)

    def take(self, seat: Seat, message: Mapping[str, Any]) -> str | None:
        """Take what a member contributes; return what is wrong with it, or None."""
        chunks, size = tuple(map(int, message["chunks"])), int(message["size"])
        part = {
            "chunks": list(chunks),
            "weight": float(message["weight"]),
            "sums": {str(name): float(value) for name, value in message["sums"].items()},
            "seconds": [float(value) for value in message["seconds"]],
        }
        if self._size is None:
            self._size = size
        if chunks != seat.assigned or size != self._size:
            return f"contributed chunks {chunks} in {size} numbers, expected {seat.assigned} in {self._size}"
        seat.contributed = part
        self._parts[seat.number] = (seat.name, part)
        return None

    def is_held_by(self, active: Sequence[Seat]) -> bool:
        """Return whether all members that are left hold the sum of all contributions."""
        return all(seat.have for seat in active) and all(number in self._parts for number in self._order)

    def parts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name and contribution of each member, in their order."""
        return [self._parts[number] for number in self._order]
