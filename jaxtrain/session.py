"""`TrainingSession` is one call of `train` during its steps: it settles the numbers of a step, validates, and saves.

The loop itself is in `loop.py`. What changes from step to step is here: the state, the numbers of the last step, the
last validation, and whether the run is to stop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from numpy.typing import NDArray

from jaxtrain.config import RunConfig, TrainConfig
from jaxtrain.data.arrays import Rows
from jaxtrain.data.task import Task
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.data.windows import Windows
from jaxtrain.evaluation.scores import score_windows, scores_of, sum_windows
from jaxtrain.hetero.membership import Assignment, Dropped, GroupError
from jaxtrain.hetero.replica import Replica, Work
from jaxtrain.learn.metrics import ConfusionMatrix, SeveralCounts, ValueErrors
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import EvalStep, TrainStep, batch_shardings
from jaxtrain.parallel.links import placed_shape, shape_of
from jaxtrain.parallel.processes import Agreement
from jaxtrain.runs.best import Best
from jaxtrain.runs.checkpoint import CheckpointStore, target_of
from jaxtrain.runs.clock import Clock
from jaxtrain.runs.events import Teller
from jaxtrain.runs.incidents import Incidents
from jaxtrain.runs.rundir import ModelCard
from jaxtrain.runs.watchdog import Watchdog
from jaxtrain.writer import RunWriter
from zarr_store.errors import IntegrityError, InvalidInput, Preempted, TerrashardError

__all__ = [
    "Dispatched",
    "Resumed",
    "TrainingSession",
    "check_monitor",
    "newest_step",
    "rehearse",
    "resume_run",
    "show_score",
]

_MONITORED = get_args(RunConfig.model_fields["monitor"].annotation)
"""Scores that `run.monitor` may name."""


@dataclass(frozen=True)
class Resumed:
    """The point at which a run continues: checkpoints, best validation so far, state, and steps done."""

    store: CheckpointStore
    best: Best
    state: TrainState
    step: int


def resume_run(
    config: TrainConfig, out: Path, program: Program, incidents: Incidents, tell: Teller, replica: Replica | None = None
) -> Resumed:
    """Restore the newest checkpoint that is whole, whatever mesh it was made on; or begin with a new state.

    A replica takes the state that another one sent, if it has received one.
    """
    run = config.run
    store = CheckpointStore(out / "checkpoints", keep=run.keep_checkpoints)
    if replica is None or replica.leads:
        store.clear_partial()
    if replica is not None and replica.received is not None:
        state, extra = replica.received
        replica.received = None
        best = Best(run, extra["best"])
        incidents.begin(extra["incidents"])
        return Resumed(store, best, state, replica.first)
    known = None if replica is None else replica.first
    restored = None if known == 0 else store.restore(target_of(program), step=known)
    extra = {} if restored is None else restored.extra
    best = Best(run, extra.get("best"))
    store.protected = best.step
    incidents.begin(extra.get("incidents", {}))
    if restored is None:
        return Resumed(store, best, program.init(jax.random.key(np.uint32(run.seed % (1 << 32)))), 0)
    for line in restored.passed_over:
        tell("warning", restored.step, line)
    tell("resume", restored.step, f"continuing {out} from step {restored.step} of {run.steps}")
    return Resumed(store, best, program.of_saved(restored.state), restored.step)


def newest_step(out: Path, tell: Teller) -> int | None:
    """Return the step of the newest checkpoint that is whole, 0 where there is none; None where it cannot be read now.

    A replica that comes to a running group may look while another one writes; it needs none, as it gets the state.

    Raises:
        IntegrityError: All checkpoints are damaged.
    """
    try:
        step, passed_over = CheckpointStore(out / "checkpoints").newest()
    except OSError:
        return None
    for line in passed_over:
        tell("warning", step or 0, line)
    return step or 0


def check_monitor(config: TrainConfig, task: Task, windows: Mapping[str, int]) -> None:
    """Refuse, before the run begins, a `run.monitor` that no validation of this run can have.

    Args:
        config: The run.
        task: Task of the network.
        windows: Number of windows or samples of each part.

    Raises:
        InvalidInput: The task has no such score, or nothing is validated.
    """
    monitor = config.run.monitor
    if monitor == "none":
        return
    known = ("loss", *(name for name in _score_names(task.values) if name in _MONITORED))
    if monitor not in known:
        kind = "values" if task.values else "classes"
        raise InvalidInput(f"run.monitor = {monitor!r}, but {kind} are learned: choose one of {', '.join(known)}")
    if not windows["validation"]:
        raise InvalidInput(
            f"run.monitor = {monitor!r} is a score of the validation, but the split keeps nothing for it: raise "
            "data.split.validation, or use run.monitor = 'none'"
        )


def rehearse(program: Program, train_step: TrainStep, eval_step: EvalStep, ready: TrainingSet) -> None:
    """Trace the steps of a run with the shapes of its batches; nothing is computed, and nothing was written yet.

    Raises:
        InvalidInput: The network or the augmentation cannot take images of this size.
    """
    if program.layout is not None:  # the cuts of a pipeline were traced when they were made
        return
    rows = ready.plan.parts["train"].rows[:1]
    try:
        sample = ready.reader.read(rows)
    except IntegrityError:  # a damaged chunk is met again in training, where the run's policy holds
        return
    size, lies = program.config.run.batch_size, batch_shardings(program)
    batch = {
        name: placed_shape(shape_of((size, *array.shape[1:]), array.dtype), lies.get(name))
        for name, array in sample.items()
    }
    # shapes that lie where the arrays will: then the steps that are compiled later are not traced again
    state = jax.tree.map(placed_shape, program.shapes, program.shardings)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(lambda state, batch, key: train_step(state, batch, key=key), state, batch, key)
    jax.eval_shape(eval_step, state, batch)


@dataclass(frozen=True)
class Dispatched:
    """A step that was sent to the devices and whose numbers are not read yet."""

    step: int
    rows: Rows
    metrics: dict[str, jax.Array]
    wish: Any
    """From `Agreement.ask`: whether a process wishes to stop."""
    work: Work | None = None
    """Work of each replica, in a run of unequal replicas."""


@dataclass(kw_only=True)
class TrainingSession:
    """One call of `train` during its steps.

    Attributes:
        config: The run.
        out: The run directory.
        card: Model card of the run.
        ready: Training data of the run.
        program: The network on the mesh.
        eval_step: Result of `make_eval_step(program)`.
        store: Checkpoints of the run.
        best: Best validation so far.
        incidents: Faults that did not end it.
        tell: Reports its progress.
        clock: Rate of this call.
        agreement: Whether any process wishes to stop.
        writer: Writes for the run, where this process is the first, or the replica that leads.
        watchdog: Notices a step that hangs.
        reached: Steps done.
        last: Metrics of the last finite step of this call.
        validation: The last validation of this call.
        stopping: Whether the run ends after this step, to be continued later.
        replica: This process in a group of unequal replicas.
        work: What each replica did in the last step.
    """

    config: TrainConfig
    out: Path
    card: ModelCard
    ready: TrainingSet
    program: Program
    eval_step: EvalStep
    store: CheckpointStore
    best: Best
    incidents: Incidents
    tell: Teller
    clock: Clock
    agreement: Agreement
    writer: RunWriter
    watchdog: Watchdog
    reached: int
    last: dict[str, float] = field(default_factory=dict)
    validation: dict[str, Any] | None = None
    stopping: bool = False
    replica: Replica | None = None
    work: Work | None = None
    _done: float = 0.0
    """Windows of the steps whose speed is known."""
    _possible: float = 0.0
    """Windows that the replicas would have computed in the same time without waiting."""

    @property
    def efficiency(self) -> float | None:
        """Rate of this call divided by the sum of the rates at which the replicas computed; None if not known."""
        return round(self._done / self._possible, 4) if self._possible else None

    def settle(self, done: Dispatched) -> None:
        """Read the numbers of a step: count what went wrong, write them to the history, and report them.

        Raises:
            InvalidInput: Loss or gradient are not finite, and `run.on_nan` does not allow it.
        """
        run, step = self.config.run, done.step
        numbers = {name: float(value) for name, value in done.metrics.items() if name != "finite"}
        if done.work is None:
            self.stopping = self.agreement.answer(done.wish)
        seconds, waited = self.clock.tick()
        finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])
        if finite:
            self.last = numbers
        else:
            self.incidents.not_finite(step, done.rows, numbers, self.store.steps())
        if not numbers["labelled"]:
            self.incidents.no_labels(step, done.rows)
        shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line: dict[str, Any] = {**shown, "seconds": seconds, "input_wait_s": waited}
        if done.work is not None:
            line |= self._see(step, done.work, seconds)
        self.writer.write("train", step, line)
        if finite and (step % run.log_every == 0 or step == run.steps):
            self._tell_of_step(step)

    def train_step(self, state: TrainState, assignment: Assignment, rows: Rows, *, key: jax.Array) -> TrainState:
        """Take one step as a replica, settle its numbers, and compare the new state with the others now and then."""
        assert self.replica is not None
        step = assignment.step + 1
        state, metrics, work = self.replica.train_step(state, assignment, key=key)
        self.clock.waited(self.replica.input_wait)
        self.writer.follow(assignment.step, assignment.leader)
        self.reached = step
        self.settle(Dispatched(step, rows, metrics, False, work))
        self.stopping = work.asked
        state, line = self.replica.compare(state, step)
        if line is not None and self.writer.leads:
            self.tell("warning", step, line)
        return state

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Run a block; where the group of replicas ends in it, one of those that are left saves the last state.

        A replica that the group has dropped saves nothing: the others go on, and write.
        """
        try:
            yield
        except Dropped:
            raise
        except GroupError:
            with contextlib.suppress(TerrashardError):  # the end of the group is what is reported
                self._save_what_is_left()
            raise

    def _save_what_is_left(self) -> None:
        """Save the newest state, if this replica gets the lock of the run.

        Raises:
            Locked: Another replica does.
        """
        state = None if self.replica is None else self.replica.state
        if state is None or self.reached in self.store.steps():
            return
        if not self.writer.leads:
            self.writer.lead(self.reached, inherited=True, patience_s=0.0)
        self.store.wait()
        self.store.begin(self.reached, self.program.to_save(state), self.position(self.reached))
        self.store.wait()

    def shared_out(self) -> dict[str, Any]:
        """Return the results that only a run of unequal replicas has."""
        if self.replica is None:
            return {}
        shares = {} if self.work is None else dict(self.work.shares)
        return {
            "shares": shares, "efficiency": self.efficiency, "recompiles": self.replica.recompiles(),
            "leads": self.writer.leads,
        }  # fmt: skip

    def _see(self, step: int, work: Work, seconds: float | None) -> dict[str, Any]:
        """Record the work of all replicas in a step; return it for the history."""
        self.work = work
        self.writer.record(step, work)
        rates = sum(work.rates.values())
        if seconds and rates:
            self._done += self.config.run.batch_size
            self._possible += seconds * rates
        return {**work.to_log(), "efficiency": self.efficiency}

    def _tell_of_step(self, step: int) -> None:
        rate, score = self.clock.rate(), self.program.objective.score
        speed = f", {rate:.0f} {self.card.unit}/s" if rate else ""
        self.tell(
            "step",
            step,
            f"step {step}/{self.config.run.steps}: loss {self.last['loss']:.4f}, {score} {self.last[score]:.3f}{speed}"
            f"{self._shown_shares()}",
            **self.last,
            samples_per_second=rate,
            input_wait=self.clock.input_wait(),
        )

    def _shown_shares(self) -> str:
        if self.work is None:
            return ""
        shares = " ".join(f"{name}:{share}" for name, share in self.work.shares.items())
        known = "" if self.efficiency is None else f", {self.efficiency:.0%} of the replicas' speed"
        return f", shares {shares}{known}"

    def settle_before_use(self, done: Dispatched) -> None:
        """Settle a step whose state is validated or saved next, and keep a request to stop that is already known."""
        known = self.stopping
        self.settle(done)
        self.stopping = known or self.stopping

    def validate(self, step: int, state: TrainState) -> bool:
        """Evaluate the state on the validation part; return whether its checkpoint must be saved at once."""
        windows = self.ready.plan.parts["validation"]
        self.clock.pause()
        self.watchdog.beat(f"validation at step {step}")
        matrix, loss = self._score(step, state, windows)
        self.validation = {**matrix.to_dict(), "split": "validation", "step": step, "samples": len(windows)}
        scores = _scores(self.validation, loss)
        self.writer.follow(step)
        self.writer.write("validation", step, scores)
        improved = self.best.see(step, scores)
        shown = ", ".join(f"{name} {show_score(scores[name])}" for name in scores if name != "pixels")
        best = " (best)" if improved else ""
        self.tell("validation", step, f"validation at step {step}: {shown}{best}", **scores)
        if improved:
            self.store.protected = step
        # the best is saved at once; so is what a run ends with, for the next call to find it ended
        return improved or self.best.ended

    def _score(
        self, step: int, state: TrainState, windows: Windows
    ) -> tuple[ConfusionMatrix | SeveralCounts | ValueErrors, float]:
        """Count the predictions for the validation part; of unequal replicas, each takes its share of the windows."""
        replica, names = self.replica, self.card.classes.names

        def beat(done: int, _: int) -> None:
            self.watchdog.beat(f"validation batch {done}")

        if replica is None:
            return score_windows(self.program, self.eval_step, state, self.ready.reader, windows, names, on_batch=beat)
        size = self.config.chunk

        def own_part() -> dict[str, NDArray[np.float64]]:
            first, last = replica.share_of(-(-len(windows) // size))
            part = Windows(windows.patch, windows.rows[first * size : last * size])
            reader = self.ready.reader
            return sum_windows(self.program, self.eval_step, state, reader, part, size=size, on_batch=beat)

        return scores_of(self.program, replica.add_up(f"validation at step {step}", own_part), names)

    def save(self, step: int, state: TrainState) -> None:
        """Begin a checkpoint, written in the background while training continues; of replicas, the leader's."""
        self.writer.follow(step)
        if self.replica is not None and not self.writer.leads:
            return
        self.clock.pause()
        self.watchdog.beat(f"checkpoint at step {step}")
        self.store.begin(step, self.program.to_save(state), self.position(step))
        self.tell("checkpoint", step, f"checkpoint at step {step}")

    def save_last(self, state: TrainState) -> None:
        """Save the state with which the run ends, unless it is saved, and wait until it is on disk."""
        self.writer.follow(self.reached)
        self.store.wait()
        if self.reached not in self.store.steps():
            self.save(self.reached, state)
            self.store.wait()

    def position(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state: the next sample of the global order, and the counts."""
        return {
            "next_sample": step * self.config.run.batch_size,
            "seed": self.config.run.seed,
            "train_windows": self.card.windows["train"],
            "cube_digest": self.card.cube_digest,
            "config": self.config.model_dump(mode="json"),
            "incidents": self.incidents.to_dict(),
            "best": self.best.to_dict(),
        }

    def leave(self, step: int) -> None:
        """Wait for the last checkpoint, then end the call.

        Raises:
            Preempted: Always; the same call continues the run.
        """
        self.store.wait()
        if self.replica is not None:
            others = [name for name in self.replica.member.members if name != self.replica.name]
            self.replica.leave()
            if others and not (self.work is not None and self.work.stop):
                raise Preempted(
                    f"stopped: {self.replica.name} has left {self.out} after step {step} of {self.config.run.steps}; "
                    f"going on without it: {', '.join(others)}"
                )
        raise Preempted(
            f"stopped: {self.out} is saved at step {step} of {self.config.run.steps}; the same command continues"
        )


def _score_names(values: bool) -> tuple[str, ...]:
    return ("r2", "rmse", "mae", "bias") if values else ("accuracy", "macro_f1", "miou")


def _scores(result: dict[str, Any], loss: float) -> dict[str, float | None]:
    names = _score_names("rmse" in result)
    scores: dict[str, float | None] = {"loss": loss if math.isfinite(loss) else None}
    return scores | {name: result[name] for name in names} | {"pixels": result["pixels"]}


def show_score(value: float | None) -> str:
    """Return a score in four digits, or "none".

    >>> show_score(0.5), show_score(None)
    ('0.5000', 'none')
    """
    return "none" if value is None else f"{value:.4f}"
