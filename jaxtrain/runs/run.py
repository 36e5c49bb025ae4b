"""`Run`: a run directory, opened to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.display import html_table
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import EVALUATION, ModelCard, load_card

__all__ = ["Run", "load_run"]


@dataclass(frozen=True, repr=False)
class Run:
    """A training run: its model card, history, checkpoints and scores.

    A run may be given wherever a run directory is asked for: `evaluate(load_run("runs/zagreb"))`.

    Attributes:
        path: The run directory.
        card: Bands, classes, normalisation, split and configuration, fixed when the run began.
    """

    path: Path
    card: ModelCard

    @property
    def config(self) -> TrainConfig:
        """The whole configuration."""
        return self.card.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model knows; of values, the one name of what it answers."""
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
        """The history: one line for each step (kind "train") and each validation (kind "validation")."""
        return read_metrics(self.path)

    def checkpoints(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return CheckpointStore(self.path / "checkpoints").steps()

    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluate` wrote last; None where it has not run."""
        path = self.path / EVALUATION
        return dict(json.loads(path.read_bytes())) if path.exists() else None

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}, model={self.config.model.name!r}, step={self.steps} of {self.config.run.steps}, "
            f"bands={list(self.bands)}, classes={list(self.classes)})"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        validations = [line for line in self.metrics() if line["kind"] == "validation"]
        scores = {f"validation {k}": v for k, v in validations[-1].items() if k not in ("kind", "step")} \
            if validations else {}  # fmt: skip
        return html_table({
            "run": self.path, "model": self.config.model.name, "steps": f"{self.steps} of {self.config.run.steps}",
            "bands": ", ".join(self.bands), "classes": ", ".join(self.classes), **scores,
        })  # fmt: skip


def load_run(run: str | PathLike[str]) -> Run:
    """Open a run directory to look at; nothing is read but its model card.

    Args:
        run: A directory that `train` has made.

    Returns:
        The run: its configuration, history, checkpoints and last evaluation.

    Raises:
        InvalidInput: There is no run.
        IntegrityError: Its model card cannot be read.

    Example:
        from jaxtrain import load_run

        run = load_run("runs/zagreb")
        run.classes, run.checkpoints()
    """
    return Run(Path(run), load_card(Path(run)))
