"""Prepare training data and model card of a run; no network is made, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.places import SampleSplit
from jaxtrain.data.reader import OnUnreadable
from jaxtrain.data.splits import PARTS
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.training_data import TrainingData, TrainingSet
from jaxtrain.runs.rundir import ModelCard, config_differences
from zarr_store.errors import InvalidInput

__all__ = ["absent_classes", "check_same_run", "dates_left_out", "prepare"]


def check_same_run(out: Path, earlier: ModelCard, config: TrainConfig, resume: bool) -> None:
    """Refuse a folder with a run of another configuration, or with any run if none may be continued.

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
    data: TrainingData,
    earlier: ModelCard | None,
    *,
    on_unreadable: OnUnreadable | None = None,
) -> tuple[ModelCard, TrainingSet]:
    """Prepare the training data and their model card; an earlier run keeps its card.

    Args:
        config: The run.
        data: The open training data.
        earlier: Card of the run that is continued; windows and statistics stay the same.
        on_unreadable: The argument of `WindowReader`.

    Raises:
        InvalidInput: The data are not those the run began with, or nothing fits.
        NothingFound: No window has anything to learn.
    """
    if earlier is None and config.optim.loss == "dice" and config.optim.accumulate > 1:
        raise InvalidInput(
            "optim.loss = 'dice' is a quotient over the whole batch, which optim.accumulate never has at once: raise "
            "run.batch_size in place of optim.accumulate, or use another loss"
        )
    ready = data.prepare(config, earlier, on_unreadable)
    return earlier or _card(config, data, ready), ready


def _card(config: TrainConfig, data: TrainingData, ready: TrainingSet) -> ModelCard:
    statistics = ready.statistics()
    first = ready.grounds[0] if ready.grounds else None
    counted = dict(zip(ready.classes.names, statistics.class_pixels.tolist(), strict=True))
    elsewhere = (
        {}
        if ready.count is None
        else {part: dict(zip(ready.classes.names, ready.count(part).tolist(), strict=True)) for part in PARTS[1:]}
    )
    leak = {} if ready.leakage is None else {"leakage": ready.leakage}
    return ModelCard(
        config=config,
        cube=data.url if first is None else first.cube,
        cube_digest=ready.digest,
        bands=ready.bands,
        classes=ready.classes,
        mean=tuple(float(v) for v in statistics.mean),
        std=tuple(float(v) for v in statistics.std),
        class_weights=_class_weights(config, statistics),
        grid=None if first is None else first.grid,
        times=() if first is None else first.times,
        split=ready.plan.split,
        windows=ready.plan.counts(),
        statistics={
            "source": statistics.source,
            "pixels": statistics.pixels,
            **leak,
            "class_pixels": counted,
            **({"held_out": elsewhere} if elsewhere else {}),
            **({"image_side": ready.plan.parts["train"].patch} if isinstance(ready.plan.split, SampleSplit) else {}),
        },
        task=replace(ready.task, value=statistics.value),
        grounds=ready.grounds if len(ready.grounds) > 1 else (),
        numbers=ready.numbers,
        modalities=ready.modalities,
    )


def dates_left_out(card: ModelCard) -> list[str]:
    """Return a line for each cube whose last dates make no whole series of `data.dates`."""
    dates = card.config.data.dates
    if dates in (1, "all"):
        return []
    lines = []
    for number, times in enumerate(card.dates):
        rest = len(times) % int(dates)
        if rest:
            where = f" of {card.grounds[number].cube}" if card.grounds else ""
            lines.append(
                f"the last {rest} of {len(times)} dates{where} make no whole series of data.dates = {dates}: no part "
                "has them; take a number that divides the dates, or 'all'"
            )
    return lines


def absent_classes(card: ModelCard) -> list[str]:
    """Return a line for each class that a part of the data lacks, and for each that none has."""
    held_out = card.statistics.get("held_out")
    if held_out is None:  # values, an image that is given back, or a card of release 0.1.0
        return []
    counted = {"training": card.statistics["class_pixels"], **held_out}
    what = "pixel" if card.grid is not None or not card.task.per_image else "sample"
    used = [part for part in counted if any(counted[part].values())]
    lines, nowhere = [], []
    for name, values in zip(card.classes.names, card.classes.values, strict=True):
        without = [part for part in used if not counted[part][name]]
        if without == used:
            nowhere.append(f"{name!r}" + (f" (value {', '.join(map(str, values))})" if values else ""))
        elif "training" in without:
            seen = " and ".join(f"{counted[part][name]:,} in {part}" for part in used if part not in without)
            lines.append(
                f"class {name!r} has no {what} in training ({seen}), so it cannot be learned: take smaller blocks, "
                "another data.split.seed or a lower data.min_labelled"
            )
        elif without:
            lines.append(
                f"class {name!r} has no {what} in {' and '.join(without)}, so nothing is known there of how well it is "
                "learned: take smaller blocks or another data.split.seed"
            )
    if nowhere:
        which = f"class {nowhere[0]} occurs" if len(nowhere) == 1 else f"classes {', '.join(nowhere)} occur"
        lines.append(f"{which} nowhere in the data: check data.classes, or leave them out")
    return lines


def _class_weights(config: TrainConfig, statistics: Statistics) -> tuple[float, ...] | None:
    """Return the inverse square root of frequency, mean 1 over labelled pixels and 1 for an absent class; or None."""
    if config.optim.class_weights == "none":
        return None
    if statistics.value is not None or config.model.name == "autoencoder":
        raise InvalidInput("optim.class_weights = 'balanced', but values are learned: use 'none'")
    share = statistics.class_pixels / max(statistics.class_pixels.sum(), 1)
    weights = np.where(share > 0, 1 / np.sqrt(np.maximum(share, 1e-6)), 1.0)
    return tuple(float(w) for w in weights / max(float((weights * share).sum()), 1e-6))
