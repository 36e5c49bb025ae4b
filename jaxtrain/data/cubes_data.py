"""`CubesData` is several cubes as training data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.config import TrainConfig
from jaxtrain.data.cube_data import CubeData, PreparedCube, prepare_cube, select_windows
from jaxtrain.data.cubes import CubesReader, Splits, join_statistics, join_windows, numbered
from jaxtrain.data.ground import overlap
from jaxtrain.data.numbers import BandNumbers
from jaxtrain.data.reader import OnUnreadable
from jaxtrain.data.splits import PARTS, Part
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.targets import joined_classes, resolve_target
from jaxtrain.data.task import Task
from jaxtrain.data.training_data import EvaluationSet, LearnedFrom, TrainingSet, no_rows
from jaxtrain.data.windows import WindowPlan, Windows
from zarr_store.errors import InvalidInput
from zarr_store.read import Cube

__all__ = ["CubesData"]


@dataclass(frozen=True)
class CubesData:
    """Several open cubes with the same bands and classes."""

    cubes: tuple[Cube, ...]

    @property
    def kind(self) -> Literal["cube", "sample store"]:
        """Kind of the data: cubes."""
        return "cube"

    @property
    def url(self) -> str:
        """URLs of the cubes, separated by commas."""
        return ", ".join(cube.url for cube in self.cubes)

    def digest(self, card: LearnedFrom) -> str | None:
        """Return the digest of all cubes in their order; see `TrainingData.digest`."""
        each = [CubeData(cube).digest(card) for cube in self.cubes]
        return None if None in each else _joined_digest([str(one) for one in each])

    def prepare(
        self, config: TrainConfig, earlier: LearnedFrom | None, on_unreadable: OnUnreadable | None
    ) -> TrainingSet:
        """Choose the windows of each cube by itself, then join them; see `TrainingData.prepare`."""
        if config.model.name == "multimodal":
            raise InvalidInput(
                f"data.cube names {len(self.cubes)} cubes, and model.name = 'multimodal' takes its windows from one: "
                "name one, and the cube of another modality in data.modalities.NAME.cube"
            )
        if earlier is not None and len(earlier.grounds) != len(self.cubes):
            raise InvalidInput(
                f"the run began with {max(1, len(earlier.grounds))} cubes, data.cube names {len(self.cubes)}"
            )
        if earlier is None:  # before windows are chosen, whose number depends on the size of a pixel
            for cube in self.cubes[1:]:
                _check_pixels(self.cubes[0], cube, config.data.collection)
        parts: list[PreparedCube] = []
        joined = None
        if earlier is None and config.model.name != "autoencoder":
            joined = joined_classes(config.data, [resolve_target(cube, config.data) for cube in self.cubes])
        for number, cube in enumerate(self.cubes):
            before = None if earlier is None else earlier.of(number)
            parts.append(prepare_cube(config, cube, before, numbered(number, on_unreadable), joined))
            _check_alike(parts[0], parts[-1])
        return TrainingSet(
            digest=_joined_digest([part.ground.digest for part in parts]),
            bands=parts[0].bands,
            classes=joined or parts[0].classes,
            task=Task(rebuild=config.model.name == "autoencoder", unit=parts[0].unit),
            plan=WindowPlan(
                Splits(tuple(part.plan.blocks for part in parts)),
                {name: join_windows([part.plan.parts[name] for part in parts]) for name in PARTS},
            ),
            reader=CubesReader(tuple(part.reader for part in parts)),
            statistics=lambda: _statistics(parts),
            count=(lambda part: _count(parts, part)) if parts[0].counts else None,
            grounds=tuple(part.ground for part in parts),
            chunk=parts[0].spec.layout.chunk,
            numbers=parts[0].numbers,
        )

    def select_part(self, card: LearnedFrom, part: Part) -> EvaluationSet:
        """Return one part of all cubes of the run, each with its own split; see `TrainingData.select_part`."""
        chosen: list[EvaluationSet] = []
        warnings: list[str] = []
        for number, (ground, cube) in enumerate(zip(card.grounds, self.cubes, strict=True)):
            chosen.append(select_windows(cube, card.of(number), part, may_be_empty=True))
            warnings += chosen[-1].warnings
            warnings += [
                f"{ground.cube} overlaps the ground of {other.cube}: held-out windows of one may be training windows "
                "of the other"
                for other in card.grounds[:number]
                if overlap(ground.grid, other.grid)
            ]
        return self._joined(card, chosen, warnings, part)

    def select_all(self, card: LearnedFrom, *, without: Sequence[str] = (), insist: bool = False) -> EvaluationSet:
        """Return all windows of several other cubes; see `TrainingData.select_all`."""
        chosen = [CubeData(cube).select_all(card, without=without, insist=insist) for cube in self.cubes]
        return self._joined(card, chosen, [line for one in chosen for line in one.warnings], None)

    def places(self, collection: str, windows: Windows) -> dict[str, npt.NDArray[Any]]:
        """Return cube, date and centre of each window, in the CRS of its cube."""
        numbers = windows.rows[:, 0]
        found: dict[str, npt.NDArray[Any]] = {"cube": np.array([cube.url for cube in self.cubes], object)[numbers]}
        for number in np.unique(numbers):
            chosen = numbers == number
            own = Windows(windows.patch, windows.rows[chosen, 1:])
            for name, values in CubeData(self.cubes[int(number)]).places(collection, own).items():
                found.setdefault(name, np.empty(len(windows), values.dtype))[chosen] = values
        return found

    def _joined(
        self, card: LearnedFrom, chosen: Sequence[EvaluationSet], warnings: Sequence[str], part: Part | None
    ) -> EvaluationSet:
        windows = join_windows([one.windows for one in chosen])
        if not len(windows):
            raise no_rows(self.url, card, part, "window")
        return EvaluationSet(
            self.url, windows, CubesReader(tuple(one.reader for one in chosen)), tuple(warnings),
            tuple(times for one in chosen for times in one.dates),
        )  # fmt: skip


def _joined_digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _statistics(parts: Sequence[PreparedCube]) -> Statistics:
    return join_statistics([part.statistics() for part in parts if len(part.plan.parts["train"])])


def _count(parts: Sequence[PreparedCube], part: Part) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.sum([one.count(part) for one in parts], axis=0)
    return total


def _check_pixels(first: Cube, other: Cube, collection: str) -> None:
    """Refuse cubes whose pixels differ in size by more than a tenth: a network learns objects of one size."""
    grids = [cube.spec(collection).grid for cube in (first, other)]
    sizes = [[side / grid.units_per_metre for side in grid.resolution] for grid in grids]
    if any(abs(a - b) > 0.1 * min(a, b) for a, b in zip(*sizes, strict=True)):
        ours, theirs = (" × ".join(f"{side:g}" for side in size) for size in sizes)
        raise InvalidInput(
            f"{other.url} has pixels of {theirs} m, {first.url} of {ours} m: the cubes of a list must be alike; "
            "ingest them at one --resolution, or train a network for each"
        )


def _check_alike(first: PreparedCube, other: PreparedCube) -> None:
    """Refuse cubes whose bands, scales or labels differ."""
    ours, theirs = first.spec, other.spec
    for what, a, b in (
        ("arrays", ours.kind, theirs.kind),
        ("bands", ", ".join(first.bands), ", ".join(other.bands)),
        *((f"band {a.band} stored", a, b) for a, b in zip(first.numbers, other.numbers, strict=False)),
        ("values in", first.unit or "no unit", other.unit or "no unit"),
        ("dates of a series", first.reader.dates, other.reader.dates),
    ):
        if a != b:
            raise InvalidInput(
                f"{other.ground.cube} has {what} {_as_stated(b)}, {first.ground.cube} has {what} {_as_stated(a)}: "
                "the cubes of a list must be alike; ingest them with the same settings, or train a network for each"
            )


def _as_stated(what: object) -> str:
    """Describe the numbers of a band by type, scale, offset and unit; anything else as it is."""
    if not isinstance(what, BandNumbers):
        return str(what)
    unit = f" in {what.unit}" if what.unit not in ("", "1") else ""
    return f"as {what.kind} in {what.dtype} with scale {what.scale:g} and offset {what.offset:g}{unit}"
