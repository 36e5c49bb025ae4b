"""`terrashard launch` runs one training in several processes, on this machine or on the workers of a Dask cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard launch -n 2 -- train examples/zagreb_scl.toml --out runs/zagreb",
            "terrashard launch --dask tcp://127.0.0.1:8786 -- train examples/zagreb_scl.toml --out runs/zagreb",
        ),
    )
    def launch(
        session: Session,
        words: Annotated[
            list[str],
            typer.Argument(metavar="-- train CONFIG.toml --out RUN", help="The command that each process runs."),
        ],
        processes: Annotated[
            int | None,
            typer.Option(
                "-n", "--processes", min=1, help="Number of processes; default with --dask: one for each worker."
            ),
        ] = None,
        dask: Annotated[
            str | None, typer.Option(metavar="ADDRESS", help="Start them on the workers of this Dask scheduler.")
        ] = None,
        restarts: Annotated[
            int, typer.Option(min=0, help="How often all processes are started again after one has died.")
        ] = 3,
        grace_s: Annotated[
            float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds to save and end after SIGTERM.")
        ] = 60.0,
    ) -> int:
        """Start the processes of one training run and keep them together.

        When one dies, all of them start again from the newest checkpoint. Each line begins with its process number.
        """
        from cli.launching import run_launch

        return run_launch(session, words, processes=processes, dask=dask, restarts=restarts, grace_s=grace_s)
