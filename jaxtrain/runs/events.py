"""What a run tells while it trains (`TrainEvent`), and what it has come to (`TrainingResult`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtrain.display import html_table

__all__ = ["OnEvent", "Teller", "TrainEvent", "TrainingResult"]

_log = logging.getLogger("jaxtrain.train")

Event = Literal["start", "resume", "step", "validation", "checkpoint", "warning", "done"]


@dataclass(frozen=True)
class TrainEvent:
    """Progress of a run, for who watches it.

    Attributes:
        kind: start (data and network are known) · resume · step · validation · checkpoint · warning · done.
        step: Steps done.
        steps: Steps in all.
        message: One line of text.
        metrics: Numbers of a step or validation; facts of the run at the start.
    """

    kind: Event
    step: int
    steps: int
    message: str
    metrics: dict[str, Any]


OnEvent = Callable[[TrainEvent], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to.

    Attributes:
        run: The run directory.
        steps: Steps done in all.
        resumed_from: The step this call began at; 0 for a new run.
        train: Metrics of the last step.
        validation: loss, accuracy, macro_f1, miou (of values r2, rmse, mae, bias) and pixels of the last validation.
        windows: Windows of each part.
        parameters: Number of learned parameters.
        seconds: Wall time of this call.
        samples_per_second: Windows per second of training in this call, reading included, without the first step
            (which compiles); None where this call took fewer than two steps.
        report: Path of the report.
        input_wait: Share of the training time that was spent waiting for batches; None as above.
        skipped_steps: Steps of the run whose loss was not finite, and which changed nothing.
        empty_batches: Steps of the run without one labelled pixel.
        quarantined_windows: Windows that this process found unreadable.
        best_step, best_score: The best validation by `run.monitor`, whose checkpoint is judged and used; None without.
        stopped_early: Whether `run.patience` ended the run before its last step.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        scores = {name: value for name, value in self.validation.items() if value is not None}
        rows = {"run": self.run, "steps": self.steps, "parameters": self.parameters, **scores, "report": self.report}
        return html_table(rows)


@dataclass(frozen=True)
class Teller:
    """Tells of a run's progress: one line to the log, and a `TrainEvent` to who watches."""

    steps: int
    on_event: OnEvent | None

    def __call__(self, kind: Event, step: int, message: str, **metrics: Any) -> None:
        """Tell of one thing that happened at `step`."""
        _log.info("%s", message)
        if self.on_event:
            self.on_event(TrainEvent(kind, step, self.steps, message, metrics))
