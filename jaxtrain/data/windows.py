"""`Windows` are the patches that a run reads; they are chosen from the training index, and no pixel is read.

The grid is tiled by patch × patch windows (aligned with the blocks of the split), once for each date, or for each
series of dates; the last ones reach over the edge of a grid that the patch does not divide. A window is learned where
its chunks were written (in a series, on one date at least) and enough of its pixels can be learned; both follow from
the chunk counts made at ingest. A chunk is usually larger than a patch, so the share of a window is that of the chunks
under it: an estimate, and a window without any label only costs its time, as it weighs nothing in the loss. Validation
and test take every window with a label, so that no labelled pixel of their blocks is left out of a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig
from jaxtrain.data.classes import UNLABELLED, Classes
from jaxtrain.data.splits import PARTS, UNUSED, Part, Split, add_blocks, block_shape, make_split
from jaxtrain.data.targets import Target, window_labels
from zarr_store.errors import InvalidInput, NothingFound, UnknownName
from zarr_store.index import TrainingIndex
from zarr_store.spec import CubeSpec

__all__ = ["Counted", "Window", "WindowPlan", "Windows", "plan_windows", "window_leakage", "window_shares"]


@dataclass(frozen=True, order=True)
class Window:
    """One patch of one date: its time step, its first pixel (y, x), and the number of its cube if there are several."""

    time: int
    y: int
    x: int
    cube: int = 0

    @classmethod
    def of(cls, row: npt.NDArray[np.int32]) -> Window:
        """Make the window from a row of `Windows`."""
        *cube, time, y, x = (int(v) for v in row)
        return cls(time, y, x, cube[0] if cube else 0)


@dataclass(frozen=True)
class Windows:
    """Many windows of one size: int32 `rows` of (time, y, x), or of several cubes (cube, time, y, x); sorted."""

    patch: int
    rows: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Window:
        return Window.of(self.rows[number])


class Counted(Protocol):
    """A split of a cube, of several cubes, or of samples."""

    @property
    def by_blocks(self) -> tuple[Split, ...]:
        """Splits that can be drawn as maps of blocks."""
        ...

    def counts(self) -> dict[str, int]:
        """Count the blocks, cells or samples of each part."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        ...


@dataclass(frozen=True)
class WindowPlan:
    """The windows of every part, and the split they come from."""

    split: Counted
    parts: Mapping[Part, Windows]

    @property
    def blocks(self) -> Split:
        """The split of a cube or scene.

        Raises:
            InvalidInput: The plan is of samples, which lie in no blocks.
        """
        if not isinstance(self.split, Split):
            raise InvalidInput("samples are split one by one, there are no blocks")
        return self.split

    def counts(self) -> dict[str, int]:
        """Count the windows of each part."""
        return {part: len(windows) for part, windows in self.parts.items()}


