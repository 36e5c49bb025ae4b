"""Residual networks with one prediction for each image (He et al. 2016, arXiv:1512.03385), of 10, 18, 34 or 50 layers.

Differences from the paper, each for a reason: the stem has no norm and the skips pass their input on unnormalised, so
that the level of an image, which is evidence in reflectances, reaches the last layer under any norm; the pool of the
large stem is a maximum over 2 × 2 pixels, because the gradient of overlapping pools is a slow scatter on CPU; a skip
that halves takes the mean of 2 × 2 pixels before its 1 × 1 convolution instead of one pixel of four (He et al. 2019,
arXiv:1812.01187, ResNet-D); a block that halves does it in its first 3 × 3 convolution.

Letters in shapes: B sample, H row, W column, C channel, K class.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import SMALL, conv, halve, make_norm, run_block
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.units import Unit, halves
from zarr_store.errors import InvalidInput

__all__ = ["STAGES", "BasicBlock", "Bottleneck", "ResNet", "build_resnet"]

STAGES: dict[int, tuple[int, ...]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Layers by their usual name → blocks of each stage; 50 uses bottlenecks. 10 is one block a stage, for small data."""
_EXPANSION = 4


def mean_halve(x_BHWC: jax.Array) -> jax.Array:
    """Halve height and width by the mean of 2 × 2 pixels.

    Raises:
        InvalidInput: Height or width is odd.
    """
    b, h, w, c = x_BHWC.shape
    if h % 2 or w % 2:
        raise InvalidInput(
            f"an image of {h} × {w} pixels cannot be halved: take data.patch a multiple of 16 (64 for the large stem), "
            "or fewer stages in model.blocks"
        )
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class BasicBlock(nnx.Module):
    """conv 3 × 3 – norm – relu – dropout – conv 3 × 3 – norm, a skip around it, relu; the first may halve."""

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, *, stride: int, data_shards: int, rngs: nnx.Rngs
    ) -> None:
        self.stride = stride
        self.conv1 = conv(inputs, outputs, 3, bias=False, stride=stride, rngs=rngs)
        self.norm1 = make_norm(config.norm, outputs, data_shards=data_shards)
        self.dropout = Dropout(config.dropout, broadcast_dims=(1, 2), rngs=rngs) if config.dropout else None
        self.conv2 = conv(outputs, outputs, 3, bias=False, rngs=rngs)
        self.norm2 = make_norm(config.norm, outputs, data_shards=data_shards)
        self.skip = _skip(inputs, outputs, stride, rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        return self.second(self.first(x_BHWC, train=train), x_BHWC, train=train)

    def first(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Run the block up to the second convolution; a pipeline may cut here."""
        y = nnx.relu(self.norm1(self.conv1(x_BHWC), train=train))
        return y if self.dropout is None else self.dropout(y, deterministic=not train)

    def second(self, y: jax.Array, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Run the rest of the block on the result of `first` and the input of the block."""
        y = self.norm2(self.conv2(y), train=train)
        return nnx.relu(y + _around(x_BHWC, self.skip, self.stride))


class Bottleneck(nnx.Module):
    """conv 1 × 1 – conv 3 × 3 – conv 1 × 1 to four times the channels, a skip around it, relu; the second may halve."""

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, *, stride: int, data_shards: int, rngs: nnx.Rngs
    ) -> None:
        self.stride = stride
        inner = outputs // _EXPANSION
        self.conv1 = conv(inputs, inner, 1, bias=False, rngs=rngs)
        self.norm1 = make_norm(config.norm, inner, data_shards=data_shards)
        self.conv2 = conv(inner, inner, 3, bias=False, stride=stride, rngs=rngs)
        self.norm2 = make_norm(config.norm, inner, data_shards=data_shards)
        self.dropout = Dropout(config.dropout, broadcast_dims=(1, 2), rngs=rngs) if config.dropout else None
        self.conv3 = conv(inner, outputs, 1, bias=False, rngs=rngs)
        self.norm3 = make_norm(config.norm, outputs, data_shards=data_shards)
        self.skip = _skip(inputs, outputs, stride, rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x_BHWC), train=train))
        y = nnx.relu(self.norm2(self.conv2(y), train=train))
        if self.dropout is not None:
            y = self.dropout(y, deterministic=not train)
        y = self.norm3(self.conv3(y), train=train)
        return nnx.relu(y + _around(x_BHWC, self.skip, self.stride))


