"""`terrashard export` writes one date of a cube, or the files of a finished map, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["register"]

_MAP = "Files of a map"


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard export zagreb.zarr zagreb.tif --time 2023-08-18 --bands red,green,blue",
            "terrashard export zagreb.zarr status.tif --time 2023-08-18 --array status",
            "terrashard export zagreb_map.zarr zagreb_map.tif",
            "terrashard export zagreb_map.zarr --polygons zagreb.gpkg --min-area 5000 --simplify 15",
        ),
    )
    def export(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE|MAP", help="Path or URL of a cube, or a map.")],
        out: Annotated[
            Path | None, typer.Argument(metavar="OUT.tif", help="The GeoTIFF; replaced if it exists.")
        ] = None,
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
        polygons: Annotated[
            Path | None,
            typer.Option(metavar="OUT", help="Polygons: .parquet, .geojson or .gpkg.", rich_help_panel=_MAP),
        ] = None,
        min_area: Annotated[
            float | None,
            typer.Option(metavar="M2", help="Merge smaller patches into a neighbour, m².", rich_help_panel=_MAP),
        ] = None,
        simplify: Annotated[
            float | None,
            typer.Option(metavar="UNITS", help="Simplify borders; neighbours stay joined.", rich_help_panel=_MAP),
        ] = None,
        pmtiles: Annotated[
            Path | None, typer.Option(metavar="OUT.pmtiles", help="Tiles of a web map.", rich_help_panel=_MAP)
        ] = None,
        run: Annotated[
            Path | None,
            typer.Option(
                metavar="RUN", help="Run whose scores are used to estimate areas; default: the one that made the map.",
                rich_help_panel=_MAP,
            ),
        ] = None,
    ) -> None:  # fmt: skip
        """Write one date of a cube as a cloud-optimised GeoTIFF: stored values, with nodata, scale and band names.

        For a map, write a GeoTIFF, polygons or web map tiles, and estimate the area of each class with its error.
        """
        from cli.exporting import export_slice
        from cli.products import Products, export_map
        from jaxtrain.inference.maps import is_map
        from zarr_store.errors import InvalidInput

        products = Products(out, polygons, min_area or 0.0, simplify or 0.0, pmtiles)
        if "://" not in cube and is_map(cube):
            if collection or bands or array:
                raise InvalidInput(f"{cube} is a map: --collection, --bands and --array are for cubes")
            session.emit(export_map(session, cube, products, run=run, time=time))
            return
        if polygons or min_area or simplify or pmtiles or run:
            raise InvalidInput(
                f"{cube} is not a map: --polygons, --pmtiles and --run are for maps of `terrashard predict`"
            )
        if out is None:
            raise InvalidInput("name the GeoTIFF: terrashard export CUBE OUT.tif")
        written = export_slice(cube, out, collection=collection, time=time, bands=bands, array=array)
        height, width = written["shape"]
        session.say(
            f"{written['path']}: {', '.join(written['bands'])} of {written['time']}, {height}×{width} px "
            f"{written['dtype']}"
        )
        session.emit(written)
