"""Windows, splits, readers and statistics of several cubes, joined into one.

Rows get the number of their cube in front: int32 (count, 4) of (cube, time, y, x). Order, batches and steps do not look
at it, so they are the same as for one cube.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import HostBatch, Reader, Rows
from jaxtrain.data.memory import empty_array
from jaxtrain.data.reader import OnUnreadable
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.windows import Windows
from zarr_store.errors import IntegrityError

__all__ = ["CubesReader", "Splits", "join_statistics", "join_windows", "numbered"]


@dataclass(frozen=True)
class Splits:
    """The split of each of several cubes; each is split by itself."""

    each: tuple[Split, ...]

    @property
    def by_blocks(self) -> tuple[Split, ...]:
        """The splits that can be drawn as maps of blocks."""
        return self.each

    def counts(self) -> dict[str, int]:
        """Count the blocks of each part, over all cubes."""
        counted = [split.counts() for split in self.each]
        return {part: sum(counts[part] for counts in counted) for part in PARTS}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"cubes": [split.to_dict() for split in self.each]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(tuple(Split.from_dict(split) for split in data["cubes"]))


@dataclass(frozen=True)
class CubesReader:
    """Reader of rows of several cubes, each by the reader of its cube."""

    readers: tuple[Reader, ...]

    @property
    def shows(self) -> Literal["windows", "images"]:
        """A row is a window of one of the cubes."""
        return "windows"

    def read(self, rows: Rows) -> HostBatch:
        """Read rows, int32 (B, 4) of (cube, time, y, x); see `WindowReader.read`."""
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start to read rows; see `WindowReader.begin`."""
        begun = []
        for number in np.unique(rows[:, 0]):
            chosen = rows[:, 0] == number
            begun.append((chosen, self.readers[int(number)].begin(np.ascontiguousarray(rows[chosen, 1:]))))

        def finish() -> HostBatch:
            result: HostBatch = {}
            for chosen, wait in begun:
                for name, array in wait().items():
                    if name not in result:
                        result[name] = empty_array((len(rows), *array.shape[1:]), array.dtype)
                    elif array.dtype != result[name].dtype:  # numbers of one of the cubes were converted
                        result[name] = result[name].astype(np.result_type(array, result[name]))
                    result[name][chosen] = array
            return result

        return finish


def numbered(number: int, on_unreadable: OnUnreadable | None) -> OnUnreadable | None:
    """Return `on_unreadable` for one of several cubes, whose rows get the number of the cube; None for None."""
    if on_unreadable is None:
        return None
    report = on_unreadable

    def report_numbered(row: npt.NDArray[np.int32], error: IntegrityError) -> None:
        report(np.concatenate([np.array([number], np.int32), row]), error)

    return report_numbered


def join_windows(each: Sequence[Windows]) -> Windows:
    """Join windows of several cubes as sorted rows of (cube, time, y, x)."""
    rows = [
        np.concatenate([np.full((len(windows), 1), number, np.int32), windows.rows], axis=1)
        for number, windows in enumerate(each)
    ]
    return Windows(each[0].patch, np.concatenate(rows))


def join_statistics(each: Sequence[Statistics]) -> Statistics:
    """Join statistics over all pixels of several cubes; moments after Chan, Golub & LeVeque (1979).

    A cube weighs as its training windows do, not as the sample of them that was read.
    """
    pixels = np.array([one.stands_for for one in each], np.float64)
    learned = np.array([one.class_pixels.sum() * one.stands_for / max(one.pixels, 1) for one in each], np.float64)
    mean, std = _join(pixels, np.stack([one.mean for one in each]), np.stack([one.std for one in each]))
    values = [one.value for one in each]
    value = None
    if all(one is not None for one in values):
        moments = np.array(values, np.float64)
        middle, spread = _join(learned, moments[:, :1], moments[:, 1:])
        value = (float(middle[0]), float(spread[0]))
    source = "index" if all(one.source == "index" for one in each) else "windows"
    counted = np.sum([one.class_pixels for one in each], axis=0)
    number = sum(one.pixels for one in each)
    return Statistics(mean, std, counted, number, source, value, float(pixels.sum()))  # type: ignore[arg-type]


def _join(
    count: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    weight = (count / max(count.sum(), 1))[:, None]
    joined = (weight * mean).sum(axis=0)
    variance = (weight * (np.square(std) + np.square(mean - joined))).sum(axis=0)
    return joined, np.where(variance > 0, np.sqrt(variance), 1.0)
