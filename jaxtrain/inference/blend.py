"""Join windows to pixels: overlapping windows are blended, middles of windows are put side by side, dates are joined.

In a blend the weights fall to zero at the edge of a window, and sums are kept for one row of windows.

Arrays are indexed (H, W, K) and lie in memory class by class: numpy then works along whole rows, which takes a third of
the time that runs of K numbers take.

Letters: H, W pixels of a block, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Box", "BoxBlock", "Cores", "Strips", "Votes", "by_class", "taper", "window_starts"]

Weights = npt.NDArray[np.float32]
Block = tuple[int, Weights, Weights]
"""Finished rows: first row, mean probability (H, W, K), how well a pixel was seen on its best date (H, W)."""
BoxBlock = tuple[int, int, Weights, Weights]
"""A finished box: first row, first column, mean probability (H, W, K), how well each pixel was seen (H, W)."""
Box = tuple[int, int, int, int]
"""First row, the one after the last, first column, the one after the last."""
_TIE = 2.0**-12
"""Weight of a probability beside a vote: small enough that a thousand dates cannot outvote one."""


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


def by_class(height: int, width: int, classes: int) -> Weights:
    """Return zeros (height, width, classes) that lie in memory class by class.

    >>> by_class(2, 3, 4).shape, by_class(2, 3, 4).strides
    ((2, 3, 4), (12, 4, 24))
    """
    return np.zeros((classes, height, width), np.float32).transpose(1, 2, 0)


class Strips:
    """Weighted sums over one row of windows. It moves down the scene; rows that no later window reaches are handed out.

    Per pixel there are Σ weight·seen·p and Σ weight·seen over windows and dates: their quotient is the mean over dates
    of the blended probability, because a pixel's weights are the same on each date on which it was seen. `seen` is 0
    where nothing was seen on a date and 1 where the pixel was seen; a number in between makes a date count less.

    Args:
        height: Row at which the last block ends.
        x0, x1: First column, and the one after the last.
        patch: Side of a window.
        overlap: Pixels that neighbouring windows share.
        classes: Number of probabilities of a pixel.
        first: Row of the first window.
    """

    def __init__(
        self, height: int, x0: int, x1: int, patch: int, overlap: int, classes: int, *, first: int = 0
    ) -> None:
        self._height, self._x0, self._x1, self._patch = height, x0, x1, patch
        self._top = first
        self._sum = by_class(patch, x1 - x0, classes)
        self._weight = np.zeros((patch, x1 - x0), np.float32)
        self._seen = np.zeros((patch, x1 - x0), np.float32)
        side = np.maximum(taper(patch, overlap), np.float32(1e-4))  # at the scene's edge no other window adds weight
        self._window = side[:, None] * side[None, :]

    def add(self, y: int, x: int, probability_HWK: Weights, seen_HW: Weights) -> None:
        """Add one window of one date, first pixel (y, x); `y` must not lie above the rows that were handed out."""
        low, high = max(x, self._x0), min(x + self._patch, self._x1)
        inside = slice(low - x, high - x)
        across = slice(low - self._x0, high - self._x0)
        down = y - self._top
        seen = np.asarray(seen_HW[: self._patch - down, inside], np.float32)
        weight = self._window[: self._patch - down, inside] * seen
        answer = probability_HWK[: self._patch - down, inside]
        finite = _finite(answer)
        if finite is not None:  # an answer that is not a number counts as no answer: it must not become class 0
            weight, answer = weight * finite, np.where(finite[..., None], answer, np.float32(0))
            seen = seen * finite
        self._sum[down:, across] += weight[..., None] * answer
        self._weight[down:, across] += weight
        np.maximum(self._seen[down:, across], seen, out=self._seen[down:, across])

    def advance(self, y: int | None) -> Iterator[Block]:
        """Hand out (first row, mean probability, how well seen) of all rows above `y`; None for all remaining rows."""
        target = self._height if y is None else y
        while self._top < target:
            rows = min(target - self._top, self._patch)
            weight = self._weight[:rows]
            mean = self._sum[:rows] / np.maximum(weight, np.float32(1e-30))[..., None]
            # a copy: the rows move up before a writer in another thread is done with them
            yield self._top, mean.astype(np.float32, copy=False), self._seen[:rows].copy()
            for sums in (self._sum, self._weight, self._seen):
                sums[: self._patch - rows] = sums[rows:]
                sums[self._patch - rows :] = 0
            self._top += rows


def _finite(answer_HWK: Weights) -> npt.NDArray[np.bool_] | None:
    """Return which pixels have numbers in all classes; None where all have."""
    if np.isfinite(answer_HWK.sum()):  # one number that is not finite leaves no finite sum
        return None
    return np.asarray(np.isfinite(answer_HWK).all(axis=-1))


class Cores:
    """Sums over the dates of one box after the other, without overlap: the middle of each window, which is exact.

    Args:
        classes: Number of probabilities of a pixel.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._box: Box | None = None
        self._sum, self._weight = by_class(0, 0, classes), np.empty((0, 0), np.float32)
        self._seen = self._weight

    def add(self, box: Box, y: int, x: int, probability_HWK: Weights, seen_HW: Weights) -> Iterator[BoxBlock]:
        """Add one window of one date, first pixel (y, x); hand out the box before, if this is the first of another."""
        if box != self._box:
            yield from self.finish()
            shape = (box[1] - box[0], box[3] - box[2])
            self._box, self._sum = box, by_class(*shape, self._classes)
            self._weight, self._seen = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        cut = (slice(box[0] - y, box[1] - y), slice(box[2] - x, box[3] - x))
        answer, weight = probability_HWK[cut], np.asarray(seen_HW[cut], np.float32)
        finite = _finite(answer)
        if finite is not None:
            weight, answer = weight * finite, np.where(finite[..., None], answer, np.float32(0))
        self._sum += weight[..., None] * answer
        self._weight += weight
        np.maximum(self._seen, weight, out=self._seen)

    def finish(self) -> Iterator[BoxBlock]:
        """Hand out the last box: (first row, first column, mean probability, how well seen)."""
        if self._box is not None:
            mean = (self._sum / np.maximum(self._weight, np.float32(1e-30))[..., None]).astype(np.float32, copy=False)
            yield self._box[0], self._box[2], mean, self._seen
        self._box = None


