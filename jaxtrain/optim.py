"""The optax chain and its schedule, from `OptimConfig`.

Order: clip the global gradient norm → optimiser with weight decay → learning rate. Every optimiser honours
`weight_decay`: `adamw` and `lamb` decay the weights beside the gradient step (Loshchilov & Hutter 2019,
arXiv:1711.05101), `adam` and `sgd` add it to the gradient (L2). Norms and biases never decay.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import OptimConfig

__all__ = ["build_optimizer", "build_schedule", "decays"]


def build_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, …: a linear warm-up, then constant or a cosine down to zero.

    The warm-up takes at most half of a short run, and step 0 already learns.

    >>> schedule = build_schedule(OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="constant"), 100)
    >>> [float(schedule(s)) for s in (0, 1, 3, 4, 99)]
    [0.25, 0.5, 1.0, 1.0, 1.0]
    """
    warmup = min(config.warmup_steps, steps // 2)
    peak = config.learning_rate

    def schedule(step: Any) -> jax.Array:
        at = jnp.asarray(step, jnp.float32)
        rate = jnp.float32(peak)
        if config.schedule == "cosine":
            progress = jnp.clip((at - warmup) / max(steps - warmup, 1), 0, 1)
            rate = peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(at < warmup, peak * (at + 1) / max(warmup, 1), rate)

    return schedule


def decays(params: Any) -> Any:
    """True for the arrays that weight decay acts on: kernels, not norms and biases, which have one dimension."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def build_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The chain for a run of `steps` steps."""
    rate = build_schedule(config, steps)
    chain: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name in ("adam", "sgd") and config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    match config.name:
        case "adamw":
            chain.append(optax.adamw(rate, weight_decay=config.weight_decay, mask=decays))
        case "adam":
            chain.append(optax.adam(rate))
        case "sgd":
            chain.append(optax.sgd(rate, momentum=config.momentum or None, nesterov=bool(config.momentum)))
        case "lamb":
            chain.append(optax.lamb(rate, weight_decay=config.weight_decay, mask=decays))
    transform = optax.chain(*chain)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # optax mixes Python floats with int32 counters, which strict dtype promotion refuses; only here it is relaxed
        with jax.numpy_dtype_promotion("standard"):
            new: tuple[Any, Any] = transform.update(updates, state, params)
        return new

    return optax.GradientTransformation(transform.init, update)
