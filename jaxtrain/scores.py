"""Judging a model on ground that it has never seen, on all dates: run → evaluation.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np

from jaxtrain.checkpoint import CheckpointStore, target_of
from jaxtrain.config import DataConfig
from jaxtrain.data.arrays import Reader, put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.classes import NOT_LEARNT
from jaxtrain.data.cubes import CubesReader, Splits, join_windows
from jaxtrain.data.places import SampleSplit, nearest_m
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.samples import SampleReader, plan_samples
from jaxtrain.data.splits import Part, Split
from jaxtrain.data.targets import ITSELF, match_classes, resolve_target
from jaxtrain.data.windows import Windows, plan_windows
from jaxtrain.metrics import ConfusionMatrix, SeveralCounts, ValueErrors, counts_for
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.prepare import open_source
from jaxtrain.report import collect_examples, write_report
from jaxtrain.rundir import ModelCard, cube_digest, inference_program, load_card
from jaxtrain.state import Program, TrainState
from jaxtrain.step import EvalStep, make_eval_step, make_predict_step
from zarr_store.backends import FolderStore
from zarr_store.errors import InvalidInput, NothingFound, UnknownName
from zarr_store.grid import Grid
from zarr_store.read import Cube
from zarr_store.samples import SampleStore, is_sample_store, open_samples

__all__ = ["EVALUATION", "evaluate", "judge", "open_judged", "restore_model"]

EVALUATION = "evaluation.json"
Progress = Callable[[int, int], None]


def judge(
    program: Program,
    step: EvalStep,
    state: TrainState,
    reader: Reader,
    windows: Windows,
    names: tuple[str, ...],
    *,
    on_batch: Progress | None = None,
) -> tuple[ConfusionMatrix | SeveralCounts | ValueErrors, float]:
    """Counts and mean loss over all windows or samples, each once.

    Args:
        program: Gives mesh and batch size.
        step: From `make_eval_step(program)`.
        state: The model.
        reader: Reads windows with labels.
        windows: Those to judge.
        names: Class names.
        on_batch: Called with (batches done, batches in all).
    """
    run = program.config.run
    axis = program.mesh.shape["data"]
    size = -(-run.batch_size // axis) * axis
    sharding = batch_sharding(program.mesh)
    task = program.objective.task
    matrix, loss, labelled = counts_for(names, several=task.several, values=task.values), 0.0, 0

    def count(sums: dict[str, jax.Array]) -> None:
        nonlocal loss, labelled
        matrix.add_sums(jax.device_get(sums))
        loss += float(sums["loss_sum"])
        labelled += int(sums["labelled"])

    total = -(-len(windows) // size)
    previous: dict[str, jax.Array] | None = None
    with BatchStream(
        reader, windows, size=size, sharding=sharding, threads=run.read_threads, prefetch=run.prefetch
    ) as batches:
        for number, _, batch in batches:
            current = step(state, put_batch(batch, sharding, size))
            if previous is not None:  # read one batch late, so that the device always has work
                count(previous)
            previous = current
            if on_batch:
                on_batch(number + 1, total)
    if previous is not None:
        count(previous)
    return matrix, loss / labelled if labelled else math.nan


def restore_model(run: Path, card: ModelCard) -> tuple[Program, TrainState, int, tuple[str, ...]]:
    """Program, state and step of the run's best or newest undamaged checkpoint, and a line for each damaged newer one.

    The best is that of `run.monitor`, where one is named.

    Raises:
        NothingFound: The run has no checkpoint yet.
    """
    program = inference_program(card)
    store = CheckpointStore(run / "checkpoints")
    newest, passed_over = store.newest()
    if newest is None:
        raise NothingFound(f"{run} has no checkpoint yet; let `terrashard train` reach its first one")
    best = store.contents(newest)["extra"].get("best", {}).get("step")
    if best is not None and best != newest:
        problems = store.problems(best)
        if problems:
            passed_over.append(f"the best checkpoint {store.path(best)} cannot be used: {'; '.join(problems[:3])}")
        else:
            newest = int(best)
    restored = store.restore(target_of(program), step=newest)
    assert restored is not None
    return program, program.of_saved(restored.state), restored.step, tuple(passed_over)


def evaluate(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: Part | str = "test",
    on_batch: Progress | None = None,
) -> dict[str, Any]:
    """Judge the newest checkpoint of a run on one part of its cube or sample store, or on the whole of another.

    Args:
        run: The run directory.
        data: Another cube with the same bands and label layer, or another sample store with the same bands and classes
            (matched by name); all of it is judged. None: the run's own.
        split: "test", "validation" or "train"; of the run's own cube only.
        on_batch: Called with (batches done, batches in all).

    Returns:
        accuracy, macro_f1, miou, kappa, loss, per_class, confusion_matrix (rows are truth), classes, samples (windows),
        pixels (labelled ones, that scores count), seconds, split, step, cube, warnings; where values are learnt mae,
        rmse, bias and r2 (share of the variance explained), and none of the scores of classes. Also written to
        RUN/evaluation.json, and the report is made anew.

    Raises:
        InvalidInput: `run` is not a run.
        NothingFound: There is no checkpoint, or nothing to judge.
    """
    began = time.monotonic()
    run = Path(run)
    if split not in get_args(Part):
        raise UnknownName.of("split", split, get_args(Part))
    card = load_card(run)
    url, windows, reader, warnings = _open_data(card, data, cast(Part, split))
    program, state, step, passed_over = restore_model(run, card)
    step_of = make_eval_step(program, turned=card.config.model.turns)
    matrix, loss = judge(program, step_of, state, reader, windows, card.classes.names, on_batch=on_batch)
    result = {
        **matrix.to_dict(),
        "loss": loss if math.isfinite(loss) else None,
        "samples": len(windows),
        "seconds": round(time.monotonic() - began, 3),
        "split": split if data is None else "all",
        "step": step,
        "cube": url,
        "warnings": [*warnings, *passed_over],
    }
    if "leakage" in card.statistics and data is None:
        result["leakage"] = card.statistics["leakage"]
    FolderStore(run.absolute()).write(EVALUATION, json.dumps(result, indent=1, ensure_ascii=False).encode())
    examples = collect_examples(program, make_predict_step(program), state, reader, windows, card.classes.names)
    write_report(run, card, examples=examples, evaluation=result)
    return result


def open_judged(card: ModelCard, data: str | Path) -> tuple[str, Windows, Reader, list[str]]:
    """All windows or samples of a cube or store that is not the run's own part, and the reader for them."""
    return _open_data(card, data, "test")


