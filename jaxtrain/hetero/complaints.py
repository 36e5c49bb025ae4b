"""`Complaints` are pairs of members whose connection broke, though both are alive: the group decides what follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from jaxtrain.hetero.seats import Seat

__all__ = ["Complaints"]

_COMPLAINT_S = 1.0
"""Seconds after a broken connection in which the other member may turn out to be dead."""
_MOST_RETRIES = 3
"""Attempts of a step after which one of two members that cannot reach each other is dropped."""


class Complaints:
    """Reports of members about lost connections with other members."""

    def __init__(self) -> None:
        self._said: list[tuple[frozenset[int], float]] = []
        self._retries: Counter[frozenset[int]] = Counter()

    def add(self, number: int, other: int, now: float) -> None:
        """Record that a member lost its connection to another one."""
        self._said.append((frozenset({number, other}), now))

    def forget(self, number: int) -> None:
        """Remove the reports about a member that has left."""
        self._said = [found for found in self._said if number not in found[0]]

    def clear(self) -> None:
        """Remove all reports, as all connections are opened again."""
        self._said = []

    def forget_retries(self) -> None:
        """Reset the counts of attempts, for a new step."""
        self._retries.clear()

    def due(self, seats: Mapping[int, Seat], now: float) -> Iterator[tuple[Seat, Seat, bool]]:
        """Yield older member, newer member and whether the step may be tried again with both.

        Args:
            seats: The members by number; it may lose some while this goes on.
            now: The time.
        """
        due = [pair for pair, at in self._said if now - at > _COMPLAINT_S]
        if not due:
            return
        self._said = []
        for pair in dict.fromkeys(due):
            both = sorted((seats[number] for number in pair if number in seats), key=lambda seat: seat.number)
            if len(both) < 2:
                continue
            if any(now - seat.heard > seat.application.silence_s / 2 for seat in both):
                self._said.append((pair, now))  # silence will show which of the two has failed
                continue
            self._retries[pair] += 1
            yield both[0], both[1], self._retries[pair] < _MOST_RETRIES
