"""`terrashard stack` puts any raster onto the grid of a cube, as a static layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.options import TRUST, ingest_config
from cli.session import Session, command

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["one_of", "read_nodata", "register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        settings="own",
        extra=TRUST,
        examples=(
            "terrashard stack cube.zarr dem.tif --name dem --unit m",
            "terrashard stack cube.zarr https://example.com/dem/N45E016.tif --name dem",
            "terrashard stack cube.zarr item.json --asset temperature --name temperature --nodata -9999",
            "terrashard stack cube.zarr soil.tif --name soil --classes",
        ),
    )
    def stack(
        session: Session,
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of the cube that gets the layer.")],
        source: Annotated[str, typer.Argument(metavar="SOURCE", help="GeoTIFF or STAC item (.json), path or URL.")],
        name: Annotated[str, typer.Option(metavar="NAME", help="Name of the layer, such as dem.")],
        classes: Annotated[
            bool, typer.Option("--classes", help="The raster holds codes of classes, not numbers.")
        ] = False,
        asset: Annotated[
            str | None, typer.Option(metavar="KEY", help="Asset of a STAC item that has several rasters.")
        ] = None,
        band: Annotated[int, typer.Option(min=1, help="Band to read from a raster.")] = 1,
        resampling: Annotated[
            str,
            typer.Option(
                help="auto, nearest, bilinear or average; for classes nearest or mode. auto is bilinear, or average "
                "where the cube is coarser."
            ),
        ] = "auto",
        nodata: Annotated[
            str | None,
            typer.Option(metavar="N|none", help="Value of pixels without data, where the file does not state it."),
        ] = None,
        scale: Annotated[
            float | None, typer.Option(metavar="S", help="Scale of the numbers: value = number · S + O.")
        ] = None,
        offset: Annotated[float | None, typer.Option(metavar="O", help="Offset of the numbers.")] = None,
        unit: Annotated[str | None, typer.Option(metavar="UNIT", help="Unit of the values, such as m.")] = None,
        shifted: Annotated[
            bool, typer.Option("--shifted", help="Accept a raster that is half a pixel off the cube's pixels.")
        ] = False,
        replace: Annotated[
            bool, typer.Option("--replace", help="Replace a layer of this name that was made from another source.")
        ] = False,
    ) -> None:
        """Put elevation, weather, soil or any other raster onto the grid of a cube, as a layer without dates.

        The raster may have any CRS and pixel size. Networks read the layer as a modality; `terrashard info` lists it,
        and `terrashard verify` checks it.
        """
        from typing import cast, get_args

        from cli.progress import Reporter
        from ingest.labels.rasters import LabelResampling
        from ingest.labels.static_layer import stack_layer

        method = cast(LabelResampling, one_of("resampling", resampling, get_args(LabelResampling)))
        with Reporter(session, "stack", unit="boxes") as progress:
            report = stack_layer(
                cube, source, name=name, kind="classes" if classes else "values", asset=asset, band=band,
                resampling=method, nodata=read_nodata(nodata), scale=scale, offset=offset, unit=unit, shifted=shifted,
                replace=replace, config=ingest_config(session), on_box=progress.update,
            )  # fmt: skip
        for line in report.warnings:
            session.warn(line)
        state = "" if report.written else ", was there already"
        share = report.with_data / report.pixels
        held = ""
        if report.statistics is not None:
            held = f", {report.statistics['least']:.6g} … {report.statistics['most']:.6g} {report.unit}".rstrip()
        session.say(f"{report.cube}: static layer {name}, {share:.1%} of the pixels with data{held}{state}")
        session.say(f"  by {report.resampling} from {report.origin['file']}, SHA-256 {report.origin['sha256'][:12]}")
        session.emit(report.to_dict())


def one_of(what: str, given: str, known: Sequence[str]) -> str:
    """Return the value of an option that takes one of a few names.

    Raises:
        UnknownName: It is none of them.
    """
    from zarr_store.errors import UnknownName

    if given not in known:
        raise UnknownName.of(what, given, known, f"--{what}")
    return given


def read_nodata(text: str | None) -> float | Literal["none"] | None:
    """Return the value of --nodata: a number, "none", or None where it was not given.

    Raises:
        InvalidInput: It is neither a number nor "none".
    """
    from zarr_store.errors import InvalidInput

    if text is None or text.strip().lower() == "none":
        return None if text is None else "none"
    try:
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"--nodata {text!r}: expected a number, or none where every pixel has data") from error
