"""Coarser pixels that hold whole pixels are their exact mean, and each block of the file is read once for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ingest.raster import average, resample, strips
from ingest.raster.resample import place
from ingest.raster.strips import StripReader
from zarr_store.grid import Grid

CRS, EAST, NORTH, BLOCK = "EPSG:32633", 500_000.0, 5_000_000.0, 64


def grid(shape: tuple[int, int], size: float = 10.0, *, left: float = 0.0, up: float = 0.0) -> Grid:
    return Grid(CRS, (size, 0.0, EAST - left, 0.0, -size, NORTH + up), shape)


class File:
    """Pixels that are read by windows, and how often each block of 64² was."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.reads = np.zeros([-(-size // BLOCK) for size in pixels.shape], int)

    def __call__(self, row: int, col: int, height: int, width: int, into: Any = None) -> np.ndarray:
        assert row >= 0
        assert col >= 0
        assert row + height <= self.pixels.shape[0]
        assert col + width <= self.pixels.shape[1]
        self.reads[row // BLOCK : -(-(row + height) // BLOCK), col // BLOCK : -(-(col + width) // BLOCK)] += 1
        return self.pixels[row : row + height, col : col + width]


def made_up(shape: tuple[int, int], dtype: str = "uint16") -> np.ndarray:
    rng = np.random.default_rng(7)
    pixels = rng.integers(1, 60_000 if dtype == "uint16" else 6, shape).astype(dtype)
    pixels[rng.random(shape) < 0.1] = 0
    pixels[100:180, 30:170] = 0
    if dtype == "float32":
        pixels[pixels == 0] = np.nan
    return pixels


def mean_by_hand(pixels: np.ndarray, factor: int, target: Grid, offset: tuple[int, int]) -> np.ndarray:
    """The mean of the pixels under each target pixel that are not 0, halves rounded up."""
    made = np.zeros(target.shape, np.uint16)
    for y in range(target.height):
        for x in range(target.width):
            top, left = offset[0] + y * factor, offset[1] + x * factor
            under = pixels[max(0, top) : max(0, top + factor), max(0, left) : max(0, left + factor)].astype(int)
            under = under[under > 0]
            if under.size:
                made[y, x] = (2 * int(under.sum()) + under.size) // (2 * under.size)
    return made


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_whole_pixels_give_their_exact_mean(monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    monkeypatch.setattr(average, "_STRIP_PX", 9_000)
    pixels = made_up((251, 323))
    source = grid(pixels.shape)
    # it begins beside the raster, in the middle of a pixel that the raster covers in part, and ends beyond it
    target = grid((300 // factor, 390 // factor), 10.0 * factor, left=10.0 * (factor * 2 + 1), up=10.0 * (factor + 1))
    file = File(pixels)
    made = place(file, source, target, "average", dtype="uint16", nodata=0, block_rows=BLOCK)
    expected = mean_by_hand(pixels, factor, target, (-factor - 1, -factor * 2 - 1))
    assert (expected > 0).mean() > 0.5
    np.testing.assert_array_equal(made, expected)
    assert (file.reads == 1).all(), "each block is decoded once"
    window = target.window(11, 3, 15, 20)
    np.testing.assert_array_equal(
        place(file, source, window, "average", dtype="uint16", nodata=0, block_rows=BLOCK), expected[11:26, 3:23]
    )
    before = place(file, source, target, "average", dtype="uint16", nodata=0, exact_means=False)
    inner = (slice(3, 200 // factor), slice(4, 300 // factor))
    assert np.abs(before[inner].astype(int) - made[inner]).max() == 1, "by the rules of before a half goes either way"


@pytest.mark.parametrize(("dtype", "kernel"), [("uint8", "mode"), ("float32", "average"), ("uint16", "bilinear")])
@pytest.mark.parametrize("size", [40.0, 43.0])
def test_a_large_warp_reads_each_block_once(
    monkeypatch: pytest.MonkeyPatch, dtype: str, kernel: str, size: float
) -> None:
    monkeypatch.setattr(resample, "_BLOCK_PX", 16)
    pixels = made_up((640, 700), dtype)
    nodata = np.nan if dtype == "float32" else 0
    source, target = grid(pixels.shape), grid((165, 180), size)

    def warp(file: File) -> np.ndarray:
        return place(file, source, target, kernel, dtype=dtype, nodata=nodata, block_rows=BLOCK)

    whole, lines, windows = File(pixels), File(pixels), File(pixels)
    expected = warp(whole)
    monkeypatch.setattr(strips, "_WHOLE_READ_PX", 200_000)
    np.testing.assert_array_equal(warp(lines), expected)
    assert (whole.reads == 1).all()
    assert (lines.reads == 1).all()
    monkeypatch.setattr(strips, "_WHOLE_READ_PX", 1_000)  # strips would be too large: window by window
    np.testing.assert_array_equal(warp(windows), expected)
    assert (windows.reads > 1).any()
    part = target.window(37, 21, 50, 60)
    np.testing.assert_array_equal(
        place(whole, source, part, kernel, dtype=dtype, nodata=nodata, block_rows=BLOCK), expected[37:87, 21:81]
    )


def test_rows_may_only_move_down() -> None:
    pixels = made_up((200, 90))
    reader = StripReader(File(pixels), block_rows=BLOCK, col=10, width=70, end=190, dtype=np.uint16)
    np.testing.assert_array_equal(reader.rows(5, 70), pixels[5:70, 10:80])
    np.testing.assert_array_equal(reader.rows(60, 190), pixels[60:190, 10:80])
    with pytest.raises(ValueError, match="rows from 59 were dropped"):
        reader.rows(59, 70)
