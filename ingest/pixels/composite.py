"""Compositing: the mean or median of a pixel over its clear observations in one time step.

Values are linear: harmonised digital numbers (scale 0.0001) or backscatter in power, never decibels. Whole numbers
are rounded once, at the end, to the nearest, halves up: the mean of 100 and 101 is 101, and so is their median. A
saturated pixel (65535) counts with that value. Status and class layers come from the first source that sees the pixel
clear, as without compositing. Where no source is clear, the first that sees the pixel at all gives its value, its
status is "masked" and it counts 0 observations.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import numpy.typing as npt

from zarr_store.errors import UnknownName
from zarr_store.regions import Region
from zarr_store.spec import CubeSpec

__all__ = ["Tally", "make_tally", "strips"]

Pixels = npt.NDArray[np.generic]
Bool = npt.NDArray[np.bool_]
Place = tuple[slice, slice]

_MEDIAN_BYTES = 512 << 20
"""Most memory for the observations of one time step whose median is computed, bytes."""
_STRIP_ROWS = 256
"""Heights of strips are multiples of this, as source blocks are."""
_SORT_ROWS = 64
"""Rows that are sorted at once."""


class Tally(Protocol):
    """The clear observations of one time step of one shard."""

    def add(self, main: Pixels, clear: Bool, place: Place) -> None:
        """Add one source: (band, y, x) on the rows and columns of `place`, valid where `clear`."""

    def finish(self, main: Pixels, observations: Pixels) -> None:
        """Write the composite over `main` where a source was clear, and the counts into `observations`."""


def make_tally(reduce: str, shape: tuple[int, int, int], dtype: npt.DTypeLike) -> Tally | None:
    """Make the tally of a reducer; None for "first", which needs no tally.

    Args:
        reduce: "first", "median" or "mean".
        shape: (bands, height, width) of the shard.
        dtype: Type of its main array.

    >>> tally = make_tally("mean", (1, 1, 2), "uint16")
    >>> for dn in (100, 101):
    ...     tally.add(np.full((1, 1, 2), dn, np.uint16), np.array([[True, dn == 100]]), (slice(0, 1), slice(0, 2)))
    >>> main, count = np.zeros((1, 1, 2), np.uint16), np.zeros((1, 2), np.uint16)
    >>> tally.finish(main, count)
    >>> main.tolist(), count.tolist()
    ([[[101, 100]]], [[2, 1]])
    """
    if reduce == "first":
        return None
    if reduce not in ("median", "mean"):
        raise UnknownName.of("reducer", reduce, ("first", "median", "mean"))
    return _Mean(shape, np.dtype(dtype)) if reduce == "mean" else _Median(shape, np.dtype(dtype))


def strips(region: Region, spec: CubeSpec, most_sources: int) -> list[Region]:
    """Cut a shard into strips that are made one by one, so that a median's memory stays bounded with many scenes.

    Strips are multiples of 256 rows high, as source blocks are. Pixels do not depend on the cut; blocks that lie across
    it are read twice.

    Args:
        region: The shard.
        spec: Its collection.
        most_sources: Largest number of scenes in one of its time steps.
    """
    _, height, width = region.shape
    itemsize = np.dtype(spec.array(spec.kind).dtype).itemsize
    row = max(1, most_sources * width * (len(spec.bands) * itemsize + 1))
    rows = max(_STRIP_ROWS, _MEDIAN_BYTES // row // _STRIP_ROWS * _STRIP_ROWS)
    if spec.reduce != "median" or rows >= height:
        return [region]
    cuts = [*range(region.y0, region.y1, rows), region.y1]
    return [Region(region.t0, region.t1, top, bottom, region.x0, region.x1) for top, bottom in itertools.pairwise(cuts)]


class _Mean:
    """The tally of the mean: running sums, whose memory does not grow with the number of observations."""

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[np.generic]) -> None:
        # uint32 holds the sum of 65 537 saturated pixels: no time step has as many scenes over one pixel
        self.total = np.zeros(shape, np.uint32 if dtype.kind == "u" else np.float64)
        self.count = np.zeros(shape[1:], np.uint16)

    def add(self, main: Pixels, clear: Bool, place: Place) -> None:
        part = self.total[(slice(None), *place)]
        np.add(part, main, out=part, where=clear, casting="same_kind")
        self.count[place] += clear

    def finish(self, main: Pixels, observations: Pixels) -> None:
        some = self.count > 0
        count = np.maximum(self.count, 1)
        value: Pixels = (
            (2 * self.total.astype(np.uint64) + count) // (2 * count.astype(np.uint64))
            if main.dtype.kind == "u"
            else self.total / count
        )
        np.copyto(main, value.astype(main.dtype), where=some)
        observations[...] = self.count


class _Median:
    """The tally of the median: it keeps all observations until the end, within the memory that `strips` bounds."""

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[np.generic]) -> None:
        self.shape, self.dtype = shape, dtype
        self.taken: list[tuple[Pixels, Bool, Place]] = []

    def add(self, main: Pixels, clear: Bool, place: Place) -> None:
        if clear.any():
            self.taken.append((main, clear, place))

    def finish(self, main: Pixels, observations: Pixels) -> None:
        observations[...] = 0
        for top in range(0, self.shape[1], _SORT_ROWS):
            self._finish_rows(top, min(top + _SORT_ROWS, self.shape[1]), main, observations)

    def _finish_rows(self, top: int, bottom: int, main: Pixels, observations: Pixels) -> None:
        bands, _, width = self.shape
        reach = [one for one in self.taken if one[2][0].start < bottom and one[2][0].stop > top]
        if not reach:
            return
        # values that are not clear sort behind the clear ones, so the count gives the place of the middle
        last = 2 ** (8 * self.dtype.itemsize) - 1 if self.dtype.kind == "u" else np.inf
        stack = np.full((len(reach), bands, bottom - top, width), last, self.dtype)
        count = np.zeros((bottom - top, width), np.int64)
        for layer, (pixels, clear, (rows, cols)) in zip(stack, reach, strict=True):
            first, end = max(rows.start, top), min(rows.stop, bottom)
            inner = slice(first - rows.start, end - rows.start)
            place = (slice(first - top, end - top), cols)
            np.copyto(layer[(slice(None), *place)], pixels[:, inner], where=clear[inner])
            count[place] += clear[inner]
        stack.sort(axis=0)
        some = count > 0
        at = np.maximum(count, 1)
        low, high = (
            np.take_along_axis(stack, np.broadcast_to(k, (1, bands, *k.shape)), axis=0)[0]
            for k in ((at - 1) // 2, at // 2)
        )
        value: Pixels = (
            (low.astype(np.uint32) + high + 1) // 2 if self.dtype.kind == "u" else (low.astype(np.float64) + high) / 2
        )
        with np.errstate(invalid="ignore"):
            np.copyto(main[:, top:bottom], value.astype(main.dtype), where=some)
        observations[top:bottom] = count
