"""Judging a model on ground that it has never seen, on all dates: run → evaluation.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import jax

from jaxtrain.checkpoint import CheckpointStore, target_of
from jaxtrain.data.batches import BatchStream, WindowReader, put_batch
from jaxtrain.data.splits import Part, Split
from jaxtrain.data.windows import Windows, plan_windows
from jaxtrain.metrics import ConfusionMatrix
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.report import collect_examples, write_report
from jaxtrain.rundir import ModelCard, cube_digest, inference_program, load_card
from jaxtrain.state import Program, TrainState
from jaxtrain.step import EvalStep, make_eval_step, make_predict_step
from zarr_store.backends import FolderStore
from zarr_store.errors import InvalidInput, NothingFound, UnknownName
from zarr_store.read import Cube, open_cube

__all__ = ["EVALUATION", "evaluate", "judge", "restore_model"]

EVALUATION = "evaluation.json"
Progress = Callable[[int, int], None]


def judge(
    program: Program,
    step: EvalStep,
    state: TrainState,
    reader: WindowReader,
    windows: Windows,
    names: tuple[str, ...],
    *,
    on_batch: Progress | None = None,
) -> tuple[ConfusionMatrix, float]:
    """Confusion matrix and mean loss over all windows, each once.

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
    matrix, loss, labelled = ConfusionMatrix(names), 0.0, 0

    def count(sums: dict[str, jax.Array]) -> None:
        nonlocal loss, labelled
        matrix.add(jax.device_get(sums["confusion"]))
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
    """Program, state and step of the run's newest undamaged checkpoint, and a line for each damaged newer one.

    Raises:
        NothingFound: The run has no checkpoint yet.
    """
    program = inference_program(card)
    restored = CheckpointStore(run / "checkpoints").restore(target_of(program))
    if restored is None:
        raise NothingFound(f"{run} has no checkpoint yet; let `terrashard train` reach its first one")
    return program, restored.state, restored.step, restored.passed_over


def evaluate(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: Part | str = "test",
    on_batch: Progress | None = None,
) -> dict[str, Any]:
    """Judge the newest checkpoint of a run on one part of its cube, or on a whole other cube.

    Args:
        run: The run directory.
        data: Another cube with the same bands and label layer; all its windows are judged. None: the run's own cube.
        split: "test", "validation" or "train"; of the run's own cube only.
        on_batch: Called with (batches done, batches in all).

    Returns:
        accuracy, macro_f1, miou, kappa, loss, per_class, confusion_matrix (rows are truth), classes, samples (windows),
        pixels (labelled ones, that scores count), seconds, split, step, cube, warnings. Also written to
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
    cube, windows, reader, warnings = _open_data(card, data, cast(Part, split))
    program, state, step, passed_over = restore_model(run, card)
    matrix, loss = judge(
        program, make_eval_step(program), state, reader, windows, card.classes.names, on_batch=on_batch
    )
    result = {
        **matrix.to_dict(),
        "loss": loss if math.isfinite(loss) else None,
        "samples": len(windows),
        "seconds": round(time.monotonic() - began, 3),
        "split": split if data is None else "all",
        "step": step,
        "cube": cube.url,
        "warnings": [*warnings, *passed_over],
    }
    FolderStore(run.absolute()).write(EVALUATION, json.dumps(result, indent=1, ensure_ascii=False).encode())
    examples = collect_examples(program, make_predict_step(program), state, reader, windows)
    write_report(run, card, examples=examples, evaluation=result)
    return result


def _open_data(card: ModelCard, data: str | Path | None, split: Part) -> tuple[Cube, Windows, WindowReader, list[str]]:
    config = card.config.data
    own = data is None
    cube = open_cube(card.cube if data is None else data)
    spec = cube.spec(config.collection)
    warnings = []
    if own and cube_digest(cube, config.collection) != card.cube_digest:
        warnings.append(f"{cube.url} has changed since the run began; parts of the ground are those of the run")
    if own and spec.grid != card.grid:
        raise InvalidInput(f"{cube.url} has grid {spec.grid}, the run learnt on {card.grid}; pass it as other data")
    if not own and spec.grid.resolution != card.grid.resolution:
        warnings.append(f"pixels of {cube.url} are {spec.grid.resolution}, the model learnt {card.grid.resolution}")
    if not own and _same_ground(card, cube, config.collection):
        warnings.append(f"{cube.url} overlaps the ground that the model was trained on: its scores are too good")
    plan = plan_windows(config, spec, cube.index(config.collection), card.classes,
                        split=card.split if own else Split.whole(card.split.block, spec.shape[1:]))  # fmt: skip
    windows = plan.parts[split if own else "test"]
    if not len(windows):
        raise NothingFound(f"{cube.url} has no window of part {split} with enough to learn from; see data.min_labelled")
    reader = WindowReader.of(cube, config.model_copy(update={"bands": card.bands}), card.classes)
    return cube, windows, reader, warnings


def _same_ground(card: ModelCard, cube: Cube, collection: str) -> bool:
    a, b = card.grid.lonlat_bounds(), cube.spec(collection).grid.lonlat_bounds()
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
