"""Convolution with few filters on a processor: two columns of pixels at once.

XLA turns a convolution on a processor into a product of matrices with one column per filter, and with sixteen filters
or less its loops are half empty. Two neighbouring pixels that share a window of one more column are twice the filters:

    y[2j]   = w0 x[2j-1] + w1 x[2j] + w2 x[2j+1]
    y[2j+1] =              w0 x[2j] + w1 x[2j+1] + w2 x[2j+2]

so one window (x[2j-1] … x[2j+2]) with a stride of two columns and the filters (w0 w1 w2 0), (0 w0 w1 w2) gives both, at
a third more multiplications and in a quarter (4 to 16 channels) to two thirds (16 to 16) of the time, on a core with
AVX-512. In memory the result lies as that of the plain convolution. Sums have the same terms, and zeros.

Letters in shapes: B sample, H row, W column, I input channel, O output channel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["FEW", "convolve_pairs", "is_narrow", "without_pairs"]

FEW = 16
"""Largest number of filters for which pairs of columns are faster; with 32 they take half as long again."""
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_AROUND = ((1, 1), (1, 1))
_PLAIN = {
    "lhs_dilation": (None, (1, 1)),
    "rhs_dilation": (None, (1, 1)),
    "feature_group_count": (1,),
    "batch_group_count": (1,),
    "dimension_numbers": (_LAYOUT, lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))),
}
"""Settings of a plain convolution of images with channels last; every other setting is None in it."""
_PAIRS: ContextVar[bool] = ContextVar("pairs", default=True)


@contextlib.contextmanager
def without_pairs() -> Iterator[None]:
    """Trace networks inside as for an accelerator: no convolution is narrow, also where the devices are a processor."""
    token = _PAIRS.set(False)
    try:
        yield
    finally:
        _PAIRS.reset(token)


def is_narrow(
    x_BHWI: jax.Array, kernel_HWIO: jax.Array, window_strides: Sequence[int], padding: Any, **settings: Any
) -> bool:
    """Return whether `convolve_pairs` can compute this convolution faster: a plain one of 3 × 3 with few filters."""
    return (
        _PAIRS.get()
        and kernel_HWIO.shape[:2] == (3, 3)
        and kernel_HWIO.shape[3] <= FEW
        and x_BHWI.shape[2] % 2 == 0
        and tuple(window_strides) == (1, 1)
        and not isinstance(padding, str)
        and tuple(tuple(pair) for pair in padding) == _AROUND
        and all(settings[name] in _PLAIN.get(name, (None,)) for name in settings)
    )


@jax.custom_vjp
def convolve_pairs(x_BHWI: jax.Array, kernel_HWIO: jax.Array) -> jax.Array:
    """Convolve with 3 × 3, stride 1 and a border of zeros; (B, H, W, O) in the type of `x_BHWI`. W is even."""
    return _pairs(x_BHWI, kernel_HWIO)


def _pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    left, right = (jnp.pad(kernel, ((0, 0), (at, 1 - at), (0, 0), (0, 0))) for at in (0, 1))
    both = jnp.concatenate([left, right], axis=3)
    y: jax.Array = lax.conv_general_dilated(x, both, (1, 2), _AROUND, dimension_numbers=_LAYOUT)
    return y.reshape(*x.shape[:3], kernel.shape[3])


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y: jax.Array = lax.conv_general_dilated(x, kernel, (1, 1), _AROUND, dimension_numbers=_LAYOUT)
    return y


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pairs(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    # of the input: a convolution with the mirrored kernel; what JAX derives of a stride of two puts zeros between
    mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = _pairs(dy, mirrored) if kernel.shape[2] <= FEW else _plain(dy, mirrored)
    # of the kernel as it is: that of the pairs is larger, and replicas would have to sum it
    (dkernel,) = jax.vjp(lambda k: _plain(x, k), kernel)[1](dy)
    return dx, dkernel


convolve_pairs.defvjp(_forward, _backward)
