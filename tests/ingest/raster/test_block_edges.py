"""Coarser pixels get the values of the pixels under them and of no others, also where edges differ by rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ingest.raster.resample import place
from zarr_store.grid import Grid

SIDE = 240
# of the corner, in pixels of 30 m: a third of a pixel is no decimal number
CORNERS = {"metres": ("EPSG:32633", 600_000.0, 5_002_400.0, 10.0), "degrees": ("EPSG:4326", 16.0001, 45.9002, 1e-4)}


def coarse(pixels: np.ndarray, ratio: int, kernel: str, where: str, *, exact: bool = True) -> np.ndarray:
    """Pixels on a grid of `ratio` times larger ones that begins with them."""
    crs, left, top, size = CORNERS[where]
    source = Grid(crs, (size, 0.0, left, 0.0, -size, top), pixels.shape)
    side = pixels.shape[0] // ratio
    target = Grid(crs, (size * ratio, 0.0, left, 0.0, -size * ratio, top), (side, side))

    def read(row: int, col: int, height: int, width: int, into: Any = None) -> np.ndarray:
        return pixels[row : row + height, col : col + width]

    nodata = np.nan if pixels.dtype.kind == "f" else 0
    return place(read, source, target, kernel, dtype=pixels.dtype, nodata=nodata, exact_edges=exact)


def blocks(pixels: np.ndarray, ratio: int) -> np.ndarray:
    """The pixels under each coarser one, (rows, columns, pixels)."""
    side = pixels.shape[0] // ratio
    whole = pixels[: side * ratio, : side * ratio].reshape(side, ratio, side, ratio)
    return whole.transpose(0, 2, 1, 3).reshape(side, side, -1)


@pytest.mark.parametrize("where", CORNERS)
@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_a_mode_is_that_of_the_pixels_under_it(where: str, ratio: int) -> None:
    rng = np.random.default_rng(ratio)
    classes = rng.integers(1, 5, (SIDE, SIDE)).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.7] = 0
    made, under = coarse(classes, ratio, "mode", where), blocks(classes, ratio)
    counts = np.stack([(under == value).sum(axis=-1) for value in range(1, 5)], axis=-1)
    assert ((under == 0).all(axis=-1) == (made == 0)).all(), "no data where no pixel under it has any, and only there"
    of_made = np.take_along_axis(counts, np.maximum(made.astype(int) - 1, 0)[..., None], -1)[..., 0]
    assert (of_made == counts.max(axis=-1))[made > 0].all()


@pytest.mark.parametrize("where", CORNERS)
@pytest.mark.parametrize(("kernel", "truth"), [("average", np.nanmean), ("max", np.nanmax), ("med", None)])
def test_statistics_are_those_of_the_pixels_under_them(where: str, kernel: str, truth: Any) -> None:
    rng = np.random.default_rng(1)
    numbers = rng.uniform(1, 100, (SIDE, SIDE)).astype(np.float32)
    numbers[rng.random(numbers.shape) < 0.8] = np.nan
    made, under = coarse(numbers, 3, kernel, where), blocks(numbers, 3)
    known = np.isfinite(under).any(axis=-1)
    assert 0 < known.sum() < known.size
    np.testing.assert_array_equal(np.isfinite(made), known)
    if truth is not None:
        np.testing.assert_allclose(made[known], truth(under[known], axis=-1), rtol=1e-6)


def test_cubes_of_before_are_read_as_they_were() -> None:
    """Their other shards were made so: pixels of a shard that is made again must fit those beside it."""
    rng = np.random.default_rng(3)
    classes = rng.integers(1, 5, (SIDE, SIDE)).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.7] = 0
    empty = (blocks(classes, 3) == 0).all(axis=-1)
    before = coarse(classes, 3, "mode", "metres", exact=False)
    assert (before[empty] > 0).mean() > 0.3, "a neighbour's class where nothing is"
    assert (coarse(classes, 3, "mode", "metres")[empty] == 0).all()


def test_windows_of_a_grid_have_the_pixels_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.raster.resample._BLOCK_PX", 16)
    numbers = np.random.default_rng(2).integers(1, 9000, (SIDE, SIDE)).astype(np.uint16)
    crs, left, top, size = CORNERS["metres"]
    source = Grid(crs, (size, 0.0, left, 0.0, -size, top), numbers.shape)
    target = Grid(crs, (25.0, 0.0, left + 3.0, 0.0, -25.0, top - 7.0), (90, 90))

    def read(row: int, col: int, height: int, width: int, into: Any = None) -> np.ndarray:
        return numbers[row : row + height, col : col + width]

    for kernel in ("average", "bilinear", "cubic"):
        whole = place(read, source, target, kernel, dtype=np.uint16, nodata=0)
        part = place(read, source, target.window(20, 31, 41, 29), kernel, dtype=np.uint16, nodata=0)
        np.testing.assert_array_equal(part, whole[20:61, 31:60])
