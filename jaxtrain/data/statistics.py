"""`Statistics` holds mean and spread of each band and the count of each class, over training ground only.

If whole chunks lie in training blocks, the chunk counts made at ingest give them at no cost. If blocks are smaller
than chunks, or training uses masked pixels (the counts leave those out of the moments), a fixed sample of training
windows is read instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import as_images
from jaxtrain.data.classes import Classes
from jaxtrain.data.counting import count_classes
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.data.windows import WindowPlan
from zarr_store.errors import NothingFound
from zarr_store.index import TrainingIndex

__all__ = ["Statistics", "training_statistics"]

Moments = npt.NDArray[np.float64]

_SAMPLED_WINDOWS = 256
"""Number of windows that are sampled: 4 million pixels at patch 128 give the mean to a thousandth of the spread."""
_READ_AT_ONCE = 16
_SAMPLED_DATES = 1024
"""Number of dates that are read in all if windows are series."""
_ENOUGH_SHARE = 0.25
"""Smallest share of the training pixels in whole training chunks for which their counts stand for all."""


@dataclass(frozen=True)
class Statistics:
    """The numbers that normalisation and class weights need.

    Attributes:
        mean, std: float64 (bands,) in stored numbers, over pixels that the network sees; std is at least tiny.
        class_pixels: int64 (classes,) pixels of each class in all training windows; of values, those of the sample.
        pixels: Pixels from which mean and spread come.
        value: (mean, std) of learned values; None for classes.
        source: "index" for chunk counts, "windows" for a sample of windows.
        stands_for: Estimate of the observed pixels of all training windows, which weighs one cube against another.
    """

    mean: Moments
    std: Moments
    class_pixels: npt.NDArray[np.int64]
    pixels: int
    source: Literal["index", "windows"]
    value: tuple[float, float] | None = None
    stands_for: float = 0.0


def training_statistics(index: TrainingIndex, plan: WindowPlan, reader: WindowReader, classes: Classes) -> Statistics:
    """Compute the statistics of the training part; validation and test ground do not enter.

    Args:
        index: Training index of the collection.
        plan: Windows and split.
        reader: Reads windows with labels.
        classes: The learned classes.
    """
    select = _training_chunks(index, plan.blocks)
    pixels = int(index.observed[select].sum())
    windows = plan.parts["train"]
    target = reader.target
    if (
        (target is None or not target.values)
        and not reader.learn_masked
        and pixels >= _ENOUGH_SHARE * len(windows) * reader.dates * windows.patch**2
    ):
        chosen = list(reader.bands)
        mean, std = (moments[chosen] for moments in index.statistics(select))
        # cubes of earlier releases counted numbers that are not finite
        if np.isfinite(mean).all() and np.isfinite(std).all():
            if target is None:
                by_class = np.array([pixels], np.int64)
            else:
                by_class = count_classes(reader, windows, classes)
            stands_for = pixels * _training_ground(index, plan.blocks) / max(int(index.pixels[select].sum()), 1)
            return Statistics(mean, std, by_class, pixels, "index", stands_for=stands_for)
    found = _from_windows(plan, reader)
    if target is None or target.values:
        return found
    # moments of a sample are near those of all, but a rare class may lie in no window of a sample
    return replace(found, class_pixels=count_classes(reader, windows, classes))


def _training_chunks(index: TrainingIndex, split: Split) -> npt.NDArray[np.bool_]:
    """Return the present chunks that touch no block but training blocks, bool (T, CY, CX)."""
    elsewhere = (split.parts != PARTS.index("train")).astype(np.int64)
    _, cy, cx = index.chunk
    touch_y = _touching(index.present.shape[1], cy, elsewhere.shape[0], split.block[0])
    touch_x = _touching(index.present.shape[2], cx, elsewhere.shape[1], split.block[1])
    inside: npt.NDArray[np.bool_] = touch_y @ elsewhere @ touch_x.T == 0
    return index.present & inside


def _training_ground(index: TrainingIndex, split: Split) -> float:
    """Return the number of pixels in written chunks of training blocks, over all dates."""
    inside = (split.parts == PARTS.index("train")).astype(np.float64)
    shared = [
        np.minimum(low + chunk, edge + block) - np.maximum(low, edge)
        for axis, (chunk, block) in enumerate(zip(index.chunk[1:], split.block, strict=True))
        for low in [np.arange(index.present.shape[axis + 1])[:, None] * chunk]
        for edge in [np.arange(split.parts.shape[axis])[None, :] * block]
    ]
    y, x = (part.clip(min=0) / chunk for part, chunk in zip(shared, index.chunk[1:], strict=True))
    return float((index.pixels * (y @ inside @ x.T)).sum())


def _touching(chunks: int, chunk: int, blocks: int, block: int) -> npt.NDArray[np.int64]:
    low, edge = np.arange(chunks)[:, None] * chunk, np.arange(blocks)[None, :] * block
    # the last chunk may reach beyond the last block; there is no ground there
    return ((low < edge + block) & (edge < low + chunk)).astype(np.int64)


def _from_windows(plan: WindowPlan, reader: WindowReader) -> Statistics:
    windows = plan.parts["train"]
    most = _SAMPLED_WINDOWS if reader.dates == 1 else max(16, _SAMPLED_DATES // reader.dates)
    numbers = SampleOrder(seed=0, count=len(windows)).indices(0, min(most, len(windows)))
    rows = windows.rows[np.sort(numbers)]
    at_once = max(1, _READ_AT_ONCE // reader.dates)
    count, mean, m2 = 0, np.zeros(len(reader.bands)), np.zeros(len(reader.bands))
    counted = 0
    learned: list[npt.NDArray[np.float64]] = []
    for start in range(0, len(rows), at_once):
        batch = reader.read(rows[start : start + at_once])
        values = as_images(batch["image"])[as_images(batch["observed"]) == 1].astype(np.float64)
        values = values[np.isfinite(values).all(axis=1)]
        if reader.target is None:
            counted += len(values)
        elif reader.target.values:
            learned.append(batch["label"][np.isfinite(batch["label"])].astype(np.float64))
            counted += len(learned[-1])
        if not len(values):
            continue
        # joining of moments after Chan, Golub & LeVeque (1979)
        here, total = values.mean(axis=0), count + len(values)
        delta = here - mean
        m2 += np.square(values - here).sum(axis=0) + np.square(delta) * (count * len(values) / total)
        mean = mean + delta * (len(values) / total)
        count = total
    std = np.sqrt(m2 / max(count, 1))
    value = _value_moments(learned, reader) if learned else None
    std, by_class = np.where(std > 0, std, 1.0), np.array([counted], np.int64)
    stands_for = count * len(windows) / max(len(rows), 1)
    return Statistics(mean, std, by_class, count, "windows", value, stands_for)


def _value_moments(learned: list[npt.NDArray[np.float64]], reader: WindowReader) -> tuple[float, float]:
    values = np.concatenate(learned)
    name = "" if reader.target is None else reader.target.name
    if not len(values):
        raise NothingFound(f"{reader.cube.url}: {name!r} has no value in the training windows; lower data.min_labelled")
    spread = float(values.std())
    return float(values.mean()), spread if spread > 0 else 1.0
