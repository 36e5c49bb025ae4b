"""Count the pixels of each class that a part of the data holds, each once and none estimated.

Chunks that are seen in every pixel were counted at ingest, and cost nothing. Of the others, labels and status are read.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jaxtrain.data.classes import Classes
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.targets import Target, window_labels
from jaxtrain.data.windows import Windows, window_shares
from zarr_store.index import TrainingIndex

__all__ = ["count_classes"]

Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_READ_AT_ONCE = 256
"""Windows of one date that are read together."""


def count_classes(reader: WindowReader, windows: Windows, classes: Classes) -> Counts:
    """Count the pixels of each class that a network sees in some windows, int64 (classes,).

    Args:
        reader: Reads the windows, with labels.
        windows: Windows of one part.
        classes: The learned classes.
    """
    counted = np.zeros(256, np.int64)
    rows, target = windows.rows, reader.target
    if target is None or not len(rows):
        return counted[: len(classes)]
    if reader.index is not None and reader.dates == 1:
        shape = reader.cube.spec(reader.collection).shape
        sides = np.array([1, windows.patch, windows.patch], np.int32)
        chosen = np.zeros((shape[0], -(-shape[1] // windows.patch), -(-shape[2] // windows.patch)), bool)
        chosen[tuple((rows // sides).T)] = True
        if target.place == "label":
            known = chosen & (window_shares(reader.index, shape, windows.patch, ~_sure(reader), edges=True) == 0)
            _add_layer(counted, target, classes, known.sum(axis=0, dtype=np.int64), windows.patch)
        else:
            known = _add_chunks(counted, reader, reader.index, classes, chosen)
        rows = rows[~known[tuple((rows // sides).T)]]
    # a damaged chunk is reported where it is learned or judged; here its windows count as nothing
    labels = replace(reader, images=False, on_unreadable=lambda row, error: None)
    at_once = max(1, _READ_AT_ONCE // reader.dates)
    for start in range(0, len(rows), at_once):
        counted += np.bincount(labels.read(rows[start : start + at_once])["label"].ravel(), minlength=256)
    return counted[: len(classes)]


def _sure(reader: WindowReader) -> Mask:
    """Return which chunks are seen by the network in every pixel."""
    index = reader.index
    assert index is not None
    seen = index.observed + index.masked if reader.learn_masked else index.observed
    sure: Mask = index.present & (seen == index.pixels)
    return sure


def _add_chunks(counted: Counts, reader: WindowReader, index: TrainingIndex, classes: Classes, chosen: Mask) -> Mask:
    """Add the counts of chunks that lie in chosen windows alone; return the windows that are done with."""
    assert reader.target is not None
    sure, (ct, *sides) = _sure(reader), index.chunk
    ratios = [reader.patch / side for side in sides]
    blank = np.zeros_like(chosen)
    if ct != 1 or not (
        all(r >= 1 and r % 1 == 0 for r in ratios) or all(1 / r >= 1 and 1 / r % 1 == 0 for r in ratios)
    ):
        return blank
    if ratios[0] >= 1:  # a window of whole chunks
        small, large, factors = sure, chosen, [int(r) for r in ratios]
    else:  # a chunk of whole windows
        small, large, factors = chosen, sure, [round(1 / r) for r in ratios]
    padded = np.ones((len(large), large.shape[1] * factors[0], large.shape[2] * factors[1]), bool)
    padded[:, : small.shape[1], : small.shape[2]] = small
    cells = padded.reshape(len(large), large.shape[1], factors[0], large.shape[2], factors[1])
    whole = large & cells.all(axis=(2, 4))
    spread = whole.repeat(factors[0], axis=1).repeat(factors[1], axis=2)[:, : small.shape[1], : small.shape[2]]
    chunks, windows = (spread, whole) if ratios[0] >= 1 else (whole, spread)
    by_value = index.class_counts[reader.target.name][chunks].sum(axis=0)
    for number, values in enumerate(classes.values):
        counted[number] += by_value[list(values)].sum()
    return windows


def _add_layer(counted: Counts, target: Target, classes: Classes, dates: Counts, patch: int) -> None:
    """Add the labels of each window of a label layer, once for each of its dates (rows, columns)."""
    for first, labels in window_labels(target, classes, patch, edges=True):
        here = dates[first : first + len(labels.pixels)]
        for row, column in np.argwhere(here):
            tally = np.bincount(labels.pixels[row, column], minlength=256)
            counted += here[row, column] * tally
