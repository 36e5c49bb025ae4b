"""Noise here is seeded and a function of place: a point has the same value in every window.

Smooth fields are cubic B-spline interpolations of hashed lattice values; white noise is drawn in fixed blocks of the
world's pixel lattice. All of it is elementwise arithmetic, so results do not depend on thread counts or windows, and
neighbouring tiles agree exactly where they overlap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from zarr_store.grid import Grid

__all__ = ["curve", "fractal", "key_of", "mix", "smooth", "uniform", "white"]

F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]

# Side of the blocks in which white noise is drawn, in pixels.
_BLOCK_PX = 128

# Standard deviation of a cubic B-spline over uniform [-1, 1] lattice values: ∫β₃² = 151/315 per axis, variance 1/3.
_SPLINE_STD_1D = math.sqrt(151 / 315 / 3)
_SPLINE_STD_2D = math.sqrt((151 / 315) ** 2 / 3)


def key_of(seed: int, *names: object) -> int:
    """Make the 64-bit key of one stream of noise, the same in every process."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], key: int) -> U64:
    """Hash two integer arrays (broadcast) and a key to 64 random bits.

    The finaliser is SplitMix64's: Steele, Lea, Flood (2014), doi:10.1145/2660193.2660195.
    """
    with np.errstate(over="ignore"):
        z = (a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ (
            b.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        )
        z ^= np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out: U64 = z ^ (z >> np.uint64(31))
        return out


def uniform(bits: U64, part: int = 0) -> F32:
    """Turn random bits into float32 in [0, 1); `part` 0 to 2 picks independent 21-bit pieces."""
    piece = (bits >> np.uint64(21 * part)) & np.uint64((1 << 21) - 1)
    return piece.astype(np.float32) * np.float32(2.0**-21)


def _taps(position: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], tuple[F32, F32, F32, F32]]:
    """Compute the index of the first of four lattice points, and the weights of the uniform cubic B-spline."""
    cell = np.floor(position)
    t = (position - cell).astype(np.float32)
    one = np.float32(1.0) - t
    six = np.float32(1 / 6)
    return cell.astype(np.int64) - 1, (
        one * one * one * six,
        (np.float32(4) + t * t * (np.float32(3) * t - np.float32(6))) * six,
        (np.float32(4) + one * one * (np.float32(3) * one - np.float32(6))) * six,
        t * t * t * six,
    )


def smooth(key: int, grid: Grid, cell_m: float) -> F32:
    """Make a smooth field of mean 0 and variance 1 on a grid; it varies over about `cell_m` metres."""
    row, row_weights = _taps(grid.y() / cell_m)
    col, col_weights = _taps(grid.x() / cell_m)
    row0, col0 = int(row.min()), int(col.min())
    j = np.arange(row0, int(row.max()) + 4, dtype=np.int64)[:, None]
    i = np.arange(col0, int(col.max()) + 4, dtype=np.int64)[None, :]
    lattice = (uniform(mix(j, i, key)) * np.float32(2) - np.float32(1)) * np.float32(1 / _SPLINE_STD_2D)
    rows = np.zeros((grid.height, lattice.shape[1]), np.float32)
    for tap, weight in enumerate(row_weights):
        rows += lattice[row - row0 + tap] * weight[:, None]
    out = np.zeros(grid.shape, np.float32)
    for tap, weight in enumerate(col_weights):
        out += np.take(rows, col - col0 + tap, axis=1) * weight[None, :]
    return out


def fractal(key: int, grid: Grid, cell_m: float, *, octaves: int, gain: float = 0.5) -> F32:
    """Sum `octaves` smooth fields, each half as wide and `gain` times as high as the one before; mean 0.

    The variance is 1 with all octaves. Octaves finer than the pixels are left out: they would only be aliases.
    """
    out = np.zeros(grid.shape, np.float32)
    power = 0.0
    for octave in range(octaves):
        height = gain**octave
        power += height * height
        if cell_m / 2**octave >= grid.resolution[0]:
            out += np.float32(height) * smooth(key + octave, grid, cell_m / 2**octave)
    return out * np.float32(1 / math.sqrt(power))


def curve(key: int, positions: npt.NDArray[np.float64], cell_m: float) -> npt.NDArray[np.float64]:
    """Evaluate the one-dimensional form of `smooth` (mean 0, variance 1) at positions in metres."""
    first, weights = _taps(positions / cell_m)
    out = np.zeros(positions.shape)
    for tap, weight in enumerate(weights):
        index = first + tap
        out += (uniform(mix(index, np.zeros_like(index), key)) * 2.0 - 1.0) * weight
    return out / _SPLINE_STD_1D


def white(key: int, world: Grid, grid: Grid, draw: Callable[[np.random.Generator, tuple[int, int]], F32]) -> F32:
    """Draw independently for each pixel of `grid`, a window of the lattice of `world`.

    Args:
        key: Stream of noise.
        world: The grid whose first pixel anchors the blocks.
        grid: Window to fill; must share the lattice of `world`.
        draw: Function of a generator and a shape (height, width) that returns a float32 array.
    """
    offset = world.offset_of(grid)
    if offset is None:
        raise ValueError(f"white noise needs a window on the lattice of the world {world}, and {grid} is off it")
    row0, col0 = offset
    out = np.empty(grid.shape, np.float32)
    for j in range(row0 // _BLOCK_PX, (row0 + grid.height - 1) // _BLOCK_PX + 1):
        for i in range(col0 // _BLOCK_PX, (col0 + grid.width - 1) // _BLOCK_PX + 1):
            rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([key, j + 2**20, i + 2**20])))
            block = draw(rng, (_BLOCK_PX, _BLOCK_PX))
            y0, x0 = j * _BLOCK_PX - row0, i * _BLOCK_PX - col0
            ys = slice(max(0, y0), min(grid.height, y0 + _BLOCK_PX))
            xs = slice(max(0, x0), min(grid.width, x0 + _BLOCK_PX))
            out[ys, xs] = block[ys.start - y0 : ys.stop - y0, xs.start - x0 : xs.stop - x0]
    return out
