"""What a run begins with: cube → classes → windows → statistics → card. No network is made here, nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Reader
from jaxtrain.data.classes import Classes
from jaxtrain.data.cubes import CubesReader, Splits, join_statistics, join_windows, numbered
from jaxtrain.data.places import SampleSplit
from jaxtrain.data.reader import OnUnreadable, WindowReader
from jaxtrain.data.samples import SampleReader, plan_samples, sample_classes, sample_statistics
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.data.statistics import Statistics, training_statistics
from jaxtrain.data.targets import ITSELF, label_classes, match_classes, resolve_target
from jaxtrain.data.windows import WindowPlan, plan_windows, window_leakage
from jaxtrain.objective import Task
from jaxtrain.rundir import Ground, ModelCard, config_differences, cube_digest
from zarr_store.errors import InvalidInput
from zarr_store.index import TrainingIndex
from zarr_store.read import Cube, open_cube
from zarr_store.samples import SampleStore, is_sample_store, open_samples
from zarr_store.spec import CubeSpec

__all__ = ["Source", "check_same_run", "open_source", "prepare"]


Source = Cube | tuple[Cube, ...] | SampleStore
"""What is learnt from."""


def open_source(url: str | Path | Sequence[str]) -> Source:
    """Open what is learnt from: a cube, several, or a sample store.

    Raises:
        NotACube: It is neither.
        InvalidInput: A sample store is one of several.
    """
    if isinstance(url, str | Path):
        return open_samples(url) if is_sample_store(url) else open_cube(url)
    if len(url) == 1:
        return open_source(url[0])
    for one in url:
        if is_sample_store(one):
            raise InvalidInput(
                f"{one} is a sample store: a list in data.cube is of cubes; name one store, or cubes only"
            )
    return tuple(open_cube(one) for one in url)


def check_same_run(out: Path, earlier: ModelCard, config: TrainConfig, resume: bool) -> None:
    """Refuse a folder that holds a run of another configuration, or any run where none is to be continued.

    Raises:
        InvalidInput: The message is the difference.
    """
    if not resume:
        raise InvalidInput(f"{out} already holds a run; continue it with --resume, or give another folder")
    differences = config_differences(earlier.config, config)
    if differences:
        raise InvalidInput(
            f"{out} holds a run of another configuration (there → asked for): {'; '.join(differences[:8])}"
            f"{f'; and {len(differences) - 8} more' if len(differences) > 8 else ''}. Give another folder, or the "
            f"configuration in {out / 'config.toml'}"
        )


def prepare(
    config: TrainConfig,
    source: Source,
    earlier: ModelCard | None,
    *,
    on_unreadable: OnUnreadable | None = None,
) -> tuple[ModelCard, WindowPlan, Reader]:
    """Windows and statistics; those of the earlier run where there is one, so that it goes on with the same data.

    Args:
        config: The run.
        source: The cube, cubes or sample store it learns from.
        earlier: Card of the run that is continued.
        on_unreadable: As of `WindowReader`.

    Returns:
        The card, the windows of each part, and the reader for them.

    Raises:
        InvalidInput: The cube is not the one the run began with, or nothing fits.
        NothingFound: No window has anything to learn.
    """
    if isinstance(source, SampleStore):
        return _prepare_samples(config, source, earlier)
    if isinstance(source, tuple):
        return _prepare_cubes(config, source, earlier, on_unreadable)
    part = _prepare_cube(config, source, earlier, on_unreadable)
    if earlier is not None:
        return earlier, part.plan, part.reader
    statistics = training_statistics(part.index, part.plan, part.reader, part.classes)
    return _card(config, part, statistics), part.plan, part.reader


@dataclass(frozen=True)
class _Prepared:
    """One cube of a run."""

    ground: Ground
    spec: CubeSpec
    classes: Classes
    index: TrainingIndex
    plan: WindowPlan
    reader: WindowReader


def _prepare_cube(
    config: TrainConfig,
    cube: Cube,
    earlier: ModelCard | None,
    on_unreadable: OnUnreadable | None,
    classes: Classes | None = None,
) -> _Prepared:
    """Windows of one cube; `classes` are those of a cube before it."""
    data = config.data
    target = ITSELF if config.model.name == "autoencoder" else resolve_target(cube, data)
    classes = label_classes(data, target) if classes is None else match_classes(classes, data, target)
    spec = cube.spec(data.collection)
    index = cube.index(data.collection)
    reader = replace(WindowReader.of(cube, data, classes, target, index), on_unreadable=on_unreadable)
    digest = cube_digest(cube, data.collection, target.layer)
    _check_digest(cube.url, digest, earlier)
    split = earlier.split if earlier is not None and isinstance(earlier.split, Split) else None
    plan = plan_windows(data, spec, index, classes, split=split, dates=data.split.test_dates, target=target)
    return _Prepared(Ground(cube.url, digest, spec.grid, spec.times), spec, classes, index, plan, reader)


def _prepare_cubes(
    config: TrainConfig, cubes: tuple[Cube, ...], earlier: ModelCard | None, on_unreadable: OnUnreadable | None
) -> tuple[ModelCard, WindowPlan, Reader]:
    """Each cube by itself, then all as one."""
    if earlier is not None and len(earlier.grounds) != len(cubes):
        raise InvalidInput(f"the run began with {max(1, len(earlier.grounds))} cubes, data.cube names {len(cubes)}")
    parts: list[_Prepared] = []
    for number, cube in enumerate(cubes):
        before = None if earlier is None else earlier.of(number)
        first = parts[0].classes if parts else None
        parts.append(_prepare_cube(config, cube, before, numbered(number, on_unreadable), first))
        _check_alike(parts[0], parts[-1])
    plan = WindowPlan(
        Splits(tuple(part.plan.blocks for part in parts)),
        {name: join_windows([part.plan.parts[name] for part in parts]) for name in PARTS},
    )
    reader = CubesReader(tuple(part.reader for part in parts))
    if earlier is not None:
        return earlier, plan, reader
    statistics = join_statistics(
        [training_statistics(part.index, part.plan, part.reader, parts[0].classes) for part in parts
         if len(part.plan.parts["train"])]
    )  # fmt: skip
    digest = hashlib.sha256("".join(part.ground.digest for part in parts).encode()).hexdigest()
    card = _card(config, replace(parts[0], plan=plan), statistics)
    return replace(card, cube_digest=digest, grounds=tuple(part.ground for part in parts)), plan, reader


def _check_alike(first: _Prepared, other: _Prepared) -> None:
    """Refuse cubes whose numbers do not mean the same."""
    ours, theirs = first.spec, other.spec
    for what, a, b in (
        ("arrays", ours.kind, theirs.kind),
        ("bands", *([[(s.band_names[i], s.bands[i].scale, s.bands[i].offset) for i in p.reader.bands]
                     for s, p in ((ours, first), (theirs, other))])),
        ("dates of a series", first.reader.dates, other.reader.dates),
    ):  # fmt: skip
        if a != b:
            raise InvalidInput(
                f"{other.ground.cube} has {what} {b}, {first.ground.cube} has {a}: the cubes of a list must be alike"
            )


def _card(config: TrainConfig, part: _Prepared, statistics: Statistics) -> ModelCard:
    plan = part.plan
    leak = None if isinstance(plan.split, Splits) else window_leakage(config.data, plan)
    return ModelCard(
        config=config,
        cube=part.ground.cube,
        cube_digest=part.ground.digest,
        bands=tuple(part.spec.band_names[i] for i in part.reader.bands),
        classes=part.classes,
        mean=tuple(float(v) for v in statistics.mean),
        std=tuple(float(v) for v in statistics.std),
        class_weights=_class_weights(config, statistics),
        grid=part.ground.grid,
        times=part.ground.times,
        split=plan.split,  # type: ignore[arg-type]
        windows=plan.counts(),
        statistics={"source": statistics.source, "pixels": statistics.pixels,
                    **({} if leak is None else {"leakage": leak}),
                    "class_pixels": dict(zip(part.classes.names, statistics.class_pixels.tolist(), strict=True))},
        task=Task(value=statistics.value, rebuild=config.model.name == "autoencoder"),
    )  # fmt: skip


def _prepare_samples(
    config: TrainConfig, store: SampleStore, earlier: ModelCard | None
) -> tuple[ModelCard, WindowPlan, SampleReader]:
    _check_digest(store.url, store.digest, earlier)
    rebuild = config.model.name == "autoencoder"
    classes = sample_classes(config.data, store)
    reader = SampleReader.of(store, config.data, classes)
    plan, leak = plan_samples(config.data, store, classes, split=_one_split(earlier))
    for part in ("train", "test"):
        if not len(plan.parts[part]) and (part == "train" or config.data.split.test):
            raise InvalidInput(
                f"{store.url}: no sample is left for part {part}; change data.split (its buffer takes from training)"
            )
    if earlier is not None:
        return earlier, plan, reader
    statistics = sample_statistics(plan, reader, classes)
    card = ModelCard(
        config=config,
        cube=store.url,
        cube_digest=store.digest,
        bands=tuple(store.spec.bands[i] for i in reader.bands),
        classes=classes,
        mean=tuple(float(v) for v in statistics.mean),
        std=tuple(float(v) for v in statistics.std),
        class_weights=_class_weights(config, statistics),
        grid=None,
        times=(),
        split=plan.split,  # type: ignore[arg-type]
        windows=plan.counts(),
        statistics={"source": statistics.source, "pixels": statistics.pixels, "leakage": leak,
                    "class_pixels": dict(zip(classes.names, statistics.class_pixels.tolist(), strict=True))},
        task=Task(rebuild=True) if rebuild else Task(per_image=True, several=store.spec.labelled == "several"),
    )  # fmt: skip
    return card, plan, reader


def _one_split(earlier: ModelCard | None) -> Split | SampleSplit | None:
    return None if earlier is None or isinstance(earlier.split, Splits) else earlier.split


def _check_digest(url: str, digest: str, earlier: ModelCard | None) -> None:
    if earlier is not None and digest != earlier.cube_digest:
        raise InvalidInput(
            f"{url} is not the cube that the run began with, or has changed (digest {earlier.cube_digest[:12]} → "
            f"{digest[:12]}); restore it, or train into another folder"
        )


def _class_weights(config: TrainConfig, statistics: Statistics) -> tuple[float, ...] | None:
    """Inverse square root of frequency, with mean 1 over the labelled pixels; a class without pixels weighs as one."""
    if config.optim.class_weights == "none":
        return None
    if statistics.value is not None or config.model.name == "autoencoder":
        raise InvalidInput("optim.class_weights = 'balanced', but values are learnt: use 'none'")
    share = statistics.class_pixels / max(statistics.class_pixels.sum(), 1)
    weights = np.where(share > 0, 1 / np.sqrt(np.maximum(share, 1e-6)), 1.0)
    return tuple(float(w) for w in weights / max(float((weights * share).sum()), 1e-6))
