"""`TargetGrid`: the grid of a cube, chosen from file headers: its CRS, resolution, lattice and bounds.

Files vote with their pixels, so that most pixels can be copied without resampling. Metadata have no vote where a header
is known, because catalogues are sometimes wrong: a real item states 10 m for a file of 120 m.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pyproj import Transformer
from pyproj.exceptions import ProjError
from shapely.geometry import shape

from ingest.raster.resample import nesting_factor
from ingest.request.config import IngestConfig
from ingest.scenes.footprint import lonlat_box
from zarr_store.errors import InvalidInput
from zarr_store.grid import Bounds, Grid, normal_crs

__all__ = ["Candidate", "TargetGrid", "choose_grid", "pixel_box", "project_bounds", "region_lonlat", "transform_box"]

_MAX_SIDE_PX = 2_000_000
"""Longest side of a grid, in pixels."""
_EDGE_POINTS = 33
"""Number of points along each edge of a box that is transformed."""
_MAX_NEST = 6
"""Largest ratio of pixel sizes that a grid is snapped outward for: 60 m over 10 m."""


@dataclass(frozen=True)
class Candidate:
    """A raster that may lie in the cube: its name (which breaks ties), its grid, and whether it is a data band."""

    name: str
    grid: Grid
    is_data: bool


@dataclass(frozen=True)
class TargetGrid:
    """The chosen grid, with sentences on why it was chosen."""

    grid: Grid
    reasons: tuple[str, ...]


def choose_grid(
    candidates: Sequence[Candidate], config: IngestConfig, *, unseen: Sequence[Grid | Bounds] = ()
) -> TargetGrid:
    """Choose the grid of the cube.

    Args:
        candidates: All rasters of the scenes; at least one.
        config: `crs`, `resolution`, `bbox` and `geometry` override what the files state.
        unseen: Places of scenes of which no file could be opened: a grid from the metadata, or a lon/lat box. They have
            no vote, but the cube reaches them, so that these scenes fit in when they can be read again.

    Raises:
        InvalidInput: No raster has a place in the CRS, or the grid would be too large.
    """
    voters = [c for c in candidates if c.is_data] or list(candidates)
    crs, why_crs = _choose_crs(voters, config)
    inside = [c for c in voters if c.grid.crs == crs]
    resolution, why_resolution = _choose_resolution(inside, voters, crs, config)
    anchor, why_lattice = _choose_anchor(inside)
    snap = _coarsest_nest(candidates, crs, resolution, anchor)
    region = region_lonlat(config)
    if region is None:
        boxes = [box for c in candidates if (box := _place_in(c.grid, crs)) is not None]
        boxes += [box for one in unseen if (box := _place_in(one, crs)) is not None]
        if not boxes:
            raise InvalidInput(f"none of {len(candidates)} rasters has a place in {crs}; give another --crs")
        bounds = _union(boxes)
        why_bounds = f"bounds: union of {len(candidates)} rasters"
        why_bounds += f" and {len(unseen)} scenes without a readable file" if unseen else ""
    else:
        bounds = project_bounds(region, crs)
        why_bounds = f"bounds: {'bbox' if config.selection.bbox else 'geometry'} {_show(region)}"
    sides = ((bounds[2] - bounds[0]) / resolution, (bounds[3] - bounds[1]) / resolution)
    if not all(math.isfinite(side) and side <= _MAX_SIDE_PX for side in sides):
        raise InvalidInput(
            f"the region {_show(region or bounds)} at {resolution:g} per pixel in {crs} is "
            f"{sides[1]:.0f} × {sides[0]:.0f} pixels, more than {_MAX_SIDE_PX} on a side; "
            "give a smaller region, a coarser --resolution or another --crs"
        )
    outer = Grid.from_bounds(crs, bounds, resolution=snap, anchor=anchor)
    grid = Grid.from_bounds(crs, outer.bounds, resolution=resolution, anchor=anchor)
    return TargetGrid(grid, (why_crs, why_resolution, why_lattice, why_bounds))


def _place_in(one: Grid | Bounds, crs: str) -> Bounds | None:
    """The box of a raster in a CRS; None where it has no place there, so that its scene is dropped later."""
    try:
        return transform_box(one, crs) if isinstance(one, Grid) else project_bounds(one, crs)
    except (InvalidInput, ProjError):
        return None


def region_lonlat(config: IngestConfig) -> Bounds | None:
    """(west, south, east, north) of the region, with east above 180 across the antimeridian; None without a region."""
    if config.selection.bbox is not None:
        west, south, east, north = config.selection.bbox
        return (west, south, east + 360.0 if west > east else east, north)
    if config.selection.geometry is not None:
        west, south, east, north = lonlat_box(shape(config.selection.geometry))
        return (west, south, east + 360.0 if west > east else east, north)
    return None


def project_bounds(lonlat: Bounds, crs: str) -> Bounds:
    """The box in `crs` around a lon/lat box; many points along its edges are transformed, as edges are curved there."""
    west, south, east, north = lonlat
    return _transformed_box(Transformer.from_crs("EPSG:4326", crs, always_xy=True), (west, south, east, north), lonlat)


def transform_box(grid: Grid, crs: str) -> Bounds:
    """The box in `crs` around a grid."""
    if grid.crs == crs:
        return grid.bounds
    return _transformed_box(Transformer.from_crs(grid.crs, crs, always_xy=True), grid.bounds, grid.bounds)


def _transformed_box(transformer: Transformer, box: Bounds, shown: Bounds) -> Bounds:
    left, bottom, right, top = box
    x, y = np.linspace(left, right, _EDGE_POINTS), np.linspace(bottom, top, _EDGE_POINTS)
    xs = np.concatenate([x, x, np.full_like(y, left), np.full_like(y, right)])
    ys = np.concatenate([np.full_like(x, bottom), np.full_like(x, top), y, y])
    tx, ty = (np.asarray(values, np.float64) for values in transformer.transform(xs, ys))
    good = np.isfinite(tx) & np.isfinite(ty)
    if not good.any():
        raise InvalidInput(f"the box {_show(shown)} has no place in the target CRS; give another --crs")
    return (float(tx[good].min()), float(ty[good].min()), float(tx[good].max()), float(ty[good].max()))


def _choose_crs(voters: Sequence[Candidate], config: IngestConfig) -> tuple[str, str]:
    votes: dict[str, int] = defaultdict(int)
    for voter in voters:
        votes[voter.grid.crs] += voter.grid.height * voter.grid.width
    total = sum(votes.values())
    if config.grid.crs is not None:
        crs = normal_crs(config.grid.crs)
        return crs, f"CRS {crs}: as asked; {votes.get(crs, 0) / total:.0%} of the source pixels are in it"
    crs = min(votes, key=lambda name: (-votes[name], name))
    others = ", ".join(sorted(name for name in votes if name != crs))
    return crs, f"CRS {crs}: {votes[crs] / total:.0%} of the source pixels" + (f"; also {others}" if others else "")


def _choose_resolution(
    inside: Sequence[Candidate], voters: Sequence[Candidate], crs: str, config: IngestConfig
) -> tuple[float, str]:
    if config.grid.resolution is not None:
        return config.grid.resolution, f"resolution {config.grid.resolution:g}: as asked"
    if inside:
        finest = min(max(c.grid.resolution) for c in inside)
        return finest, f"resolution {finest:g}: the finest in the file headers"
    metres = min(max(c.grid.resolution) / c.grid.units_per_metre for c in voters)
    per_metre = Grid(crs, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (1, 1)).units_per_metre
    # two significant digits: a degree is no whole number of metres anyway
    value = float(f"{metres * per_metre:.2g}") if per_metre != 1.0 else metres
    return value, f"resolution {value:g}: {metres:g} m, the finest in the file headers, in units of {crs}"


def _choose_anchor(inside: Sequence[Candidate]) -> tuple[tuple[float, float], str]:
    if not inside:
        return (0.0, 0.0), "lattice: origin of the CRS, as no source is in it"
    finest = min(max(c.grid.resolution) for c in inside)
    votes: dict[tuple[float, float], int] = defaultdict(int)
    corners: dict[tuple[float, float], list[tuple[str, float, float]]] = defaultdict(list)
    for candidate in inside:
        if max(candidate.grid.resolution) != finest:
            continue
        rx, ry = candidate.grid.resolution
        left, _, _, top = candidate.grid.bounds
        phase = (round(left / rx % 1.0, 4) % 1.0, round(top / ry % 1.0, 4) % 1.0)
        votes[phase] += candidate.grid.height * candidate.grid.width
        corners[phase].append((candidate.name, left, top))
    phase = min(votes, key=lambda p: (-votes[p], p))
    _, left, top = min(corners[phase])
    share = votes[phase] / sum(votes.values())
    others = "" if len(votes) == 1 else f"; {len(votes) - 1} other lattice(s) will be resampled"
    return (
        left,
        top,
    ), f"lattice: corner ({left:.10g}, {top:.10g}), shared by {share:.0%} of the pixels at {finest:g}{others}"


def _coarsest_nest(candidates: Sequence[Candidate], crs: str, resolution: float, anchor: tuple[float, float]) -> float:
    """The largest pixel size that holds whole target pixels, so that coarse bands begin and end at the grid's edge."""
    target = Grid(crs, (resolution, 0.0, anchor[0], 0.0, -resolution, anchor[1]), (1, 1))
    snap = resolution
    for candidate in candidates:
        factor = nesting_factor(candidate.grid, target)
        if 1 < factor <= _MAX_NEST and candidate.grid.crs == crs:
            size = candidate.grid.resolution[0]
            on_anchor = nesting_factor(candidate.grid, Grid(crs, (size, 0.0, anchor[0], 0.0, -size, anchor[1]), (1, 1)))
            snap = max(snap, size) if on_anchor else snap
    return snap


