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
from zarr_store.crs import transformer_between
from zarr_store.errors import InvalidInput
from zarr_store.grid import Bounds, Grid, check_pixel_size, normal_crs
from zarr_store.ground import ground_scale, turn_of, turned_near

__all__ = [
    "Candidate",
    "TargetGrid",
    "box_of_pixels",
    "choose_grid",
    "doubt_resolution",
    "pixel_box",
    "project_bounds",
    "region_lonlat",
    "transform_box",
]

Size = tuple[float, float]
"""Size of a pixel (x, y), in units of the CRS."""
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
        # the files of a tile share a grid on every date
        places = dict.fromkeys((*(c.grid for c in candidates), *unseen))
        boxes = [box for one in places if (box := _place_in(one, crs)) is not None]
        if not boxes:
            raise InvalidInput(f"none of {len(candidates)} rasters has a place in {crs}; give another --crs")
        bounds = _union(_gathered(boxes, turn_of(crs)))
        why_bounds = f"bounds: union of {len(candidates)} rasters"
        why_bounds += f" and {len(unseen)} scenes without a readable file" if unseen else ""
    else:
        bounds = project_bounds(region, crs)
        why_bounds = f"bounds: {'bbox' if config.selection.bbox else 'geometry'} {_show(region)}"
    sides = ((bounds[2] - bounds[0]) / resolution[0], (bounds[3] - bounds[1]) / resolution[1])
    if not all(math.isfinite(side) and side <= _MAX_SIDE_PX for side in sides):
        raise InvalidInput(
            f"the region {_show(region or bounds)} at {_size(resolution)} per pixel in {crs} is "
            f"{sides[1]:.0f} × {sides[0]:.0f} pixels, more than {_MAX_SIDE_PX} on a side; "
            "give a smaller region, a coarser --resolution or another --crs"
        )
    outer = Grid.from_bounds(crs, bounds, resolution=snap, anchor=anchor)
    grid = Grid.from_bounds(crs, outer.bounds, resolution=resolution, anchor=anchor)
    return TargetGrid(grid, (why_crs, why_resolution, why_lattice, why_bounds))


_ODD_RATIO = 50.0
"""Ratio of the pixels that were asked for to the finest of the files from which on the plan reports it."""


def _place_in(one: Grid | Bounds, crs: str) -> Bounds | None:
    """Return the box of a raster in a CRS; None where it has no place there, so that its scene is dropped later."""
    try:
        return transform_box(one, crs) if isinstance(one, Grid) else project_bounds(one, crs)
    except (InvalidInput, ProjError):
        return None


def region_lonlat(config: IngestConfig) -> Bounds | None:
    """Return (west, south, east, north) of the region, or None; east is above 180 across the antimeridian."""
    if config.selection.bbox is not None:
        west, south, east, north = config.selection.bbox
        return (west, south, east + 360.0 if west > east else east, north)
    if config.selection.geometry is not None:
        west, south, east, north = lonlat_box(shape(config.selection.geometry))
        return (west, south, east + 360.0 if west > east else east, north)
    return None


def project_bounds(lonlat: Bounds, crs: str) -> Bounds:
    """Return the box in `crs` around a lon/lat box; edges become curves, so many points of them are transformed."""
    west, south, east, north = lonlat
    to_crs = transformer_between("EPSG:4326", crs)
    return _transformed_box(to_crs, (west, south, east, north), lonlat, turn_of(crs))


def transform_box(grid: Grid, crs: str) -> Bounds:
    """Return the box in `crs` around a grid."""
    if grid.crs == crs:
        return grid.bounds
    to_crs = transformer_between(grid.crs, crs)
    return _transformed_box(to_crs, grid.bounds, grid.bounds, turn_of(crs))