def _open_data(card: ModelCard, data: str | Path | None, split: Part) -> tuple[str, Windows, Reader, list[str]]:
    if data is None and card.grounds:
        return _open_cubes(card, split)
    source = open_source(card.cube if data is None else data)
    if isinstance(source, SampleStore) != (card.grid is None):
        learnt, came = ("sample store", "cube") if card.grid is None else ("cube", "sample store")
        raise InvalidInput(
            f"{card.cube if data is None else data} is a {came}, but the run learnt from a {learnt}; give a {learnt}"
        )
    if isinstance(source, SampleStore):
        return _open_samples(card, source, data is None, split)
    assert isinstance(source, Cube)
    if not card.grounds:
        return _open_cube(card, source, data is None, split)
    url, windows, reader, warnings = _open_cube(card.of(0), source, False, split)
    overlapping = [
        g.cube for g in card.grounds[1:] if _same_ground(g.grid, source.spec(card.config.data.collection).grid)
    ]
    warnings += [
        f"{source.url} overlaps the ground of {cube}, which was learnt: its scores are too good" for cube in overlapping
    ]
    return url, windows, reader, warnings


def _open_cubes(card: ModelCard, split: Part) -> tuple[str, Windows, Reader, list[str]]:
    """All cubes of a run, each with its own split."""
    opened, warnings = [], []
    for number, ground in enumerate(card.grounds):
        cube = open_source(ground.cube)
        assert isinstance(cube, Cube)
        _, windows, reader, said = _open_cube(card.of(number), cube, True, split, may_be_empty=True)
        opened.append((windows, reader))
        warnings += said
        warnings += [
            f"{ground.cube} overlaps the ground of {other.cube}: what is judged in one may be learnt in the other"
            for other in card.grounds[:number]
            if _same_ground(ground.grid, other.grid)
        ]
    joined = join_windows([windows for windows, _ in opened])
    urls = ", ".join(ground.cube for ground in card.grounds)
    if not len(joined):
        raise NothingFound(f"{urls} have no window of part {split} with enough to learn from; see data.min_labelled")
    return urls, joined, CubesReader(tuple(reader for _, reader in opened)), warnings


