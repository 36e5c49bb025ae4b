"""`convolve` is the convolution of all networks; a caller may replace it while a network is traced.

Networks do not know how images lie on devices. `parallel.spatial.over_space` puts a convolution in its place that does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

__all__ = ["convolve", "convolving_with"]

Convolution = Callable[..., jax.Array]

_CONVOLUTION: ContextVar[Convolution | None] = ContextVar("convolution", default=None)


@contextlib.contextmanager
def convolving_with(convolution: Convolution) -> Iterator[None]:
    """Make networks that are traced inside use `convolution`, which takes the arguments of `convolve`."""
    token = _CONVOLUTION.set(convolution)
    try:
        yield
    finally:
        _CONVOLUTION.reset(token)


def convolve(
    x_BHWI: jax.Array, kernel_HWIO: jax.Array, window_strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """Convolve as `jax.lax.conv_general_dilated`, or as `convolving_with` has set; for `nnx.Conv`."""
    convolution = _CONVOLUTION.get() or lax.conv_general_dilated
    result: jax.Array = convolution(x_BHWI, kernel_HWIO, window_strides, padding, **settings)
    return result