def _transformed_box(transformer: Transformer, box: Bounds, shown: Bounds, turn: float) -> Bounds:
    left, bottom, right, top = box
    x, y = np.linspace(left, right, _EDGE_POINTS), np.linspace(bottom, top, _EDGE_POINTS)
    xs = np.concatenate([x, x, np.full_like(y, left), np.full_like(y, right)])
    ys = np.concatenate([np.full_like(x, bottom), np.full_like(x, top), y, y])
    tx, ty = (np.asarray(values, np.float64) for values in transformer.transform(xs, ys))
    good = np.isfinite(tx) & np.isfinite(ty)
    if not good.any():
        raise InvalidInput(f"the box {_show(shown)} has no place in the target CRS; give another --crs")
    tx, ty = tx[good], ty[good]
    if turn and np.ptp(tx) > turn / 2:  # a box across the antimeridian is not all around the Earth
        middle = transformer.transform((left + right) / 2.0, (bottom + top) / 2.0)[0]
        moved = turned_near(tx, float(middle), turn) if math.isfinite(middle) else tx
        tx = moved if np.ptp(moved) <= turn / 2 else tx
    return (float(tx.min()), float(ty.min()), float(tx.max()), float(ty.max()))


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
) -> tuple[Size, str]:
    if config.grid.resolution is not None:
        check_pixel_size(crs, config.grid.resolution)
        asked = config.grid.resolution
        return (asked, asked), f"resolution {asked:g}: as asked"
    if inside:
        finest = _finest(inside)
        return finest, f"resolution {_size(finest)}: the finest in the file headers"
    metres = min(_pixel_m(c.grid) for c in voters)
    per_metre = Grid(crs, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (1, 1)).units_per_metre
    # two significant digits: a degree is no whole number of metres anyway
    value = float(f"{metres * per_metre:.2g}") if per_metre != 1.0 else metres
    return (value, value), f"resolution {value:g}: {metres:g} m, the finest in the file headers, in units of {crs}"


def doubt_resolution(grid: Grid, candidates: Sequence[Candidate], config: IngestConfig) -> list[str]:
    """Return a sentence for the plan where the requested pixels are very much larger or smaller than the files'."""
    if config.grid.resolution is None or not candidates:
        return []
    asked, finest = _pixel_m(grid), min(_pixel_m(c.grid) for c in candidates)
    if 1.0 / _ODD_RATIO < asked / finest < _ODD_RATIO:
        return []
    return [
        f"resolution {config.grid.resolution:g} is in units of {grid.crs[:40]}: a pixel is {asked:g} m wide on the "
        f"ground, and {finest:g} m in the files; the grid has {grid.height}×{grid.width} pixels"
    ]


def _choose_anchor(inside: Sequence[Candidate]) -> tuple[tuple[float, float], str]:
    if not inside:
        return (0.0, 0.0), "lattice: origin of the CRS, as no source is in it"
    finest = _finest(inside)
    votes: dict[tuple[float, float], int] = defaultdict(int)
    corners: dict[tuple[float, float], list[tuple[str, float, float]]] = defaultdict(list)
    for candidate in inside:
        if candidate.grid.resolution != finest:
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
    ), f"lattice: corner ({left:.10g}, {top:.10g}), shared by {share:.0%} of the pixels at {_size(finest)}{others}"


def _finest(inside: Sequence[Candidate]) -> Size:
    """Return the pixel size of the finest rasters, by the area of a pixel; pixels need not be square."""
    return min((c.grid.resolution for c in inside), key=lambda size: (size[0] * size[1], max(size), size))


def _pixel_m(grid: Grid) -> float:
    """Return the longer side of a pixel on the ground, in metres."""
    (rx, ry), (mx, my) = grid.resolution, ground_scale(grid)
    metres = max(rx * mx, ry * my)
    # where units shrink with the latitude the length is no round number, and means one
    return metres if mx == my == 1.0 / grid.units_per_metre else float(f"{metres:.2g}")


def _size(size: Size) -> str:
    return f"{size[0]:g}" if size[0] == size[1] else f"{size[0]:g}×{size[1]:g}"