class ResNet(nnx.Module):
    """Stem, stages of blocks of which all but the first halve the image, mean over the image, one linear layer.

    Call: float32 (B, H, W, C) → logits (B, K).
    """

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> None:
        if not config.blocks and config.depth not in STAGES:
            raise InvalidInput(
                f"model.depth of a resnet is one of {', '.join(map(str, STAGES))}, got {config.depth}; or name the "
                "blocks of each stage in model.blocks"
            )
        bottleneck = not config.blocks and config.depth == 50
        self.stage_blocks = config.blocks or STAGES[config.depth]
        self.stem_kind, self.remat = config.stem, config.remat
        size, stride, inputs = {
            "small": (3, 1, channels),
            "pixel": (1, 1, channels),
            "patch": (3, 1, 4 * channels),
            "large": (7, 2, channels),
        }[config.stem]
        self.stem = conv(inputs, config.width, size, stride=stride, rngs=rngs)
        before = config.width
        # string keys, so that a parameter's path is the same in rules, checkpoints and reports
        self.body: nnx.Dict[nnx.Module] = nnx.Dict({})
        for stage, blocks in enumerate(self.stage_blocks):
            after = (config.width << stage) * (_EXPANSION if bottleneck else 1)
            for block in range(blocks):
                self.body[f"stage{stage}_block{block}"] = (Bottleneck if bottleneck else BasicBlock)(
                    before, after, config, stride=2 if stage and not block else 1, data_shards=data_shards, rngs=rngs
                )
                before = after
        self.head = nnx.Linear(before, classes, kernel_init=SMALL, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        y_BHWC = self.enter(x_BHWC)
        for stage, blocks in enumerate(self.stage_blocks):
            for block in range(blocks):
                y_BHWC = run_block(self.body[f"stage{stage}_block{block}"], y_BHWC, train=train, remat=self.remat)
        return self.leave(y_BHWC)

    def units(self) -> list[Unit]:
        """Return the pieces between which a pipeline may cut: stem, halves of blocks, bottlenecks, end."""
        found = [Unit("stem", ("stem",), lambda carry, train: (self.enter(carry[0]),))]
        for name, block in self.body.items():
            found += halves(f"body/{name}", block) if isinstance(block, BasicBlock) else [_of_bottleneck(name, block)]
        return [*found, Unit("head", ("head",), lambda carry, train: (self.leave(carry[0]),))]

    def enter(self, x_BHWC: jax.Array) -> jax.Array:
        """Run the stem: `small` and `pixel` keep the size, `patch` folds pixels into channels, `large` quarters it."""
        if self.stem_kind == "patch":
            x_BHWC = fold(x_BHWC)
        y_BHWC: jax.Array = nnx.relu(self.stem(x_BHWC))
        return halve(y_BHWC) if self.stem_kind == "large" else y_BHWC

    def leave(self, y_BHWC: jax.Array) -> jax.Array:
        """Turn features (B, H, W, C) into logits (B, K)."""
        logits_BK: jax.Array = self.head(y_BHWC.mean(axis=(1, 2)))
        return logits_BK


def _of_bottleneck(name: str, block: Any) -> Unit:
    return Unit(f"body/{name}", (f"body/{name}",), lambda carry, train: (block(carry[0], train=train),))


def fold(x_BHWC: jax.Array) -> jax.Array:
    """Fold 2 × 2 pixels into channels, (B, H, W, C) → (B, H/2, W/2, 4C).

    Raises:
        InvalidInput: Height or width is odd.
    """
    b, h, w, c = x_BHWC.shape
    if h % 2 or w % 2:
        raise InvalidInput(
            f"an image of {h} × {w} pixels cannot be folded by 2 × 2: it needs an even side (data.patch of a "
            "cube), or another model.stem"
        )
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def _skip(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv | None:
    return conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs or stride > 1 else None


def _around(x_BHWC: jax.Array, skip: nnx.Conv | None, stride: int) -> jax.Array:
    if stride > 1:
        x_BHWC = mean_halve(x_BHWC)
    return x_BHWC if skip is None else skip(x_BHWC)


def build_resnet(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """Build the network `MODELS["resnet"]`."""
    return ResNet(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
