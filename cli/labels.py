"""`terrashard labels`: a raster or polygons become a label layer of a cube."""

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
            "terrashard labels berlin.zarr landuse.gpkg --name landuse --attribute fclass",
            "terrashard labels cube.zarr worldcover.tif --name landcover --names 10=tree,30=grass,40=crop,50=built",
            "terrashard labels cube.zarr biomass.tif --name biomass --values",
        ),
    )
    def labels(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="The cube whose ground is labelled.")],
        source: Annotated[
            Path,
            typer.Argument(
                metavar="SOURCE", help="GeoTIFF, or polygons: GeoJSON, GeoPackage, GeoParquet, FlatGeobuf, shapefile."
            ),
        ],
        name: Annotated[str, typer.Option(metavar="NAME", help="Of the layer; what `data.label` names.")] = "labels",
        values: Annotated[
            bool, typer.Option("--values", help="Numbers to be learnt as they are, not classes.")
        ] = False,
        attribute: Annotated[
            str | None, typer.Option(metavar="FIELD", help="Of polygons: which attribute is the class or number.")
        ] = None,
        layer: Annotated[str | None, typer.Option(help="Of a vector file with several layers.")] = None,
        band: Annotated[int, typer.Option(min=1, help="Of a raster.")] = 1,
        names: Annotated[
            str, typer.Option(metavar="1=A,2=B", help="Of a class raster: values and names; others are no label.")
        ] = "",
        background: Annotated[
            str | None, typer.Option(metavar="NAME", help="A class for what no polygon holds; else it has no label.")
        ] = None,
        all_touched: Annotated[
            bool, typer.Option("--all-touched", help="A polygon has each pixel it touches, not only by its centre.")
        ] = False,
        resampling: Annotated[
            str, typer.Option(help="Of a raster: auto, nearest, mode; of values also average, bilinear.")
        ] = "auto",
        shifted: Annotated[
            bool, typer.Option("--shifted", help="Take a raster that lies half a pixel off the cube's pixels.")
        ] = False,
        replace: Annotated[
            bool, typer.Option("--replace", help="Replace a layer of this name that comes from something else.")
        ] = False,
    ) -> None:
        """Put labels from outside onto a cube's grid, so that a network can learn them (`data.label`).

        A raster may have any CRS and pixel size: classes come from the nearest pixel, or the most frequent one where
        the cube is coarser. Polygons have the pixels whose centre they hold; where two overlap, the smaller one counts.
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
                band=band, names=_names(names), background=background, all_touched=all_touched,
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


def _names(text: str) -> dict[int, str]:
    from zarr_store.errors import InvalidInput

    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        value, given, name = part.partition("=")
        if not given or not value.strip().isdecimal() or not name.strip():
            raise InvalidInput(f"--names {part!r}: expected VALUE=NAME, e.g. 10=tree,30=grass")
        found[int(value)] = name.strip()
    return found