def _coarsest_nest(candidates: Sequence[Candidate], crs: str, resolution: Size, anchor: tuple[float, float]) -> Size:
    """Return the largest pixel size that holds whole target pixels, so that coarse bands end at the grid's edge."""
    target = Grid(crs, (resolution[0], 0.0, anchor[0], 0.0, -resolution[1], anchor[1]), (1, 1))
    snap = resolution
    for candidate in candidates:
        factor = nesting_factor(candidate.grid, target)
        if 1 < factor <= _MAX_NEST and candidate.grid.crs == crs:
            size = candidate.grid.resolution
            coarse = Grid(crs, (size[0], 0.0, anchor[0], 0.0, -size[1], anchor[1]), (1, 1))
            on_anchor = nesting_factor(candidate.grid, coarse)
            snap = max(snap, size) if on_anchor else snap
    return snap


def _gathered(boxes: Sequence[Bounds], turn: float) -> Sequence[Bounds]:
    """Return the boxes, moved by whole turns to one side of their widest gap if that brings them together."""
    array = np.array(boxes)
    if not turn or array[:, 2].max() - array[:, 0].min() <= turn / 2:
        return boxes
    order = sorted(boxes, key=lambda one: one[0])
    reach = list(np.maximum.accumulate([one[2] for one in order]))
    gaps = [order[n][0] - reach[n - 1] for n in range(1, len(order))]
    if not gaps or max(gaps) <= order[0][0] + turn - reach[-1]:
        return boxes
    first = gaps.index(max(gaps)) + 1  # the boxes west of the gap come after those east of it
    return [*order[first:], *((left + turn, low, right + turn, high) for left, low, right, high in order[:first])]


def _union(boxes: Iterable[Bounds]) -> Bounds:
    array = np.array(list(boxes))
    left, bottom = array[:, :2].min(axis=0)
    right, top = array[:, 2:].max(axis=0)
    return (float(left), float(bottom), float(right), float(top))


def _show(box: Bounds) -> str:
    # coordinates of a projection are metres and shown in full; degrees need at most six decimal places
    return "(" + ", ".join(f"{round(value, 6):.12g}" for value in box) + ")"


def pixel_box(source: Grid, target: Grid) -> tuple[int, int, int, int] | None:
    """Return (row0, row1, col0, col1) of the target pixels that `source` may reach; None where it reaches none."""
    try:
        box = transform_box(source, target.crs)
    except (InvalidInput, ProjError):  # the source has no place in the CRS of the target
        return None
    return box_of_pixels(box, source.crs, target)


def box_of_pixels(box: Bounds, crs: str, target: Grid) -> tuple[int, int, int, int] | None:
    """Return (row0, row1, col0, col1) of the target pixels in a box; None where there are none.

    Args:
        box: (left, bottom, right, top) in the CRS of the target, as `transform_box` gives it.
        crs: The CRS that the box was transformed from.
        target: Grid whose pixels are meant; it may lie a whole turn of the Earth away.
    """
    left, bottom, right, top = box
    (rx, ry), (x0, _, x1, y1) = target.resolution, target.bounds
    if turn := turn_of(target.crs):
        turns = round(((x0 + x1) - (left + right)) / 2.0 / turn) * turn
        left, right = left + turns, right + turns
    slack = 0.0 if crs == target.crs else 2.0  # edges are curves between the points that were transformed
    rows = (math.floor((y1 - top) / ry - slack + 1e-6), math.ceil((y1 - bottom) / ry + slack - 1e-6))
    cols = (math.floor((left - x0) / rx - slack + 1e-6), math.ceil((right - x0) / rx + slack - 1e-6))
    row0, row1 = max(0, rows[0]), min(target.height, rows[1])
    col0, col1 = max(0, cols[0]), min(target.width, cols[1])
    return (row0, row1, col0, col1) if row1 > row0 and col1 > col0 else None
