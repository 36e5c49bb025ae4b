"""`CubeData` is one cube as training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.config import TrainConfig
from jaxtrain.data.classes import Classes
from jaxtrain.data.counting import count_classes
from jaxtrain.data.ground import Ground, cube_digest, overlap
from jaxtrain.data.mismatch import check_pixels
from jaxtrain.data.modality_reader import ModalityReader
from jaxtrain.data.modality_source import ModalitySource, open_sources, seen_by_window, sources_digest
from jaxtrain.data.multimodal_data import prepare_modalities
from jaxtrain.data.numbers import BandNumbers, convert_to, cube_numbers, unlike_training
from jaxtrain.data.reader import OnUnreadable, WindowReader
from jaxtrain.data.splits import Part, Split
from jaxtrain.data.statistics import Statistics, training_statistics
from jaxtrain.data.targets import ITSELF, compare_numbers, label_classes, match_classes, resolve_target
from jaxtrain.data.task import Task
from jaxtrain.data.training_data import EvaluationSet, LearnedFrom, TrainingSet, check_digest, no_rows
from jaxtrain.data.windows import WindowPlan, Windows, plan_windows, window_leakage
from zarr_store.errors import InvalidInput
from zarr_store.index import TrainingIndex
from zarr_store.read import Cube
from zarr_store.spec import CubeSpec

__all__ = ["CubeData", "PreparedCube", "prepare_cube", "select_windows"]


@dataclass(frozen=True)
class CubeData:
    """One open cube."""

    cube: Cube

    @property
    def kind(self) -> Literal["cube", "sample store"]:
        """Kind of the data: a cube."""
        return "cube"

    @property
    def url(self) -> str:
        """URL of the cube."""
        return self.cube.url

    def digest(self, card: LearnedFrom) -> str | None:
        """Return the digest of collection and label; see `TrainingData.digest`."""
        config = card.config.data
        try:
            target = ITSELF if card.task.rebuild else resolve_target(self.cube, config)
            if card.modalities:
                return sources_digest(_sources(self.cube, card, True, ())[0], target.layer)
            return cube_digest(self.cube, config.collection, target.layer)
        except InvalidInput:
            return None

    def prepare(
        self, config: TrainConfig, earlier: LearnedFrom | None, on_unreadable: OnUnreadable | None
    ) -> TrainingSet:
        """Choose the windows of each part; see `TrainingData.prepare`."""
        if config.model.name == "multimodal":
            return prepare_modalities(config, self.cube, earlier, on_unreadable)
        ready = prepare_cube(config, self.cube, earlier, on_unreadable)
        return TrainingSet(
            digest=ready.ground.digest,
            bands=ready.bands,
            classes=ready.classes,
            task=Task(rebuild=config.model.name == "autoencoder", unit=ready.unit),
            plan=ready.plan,
            reader=ready.reader,
            statistics=ready.statistics,
            count=ready.count if ready.counts else None,
            grounds=(ready.ground,),
            leakage=window_leakage(config.data, ready.plan),
            chunk=ready.spec.layout.chunk,
            numbers=ready.numbers,
        )

    def select_part(self, card: LearnedFrom, part: Part) -> EvaluationSet:
        """Return one part of the run's own cube; see `TrainingData.select_part`."""
        return select_windows(self.cube, card, part)

    def select_all(self, card: LearnedFrom, *, without: Sequence[str] = (), insist: bool = False) -> EvaluationSet:
        """Return all windows of another cube; see `TrainingData.select_all`."""
        chosen = select_windows(self.cube, card.of(0), None, without=without, insist=insist)
        grid = self.cube.spec(card.config.data.collection).grid
        overlapping = [
            f"{self.url} overlaps the ground of {ground.cube}, a training cube: its scores are too good"
            for ground in card.grounds[1:]
            if overlap(ground.grid, grid)
        ]
        return replace(chosen, warnings=(*chosen.warnings, *overlapping))

    def places(self, collection: str, windows: Windows) -> dict[str, npt.NDArray[Any]]:
        """Return date and centre of each window, in the cube's CRS."""
        spec, rows = self.cube.spec(collection), windows.rows
        a, _, left, _, e, top = spec.grid.transform
        # the middle of what lies on the grid
        y, x = ((rows[:, i] + np.minimum(rows[:, i] + windows.patch, spec.shape[i])) / 2 for i in (1, 2))
        return {"time": np.array(spec.times, object)[rows[:, 0]], "y": top + e * y, "x": left + a * x}


