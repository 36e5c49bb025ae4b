"""The progress of a run (`TrainEvent`) and its result (`TrainingResult`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtrain.display import result_table, scores_text

__all__ = ["OnEvent", "Teller", "TrainEvent", "TrainingResult"]

_log = logging.getLogger("jaxtrain.train")

Event = Literal["start", "resume", "group", "step", "validation", "checkpoint", "warning", "done"]


@dataclass(frozen=True)
class TrainEvent:
    """One event of a run; `train(…, on_event=…)` calls a function with each.

    Attributes:
        kind: start (data and network are known) · resume · group (unequal replicas come and go) · step · validation ·
            checkpoint · warning · done.
        step: Steps done.
        steps: Steps in all.
        message: One line of text.
        metrics: Numbers of a step or validation; at the start, the sizes of the network and the data.

    Example:
        >>> event = TrainEvent("step", 3, 12, "step 3: loss 0.5", {"loss": 0.5})
        >>> event.metrics["loss"]
        0.5
    """

    kind: Event
    step: int
    steps: int
    message: str
    metrics: dict[str, Any]


OnEvent = Callable[[TrainEvent], None]


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """The result of a call of `train`: steps, metrics, scores and rates.

    Attributes:
        run: The run directory.
        steps: Steps done in all.
        resumed_from: The step this call began at; 0 for a new run.
        train: Metrics of the last step.
        validation: loss, accuracy, macro_f1, miou (of values r2, rmse, mae, bias) and pixels of the last validation.
        windows: Windows of each part.
        parameters: Number of trainable parameters.
        seconds: Wall time of this call.
        samples_per_second: Windows per second of training in this call, reading included, without the first step
            (which compiles); None where this call took fewer than two steps.
        report: Path of the report.
        input_wait: Share of the training time that was spent waiting for batches; None as above.
        skipped_steps: Steps of the run whose loss was not finite, and which changed nothing.
        empty_batches: Steps of the run without one labelled pixel.
        quarantined_windows: Windows that this process found unreadable.
        best_step: Step of the best validation by `run.monitor`, whose checkpoint is evaluated and used; None without
            a monitor.
        best_score: Score of that validation.
        stopped_early: Whether `run.patience` ended the run before its last step.
        unit: Name of what `windows` counts: "windows" of a cube, "images" of a sample store, or "pixels" of a scene.
        shares: Chunks of a step that each replica computed last; None without `hetero.enabled`, as are the next two.
        efficiency: Rate of this call divided by the sum of the rates at which its replicas computed.
        recompiles: How often this replica compiled its programs again after the first step.
        leads: Whether this process has written history, checkpoints and report.

    Example:
        >>> from jaxtrain import load_run, train
        >>> run = load_run("runs/zagreb")
        >>> result = train(run.config, run)  # a finished run has no step left
        >>> result.steps, result.resumed_from
        (12, 12)
    """

    run: str
    steps: int
    resumed_from: int
    train: dict[str, float]
    validation: dict[str, float | None]
    windows: dict[str, int]
    parameters: int
    seconds: float
    samples_per_second: float | None
    report: str
    input_wait: float | None = None
    skipped_steps: int = 0
    empty_batches: int = 0
    quarantined_windows: int = 0
    best_step: int | None = None
    best_score: float | None = None
    stopped_early: bool = False
    unit: str = "windows"
    shares: dict[str, int] | None = None
    efficiency: float | None = None
    recompiles: int | None = None
    leads: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what only unequal replicas have is left out of other runs."""
        values = asdict(self)
        del values["leads"]
        if self.shares is None:
            for name in ("shares", "efficiency", "recompiles"):
                del values[name]
        return values

    def __repr__(self) -> str:
        names = ("loss", "accuracy", "miou", "r2", "rmse")
        scores = scores_text({name: self.validation.get(name) for name in names})
        return f"<TrainingResult {self.run}: step {self.steps}" + (f"; validation {scores}>" if scores else ">")

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        scores = {f"validation {name}": value for name, value in self.validation.items()}
        parts = ", ".join(f"{part} {count}" for part, count in self.windows.items())
        rows = {"steps": self.steps, "parameters": self.parameters, self.unit: parts, **scores, "report": self.report}
        return result_table(f"Training {self.run}", rows)


@dataclass
class Teller:
    """Reporter of the progress of a run: one line to the log, and a `TrainEvent` to `on_event`.

    Attributes:
        steps: Steps in all.
        on_event: Called with each event; None for nobody.
        quiet: Whether only warnings are reported, because another process reports all else.
    """

    steps: int
    on_event: OnEvent | None
    quiet: bool = False

    def __call__(self, kind: Event, step: int, message: str, **metrics: Any) -> None:
        """Report one event of `step`."""
        if self.quiet and kind != "warning":
            return
        _log.info("%s", message)
        if self.on_event:
            self.on_event(TrainEvent(kind, step, self.steps, message, metrics))
