"""`terrashard launch` runs one training in several processes: here, on hosts, on Dask workers, or as a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard launch -n 2 -- train examples/zagreb_scl.toml --out runs/zagreb",
            "terrashard launch --hosts gpu-a,gpu-b -- train examples/zagreb_scl.toml --out runs/zagreb",
            "terrashard launch --dask tcp://127.0.0.1:8786 -- train examples/zagreb_scl.toml --out runs/zagreb",
            "terrashard launch --emit sbatch -n 16 -- train examples/zagreb_scl.toml --out runs/zagreb",
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
                "-n",
                "--processes",
                min=1,
                help="Number of processes; default with --dask and --hosts: one for each worker or host.",
            ),
        ] = None,
        hosts: Annotated[
            str | None, typer.Option(metavar="A,B,…", help="Start one over SSH on each host: [user@]name[:port].")
        ] = None,
        dask: Annotated[
            str | None, typer.Option(metavar="ADDRESS", help="Start them on the workers of this Dask scheduler.")
        ] = None,
        emit: Annotated[
            Literal["sbatch", "jobset", "trainjob"] | None,
            typer.Option(metavar="sbatch|jobset|trainjob", help="Write the job file of a cluster; start nothing."),
        ] = None,
        to: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Job file of --emit; default: named after RUN; - prints it.")
        ] = None,
        cluster_option: Annotated[
            list[str] | None,
            typer.Option(metavar="KEY=VALUE", help="Setting of --hosts or --emit, such as image=NAME; repeatable."),
        ] = None,
        min_processes: Annotated[
            int | None, typer.Option(min=1, help="With hetero.enabled: end when fewer processes are left; default 1.")
        ] = None,
        max_processes: Annotated[
            int | None, typer.Option(min=1, help="With hetero.enabled: accept at most this many processes.")
        ] = None,
        join: Annotated[
            str | None,
            typer.Option(metavar="HOST:PORT", help="Add processes to the group of another launcher."),
        ] = None,
        listen: Annotated[
            str | None,
            typer.Option(
                metavar="HOST[:PORT]", help="With hetero.enabled: address at which other machines can join the group."
            ),
        ] = None,
        replace: Annotated[
            bool, typer.Option("--replace/--no-replace", help="With hetero.enabled: replace a process that dies.")
        ] = True,
        restarts: Annotated[
            int,
            typer.Option(
                min=0, help="How often processes are restarted: all of them, or with hetero.enabled each replica."
            ),
        ] = 3,
        grace_s: Annotated[
            float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds to save and end after SIGTERM.")
        ] = 60.0,
    ) -> int:
        """Start the processes of one training run or map, and restart them when one dies.

        When one dies, all of them start again from the newest checkpoint; with hetero.enabled the others go on, and a
        new process takes its place. Each line begins with the number or the host of its process.
        """
        from cli.launching import LaunchOptions, run_launch

        options = LaunchOptions(
            processes=processes, dask=dask, hosts=hosts, emit=emit, to=to, join=join, listen=listen,
            least=min_processes, most=max_processes, replace=replace, restarts=restarts, grace_s=grace_s,
            cluster_options=tuple(cluster_option or ()),
        )  # fmt: skip
        return run_launch(session, words, options)
