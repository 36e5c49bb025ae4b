"""The optax chain and its schedule, from `OptimConfig`.

Order: join the gradients of `accumulate` batches (`accumulate.py`) → clip the global gradient norm → optimiser with
weight decay → learning rate → moving average of the parameters. Every optimiser honours
`weight_decay`: `adamw`, `lamb` and `muon` decay the weights beside the gradient step (Loshchilov & Hutter 2019,
arXiv:1711.05101), `adam` and `sgd` add it to the gradient (L2). Norms and biases never decay.

`muon` makes the steps of kernels orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon); a kernel of a
convolution is the matrix of what a filter takes in × filters. Steps have the spread of those of `adamw`, so that its
learning rates and decay serve (Liu et al. 2025, arXiv:2502.16982); norms, biases and the last layer are left to Adam
with Nesterov's momentum, and do not decay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxtrain.config import OptimConfig
from jaxtrain.learn.accumulate import accumulate
from jaxtrain.parallel.sharding import path_name
from jaxtrain.traced import is_on

__all__ = ["build_optimizer", "build_schedule", "decays", "evaluation_params"]

_ADAM_RMS = 0.2
"""Spread of a step of AdamW in learning rates, by experience (Liu et al. 2025, arXiv:2502.16982)."""
_LAST_LAYER = "head"
"""Name of the last layer of every network here; its outputs are classes, not features."""


def build_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return the learning rate of step 0, 1, …: a linear warm-up, then constant, or down to zero by a cosine or a line.

    The warm-up takes at most half of a short run, and step 0 already learns. With `accumulate`, steps are batches, and
    the rate of an update is that of its last batch.

    >>> schedule = build_schedule(OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="constant"), 100)
    >>> [float(schedule(s)) for s in (0, 1, 3, 4, 99)]
    [0.25, 0.5, 1.0, 1.0, 1.0]
    """
    warmup = min(config.warmup_steps, steps // 2)
    peak = config.learning_rate

    def schedule(step: Any) -> jax.Array:
        at = jnp.asarray(step, jnp.float32)
        rate = jnp.float32(peak)
        progress = jnp.clip((at - warmup) / max(steps - warmup, 1), 0, 1)
        if config.schedule == "cosine":
            rate = peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            rate = peak * (1 - progress)
        return jnp.where(at < warmup, peak * (at + 1) / max(warmup, 1), rate)

    return schedule


def decays(params: Any) -> Any:
    """Return True for the arrays that weight decay acts on: kernels, not norms and biases, which have one dimension."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def build_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Build the chain for a run of `steps` steps; with `accumulate`, `update` takes what `accumulate.py` states."""
    every = config.accumulate
    of_batch = build_schedule(config, steps)

    def rate(update: Any) -> jax.Array:
        # the last update of a run may be of fewer batches
        now: jax.Array = of_batch(jnp.minimum(update * every + every - 1, steps - 1))
        return now

    chain: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name in ("adam", "sgd") and is_on(config.weight_decay):
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    momentum = config.momentum if is_on(config.momentum) else None
    match config.name:
        case "adamw":
            chain.append(optax.adamw(rate, weight_decay=config.weight_decay, mask=decays))
        case "adam":
            chain.append(optax.adam(rate))
        case "sgd":
            chain.append(optax.sgd(rate, momentum=momentum, nesterov=config.nesterov and momentum is not None))
        case "lamb":
            chain.append(optax.lamb(rate, weight_decay=config.weight_decay, mask=decays))
        case "muon":
            chain.append(
                optax.contrib.muon(
                    rate,
                    weight_decay=config.weight_decay,
                    muon_weight_dimension_numbers=_matrices,
                    consistent_rms=_ADAM_RMS,
                )
            )
    if is_on(config.ema):
        chain.append(_average(config.ema))
    transform: Any = optax.chain(*chain)
    if every > 1:
        transform = accumulate(transform, every)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        # optax mixes Python floats with int32 counters, which strict dtype promotion refuses; only here it is relaxed
        with jax.numpy_dtype_promotion("standard"):
            new: tuple[Any, Any] = transform.update(updates, state, params, **(extra if every > 1 else {}))
        return new

    return optax.GradientTransformationExtraArgs(transform.init, update)


def _matrices(params: Any) -> Any:
    """Return input axes and output axis of each kernel that muon updates; None for all other arrays."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if leaf.ndim < 2 or path_name(path).split("/")[0] == _LAST_LAYER:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


class _Average(NamedTuple):
    """Moving average of the parameters; part of the optimiser's state, so that it is saved, restored and laid out."""

    updates: jax.Array
    average: Any


def _average(decay: float) -> optax.GradientTransformation:
    """Keep the average of the parameters after each update; updates pass through.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first parameters are soon forgotten (as in
    Tan & Le 2019, arXiv:1905.11946, and its code).
    """

    def init(params: Any) -> _Average:
        return _Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

    def update(updates: Any, state: _Average, params: Any = None) -> tuple[Any, _Average]:
        at = state.updates.astype(jnp.float32)
        share = jnp.minimum(decay, (1 + at) / (10 + at))
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, now: share * old + (1 - share) * now, state.average, new)
        return updates, _Average(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def evaluation_params(params: Any, opt_state: Any) -> Any:
    """Return the parameters for evaluation and prediction: their moving average if one is kept, else themselves."""
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(leaf)]
    return found[0].average if found else params


def _is_average(leaf: Any) -> bool:
    return isinstance(leaf, _Average)