class Votes:
    """Votes of dates: on each date a pixel votes for its most probable class.

    Of two classes with as many votes the one with the larger probabilities wins.

    Args:
        box: (first row, last row + 1, first column, last column + 1) of what is voted on.
        classes: Number of classes.
        further: Number of further channels, of which the largest of all dates is kept.
    """

    def __init__(self, box: Box, classes: int, further: int = 0) -> None:
        self._box, self._classes = box, classes
        self._further = np.zeros((box[1] - box[0], box[3] - box[2], further), np.float32)
        self._votes = np.zeros((box[1] - box[0], box[3] - box[2], classes), np.float32)
        self._seen = np.zeros(self._votes.shape[:2], np.float32)

    def add(self, y: int, x: int, probability_HWK: Weights, seen_HW: Weights) -> None:
        """Add a block of one date, first pixel (y, x)."""
        height, width = seen_HW.shape
        at = (slice(y - self._box[0], y - self._box[0] + height), slice(x - self._box[2], x - self._box[2] + width))
        probability_HWK, further = probability_HWK[..., : self._classes], probability_HWK[..., self._classes :]
        np.maximum(self._further[at], further, out=self._further[at])
        choice = probability_HWK.argmax(axis=-1)[..., None]
        votes = self._votes[at]
        vote = seen_HW[..., None] * (1 + np.take_along_axis(probability_HWK, choice, -1) * np.float32(_TIE))
        np.put_along_axis(votes, choice, np.take_along_axis(votes, choice, -1) + vote, -1)
        np.maximum(self._seen[at], seen_HW, out=self._seen[at])

    def blocks(self, rows: int) -> Iterator[BoxBlock]:
        """Hand out the shares of the votes, some rows at a time."""
        y0, y1, x0, _ = self._box
        for y in range(0, y1 - y0, rows):
            votes = self._votes[y : y + rows]
            share = votes / np.maximum(votes.sum(axis=-1, keepdims=True), np.float32(1e-30))
            both = np.concatenate([share, self._further[y : y + rows]], axis=-1)
            yield y0 + y, x0, both, self._seen[y : y + rows]