def _open_cube(
    card: ModelCard, cube: Cube, own: bool, split: Part, *, may_be_empty: bool = False
) -> tuple[str, Windows, WindowReader, list[str]]:
    config = card.config.data
    spec = cube.spec(config.collection)
    if card.grid is None or not isinstance(card.split, Split):
        raise InvalidInput(f"{cube.url} is a cube, but the run learnt from a sample store")
    warnings = []
    target = ITSELF if card.task.rebuild else resolve_target(cube, config)
    if target.values != card.task.values:
        raise InvalidInput(f"{cube.url}: {config.label!r} does not hold what the run learnt, classes or values")
    if own and cube_digest(cube, config.collection, target.layer) != card.cube_digest:
        warnings.append(f"{cube.url} has changed since the run began; parts of the ground are those of the run")
    if own and spec.grid != card.grid:
        raise InvalidInput(f"{cube.url} has grid {spec.grid}, the run learnt on {card.grid}; pass it as other data")
    if not own and spec.grid.resolution != card.grid.resolution:
        warnings.append(f"pixels of {cube.url} are {spec.grid.resolution}, the model learnt {card.grid.resolution}")
    if not own and _same_ground(card.grid, spec.grid):
        warnings.append(f"{cube.url} overlaps the ground that the model was trained on: its scores are too good")
    classes = match_classes(card.classes, config, target)
    index = cube.index(config.collection)
    plan = plan_windows(config, spec, index, classes,
                        split=card.split if own else Split.whole(card.split.block, spec.shape[1:]),
                        dates=config.split.test_dates if own else (), target=target)  # fmt: skip
    if own and config.split.kind == "random":
        share = (card.statistics.get("leakage") or {}).get("beside")
        figure = "" if share is None else f": {share:.1%} of the test windows lie beside a training window"
        warnings.append(f"the split is random and leaks, so these scores are too good{figure}")
    windows = plan.parts[split if own else "test"]
    if not len(windows) and not may_be_empty:
        raise NothingFound(f"{cube.url} has no window of part {split} with enough to learn from; see data.min_labelled")
    reader = WindowReader.of(cube, config.model_copy(update={"bands": card.bands}), classes, target, index)
    return cube.url, windows, reader, warnings


def _open_samples(
    card: ModelCard, store: SampleStore, own: bool, split: Part
) -> tuple[str, Windows, SampleReader, list[str]]:
    config = card.config.data.model_copy(update={"bands": card.bands})
    warnings = []
    if own:
        if store.digest != card.cube_digest:
            raise InvalidInput(f"{store.url} is not the store that the run learnt from; pass it as other data")
        reader = SampleReader.of(store, config, card.classes)
        plan, leak = plan_samples(
            config, store, card.classes, split=None if isinstance(card.split, Splits) else card.split
        )
        if leak["leaky"]:
            share = leak.get("share") if leak.get("share") is not None else leak.get("touching")
            near = f"nearer than {leak['near_m']:g} m" if "near_m" in leak else "inside its own patch"
            figure = "" if share is None else f": {share:.1%} of the test samples have a training sample {near}"
            warnings.append(f"the split is random and leaks, so these scores are too good{figure}")
        windows = plan.parts[split]
    else:
        reader, windows, warnings = _other_samples(card, config, store)
    if not len(windows):
        raise NothingFound(f"{store.url} has no sample of part {split}")
    return store.url, windows, reader, warnings


