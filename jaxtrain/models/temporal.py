"""The temporal network predicts from a series of dates: convolutions over dates, then a pooling over them.

The convolutions are those of TempCNN (Pelletier et al. 2019, "Temporal convolutional neural network for the
classification of satellite image time series", doi:10.3390/rs11050523). Dates are pooled by attention, where heads
learn which dates matter (as in Garnot & Landrieu 2020, arXiv:2007.00586, whose query is learned, too), or by mean
and maximum. Both leave out dates on which the pixel was not observed, and do with any number of dates.

Dates need not be regular: each comes with its day of the year, as sine and cosine, and with whether it was observed.

Letters in shapes: B sample, H row, W column, T date, C band, F feature, A head, K class.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import HE, SMALL, ConvBlock, run_block
from jaxtrain.models.dropout import Dropout

__all__ = ["BESIDE", "Temporal", "attend", "build_temporal", "mean_max", "neighbours", "series_of"]

BESIDE = 3
"""Channels beside the bands: observed, sine and cosine of the day of the year."""
_YEAR = 365.25


def series_of(x_BHWTC: jax.Array, observed_BHWT: jax.Array, day_BT: jax.Array) -> jax.Array:
    """Return the input of the network, (B, H, W, T, C + 3): bands, observed, sine and cosine of the day of the year.

    Args:
        x_BHWTC: Normalised float32, 0 where nothing was observed.
        observed_BHWT: Whether the network may see the pixel on a date.
        day_BT: Day of the year, from 1.
    """
    angle_BT = day_BT.astype(jnp.float32) * jnp.float32(2 * jnp.pi / _YEAR)
    shape = observed_BHWT.shape
    sine, cosine = (jnp.broadcast_to(f(angle_BT)[:, None, None], shape) for f in (jnp.sin, jnp.cos))
    beside = jnp.stack([observed_BHWT.astype(jnp.float32), sine, cosine], axis=-1)
    return jnp.concatenate([x_BHWTC, beside], axis=-1)


class Temporal(nnx.Module):
    """`depth` convolutions over `taps` dates, pooling, `context` blocks of 3 × 3 convolutions over pixels, the head.

    All layers up to the pooling act on each pixel alone, as products along the last axis, so that images may be split
    in any way. Their norm is over the features of one date; `model.norm` is that of the blocks.
    """

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> None:
        width = config.width
        self.depth, self.taps, self.pooling, self.context = config.depth, config.taps, config.pooling, config.context
        self.remat = config.remat
        inputs = [channels + BESIDE, *[width] * (config.depth - 1)]
        self.dates = nnx.Dict(
            {
                f"linear{i + 1}": nnx.Linear(config.taps * size, width, kernel_init=HE, rngs=rngs)
                for i, size in enumerate(inputs)
            }
        )
        self.norms = nnx.Dict({f"norm{i + 1}": nnx.LayerNorm(width, rngs=rngs) for i in range(config.depth)})
        self.heads = max(1, width // 8)
        pooled = 2 * width
        if config.pooling == "attention":
            self.score = nnx.Linear(width, self.heads, kernel_init=SMALL, rngs=rngs)
            pooled = width - width % self.heads
        self.dropout = Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.mix = nnx.Linear(pooled, width, kernel_init=HE, rngs=rngs)
        self.blocks = nnx.Dict(
            {
                f"block{i}": ConvBlock(
                    width, width, norm=config.norm, dropout=config.dropout, data_shards=data_shards, residual=True,
                    rngs=rngs,
                )
                for i in range(config.context)
            }
        )  # fmt: skip
        self.head = nnx.Linear(width, classes, kernel_init=SMALL, rngs=rngs)

    def __call__(self, x_BHWTC: jax.Array, *, train: bool) -> jax.Array:
        seen_BHWT = x_BHWTC[..., -BESIDE] > 0
        for i in range(1, self.depth + 1):
            y = self.dates[f"linear{i}"](neighbours(x_BHWTC, self.taps))
            y = nnx.relu(self.norms[f"norm{i}"](y.astype(jnp.float32))).astype(x_BHWTC.dtype)
            # a date without an observation does not affect its neighbours
            x_BHWTC = jnp.where(seen_BHWT[..., None], y, jnp.zeros((), y.dtype))
            if self.dropout is not None:
                x_BHWTC = self.dropout(x_BHWTC, deterministic=not train)
        if self.pooling == "attention":
            pooled = attend(x_BHWTC, self.score(x_BHWTC), seen_BHWT)
        else:
            pooled = mean_max(x_BHWTC, seen_BHWT)
        x_BHWF = nnx.relu(self.mix(pooled))
        for i in range(self.context):
            x_BHWF = run_block(self.blocks[f"block{i}"], x_BHWF, train=train, remat=self.remat)
        logits_BHWK: jax.Array = self.head(x_BHWF)
        return logits_BHWK


def attend(x_BHWTF: jax.Array, score_BHWTA: jax.Array, seen_BHWT: jax.Array) -> jax.Array:
    """Return the weighted mean over dates of each head A, with the features of all heads side by side."""
    heads = score_BHWTA.shape[-1]
    score = score_BHWTA.astype(jnp.float32)
    # not minus infinity: a pixel that was never observed must not be nan
    weight = jax.nn.softmax(jnp.where(seen_BHWT[..., None], score, jnp.float32(-1e9)), axis=-2).astype(x_BHWTF.dtype)
    each = x_BHWTF.shape[-1] // heads
    parts = [(weight[..., a, None] * x_BHWTF[..., a * each : (a + 1) * each]).sum(axis=-2) for a in range(heads)]
    return jnp.concatenate(parts, axis=-1)


def neighbours(x_BHWTC: jax.Array, taps: int) -> jax.Array:
    """Put each date beside its neighbours, (…, T, taps · C), so that a convolution over dates is a product."""
    if taps == 1:
        return x_BHWTC
    around = taps // 2
    padded = jnp.pad(x_BHWTC, ((0, 0),) * 3 + ((around, around), (0, 0)))
    dates = x_BHWTC.shape[3]
    return jnp.concatenate([padded[..., i : i + dates, :] for i in range(taps)], axis=-1)


def mean_max(x_BHWTF: jax.Array, seen_BHWT: jax.Array) -> jax.Array:
    """Return mean and maximum over the observed dates; features are not negative, and 0 elsewhere."""
    count = jnp.maximum(seen_BHWT.sum(axis=-1, dtype=jnp.int32), 1).astype(x_BHWTF.dtype)
    return jnp.concatenate([x_BHWTF.sum(axis=-2) / count[..., None], x_BHWTF.max(axis=-2)], axis=-1)


def build_temporal(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """Build the network `temporal`."""
    return Temporal(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
