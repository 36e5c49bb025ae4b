"""`terrashard predict` makes a map from a run and a cube."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --cog zagreb_map.tif",
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --probabilities",
        ),
    )
    def predict(
        session: Session,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of `terrashard train`.")],
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="The cube to map.")],
        map_: Annotated[str, typer.Argument(metavar="MAP.zarr", help="Where the map goes.")],
        cog: Annotated[
            Path | None, typer.Option(metavar="MAP.tif", help="Also write a cloud-optimised GeoTIFF.")
        ] = None,
        time: Annotated[
            str | None, typer.Option(metavar="DATE", help="Date to map; default: the mean over all dates.")
        ] = None,
        probabilities: Annotated[
            bool, typer.Option("--probabilities", help="Keep the probability of each class.")
        ] = False,
    ) -> None:
        """Map a whole cube with a trained network; windows overlap and are blended, so there are no seams."""
        from cli.mapping import run_prediction

        result = run_prediction(session, run, cube, map_, cog=cog, time=time, probabilities=probabilities)
        height, width = result["shape"]
        total = max(sum(result["pixels"].values()), 1)
        session.say(f"{map_}: {height}×{width} px from {len(result['dates'])} date(s), {result['seconds']:.1f} s")
        for name, count in result["pixels"].items():
            session.say(f"  {name:24} {count / total:6.1%}")
        if result["values"] is not None:
            session.say("  " + ", ".join(f"{word} {value:.6g}" for word, value in result["values"].items()))
        if cog is not None:
            held = "values, in their unit" if result["values"] is not None else "classes, with colours and class names"
            session.say(f"{cog}: cloud-optimised GeoTIFF of {held}")
        session.emit(result)
