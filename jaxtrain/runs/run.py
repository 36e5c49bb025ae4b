"""`Run` is a run directory that is open for reading."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.display import result_table
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.evaluations import own_evaluation, read_evaluations
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import ModelCard, load_card

__all__ = ["Run", "load_run"]


@dataclass(frozen=True, repr=False)
class Run:
    """A training run: its model card, history, checkpoints and scores; made by `load_run`.

    Every function that takes a run directory takes a `Run` too: `evaluate(load_run("runs/zagreb"))`.

    Attributes:
        path: The run directory.
        card: Bands, classes, normalisation, split and configuration, fixed when the run began.

    Example:
        >>> run = load_run("runs/zagreb")
        >>> run.classes
        ('vegetation', 'not vegetated', 'water')
        >>> run.metrics()[0]["step"]
        1
    """

    path: Path
    card: ModelCard

    @property
    def config(self) -> TrainConfig:
        """The whole configuration."""
        return self.card.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model knows; for a model of values, the one name of the value."""
        return self.card.answers.names

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands that the model takes, in order."""
        return self.card.bands

    @property
    def steps(self) -> int:
        """Steps that the history holds."""
        return max((int(line["step"]) for line in self.metrics()), default=0)

    @property
    def report(self) -> Path:
        """Path of the report; it is there once training has ended or `evaluate` has run."""
        return self.path / "report.html"

    def metrics(self) -> list[dict[str, Any]]:
        """Return the history: one line for each step (kind "train") and each validation (kind "validation")."""
        return read_metrics(self.path)

    def checkpoints(self) -> list[int]:
        """Return the steps of the finished checkpoints, ascending."""
        return CheckpointStore(self.path / "checkpoints").steps()

    def evaluation(self) -> dict[str, Any] | None:
        """Return the scores on the run's own data: of the test part, else of another part; None without any."""
        return own_evaluation(self.evaluations())

    def evaluations(self) -> list[dict[str, Any]]:
        """Return all scores that `evaluate` wrote, each with its `split` and `cube`: the run's own, then other data."""
        return read_evaluations(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return (
            f"<Run {self.path}: {self.config.model.name}, step {self.steps} of {self.config.run.steps}, "
            f"{len(self.bands)} bands, {len(self.classes)} classes>"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        validations = [line for line in self.metrics() if line["kind"] == "validation"]
        scores = {f"validation {k}": v for k, v in validations[-1].items() if k not in ("kind", "step")} \
            if validations else {}  # fmt: skip
        return result_table(f"Run {self.path}", {
            "model": self.config.model.name, "steps": f"{self.steps} of {self.config.run.steps}",
            "bands": ", ".join(self.bands), "classes": ", ".join(self.classes), **scores,
        })  # fmt: skip


def load_run(run: str | PathLike[str]) -> Run:
    """Open a run directory for reading; only its model card is read at once.

    Args:
        run: A directory that `train` has made.

    Returns:
        The run, with its configuration, history, checkpoints and last evaluation.

    Raises:
        InvalidInput: There is no run at `run`.
        IntegrityError: Its model card cannot be read.

    Example:
        >>> run = load_run("runs/zagreb")
        >>> run.steps, run.checkpoints()[-1]
        (12, 12)
    """
    return Run(Path(run), load_card(Path(run)))
