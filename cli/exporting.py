"""A slice of a cube becomes a GeoTIFF; only this module reads a cube for `ingest.raster.cog`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store import Cube, open_cube
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.spec import ArraySpec, CubeSpec

__all__ = ["export_slice"]


def export_slice(
    url: str,
    out: Path,
    *,
    collection: str | None = None,
    time: str | None = None,
    bands: str | None = None,
    array: str | None = None,
) -> dict[str, Any]:
    """Write one date of one array as a COG, shard by shard: memory stays at one shard's box and GDAL's cache.

    Args:
        url: The cube.
        out: The GeoTIFF; it appears complete or not at all.
        collection: Collection of the cube; None for its first.
        time: "2023-08-18", or a position; None where the cube has one date.
        bands: "nir,red"; None for all. For the main array only.
        array: Array to write instead of the main one.

    Returns:
        path, collection, array, bands, time, shape, dtype, nodata.

    Raises:
        MissingShard: A shard of that date was never written: a GeoTIFF could not say so.
    """
    from ingest.raster.cog import write_cog

    if out.suffix.lower() not in (".tif", ".tiff") or out.is_dir():
        raise InvalidInput(f"the target must be a .tif file, got {out}")
    cube = open_cube(url)
    name = collection or cube.collections[0]
    spec = cube.spec(name)
    chosen = _pick_array(spec, array)
    main = chosen.name == spec.kind
    if bands and not main:
        raise InvalidInput(f"--bands is for {spec.kind}; array {chosen.name} has none")
    positions = spec.find_bands(bands or "", option="--bands") if main else ()
    names = [spec.band_names[position] for position in positions] if main else [chosen.name]
    t = _pick_time(spec, time)
    flags = _class_names(chosen)
    picked = [spec.bands[position] for position in positions]
    write_cog(
        out,
        _blocks(cube, spec, chosen, t, positions if main else None),
        spec.grid,
        dtype=chosen.dtype,
        count=len(names),
        nodata=chosen.fill,
        class_names=flags,
        descriptions=names,
        # classes take the commonest; a row of the item table must not be averaged
        overviews=("average" if main else "mode" if chosen.dtype == "uint8" else "nearest"),
        tags={"terrashard_collection": name, "terrashard_array": chosen.name, "terrashard_time": spec.times[t]},
        scales=_scales(picked, chosen),
        statistics=True,
    )
    return {
        "path": str(out),
        "collection": name,
        "array": chosen.name,
        "bands": names,
        "time": spec.times[t],
        "shape": list(spec.grid.shape),
        "dtype": chosen.dtype,
        "nodata": None if math.isnan(chosen.fill) else chosen.fill,
    }


def _blocks(
    cube: Cube, spec: CubeSpec, array: ArraySpec, t: int, bands: Sequence[int] | None
) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    for region in spec.shards().values():
        if region.t0 <= t < region.t1:
            box = replace(region, t0=t, t1=t + 1)
            yield box.y0, box.x0, np.ascontiguousarray(cube.read(spec.collection, array.name, box, bands)[0])


def _pick_array(spec: CubeSpec, asked: str | None) -> ArraySpec:
    known = {array.name: array for array in spec.arrays()}
    if asked is not None and asked not in known:
        raise UnknownName.of("array", asked, list(known), f"collection {spec.collection}")
    return known[asked or spec.kind]


def _pick_time(spec: CubeSpec, asked: str | None) -> int:
    if asked is None:
        days = [moment[:10] for moment in spec.times]
        if len(days) == 1:
            return 0
        raise InvalidInput(
            f"collection {spec.collection} has {len(days)} dates and a GeoTIFF holds one; choose it with --time: "
            f"{', '.join(days[:8])}{' …' if len(days) > 8 else ''}"
        )
    return spec.find_time(asked, option="--time")


def _scales(bands: Sequence[Any], array: ArraySpec) -> list[tuple[float, float]]:
    """Return (scale, offset) of each band; an empty list where the stored values are physical."""
    if bands:
        pairs = [(band.scale, band.offset) for band in bands]
    else:
        pairs = [(float(array.attributes.get("index_scale", 1.0)), 0.0)]
    return pairs if any(pair != (1.0, 0.0) for pair in pairs) else []


def _class_names(array: ArraySpec) -> dict[int, str] | None:
    if "flag_values" not in array.attributes:
        return None
    return dict(zip(array.attributes["flag_values"], str(array.attributes["flag_meanings"]).split(), strict=True))