def window_shares(
    index: TrainingIndex,
    shape: tuple[int, int, int],
    patch: int,
    quantity: npt.NDArray[np.floating | np.bool_],
    *,
    edges: bool = False,
) -> npt.NDArray[np.float64]:
    """Return the mean of a per-chunk `quantity` under each window, weighted by the area of each chunk in the window.

    Args:
        index: Gives the chunk size.
        shape: (times, height, width) of the cube, pixels.
        patch: Side of a window; window (i, j) starts at pixel (i·patch, j·patch).
        quantity: (T, CY, CX), per chunk.
        edges: Also windows that reach over the edge of the grid; their mean is that of the part inside.

    Returns:
        float64 (times, height // patch, width // patch), or with `edges` the quotients rounded up.
    """
    times, height, width = shape
    over_y = _overlap(height, patch, index.chunk[1], quantity.shape[1], edges)
    over_x = _overlap(width, patch, index.chunk[2], quantity.shape[2], edges)
    by_chunk: npt.NDArray[np.float64] = over_y @ quantity.astype(np.float64) @ over_x.T
    return by_chunk[np.arange(times) // index.chunk[0]]


def _overlap(size: int, patch: int, chunk: int, chunks: int, edges: bool) -> npt.NDArray[np.float64]:
    """Return the part of each window's side that lies in each chunk, (windows, chunks)."""
    start = np.arange(-(-size // patch) if edges else size // patch)[:, None] * patch
    end = np.minimum(start + patch, size)
    low = np.arange(chunks)[None, :] * chunk
    shared: npt.NDArray[np.float64] = np.minimum(end, low + chunk) - np.maximum(start, low)
    return shared.clip(min=0) / (end - start)


def plan_windows(
    config: DataConfig,
    spec: CubeSpec,
    index: TrainingIndex,
    classes: Classes,
    *,
    split: Split | None = None,
    dates: Sequence[str] = (),
    target: Target | None = None,
    edges: bool = True,
    judging: bool = False,
    seen: npt.NDArray[np.float64] | None = None,
) -> WindowPlan:
    """Choose the windows of every part.

    Args:
        config: Patch, label layer, shares.
        spec: The collection that is read.
        index: Training index of the collection.
        classes: The learned classes.
        split: The split of an earlier run, so that ground keeps its part; None makes it.
        dates: Beginnings of dates whose windows are all test, wherever they lie (`data.split.test_dates`).
        target: The label; None for the class layer that `config.label` names.
        edges: False chooses as release 0.1.0 did, for its runs: no window reaches over the edge of the grid, and
            `min_labelled` holds for every part.
        judging: Take all windows with a label in every part, as nothing is learned.
        seen: (times, rows, columns) share of each window that any of several modalities saw; None for that of the
            collection alone. A class layer of the collection has labels only where the collection saw the ground.

    Raises:
        UnknownName: The label layer is none of the collection's, or a date none of the cube's.
        InvalidInput: The patch does not fit the grid, or there are too few blocks for the split.
        NothingFound: No window has enough labelled pixels.
    """
    if target is None and config.label not in spec.class_layers:
        where = f"collection {spec.collection} (data.label)"
        raise UnknownName.of("class layer", config.label, spec.class_layers, where)
    _, height, width = spec.shape
    patch = config.patch
    if patch > min(height, width) and not judging:
        raise InvalidInput(f"data.patch {patch} does not fit the grid of {height}×{width} pixels; take a smaller patch")
    target = target or Target(config.label)
    labelled, usable = _usable(config, spec.shape, index, classes, target, edges, seen)
    if judging or not edges:
        labelled = usable = labelled if judging else usable
    if config.dates != 1:
        held = len(spec.times) if config.dates == "all" else config.dates
        labelled, usable = _series(labelled, held), _series(usable, held)
    if not usable.any():
        found = _found(index, target)
        share = "any" if judging else f"a share of {config.min_labelled:g} of"
        raise NothingFound(
            f"no window of {patch}×{patch} pixels of {spec.collection} has {share} "
            f"pixels that can be learned from layer {config.label!r} (its values and pixels: {found}; observed "
            f"{int(index.observed.sum())}, masked {int(index.masked.sum())}); name other values in data.classes, set "
            "data.learn_masked = true to learn masked pixels, or lower data.min_labelled"
        )
    if split is None:
        split = _split(config, spec, usable, labelled)
    numbers = np.argwhere(labelled).astype(np.int32)
    rows = np.ascontiguousarray(numbers * np.array([1, patch, patch], np.int32))
    code = split.part_at(rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64))
    if dates:
        code = np.where(np.isin(rows[:, 0], _held_dates(spec, dates)), np.int8(PARTS.index("test")), code)
    code = np.where((code == 0) & ~usable[tuple(numbers.T)], np.int8(UNUSED), code)
    if config.split.buffer_m:
        pixels = config.split.buffer_m * spec.grid.units_per_metre / min(spec.grid.resolution)
        near = _beside(numbers, code > 0, usable.shape[1:], math.ceil(pixels / patch))
        code = np.where((code == 0) & near, np.int8(UNUSED), code)
    return WindowPlan(split, {part: Windows(patch, rows[code == i]) for i, part in enumerate(PARTS)})


def _found(index: TrainingIndex, target: Target) -> dict[Any, int]:
    """Count the pixels of each stored value, or of each class of a label layer."""
    if target.layer is not None:
        return dict(target.layer.counts) or {"labelled": target.layer.labelled}
    if target.place in ("index", "image"):
        return {"values": int(index.observed.sum())}
    counts = index.class_counts[target.name].sum(axis=(0, 1, 2))
    return {int(v): int(counts[v]) for v in np.flatnonzero(counts)}


def _usable(
    config: DataConfig,
    shape: tuple[int, int, int],
    index: TrainingIndex,
    classes: Classes,
    target: Target,
    edges: bool,
    seen_by_any: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which windows may hold a label, and which of them hold enough for training."""
    if seen_by_any is not None and target.place == "label":
        known = seen_by_any * _labelled_shares(target, classes, config.patch, edges)
        return known > 0, (known > 0) & (known >= config.min_labelled)
    seen = index.observed + index.masked if config.learn_masked else index.observed
    share = seen / np.maximum(index.pixels, 1)
    if target.place == "layer":
        values = [value for group in classes.values for value in group]
        labelled = index.class_counts[target.name][..., values].sum(axis=-1)
        # class counts include masked pixels; at most the observed ones can be trained on
        share = np.minimum(labelled / np.maximum(index.pixels, 1), share)
    # of a series an absent date is one that was not observed
    there = index.present if config.dates == 1 else np.broadcast_to(index.present.any(axis=0), index.present.shape)
    absent = window_shares(index, shape, config.patch, ~there, edges=edges)
    shares = window_shares(index, shape, config.patch, share, edges=edges)
    if target.place == "label":
        # of a label layer each window is known to the pixel; what was seen of it is the estimate
        shares = shares * _labelled_shares(target, classes, config.patch, edges)
    some: npt.NDArray[np.bool_] = shares > 0
    return some, some & (absent == 0) & (shares >= config.min_labelled)


def _series(usable: npt.NDArray[np.bool_], dates: int) -> npt.NDArray[np.bool_]:
    """Mark the first date of each series that is usable on one of its dates; an incomplete last series is left out."""
    first = np.zeros_like(usable)
    for start in range(0, len(usable) - dates + 1, dates):
        first[start] = usable[start : start + dates].any(axis=0)
    return first


def _labelled_shares(target: Target, classes: Classes, patch: int, edges: bool) -> npt.NDArray[np.float64]:
    """Return the share of each window's pixels that a label layer labels, (rows, columns) of windows."""
    inside, labelled = [], []
    for _, labels in window_labels(target, classes, patch, edges=edges):
        known = np.isfinite(labels.pixels) if target.values else labels.pixels != UNLABELLED
        labelled.append((known & labels.inside).sum(axis=-1))
        inside.append(labels.inside.sum(axis=-1))
    shares: npt.NDArray[np.float64] = np.concatenate(labelled) / np.concatenate(inside)
    return shares


def _split(config: DataConfig, spec: CubeSpec, usable: npt.NDArray[np.bool_], labelled: npt.NDArray[np.bool_]) -> Split:
    """Split the blocks with a usable window, then those that hold labels but not enough to be learned."""
    shares = config.split
    if shares.test_dates:
        shares = shares.model_copy(update={"test": 0.0})
    block = block_shape(shares, spec.grid, config.patch)
    if shares.kind == "random":
        block = (config.patch, config.patch)
    rows, columns = (-(-size // side) for size, side in zip(spec.shape[1:], block, strict=True))
    steps = (block[0] // config.patch, block[1] // config.patch)

    def of_blocks(windows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        ground = np.asarray(windows.any(axis=0))
        padded = np.zeros((rows * steps[0], columns * steps[1]), bool)
        padded[: ground.shape[0], : ground.shape[1]] = ground
        return np.asarray(padded.reshape(rows, steps[0], columns, steps[1]).any(axis=(1, 3)))

    blocks = of_blocks(usable)
    rest = of_blocks(labelled) & ~blocks
    if shares.kind != "checkerboard" or shares.test_dates:
        return add_blocks(make_split(shares, block, blocks), shares, rest)
    test = np.add.outer(np.arange(rows), np.arange(columns)) % 2 == 1
    shares = shares.model_copy(update={"test": 0.0})
    inner = add_blocks(make_split(shares, block, blocks & ~test), shares, rest & ~test)
    return Split(block, np.where(test & (blocks | rest), PARTS.index("test"), inner.parts).astype(np.int8))


def _held_dates(spec: CubeSpec, dates: Sequence[str]) -> tuple[int, ...]:
    """Return the time steps that `dates` mean, which must not be all."""
    held = spec.find_times(dates, option="data.split.test_dates")
    if len(held) == len(spec.times):
        raise InvalidInput(f"data.split.test_dates names all {len(held)} dates of the cube; leave some for training")
    return held


def _beside(
    numbers: npt.NDArray[np.int32], of: npt.NDArray[np.bool_], shape: tuple[int, ...], reach: int
) -> npt.NDArray[np.bool_]:
    """Return which windows (time, row, column) have a window of `of`, on any date, within `reach` windows."""
    there = np.zeros((shape[0] + 2 * reach, shape[1] + 2 * reach), np.int64)
    there[numbers[of, 1] + reach, numbers[of, 2] + reach] = 1
    sums = np.pad(there.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    y, x, side = numbers[:, 1].astype(np.int64), numbers[:, 2].astype(np.int64), 2 * reach + 1
    found: npt.NDArray[np.bool_] = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x] > 0
    return found


def window_leakage(config: DataConfig, plan: WindowPlan) -> dict[str, Any] | None:
    """Measure the leakage of the test windows: the share that lies beside a training window on any date.

    None if whole blocks are held out on all dates. The ground of held-out dates is in training on others.
    """
    split = config.split
    if split.kind != "random" and not split.test_dates:
        return None
    train, test = plan.parts["train"].rows, plan.parts["test"].rows
    every = np.concatenate([train, test]) // np.array([1, config.patch, config.patch], np.int32)
    shape = tuple(int(v) for v in every[:, 1:].max(axis=0) + 1)
    beside = _beside(every, np.arange(len(every)) < len(train), shape, 1)[len(train) :]
    share = round(float(beside.mean()), 4) if len(test) else None
    return {"kind": split.kind, "leaky": split.kind == "random", "beside": share, "dates": list(split.test_dates)}
