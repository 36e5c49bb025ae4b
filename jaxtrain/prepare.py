"""What a run begins with: cube → classes → windows → statistics → card. No network is made here, nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.batches import OnUnreadable, WindowReader
from jaxtrain.data.samples import SampleReader, plan_samples, sample_classes, sample_statistics
from jaxtrain.data.splits import Split
from jaxtrain.data.statistics import Statistics, training_statistics
from jaxtrain.data.targets import ITSELF, label_classes, resolve_target
from jaxtrain.data.windows import WindowPlan, plan_windows, window_leakage
from jaxtrain.objective import Task
from jaxtrain.rundir import ModelCard, config_differences, cube_digest
from zarr_store.errors import InvalidInput
from zarr_store.read import Cube, open_cube
from zarr_store.samples import SampleStore, is_sample_store, open_samples

__all__ = ["check_same_run", "open_source", "prepare"]


def open_source(url: str | Path) -> Cube | SampleStore:
    """Open what is learnt from: a cube or a sample store.

    Raises:
        NotACube: It is neither.
    """
    return open_samples(url) if is_sample_store(url) else open_cube(url)


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
    cube: Cube | SampleStore,
    earlier: ModelCard | None,
    *,
    on_unreadable: OnUnreadable | None = None,
) -> tuple[ModelCard, WindowPlan, WindowReader | SampleReader]:
    """Windows and statistics; those of the earlier run where there is one, so that it goes on with the same data.

    Args:
        config: The run.
        cube: The cube or sample store it learns from.
        earlier: Card of the run that is continued.
        on_unreadable: As of `WindowReader`.

    Returns:
        The card, the windows of each part, and the reader for them.

    Raises:
        InvalidInput: The cube is not the one the run began with, or nothing fits.
        NothingFound: No window has anything to learn.
    """
    if isinstance(cube, SampleStore):
        return _prepare_samples(config, cube, earlier)
    data = config.data
    rebuild = config.model.name == "autoencoder"
    target = ITSELF if rebuild else resolve_target(cube, data)
    classes = label_classes(data, target)
    spec = cube.spec(data.collection)
    reader = replace(WindowReader.of(cube, data, classes, target), on_unreadable=on_unreadable)
    digest = cube_digest(cube, data.collection, target.layer)
    _check_digest(cube.url, digest, earlier)
    index = cube.index(data.collection)
    split = earlier.split if earlier is not None and isinstance(earlier.split, Split) else None
    plan = plan_windows(data, spec, index, classes, split=split, dates=data.split.test_dates, target=target)
    if earlier is not None:
        return earlier, plan, reader
    statistics = training_statistics(index, plan, reader, classes)
    leak = window_leakage(data, plan)
    card = ModelCard(
        config=config,
        cube=cube.url,
        cube_digest=digest,
        bands=tuple(spec.band_names[i] for i in reader.bands),
        classes=classes,
        mean=tuple(float(v) for v in statistics.mean),
        std=tuple(float(v) for v in statistics.std),
        class_weights=_class_weights(config, statistics),
        grid=spec.grid,
        times=spec.times,
        split=plan.split,
        windows=plan.counts(),
        statistics={"source": statistics.source, "pixels": statistics.pixels,
                    **({} if leak is None else {"leakage": leak}),
                    "class_pixels": dict(zip(classes.names, statistics.class_pixels.tolist(), strict=True))},
        task=Task(value=statistics.value, rebuild=rebuild),
    )  # fmt: skip
    return card, plan, reader


def _prepare_samples(
    config: TrainConfig, store: SampleStore, earlier: ModelCard | None
) -> tuple[ModelCard, WindowPlan, SampleReader]:
    _check_digest(store.url, store.digest, earlier)
    rebuild = config.model.name == "autoencoder"
    classes = sample_classes(config.data, store)
    reader = SampleReader.of(store, config.data, classes)
    plan, leak = plan_samples(config.data, store, classes, split=None if earlier is None else earlier.split)
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
        split=plan.split,
        windows=plan.counts(),
        statistics={"source": statistics.source, "pixels": statistics.pixels, "leakage": leak,
                    "class_pixels": dict(zip(classes.names, statistics.class_pixels.tolist(), strict=True))},
        task=Task(rebuild=True) if rebuild else Task(per_image=True, several=store.spec.labelled == "several"),
    )  # fmt: skip
    return card, plan, reader


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
