"""`terrashard import` makes a netCDF file a collection, a static layer or labels of a cube."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.session import Session, command

if TYPE_CHECKING:
    from zarr_store.cf import Options

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        examples=(
            "terrashard import s2.nc cube.zarr --collection s2 --bands B02,B03,B04,B08",
            "terrashard import s2_20m.nc cube.zarr --collection s2-20m --bands B05,B11 --mask SCL=3,8,9,10",
            "terrashard import inputs.nc cube.zarr --collection s1 --bands VV,VH --nodata 65535 --decibel 20,-83",
            "terrashard import inputs.nc cube.zarr --layer dem --bands elevation --nodata none --unit m",
            "terrashard import map.nc cube.zarr --labels cropland --bands classification --crs EPSG:32631",
        ),
    )
    def _import(
        session: Session,
        file: Annotated[Path, typer.Argument(metavar="FILE.nc", help="netCDF file, version 3 or 4.")],
        cube: Annotated[str, typer.Argument(metavar="CUBE", help="Path or URL of the cube, which need not exist.")],
        collection: Annotated[
            str | None, typer.Option(metavar="NAME", help="Make the bands a collection of this name, with time.")
        ] = None,
        layer: Annotated[
            str | None, typer.Option(metavar="NAME", help="Make one band a static layer: elevation, weather, soil.")
        ] = None,
        labels: Annotated[
            str | None, typer.Option(metavar="NAME", help="Make one band a label layer, for `data.label`.")
        ] = None,
        bands: Annotated[str, typer.Option(metavar="A,B", help="Bands to take, by the names of the file.")] = "",
        variable: Annotated[
            str | None, typer.Option(metavar="NAME", help="Variable whose bands lie along a dimension.")
        ] = None,
        time: Annotated[
            str | None,
            typer.Option(metavar="NAME|DATE", help="Name of the time dimension; or, for a file without one, its date."),
        ] = None,
        band_dim: Annotated[
            str | None, typer.Option(metavar="NAME", help="Name of the dimension that holds the bands.")
        ] = None,
        x: Annotated[
            str | None, typer.Option("--x", metavar="NAME", help="Name of the x coordinate (columns).")
        ] = None,
        y: Annotated[str | None, typer.Option("--y", metavar="NAME", help="Name of the y coordinate (rows).")] = None,
        crs: Annotated[str | None, typer.Option(metavar="EPSG:N", help="CRS of the coordinates in the file.")] = None,
        nodata: Annotated[
            str | None, typer.Option(metavar="N|none", help="Value of pixels without data; none: all have data.")
        ] = None,
        scale: Annotated[
            float | None, typer.Option(metavar="S", help="Scale of the numbers: value = number · S + O.")
        ] = None,
        offset: Annotated[float | None, typer.Option(metavar="O", help="Offset of the numbers.")] = None,
        unit: Annotated[str | None, typer.Option(metavar="UNIT", help="Unit of the values.")] = None,
        decibel: Annotated[
            str | None, typer.Option(metavar="A,B", help="Value in dB = A · log10(number) + B, as for packed radar.")
        ] = None,
        mask: Annotated[
            str | None,
            typer.Option(metavar="NAME=V,V", help="Class variable to store, and its values that count as masked."),
        ] = None,
        kind: Annotated[
            str,
            typer.Option(help="reflectance (whole numbers as they are), backscatter (float32 values) or auto."),
        ] = "auto",
        profile: Annotated[
            str, typer.Option(metavar="NAME", help="Layout: train, timeseries, archive or fast.")
        ] = "train",
        classes: Annotated[bool, typer.Option("--classes", help="The static layer holds codes of classes.")] = False,
        values: Annotated[bool, typer.Option("--values", help="The labels are numbers, not classes.")] = False,
        names: Annotated[
            str, typer.Option(metavar="1=A,2=B", help="Values and names of classes; others get no class.")
        ] = "",
        replace: Annotated[
            bool, typer.Option("--replace", help="Replace a layer of this name that was made from another source.")
        ] = False,
    ) -> None:
        """Make a netCDF file a collection of a cube (--collection), a static layer (--layer) or labels (--labels).

        Time, bands, grid and nodata are taken from the CF metadata of the file. If these state nothing, or contradict
        each other, the message names the option to add. The same command again continues, or finds nothing to do.
        """
        from cli.labels import read_names
        from cli.stack import one_of, read_nodata
        from zarr_store.cf import Options
        from zarr_store.errors import InvalidInput
        from zarr_store.netcdf import digest_file, open_netcdf

        if sum(one is not None for one in (collection, layer, labels)) != 1:
            raise InvalidInput("state what the file becomes: one of --collection NAME, --layer NAME and --labels NAME")
        options = Options(
            tuple(filter(None, (name.strip() for name in bands.split(",")))), variable, time, band_dim, x, y, crs,
            read_nodata(nodata), scale, offset, unit,
        )  # fmt: skip
        with open_netcdf(file) as dataset:
            source = {"file": file.name, "sha256": digest_file(file)}
            if collection is not None:
                if classes or values or names or replace:
                    raise InvalidInput("--classes, --values, --names and --replace apply to --layer and --labels")
                asked = one_of("kind", kind, ("auto", "reflectance", "backscatter"))
                _collection(session, dataset, cube, collection, options, source, asked, profile, decibel, mask)
                return
            if decibel is not None or mask is not None:
                raise InvalidInput("--decibel and --mask apply to --collection; leave them out")
            as_classes = classes if layer is not None else not values
            _layer(session, dataset, cube, str(layer or labels), options, source, layer is not None, as_classes,
                   read_names(names), replace)  # fmt: skip


def _collection(
    session: Session, dataset: Any, cube: str, name: str, options: Options, source: dict[str, str], kind: Any,
    profile: str, decibel: str | None, mask: str | None,
) -> None:  # fmt: skip
    from cli.progress import Reporter
    from zarr_store.imported import from_xarray

    variable, _, masked = (mask or "").partition("=")
    with Reporter(session, "import", unit="shards") as progress:
        report = from_xarray(
            dataset, cube, collection=name, bands=options.bands, variable=options.variable, time=options.time,
            band_dim=options.band_dim, x=options.x, y=options.y, crs=options.crs, nodata=options.nodata,
            scale=options.scale, offset=options.offset, unit=options.unit, decibel=_pair(decibel),
            mask=variable.strip() or None, masked=_whole(masked), kind=kind, profile=profile, source=source,
            on_shard=progress.update,
        )  # fmt: skip
    times, height, width = report.shape
    session.say(
        f"{report.cube}: collection {name}, {times} times × {len(report.bands)} bands × {height} × {width} px at "
        f"{report.resolution[0]:g} ({report.crs[:40]}), {report.kind}"
    )
    session.say(f"  {report.written} shards written, {report.done_before} were done before")
    session.emit(report.to_dict())


def _layer(
    session: Session, dataset: Any, cube: str, name: str, options: Options, source: dict[str, str], static: bool,
    classes: bool, names: dict[int, str], replace: bool,
) -> None:  # fmt: skip
    from zarr_store.imported import layer_from_xarray
    from zarr_store.labels import LabelLayer

    made, written = layer_from_xarray(
        dataset, cube, name=name, role="layer" if static else "labels", kind="classes" if classes else "values",
        names=names or None, options=options, replace_it=replace, source=source,
    )  # fmt: skip
    stored = made if isinstance(made, LabelLayer) else made.stored
    state = "" if written else ", was there already"
    what = "static layer" if static else "label layer"
    share = stored.labelled / (stored.shape[0] * stored.shape[1])
    session.say(f"{cube}: {what} {name}, {share:.1%} of the pixels with data{state}")
    for label, count in stored.counts.items():
        session.say(f"  {label:28} {count:,}")
    session.emit(
        {"cube": cube, "name": name, "kind": stored.spec.kind, "written": written, "with_data": stored.labelled,
         "counts": dict(stored.counts), "digest": stored.digest, "origin": dict(stored.spec.origin)}
    )  # fmt: skip


def _pair(text: str | None) -> tuple[float, float] | None:
    from zarr_store.errors import InvalidInput

    if text is None:
        return None
    try:
        a, b = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"--decibel {text!r}: expected two numbers, such as 20,-83 or 10,0") from error
    return a, b


def _whole(text: str) -> tuple[int, ...]:
    from zarr_store.errors import InvalidInput

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InvalidInput(f"--mask: expected NAME=V,V with classes 0 … 255, got {text!r}")
    return tuple(map(int, parts))
