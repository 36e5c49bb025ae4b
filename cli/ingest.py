"""`terrashard ingest` writes scenes into a cube; the same command again continues, or finds nothing to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import COMPOSING, GRID, RUNNING, SELECTION, SOURCE_HELP, TRUST, ingest_config
from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        extra=SELECTION | GRID | COMPOSING | TRUST | RUNNING,
        examples=(
            "terrashard ingest catalog.json zagreb.zarr --collection sentinel-2-l2a \\",
            "    --bands blue,green,red,nir,scl --mask scl --workers 2",
            "terrashard ingest plan.json zagreb.zarr",
            "terrashard ingest catalog.json zagreb.zarr --append --datetime 2023-09",
            "terrashard ingest plan.json zagreb.zarr --report report.html",
            "terrashard ingest plan.json zagreb.zarr --cluster slurm --memory 8GB --dry-run",
        ),
    )
    def ingest(
        session: Session,
        source: Annotated[str, typer.Argument(metavar="SOURCE|plan.json", help=SOURCE_HELP)],
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of the cube, which need not exist.")],
        append: Annotated[bool, typer.Option("--append", help="Add dates that the cube does not have.")] = False,
        refresh: Annotated[
            bool, typer.Option("--refresh", help="Rewrite the shards whose scenes have a newer copy or replaced files.")
        ] = False,
        overwrite: Annotated[
            bool,
            typer.Option("--overwrite", help="Make a new cube, and replace the old one when the new one is complete."),
        ] = False,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run", help="Show the job script, manifest or options of the cluster, and start nothing."
            ),
        ] = False,
        report: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Write a report: FILE.html for people, FILE.json for programs."),
        ] = None,
    ) -> int:
        """Read, harmonise and write scenes into a sharded Zarr cube. Exit code 3: some asset could not be read."""
        from cli.ingesting import check_report, cube_config, extend_cube, keep_report, plan_of, run_plan

        check_report(report)
        if overwrite and (append or refresh):
            from zarr_store.errors import InvalidInput

            raise InvalidInput(
                "--overwrite makes a new cube, --append and --refresh continue the old one: give one of them"
            )
        record = None
        if report is not None and report.suffix.lower() == ".html":
            from ingest.run.record import RunRecord

            record = RunRecord()
        if dry_run:
            from ingest.run.cluster import resolve_dashboard
            from ingest.run.start import describe

            config = ingest_config(session)
            text = describe(config, resolve_dashboard(config.running.dashboard))
            session.say_lines(text)
            session.emit(
                {"cluster": config.running.cluster, "scheduler": config.running.scheduler, "description": text}
            )
            return 0
        if append or refresh:
            result = extend_cube(
                session, source, cube, cube_config(session, cube), append=append, refresh=refresh, record=record
            )
        else:
            config = ingest_config(session)
            made = plan_of(session, source, config)
            for text in made.warnings:
                session.warn(text)
            result = run_plan(session, made, cube, config, record=record, overwriting=overwrite, typed=source)
        session.say_lines(result.summary())
        if report is not None:
            keep_report(report, result, record)
            session.say(f"report in {report}")
        session.emit(result.to_dict())
        return int(result.exit_code)