def _union(boxes: Iterable[Bounds]) -> Bounds:
    array = np.array(list(boxes))
    left, bottom = array[:, :2].min(axis=0)
    right, top = array[:, 2:].max(axis=0)
    return (float(left), float(bottom), float(right), float(top))


def _show(box: Bounds) -> str:
    # coordinates of a projection are metres and shown in full; degrees need at most six decimal places
    return "(" + ", ".join(f"{round(value, 6):.12g}" for value in box) + ")"


def pixel_box(source: Grid, target: Grid) -> tuple[int, int, int, int] | None:
    """(row0, row1, col0, col1) of the target pixels that `source` may reach; None where it reaches none."""
    try:
        left, bottom, right, top = transform_box(source, target.crs)
    except (InvalidInput, ProjError):  # the source has no place in the CRS of the target
        return None
    (rx, ry), (x0, _, _, y1) = target.resolution, target.bounds
    slack = 0.0 if source.crs == target.crs else 2.0  # edges are curves between the points that were transformed
    rows = (math.floor((y1 - top) / ry - slack + 1e-6), math.ceil((y1 - bottom) / ry + slack - 1e-6))
    cols = (math.floor((left - x0) / rx - slack + 1e-6), math.ceil((right - x0) / rx + slack - 1e-6))
    row0, row1 = max(0, rows[0]), min(target.height, rows[1])
    col0, col1 = max(0, cols[0]), min(target.width, cols[1])
    return (row0, row1, col0, col1) if row1 > row0 and col1 > col0 else None