@dataclass(frozen=True)
class PreparedCube:
    """One cube of a run: its windows and their reader."""

    ground: Ground
    spec: CubeSpec
    classes: Classes
    index: TrainingIndex
    plan: WindowPlan
    reader: WindowReader

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands that are read."""
        return tuple(self.spec.band_names[i] for i in self.reader.bands)

    @property
    def numbers(self) -> tuple[BandNumbers, ...]:
        """Meaning of the stored numbers of the bands that are read."""
        return cube_numbers(self.spec, self.reader.bands)

    @property
    def unit(self) -> str:
        """Unit of the values that are learned; empty for classes."""
        return "" if self.reader.target is None else self.reader.target.unit

    def statistics(self) -> Statistics:
        """Return the mean, spread and class counts of the training part."""
        return training_statistics(self.index, self.plan, self.reader, self.classes)

    @property
    def counts(self) -> bool:
        """Whether classes are learned, which can be counted."""
        return self.reader.target is not None and not self.reader.target.values

    def count(self, part: Part) -> npt.NDArray[np.int64]:
        """Count the pixels of each class in the windows of a part."""
        return count_classes(self.reader, self.plan.parts[part], self.classes)


def prepare_cube(
    config: TrainConfig,
    cube: Cube,
    earlier: LearnedFrom | None,
    on_unreadable: OnUnreadable | None,
    classes: Classes | None = None,
) -> PreparedCube:
    """Choose the windows of one cube.

    Args:
        config: The run.
        cube: The open cube.
        earlier: Card of the run that is continued.
        on_unreadable: The argument of `WindowReader`.
        classes: Classes of all cubes, if there are several.
    """
    data = config.data
    target = ITSELF if config.model.name == "autoencoder" else resolve_target(cube, data)
    if earlier is not None:  # the order of classes is that of the answers of the network, which the card has fixed
        classes = match_classes(earlier.classes, data, target)
    else:
        classes = label_classes(data, target) if classes is None else match_classes(classes, data, target)
    spec = cube.spec(data.collection)
    index = cube.index(data.collection)
    reader = replace(WindowReader.of(cube, data, classes, target, index), on_unreadable=on_unreadable)
    digest = cube_digest(cube, data.collection, target.layer)
    check_digest(cube.url, digest, earlier)
    split = earlier.split if earlier is not None and isinstance(earlier.split, Split) else None
    plan = plan_windows(data, spec, index, classes, split=split, dates=data.split.test_dates, target=target,
                        edges=earlier is None or earlier.edges)  # fmt: skip
    return PreparedCube(Ground(cube.url, digest, spec.grid, spec.times), spec, classes, index, plan, reader)


def _sources(
    cube: Cube, card: LearnedFrom, own: bool, without: Sequence[str], insist: bool = False
) -> tuple[tuple[ModalitySource, ...], list[str]]:
    """Open the modalities of a trained model in a cube; numbers of other data are compared with those of training."""
    usual = None if own else (card.mean, card.std)
    return open_sources(
        card.config.data, cube, trained=card.modalities, numbers=card.numbers, usual=usual, without=without,
        insist=insist,
    )  # fmt: skip


def select_windows(
    cube: Cube,
    card: LearnedFrom,
    part: Part | None,
    *,
    may_be_empty: bool = False,
    without: Sequence[str] = (),
    insist: bool = False,
) -> EvaluationSet:
    """Choose the windows of one cube for an evaluation.

    Args:
        cube: The open cube.
        card: Card of the run, as if this cube were its only one.
        part: A part of the run's own cube; None for all of another cube.
        may_be_empty: Whether a cube without any window is accepted, as one of several cubes.
        without: Modalities that the network does not get; another cube may lack them.
        insist: Use pixels of another size and numbers that cannot be converted as they are, and warn.
    """
    config = card.config.data
    spec = cube.spec(config.collection)
    if card.grid is None or not isinstance(card.split, Split):
        raise InvalidInput(f"{cube.url} is a cube, but the run was trained on a sample store")
    own = part is not None
    warnings: list[str] = []
    target = ITSELF if card.task.rebuild else resolve_target(cube, config)
    if target.values != card.task.values:
        raise InvalidInput(f"{cube.url}: {config.label!r} does not hold the labels of the run (classes or values)")
    if card.task.unit and target.unit and card.task.unit != target.unit:
        raise InvalidInput(
            f"{cube.url}: {config.label!r} holds values in {target.unit}, the model learned values in "
            f"{card.task.unit}; make the layer again in that unit"
        )
    sources, notes = _sources(cube, card, own, without, insist) if card.modalities else ((), [])
    digest = sources_digest(sources, target.layer) if sources else cube_digest(cube, config.collection, target.layer)
    if own and digest != card.cube_digest:
        warnings.append(f"{cube.url} has changed since the run began; parts of the ground are those of the run")
    if own and spec.grid != card.grid:
        raise InvalidInput(f"{cube.url} has grid {spec.grid}, trained on {card.grid}; pass it as other data")
    if not own:
        warnings += check_pixels(spec.grid, card.grid, cube.url, insist=insist)
    if not own and overlap(card.grid, spec.grid):
        warnings.append(f"{cube.url} overlaps the ground that the model was trained on: its scores are too good")
    classes = match_classes(card.classes, config, target)
    if not own or digest != card.cube_digest:  # a layer that was made again may number its classes in another way
        warnings += compare_numbers(classes, config, target, cube.url)
    named = dict(target.layer.spec.classes) if target.layer is not None and not config.classes else {}
    unknown = [name for name in named.values() if name not in classes.names and target.count_of(name)]
    if unknown and not target.values:
        warnings.append(f"pixels of {', '.join(unknown)} in {cube.url} are not judged: the model does not know them")
    index = cube.index(config.collection)
    plan = plan_windows(config, spec, index, classes,
                        split=card.split if own else Split.whole(card.split.block, spec.shape[1:]),
                        dates=config.split.test_dates if own else (), target=target, judging=True,
                        seen=seen_by_window(sources, spec, config.patch, config.learn_masked) if sources else None,
                        )  # fmt: skip
    if own and config.split.kind == "random":
        share = (card.statistics.get("leakage") or {}).get("beside")
        figure = "" if share is None else f": {share:.1%} of the test windows lie beside a training window"
        warnings.append(f"the split is random and leaks, so these scores are too good{figure}")
    # all of another cube was put into its test part
    windows = plan.parts[part or "test"]
    if not len(windows) and not may_be_empty:
        raise no_rows(cube.url, card, part, "window")
    if sources:
        labels = WindowReader.of(cube, config, classes, target, index)
        several = ModalityReader(sources, config.patch, labels)
        return EvaluationSet(cube.url, windows, several, (*warnings, *notes), (spec.times,))
    reader = WindowReader.of(cube, config.model_copy(update={"bands": card.bands}), classes, target, index)
    conversion, notes = convert_to(card.numbers, cube_numbers(spec, reader.bands), cube.url, insist=insist)
    warnings += notes
    if not own:
        warnings += unlike_training(card.mean, card.std, index, reader.bands, conversion, cube.url)
    reader = replace(reader, conversion=conversion)
    return EvaluationSet(cube.url, windows, reader, tuple(warnings), (spec.times,))
