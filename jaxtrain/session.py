"""`TrainingSession` is one call of `train` while it steps: it settles the numbers of a step, validates, and saves.

The loop itself is in `loop.py`. What changes from step to step is here: the state, the numbers of the last step, the
last validation, and whether the run is to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Rows
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.evaluation.scores import score_windows
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import EvalStep
from jaxtrain.parallel.processes import Agreement
from jaxtrain.runs.best import Best
from jaxtrain.runs.checkpoint import CheckpointStore, target_of
from jaxtrain.runs.clock import Clock
from jaxtrain.runs.events import Teller
from jaxtrain.runs.incidents import Incidents
from jaxtrain.runs.log import RunLog
from jaxtrain.runs.rundir import ModelCard
from jaxtrain.runs.watchdog import Watchdog
from zarr_store.errors import Preempted

__all__ = ["Dispatched", "Resumed", "TrainingSession", "resume_run", "show_score"]


@dataclass(frozen=True)
class Resumed:
    """The point at which a run continues: checkpoints, best validation so far, state, and steps done."""

    store: CheckpointStore
    best: Best
    state: TrainState
    step: int


def resume_run(config: TrainConfig, out: Path, program: Program, incidents: Incidents, tell: Teller) -> Resumed:
    """Restore the newest checkpoint that is whole, whatever mesh it was made on; or begin with a new state."""
    run = config.run
    store = CheckpointStore(out / "checkpoints", keep=run.keep_checkpoints)
    store.clear_partial()
    restored = store.restore(target_of(program))
    extra = {} if restored is None else restored.extra
    best = Best(run, extra.get("best"))
    store.protected = best.step
    incidents.begin(extra.get("incidents", {}))
    if restored is None:
        return Resumed(store, best, program.init(jax.random.key(run.seed)), 0)
    for line in restored.passed_over:
        tell("warning", restored.step, line)
    tell("resume", restored.step, f"continuing {out} from step {restored.step} of {run.steps}")
    return Resumed(store, best, program.of_saved(restored.state), restored.step)


@dataclass(frozen=True)
class Dispatched:
    """A step that was sent to the devices and whose numbers are not read yet."""

    step: int
    rows: Rows
    metrics: dict[str, jax.Array]
    wish: Any
    """From `Agreement.ask`: whether a process wishes to stop."""


@dataclass(kw_only=True)
class TrainingSession:
    """One call of `train` while it steps.

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
        log: History of the run; None in all processes but the first.
        watchdog: Notices a step that hangs.
        reached: Steps done.
        last: Metrics of the last finite step of this call.
        judged: The last validation of this call.
        stopping: Whether the run ends after this step, to be continued later.
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
    log: RunLog | None
    watchdog: Watchdog
    reached: int
    last: dict[str, float] = field(default_factory=dict)
    judged: dict[str, Any] | None = None
    stopping: bool = False

    def settle(self, done: Dispatched) -> None:
        """Read the numbers of a step: count what went wrong, write them to the history, and report them.

        Raises:
            InvalidInput: Loss or gradient are not finite, and `run.on_nan` does not allow it.
        """
        run, step = self.config.run, done.step
        numbers = {name: float(value) for name, value in done.metrics.items() if name != "finite"}
        self.stopping = self.agreement.answer(done.wish)
        seconds, waited = self.clock.tick()
        finite = math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])
        if finite:
            self.last = numbers
        else:
            self.incidents.not_finite(step, done.rows, numbers, self.store.steps())
        if not numbers["labelled"]:
            self.incidents.no_labels(step, done.rows)
        if self.log:
            shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            self.log.write("train", step, {**shown, "seconds": seconds, "input_wait_s": waited})
        if finite and (step % run.log_every == 0 or step == run.steps):
            self._tell_of_step(step)

    def _tell_of_step(self, step: int) -> None:
        rate, score = self.clock.rate(), self.program.objective.score
        speed = f", {rate:.0f} windows/s" if rate else ""
        self.tell(
            "step",
            step,
            f"step {step}/{self.config.run.steps}: loss {self.last['loss']:.4f}, {score} {self.last[score]:.3f}{speed}",
            **self.last,
            samples_per_second=rate,
            input_wait=self.clock.input_wait(),
        )

    def settle_before_use(self, done: Dispatched) -> None:
        """Settle a step whose state is validated or saved next; a wish to stop that is already known stays."""
        known = self.stopping
        self.settle(done)
        self.stopping = known or self.stopping

    def validate(self, step: int, state: TrainState) -> bool:
        """Evaluate the state on the validation part; return whether its checkpoint must be saved at once."""
        windows = self.ready.plan.parts["validation"]
        self.clock.pause()
        self.watchdog.beat(f"validation at step {step}")
        matrix, loss = score_windows(
            self.program, self.eval_step, state, self.ready.reader, windows, self.card.classes.names,
            on_batch=lambda done, _: self.watchdog.beat(f"validation batch {done}"),
        )  # fmt: skip
        self.validation = {**matrix.to_dict(), "split": "validation", "step": step, "samples": len(windows)}
        scores = _scores(self.validation, loss)
        if self.log:
            self.log.write("validation", step, scores)
        improved = self.best.see(step, scores)
        shown = ", ".join(f"{name} {show_score(scores[name])}" for name in scores if name != "pixels")
        best = " (best)" if improved else ""
        self.tell("validation", step, f"validation at step {step}: {shown}{best}", **scores)
        if improved:
            self.store.protected = step
        # the best is saved at once; so is what a run ends with, for the next call to find it ended
        return improved or self.best.ended

    def save(self, step: int, state: TrainState) -> None:
        """Begin a checkpoint; it is written in the background while training continues."""
        self.clock.pause()
        self.watchdog.beat(f"checkpoint at step {step}")
        self.store.begin(step, self.program.to_save(state), self._position(step))
        self.tell("checkpoint", step, f"checkpoint at step {step}")

    def _position(self, step: int) -> dict[str, Any]:
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
        raise Preempted(
            f"stopped: {self.out} is saved at step {step} of {self.config.run.steps}; the same command continues"
        )


def _scores(result: dict[str, Any], loss: float) -> dict[str, float | None]:
    names = ("r2", "rmse", "mae", "bias") if "rmse" in result else ("accuracy", "macro_f1", "miou")
    scores: dict[str, float | None] = {"loss": loss if math.isfinite(loss) else None}
    return scores | {name: result[name] for name in names} | {"pixels": result["pixels"]}


def show_score(value: float | None) -> str:
    """Return a score in four digits, or "none".

    >>> show_score(0.5), show_score(None)
    ('0.5000', 'none')
    """
    return "none" if value is None else f"{value:.4f}"
