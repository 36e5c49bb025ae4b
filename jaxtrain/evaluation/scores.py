"""Evaluate a run on one part of its data, or on all of other data: `EvaluationReport` and evaluation.json."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from numpy.typing import NDArray

from jaxtrain.data.arrays import Reader, put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.modality_reader import hide
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.splits import Part
from jaxtrain.data.training_data import EvaluationSet, TrainingData
from jaxtrain.data.windows import Windows
from jaxtrain.display import result_table, scores_text
from jaxtrain.evaluation.areas import estimate_areas
from jaxtrain.evaluation.gallery import Shown
from jaxtrain.evaluation.own_data import match_own, open_own
from jaxtrain.evaluation.report import OtherExamples, collect_examples, write_report
from jaxtrain.evaluation.tiles import Tile
from jaxtrain.learn.metrics import ConfusionMatrix, SeveralCounts, ValueErrors, counts_for
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import EvalStep, PredictStep, make_eval_step, make_predict_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.prepare import dates_left_out
from jaxtrain.runs.checkpoint import CheckpointStore, target_of
from jaxtrain.runs.evaluations import own_evaluation, read_evaluations, write_evaluation
from jaxtrain.runs.rundir import ModelCard, inference_program, load_card
from zarr_store.errors import InvalidInput, NothingFound, TerrashardError, UnknownName

__all__ = ["EvaluationReport", "evaluate", "restore_model", "score_windows", "scores_of",
           "select_data", "sum_windows"]  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationReport:
    """The scores of a model on one set of data; made by `evaluate`.

    Attributes:
        run: The run directory.
        split: The part of the evaluation: "train", "validation" or "test"; "all" of other data.
        step: The step of the checkpoint.
        data: Path of the cube or sample store; of several cubes all, separated by commas.
        samples: Number of windows or samples.
        seconds: Wall time.
        loss: Mean loss over what is labelled; None where nothing is.
        scores: All scores by name, as `to_dict` has them.
        warnings: Limits of the scores: overlapping ground, leaking splits, damaged checkpoints.
        leakage: Distance of the test data from the training data, if the split does not rule out leakage.
        unit: Name of what `samples` counts: "windows" of a cube, "images" of a sample store, or "pixels" of a scene.
        own_data: Whether these are the data of the run, not other data.

    Example:
        >>> report = evaluate("runs/zagreb", split="validation")
        >>> report.split, len(report.confusion_matrix)
        ('validation', 3)
    """

    run: str
    split: str
    step: int
    data: str
    samples: int
    seconds: float
    loss: float | None
    scores: Mapping[str, Any] = field(repr=False)
    warnings: tuple[str, ...] = ()
    leakage: Mapping[str, Any] | None = None
    unit: str = "windows"
    own_data: bool = True
    coverage: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict, repr=False)
    """By class name: `judged` pixels or samples, those that the split has (`labelled`), and those of `training`; None
    where the run or other data do not know them."""
    without: tuple[str, ...] = ()
    """Modalities that the network did not get."""
    seen: Mapping[str, float] = field(default_factory=dict, repr=False)
    """By modality: share of the windows' pixels that it observed and the network got; none of other networks."""

    @property
    def accuracy(self) -> float | None:
        """Share of labelled pixels or samples that are right, 0 to 1; None for values."""
        return cast(float | None, self.scores["accuracy"])

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 score over the classes, 0 to 1; None for values."""
        return cast(float | None, self.scores["macro_f1"])

    @property
    def miou(self) -> float | None:
        """Mean intersection over union over the classes, 0 to 1; None for values."""
        return cast(float | None, self.scores["miou"])

    @property
    def rmse(self) -> float | None:
        """Root of the mean squared error, in the unit of the values; None for classes."""
        return cast(float | None, self.scores.get("rmse"))

    @property
    def r2(self) -> float | None:
        """Share of the variance of the values that is explained; None for classes."""
        return cast(float | None, self.scores.get("r2"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the confusion matrix."""
        return tuple(self.scores["classes"])

    @property
    def per_class(self) -> Mapping[str, Mapping[str, float | int | None]]:
        """Precision, recall, f1, iou and support of each class, by name."""
        return cast(Mapping[str, Mapping[str, float | int | None]], self.scores["per_class"])

    @property
    def confusion_matrix(self) -> list[list[int]] | None:
        """Pixels or samples by true class (rows) and predicted class (columns); None if samples have several."""
        return cast(list[list[int]] | None, self.scores["confusion_matrix"])

    @property
    def pixels(self) -> int:
        """Labelled pixels or samples, which the scores count."""
        return int(self.scores["pixels"])

    @property
    def accuracy_errors(self) -> dict[str, Any] | None:
        """Overall, user's and producer's accuracies with standard errors, as if the pixels were independent.

        Classes weigh as they are predicted in these data. None for values, for samples of several classes and where
        nothing is labelled.
        """
        matrix = np.asarray(self.confusion_matrix or [[0]], np.int64)
        if self.scores.get("rmse") is not None or not matrix.sum():
            return None
        made = estimate_areas(matrix, matrix.sum(axis=0), self.classes).to_dict(unit="samples")
        keys = ("users_accuracy", "users_accuracy_se", "producers_accuracy", "producers_accuracy_se")
        return {
            "overall_accuracy": made["overall_accuracy"], "overall_accuracy_se": made["overall_accuracy_se"],
            "classes": {name: {key: row[key] for key in keys} for name, row in made["classes"].items()},
            "assumes": made["assumes"],
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as in RUN/evaluation.json."""
        leak = {} if self.leakage is None else {"leakage": self.leakage}
        return {
            **self.scores, "loss": self.loss, "samples": self.samples, "seconds": self.seconds, "split": self.split,
            "step": self.step, "cube": self.data, "unit": self.unit, "own_data": self.own_data,
            "warnings": list(self.warnings), **leak,
            "coverage": {name: dict(row) for name, row in self.coverage.items()},
            **({"modalities": dict(self.seen), "without": list(self.without)} if self.seen else {}),
            **({} if self.accuracy_errors is None else {"accuracy_errors": self.accuracy_errors}),
        }  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"<EvaluationReport {self.run}: {self.split}, step {self.step}, {self.samples} samples; "
            f"{scores_text(self._totals())}>"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the totals, then the F1 of each class."""
        return result_table(f"Evaluation of {self.run}", {
            "data": self.data, "split": self.split, "step": self.step, "samples": self.samples, **self._totals(),
            **{f"f1 of {name}": row["f1"] for name, row in self.per_class.items()},
            "warnings": "\n".join(self.warnings),
        })  # fmt: skip

    def _totals(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("accuracy", "macro_f1", "miou", "rmse", "r2")}


def score_windows(
    program: Program,
    step: EvalStep,
    state: TrainState,
    reader: Reader,
    windows: Windows,
    names: tuple[str, ...],
    *,
    on_batch: Progress | None = None,
) -> tuple[ConfusionMatrix | SeveralCounts | ValueErrors, float]:
    """Count the predictions for all windows or samples, each once, and average the loss.

    Args:
        program: Gives mesh and batch size.
        step: Result of `make_eval_step(program)`.
        state: The model.
        reader: Reads windows with labels.
        windows: Windows or samples of the evaluation.
        names: Class names.
        on_batch: Called with (batches done, batches in all).
    """
    return scores_of(program, sum_windows(program, step, state, reader, windows, on_batch=on_batch), names)


def scores_of(
    program: Program, sums: Mapping[str, NDArray[np.float64]], names: tuple[str, ...]
) -> tuple[ConfusionMatrix | SeveralCounts | ValueErrors, float]:
    """Return counts and mean loss of the sums of an evaluation; the loss is nan where nothing was labelled."""
    task = program.objective.task
    counts = counts_for(names, several=task.several, values=task.values)
    if not sums:
        return counts, math.nan
    counts.add_sums({
        name: np.rint(array).astype(np.int64) if name in _COUNTS else array
        for name, array in sums.items()
        if name != "seen"  # says what modalities were there, not how good the answers are
    })  # fmt: skip
    labelled = float(sums["labelled"])
    return counts, float(sums["loss_sum"]) / labelled if labelled else math.nan


_COUNTS = ("confusion", "counts")
"""Sums of an evaluation that are whole numbers."""


def sum_windows(
    program: Program,
    step: EvalStep,
    state: TrainState,
    reader: Reader,
    windows: Windows,
    *,
    size: int | None = None,
    on_batch: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the sums of an evaluation of windows or samples, by name; nothing where there are none.

    Args:
        program: Gives mesh and batch size.
        step: Result of `make_eval_step(program)`.
        state: The model.
        reader: Reads windows with labels.
        windows: Windows or samples of the evaluation.
        size: Windows of a batch; None for those of the run, rounded up to the devices of the axis `data`.
        on_batch: Called with (batches done, batches in all).
    """
    run, sharding = program.config.run, batch_sharding(program.mesh)
    axis = program.mesh.shape["data"]
    size = size or -(-run.batch_size // axis) * axis
    added: dict[str, NDArray[np.float64]] = {}

    def count(sums: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(sums).items():
            added[name] = added.get(name, np.float64(0)) + np.asarray(value, np.float64)

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
    return added


def restore_model(
    run: Path, card: ModelCard, program: Program | None = None
) -> tuple[Program, TrainState, int, tuple[str, ...]]:
    """Restore program, state and step of a run's best or newest undamaged checkpoint; list damaged newer ones.

    The best is that of `run.monitor`, where one is named.

    Args:
        run: The run directory.
        card: Its model.
        program: The network on its devices; None for those of the run, if they are here.

    Raises:
        NothingFound: The run has no checkpoint yet.
    """
    program = program or inference_program(card)
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
    run: str | PathLike[str],
    *,
    data: str | Path | None = None,
    split: Part | str = "test",
    without: Sequence[str] = (),
    allow_mismatch: bool = False,
    on_batch: Progress | None = None,
) -> EvaluationReport:
    """Evaluate the best or newest checkpoint of a run on one part of its data, or on all of other data.

    The scores of the run's own data are also written to RUN/evaluation.json; those of another part than the test, and
    of other data, to a file of their own beside it. RUN/report.html is made again and shows all of them.

    Args:
        run: The run directory.
        data: Another cube with the same bands and label layer, or another sample store with the same bands and classes
            (matched by name); all of it is chosen. Data with the digest of the run's own are the run's own, wherever
            they lie. None: the run's own, which are looked for near the run if they were moved; where those are in a
            bucket they must be named, with commas between several.
        split: "test", "validation" or "train"; of the run's own data only.
        without: Modalities that the network does not get, as if they were missing everywhere; the same pixels are
            scored as with them. Such scores stand in a file of their own.
        allow_mismatch: Use other data whose pixels or images have another size, or whose numbers have a unit that
            cannot be converted, and warn.
        on_batch: Called with (batches done, batches in all).

    Returns:
        The scores, the confusion matrix, the scores of each class, and warnings about what they mean.

    Raises:
        InvalidInput: `run` is not a run, or the data do not fit the model.
        NothingFound: There is no checkpoint, or nothing to evaluate on.
        UnknownName: `split` is none of the three.

    Example:
        >>> report = evaluate("runs/zagreb")
        >>> 0 <= report.accuracy <= 1, report.per_class["water"]["support"] > 0
        (True, True)
    """
    began = time.monotonic()
    run = Path(run)
    if split not in get_args(Part):
        raise UnknownName.of("split", split, get_args(Part))
    card = load_card(run)
    opened = _open(card, run, data)
    # the split of the run holds for its own data, whatever their path
    own = card if data is None or str(data).split(",") == _urls(card) else match_own(card, opened)
    part = None if own is None else cast(Part, split)
    chosen = select_data(own or card, opened, part=part, name=data, without=without, insist=allow_mismatch)
    chosen = replace(chosen, reader=hide(chosen.reader, without))
    program, state, step, passed_over = restore_model(run, card)
    sums = sum_windows(
        program, make_eval_step(program, turned=card.config.model.turns), state, chosen.reader, chosen.windows,
        on_batch=on_batch,
    )  # fmt: skip
    counts, loss = scores_of(program, sums, card.classes.names)
    scores = counts.to_dict()
    coverage = _coverage(card, scores["per_class"], part)
    result = EvaluationReport(
        run=str(run),
        scores=scores,
        loss=loss if math.isfinite(loss) else None,
        samples=len(chosen.windows),
        seconds=round(time.monotonic() - began, 3),
        split="all" if own is None else split,
        step=step,
        data=chosen.url,
        warnings=(
            *chosen.warnings,
            *_without_score(coverage, split if own is not None else chosen.url),
            *(dates_left_out(card) if own is not None else ()),
            *passed_over,
        ),
        leakage=None if own is None else card.statistics.get("leakage"),
        unit=card.unit,
        own_data=own is card,
        coverage=coverage,
        without=tuple(without),
        seen=_seen(card, sums),
    )
    write_evaluation(run, result.to_dict(), own=result.own_data)
    predict = make_predict_step(program)
    examples = collect_examples(program, predict, state, chosen.reader, chosen.windows, card.classes.names)
    evaluations = read_evaluations(run)
    main = own_evaluation(evaluations)
    if result.own_data and not without and main is not None and main["split"] == split:
        write_report(run, card, examples=examples, evaluation=main, evaluations=evaluations)
        return result
    # the run's own scores and pictures stay in its report, those of other data and parts follow them
    ours = _own_examples(card, run, program, predict, state, "test" if main is None else main["split"])
    name = f"part “{split}” of {chosen.url}" if result.own_data else chosen.url
    name += f" without {', '.join(without)}" if without else ""
    write_report(run, card, examples=ours, evaluation=main, evaluations=evaluations,
                 other=OtherExamples(name, examples, chosen.dates))  # fmt: skip
    return result


def _seen(card: ModelCard, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Return the share of the pixels of labelled windows that each modality observed."""
    if "seen" not in sums:
        return {}
    *seen, windows = sums["seen"].tolist()
    shares = [round(share / max(windows, 1), 4) for share in seen]
    return dict(zip((one.name for one in card.modalities), shares, strict=True))


def _coverage(
    card: ModelCard, per_class: Mapping[str, Mapping[str, Any]], part: Part | None
) -> dict[str, dict[str, int | None]]:
    """Return how many pixels or samples of each class were judged, and how many there are in the split and in training.

    Those of the split are of all pixels that the network sees; a card of release 0.1.0 does not have them.
    """
    held_out = card.statistics.get("held_out")
    training = card.statistics["class_pixels"] if held_out is not None else {}
    of_part = {} if part is None else training if part == "train" else (held_out or {}).get(part, {})
    return {
        name: {"judged": int(row["support"]), "labelled": of_part.get(name), "training": training.get(name)}
        for name, row in per_class.items()
    }


def _without_score(coverage: Mapping[str, Mapping[str, int | None]], where: str) -> list[str]:
    """Return a line for each class that is not judged, or judged and never learned."""
    lines = []
    absent = [name for name, row in coverage.items() if not row["judged"]]
    if absent:
        lines.append(f"nothing in {where} is labelled {', '.join(absent)}: no score says how well that is learned")
    lines += [
        f"class {name!r} has no label in training, so it cannot be predicted; {row['judged']:,} are judged in {where}"
        for name, row in coverage.items()
        if row["judged"] and row["training"] == 0
    ]
    return lines


def _open(card: ModelCard, run: Path, data: str | Path | None) -> TrainingData:
    """Open the data to evaluate on: those that were given, or the run's own, which must be given if in a bucket.

    A run may come from somebody else, so its card alone never makes this program contact a server or use a key.

    Raises:
        InvalidInput: The training data are in a bucket, and `data` was not given.
    """
    urls = _urls(card)
    if data is not None:
        several = str(data).split(",")
        return open_training_data(data if len(several) == 1 or Path(data).exists() else several)
    if any("://" in url for url in urls):
        raise InvalidInput(
            f"the training data of the run are {', '.join(urls)}. A run may come from somebody else, so a URL in it is "
            f"never opened by itself; if you trust that place, name it: --data {','.join(urls)}"
        )
    return open_own(card, run)


def _urls(card: ModelCard) -> list[str]:
    return [ground.cube for ground in card.grounds] or [card.cube]


def _own_examples(
    card: ModelCard, run: Path, program: Program, predict: PredictStep, state: TrainState, part: Part
) -> Sequence[Tile] | Sequence[Shown]:
    """Collect the examples of the run's own data; none where those cannot be read or have no such part."""
    try:
        chosen = select_data(card, _open(card, run, None), part=part)
    except (TerrashardError, OSError):
        return []
    return collect_examples(program, predict, state, chosen.reader, chosen.windows, card.classes.names)


def select_data(
    card: ModelCard,
    data: TrainingData,
    *,
    part: Part | None,
    name: str | Path | None = None,
    without: Sequence[str] = (),
    insist: bool = False,
) -> EvaluationSet:
    """Return the data of an evaluation: a part of the run's own data, or all of other data.

    Args:
        card: Card of the run.
        data: The open data.
        part: A part of the run's own data; None for all of other data.
        name: Name of the data in the message, as the user gave it.
        without: Modalities that the network does not get; other data may lack them.
        insist: Use pixels of another size and numbers that cannot be converted as they are, and warn.

    Raises:
        InvalidInput: The model was trained on another kind of data.
        NothingFound: There is nothing to evaluate on.
    """
    learned = "sample store" if card.grid is None else "cube"
    if data.kind != learned:
        raise InvalidInput(
            f"{name or data.url} is a {data.kind}, but the run was trained on a {learned}; give a {learned}"
        )
    if part is None:
        return data.select_all(card, without=without, insist=insist)
    return data.select_part(card, part)
