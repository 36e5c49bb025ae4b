"""Random flips and quarter turns on the device: the eight symmetries of a square, which satellite images all have.

Runs inside the train step, on the stored integers, before casting. Each sample draws for itself; the draw depends on
the key and on the sample's place in the global batch only, so every mesh turns the same samples the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from zarr_store.errors import InvalidInput

__all__ = ["augment"]


def augment(arrays: Sequence[jax.Array], *, key: jax.Array) -> tuple[jax.Array, ...]:
    """Turn and mirror arrays that belong together.

    Args:
        arrays: each (B, N, N) or (B, N, N, …), such as image, label and observed; all get the same turn.
        key: for this step.

    Raises:
        InvalidInput: the windows are not square or the arrays do not belong together.
    """
    b, h, w = arrays[0].shape[:3]
    if h != w or any(a.shape[:3] != (b, h, w) for a in arrays):
        raise InvalidInput(
            f"quarter turns need square windows of one size, got {[a.shape for a in arrays]}: "
            "use square patches or data.augment = false"
        )
    # transposing and two mirrors, each on or off, make all eight symmetries with equal chance
    swap, mirror_y, mirror_x = jax.random.bernoulli(key, 0.5, (3, b))
    return tuple(_turn(a, swap, mirror_y, mirror_x) for a in arrays)


def _turn(array: jax.Array, swap: jax.Array, mirror_y: jax.Array, mirror_x: jax.Array) -> jax.Array:
    def where(chosen: jax.Array, turned: jax.Array, plain: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape((-1,) + (1,) * (array.ndim - 1)), turned, plain)

    array = where(swap, jnp.swapaxes(array, 1, 2), array)
    array = where(mirror_y, array[:, ::-1], array)
    return where(mirror_x, array[:, :, ::-1], array)
