"""The train, evaluation and prediction steps: the only `jit` of training.

Letters in shapes: B sample, H row, W column, C band, K class.

Images arrive as they are stored (uint16); casting, normalisation and augmentation happen on the device, inside the one
compiled program, so a quarter of the float bytes travels. A batch is

    {"image": uint16 (B, H, W, C), "label": uint8 (B, H, W) class index or 255, "observed": bool or uint8 (B, H, W)}

split over the mesh axis `data`: numpy arrays in a run of one process, global arrays in a run of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.data.augment import augment
from jaxtrain.losses import cross_entropy_terms
from jaxtrain.parallel.mesh import batch_sharding, constrain, replicated
from jaxtrain.state import Program, TrainState

__all__ = ["Batch", "EvalStep", "PredictStep", "TrainStep", "make_eval_step", "make_predict_step", "make_train_step"]

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TrainStep:
    """`step(state, batch, key=key) -> (state, metrics)`; the given state is donated and must not be used again."""

    jitted: Any
    """The compiled function of (state, batch, key), for `lower` and for counting compilations."""

    def __call__(self, state: TrainState, batch: Batch, *, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        result: tuple[TrainState, dict[str, jax.Array]] = self.jitted(state, dict(batch), key)
        return result


@dataclass(frozen=True)
class EvalStep:
    """`evaluate(state, batch) -> sums`, which may be added over batches."""

    jitted: Any

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        result: dict[str, jax.Array] = self.jitted(state.params, state.model_state, dict(batch))
        return result


@dataclass(frozen=True)
class PredictStep:
    """`predict(state, image, observed=None) -> probabilities_BHWK`."""

    jitted: Any

    def __call__(self, state: TrainState, image: Any, *, observed: Any = None) -> jax.Array:
        if observed is None:
            # the cube stores 0 (or nan) in every band where nothing was observed
            observed = ((image == image) & (image != 0)).any(axis=-1)
        result: jax.Array = self.jitted(state.params, state.model_state, image, observed)
        return result


def make_train_step(program: Program) -> TrainStep:
    """One optimiser step.

    `key` must be the same on all processes and different for each step (fold the step into the seed's key). Metrics
    are replicated scalars:

    - `loss`: mean over the labelled pixels of the global batch, 0 where there are none
    - `accuracy`: share of labelled pixels that are right, before the update
    - `gradient_norm`: global norm before clipping
    - `learning_rate`: of this step
    - `labelled`: number of labelled pixels, int32
    - `finite`: bool; false where loss or gradient are nan or infinite. Such a step counts, but changes neither
      parameters nor moments nor statistics, so the state stays fit to be saved while the caller decides to stop.
    """
    config = program.config
    weights = program.class_weights
    split = batch_sharding(program.mesh, image=True)

    def step(state: TrainState, batch: dict[str, Any], key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(key)
        image, label, observed = batch["image"], batch["label"], batch["observed"]
        if config.data.augment:
            turned = augment((image, label, observed), key=augment_key)
            # the compiler would go on with images split as they came out of a quarter turn, by columns
            image, label, observed = constrain(turned, (split,) * 3)
        x_BHWC = normalise(program, image, observed)

        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
            logits_BHWK, model_state = program.apply(params, state.model_state, x_BHWC, train=True, key=dropout_key)
            terms = cross_entropy_terms(
                logits_BHWK, label, class_weights=weights, label_smoothing=config.optim.label_smoothing
            )
            return terms.mean(), (terms.labelled, logits_BHWK, model_state)

        (loss, (labelled, logits_BHWK, model_state)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        gradient = program.share(gradient)
        updates, opt_state = program.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = (params, model_state, opt_state)
        kept = (state.params, state.model_state, state.opt_state)
        params, model_state, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        right = (logits_BHWK.argmax(axis=-1) == label.astype(jnp.int32)).sum(dtype=jnp.int32)
        metrics = {
            "loss": loss,
            "accuracy": right.astype(jnp.float32) / jnp.maximum(labelled, 1).astype(jnp.float32),
            "gradient_norm": gradient_norm,
            "learning_rate": program.schedule(state.step),
            "labelled": labelled,
            "finite": finite,
        }
        return TrainState(state.step + 1, params, model_state, opt_state), metrics

    whole = replicated(program.mesh)
    return TrainStep(
        jax.jit(
            step,
            in_shardings=(program.shardings, _batch_shardings(program), whole),
            out_shardings=(program.shardings, whole),
            donate_argnums=0,
        )
    )


def make_eval_step(program: Program) -> EvalStep:
    """Sums over one batch, without augmentation, dropout, smoothing or class weights.

    - `confusion`: int32 (K, K), rows are truth, columns prediction
    - `loss_sum`: float32 sum of -log p(truth) over labelled pixels; divided by `labelled` it is comparable between runs
    - `labelled`: int32
    """

    def evaluate(params: Any, model_state: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
        x_BHWC = normalise(program, batch["image"], batch["observed"])
        logits_BHWK, _ = program.apply(params, model_state, x_BHWC, train=False)
        terms = cross_entropy_terms(logits_BHWK, batch["label"])
        return {
            "confusion": confusion(logits_BHWK, batch["label"]),
            "loss_sum": terms.loss,
            "labelled": terms.labelled,
        }

    shardings = (program.shardings.params, program.shardings.model_state, _batch_shardings(program))
    return EvalStep(jax.jit(evaluate, in_shardings=shardings, out_shardings=replicated(program.mesh)))


def make_predict_step(program: Program) -> PredictStep:
    """Class probabilities of a batch of images, split over `data` as the images are; float32 (B, H, W, K).

    `observed` (B, H, W) says which pixels hold data; without it, a pixel that is 0 in every band holds none.
    """

    def predict(params: Any, model_state: Any, image: jax.Array, observed: jax.Array) -> jax.Array:
        logits_BHWK, _ = program.apply(params, model_state, normalise(program, image, observed), train=False)
        return jax.nn.softmax(logits_BHWK, axis=-1)

    split = batch_sharding(program.mesh, image=True)
    shardings = (program.shardings.params, program.shardings.model_state, split, split)
    return PredictStep(jax.jit(predict, in_shardings=shardings, out_shardings=split))


def normalise(program: Program, image_BHWC: jax.Array, observed_BHW: jax.Array) -> jax.Array:
    """(image - mean) / std as float32, and 0, the mean, where nothing was observed."""
    x_BHWC = (image_BHWC.astype(jnp.float32) - program.mean) * (np.float32(1) / program.std)
    return jnp.where(observed_BHW.astype(bool)[..., None], x_BHWC, jnp.float32(0))


def confusion(logits_BHWK: jax.Array, label_BHW: jax.Array) -> jax.Array:
    """int32 (K, K) counts of (truth, prediction) over labelled pixels."""
    classes = jnp.arange(logits_BHWK.shape[-1], dtype=jnp.int32)
    truth = (label_BHW.astype(jnp.int32)[..., None] == classes).astype(jnp.float32)
    guess = (logits_BHWK.argmax(axis=-1).astype(jnp.int32)[..., None] == classes).astype(jnp.float32)
    # a product of 0/1 matrices per sample is exact below 2^24 pixels, and no scatter is needed
    per_sample = jnp.einsum("bhwk,bhwl->bkl", truth, guess)
    return per_sample.astype(jnp.int32).sum(axis=0)


def _batch_shardings(program: Program) -> dict[str, Any]:
    images = batch_sharding(program.mesh, image=True)
    return {"image": images, "observed": images, "label": images}
