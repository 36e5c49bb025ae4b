"""Local RX scores a pixel against the ring around it: the pixels of an outer square that lie outside an inner one.

The inner square keeps the anomaly itself out of its background. Pixels are whitened by the global background first, so
that local covariances are near the identity, to which they are shrunk; where a ring has too few pixels the global
background alone decides.

Letters in shapes: F feature, Y row, X column.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.background import Background
from zarr_store.errors import InvalidInput

__all__ = ["MOST_FEATURES", "check_windows", "score_locally"]

MOST_FEATURES = 24
_TILES = (32, 64, 128)
"""Sides of the tiles that one compiled program scores; the smallest that holds the image, else the largest."""
_SHRINKAGE = 0.1
"""Share of the global covariance in that of a ring, unless told otherwise."""


def check_windows(inner: int, outer: int, features: int) -> None:
    """Refuse windows that are even, in the wrong order, or too small for the number of features."""
    if inner % 2 == 0 or outer % 2 == 0 or not 1 <= inner < outer:
        raise InvalidInput(f"--windows {inner},{outer}: expected two odd numbers, the inner one smaller, such as 5,21")
    if features > MOST_FEATURES:
        raise InvalidInput(
            f"--method local-rx takes at most {MOST_FEATURES} features, there are {features}; choose fewer with --bands"
        )
    ring = outer * outer - inner * inner
    if ring < 2 * features + 2:
        raise InvalidInput(
            f"--windows {inner},{outer}: a ring of {ring} pixels is too small for {features} features; give a larger "
            "outer window"
        )


def score_locally(
    values: npt.NDArray[np.float32],
    background: Background,
    *,
    inner: int,
    outer: int,
    shrinkage: float | None = None,
    device: int = 0,
) -> npt.NDArray[np.float32]:
    """Score an image against the rings of its pixels.

    Args:
        values: float32 (feature, y, x), with NaN where there is no pixel.
        background: Background of the whole data.
        inner: Side of the inner square, odd.
        outer: Side of the outer square, odd.
        shrinkage: Share of the global covariance; None for a tenth.
        device: Number of the device.

    Returns:
        float32 (y, x), NaN where there is no pixel.
    """
    devices = jax.local_devices()
    place = devices[device % len(devices)]
    reach, (height, width) = outer // 2, values.shape[1:]
    valid = np.isfinite(values).all(axis=0)
    white = np.where(valid, background.whiten(np.nan_to_num(values)), 0.0)
    tile_side = next((side for side in _TILES if side >= max(height, width)), _TILES[-1])
    high, wide = -(-height // tile_side) * tile_side, -(-width // tile_side) * tile_side
    room = ((reach, reach + high - height), (reach, reach + wide - width))
    white, there = np.pad(white, ((0, 0), *room)), np.pad(valid, room)
    found = np.full((high, wide), np.nan, np.float32)
    share = _SHRINKAGE if shrinkage is None else shrinkage
    side = tile_side + 2 * reach
    with jax.enable_x64(True):
        pending = []
        for y in range(0, high, tile_side):
            for x in range(0, wide, tile_side):
                cut = (slice(y, y + side), slice(x, x + side))
                if there[y + reach : y + reach + tile_side, x + reach : x + reach + tile_side].any():
                    tile = jax.device_put(np.ascontiguousarray(white[:, cut[0], cut[1]]), place)
                    mask = jax.device_put(there[cut].astype(np.float64), place)
                    pending.append((y, x, _score(tile, mask, np.float64(share), inner=inner, outer=outer)))
        for y, x, scores in pending:
            found[y : y + tile_side, x : x + tile_side] = np.asarray(scores)
    found = found[:height, :width]
    found[~valid] = np.nan
    return found


@functools.partial(jax.jit, static_argnames=("inner", "outer"))
def _score(x_FYX: jax.Array, valid_YX: jax.Array, share: jax.Array, *, inner: int, outer: int) -> jax.Array:
    reach, features = outer // 2, x_FYX.shape[0]

    def ring(plane_YX: jax.Array) -> jax.Array:
        total = jnp.pad(jnp.cumsum(jnp.cumsum(plane_YX, axis=0), axis=1), ((1, 0), (1, 0)))

        def square(side: int) -> jax.Array:
            low, high = reach - side // 2, reach + side // 2 + 1
            rows = plane_YX.shape[0] - 2 * reach
            columns = plane_YX.shape[1] - 2 * reach

            def at(y: int, x: int) -> jax.Array:
                return jax.lax.dynamic_slice(total, (y, x), (rows, columns))

            return at(high, high) - at(low, high) - at(high, low) + at(low, low)

        return square(outer) - square(inner)

    count_YX = ring(valid_YX)
    enough_YX = count_YX >= 2 * features + 2
    n_YX = jnp.maximum(count_YX, 2.0)
    mean = [jnp.where(enough_YX, ring(x_FYX[f]) / n_YX, 0.0) for f in range(features)]
    middle = [x_FYX[f, reach:-reach, reach:-reach] - mean[f] for f in range(features)]
    part_YX = jnp.where(enough_YX, 1.0 - share, 0.0)
    # Cholesky's decomposition and the forward substitution, element by element over all pixels at once
    lower: list[list[jax.Array]] = []
    solved: list[jax.Array] = []
    for i in range(features):
        row: list[jax.Array] = []
        for j in range(i + 1):
            covariance = (ring(x_FYX[i] * x_FYX[j]) - n_YX * mean[i] * mean[j]) / (n_YX - 1.0)
            value = part_YX * covariance + (1.0 - part_YX if i == j else 0.0)
            for k in range(j):
                value = value - row[k] * (lower[j][k] if j < i else row[k])
            row.append(jnp.sqrt(jnp.maximum(value, 1e-12)) if i == j else value / lower[j][j])
        lower.append(row)
        rest = middle[i]
        for k in range(i):
            rest = rest - row[k] * solved[k]
        solved.append(rest / row[i])
    score_YX = sum((jnp.square(one) for one in solved), jnp.zeros_like(count_YX))
    return score_YX.astype(jnp.float32)
