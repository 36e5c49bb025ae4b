"""`parcels` makes field parcels: blocks of farmland, each with its direction, cut into strips of one crop each.

Blocks are the Voronoi cells of jittered lattice points (Worley 1996, doi:10.1145/237170.237267); lanes run along
their borders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ingest.simulate.noise import F32, mix, smooth, uniform
from zarr_store.grid import Grid

__all__ = ["Parcels", "parcels"]


@dataclass(frozen=True)
class Parcels:
    """Field parcels in one window, arrays of its shape.

    Attributes:
        crop: Index of the crop, 0 … 3.
        pick: Uniform [0, 1) per parcel, which picks meadows and small woods.
        shade: Uniform [0, 1) per parcel, independent of `pick`.
        margin: Share of the pixel under field margin or lane, 0 … 1.
    """

    crop: npt.NDArray[np.uint8]
    pick: F32
    shade: F32
    margin: F32


def parcels(key: int, grid: Grid, scale: float, *, origin: tuple[float, float]) -> Parcels:
    """Evaluate the parcels in `grid`.

    Args:
        key: Stream of noise.
        grid: Window to fill.
        scale: Factor that shrinks parcels in small worlds.
        origin: A point (x, y) near the world, the same for all its windows.
    """
    side = 1250.0 * scale
    # bent coordinates, so that field borders are no straight lines; float32 is exact to a millimetre after the shift
    x0, y0 = origin
    u = (grid.x() - x0).astype(np.float32)[None, :] + np.float32(90 * scale) * smooth(key + 1, grid, 1500.0 * scale)
    v = (grid.y() - y0).astype(np.float32)[:, None] + np.float32(90 * scale) * smooth(key + 2, grid, 1500.0 * scale)
    first, second, row, col, near_u, near_v = _nearest(key + 3, u, v, side)

    block = mix(row, col, key + 4)
    angle = uniform(block) * np.float32(np.pi)
    # neighbouring blocks keep to the same two directions in places, as consolidated farmland does
    cos, sin = np.cos(angle), np.sin(angle)
    along = near_u * cos + near_v * sin
    across = near_v * cos - near_u * sin
    length = np.float32(scale) * (np.float32(260) + np.float32(340) * uniform(block, 1))
    width = np.float32(scale) * (np.float32(85) + np.float32(130) * uniform(block, 2) ** 2)
    step = np.floor(along / length)
    # each row of strips is shifted against the one before
    across = across + width * np.float32(0.37) * step
    strip = np.floor(across / width)
    parcel = mix(step.astype(np.int64) + (block >> np.uint64(40)).astype(np.int64), strip.astype(np.int64), key + 5)

    to_edge = np.minimum(
        _to_whole(across / width) * width,
        _to_whole(along / length) * length,
    )
    to_lane = (second - first) * np.float32(0.5)
    half = np.float32(grid.resolution[0] / 2)
    # a 4 m margin between parcels, a 9 m lane between blocks, as shares of the pixel they cross
    margin = np.maximum(_cover(to_edge, np.float32(2.0 * scale), half), _cover(to_lane, np.float32(4.5 * scale), half))
    # shares: cereals 40 %, maize 25 %, rapeseed 15 %, soy 20 %
    crop = np.searchsorted(np.array([0.4, 0.65, 0.8], np.float32), uniform(parcel, 2)).astype(np.uint8)
    return Parcels(crop=crop, pick=uniform(parcel), shade=uniform(parcel, 1), margin=margin)


def _cover(distance: F32, half_width: np.float32, half_pixel: np.float32) -> F32:
    """Compute the share of a pixel that a line of ± `half_width`, at `distance` from its centre, covers."""
    inside = np.clip((half_width + half_pixel - distance) / (2 * half_pixel), 0.0, 1.0)
    share: F32 = np.minimum(inside, half_width / half_pixel).astype(np.float32)
    return share


def _to_whole(value: F32) -> F32:
    """Compute the distance to the nearest whole number."""
    part = value - np.floor(value)
    near: F32 = np.minimum(part, np.float32(1) - part)
    return near


def _nearest(
    key: int, u: F32, v: F32, side: float
) -> tuple[F32, F32, npt.NDArray[np.int64], npt.NDArray[np.int64], F32, F32]:
    """Find the jittered lattice point that is nearest to each (u, v).

    Returns:
        Distance to the nearest and to the second, the lattice row and column of the nearest, and (u, v) relative to it.
    """
    pu, pv = u * np.float32(1 / side), v * np.float32(1 / side)
    cu, cv = np.floor(pu).astype(np.int32), np.floor(pv).astype(np.int32)
    i0, j0 = int(cu.min()) - 1, int(cv.min()) - 1
    width = int(cu.max()) - i0 + 2
    rows = np.arange(j0, int(cv.max()) + 2, dtype=np.int64)[:, None]
    cols = np.arange(i0, i0 + width, dtype=np.int64)[None, :]
    bits = mix(rows, cols, key)
    point_u = (cols + np.float32(0.15) + np.float32(0.7) * uniform(bits)).astype(np.float32).ravel()
    point_v = (rows + np.float32(0.15) + np.float32(0.7) * uniform(bits, 1)).astype(np.float32).ravel()
    home = (cv - j0) * width + (cu - i0)
    first = np.full(u.shape, 9.0, np.float32)
    second = np.full(u.shape, 9.0, np.float32)
    best = np.zeros(u.shape, np.int32)
    for dj in (-1, 0, 1):
        for di in (-1, 0, 1):
            index = home + (dj * width + di)
            du, dv = pu - np.take(point_u, index), pv - np.take(point_v, index)
            far = du * du + dv * dv
            closer = far < first
            second = np.where(closer, first, np.minimum(second, far))
            first = np.where(closer, far, first)
            best = np.where(closer, index, best)
    size = np.float32(side)
    near_u, near_v = (pu - np.take(point_u, best)) * size, (pv - np.take(point_v, best)) * size
    row = (best // width).astype(np.int64) + j0
    col = (best % width).astype(np.int64) + i0
    return np.sqrt(first) * size, np.sqrt(second) * size, row, col, near_u, near_v
