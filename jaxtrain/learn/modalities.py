"""Arrays of a batch of the network `multimodal`: each modality has its own image, what was observed, and days.

    image_NAME     (B, C, h, w), of series (B, T, C, h, w)   stored numbers, on the grid of the modality
    observed_NAME  (B, h, w), of series (B, T, h, w)         1 where the network may see the pixel
    day_NAME       (B, T), of series                         day of the year, from 1
    label          (B, H, W) on the finest grid, or (B,) of images with one answer each

Letters: B sample, M modality, T date, C band, H = h · ratio and W = w · ratio pixels of the finest grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.data.arrays import as_images
from jaxtrain.data.augment import augment, disturb
from jaxtrain.learn.losses import IGNORE
from jaxtrain.models.modality import Modality
from jaxtrain.models.temporal import series_of
from jaxtrain.parallel.mesh import batch_sharding, constrain, stored_sharding
from jaxtrain.traced import is_on

if TYPE_CHECKING:
    from jaxtrain.learn.state import Program

__all__ = ["hide_modalities", "modality_shapes", "modality_shardings", "prepare_modalities", "present_modalities",
           "seen_shares"]  # fmt: skip

_HIDDEN = 11
"""Purpose of the draw of hidden modalities, beside those of `augment`."""


def modality_shapes(program: Program, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of a batch of `size` windows, without the label."""
    shapes: dict[str, tuple[int, ...]] = {}
    for one in program.modalities:
        side = (program.config.data.patch // one.ratio,) * 2
        dates = (one.dates,) if one.dates else ()
        shapes[f"image_{one.name}"] = (size, *dates, len(one.bands), *side)
        shapes[f"observed_{one.name}"] = (size, *dates, *side)
        if one.dates:
            shapes[f"day_{one.name}"] = (size, *dates)
    return shapes


def modality_shardings(program: Program) -> dict[str, Any]:
    """Return the sharding of each array of a batch; all are split by samples."""
    lies: dict[str, Any] = {}
    for name, shape in modality_shapes(program, 1).items():
        many = len(shape) > 2
        lies[name] = stored_sharding(program.mesh, len(shape)) if many else batch_sharding(program.mesh)
    lies["label"] = stored_sharding(program.mesh, 1 if program.objective.task.per_image else 3)
    return lies


def present_modalities(program: Program, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the input of the network for evaluation and prediction, inside a jitted function."""
    return {one.name: _input(program, one, *_arrays(batch, one), batch) for one in program.modalities}


def prepare_modalities(
    program: Program, batch: Mapping[str, Any], key: jax.Array, mesh: Mesh
) -> tuple[dict[str, jax.Array], list[tuple[jax.Array, jax.Array]]]:
    """Return the varied input of the network, and labels with their shares of the loss, inside a jitted function.

    All modalities of a sample get the same turn and zoom; each draws its own gains, offsets and hidden bands. Then
    whole modalities are hidden (`data.modality_dropout`). The first label is that of all modalities together. The
    others are of each alone (`model.alone`), and count where it saw the pixel.
    """
    data, label = program.config.data, as_images(batch["label"])
    arrays = {one.name: _arrays(batch, one) for one in program.modalities}
    if data.augment:

        def turn(*several: jax.Array) -> list[jax.Array]:
            turned = augment(several, key=key, zoom=data.zoom)
            return list(constrain(turned, tuple(batch_sharding(mesh, image=True) for _ in turned)))

        # the draws depend on the key alone, so arrays of another size turn alike
        for name, both in arrays.items():
            image, seen = turn(*both)
            arrays[name] = (image, seen)
        label = turn(label)[0] if label.ndim > 2 else label
    own = {name: one.dropout for name, one in data.modalities.items()}
    chances = {name: data.modality_dropout if own[name] == "common" else float(own[name]) for name in arrays}
    observed = hide_modalities({name: seen for name, (_, seen) in arrays.items()}, key, chances)
    found = {}
    for number, one in enumerate(program.modalities):
        image = arrays[one.name][0]
        drawn = jax.random.fold_in(key, 100 + number)
        found[one.name] = _input(program, one, image, observed[one.name], batch, key=drawn)
    alone, count = program.config.model.alone, program.views - 1
    if not count:
        return found, [(label, jnp.float32(1))]
    of_each = [(_where_seen(label, observed[one.name], one), jnp.float32(alone / count)) for one in program.modalities]
    return found, [(label, jnp.float32(1 - alone)), *of_each]


def _where_seen(label: jax.Array, observed: jax.Array, one: Modality) -> jax.Array:
    """Return the label of a batch, without that of pixels, or of whole images, that the modality did not see."""
    seen = observed.astype(bool)
    seen = seen.any(axis=-1) if one.dates else seen
    if label.ndim < 3:
        seen = seen.any(axis=(1, 2)).reshape(-1, *(1,) * (label.ndim - 1))
    else:
        seen = seen.repeat(one.ratio, axis=1).repeat(one.ratio, axis=2)
    nothing = jnp.nan if jnp.issubdtype(label.dtype, jnp.floating) else IGNORE
    return jnp.where(seen, label, jnp.asarray(nothing, label.dtype))


def hide_modalities(
    observed: Mapping[str, jax.Array], key: jax.Array, chances: float | Mapping[str, float]
) -> dict[str, jax.Array]:
    """Hide whole modalities of samples at random; of those that a sample has, at least one stays.

    Args:
        observed: modality → (B, h, w, …), 1 where observed.
        key: Random key of this step.
        chances: Probability of each modality of each sample, one for all or for each by its name.
    """
    each = [chances[name] if isinstance(chances, Mapping) else chances for name in observed]
    if not any(map(is_on, each)) or len(observed) < 2:
        return dict(observed)
    chance_M = jnp.stack([jnp.asarray(chance, jnp.float32) for chance in each])
    there = jnp.stack([seen.astype(bool).any(axis=tuple(range(1, seen.ndim))) for seen in observed.values()], axis=-1)
    draw_BM = jax.random.uniform(jax.random.fold_in(key, _HIDDEN), there.shape)
    # of the modalities that are there, the one with the largest number always stays
    best = jnp.where(there, draw_BM, -1).max(axis=-1, keepdims=True)
    kept_BM = (draw_BM >= chance_M) | (draw_BM >= best)
    return {
        name: seen * kept_BM[:, i].reshape(-1, *(1,) * (seen.ndim - 1)).astype(seen.dtype)
        for i, (name, seen) in enumerate(observed.items())
    }


def seen_shares(program: Program, batch: Mapping[str, Any]) -> jax.Array:
    """Return the sum over a batch of the share of each modality that was observed, and the number of windows.

    float32 (modalities + 1,); windows that fill up a batch have no label and do not count.
    """
    label = batch["label"]
    known = jnp.isfinite(label) if jnp.issubdtype(label.dtype, jnp.floating) else label <= 254
    real_B = (known.any(axis=tuple(range(1, label.ndim))) if label.ndim > 1 else known).astype(jnp.float32)
    sums = []
    for one in program.modalities:
        seen = batch[f"observed_{one.name}"]
        seen = seen.max(axis=1) if one.dates else seen
        sums.append((seen.astype(jnp.float32).mean(axis=(1, 2)) * real_B).sum())
    return jnp.stack([*sums, real_B.sum()])


def _arrays(batch: Mapping[str, Any], one: Modality) -> tuple[jax.Array, jax.Array]:
    return as_images(batch[f"image_{one.name}"]), as_images(batch[f"observed_{one.name}"])


def _input(
    program: Program, one: Modality, image: jax.Array, observed: jax.Array, batch: Mapping[str, Any],
    key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Return the array of one modality: normalised bands, what was observed, and of series the day."""
    first = sum(len(other.bands) for other in program.modalities[: program.modalities.index(one)])
    mean, std = (values[first : first + len(one.bands)] for values in (program.mean, program.std))
    x = (image.astype(jnp.float32) - mean) * (np.float32(1) / std)
    data = program.config.data
    if key is not None and (is_on(data.jitter) or is_on(data.band_dropout)):
        x = disturb(x, key=key, jitter=data.jitter, band_dropout=data.band_dropout)
    seen = observed.astype(bool)
    x = jnp.where(seen[..., None], x, jnp.float32(0))
    if one.dates:
        return series_of(x, seen, batch[f"day_{one.name}"])
    return jnp.concatenate([x, seen[..., None].astype(jnp.float32)], axis=-1)
