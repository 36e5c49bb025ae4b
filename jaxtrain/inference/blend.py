"""Blends overlapping windows: weights fall to zero at the edge of a window; sums are kept for one row of windows.

Letters: H, W pixels of a block, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.inference.maps import CHUNK, NODATA, MapWriter

__all__ = ["Sink", "Strips", "taper", "window_starts"]

Weights = npt.NDArray[np.float32]
Block = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.bool_]]
"""Finished rows: first row, mean probability (H, W, K), seen (H, W)."""


def window_starts(size: int, patch: int, overlap: int) -> npt.NDArray[np.int64]:
    """Return the first pixels of windows that cover [0, size), each `patch` long, that share at least `overlap`.

    The last window ends with the scene.

    >>> window_starts(10, 4, 2).tolist(), window_starts(9, 4, 0).tolist(), window_starts(3, 4, 0).tolist()
    ([0, 2, 4, 6], [0, 4, 5], [0])
    """
    last = max(0, size - patch)
    return np.unique(np.append(np.arange(0, last, patch - overlap), last))


def taper(patch: int, overlap: int) -> Weights:
    """Return the weight along one side of a window, float32 (patch,): 1, with raised cosines at both ends.

    Two tapers that are shifted by patch - overlap add up to 1 where they overlap.
    """
    weight = np.ones(patch)
    ramp = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
    weight[:overlap] *= ramp
    weight[patch - overlap :] *= ramp[::-1]
    return weight.astype(np.float32)


class Strips:
    """Weighted sums over one row of windows. It moves down the scene; rows that no later window reaches are handed out.

    Per pixel there are Σ weight·seen·p and Σ weight·seen over windows and dates: their quotient is the mean over dates
    of the blended probability, because a pixel's weights are the same on each date on which it was seen. `seen` is 0
    where nothing was seen on a date and 1 where the pixel was seen; a number in between makes a date count less.
    """

    def __init__(self, height: int, x0: int, x1: int, patch: int, overlap: int, classes: int) -> None:
        self._height, self._x0, self._x1, self._patch = height, x0, x1, patch
        self._top = 0
        self._sum = np.zeros((patch, x1 - x0, classes), np.float32)
        self._weight = np.zeros((patch, x1 - x0), np.float32)
        side = np.maximum(taper(patch, overlap), np.float32(1e-4))  # at the scene's edge no other window adds weight
        self._window = side[:, None] * side[None, :]

    def add(self, y: int, x: int, probability_HWK: Weights, seen_HW: Weights) -> None:
        """Add one window of one date, first pixel (y, x); `y` must not lie above the rows that were handed out."""
        low, high = max(x, self._x0), min(x + self._patch, self._x1)
        inside = slice(low - x, high - x)
        across = slice(low - self._x0, high - self._x0)
        down = y - self._top
        weight = (self._window * seen_HW)[: self._patch - down, inside]
        answer = probability_HWK[: self._patch - down, inside]
        finite = np.asarray(np.isfinite(answer).all(axis=-1))
        if not finite.all():  # an answer that is no number is none: it must not become class 0
            weight, answer = weight * finite, np.where(finite[..., None], answer, np.float32(0))
        self._sum[down:, across] += weight[..., None] * answer
        self._weight[down:, across] += weight

    def advance(self, y: int | None) -> Iterator[Block]:
        """Hand out (first row, mean probability, seen) of all rows above `y`; None for all remaining rows."""
        target = self._height if y is None else y
        while self._top < target:
            rows = min(target - self._top, self._patch)
            weight = self._weight[:rows]
            mean = self._sum[:rows] / np.maximum(weight, np.float32(1e-30))[..., None]
            yield self._top, mean.astype(np.float32, copy=False), weight > 0
            self._sum = np.concatenate([self._sum[rows:], np.zeros_like(self._sum[:rows])])
            self._weight = np.concatenate([self._weight[rows:], np.zeros_like(self._weight[:rows])])
            self._top += rows


class Sink:
    """Collects finished rows into whole chunk rows of the map, so that no chunk is compressed twice."""

    def __init__(self, writer: MapWriter, x0: int, counts: npt.NDArray[np.int64], *, values: bool = False) -> None:
        self._writer, self._x0, self._counts, self._values = writer, x0, counts, values
        self._first = 0
        self._rows: list[npt.NDArray[Any]] = []

    def put(self, blocks: Iterable[Block]) -> None:
        """Take the next rows, top to bottom."""
        for y, probability_HWK, seen_HW in blocks:
            layers = self._layers(probability_HWK, seen_HW)
            while layers.shape[1]:
                room = CHUNK - (y - self._first)
                self._rows.append(layers[:, :room])
                y += min(room, layers.shape[1])
                layers = layers[:, room:]
                if y - self._first == CHUNK:
                    self.flush()

    def _layers(self, probability_HWK: npt.NDArray[np.float32], seen_HW: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        if self._values:
            self._counts[[0, NODATA]] += (int(seen_HW.sum()), int((~seen_HW).sum()))
            return np.where(seen_HW, probability_HWK[..., 0], np.float32(np.nan))[None]
        percent = np.rint(np.clip(probability_HWK, 0, 1) * 100).astype(np.uint8)
        layers = [probability_HWK.argmax(axis=-1).astype(np.uint8), percent.max(axis=-1)]
        if self._writer.probabilities:
            layers += list(np.moveaxis(percent, -1, 0))
        stacked = np.where(seen_HW, np.stack(layers), np.uint8(NODATA))
        self._counts += np.bincount(stacked[0].ravel(), minlength=256)
        return stacked

    def flush(self) -> None:
        """Write the remaining rows."""
        if self._rows:
            block = np.concatenate(self._rows, axis=1)
            if self._values:
                self._writer.write_values(self._first, self._x0, block[0])
            else:
                self._writer.write(self._first, self._x0, block[0], block[1], block[2:] if len(block) > 2 else None)
            self._first += block.shape[1]
            self._rows = []
