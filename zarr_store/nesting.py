"""Grids that nest: every pixel of the coarse one is a block of whole pixels of the fine one, over the same ground.

A cube may hold groups of different pixel sizes, for example 10, 20 and 60 m of one sensor. The first collection has the
finest grid. A coarse pixel is then `factor` × `factor` fine ones, and shard (t, y, x) of each group covers the same
ground.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.spec import OVERVIEW_FACTOR, CubeSpec, Layout

__all__ = ["check_nesting", "nested_layouts", "nested_part", "nesting_factor"]

_SAME_PX = 1e-6
"""Largest distance of two edges that coincide, in pixels of the fine grid."""


def nesting_factor(fine: Grid, coarse: Grid) -> int:
    """Return how many pixels of `fine` lie along one side of a pixel of `coarse`, where both cover the same ground.

    Raises:
        InvalidInput: The grids do not nest: CRS, pixel size, edges or extent do not fit.

    Example:
        >>> fine = Grid.from_bounds("EPSG:32633", (600_000, 5_000_000, 605_120, 5_005_120), resolution=10)
        >>> nesting_factor(fine, fine.coarsen(2))
        2
    """
    if coarse.crs != fine.crs:
        raise _refusal(fine, coarse, f"its CRS is {_short(coarse.crs)}, not {_short(fine.crs)}")
    ratios = [theirs / ours for theirs, ours in zip(coarse.resolution, fine.resolution, strict=True)]
    factor = round(ratios[0])
    # a ratio may differ by as little as moves no edge of the grid
    slack = _SAME_PX / max(*coarse.shape, 1)
    if factor < 1 or any(abs(ratio - factor) > slack * factor for ratio in ratios):
        shown = " × ".join(f"{ratio:.6g}" for ratio in dict.fromkeys(ratios))
        raise _refusal(fine, coarse, f"one pixel of it is {shown} pixels of the finest")
    rx, ry = fine.resolution
    right = (coarse.bounds[0] - fine.bounds[0]) / rx
    down = (fine.bounds[3] - coarse.bounds[3]) / ry
    if abs(right) > _SAME_PX * 10 or abs(down) > _SAME_PX * 10:
        raise _refusal(fine, coarse, f"it begins {right:g} pixels right of and {down:g} below the finest")
    if fine.shape != (coarse.height * factor, coarse.width * factor):
        raise _refusal(
            fine, coarse, f"it covers {coarse.height * factor}×{coarse.width * factor} pixels of the finest, which has "
            f"{fine.height}×{fine.width}"
        )  # fmt: skip
    return factor


def nested_layouts(layout: Layout, factors: Sequence[int]) -> dict[int, Layout]:
    """Return a layout for each factor, whose shards cover the same ground.

    The finest shard is a little smaller than that of `layout`, so that all factors divide its side. A chunk is the
    largest part of its shard that is no larger than a chunk of `layout`.

    Args:
        layout: Sizes for a cube of one grid.
        factors: Pixels of the finest grid along one pixel of each group.

    >>> [one.shard[1] for one in nested_layouts(LAYOUTS["train"], (1, 2, 6)).values()]
    [1920, 960, 320]
    """
    common = math.lcm(*factors)
    if common == 1:
        return dict.fromkeys(factors, layout)
    sides = [
        _nested_side(chunk, shard, common) for chunk, shard in zip(layout.chunk[1:], layout.shard[1:], strict=True)
    ]
    found = {}
    for factor in factors:
        shard = [side // factor for side in sides]
        chunk = [_largest_part(side, most) for side, most in zip(shard, layout.chunk[1:], strict=True)]
        found[factor] = replace(
            layout, chunk=(layout.chunk[0], chunk[0], chunk[1]), shard=(layout.shard[0], shard[0], shard[1])
        )
    return found


def nested_part(layout: Layout, finest: Layout, factor: int) -> Layout:
    """Return a layout whose shards cover the ground of those of the finest grid, where a factor allows that.

    Args:
        layout: Sizes to take otherwise.
        finest: Layout of the first collection of the cube.
        factor: Pixels of the finest grid along one pixel.
    """
    sides = finest.shard[1:]
    if any(side % (factor * OVERVIEW_FACTOR) for side in sides):
        return layout
    shard = [side // factor for side in sides]
    chunk = [_largest_part(side, most) for side, most in zip(shard, layout.chunk[1:], strict=True)]
    return replace(layout, chunk=(layout.chunk[0], *chunk), shard=(layout.shard[0], *shard))  # type: ignore[arg-type]


def check_nesting(specs: Sequence[CubeSpec]) -> None:
    """Check that the grids of all collections of a cube nest in that of the first.

    Raises:
        InvalidInput: One does not; the message names both.
    """
    first = specs[0]
    for spec in specs[1:]:
        if spec.grid == first.grid:
            continue
        try:
            nesting_factor(first.grid, spec.grid)
        except InvalidInput as error:
            raise InvalidInput(
                f"collections of a cube share one grid, or grids that nest in that of the first: {spec.collection} has "
                f"{spec.grid}, {first.collection} has {first.grid}: {error}"
            ) from error


def _refusal(fine: Grid, coarse: Grid, why: str) -> InvalidInput:
    return InvalidInput(
        f"the grid {coarse} does not nest in {fine}: {why}. Begin a cube with its finest grid, and put other grids "
        "into another cube"
    )


def _nested_side(chunk: int, shard: int, common: int) -> int:
    """Return a shard side that gives whole overviews for all factors, with as many chunks as the layout has."""
    unit = common * OVERVIEW_FACTOR
    return max(1, chunk // unit) * unit * max(1, shard // chunk)


def _largest_part(side: int, most: int) -> int:
    """Return the largest divisor of a shard side up to `most` that is a multiple of the overview's step."""
    parts = [side // n for n in range(1, side // OVERVIEW_FACTOR + 1) if side % n == 0 and side // n <= most]
    return next((part for part in parts if part % OVERVIEW_FACTOR == 0), OVERVIEW_FACTOR)


def _short(crs: str) -> str:
    return crs.partition("\n")[0][:40]
