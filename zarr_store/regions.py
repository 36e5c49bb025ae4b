"""`Region` is one box of a cube, the unit of every task, write, retry and check.

Pure integer arithmetic on (time, y, x); no arrays and no input or output here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from zarr_store.errors import InvalidInput

__all__ = ["Region", "box_at", "count_boxes", "iterate_boxes"]


@dataclass(frozen=True, order=True, slots=True)
class Region:
    """A half-open integer box over (time, y, x); all bands belong to it.

    >>> Region(0, 1, 0, 256, 0, 128)
    Region(t0=0, t1=1, y0=0, y1=256, x0=0, x1=128)
    """

    t0: int
    t1: int
    y0: int
    y1: int
    x0: int
    x1: int

    def __post_init__(self) -> None:
        if not (0 <= self.t0 < self.t1 and 0 <= self.y0 < self.y1 and 0 <= self.x0 < self.x1):
            raise InvalidInput(f"region must be non-empty and start at or above zero, got {self!r}")

    @classmethod
    def from_list(cls, values: list[int]) -> Self:
        return cls(*(int(v) for v in values))

    def to_list(self) -> list[int]:
        return [self.t0, self.t1, self.y0, self.y1, self.x0, self.x1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size as (times, height, width)."""
        return (self.t1 - self.t0, self.y1 - self.y0, self.x1 - self.x0)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        return (slice(self.t0, self.t1), slice(self.y0, self.y1), slice(self.x0, self.x1))

    def intersect(self, other: Region) -> Region | None:
        """Return the common box, or None if there is none."""
        lo = (max(self.t0, other.t0), max(self.y0, other.y0), max(self.x0, other.x0))
        hi = (min(self.t1, other.t1), min(self.y1, other.y1), min(self.x1, other.x1))
        if any(a >= b for a, b in zip(lo, hi, strict=True)):
            return None
        return Region(lo[0], hi[0], lo[1], hi[1], lo[2], hi[2])

    def halo(self, pixels: int, shape: tuple[int, int]) -> Region:
        """Return the region grown by `pixels` on each spatial side, cut at the grid's `shape` (height, width)."""
        return Region(
            self.t0,
            self.t1,
            max(0, self.y0 - pixels),
            min(shape[0], self.y1 + pixels),
            max(0, self.x0 - pixels),
            min(shape[1], self.x1 + pixels),
        )

    def within(self, outer: Region) -> tuple[slice, slice, slice]:
        """Return the slices that cut this region out of an array that holds `outer`."""
        return (
            slice(self.t0 - outer.t0, self.t1 - outer.t0),
            slice(self.y0 - outer.y0, self.y1 - outer.y0),
            slice(self.x0 - outer.x0, self.x1 - outer.x0),
        )


def iterate_boxes(
    shape: tuple[int, int, int], box: tuple[int, int, int]
) -> Iterator[tuple[tuple[int, int, int], Region]]:
    """Tile (time, y, x) `shape` by `box`, in order; the last boxes are cut at the edge.

    Yields:
        The box index (t, y, x) and its region.

    >>> [index for index, _ in iterate_boxes((1, 3, 2), (1, 2, 2))]
    [(0, 0, 0), (0, 1, 0)]
    """
    counts = count_boxes(shape, box)
    for t in range(counts[0]):
        for y in range(counts[1]):
            for x in range(counts[2]):
                yield (t, y, x), box_at(shape, box, (t, y, x))


def count_boxes(shape: tuple[int, int, int], box: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the number of boxes along each axis of `iterate_boxes`.

    >>> count_boxes((1, 3, 2), (1, 2, 2))
    (1, 2, 1)
    """
    return (-(-shape[0] // box[0]), -(-shape[1] // box[1]), -(-shape[2] // box[2]))


def box_at(shape: tuple[int, int, int], box: tuple[int, int, int], index: tuple[int, int, int]) -> Region:
    """Return the region of one box of `iterate_boxes`, cut at the edge."""
    t, y, x = index
    return Region(
        t * box[0],
        min((t + 1) * box[0], shape[0]),
        y * box[1],
        min((y + 1) * box[1], shape[1]),
        x * box[2],
        min((x + 1) * box[2], shape[2]),
    )
