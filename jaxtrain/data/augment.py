"""Variations of the samples, made on the device inside the train step.

Flips and quarter turns are the eight symmetries of a square, which satellite images all have; they act on the stored
integers, before casting, as zooms do. Gains, offsets, hidden bands and mixtures act on the normalised image. Each
sample has its own draws. A draw depends only on the key and on the sample's place in the global batch, so every mesh
varies the same samples in the same way.

Letters in shapes: B sample, H row, W column, C band, N side of a square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.traced import is_on
from zarr_store.errors import InvalidInput

__all__ = ["Mixed", "augment", "disturb", "mix", "turns"]

_ZOOM, _GAIN, _OFFSET, _BANDS, _SHARE, _BOX = range(1, 7)
"""Purposes of random draws; each has a stream of its own, so that switching one on does not change the others."""

Turn = Callable[[jax.Array], jax.Array]


def augment(arrays: Sequence[jax.Array], *, key: jax.Array, zoom: float = 0.0) -> tuple[jax.Array, ...]:
    """Turn, mirror and zoom arrays that belong together; an array without rows and columns stays as it is.

    Args:
        arrays: each (B, N, N) or (B, N, N, …), such as image, label and observed, which all get the same turn; a label
            of an image, (B,) or (B, K), does not turn.
        key: Random key of this step.
        zoom: zooms are drawn from 1/(1 + zoom) … 1 + zoom; out, the image is repeated by mirroring at its edge.

    Raises:
        InvalidInput: the windows are not square or the arrays do not belong together.
    """
    b, h, w = arrays[0].shape[:3]
    if h != w or any(a.ndim > 2 and a.shape[:3] != (b, h, w) for a in arrays):
        raise InvalidInput(
            f"quarter turns need square windows of one size, got {[a.shape for a in arrays]}: "
            "use square patches or data.augment = false"
        )
    # transposing and two mirrors, each on or off, make all eight symmetries with equal chance
    swap, mirror_y, mirror_x = jax.random.bernoulli(key, 0.5, (3, b))
    turned = [_turn(a, swap, mirror_y, mirror_x) if a.ndim > 2 else a for a in arrays]
    if is_on(zoom):
        drawn = jax.random.uniform(jax.random.fold_in(key, _ZOOM), (b,), minval=-1.0, maxval=1.0)
        turned = [_zoom(a, jnp.float32(1 + zoom) ** drawn) if a.ndim > 2 else a for a in turned]
    return tuple(turned)


def _turn(array: jax.Array, swap: jax.Array, mirror_y: jax.Array, mirror_x: jax.Array) -> jax.Array:
    def where(chosen: jax.Array, turned: jax.Array, plain: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape((-1,) + (1,) * (array.ndim - 1)), turned, plain)

    array = where(swap, jnp.swapaxes(array, 1, 2), array)
    array = where(mirror_y, array[:, ::-1], array)
    return where(mirror_x, array[:, :, ::-1], array)


def _zoom(array: jax.Array, scale_B: jax.Array) -> jax.Array:
    """Zoom about the centre by nearest pixels, as products with 0/1 matrices, so that labels stay labels."""
    side = array.shape[1]
    centre = (side - 1) / 2
    wanted = (jnp.arange(side, dtype=jnp.float32) - centre) / scale_B[:, None] + centre
    # beyond the edge the image is mirrored
    nearest = jnp.round(wanted)
    nearest = jnp.where(nearest < 0, -1 - nearest, nearest)
    nearest = jnp.where(nearest > side - 1, 2 * side - 1 - nearest, nearest)
    pick = (nearest[..., None] == jnp.arange(side, dtype=jnp.float32)).astype(jnp.float32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        # a product would spread a pixel without a value, nan, over its row and column
        absent = jnp.isnan(array)
        known = _pick(pick, jnp.where(absent, 0, array))
        return jnp.where(_pick(pick, absent) > 0, jnp.nan, known).astype(array.dtype)
    return _pick(pick, array).astype(array.dtype)


def _pick(pick: jax.Array, array: jax.Array) -> jax.Array:
    """Return the chosen rows and columns of a square, float32."""
    side = array.shape[1]
    values = array.astype(jnp.float32).reshape(array.shape[0], side, side, -1)
    # float32 holds every stored integer up to 2^24 exactly; a faster, rounded product would not
    exact = jax.lax.Precision.HIGHEST
    zoomed = jnp.einsum("bij,bjwc->biwc", pick, values, precision=exact)
    return jnp.einsum("bkw,biwc->bikc", pick, zoomed, precision=exact).reshape(array.shape)


def turns() -> list[tuple[Turn, Turn]]:
    """Return the eight turns and mirrors of square images (B, N, N, C), each with its inverse."""

    def of(swap: bool, mirror_y: bool, mirror_x: bool) -> tuple[Turn, Turn]:
        def there(x: jax.Array) -> jax.Array:
            x = jnp.swapaxes(x, 1, 2) if swap else x
            x = x[:, ::-1] if mirror_y else x
            return x[:, :, ::-1] if mirror_x else x

        def back(x: jax.Array) -> jax.Array:
            x = x[:, :, ::-1] if mirror_x else x
            x = x[:, ::-1] if mirror_y else x
            return jnp.swapaxes(x, 1, 2) if swap else x

        return there, back

    return [of(s, y, x) for s in (False, True) for y in (False, True) for x in (False, True)]


def disturb(x_BHWC: jax.Array, *, key: jax.Array, jitter: float = 0.0, band_dropout: float = 0.0) -> jax.Array:
    """Vary the brightness of normalised images and hide bands, as haze, sun angle and a lost band do.

    Args:
        x_BHWC: float32, mean 0 and spread 1 in each band.
        key: Random key of this step.
        jitter: spread of a gain for each sample and of an offset for each of its bands.
        band_dropout: chance of a band of a sample to become 0, its mean; the others are left as they are.
    """
    b, c = x_BHWC.shape[0], x_BHWC.shape[-1]
    inner = (1,) * (x_BHWC.ndim - 2)
    if is_on(jitter):
        gain = 1 + jitter * jax.random.normal(jax.random.fold_in(key, _GAIN), (b, *inner, 1))
        x_BHWC = x_BHWC * gain + jitter * jax.random.normal(jax.random.fold_in(key, _OFFSET), (b, *inner, c))
    if is_on(band_dropout):
        kept = jax.random.bernoulli(jax.random.fold_in(key, _BANDS), 1 - band_dropout, (b, *inner, c))
        x_BHWC = jnp.where(kept, x_BHWC, jnp.float32(0))
    return x_BHWC


class Mixed(NamedTuple):
    """The labels that were mixed in, and their share of the loss."""

    label: jax.Array
    share: jax.Array


def mix(
    x_BHWC: jax.Array, label: jax.Array, *, key: jax.Array, kind: Literal["mixup", "cutmix"], alpha: float
) -> tuple[jax.Array, jax.Array, Mixed | None]:
    """Mix each sample with the one before it in the batch; one share is drawn for the whole batch.

    mixup (Zhang et al. 2018, arXiv:1710.09412) blends images; the loss is blended as they are. cutmix (Yun et al. 2019,
    arXiv:1905.04899) pastes a box of the other; where pixels are labelled the labels are pasted too, and the loss stays
    as it is.

    Args:
        x_BHWC: Normalised images.
        label: (B,), (B, K) or (B, H, W).
        key: For this step.
        kind: "mixup" or "cutmix".
        alpha: The share of the other is drawn from Beta(alpha, alpha), and is at most a half.

    Returns:
        The images, their labels, and the labels mixed in with their share of the loss; None for the last where the
        labels of pixels were pasted.
    """
    drawn = jax.random.beta(jax.random.fold_in(key, _SHARE), alpha, alpha, dtype=jnp.float32)
    share = jnp.minimum(drawn, 1 - drawn)
    other, other_label = jnp.roll(x_BHWC, 1, axis=0), jnp.roll(label, 1, axis=0)
    if kind == "mixup":
        return (1 - share) * x_BHWC + share * other, label, Mixed(other_label, share)
    h, w = x_BHWC.shape[1:3]
    side = jnp.sqrt(share)
    at_y, at_x = jax.random.uniform(jax.random.fold_in(key, _BOX), (2,))
    rows, columns = jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32)
    top, left = jnp.floor(at_y * (h - jnp.round(side * h) + 1)), jnp.floor(at_x * (w - jnp.round(side * w) + 1))
    in_y = (rows >= top) & (rows < top + jnp.round(side * h))
    in_x = (columns >= left) & (columns < left + jnp.round(side * w))
    box_HW = in_y[:, None] & in_x[None, :]
    pasted = jnp.where(box_HW.reshape(1, h, w, *(1,) * (x_BHWC.ndim - 3)), other, x_BHWC)
    if label.ndim == 3:
        return pasted, jnp.where(box_HW[None], other_label, label), None
    return pasted, label, Mixed(other_label, box_HW.astype(jnp.float32).mean())
