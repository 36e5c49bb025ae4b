"""Read samples of a store as batches: the counterpart of `WindowReader` and `plan_windows` for sample stores.

A row is (sample, y, x). Of a store of patches y and x are 0 and the whole patch is the image; of a labelled scene the
image is the `patch` around pixel (y, x), mirrored at the scene's edge, and its label is that pixel's.

Letters in shapes: B samples, H row, W column, C band, K class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig, SplitConfig
from jaxtrain.data.arrays import as_images
from jaxtrain.data.classes import UNLABELLED, Classes
from jaxtrain.data.memory import empty_array
from jaxtrain.data.numbers import Conversion
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.places import SampleSplit, leakage, split_samples
from jaxtrain.data.splits import PARTS, Split, make_split
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.windows import WindowPlan, Windows
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.lookup import find_bands
from zarr_store.samples import SampleStore

__all__ = ["SampleReader", "count_samples", "plan_samples", "sample_classes", "sample_statistics", "scene_rows"]

_HELD_BYTES = 512 << 20
"""Largest store that is decoded once and held in memory, bytes; a larger one is read as it is needed."""
_SAMPLED = 2048


@dataclass(frozen=True)
class SampleReader:
    """Reader of samples of one store.

    Attributes:
        store: The open store.
        bands: Positions of the bands, in the order of the network's channels.
        patch: Side of the image around a pixel of a scene; of patches, their own side.
        table: uint8 (256,) stored label → class index, 255 where it is not trained on.
        conversion: Turns the stored numbers into those of the model; None where they are.
    """

    store: SampleStore
    bands: tuple[int, ...]
    patch: int
    table: npt.NDArray[np.uint8]
    conversion: Conversion | None = None

    @classmethod
    def of(cls, store: SampleStore, config: DataConfig, classes: Classes) -> SampleReader:
        """Make the reader of a run.

        Raises:
            UnknownName: The store lacks some of the bands; all of those are listed.
        """
        bands = find_bands(config.bands, store.spec.bands, f"{store.url} (data.bands)")
        side = config.patch if store.spec.labelled == "pixels" else store.spec.size[0]
        return cls(store, bands, side, classes.table())

    @property
    def shows(self) -> Literal["windows", "images"]:
        """Kind of a row: an image by itself."""
        return "images"

    def read(self, rows: npt.NDArray[np.int32]) -> dict[str, np.ndarray]:
        """Read samples.

        Args:
            rows: int32 (B, 3) of (sample, y, x).

        Returns:
            image (B, C, H, W) as stored, label uint8 (B,) class index or (B, K) of 0 and 1 (255 is unlabelled), and
            observed uint8 (B, H, W): 1 where a pixel holds data, all of whose numbers are finite. Where no pixel of a
            patch is observed, or the labelled pixel of a scene is not, there is no label.

        Raises:
            CorruptShard: A sample is damaged; the message names it.
        """
        return self.begin(rows)()

    def begin(self, rows: npt.NDArray[np.int32]) -> Callable[[], dict[str, np.ndarray]]:
        """Start to read samples, and return a function that waits for them; small stores are held in memory instead."""
        if self.store.spec.labelled == "pixels" or self._held is not None:
            return partial(self._gather, rows)
        spec, numbers = self.store.spec, rows[:, 0]
        image = empty_array((len(rows), len(self.bands), *spec.size), np.dtype(spec.dtype))
        valid = np.empty((len(rows), *spec.size), np.uint8)
        wait = self.store.begin(numbers, image, self._chosen, valid)

        def finish() -> dict[str, np.ndarray]:
            wait()
            return self._batch(image, valid, self.store.label[numbers])

        return finish

    def _gather(self, rows: npt.NDArray[np.int32]) -> dict[str, np.ndarray]:
        if self.store.spec.labelled == "pixels":
            return self._batch(*self._around(rows))
        assert self._held is not None
        image, valid = self._held
        return self._batch(image[rows[:, 0]], valid[rows[:, 0]], self.store.label[rows[:, 0]])

    def _batch(
        self, image: npt.NDArray[Any], valid: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8]
    ) -> dict[str, np.ndarray]:
        if self.store.spec.labelled != "several":
            label = self.table[label]
        else:
            kept = self.table[: label.shape[1]]
            chosen = np.zeros((len(label), int((kept != UNLABELLED).sum())), np.uint8)
            chosen[:, kept[kept != UNLABELLED]] = label[:, kept != UNLABELLED]
            label = chosen
        observed = valid.astype(bool)
        if image.dtype.kind == "f":
            observed &= np.isfinite(image).all(axis=1)
        middle = self.patch // 2
        seen = observed[:, middle, middle] if self._scene else observed.any(axis=(1, 2))
        label[~seen] = UNLABELLED
        if self.conversion is not None:
            image = self.conversion.apply(image)
        return {"image": image, "label": label, "observed": observed.view(np.uint8)}

    @property
    def _scene(self) -> bool:
        """Whether the store holds labelled scenes, of which a row is one pixel with its surroundings."""
        return self.store.spec.labelled == "pixels"

    @property
    def _chosen(self) -> tuple[int, ...] | None:
        """Positions of the bands; None for all bands in order."""
        return None if self.bands == tuple(range(len(self.store.spec.bands))) else self.bands

    @cached_property
    def _held(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]] | None:
        spec = self.store.spec
        size = spec.count * len(self.bands) * spec.size[0] * spec.size[1] * np.dtype(spec.dtype).itemsize
        if size > _HELD_BYTES:
            return None
        parts = [range(i, min(i + 256, spec.count)) for i in range(0, spec.count, 256)]
        images = np.concatenate([self.store.images(part, self._chosen) for part in parts])
        return images, np.concatenate([self.store.valid(part) for part in parts])

    @cached_property
    def _scenes(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """All scenes (N, H, W, C) and their valid pixels (N, H, W), with a mirrored rim of half a patch."""
        rim = self.patch // 2
        if rim >= min(self.store.spec.size):
            raise InvalidInput(
                f"data.patch {self.patch} is too large for a scene of {self.store.spec.size[0]} × "
                f"{self.store.spec.size[1]} pixels"
            )
        every = range(self.store.spec.count)
        scenes = np.moveaxis(self.store.images(every, self._chosen), 1, -1)
        around = ((0, 0), (rim, rim), (rim, rim))
        valid = np.pad(self.store.valid(every), around, mode="reflect")
        return np.pad(scenes, (*around, (0, 0)), mode="reflect"), valid

    def _around(
        self, rows: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        n, y, x = (rows[:, i].astype(np.int64) for i in range(3))
        offsets = np.arange(self.patch)
        at_y, at_x = y[:, None, None] + offsets[:, None], x[:, None, None] + offsets
        scenes, valid = self._scenes
        at = (n[:, None, None], at_y, at_x)
        return np.moveaxis(scenes[at], -1, 1), valid[at], self.store.label[n, y, x]


def sample_classes(config: DataConfig, store: SampleStore) -> Classes:
    """Return the classes of a store, or those that the configuration names by stored label.

    Raises:
        InvalidInput: A configured label is not one of the store.
    """
    first = 1 if store.spec.labelled == "pixels" else 0
    known = {str(i + first): name for i, name in enumerate(store.spec.classes)}
    wrong = [value for value in config.classes if value not in known]
    if wrong:
        raise InvalidInput(
            f"data.classes: {store.url} has no label {', '.join(wrong)}; it has "
            f"{', '.join(f'{v} = {n}' for v, n in list(known.items())[:12])}"
        )
    return Classes.of(config.model_copy(update={"classes": config.classes or known}))


def plan_samples(
    config: DataConfig, store: SampleStore, classes: Classes, *, split: Split | SampleSplit | None = None
) -> tuple[WindowPlan, dict[str, Any]]:
    """Choose the rows of each part, and measure the leakage of the test part.

    Args:
        config: Split, patch and classes.
        store: The open store.
        classes: The learned classes.
        split: Split of an earlier run; None makes a new one.

    Raises:
        InvalidInput: The split does not fit the store.
        NothingFound: No sample has a class to train on.
    """
    if store.spec.labelled == "pixels":
        return _plan_scene(config, store, classes, split)
    learned = np.ones(store.spec.count, bool)
    if store.spec.labelled == "one":
        learned = classes.table()[store.label] != UNLABELLED
    if not learned.any():
        raise NothingFound(f"no sample of {store.url} has one of the classes {', '.join(classes.names)}")
    if split is None:
        split = split_samples(config.split, store.longitude, store.latitude)
    if not isinstance(split, SampleSplit) or len(split.parts) != store.spec.count:
        raise InvalidInput(f"{store.url} is not the store that the run's split was made for")
    parts = np.where(learned, split.parts, -1)
    rows = np.zeros((store.spec.count, 3), np.int32)
    rows[:, 0] = np.arange(store.spec.count)
    leak = leakage(split.parts, store.longitude, store.latitude, config.split.near_m)
    side = store.spec.size[0]
    plan = WindowPlan(split, {part: Windows(side, rows[parts == i]) for i, part in enumerate(PARTS)})
    return plan, {**leak, "kind": split.kind, "leaky": split.kind == "random"}


def _plan_scene(
    config: DataConfig, store: SampleStore, classes: Classes, split: Split | SampleSplit | None
) -> tuple[WindowPlan, dict[str, Any]]:
    if config.patch % 2 == 0:
        raise InvalidInput(f"data.patch {config.patch} has no middle pixel: take an odd side for a labelled scene")
    learned = (classes.table()[store.label] != UNLABELLED) & _with_data(store)
    rows = np.argwhere(learned).astype(np.int32)
    if not len(rows):
        raise NothingFound(f"no pixel of {store.url} has one of the classes {', '.join(classes.names)}")
    if split is None:
        split = _split_scene(config.split, store, learned)
    if not isinstance(split, Split):
        raise InvalidInput(f"{store.url} is not the store that the run's split was made for")
    code = split.part_at(rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64))
    if config.split.buffer_px:
        code = np.where((code == 0) & _near(rows, code > 0, learned.shape, config.split.buffer_px), -1, code)
    touching = _near(rows, code == 0, learned.shape, config.patch // 2) & (code == PARTS.index("test"))
    tests = int((code == PARTS.index("test")).sum())
    kind = config.split.kind
    leak = {
        "kind": kind,
        "leaky": kind == "random",
        "touching": round(float(touching.sum() / tests), 4) if tests else None,
        "patch": config.patch,
    }
    return WindowPlan(split, {part: Windows(config.patch, rows[code == i]) for i, part in enumerate(PARTS)}), leak


def scene_rows(store: SampleStore, table: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.int32]:
    """Return (sample, y, x) of the pixels of labelled scenes that hold data and, with a table, have a class of it."""
    chosen = _with_data(store)
    if table is not None:
        chosen &= table[store.label] != UNLABELLED
    return np.argwhere(chosen).astype(np.int32)


def _with_data(store: SampleStore) -> npt.NDArray[np.bool_]:
    """Return which pixels of labelled scenes hold data, (N, H, W)."""
    every = range(store.spec.count)
    found = store.valid(every).astype(bool)
    if store.spec.dtype.startswith("float"):
        for number in every:  # one at a time, as a scene may have hundreds of bands
            found[number] &= np.isfinite(store.images([number])[0]).all(axis=0)
    return found


def _near(
    rows: npt.NDArray[np.int32], of: npt.NDArray[np.bool_], shape: tuple[int, ...], reach: int
) -> npt.NDArray[np.bool_]:
    """Return which rows have a row of `of` within a square of `reach` pixels each way."""
    there = np.zeros(shape, bool)
    there[tuple(rows[of].T)] = True
    sums = np.pad(there.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    n, y, x = (rows[:, i].astype(np.int64) for i in range(3))
    y0, y1 = np.maximum(y - reach, 0), np.minimum(y + reach + 1, shape[1])
    x0, x1 = np.maximum(x - reach, 0), np.minimum(x + reach + 1, shape[2])
    found: npt.NDArray[np.bool_] = sums[n, y1, x1] - sums[n, y0, x1] - sums[n, y1, x0] + sums[n, y0, x0] > 0
    return found


def _split_scene(config: SplitConfig, store: SampleStore, learned: npt.NDArray[np.bool_]) -> Split:
    height, width = store.spec.size
    side = 1 if config.kind == "random" else config.block_px
    shape = (-(-height // side), -(-width // side))
    padded = np.zeros((shape[0] * side, shape[1] * side), bool)
    padded[:height, :width] = learned.any(axis=0)
    usable = padded.reshape(shape[0], side, shape[1], side).any(axis=(1, 3))
    if config.kind != "checkerboard":
        return make_split(config, (side, side), np.asarray(usable))
    test = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2 == 1
    inner = make_split(config.model_copy(update={"test": 0.0}), (side, side), np.asarray(usable & ~test))
    return Split(inner.block, np.where(test & usable, PARTS.index("test"), inner.parts).astype(np.int8))


def count_samples(windows: Windows, reader: SampleReader, classes: Classes) -> npt.NDArray[np.int64]:
    """Count the samples, or the pixels of a scene, of each class in a part, int64 (classes,)."""
    rows, label = windows.rows, reader.store.label
    if reader.store.spec.labelled == "several":
        counted = np.zeros(len(classes), np.int64)
        kept = reader.table[: label.shape[1]]
        counted[kept[kept != UNLABELLED]] = (label[rows[:, 0]] == 1).sum(axis=0)[kept != UNLABELLED]
        return counted
    at = tuple(rows.T) if reader.store.spec.labelled == "pixels" else rows[:, 0]
    found: npt.NDArray[np.int64] = np.bincount(reader.table[label[at]], minlength=256)[: len(classes)]
    return found


def sample_statistics(plan: WindowPlan, reader: SampleReader, classes: Classes) -> Statistics:
    """Return mean and spread of each band and the count of each class, over the training part only."""
    rows = plan.parts["train"].rows
    counted = count_samples(plan.parts["train"], reader, classes)
    order = SampleOrder(seed=0, count=len(rows))
    chosen = rows[np.sort(order.indices(0, min(_SAMPLED, len(rows))))]
    if reader.store.spec.labelled == "pixels":
        # a pixel for each sample: patches would count the middle of the ground many times
        chosen_reader = SampleReader(reader.store, reader.bands, 1, reader.table)
        batch = chosen_reader.read(chosen)
    else:
        batch = reader.read(chosen)
    values = as_images(batch["image"])[batch["observed"] == 1].astype(np.float64)
    if not len(values):
        raise NothingFound(f"{reader.store.url}: no pixel of the training samples holds data; look at the import")
    std = values.std(axis=0)
    return Statistics(values.mean(axis=0), np.where(std > 0, std, 1.0), counted, len(values), "windows")
