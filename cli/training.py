"""Shared part of the commands `train` and `demo`: read the configuration, train, and show the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.progress import Reporter
from cli.session import Session

if TYPE_CHECKING:
    from jaxtrain import TrainConfig, TrainEvent, TrainingResult

__all__ = ["run_training", "show", "summary", "train_config"]


def train_config(path: Path, session: Session) -> TrainConfig:
    """Return the settings of CONFIG.toml, then --config, then each --set; see `jaxtrain.settings.read_train_config`."""
    from jaxtrain.settings import read_train_config

    files = [file for file in (path, session.config) if file is not None]
    return read_train_config(files, session.overrides)


def run_training(session: Session, config: TrainConfig, out: Path, *, resume: bool = True) -> TrainingResult:
    """Train with progress on stderr; of several processes the first one reports, and the others only warn."""
    from jaxtrain import train
    from jaxtrain.parallel.heap import keep_freed_memory
    from jaxtrain.parallel.processes import spread_mesh
    from jaxtrain.runs.repeat import repeat_exactly

    keep_freed_memory()
    if config.run.deterministic:
        repeat_exactly()
    if config.mesh.auto:
        from jaxtrain.planner.choose import choose_mesh

        config = choose_mesh(config, session.note)
    config = spread_mesh(config)
    with Reporter(session, "train", unit="steps") as progress:

        def show(event: TrainEvent) -> None:
            if event.kind == "step":
                progress.update(event.step, event.steps, event.message)
            elif event.kind == "warning":
                progress.line(f"warning: {event.message}")
            elif event.kind != "checkpoint" or session.verbosity > 0:
                progress.line(event.message)

        return train(config, out, resume=resume, on_event=show, progress=False)


def summary(result: TrainingResult) -> list[str]:
    """Return the result of a run as lines."""
    scores = ", ".join(
        f"{name} {value:.4f}"
        for name, value in result.validation.items()
        if name in ("accuracy", "macro_f1", "miou", "r2", "rmse", "mae") and value is not None
    )
    rate = "" if result.samples_per_second is None else f", {result.samples_per_second:.1f} {result.unit}/s"
    began = f" (continued at step {result.resumed_from})" if result.resumed_from else ""
    return [
        f"{result.run}: {result.steps} steps{began}, {result.parameters:,} parameters, {result.seconds:.0f} s{rate}",
        f"validation    {scores or 'none'}",
        f"report        {result.report}",
    ]


def show(session: Session, result: TrainingResult) -> None:
    """Print the result of a run, as lines or as JSON."""
    for line in summary(result):
        session.say(line)
    session.emit(result.to_dict())
