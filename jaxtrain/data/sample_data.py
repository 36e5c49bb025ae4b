"""`SampleData` is a store of labelled samples as training data."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig, TrainConfig
from jaxtrain.data.classes import UNLABELLED
from jaxtrain.data.cubes import Splits
from jaxtrain.data.mismatch import check_side
from jaxtrain.data.numbers import convert_to, sample_numbers
from jaxtrain.data.places import SampleSplit, nearest_m
from jaxtrain.data.reader import OnUnreadable
from jaxtrain.data.samples import (
    SampleReader,
    count_samples,
    plan_samples,
    sample_classes,
    sample_statistics,
    scene_rows,
)
from jaxtrain.data.splits import Part, Split
from jaxtrain.data.task import Task
from jaxtrain.data.training_data import EvaluationSet, LearnedFrom, TrainingSet, check_digest, no_rows
from jaxtrain.data.windows import Windows
from zarr_store.errors import InvalidInput
from zarr_store.samples import SampleStore, is_sample_store, open_samples

__all__ = ["SampleData"]


@dataclass(frozen=True)
class SampleData:
    """One open sample store."""

    store: SampleStore

    @property
    def kind(self) -> Literal["cube", "sample store"]:
        """Kind of the data: a sample store."""
        return "sample store"

    @property
    def url(self) -> str:
        """URL of the store."""
        return self.store.url

    def digest(self, card: LearnedFrom) -> str | None:
        """Return the digest of the store; see `TrainingData.digest`."""
        del card
        return self.store.digest

    def prepare(
        self, config: TrainConfig, earlier: LearnedFrom | None, on_unreadable: OnUnreadable | None
    ) -> TrainingSet:
        """Choose the samples of each part; see `TrainingData.prepare`. A damaged sample always raises."""
        del on_unreadable
        store = self.store
        check_digest(store.url, store.digest, earlier)
        if config.model.name == "multimodal":
            raise InvalidInput(
                f"{store.url} is a sample store, whose images are of one kind, and model.name = 'multimodal' reads the "
                "modalities of a cube: name a cube in data.cube, or another network"
            )
        rebuild = config.model.name == "autoencoder"
        if not rebuild and len(store.spec.classes) < 2 and store.spec.labelled != "several":
            raise InvalidInput(
                f"{store.url} holds one class, {store.spec.classes[0]}: a network needs at least two to tell apart; "
                "such a store can be evaluated (`terrashard evaluate RUN --data STORE`), not trained on"
            )
        classes = sample_classes(config.data, store) if earlier is None else earlier.classes
        reader = SampleReader.of(store, config.data, classes)
        plan, leak = plan_samples(config.data, store, classes, split=None if earlier is None else _split(earlier))
        for part in ("train", "test"):
            if not len(plan.parts[part]) and (part == "train" or config.data.split.test):
                raise InvalidInput(
                    f"{store.url}: no sample is left for part {part}; change data.split (its buffer takes from "
                    "training)"
                )
        return TrainingSet(
            digest=store.digest,
            bands=tuple(store.spec.bands[i] for i in reader.bands),
            classes=classes,
            task=Task(rebuild=True) if rebuild else Task(per_image=True, several=store.spec.labelled == "several"),
            plan=plan,
            reader=reader,
            statistics=partial(sample_statistics, plan, reader, classes),
            count=None if rebuild else lambda part: count_samples(plan.parts[part], reader, classes),
            leakage=leak,
            numbers=sample_numbers(store.spec, reader.bands),
        )

    def select_part(self, card: LearnedFrom, part: Part) -> EvaluationSet:
        """Return one part of the run's own store; see `TrainingData.select_part`."""
        store, config = self.store, _config(card)
        if store.digest != card.cube_digest:
            raise InvalidInput(f"{store.url} is not the store that the run was trained on; pass it as other data")
        reader = SampleReader.of(store, config, card.classes)
        plan, leak = plan_samples(config, store, card.classes, split=_split(card))
        warnings = []
        if leak["leaky"]:
            share = leak.get("share") if leak.get("share") is not None else leak.get("touching")
            near = f"nearer than {leak['near_m']:g} m" if "near_m" in leak else "inside its own patch"
            figure = "" if share is None else f": {share:.1%} of the test samples have a training sample {near}"
            warnings.append(f"the split is random and leaks, so these scores are too good{figure}")
        return _evaluation_set(store, card, plan.parts[part], reader, warnings, part)

    def select_all(self, card: LearnedFrom, *, without: Sequence[str] = (), insist: bool = False) -> EvaluationSet:
        """Return all samples of another store; see `TrainingData.select_all`."""
        reader, windows, warnings = _other_samples(card, _config(card), self.store)
        there = sample_numbers(self.store.spec, reader.bands)
        conversion, notes = convert_to(card.numbers, there, self.store.url, insist=insist)
        side = card.statistics.get("image_side")  # not in cards of earlier releases
        if side is not None and self.store.spec.labelled != "pixels":
            warnings += check_side(self.store.spec.size, side, self.store.url, insist=insist)
        return _evaluation_set(
            self.store, card, windows, replace(reader, conversion=conversion), [*warnings, *notes], None
        )

    def places(self, collection: str, windows: Windows) -> dict[str, npt.NDArray[Any]]:
        """Return the name of each sample, which is its origin."""
        del collection
        return {"name": np.array(self.store.names(), object)[windows.rows[:, 0]]}


