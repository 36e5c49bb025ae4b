"""Training data of several modalities: the windows of one cube, with what its collections and layers show there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig, TrainConfig
from jaxtrain.data.arrays import as_images
from jaxtrain.data.classes import Classes
from jaxtrain.data.ground import Ground
from jaxtrain.data.modality_reader import ModalityReader
from jaxtrain.data.modality_source import ModalitySource, open_sources, seen_by_window, sources_digest
from jaxtrain.data.numbers import BandNumbers
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.reader import OnUnreadable, WindowReader
from jaxtrain.data.splits import Part, Split
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.targets import label_classes, match_classes, resolve_target
from jaxtrain.data.task import Task
from jaxtrain.data.training_data import LearnedFrom, TrainingSet, check_digest
from jaxtrain.data.windows import WindowPlan, Windows, plan_windows, window_leakage
from zarr_store.errors import NothingFound
from zarr_store.read import Cube

__all__ = ["modality_bands", "modality_numbers", "modality_statistics", "prepare_modalities"]

_SAMPLED_WINDOWS = 128
_SAMPLED_DATES = 1024
_READ_AT_ONCE = 8
_COUNTED_AT_ONCE = 64


def prepare_modalities(
    config: TrainConfig, cube: Cube, earlier: LearnedFrom | None, on_unreadable: OnUnreadable | None
) -> TrainingSet:
    """Choose the windows of each part; see `TrainingData.prepare`."""
    data = config.data
    target = resolve_target(cube, data)
    classes = label_classes(data, target) if earlier is None else match_classes(earlier.classes, data, target)
    sources, _ = open_sources(data, cube, on_unreadable=on_unreadable)
    spec, index = cube.spec(data.collection), cube.index(data.collection)
    digest = sources_digest(sources, target.layer)
    check_digest(cube.url, digest, earlier)
    split = earlier.split if earlier is not None and isinstance(earlier.split, Split) else None
    plan = plan_windows(
        data, spec, index, classes, split=split, dates=data.split.test_dates, target=target,
        seen=seen_by_window(sources, spec, data.patch, data.learn_masked),
    )  # fmt: skip
    labels = replace(WindowReader.of(cube, data, classes, target, index), on_unreadable=on_unreadable)
    reader = ModalityReader(sources, data.patch, labels)
    plan = _observed_enough(plan, data, sources)
    return TrainingSet(
        digest=digest,
        bands=modality_bands(sources),
        classes=classes,
        task=Task(unit="" if reader.target is None else reader.target.unit),
        plan=plan,
        reader=reader,
        statistics=partial(modality_statistics, plan, reader, classes),
        count=None if target.values else partial(_count, plan, reader, classes),
        grounds=(Ground(cube.url, digest, spec.grid, spec.times),),
        leakage=window_leakage(data, plan),
        chunk=spec.layout.chunk,
        numbers=modality_numbers(sources),
        modalities=tuple(source.modality for source in sources),
    )


def _observed_enough(plan: WindowPlan, data: DataConfig, sources: Sequence[ModalitySource]) -> WindowPlan:
    """Remove the training windows of which a modality observed less than its `min_observed`.

    Raises:
        NothingFound: None is left.
    """
    windows = plan.parts["train"]
    rows = windows.rows
    for source in sources:
        name = source.modality.name
        least, before, kept = data.modalities[name].min_observed, len(rows), []
        if not least:
            continue
        for start in range(0, len(rows), _COUNTED_AT_ONCE):
            observed = source.begin(rows[start : start + _COUNTED_AT_ONCE], data.patch, images=False)()["observed"]
            of_any_date = observed.max(axis=1) if source.modality.dates else observed
            kept.append(of_any_date.mean(axis=(1, 2)) >= least)
        rows = rows[np.concatenate(kept)] if kept else rows
        if not len(rows):
            raise NothingFound(
                f"modality {name} observed a share of {least:g} in none of {before} training windows: lower "
                f"data.modalities.{name}.min_observed"
            )
    return replace(plan, parts={**plan.parts, "train": Windows(windows.patch, rows)})


def modality_bands(sources: Sequence[ModalitySource]) -> tuple[str, ...]:
    """Return the bands of all modalities one after the other, as modality:band."""
    return tuple(f"{source.modality.name}:{band}" for source in sources for band in source.modality.bands)


def modality_numbers(sources: Sequence[ModalitySource]) -> tuple[BandNumbers, ...]:
    """Return the meaning of the stored numbers of all bands, in the same order."""
    return tuple(numbers for source in sources for numbers in source.numbers)


def modality_statistics(plan: WindowPlan, reader: ModalityReader, classes: Classes) -> Statistics:
    """Compute mean and spread of each band over a sample of training windows, and count the classes.

    Raises:
        NothingFound: A modality is observed in none of them.
    """
    windows = plan.parts["train"]
    dates = max([source.modality.dates for source in reader.sources] + [1])
    most = max(16, min(_SAMPLED_WINDOWS, _SAMPLED_DATES // dates))
    numbers = SampleOrder(seed=0, count=len(windows)).indices(0, min(most, len(windows)))
    rows = windows.rows[np.sort(numbers)]
    sums = {source.modality.name: np.zeros((3, len(source.modality.bands))) for source in reader.sources}
    shift: dict[str, npt.NDArray[np.float64]] = {}
    labels: list[npt.NDArray[np.float64]] = []
    for start in range(0, len(rows), _READ_AT_ONCE):
        batch = reader.read(rows[start : start + _READ_AT_ONCE])
        if reader.target is not None and reader.target.values:
            labels.append(batch["label"][np.isfinite(batch["label"])].astype(np.float64))
        for name, total in sums.items():
            seen = as_images(batch[f"observed_{name}"]) == 1
            values = as_images(batch[f"image_{name}"])[seen].astype(np.float64)
            values = values[np.isfinite(values).all(axis=1)]
            if len(values):
                # sums about a number near the mean keep their digits
                moved = values - shift.setdefault(name, values.mean(axis=0))
                total += np.stack(
                    [np.full(moved.shape[1], float(len(moved))), moved.sum(axis=0), (moved**2).sum(axis=0)]
                )
    for name, total in sums.items():
        if not total[0].any():
            raise NothingFound(
                f"modality {name} is observed in no training window: check its dates and masks, or leave out the table "
                f"data.modalities.{name}"
            )
    means, spreads = [], []
    for name, (count, first, second) in sums.items():
        mean = first / count
        means.append(shift[name] + mean)
        spreads.append(np.sqrt(np.maximum(second / count - mean**2, 0)))
    std = np.concatenate(spreads)
    pixels = int(max(total[0].max() for total in sums.values()))
    value = None
    if labels:
        every = np.concatenate(labels)
        if not len(every):
            raise NothingFound("the label has no value in the training windows; lower data.min_labelled")
        value = (float(every.mean()), float(every.std()) or 1.0)
        by_class = np.array([len(every)], np.int64)
    else:
        by_class = _count(plan, reader, classes, "train")
    stands_for = pixels * len(windows) / max(len(rows), 1)
    mean = np.concatenate(means)
    return Statistics(mean, np.where(std > 0, std, 1.0), by_class, pixels, "windows", value, stands_for)


def _count(plan: WindowPlan, reader: ModalityReader, classes: Classes, part: Part) -> npt.NDArray[np.int64]:
    """Count the pixels of each class that some modality sees, in the windows of a part."""
    rows, counted = plan.parts[part].rows, np.zeros(256, np.int64)
    labels = replace(reader, images=False)
    for start in range(0, len(rows), _COUNTED_AT_ONCE):
        counted += np.bincount(labels.read(rows[start : start + _COUNTED_AT_ONCE])["label"].ravel(), minlength=256)
    return counted[: len(classes)]
