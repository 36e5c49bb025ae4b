"""Layers of results on the grid of a cube, as Zarr v3 that xarray, rioxarray and GDAL read.

Chunks are not sharded and carry zstd's own checksum, as in maps, because GDAL before 3.13 reads neither shards nor
crc32c.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from zarr_store.georeference import georeference, write_axes
from zarr_store.grid import Grid

__all__ = ["Layer", "create_layers", "open_layers"]

_CHUNK = 512


@dataclass(frozen=True)
class Layer:
    """One array on the grid.

    Attributes:
        dtype: Its type.
        fill: Value where there is none.
        first: Name and length of a dimension before (y, x); None for none.
        attributes: JSON.
    """

    dtype: str
    fill: float
    first: tuple[str, int] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def create_layers(
    path: Path, grid: Grid, layers: Mapping[str, Layer], *, times: tuple[str, ...] = (), attributes: Mapping[str, Any]
) -> zarr.Group:
    """Create the arrays of a result; their pixels are written in any order, best in whole chunks.

    Args:
        path: The Zarr group; nothing is there.
        grid: Grid of the cube.
        layers: Arrays by name.
        times: ISO times of a dimension `time`, if a layer has one.
        attributes: JSON: what made it.
    """
    group = zarr.create_group(str(path), attributes={
        "Conventions": "CF-1.11", **georeference(grid.to_dict(), grid.bounds, grid.wkt),
        "terrashard_grid": grid.to_dict(), **attributes,
    })  # fmt: skip
    for name, layer in layers.items():
        before = () if layer.first is None else (layer.first[1],)
        fill: Any = np.nan if np.isnan(layer.fill) else np.dtype(layer.dtype).type(layer.fill)
        group.create_array(
            name,
            shape=(*before, *grid.shape),
            chunks=(*(1 for _ in before), *(min(_CHUNK, side) for side in grid.shape)),
            dtype=layer.dtype,
            fill_value=fill,
            compressors=[ZstdCodec(level=3, checksum=True)],
            dimension_names=(*(() if layer.first is None else (layer.first[0],)), "y", "x"),
            attributes={**layer.attributes, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
        )
    if times:
        seconds = np.array([time.removesuffix("Z") for time in times], "datetime64[s]").astype(np.int64)
        about: dict[str, Any] = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}
        array = group.create_array("time", shape=seconds.shape, chunks=seconds.shape, dtype="int64",
                                   dimension_names=("time",), attributes=about)  # fmt: skip
        array[...] = seconds
    write_axes(group, grid)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(str(path))
    return open_layers(path, mode="r+")


def open_layers(path: Path, mode: Any = "r") -> zarr.Group:
    """Open the arrays that `create_layers` has made."""
    return zarr.open_group(str(path), mode=mode, use_consolidated=False)


def read_rows(group: zarr.Group, name: str, rows: slice) -> npt.NDArray[Any]:
    """Read rows of one layer, (…, row, x)."""
    array: Any = group[name]
    return np.asarray(array[..., rows, :])