def _config(card: LearnedFrom) -> DataConfig:
    """Return the data configuration of a run, with the names of its bands."""
    return card.config.data.model_copy(update={"bands": card.bands})


def _split(card: LearnedFrom) -> Split | SampleSplit | None:
    assert isinstance(card.split, Split | SampleSplit | Splits)
    return None if isinstance(card.split, Splits) else card.split


def _evaluation_set(
    store: SampleStore,
    card: LearnedFrom,
    windows: Windows,
    reader: SampleReader,
    warnings: list[str],
    part: Part | None,
) -> EvaluationSet:
    if not len(windows):
        raise no_rows(store.url, card, part, "sample")
    return EvaluationSet(store.url, windows, reader, tuple(warnings))


def _other_samples(
    card: LearnedFrom, config: DataConfig, store: SampleStore
) -> tuple[SampleReader, Windows, list[str]]:
    """Return all samples of another store; its classes are matched by name, as their order may differ."""
    if card.task.rebuild:
        return _every_sample(config, card, store)
    known = {name: index for index, name in enumerate(card.classes.names)}
    first = 1 if store.spec.labelled == "pixels" else 0
    table = np.full(256, UNLABELLED, np.uint8)
    unknown = [name for name in store.spec.classes if name not in known]
    for value, name in enumerate(store.spec.classes):
        table[value + first] = known.get(name, UNLABELLED)
    if len(unknown) == len(store.spec.classes):
        raise InvalidInput(
            f"{store.url} has the classes {', '.join(store.spec.classes[:8])}, the model knows "
            f"{', '.join(card.classes.names[:8])}: none is the same, so it cannot be evaluated there"
        )
    if store.spec.labelled == "several" and not card.task.several:
        store = _single_labels(store)
    elif card.task.several and store.spec.labelled != "several":
        store = _several_labels(store)
    warnings = [f"samples of {', '.join(unknown)} are not evaluated: the model does not know them"] if unknown else []
    absent = [name for name in known if name not in store.spec.classes]
    if card.task.several and (unknown or absent):
        raise InvalidInput(
            f"{store.url} has the classes {', '.join(store.spec.classes)}, the model knows "
            f"{', '.join(card.classes.names)}: where images have several classes, both must have the same ones"
        )
    reader = replace(SampleReader.of(store, config, card.classes), table=table)
    rows = np.zeros((store.spec.count, 3), np.int32)
    rows[:, 0] = np.arange(store.spec.count)
    if store.spec.labelled == "one":
        rows = rows[table[store.label] != UNLABELLED]
    elif store.spec.labelled == "pixels":
        rows = scene_rows(store, table)
    warnings += _near_training(card, store)
    return reader, Windows(reader.patch, rows), warnings


def _single_labels(store: SampleStore) -> SampleStore:
    """Return a store of several classes for each sample as one of a single class, where each sample has exactly one.

    Raises:
        InvalidInput: Some samples have several classes or none.
    """
    others = int((store.label.sum(axis=1, dtype=np.int64) != 1).sum())
    if others:
        raise InvalidInput(
            f"{others} of {store.spec.count} samples of {store.url} have several classes or none, but the model "
            "predicts one class for each image: evaluate it on samples of one class each"
        )
    return _relabelled(store, store.label.argmax(axis=1).astype(np.uint8), "one")


def _several_labels(store: SampleStore) -> SampleStore:
    """Return a store of a single class for each sample as one of several classes.

    Raises:
        InvalidInput: The store is a labelled scene.
    """
    if store.spec.labelled == "pixels":
        raise InvalidInput(f"{store.url} is a labelled scene, but the model predicts several classes for each image")
    return _relabelled(store, np.eye(len(store.spec.classes), dtype=np.uint8)[store.label], "several")


def _relabelled(store: SampleStore, label: npt.NDArray[np.uint8], labelled: Literal["one", "several"]) -> SampleStore:
    copied = copy(store)
    copied.spec, copied.label = replace(store.spec, labelled=labelled), label
    return copied


def _every_sample(config: DataConfig, card: LearnedFrom, store: SampleStore) -> tuple[SampleReader, Windows, list[str]]:
    """Return all samples of another store, for a model that needs no labels."""
    rows = np.zeros((store.spec.count, 3), np.int32)
    rows[:, 0] = np.arange(store.spec.count)
    if store.spec.labelled == "pixels":
        rows = scene_rows(store, None)
    reader = SampleReader.of(store, config, card.classes)
    return reader, Windows(reader.patch, rows), _near_training(card, store)


def _near_training(card: LearnedFrom, store: SampleStore) -> list[str]:
    """Return a warning if samples of another store lie near training samples."""
    if store.digest == card.cube_digest:
        return [f"{store.url} holds the samples that the model was trained on: its scores are too good"]
    if not isinstance(card.split, SampleSplit) or not store.has_places:
        return []
    if "://" in card.cube or not is_sample_store(card.cube):  # a card comes from others, so a URL in it opens no bucket
        return []
    learned = open_samples(card.cube)
    train = card.split.parts == 0
    if learned.digest != card.cube_digest or not learned.has_places or not train.any():
        return []
    near_m = card.config.data.split.near_m
    distance = nearest_m(store.longitude, store.latitude, learned.longitude[train], learned.latitude[train])
    share = float((distance < near_m).mean())
    if not share:
        return []
    return [f"{share:.1%} of the samples of {store.url} have a training sample nearer than {near_m:g} m"]
