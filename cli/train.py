"""`terrashard train`: a configuration becomes a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        examples=(
            "terrashard train examples/zagreb_scl.toml --out runs/zagreb",
            "terrashard train examples/zagreb_scl.toml --out runs/short --set run.steps=50 --set mesh.data=2",
        ),
    )
    def train(
        session: Session,
        configuration: Annotated[
            Path, typer.Argument(metavar="CONFIG.toml", help="Data, model, optimiser, mesh, run.")
        ],
        out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run directory: checkpoints, metrics, report.")],
        resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue the run that RUN holds.")] = True,
    ) -> None:
        """Train a network on a cube. The same command again continues the run from its last checkpoint."""
        from cli.training import run_training, summary, train_config

        result = run_training(session, train_config(configuration, session), out, resume=resume)
        for line in summary(result):
            session.say(line)
        session.emit(result.to_dict())
