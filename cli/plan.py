"""`terrashard plan` is the dry run of an ingest: it reads headers and stores no pixel."""

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
            "terrashard plan catalog.json --collection sentinel-2-l2a --bands blue,green,red,nir,scl --mask scl",
            "terrashard plan catalog.json --bands red,nir --crs EPSG:32633 --resolution 20 -o plan.json",
        ),
    )
    def plan(
        session: Session,
        source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
        out: Annotated[
            Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the plan: plan.json.")
        ] = None,
    ) -> None:
        """Show what an ingest would do: grid, dates, shards, bytes, offset verdicts, and what is left out."""
        import json

        from ingest.plan.making import make_plan
        from ingest.plan.stored import needed_options

        made = make_plan(source, ingest_config(session))
        session.say_lines(made.summary())
        if out is not None:
            made.save(out)
            again = " ".join([f"terrashard ingest {out} CUBE", *needed_options(made, str(out))])
            session.say(f"written to {out}; `{again}` runs exactly this plan")
        if session.json:
            session.emit(json.loads(made.to_json()))
