"""Find the windows with data: those that touch a chunk of the cube in which a pixel was seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxtrain.data.modality_reader import ModalityReader
from jaxtrain.data.reader import WindowReader
from zarr_store.index import TrainingIndex

__all__ = ["anything_seen", "windows_seen"]

Rows = npt.NDArray[np.int64]


def windows_seen(
    reader: WindowReader | ModalityReader, index: TrainingIndex, rows: Rows, window: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Return which windows touch a chunk in which something was seen; a network of static layers alone maps all.

    Args:
        reader: Reads the windows.
        index: Counts of the chunks of the collection that gives the windows.
        rows: (time, y, x) of each window.
        window: (height, width) of a window.
    """
    if isinstance(reader, WindowReader):
        return _touch(rows, _chunks(index, reader), index, reader.dates, window)
    used = [source for source in reader.sources if source.modality.name not in reader.without]
    dated = [(source, source.reader) for source in used if source.reader is not None]
    found = np.full(len(rows), not dated)
    for source, one in dated:
        counted = one.cube.index(one.collection) if one.index is None else one.index
        ratio, chunks = source.modality.ratio, _chunks(counted, one)
        side = (-(-window[0] // ratio), -(-window[1] // ratio))
        for steps in source.steps[rows[:, 0]].T:
            paired = steps >= 0
            there = rows[paired] // np.array([1, ratio, ratio])
            there[:, 0] = steps[paired]
            found[paired] |= _touch(there, chunks, counted, 1, side)
    return found


def anything_seen(reader: WindowReader | ModalityReader, index: TrainingIndex, dates: list[int]) -> bool:
    """Return whether anything was seen on one of the dates, anywhere."""
    rows = np.array([(date, 0, 0) for date in dates], np.int64).reshape(-1, 3)
    return bool(windows_seen(reader, index, rows, (1 << 30, 1 << 30)).any())


def _chunks(index: TrainingIndex, reader: WindowReader) -> npt.NDArray[np.bool_]:
    """Return in which chunks (times, rows, columns) something was seen."""
    seen = (index.observed + index.masked > 0) if reader.learn_masked else index.observed > 0
    chunks: npt.NDArray[np.bool_] = seen & index.present
    return chunks


def _touch(
    rows: Rows, seen: npt.NDArray[np.bool_], index: TrainingIndex, dates: int, window: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Return which windows of so many dates touch one of the chunks."""
    ct, cy, cx = index.chunk
    height, width = window
    found = np.zeros(len(rows), bool)
    last_y, last_x = seen.shape[1] - 1, seen.shape[2] - 1
    for date in np.unique(rows[:, 0]).tolist():
        chunks = seen[np.arange(date, date + dates) // ct].any(axis=0)
        sums = np.pad(chunks.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        mine = rows[:, 0] == date
        y, x = rows[mine, 1], rows[mine, 2]
        y0, y1 = y // cy, np.minimum((y + height - 1) // cy, last_y) + 1
        x0, x1 = x // cx, np.minimum((x + width - 1) // cx, last_x) + 1
        found[mine] = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] > 0
    return found
