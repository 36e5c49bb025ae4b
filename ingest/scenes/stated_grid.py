"""The grid that the projection extension of an item states for an asset; metadata, so the file may say otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ingest.scenes.identity import number_of
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid, normal_crs

__all__ = ["first_band", "stated_grid"]

_MAX_SIDE = 1 << 20
"""Longest side of a raster that metadata may state, in pixels."""


def stated_grid(asset: Mapping[str, Any], properties: Mapping[str, Any], where: str, notes: list[str]) -> Grid | None:
    """Return the grid that the projection extension states; None, and a note, if that cannot be used."""
    crs = _crs(asset, properties, where, notes)
    shape, transform, bounds = (
        _numbers(asset.get(name) or properties.get(name)) for name in ("proj:shape", "proj:transform", "proj:bbox")
    )
    if crs is None or len(shape) < 2:
        return None
    height, width = int(shape[0]), int(shape[1])
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        notes.append(f"{where}: proj:shape {shape} is impossible and ignored")
        return None
    if len(transform) >= 6:
        a, b, c, d, e, f = transform[:6]
    elif len(bounds) == 4:  # in the CRS of the file, so it is exact
        left, bottom, right, top = bounds
        a, b, c, d, e, f = (right - left) / width, 0.0, left, 0.0, (bottom - top) / height, top
    else:
        return None
    try:
        return Grid(crs, (a, b, c, d, e, f), (height, width))
    except InvalidInput as error:
        notes.append(f"{where}: {error}")
        return None


def _crs(asset: Mapping[str, Any], properties: Mapping[str, Any], where: str, notes: list[str]) -> str | None:
    for holder in (first_band(asset.get("bands")), asset, properties):
        for name in ("proj:code", "proj:epsg", "proj:wkt2", "proj:projjson"):
            value = holder.get(name)
            if value is None or value == "":
                continue
            try:
                return normal_crs(f"EPSG:{int(value)}" if name == "proj:epsg" else value)
            except (InvalidInput, TypeError, ValueError, OverflowError):
                notes.append(f"{where}: {name} {str(value)[:60]!r} is not a known CRS and is ignored")
    return None


def _numbers(values: object) -> list[float]:
    """Return the values as a list of finite numbers; empty if they are anything else."""
    if not isinstance(values, list | tuple):
        return []
    numbers = [number_of(v) for v in values if isinstance(v, int | float)]
    finite = [v for v in numbers if v is not None and math.isfinite(v)]
    return finite if len(finite) == len(values) else []


def first_band(bands: object) -> Mapping[str, Any]:
    return bands[0] if isinstance(bands, list) and len(bands) >= 1 and isinstance(bands[0], Mapping) else {}
