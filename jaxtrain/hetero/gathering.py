"""`Gathering` collects small values that all members give between two steps, and gives each of them all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.hetero.seats import Seat

__all__ = ["Gathering"]


class Gathering:
    """The values that are gathered at the moment, if any.

    Args:
        send: Sends a message to the member of a number.

    Attributes:
        name: Name of the values that are gathered; None for none.
    """

    def __init__(self, send: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._send = send
        self.name: str | None = None

    def give(self, seat: Seat, name: str, values: dict[str, Any], active: Sequence[Seat]) -> None:
        """Store the values of a member; the last member's complete them for all.

        Raises:
            ValueError: The others gather something else.
        """
        if self.name not in (None, name):
            raise ValueError(f"it gathers {name[:40]!r}, the others {self.name!r}")
        self.name, seat.values = name, values
        if all(one.values is not None for one in active):
            found = [[one.name, one.values] for one in active]
            for one in active:
                one.values = None
                self._send(one.number, {"kind": "gathered", "name": name, "values": found})
            self.name = None

    def change(self, active: Sequence[Seat], roll: Mapping[str, Any]) -> None:
        """Tell all waiting members that the membership changed, so that none of them gets a result."""
        for seat in active:
            if seat.values is not None:
                seat.values = None
                self._send(seat.number, {"kind": "changed", "name": self.name, **roll})
        self.name = None
