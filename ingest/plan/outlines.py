"""Outlines of the scenes of a plan on the cube's grid, for the map of the dashboard and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pyproj import Transformer
from pyproj.exceptions import ProjError

if TYPE_CHECKING:
    from ingest.plan.plan import Plan
    from zarr_store.grid import Grid
    from zarr_store.spec import CubeSpec

__all__ = ["outlines_of"]

_MAX_RINGS = 60
"""Largest number of outlines."""
_POINTS_PER_SIDE = 8


def outlines_of(plan: Plan, spec: CubeSpec) -> list[list[list[float]]]:
    """Return rings around the different rasters of a collection, in shares of the grid's width and height."""
    extents: dict[str, Grid] = {}
    for task in plan.tasks:
        if task.collection != spec.collection:
            continue
        for scene in task.sources:
            if len(extents) < _MAX_RINGS:
                extents.setdefault(f"{scene.extent.crs} {scene.extent.bounds}", scene.extent)
    rings = []
    left, bottom, right, top = spec.grid.bounds
    for extent in extents.values():
        x, y = _ring(extent.bounds)
        if extent.crs != spec.grid.crs:
            try:
                x, y = Transformer.from_crs(extent.crs, spec.grid.crs, always_xy=True).transform(x, y)
            except ProjError:
                continue
        u, v = (np.asarray(x) - left) / (right - left), (top - np.asarray(y)) / (top - bottom)
        if np.isfinite(u).all() and np.isfinite(v).all():
            rings.append(
                [[round(float(a), 4), round(float(b), 4)] for a, b in zip(u.clip(-1, 2), v.clip(-1, 2), strict=True)]
            )
    return rings


def _ring(bounds: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    left, bottom, right, top = bounds
    side = np.linspace(0, 1, _POINTS_PER_SIDE, endpoint=False)
    flat = np.zeros_like(side)
    x = [left + side * (right - left), flat + right, right - side * (right - left), flat + left]
    y = [flat + top, top - side * (top - bottom), flat + bottom, bottom + side * (top - bottom)]
    return np.concatenate(x), np.concatenate(y)
