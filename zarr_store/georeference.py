"""Write the georeference of a group of arrays as xarray, rioxarray, GDAL and GeoZarr readers understand it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import zarr
from pyproj import CRS
from zarr.codecs import ZstdCodec

from zarr_store.conventions import list_conventions
from zarr_store.grid import Grid

__all__ = ["georeference", "write_axes"]


def georeference(
    grid: Mapping[str, Any], bounds: Sequence[float], wkt: str, *, dims: tuple[str, str] = ("y", "x")
) -> dict[str, Any]:
    """Return the GeoZarr attributes `proj:` and `spatial:` of a group on `grid` (crs, transform, shape).

    Args:
        grid: JSON form of the grid.
        bounds: Its left, bottom, right and top.
        wkt: Its CRS.
        dims: Names of the dimensions of rows and columns.
    """
    crs = str(grid["crs"])
    return {
        "zarr_conventions": list_conventions("proj", "spatial"),
        ("proj:code" if crs.startswith("EPSG:") else "proj:wkt2"): crs if crs.startswith("EPSG:") else wkt,
        "spatial:dimensions": list(dims),
        "spatial:transform": list(grid["transform"]),
        "spatial:shape": list(grid["shape"]),
        "spatial:bbox": list(bounds),
    }


def write_axes(group: zarr.Group, grid: Grid, *, dims: tuple[str, str] = ("y", "x")) -> None:
    """Write pixel centres `y` and `x`, or by the names of `dims`, and `spatial_ref` as CF and GDAL define it."""
    crs = CRS(grid.crs)
    if crs.is_geographic:
        axes = {"x": ("longitude", "degrees_east"), "y": ("latitude", "degrees_north")}
    else:
        axes = {"x": ("projection_x_coordinate", "m"), "y": ("projection_y_coordinate", "m")}
    for axis, name, values in (("y", dims[0], grid.y()), ("x", dims[1], grid.x())):
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, dimension_names=(name,),
            compressors=[ZstdCodec(checksum=True)],
            attributes={"standard_name": axes[axis][0], "units": axes[axis][1]},
        )  # fmt: skip
        array[...] = values
    a, _, c, _, e, f = grid.transform
    group.create_array("spatial_ref", shape=(), dtype="int64", attributes={
        **crs.to_cf(),
        "crs_wkt": grid.wkt,
        "spatial_ref": grid.wkt,
        "GeoTransform": f"{c!r} {a!r} 0.0 {f!r} 0.0 {e!r}",
    })  # fmt: skip
