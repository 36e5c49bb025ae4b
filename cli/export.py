"""`terrashard export` writes one date of a cube, or one of its layers, as a GeoTIFF for other programs."""

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
            "terrashard export zagreb.zarr zagreb.tif --time 2023-08-18 --bands red,green,blue",
            "terrashard export zagreb.zarr status.tif --time 2023-08-18 --array status",
        ),
    )
    def export(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of a cube.")],
        out: Annotated[Path, typer.Argument(metavar="OUT.tif", help="The GeoTIFF; replaced if it exists.")],
        collection: Annotated[str | None, typer.Option(help="Collection of the cube; default: its first.")] = None,
        time: Annotated[
            str | None,
            typer.Option(metavar="DATE|N", help="The date, or its position; not needed where the cube has one date."),
        ] = None,
        bands: Annotated[str | None, typer.Option(metavar="A,B,…", help="Bands, in this order; default: all.")] = None,
        array: Annotated[
            str | None,
            typer.Option(metavar="NAME", help="Array to write in place of the bands: status, scl, …"),
        ] = None,
    ) -> None:
        """Write one date of a cube as a cloud-optimised GeoTIFF: stored values, with nodata, scale and band names."""
        from cli.exporting import export_slice

        written = export_slice(cube, out, collection=collection, time=time, bands=bands, array=array)
        height, width = written["shape"]
        session.say(
            f"{written['path']}: {', '.join(written['bands'])} of {written['time']}, {height}×{width} px "
            f"{written['dtype']}"
        )
        session.emit(written)
