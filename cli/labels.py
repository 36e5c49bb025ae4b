"""`terrashard labels` makes a label layer of a cube from a raster or from polygons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.session import Session, command

__all__ = ["read_names", "register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard labels berlin.zarr landuse.gpkg --name landuse --attribute fclass",
            "terrashard labels cube.zarr worldcover.tif --name landcover --names 10=tree,30=grass,40=crop,50=built",
            "terrashard labels cube.zarr biomass.tif --name biomass --values",
        ),
    )
    def labels(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of the cube that gets the layer.")],
        source: Annotated[
            Path,
            typer.Argument(
                metavar="SOURCE", help="GeoTIFF, or polygons: GeoJSON, GeoPackage, GeoParquet, FlatGeobuf, shapefile."
            ),
        ],
        name: Annotated[str, typer.Option(metavar="NAME", help="Name of the layer, for `data.label`.")] = "labels",
        values: Annotated[
            bool, typer.Option("--values", help="The raster or attribute holds numbers, not classes.")
        ] = False,
        attribute: Annotated[
            str | None, typer.Option(metavar="FIELD", help="Attribute of the polygons that holds the class or number.")
        ] = None,
        layer: Annotated[str | None, typer.Option(help="Layer to read from a vector file with several layers.")] = None,
        band: Annotated[int, typer.Option(min=1, help="Band to read from a raster.")] = 1,
        names: Annotated[
            str,
            typer.Option(metavar="1=A,2=B", help="Values and names of a class raster; other values are unlabelled."),
        ] = "",
        background: Annotated[
            str | None,
            typer.Option(metavar="NAME", help="Make a class of all pixels that no polygon holds; default: unlabelled."),
        ] = None,
        all_touched: Annotated[
            bool,
            typer.Option(
                "--all-touched", help="A polygon labels every pixel that it touches; default: by pixel centre."
            ),
        ] = False,
        resampling: Annotated[
            str, typer.Option(help="For a raster: auto, nearest or mode; for values also average or bilinear.")
        ] = "auto",
        shifted: Annotated[
            bool, typer.Option("--shifted", help="Accept a raster that is half a pixel off the cube's pixels.")
        ] = False,
        replace: Annotated[
            bool, typer.Option("--replace", help="Replace a layer of this name that was made from another source.")
        ] = False,
    ) -> None:
        """Put labels from outside onto the grid of a cube, so that a network can learn them (`data.label`).

        A raster may have any CRS and pixel size: a pixel takes the class of the nearest source pixel, or the most
        frequent class where the cube is coarser. A polygon labels the pixels whose centre it holds; where two overlap,
        the smaller one counts.
        """
        from typing import cast, get_args

        from cli.progress import Reporter
        from ingest.labels.layer import LabelResampling, import_labels
        from zarr_store.errors import UnknownName

        if resampling not in get_args(LabelResampling):
            raise UnknownName.of("resampling", resampling, get_args(LabelResampling), "--resampling")
        with Reporter(session, "labels", unit="boxes") as progress:
            report = import_labels(
                cube, source, name=name, kind="values" if values else "classes", attribute=attribute, layer=layer,
                band=band, names=read_names(names), background=background, all_touched=all_touched,
                resampling=cast(LabelResampling, resampling), shifted=shifted, replace=replace,
                on_box=progress.update,
            )  # fmt: skip
        for line in report.warnings:
            session.warn(line)
        state = "" if report.written else ", was there already"
        share = report.labelled / report.pixels
        session.say(f"{report.cube}: label layer {name}, {report.labelled:,} pixels labelled ({share:.1%}){state}")
        for label, facts in report.classes.items():
            session.say(f"  {facts['value']:3} {label:28} {facts['pixels']:,}")
        session.emit(report.to_dict())


def read_names(text: str) -> dict[int, str]:
    """Return the names of --names by value: "10=tree,30=grass".

    Raises:
        InvalidInput: A part of it is not of the form VALUE=NAME, or a value has two names.
    """
    from zarr_store.errors import InvalidInput

    found: dict[int, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        value, given, name = part.partition("=")
        if not given or not value.strip().removeprefix("-").isdecimal() or not name.strip():
            raise InvalidInput(f"--names {part!r}: expected VALUE=NAME, e.g. 10=tree,30=grass")
        if found.setdefault(int(value), name.strip()) != name.strip():
            raise InvalidInput(f"--names gives {int(value)} two names, {found[int(value)]} and {name.strip()}")
    return found
