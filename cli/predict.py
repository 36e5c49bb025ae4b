"""`terrashard predict` makes a map from a run and a cube."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import RUNNING
from cli.session import Session, command

__all__ = ["register"]

_HELPERS = {
    name: RUNNING[name] for name in ("cluster", "hosts", "cluster_options", "memory", "dashboard", "tls", "expose")
}
_WHAT, _WHERE, _MADE = "What is mapped", "Processes", "Files of the map"


def register(app: typer.Typer) -> None:
    @command(
        app,
        extra=_HELPERS,
        examples=(
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --cog zagreb_map.tif",
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --exact --aoi city.geojson",
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --polygons zagreb.parquet --min-area 5000",
            "terrashard predict runs/zagreb zagreb.zarr days.zarr --each-date --append",
            "terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --dask tcp://127.0.0.1:8786",
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
        polygons: Annotated[
            Path | None,
            typer.Option(metavar="OUT", help="Polygons: .parquet, .geojson or .gpkg.", rich_help_panel=_MADE),
        ] = None,
        min_area: Annotated[
            float | None,
            typer.Option(metavar="M2", help="Merge smaller patches into a neighbour, m².", rich_help_panel=_MADE),
        ] = None,
        simplify: Annotated[
            float | None,
            typer.Option(metavar="UNITS", help="Simplify borders; neighbours stay joined.", rich_help_panel=_MADE),
        ] = None,
        pmtiles: Annotated[
            Path | None,
            typer.Option(metavar="OUT.pmtiles", help="Tiles of a web map.", rich_help_panel=_MADE),
        ] = None,
        time: Annotated[
            str | None,
            typer.Option(metavar="DATE", help="Date to map; default: the mean over all dates.", rich_help_panel=_WHAT),
        ] = None,
        majority: Annotated[
            bool,
            typer.Option("--majority", help="The class that most dates vote for.", rich_help_panel=_WHAT),
        ] = False,
        each_date: Annotated[
            bool, typer.Option("--each-date", help="A map of each date, along an axis time.", rich_help_panel=_WHAT)
        ] = False,
        append: Annotated[
            bool,
            typer.Option(
                "--append", help="Add the new dates of a cube that has grown (--each-date).", rich_help_panel=_WHAT
            ),
        ] = False,
        aoi: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Map inside the polygons of this file only.", rich_help_panel=_WHAT),
        ] = None,
        bbox: Annotated[
            str | None,
            typer.Option(metavar="W,S,E,N", help="Map inside this box only, degrees.", rich_help_panel=_WHAT),
        ] = None,
        exact: Annotated[
            bool,
            typer.Option(
                "--exact/--blend",
                help="--exact: as one pass over the whole scene; --blend (default): overlapping windows, blended.",
                rich_help_panel=_WHAT,
            ),
        ] = False,
        overlap: Annotated[
            int | None,
            typer.Option(
                min=0, metavar="PX", help="Overlap of blended windows; default: a quarter of one.",
                rich_help_panel=_WHAT,
            ),
        ] = None,
        probabilities: Annotated[
            bool,
            typer.Option("--probabilities", help="Also store the probability of each class.", rich_help_panel=_WHAT),
        ] = False,
        entropy: Annotated[
            bool, typer.Option("--entropy", help="Also store the entropy of the probabilities.", rich_help_panel=_WHAT)
        ] = False,
        scaled: Annotated[
            bool,
            typer.Option("--scaled", help="Store values as int16 with a scale, not float32.", rich_help_panel=_WHAT),
        ] = False,
        without: Annotated[
            list[str] | None,
            typer.Option(
                metavar="MODALITY", help="Map as if this modality were missing; may be repeated.",
                rich_help_panel=_WHAT,
            ),
        ] = None,
        allow_mismatch: Annotated[
            bool,
            typer.Option(
                "--allow-mismatch", help="Use data of another pixel size or unit than those of training, and warn.",
                rich_help_panel=_WHAT,
            ),
        ] = False,
        devices: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Devices of a process; default: as the run.", rich_help_panel=_WHERE),
        ] = None,
        workers: Annotated[
            int | None,
            typer.Option(
                min=1, metavar="N", help="Processes that fill the map; default: this one.", rich_help_panel=_WHERE
            ),
        ] = None,
        dask: Annotated[
            str | None,
            typer.Option(
                metavar="ADDRESS", help="One process on each worker of this Dask scheduler.", rich_help_panel=_WHERE
            ),
        ] = None,
    ) -> None:  # fmt: skip
        """Map a whole cube with a trained network.

        Windows overlap and are blended (--blend), or are padded by the receptive field of the network (--exact), so
        the map has no seams. If a command was interrupted, the same command continues.
        """
        from cli.mapping import run_prediction
        from cli.products import Products
        from zarr_store.errors import InvalidInput

        if majority and each_date:
            raise InvalidInput("--majority makes one map of all dates and --each-date many; give one of them")
        if append and not each_date:
            raise InvalidInput("--append adds dates to a map of each date; add --each-date")
        products = Products(cog, polygons, min_area or 0.0, simplify or 0.0, pmtiles)
        helpers = {"workers": workers, "dask": dask, **session.options}
        result = run_prediction(
            session, run, cube, map_, products=products, time=time, probabilities=probabilities, aoi=aoi, bbox=bbox,
            helpers=helpers, method="exact" if exact else "blend", overlap=overlap, entropy=entropy, scaled=scaled,
            dates="majority" if majority else "each" if each_date else "mean", append=append, devices=devices,
            without=tuple(without or ()), allow_mismatch=allow_mismatch,
        )  # fmt: skip
        session.emit(result)
