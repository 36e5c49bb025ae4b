"""A run and a cube become a map and its GeoTIFF; `jaxtrain` and `ingest.raster.cog` meet here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.map_helpers import HelperOptions, fill_elsewhere
from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    from jaxtrain.inference.maps import Map

__all__ = ["class_colours", "export_cog", "run_prediction"]


def run_prediction(
    session: Session,
    run: Path,
    cube: str,
    out: str,
    *,
    cog: Path | None = None,
    time: str | None = None,
    probabilities: bool = False,
    aoi: Path | None = None,
    bbox: str | None = None,
    helpers: HelperOptions | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict with progress on stderr, then write the GeoTIFF if `cog` names one.

    Args:
        session: The running command.
        run: The run directory.
        cube: The cube.
        out: The map.
        cog: GeoTIFF of it.
        time: One date.
        probabilities: Keep the probability of each class.
        aoi: File with polygons that are mapped.
        bbox: Box that is mapped, in degrees.
        helpers: Other processes that fill the map.
        options: Further options of `jaxtrain.predict`.

    Returns:
        The result of `jaxtrain.predict` as JSON, with `cog` and `areas`.
    """
    from cli.area import load_area
    from jaxtrain import predict
    from jaxtrain.inference.opening import share_processor

    if cog is not None:
        _check_target(cog)
    share_processor(run, options.get("devices"))
    with Reporter(session, "predict", unit="batches") as progress:
        result = predict(
            run, cube, out, time=time, probabilities=probabilities, on_batch=progress.update,
            area=load_area(run, cube, aoi=aoi, bbox=bbox),
            elsewhere=fill_elsewhere(session, helpers or {}, progress.update), **options,
        )  # fmt: skip
    for text in result.warnings:
        session.warn(text)
    from cli.products import estimate_map
    from jaxtrain.inference.maps import open_map

    made = open_map(out)
    if cog is not None:
        export_cog(made, cog)
    areas = estimate_map(made, run)
    return {**result.to_dict(), "cog": None if cog is None else str(cog), "areas": areas}


def _check_target(cog: Path) -> None:
    """Refuse a GeoTIFF that could not be written, before minutes of prediction."""
    if cog.suffix.lower() not in (".tif", ".tiff"):
        raise InvalidInput(f"--cog needs a .tif file, got {cog}")
    if cog.is_dir():
        raise InvalidInput(f"--cog {cog} is a folder; name a .tif file in it")


def export_cog(made: Map, path: Path) -> None:
    """Write the classes or values of a map as a COG, in strips of its chunks; a map of each date has a band for each.

    Classes of one date have a colour table and class names, as far as a byte can number them.
    """
    from ingest.raster.cog import write_cog
    from jaxtrain.inference.maps import CHUNK

    layer, kind = ("value" if made.values else "class"), made.kind
    tags = {"terrashard_run": str(made.attributes.get("run", "")),
            "terrashard_step": str(made.attributes.get("step", ""))}  # fmt: skip
    count = len(made.times) or 1

    def strips() -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        for row in range(0, made.grid.height, CHUNK):
            rows = slice(row, min(row + CHUNK, made.grid.height))
            bands = [made.read(layer, rows, time=time) for time in range(count)]
            yield row, 0, np.stack(bands) if count > 1 else bands[0]

    named = count == 1 and kind.dtype(layer) == "uint8"
    names = made.classes.names if made.values else ("class",)
    write_cog(
        path,
        strips(),
        made.grid,
        dtype=kind.dtype(layer),
        count=count,
        nodata=kind.nodata(layer),
        colours=class_colours(made) if named else None,
        class_names=dict(enumerate(made.classes.names)) if named else None,
        descriptions=made.times or names,
        overviews=None if made.values else "mode",
        tags=tags,
        scales=[kind.scale] * count if kind.scale is not None else (),
        statistics=True,
    )


def class_colours(made: Map) -> dict[int, tuple[int, int, int]]:
    """Return class value → (red, green, blue)."""
    return {value: (red, green, blue) for value, (red, green, blue) in enumerate(made.classes.rgb().tolist())}
