"""Shared parts of the commands for clusters, components, anomalies and change: workers, and files that GDAL writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cli.session import Session

if TYPE_CHECKING:
    from zarr_store.grid import Grid

__all__ = [
    "add_anomaly_files",
    "add_change_files",
    "add_component_files",
    "add_map_files",
    "export_layer",
    "layer_grid",
    "open_workers",
    "write_rgb",
]

_STRIP = 512


@contextlib.contextmanager
def open_workers(session: Session, dask: str | None, memory: str | None) -> Iterator[tuple[Any, bool]]:
    """Yield the workers that compute blocks, and whether this process writes the results.

    Args:
        session: The running command.
        dask: Address of a Dask scheduler; None for this process, or for the processes of the run that it belongs to.
        memory: Bytes of data that each process keeps between passes, such as "4GB".
    """
    from dask.utils import parse_bytes

    from jaxtrain.parallel.processes import start_distributed
    from jaxtrain.tasks.work import MEMORY, LocalWorkers, ProcessWorkers, keep_blocks
    from zarr_store.errors import InvalidInput

    try:
        kept = MEMORY if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise InvalidInput(f"--memory {memory}: expected a size such as 4GB") from error
    keep_blocks(kept)
    try:
        if dask is not None:
            from cli.dask_blocks import dask_blocks

            with dask_blocks(dask, kept) as workers:
                yield workers, True
            return
        info = start_distributed()
        if info.count > 1:
            yield ProcessWorkers(info.index, info.count), info.is_first
        else:
            yield LocalWorkers(), True
    finally:
        keep_blocks(MEMORY)


def add_map_files(folder: Path, name: str) -> None:
    """Write the map NAME.zarr of a folder of results also as NAME.tif and quicklook.png, in the same folder."""
    from cli.mapping import export_cog
    from cli.picture import draw
    from jaxtrain.inference.maps import is_map, open_map

    made = folder / f"{name}.zarr"
    if is_map(made):
        export_cog(open_map(made), folder / f"{name}.tif")
        draw(str(made), str(folder / "quicklook.png"))


def layer_grid(made: Path) -> Grid | None:
    """Return the grid of the layers of a result; None where they lie on none."""
    from zarr_store.grid import Grid

    transform = layers(made).attrs.get("terrashard_grid")
    return None if transform is None else Grid.from_dict(dict(transform))


def layers(made: Path) -> Any:
    """Open the layers of a result."""
    from jaxtrain.tasks.layers import open_layers

    return open_layers(made)


def export_layer(
    array: Any, grid: Grid, path: Path, *, dtype: str, nodata: float, names: Sequence[str], **more: Any
) -> None:
    """Write a layer (y, x) or (band, y, x) as a cloud-optimised GeoTIFF, in strips of its chunks."""
    from ingest.raster.cog import write_cog

    def strips() -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        for row in range(0, grid.height, _STRIP):
            yield row, 0, np.asarray(array[..., row : row + _STRIP, :])

    write_cog(path, strips(), grid, dtype=dtype, count=len(names), nodata=nodata, descriptions=names, **more)


def write_rgb(path: Path, bands: npt.NDArray[Any]) -> None:
    """Write three float bands (3, y, x) as a picture, each stretched between its 2nd and 98th percentile."""
    import io

    from PIL import Image

    from zarr_store.durable import write_file

    colours = np.zeros((*bands.shape[1:], 3), np.uint8)
    for at, band in enumerate(bands):
        seen = np.isfinite(band)
        if seen.any():
            low, high = np.percentile(band[seen], [2, 98])
            scaled = np.clip((band - low) / max(float(high - low), 1e-12), 0, 1)
            colours[..., at] = np.where(seen, 30 + 225 * np.nan_to_num(scaled), 0).astype(np.uint8)
    made = io.BytesIO()
    Image.fromarray(colours).save(made, "PNG")
    write_file(path, made.getvalue())


def add_component_files(folder: Path, result: Any) -> None:
    """Write the components of a cube as GeoTIFF, and the first three as a picture."""
    made = folder / "components.zarr"
    grid = layer_grid(made)
    if grid is None:
        return
    array: Any = layers(made)["component"]
    count = int(array.shape[0])
    export_layer(array, grid, folder / "components.tif", dtype="float32", nodata=float("nan"),
                 names=[f"component {at + 1}" for at in range(count)])  # fmt: skip
    step = max(1, max(grid.shape) // 1500)
    shown = [0, 1, 2] if count > 2 else [0, 0, 0]
    write_rgb(folder / "quicklook.png", np.stack([np.asarray(array[at, ::step, ::step]) for at in shown]))


def add_anomaly_files(folder: Path, result: Any) -> None:
    """Write the ranked places as GeoParquet and, of a cube, scores and mask as GeoTIFF and picture."""
    made = folder / "anomalies.zarr"
    grid = layer_grid(made)
    write_places(folder / "places.parquet", folder / "thumbnails", result.places, None if grid is None else grid.crs)
    if grid is None:
        return
    arrays = layers(made)
    score: Any = arrays["score"]
    export_layer(score, grid, folder / "score.tif", dtype="float32", nodata=float("nan"), names=["score"])
    export_layer(arrays["mask"], grid, folder / "mask.tif", dtype="uint8", nodata=255, names=["anomaly"],
                 overviews="mode")  # fmt: skip
    step = max(1, max(grid.shape) // 1500)
    seen = np.asarray(score[::step, ::step])
    with np.errstate(invalid="ignore"):
        shade = np.log1p(seen)
        flagged = seen > result.threshold
    # flagged pixels stay red beside the grey of the others
    write_rgb(folder / "quicklook.png", np.stack([shade, *(np.where(flagged, np.nanmin(shade), shade),) * 2]))


def write_places(path: Path, thumbnails: Path, places: Sequence[Any], crs: str | None) -> None:
    """Write places as GeoParquet: boxes in the CRS of the cube, or points in degrees; thumbnails as PNG in a column."""
    import math

    from shapely.geometry import Point, box

    from ingest.request.parquet import write_geoparquet

    names = (
        "rank",
        "score",
        "mean_score",
        "pixels",
        "area_m2",
        "x",
        "y",
        "lon",
        "lat",
        "date",
        "name",
        "row",
        "column",
    )
    pictures = [thumbnails / f"{place.rank:03}.png" for place in places]
    columns: dict[str, list[Any]] = {name: [getattr(place, name) for place in places] for name in names}
    columns["thumbnail"] = [picture.read_bytes() if picture.is_file() else None for picture in pictures]
    outlines = [
        box(*place.box) if crs is not None
        else Point() if math.isnan(place.lon) else Point(place.lon, place.lat)
        for place in places
    ]  # fmt: skip
    write_geoparquet(path, outlines, columns, crs=crs or "OGC:CRS84")


def add_change_files(folder: Path, result: Any) -> None:
    """Write the first break of each pixel as GeoTIFF (date as YYYYMMDD, magnitude and kind) and its date as picture."""
    del result
    made = folder / "change.zarr"
    grid = layer_grid(made)
    assert grid is not None
    arrays = layers(made)
    dates = _FirstDates(arrays["break_date"])
    export_layer(dates, grid, folder / "break_date.tif", dtype="int32", nodata=0, names=["first break, YYYYMMDD"],
                 overviews="mode")  # fmt: skip
    for name, dtype, nodata in (("magnitude", "float32", float("nan")), ("kind", "uint8", 0)):
        export_layer(_First(arrays[name]), grid, folder / f"{name}.tif", dtype=dtype, nodata=nodata,
                     names=[f"{name} of the first break"], overviews="mode")  # fmt: skip
    step = max(1, max(grid.shape) // 1500)
    day = np.asarray(arrays["break_date"][0, ::step, ::step]).astype(np.float32)
    followed = np.asarray(arrays["count"][::step, ::step]) != 255
    day[day == 0] = np.nan
    early = np.nan_to_num(day, nan=float(np.nanmin(day)) - 1 if np.isfinite(day).any() else 0.0)
    write_rgb(folder / "quicklook.png", np.stack([np.where(followed, early, np.nan)] * 3))


class _First:
    """View of an array (break, y, x) that reads the first break as (y, x)."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __getitem__(self, at: Any) -> npt.NDArray[Any]:
        return np.asarray(self.array[(0, *at[1:])])


class _FirstDates(_First):
    """View of dates (break, y, x) that reads the first break as numbers YYYYMMDD, 0 where there is none."""

    def __getitem__(self, at: Any) -> npt.NDArray[Any]:
        days = super().__getitem__(at)
        dates = days.astype("datetime64[D]")
        years = dates.astype("datetime64[Y]").astype(int) + 1970
        months = dates.astype("datetime64[M]").astype(int) % 12 + 1
        day = (dates - dates.astype("datetime64[M]")).astype(int) + 1
        return np.where(days > 0, years * 10_000 + months * 100 + day, 0).astype(np.int32)
