"""Layers that stay cheap when the batch, the filters or the image are split over devices.

Letters in shapes: B sample, H row, W column, C channel, G group of channels, D shard of the batch.

Left out on purpose: transposed convolutions and `jax.image.resize` (XLA gathers whole activations under spatial
sharding), grouped convolutions (they gather the batch, xla#47945), pooling by `reduce_window` (its gradient is a slow
scatter on CPU). Upsampling is a nearest repeat; downsampling is a reshape and a maximum.

Names carry meaning: in every block `conv1`, `norm1` work on filters that may be split over the mesh axis `model`, and
`conv2` sums over them, so that a block costs one all-reduce and its output is whole on each device
(`parallel/sharding.py` holds the rules).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.models.convolution import convolve
from jaxtrain.models.dropout import Dropout
from zarr_store.errors import InvalidInput

__all__ = ["ConvBlock", "GroupNorm", "RunningNorm", "conv", "halve", "make_norm", "repeat_nearest", "run_block"]

EPSILON = 1e-5
HE = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
# for the last layer: the first prediction is close to uniform, so the first loss is close to log(classes)
SMALL = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    init: nnx.Initializer = HE,
    stride: int = 1,
) -> nnx.Conv:
    """Make a convolution with zero padding and He initialisation (He et al. 2015, arXiv:1502.01852).

    With a stride of 2 both sides are padded alike, as in other libraries, so weights of theirs give the same result.
    """
    around = (size // 2, size // 2)
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=(around, around),
        use_bias=bias,
        kernel_init=init,
        conv_general_dilated=convolve,  # borrows rows where the image is split over devices
        rngs=rngs,
    )


def repeat_nearest(x_BHWC: jax.Array) -> jax.Array:
    """Double height and width by repeating each pixel."""
    b, h, w, c = x_BHWC.shape
    wide = jnp.broadcast_to(x_BHWC[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return wide.reshape(b, 2 * h, 2 * w, c)


def halve(x_BHWC: jax.Array) -> jax.Array:
    """Halve height and width by the maximum over 2 × 2 pixels."""
    b, h, w, c = x_BHWC.shape
    if h % 2 or w % 2:
        raise InvalidInput(
            f"an image of {h} × {w} pixels cannot be halved: height and width must be multiples of 2^model.depth; "
            "choose another data.patch or a smaller model.depth"
        )
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494): statistics of one sample, so no mesh changes them.

    Moments are computed per channel first, on the device that holds the channel, and are then combined to groups. So
    where channels are split over devices, only vectors (B, C) are exchanged, never an activation.
    """

    def __init__(self, channels: int, *, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        b, _, _, c = x_BHWC.shape
        mean_BC, var_BC = _moments(x_BHWC, (1, 2))
        mean_BGc = mean_BC.reshape(b, self.groups, c // self.groups)
        mean_BG1 = mean_BGc.mean(axis=2, keepdims=True)
        # law of total variance: all channels have the same number of pixels
        var_BGc = var_BC.reshape(mean_BGc.shape) + jnp.square(mean_BGc - mean_BG1)
        rstd_BG1 = jax.lax.rsqrt(var_BGc.mean(axis=2, keepdims=True) + EPSILON)
        mean = jnp.broadcast_to(mean_BG1, mean_BGc.shape).reshape(b, 1, 1, c)
        rstd = jnp.broadcast_to(rstd_BG1, mean_BGc.shape).reshape(b, 1, 1, c)
        return _affine(x_BHWC, mean, rstd, self.scale[...], self.bias[...])


class RunningNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) over the batch in `shards` equal parts.

    With one part this is synchronised batch normalisation: the statistics are those of the global batch on any mesh.
    With one part per data shard each device uses its own samples and nothing is exchanged; the result then depends on
    the mesh, which is what `local` means. Where `train` is false, the running averages over all parts are used.
    """

    def __init__(self, channels: int, *, shards: int = 1, momentum: float = 0.9) -> None:
        self.shards = shards
        self.momentum = momentum
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        if not train:
            rstd = jax.lax.rsqrt(self.var[...] + EPSILON)
            return _affine(x_BHWC, self.mean[...], rstd, self.scale[...], self.bias[...])
        b, h, w, c = x_BHWC.shape
        if b % self.shards:
            raise InvalidInput(
                f"a batch of {b} cannot be split into {self.shards} equal parts for model.norm = 'local'"
            )
        x_DBHWC = x_BHWC.reshape(self.shards, b // self.shards, h, w, c)
        mean_DC, var_DC = _moments(x_DBHWC, (1, 2, 3))
        self._remember(self.mean, mean_DC)
        self._remember(self.var, var_DC)
        shape = (self.shards, 1, 1, 1, c)
        rstd = jax.lax.rsqrt(var_DC + EPSILON).reshape(shape)
        return _affine(x_DBHWC, mean_DC.reshape(shape), rstd, self.scale[...], self.bias[...]).reshape(b, h, w, c)

    def _remember(self, average: nnx.BatchStat[jax.Array], now_DC: jax.Array) -> None:
        now = jax.lax.stop_gradient(now_DC.mean(axis=0))
        average[...] = self.momentum * average[...] + (1 - self.momentum) * now


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance over some axes, float32, without these axes."""
    # moments of bfloat16 activations would have three digits
    x = x.astype(jnp.float32)
    # two passes: mean(x²) - mean(x)² loses all digits where the mean is large against the spread
    mean = x.mean(axis=axes, keepdims=True)
    var = jnp.square(x - mean).mean(axis=axes)
    return mean.reshape(var.shape), var


def _moments_forward(x: jax.Array, axes: tuple[int, ...]) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    mean, var = _moments(x, axes)
    return (mean, var), (x, mean)


def _moments_backward(axes: tuple[int, ...], kept: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[jax.Array]:
    # d mean / dx = 1/N and d var / dx = 2 (x - mean) / N. Automatic differentiation of the two passes would add the
    # gradient of the variance through the mean, a sum over the whole activation that is always zero.
    x, mean = kept
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    count = float(math.prod(x.shape[axis] for axis in axes))  # a whole number of pixels may not fit in 32 bits
    dmean, dvar = (of.reshape(shape) / count for of in given)
    dx = dmean + 2 * dvar * (x.astype(jnp.float32) - mean.reshape(shape))
    return (dx.astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


def _affine(x: jax.Array, mean: jax.Array, rstd: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return ((x.astype(jnp.float32) - mean) * (rstd * scale) + bias).astype(x.dtype)


def make_norm(kind: Literal["group", "batch", "local"], channels: int, *, data_shards: int) -> GroupNorm | RunningNorm:
    """Make the layer that `model.norm` names; nothing else reads that setting.

    Groups hold at least four channels, because a group of one channel removes the level of the image, and the absolute
    reflectance carries information. There are at most eight groups.
    """
    if kind == "group":
        return GroupNorm(channels, groups=math.gcd(channels, min(8, max(1, channels // 4))))
    return RunningNorm(channels, shards=data_shards if kind == "local" else 1)


class ConvBlock(nnx.Module):
    """conv – norm – relu – dropout – conv – norm, with or without a skip around it, then relu.

    The skip passes the input on without normalisation, so absolute levels reach the last layer with any norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Literal["group", "batch", "local"],
        dropout: float,
        data_shards: int,
        residual: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.residual = residual
        # a norm follows, so these convolutions need no bias
        self.conv1 = conv(inputs, outputs, 3, bias=False, rngs=rngs)
        self.norm1 = make_norm(norm, outputs, data_shards=data_shards)
        # whole channels are dropped: neighbouring pixels are so similar that dropping single pixels would hide nothing
        self.dropout = Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs) if dropout else None
        self.conv2 = conv(outputs, outputs, 3, bias=False, rngs=rngs)
        self.norm2 = make_norm(norm, outputs, data_shards=data_shards)
        self.skip = conv(inputs, outputs, 1, rngs=rngs) if residual and inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        return self.second(self.first(x_BHWC, train=train), x_BHWC, train=train)

    def first(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Run the block up to the second convolution; a pipeline may cut here."""
        y = nnx.relu(self.norm1(self.conv1(x_BHWC), train=train))
        return y if self.dropout is None else self.dropout(y, deterministic=not train)

    def second(self, y: jax.Array, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Run the rest of the block on the result of `first` and the input of the block."""
        y = self.norm2(self.conv2(y), train=train)
        if self.residual:
            y = y + (x_BHWC if self.skip is None else self.skip(x_BHWC))
        return nnx.relu(y)


def run_block(block: Any, x: jax.Array, *, train: bool, remat: bool) -> jax.Array:
    """Call a block; with `remat` its activations are not kept but computed again when gradients need them."""

    def call(module: Any, image: jax.Array) -> jax.Array:
        y: jax.Array = module(image, train=train)
        return y

    if remat and train:
        y: jax.Array = nnx.remat(call)(block, x)
        return y
    return call(block, x)
