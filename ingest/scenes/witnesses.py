"""`Witness`: one statement about the -1000 offset of a scene, by a flag, by metadata, or by a name of a baseline.

No single property decides. Every statement is kept with its weight, so that a person can see later why an offset was
chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

__all__ = ["OFFSET_DN", "Witness", "baseline_has_offset", "support_of"]

OFFSET_DN = -1000
"""Number that is added to digital numbers which still carry the offset."""


@dataclass(frozen=True)
class Witness:
    """One statement about the offset.

    Attributes:
        name: Where it stands, such as "s2:processing_baseline" or "raster metadata of the item".
        says: Its text, such as "05.09" or "true".
        dn_offset: What follows for a digital number (0 or -1000); None if nothing follows.
        weight: Weight of the statement; 0 for one that is recorded and not believed.
    """

    name: str
    says: str
    dn_offset: int | None
    weight: int

    def __str__(self) -> str:
        return f"{self.name} {self.says}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(**data)


def baseline_has_offset(baseline: str | None) -> bool | None:
    """Return whether products of this baseline carry the offset; None if it is unknown, or the 99.99 of special runs.

    >>> [baseline_has_offset(b) for b in ("03.01", "04.00", "05.11", "99.99", None)]
    [False, True, True, None, None]
    """
    if baseline is None or baseline.startswith("99"):
        return None
    return baseline >= "04.00"


def support_of(witnesses: Iterable[Witness], dn_offset: int) -> int:
    """Return the weight of the witnesses for an offset, less the weight of those against it.

    >>> support_of([Witness("flag", "true", 0, 1), Witness("title", "05.09", -1000, 3)], -1000)
    2
    """
    return sum(
        one.weight if one.dn_offset == dn_offset else -one.weight for one in witnesses if one.dn_offset is not None
    )