def _other_samples(card: ModelCard, config: DataConfig, store: SampleStore) -> tuple[SampleReader, Windows, list[str]]:
    """All samples of another store, whose classes may come in another order: they are matched by name."""
    if card.task.rebuild:
        return _every_sample(config, card, store)
    known = {name: index for index, name in enumerate(card.classes.names)}
    first = 1 if store.spec.labelled == "pixels" else 0
    table = np.full(256, NOT_LEARNT, np.uint8)
    unknown = [name for name in store.spec.classes if name not in known]
    for value, name in enumerate(store.spec.classes):
        table[value + first] = known.get(name, NOT_LEARNT)
    if len(unknown) == len(store.spec.classes) or (store.spec.labelled == "several") != card.task.several:
        raise InvalidInput(
            f"{store.url} has the classes {', '.join(store.spec.classes[:8])}, the model knows "
            f"{', '.join(card.classes.names[:8])}: none is the same, so it cannot be judged there"
        )
    warnings = [f"samples of {', '.join(unknown)} are not judged: the model does not know them"] if unknown else []
    absent = [name for name in known if name not in store.spec.classes]
    if card.task.several and (unknown or absent):
        raise InvalidInput(f"{store.url} must have the classes {', '.join(card.classes.names)}; it lacks or adds some")
    reader = replace(SampleReader.of(store, config, card.classes), table=table)
    rows = np.zeros((store.spec.count, 3), np.int32)
    rows[:, 0] = np.arange(store.spec.count)
    if store.spec.labelled == "one":
        rows = rows[table[store.label] != NOT_LEARNT]
    elif store.spec.labelled == "pixels":
        rows = np.argwhere(table[store.label] != NOT_LEARNT).astype(np.int32)
    warnings += _near_training(card, store)
    return reader, Windows(reader.patch, rows), warnings


def _every_sample(config: DataConfig, card: ModelCard, store: SampleStore) -> tuple[SampleReader, Windows, list[str]]:
    """All samples of another store for a model that needs no labels."""
    rows = np.zeros((store.spec.count, 3), np.int32)
    rows[:, 0] = np.arange(store.spec.count)
    if store.spec.labelled == "pixels":
        rows = np.argwhere(store.label >= 0).astype(np.int32)
    reader = SampleReader.of(store, config, card.classes)
    return reader, Windows(reader.patch, rows), _near_training(card, store)


def _near_training(card: ModelCard, store: SampleStore) -> list[str]:
    """A warning where samples of another store lie near those that were learnt."""
    if store.digest == card.cube_digest:
        return [f"{store.url} holds the samples that the model was trained on: its scores are too good"]
    if not isinstance(card.split, SampleSplit) or not is_sample_store(card.cube) or not store.has_places:
        return []
    learnt = open_samples(card.cube)
    train = card.split.parts == 0
    if learnt.digest != card.cube_digest or not learnt.has_places or not train.any():
        return []
    near_m = card.config.data.split.near_m
    distance = nearest_m(store.longitude, store.latitude, learnt.longitude[train], learnt.latitude[train])
    share = float((distance < near_m).mean())
    if not share:
        return []
    return [f"{share:.1%} of the samples of {store.url} have a training sample nearer than {near_m:g} m"]


def _same_ground(learnt: Grid, other: Grid) -> bool:
    a, b = learnt.lonlat_bounds(), other.lonlat_bounds()
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
