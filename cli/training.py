"""From a TOML file to a finished run: the shared part of `train` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.config import build, merge, parse_override, read_toml
from cli.progress import Reporter
from cli.session import Session

if TYPE_CHECKING:
    from jaxtrain.config import TrainConfig
    from jaxtrain.train import TrainEvent, TrainResult

__all__ = ["run_training", "summary", "train_config"]


def train_config(path: Path, session: Session) -> TrainConfig:
    """CONFIG.toml, then --config, then each --set.

    A relative `data.cube` is relative to the file it stands in, or, in a --set, to the working directory.
    """
    from jaxtrain.config import TrainConfig

    settings: dict[str, Any] = {}
    for file in (path, session.config):
        if file is not None:
            settings = merge(settings, _located(read_toml(file), file.parent))
    for text in session.overrides:
        settings = merge(settings, parse_override(text))
    return build(TrainConfig, settings, where=str(path))


def _located(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    from jaxtrain.script import resolve_cube

    data = settings.get("data")
    cube = data.get("cube") if isinstance(data, dict) else None
    several = isinstance(cube, list) and all(isinstance(one, str) for one in cube)
    if not cube or not (isinstance(cube, str) or several):
        return settings
    return merge(settings, {"data": {"cube": resolve_cube(cube, folder)}})


def run_training(session: Session, config: TrainConfig, out: Path, *, resume: bool = True) -> TrainResult:
    """Train with progress on stderr; of several processes, the first one speaks, and the others only warn."""
    from jaxtrain.heap import keep_freed_memory
    from jaxtrain.parallel.processes import spread_mesh
    from jaxtrain.repeat import repeat_exactly
    from jaxtrain.train import train

    keep_freed_memory()
    if config.run.deterministic:
        repeat_exactly()
    config = spread_mesh(config)
    with Reporter(session, "train", unit="steps") as progress:

        def show(event: TrainEvent) -> None:
            if event.kind == "step":
                progress.update(event.step, event.steps, event.message)
            elif event.kind == "warning":
                progress.line(f"warning: {event.message}")
            elif event.kind != "checkpoint" or session.verbosity > 0:
                progress.line(event.message)

        return train(config, out, resume=resume, on_event=show)


def summary(result: TrainResult) -> list[str]:
    """What a run came to, in lines."""
    scores = ", ".join(
        f"{name} {value:.4f}"
        for name, value in result.validation.items()
        if name in ("accuracy", "macro_f1", "miou", "r2", "rmse", "mae") and value is not None
    )
    rate = "" if result.samples_per_second is None else f", {result.samples_per_second:.1f} windows/s"
    began = f" (continued at step {result.resumed_from})" if result.resumed_from else ""
    return [
        f"{result.run}: {result.steps} steps{began}, {result.parameters:,} parameters, {result.seconds:.0f} s{rate}",
        f"validation    {scores or 'none'}",
        f"report        {result.report}",
    ]
