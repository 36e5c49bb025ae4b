"""A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597) of residual blocks.

Differences from the paper, each for a reason: blocks are residual (He et al. 2016) and padded, so the map has the size
of the image; the decoder adds the encoder's features instead of concatenating them, which halves the cost of its first
convolution at the finest level; upsampling is a 1 × 1 convolution on the coarse grid and a nearest repeat, which is
cheap when split over devices and leaves no checkerboard.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import SMALL, ConvBlock, conv, halve, repeat_nearest, run_block
from jaxtrain.models.units import Carry, Unit, halves

__all__ = ["UNet", "build_unet"]


class UNet(nnx.Module):
    """`depth` halvings; level i has `width * 2**i` channels."""

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> None:
        widths = [config.width << level for level in range(config.depth + 1)]

        def block(inputs: int, outputs: int) -> ConvBlock:
            return ConvBlock(
                inputs,
                outputs,
                norm=config.norm,
                dropout=config.dropout,
                data_shards=data_shards,
                residual=True,
                rngs=rngs,
            )

        # string keys, so that a parameter's path is the same in rules, checkpoints and reports
        self.encoder = nnx.Dict(
            {f"level{i}": block(channels if i == 0 else widths[i - 1], w) for i, w in enumerate(widths)}
        )
        self.up = nnx.Dict({f"level{i}": conv(widths[i + 1], widths[i], 1, rngs=rngs) for i in range(config.depth)})
        self.decoder = nnx.Dict({f"level{i}": block(widths[i], widths[i]) for i in range(config.depth)})
        self.head = conv(widths[0], classes, 1, rngs=rngs, init=SMALL)
        self.depth, self.remat = config.depth, config.remat

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        skips = []
        for level in range(self.depth + 1):
            x_BHWC = halve(x_BHWC) if level else x_BHWC
            x_BHWC = run_block(self.encoder[f"level{level}"], x_BHWC, train=train, remat=self.remat)
            skips.append(x_BHWC)
        for level in reversed(range(self.depth)):
            x_BHWC = repeat_nearest(self.up[f"level{level}"](x_BHWC)) + skips[level]
            x_BHWC = run_block(self.decoder[f"level{level}"], x_BHWC, train=train, remat=self.remat)
        logits_BHWK: jax.Array = self.head(x_BHWC)
        return logits_BHWK

    def units(self) -> list[Unit]:
        """Return the pieces between which a pipeline may cut; the carry is for the decoder, coarsest first."""

        def down(carry: Carry) -> Carry:
            return (halve(carry[0]), *carry)

        def climb(level: int) -> Callable[[Carry], Carry]:
            def up(carry: Carry) -> Carry:
                x, skip, *rest = carry
                return (repeat_nearest(self.up[f"level{level}"](x)) + skip, *rest)

            return up

        found = []
        for level in range(self.depth + 1):
            name = f"encoder/level{level}"
            found += halves(name, self.encoder[f"level{level}"], down if level else tuple)
        for level in reversed(range(self.depth)):
            name = f"decoder/level{level}"
            found += halves(name, self.decoder[f"level{level}"], climb(level), (f"up/level{level}",))
        return [*found, Unit("head", ("head",), lambda carry, train: (self.head(carry[0]),))]


def build_unet(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """Build the network `MODELS["unet"]`."""
    return UNet(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
