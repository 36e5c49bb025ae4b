"""`terrashard train` makes a run directory from a configuration."""

from __future__ import annotations

from dataclasses import replace
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
            Path, typer.Argument(metavar="CONFIG.toml", help="Settings: data, model, optim, mesh, run.")
        ],
        out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run directory: checkpoints, metrics, report.")],
        resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue the run that RUN holds.")] = True,
    ) -> None:
        """Train a network on a cube. The same command again continues the run from its last checkpoint.

        Under mpirun, srun or `terrashard launch`, all processes train one network together.
        """
        from cli.training import run_training, show, train_config
        from jaxtrain.parallel.processes import start_distributed, start_replica

        config = train_config(configuration, session)
        if config.hetero.enabled:
            start_replica()
            result = run_training(session, config, out, resume=resume)
            if result.leads:
                show(session, result)
            return
        if not start_distributed().is_first:
            run_training(replace(session, verbosity=-1), config, out, resume=resume)
            return
        show(session, run_training(session, config, out, resume=resume))
