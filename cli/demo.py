"""`terrashard demo` runs the whole journey on a simulated world."""

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
        examples=("terrashard demo", "terrashard demo --out small --set simulate.tile_px=512 --set train.run.steps=50"),
    )
    def demo(
        session: Session,
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything that is made.")] = Path(
            "demo"
        ),
    ) -> int:
        """Simulate scenes, ingest them through a STAC API, train, evaluate, and draw the map.

        Run the same command again to continue.
        """
        from cli.journey import run_demo

        return run_demo(session, out)
