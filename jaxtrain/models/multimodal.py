"""The network `multimodal` has one branch for each kind of data, each at its own resolution, and merges what they see.

A branch may be cut off from the others: `encoder_NAME` takes the array of its modality alone, `fusion` takes what the
branches return, `decoder` takes what the fusion returns, and `head` makes the logits. Where the modalities meet is the
setting `model.fusion`:

- `late`: each branch is a U-Net of its own, without a head; its last features are merged
- `middle`: each branch is an encoder; features are merged at every level, and one decoder goes on
- `early`: each branch is one block; its features are merged, and one U-Net goes on

In training, the branches run once and are merged several times: all together, and each modality alone (`model.alone`).
So every step asks each branch for an answer of its own. The views of a sample follow each other along the samples,
(B · views, …): first all together, then the modalities in their order. Elsewhere there is the first view alone.

The merge is a mean over what is present at a pixel, weighted by the share of the pixel that was observed. So the
network does with any modalities: with one of them, that one alone decides. Where all are absent, features are 0 and
the answer is that of the biases, whatever the ground.

The input is a dict, modality → x_BHWC, or x_BHWTC of a series. Beside its bands, each array has a channel that says
what was observed, and a series also has sine and cosine of the day (`Modality.inputs`); images are 0 where nothing was
observed. Rows and columns are those of the modality's own grid.

Letters in shapes: B sample, H row, W column, T date, C channel, F feature, M modality, K class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import HE, SMALL, ConvBlock, conv, halve, repeat_nearest, run_block
from jaxtrain.models.modality import Encoded, Modality, powers_of_two, view_count
from jaxtrain.models.multimodal_units import branch_units, fusion_units
from jaxtrain.models.temporal import BESIDE, attend, mean_max, neighbours
from jaxtrain.models.units import Unit
from zarr_store.errors import InvalidInput

__all__ = ["Ascent", "Branch", "Decoder", "Descent", "Encoded", "Fusion", "Multimodal", "build_multimodal"]

_LEAST = 1e-6
"""Smallest share that counts as present."""


class Descent(nnx.Module):
    """The encoder of a U-Net: `depth` halvings, level i has `width * 2**i` channels. Returns features of all levels."""

    def __init__(self, inputs: int, width: int, depth: int, config: ModelConfig, **made: Any) -> None:
        widths = [width << level for level in range(depth + 1)]
        for i, outputs in enumerate(widths):
            setattr(self, f"level{i}", _block(inputs if i == 0 else widths[i - 1], outputs, config, **made))
        self.depth, self.remat = depth, config.remat

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
        found = []
        for level in range(self.depth + 1):
            x_BHWC = halve(x_BHWC) if level else x_BHWC
            x_BHWC = run_block(getattr(self, f"level{level}"), x_BHWC, train=train, remat=self.remat)
            found.append(x_BHWC)
        return tuple(found)


class Ascent(nnx.Module):
    """The decoder of a U-Net: from features of all levels, finest first, to features of the finest."""

    def __init__(self, width: int, depth: int, config: ModelConfig, *, rngs: nnx.Rngs, data_shards: int) -> None:
        widths = [width << level for level in range(depth + 1)]
        for i in range(depth):
            setattr(self, f"up{i}", conv(widths[i + 1], widths[i], 1, rngs=rngs))
            setattr(self, f"level{i}", _block(widths[i], widths[i], config, rngs=rngs, data_shards=data_shards))
        self.depth, self.remat = depth, config.remat

    def __call__(self, levels: Sequence[jax.Array], *, train: bool) -> jax.Array:
        x_BHWC = levels[-1]
        for level in reversed(range(self.depth)):
            x_BHWC = repeat_nearest(getattr(self, f"up{level}")(x_BHWC)) + levels[level]
            x_BHWC = run_block(getattr(self, f"level{level}"), x_BHWC, train=train, remat=self.remat)
        return x_BHWC


class Series(nnx.Module):
    """Features of each pixel from its own series of dates: two convolutions over dates, then a pooling over them."""

    def __init__(self, inputs: int, width: int, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.taps, self.pooling = config.taps, config.pooling
        self.linear1 = nnx.Linear(config.taps * inputs, width, kernel_init=HE, rngs=rngs)
        self.linear2 = nnx.Linear(config.taps * width, width, kernel_init=HE, rngs=rngs)
        self.scale1, self.scale2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        heads = next(heads for heads in range(max(1, width // 8), 0, -1) if width % heads == 0)
        self.score = nnx.Linear(width, heads, kernel_init=SMALL, rngs=rngs) if config.pooling == "attention" else None

    def __call__(self, x_BHWTC: jax.Array) -> jax.Array:
        seen_BHWT = x_BHWTC[..., -BESIDE] > 0
        for linear, scale in ((self.linear1, self.scale1), (self.linear2, self.scale2)):
            y = linear(neighbours(x_BHWTC, self.taps))
            y = nnx.relu(scale(y.astype(jnp.float32))).astype(x_BHWTC.dtype)
            # a date without an observation does not affect its neighbours
            x_BHWTC = jnp.where(seen_BHWT[..., None], y, jnp.zeros((), y.dtype))
        if self.score is None:
            return mean_max(x_BHWTC, seen_BHWT)
        return attend(x_BHWTC, self.score(x_BHWTC), seen_BHWT)

    @staticmethod
    def outputs(width: int, config: ModelConfig) -> int:
        """Return the number of features."""
        return width if config.pooling == "attention" else 2 * width


class Branch(nnx.Module):
    """The branch of one modality, on its own grid: `branch(x, train=…) -> Encoded`."""

    def __init__(self, modality: Modality, config: ModelConfig, *, per_image: bool, **made: Any) -> None:
        width, depth = branch_size(modality, config)
        self.dates, inputs = modality.dates, modality.inputs
        self.series = Series(inputs, width, config, rngs=made["rngs"]) if modality.dates else None
        if modality.dates:
            inputs = Series.outputs(width, config)
        self.remat, self.pooled = config.remat, per_image and config.fusion == "late"
        self.block = _block(inputs, width, config, **made) if config.fusion == "early" else None
        self.down = None if config.fusion == "early" else Descent(inputs, width, depth, config, **made)
        climbs = config.fusion == "late" and not per_image
        self.climb = Ascent(width, depth, config, **made) if climbs else None

    @property
    def levels(self) -> int:
        """Number of levels whose features it returns."""
        return self.down.depth + 1 if self.down is not None and self.climb is None and not self.pooled else 1

    def __call__(self, x: jax.Array, *, train: bool) -> Encoded:
        x, seen_BHW1 = self.enter(x)
        if self.block is not None:
            return Encoded((run_block(self.block, x, train=train, remat=self.remat),), seen_BHW1)
        assert self.down is not None
        levels = self.down(x, train=train)
        if self.climb is not None:
            return Encoded((self.climb(levels, train=train),), seen_BHW1)
        if self.pooled:
            mean, share = self.pool(levels[-1], seen_BHW1)
            return Encoded((mean,), share)
        return Encoded(levels, seen_BHW1)

    def enter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the input of the first block, and what was observed (B, H, W, 1)."""
        if self.series is None:
            return x, x[..., -1:]
        return self.series(x), x[..., -BESIDE].max(axis=-1)[..., None]

    def pool(self, x_BHWF: jax.Array, seen_BHW1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the mean over what was observed of an image, and the share of it, both (B, 1, 1, …)."""
        share = _pool(seen_BHW1, seen_BHW1.shape[1] // x_BHWF.shape[1])
        total = share.sum(axis=(1, 2), keepdims=True)
        mean = (x_BHWF * share).sum(axis=(1, 2), keepdims=True) / _positive(total)
        return mean, seen_BHW1.mean(axis=(1, 2), keepdims=True)


def branch_size(modality: Modality, config: ModelConfig) -> tuple[int, int]:
    """Return width and depth of a branch; by default it reaches the coarsest level of the network."""
    size = config.modalities.get(modality.name)
    halvings, _ = powers_of_two(modality.ratio)
    width = size.width if size is not None and size.width else config.width
    depth = size.depth if size is not None and size.depth else max(0, config.depth - halvings)
    return width, depth


class Fusion(nnx.Module):
    """Merge the branches: features of each level become those of the decoder, a mean over what is present.

    `fusion({name: Encoded}) -> features` of each level of the decoder, finest first. Features are turned to one width
    by a 1 × 1 convolution on the grid of their modality, repeated to the grid of the level, and averaged. A convolution
    of the shares adds what is there at all. With `train`, the features of all views.
    """

    def __init__(self, modalities: Sequence[Modality], config: ModelConfig, *, per_image: bool, rngs: nnx.Rngs) -> None:
        self.modalities = tuple(modalities)
        self.kind, self.per_image = config.fusion, per_image
        self.pooled = per_image and config.fusion == "late"
        self.views = view_count(self.modalities, config)
        self.depth = config.depth if config.fusion == "middle" else 0
        sources: dict[int, dict[str, int]] = {level: {} for level in range(self.depth + 1)}
        for one in self.modalities:
            width, depth = branch_size(one, config)
            halvings, _ = powers_of_two(one.ratio)
            if config.fusion != "middle":
                sources[0][one.name] = 0
                channels = width << depth if self.pooled else width
                self._add(one.name, 0, channels, config.width, rngs)
                continue
            for own in range(depth + 1):
                level = own + halvings
                if level <= self.depth:
                    sources[level][one.name] = own
                    self._add(one.name, level, width << own, config.width << level, rngs)
        self.sources = tuple(tuple(sources[level].items()) for level in range(self.depth + 1))
        if not self.sources[-1]:
            raise InvalidInput(
                f"no branch reaches level {self.depth} of the network, where features are halved {self.depth} times: "
                "give one of model.modalities a greater depth, or take a smaller model.depth"
            )
        for level in range(self.depth + 1):
            adding = conv(len(self.modalities), config.width << level, 1, bias=False, init=SMALL, rngs=rngs)
            setattr(self, f"present_level{level}", adding)

    def _add(self, name: str, level: int, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        setattr(self, f"{name}_level{level}", conv(inputs, outputs, 1, rngs=rngs))

    def __call__(self, encoded: Mapping[str, Encoded], *, train: bool) -> tuple[jax.Array, ...]:
        views = self.views if train else 1
        return tuple(self._merge(encoded, level, views) for level in range(self.depth + 1))

    def _merge(self, encoded: Mapping[str, Encoded], level: int, views: int) -> jax.Array:
        shares = {
            one.name: _in_views(self._share(encoded[one.name].seen, one, level), views, number + 1)
            for number, one in enumerate(self.modalities)
        }
        total = merged = None
        for name, own in self.sources[level]:
            one = next(one for one in self.modalities if one.name == name)
            y = getattr(self, f"{name}_level{level}")(encoded[name].features[own])
            rest = powers_of_two(one.ratio)[1]
            y = y if self.pooled else _repeat(y, rest if self.kind == "middle" else one.ratio)
            y, share = _in_views(y, views), shares[name]
            merged = y * share if merged is None else merged + y * share
            total = share if total is None else total + share
        present = getattr(self, f"present_level{level}")(jnp.concatenate(list(shares.values()), axis=-1))
        if merged is None or total is None:
            return jnp.asarray(present)
        return jnp.asarray(merged / _positive(total) + present)

    def _share(self, seen_BHW1: jax.Array, one: Modality, level: int) -> jax.Array:
        """Return the share of each pixel of a level that the modality observed."""
        if self.pooled:
            return seen_BHW1
        halvings, rest = powers_of_two(one.ratio)
        share = _repeat(seen_BHW1, rest)
        return _pool(share, 1 << (level - halvings)) if level >= halvings else _repeat(share, 1 << (halvings - level))


class Decoder(nnx.Module):
    """The part after the fusion: a block (late), the decoder of a U-Net (middle), or a whole U-Net (early).

    `decoder(features, train=…)` → features (B, H, W, F) of the finest grid, or (B, F) of one answer for each image.
    """

    def __init__(self, config: ModelConfig, *, per_image: bool, **made: Any) -> None:
        self.kind, self.per_image, self.remat = config.fusion, per_image, config.remat
        width, depth = config.width, config.depth
        late = config.fusion == "late"
        self.mix = nnx.Linear(width, width, kernel_init=HE, rngs=made["rngs"]) if late and per_image else None
        self.down = Descent(width, width, depth, config, **made) if config.fusion == "early" else None
        self.climb = None if late or per_image else Ascent(width, depth, config, **made)
        blocked = (late and not per_image) or (config.fusion == "middle" and per_image)
        channels = width if late else width << depth
        self.block = _block(channels, channels, config, **made) if blocked else None

    def __call__(self, levels: tuple[jax.Array, ...], *, train: bool) -> jax.Array:
        if self.down is not None:
            levels = self.down(levels[0], train=train)
        x = levels[-1] if self.climb is None else self.climb(levels, train=train)
        if self.block is not None:
            x = run_block(self.block, x, train=train, remat=self.remat)
        if self.per_image:
            x = x.mean(axis=(1, 2))
        return x if self.mix is None else nnx.relu(self.mix(x))


class Multimodal(nnx.Module):
    """A branch `encoder_NAME` for each modality, then `fusion`, `decoder` and `head`."""

    def __init__(
        self,
        config: ModelConfig,
        modalities: Sequence[Modality],
        *,
        classes: int,
        per_image: bool,
        rngs: nnx.Rngs,
        data_shards: int,
    ) -> None:
        if not modalities:
            raise InvalidInput("model.name = 'multimodal' needs modalities: a table [data.modalities.NAME] for each")
        self.names = tuple(one.name for one in modalities)
        made = {"rngs": rngs, "data_shards": data_shards}
        for one in modalities:
            setattr(self, f"encoder_{one.name}", Branch(one, config, per_image=per_image, **made))
        self.fusion = Fusion(modalities, config, per_image=per_image, rngs=rngs)
        self.decoder = Decoder(config, per_image=per_image, **made)
        if per_image:
            features = config.width if config.fusion == "late" else config.width << config.depth
            self.head: nnx.Linear | nnx.Conv = nnx.Linear(features, classes, kernel_init=SMALL, rngs=rngs)
        else:
            self.head = conv(config.width, classes, 1, rngs=rngs, init=SMALL)

    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        encoded = {name: self.encode(name, x[name], train=train) for name in self.names}
        logits: jax.Array = self.head(self.decoder(self.fusion(encoded, train=train), train=train))
        return logits

    def branches(self) -> dict[str, list[Unit]]:
        """Return the units of each branch, by the name of its modality (`multimodal_units`)."""
        return branch_units(self)

    def joined(self) -> list[Unit]:
        """Return the units from the fusion to the logits (`multimodal_units`)."""
        return fusion_units(self)

    def encode(self, name: str, x: jax.Array, *, train: bool) -> Encoded:
        """Run the branch of one modality, which needs nothing of the others."""
        found: Encoded = getattr(self, f"encoder_{name}")(x, train=train)
        return found


def _block(inputs: int, outputs: int, config: ModelConfig, *, rngs: nnx.Rngs, data_shards: int) -> ConvBlock:
    return ConvBlock(inputs, outputs, norm=config.norm, dropout=config.dropout, data_shards=data_shards,
                     residual=True, rngs=rngs)  # fmt: skip


def _repeat(x_BHWC: jax.Array, times: int) -> jax.Array:
    """Repeat each pixel, so that height and width are `times` as large."""
    if times == 1:
        return x_BHWC
    b, h, w, c = x_BHWC.shape
    wide = jnp.broadcast_to(x_BHWC[:, :, None, :, None, :], (b, h, times, w, times, c))
    return wide.reshape(b, h * times, w * times, c)


def _pool(x_BHWC: jax.Array, times: int) -> jax.Array:
    """Average over `times` × `times` pixels."""
    if times == 1:
        return x_BHWC
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // times, times, w // times, times, c).mean(axis=(2, 4))


def _in_views(x_BHWC: jax.Array, views: int, own: int = 0) -> jax.Array:
    """Repeat each sample for each view; with `own`, only the first view and this one keep it, the others get zeros."""
    if views == 1:
        return x_BHWC
    # the views of a sample follow each other, so that a batch that is split over devices stays where it is
    samples, *rest = x_BHWC.shape
    wide = jnp.broadcast_to(x_BHWC[:, None], (samples, views, *rest))
    if own:
        kept = jnp.asarray([view in (0, own) for view in range(views)], x_BHWC.dtype)
        wide = wide * kept.reshape(-1, *(1,) * len(rest))
    return wide.reshape(samples * views, *rest)


def _positive(share: jax.Array) -> jax.Array:
    """Return a share to divide by, which is not 0."""
    return jnp.maximum(share, jnp.asarray(_LEAST, share.dtype))


def build_multimodal(
    config: ModelConfig,
    *,
    channels: int,
    classes: int,
    rngs: nnx.Rngs,
    data_shards: int,
    modalities: Sequence[Modality] = (),
    per_image: bool = False,
) -> nnx.Module:
    """Build the network `multimodal`; `channels`, the bands of all modalities together, follow from them."""
    del channels
    return Multimodal(config, modalities, classes=classes, per_image=per_image, rngs=rngs, data_shards=data_shards)
