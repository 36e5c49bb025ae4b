"""Convolve an image that is split over devices; each device borrows the rows that its windows overlap.

Letters in shapes: B sample, H row, W column, I input channel, O output channel.

The compiler can split a convolution by itself, and does it well as long as nothing else is split. Beside split filters
(`space` × `model`) it moves whole activations, so the exchange is written out here: the first and last rows of a shard
travel to its neighbours (`ppermute`), and each device convolves what it then has, without padding. The edge of the
image has no neighbour and receives zeros, which is what padding is. The backward pass is the transpose of this and
sends the same number of bytes the other way.

Only the image axes are written out; filters (`model`) are left to the compiler, as everywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxtrain.models.convolution import convolving_with
from jaxtrain.models.narrow import convolve_pairs, is_narrow
from jaxtrain.parallel.mesh import SPACE_AXES, image_spec, spec
from zarr_store.errors import InvalidInput

__all__ = ["halo_widths", "over_space"]


@contextlib.contextmanager
def over_space(mesh: Mesh, *, apart: bool = False) -> Iterator[None]:
    """Make convolutions that are traced inside work on images on `mesh`, split if it has space axes.

    Args:
        mesh: all axes and devices.
        apart: the program is that of one replica, inside a `shard_map` along `data`.
    """
    with convolving_with(partial(_convolve, mesh, apart)):
        yield


def halo_widths(window: int, stride: int) -> tuple[int, int]:
    """Return the rows that a shard borrows from its neighbours, for windows centred on the rows 0, stride, ….

    Args:
        window: rows of the kernel, odd.
        stride: rows between two windows; each shard holds a multiple of it.

    >>> halo_widths(3, 1), halo_widths(3, 2), halo_widths(7, 2), halo_widths(1, 2)
    ((1, 1), (1, 0), (3, 2), (0, 0))
    """
    before = window // 2
    return before, max(window - stride - before, 0)


def _convolve(
    mesh: Mesh,
    apart: bool,
    x_BHWI: jax.Array,
    kernel_HWIO: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    **settings: Any,
) -> jax.Array:
    """Convolve whole images, or split ones if `mesh` has space axes, as `jax.lax.conv_general_dilated`.

    On a processor, few filters take two columns at once (`jaxtrain.models.narrow`).

    Raises:
        InvalidInput: a shard does not hold whole strides, or fewer rows than its neighbour borrows.
    """
    given = (x_BHWI, kernel_HWIO, window_strides, padding)
    if not any(axis in mesh.shape for axis in SPACE_AXES):
        if _whole_filters_on_cpu(mesh) and is_narrow(*given, **settings):
            narrow: jax.Array = convolve_pairs(x_BHWI, kernel_HWIO)
            return narrow
        return lax.conv_general_dilated(*given, **settings)
    sizes, windows = x_BHWI.shape[1:3], kernel_HWIO.shape[:2]
    centred = [(window // 2, window // 2) for window in windows]
    if _pads(padding) != centred or settings.get("feature_group_count", 1) != 1 or _dilated(settings):
        raise InvalidInput(
            f"mesh.space splits plain convolutions whose windows are centred (padding {centred}), got padding "
            f"{padding!r} and {settings}: use mesh.space = 1 for this network"
        )
    parts = [int(mesh.shape.get(axis, 1)) for axis in SPACE_AXES]
    plan = [
        _plan(int(size), n, int(window), int(stride))
        for size, n, window, stride in zip(sizes, parts, windows, window_strides, strict=True)
    ]
    _, *space = image_spec(mesh)
    image = spec(None if apart else "data", *space)

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pads = []
        for dimension, (axis, n, (before, after)) in enumerate(zip(SPACE_AXES, parts, plan, strict=True), start=1):
            if n > 1:
                x = _borrow(x, dimension, axis, n, before, after)
            pads.append((0, 0) if n > 1 else centred[dimension - 1])
        return lax.conv_general_dilated(x, kernel, window_strides, pads, **settings)

    split: Any = jax.shard_map(
        local,
        mesh=None if apart else mesh,  # inside another shard_map that one's mesh counts
        in_specs=(image, spec()),
        out_specs=image,
        axis_names={axis for axis in ("data", *SPACE_AXES) if axis in mesh.shape and not (apart and axis == "data")},
    )
    result: jax.Array = split(x_BHWI, kernel_HWIO)
    return result


def _whole_filters_on_cpu(mesh: Mesh) -> bool:
    return int(mesh.shape.get("model", 1)) == 1 and str(mesh.devices.flat[0].platform) == "cpu"


def _borrow(x: jax.Array, dimension: int, axis: str, n: int, before: int, after: int) -> jax.Array:
    size = x.shape[dimension]
    parts = [x]
    if before:
        tail = lax.slice_in_dim(x, size - before, size, axis=dimension)
        parts.insert(0, _send(tail, axis, [(i, i + 1) for i in range(n - 1)]))
    if after:
        head = lax.slice_in_dim(x, 0, after, axis=dimension)
        parts.append(_send(head, axis, [(i + 1, i) for i in range(n - 1)]))
    return jnp.concatenate(parts, axis=dimension) if len(parts) > 1 else x


def _send(x: jax.Array, axis: str, pairs: list[tuple[int, int]]) -> jax.Array:
    """Send rows to the device that each pair names; a device that gets none gets zeros."""
    received: jax.Array = lax.ppermute(x, axis, pairs)  # type: ignore[no-untyped-call]  # of jax
    return received


def _plan(size: int, parts: int, window: int, stride: int) -> tuple[int, int]:
    before, after = halo_widths(window, stride)
    if parts > 1 and (size % (parts * stride) or size // parts < max(before, after)):
        raise InvalidInput(
            f"an image of {size} rows or columns cannot be split over {parts} devices for a convolution of {window} "
            f"with stride {stride}: each needs a multiple of {stride}, at least {max(before, after)}; choose a larger "
            "data.patch, a smaller model.depth or a smaller mesh.space"
        )
    return before, after


def _pads(padding: Any) -> list[tuple[int, int]] | None:
    return None if isinstance(padding, str) else [(int(low), int(high)) for low, high in padding]


def _dilated(settings: dict[str, Any]) -> bool:
    return any(step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in settings.get(name) or ())
