"""The train, evaluation and prediction steps, which are compiled for a run on one mesh.

A pipeline compiles one program for each of its parts instead (`parallel/pipeline.py`).

Letters in shapes: B sample, H row, W column, C band, K class.

Images of one answer each have labels (B,), or (B, K) of 0 and 1 where an image has several classes.

Images arrive as they are stored (uint16, bands before rows and columns); moving bands behind them, casting,
normalisation and augmentation happen on the device, inside the compiled step, so half of the float bytes travel.
A batch is

    {"image": uint16 (B, C, H, W), "label": uint8 (B, H, W) class index or 255, "observed": bool or uint8 (B, H, W)}

or, for series of T dates,

    {"image": (B, T, C, H, W), "label": (B, H, W), "observed": (B, T, H, W), "day": uint16 (B, T)}

split over the mesh axis `data`: numpy arrays in a run of one process, global arrays in a run of several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.data.arrays import as_images
from jaxtrain.data.augment import augment, disturb, mix, turns
from jaxtrain.learn.losses import LossTerms
from jaxtrain.learn.modalities import (
    modality_shardings,
    prepare_modalities,
    present_modalities,
    seen_shares,
)  # fmt: skip
from jaxtrain.learn.optim import build_optimizer, evaluation_params
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.models.modality import views_of
from jaxtrain.models.temporal import series_of
from jaxtrain.parallel.mesh import batch_sharding, constrain, replicated, stored_sharding
from jaxtrain.parallel.pipeline import Pipeline
from jaxtrain.traced import is_on

__all__ = ["Batch", "EvalStep", "PredictStep", "TrainStep", "answer_batch", "batch_shardings", "differentiate",
           "make_embed_step", "make_eval_step", "make_pipeline", "make_predict_step", "make_train_step",
           "update_state"]  # fmt: skip

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TrainStep:
    """`step(state, batch, key=key) -> (state, metrics)`; the given state is donated and must not be used again."""

    jitted: Any
    """The compiled function of (state, batch, key), for `lower` and for counting compilations."""
    names: tuple[str, ...] | None = None
    """Names of the arrays of a batch that are used; None for all."""
    values: tuple[Mapping[str, Any], ...] = ()
    """`Program.values` of the run, where runs share the compiled function."""

    def __call__(self, state: TrainState, batch: Batch, *, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        result: tuple[TrainState, dict[str, jax.Array]] = self.jitted(
            state, _chosen(batch, self.names), key, *self.values
        )
        return result


@dataclass(frozen=True)
class EvalStep:
    """`evaluate(state, batch) -> sums`, which may be added over batches."""

    jitted: Any
    names: tuple[str, ...] | None = None
    values: tuple[Mapping[str, Any], ...] = ()
    """As of `TrainStep`."""

    def __call__(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        params = evaluation_params(state.params, state.opt_state)
        result: dict[str, jax.Array] = self.jitted(params, state.model_state, _chosen(batch, self.names), *self.values)
        return result


def _chosen(batch: Batch, names: tuple[str, ...] | None) -> dict[str, Any]:
    return {name: batch[name] for name in names or batch}


@dataclass(frozen=True)
class PredictStep:
    """`predict(state, image, observed=None, day=None) -> probabilities_BHWK`; `day` (B, T) of series."""

    jitted: Any
    names: tuple[str, ...] | None = None
    """Names of the arrays of a batch of several modalities; None of one image."""

    def of_batch(self, state: TrainState, batch: Batch) -> jax.Array:
        """Predict for a batch, whatever arrays it has; a label in it is not used."""
        if self.names is None:
            return self(state, batch["image"], observed=batch["observed"], day=batch.get("day"))
        params = evaluation_params(state.params, state.opt_state)
        result: jax.Array = self.jitted(params, state.model_state, _chosen(batch, self.names))
        return result

    def __call__(self, state: TrainState, image: Any, *, observed: Any = None, day: Any = None) -> jax.Array:
        if observed is None:
            # the cube stores 0 (or nan) in every band where nothing was observed
            observed = jnp.isfinite(image).all(axis=-3) & (image != 0).any(axis=-3)
        params = evaluation_params(state.params, state.opt_state)
        result: jax.Array = self.jitted(params, state.model_state, image, observed, *(() if day is None else (day,)))
        return result


def make_train_step(program: Program, *, shared: bool = False) -> TrainStep:
    """Make the train step: one update by the optimiser.

    With `shared`, the compiled function takes `Program.values` as its last argument, so that runs which differ in
    nothing else use it, each by `replace(step, values=(program.values(),))`; a pipeline shares nothing.

    `key` must be the same on all processes and different for each step (fold the step into the seed's key). Metrics
    are replicated scalars:

    - `loss`: mean over the labelled pixels of the global batch, 0 where there are none
    - `accuracy`: share of labelled pixels that are right, before the update; of values `r2`, the share of the variance
      of training that is explained
    - `gradient_norm`: global norm before clipping
    - `learning_rate`: of this step
    - `labelled`: number of labelled pixels, int32
    - `finite`: bool; false where loss or gradient are nan or infinite. Such a step counts, but changes neither
      parameters nor moments nor statistics, so the state stays fit to be saved while the caller decides to stop.
    """
    if program.layout is not None:
        return TrainStep(make_pipeline(program).train)
    accumulating = program.config.optim.accumulate > 1

    def step(
        state: TrainState, batch: dict[str, Any], key: jax.Array, *values: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        own = program.with_values(*values) if values else program
        # where batches are accumulated, the sum is divided once, by the weight of all of them
        gradient, *found = differentiate(own, state.params, state.model_state, batch, key, of_sum=accumulating)
        return update_state(own, state, gradient, *found)

    whole = replicated(program.mesh)
    return TrainStep(
        jax.jit(
            step,
            in_shardings=(program.shardings, batch_shardings(program), whole, *([whole] if shared else [])),
            out_shardings=(program.shardings, whole),
            donate_argnums=0,
        ),
        tuple(batch_shardings(program)),
        (program.values(),) if shared else (),
    )


def differentiate(
    program: Program, params: Any, model_state: Any, batch: Batch, key: jax.Array, *, of_sum: bool
) -> tuple[Any, LossTerms, jax.Array, Any]:
    """Return gradient, sums of the loss, `Objective.right` and batch statistics of a batch, inside a jitted function.

    Args:
        program: The fixed parts.
        params: Parameters.
        model_state: Batch statistics before the step.
        batch: As the module describes it.
        key: Random key of augmentation and dropout.
        of_sum: Whether the gradient is that of the sum of the losses, which adds up over batches, or of their mean.
    """
    objective = program.objective
    augment_key, dropout_key = jax.random.split(key)
    x_BHWC, labels = prepare_batch(program, batch, augment_key, program.mesh)
    label = labels[0][0]

    def loss_of(params: Any) -> tuple[jax.Array, tuple[LossTerms, jax.Array, Any]]:
        logits, after = program.apply(params, model_state, x_BHWC, train=True, key=dropout_key)
        terms = objective.blend(logits, labels)
        return terms.loss if of_sum else terms.mean(), (terms, logits, after)

    (_, (terms, logits, after)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return gradient, terms, objective.right(views_of(logits, label.shape[0])[0], label), after


def update_state(
    program: Program, state: TrainState, gradient: Any, terms: LossTerms, right: jax.Array, model_state: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Update the state by the gradient of a whole batch, inside a jitted function; return metrics of the step too.

    Args:
        program: The fixed parts.
        state: The state before the step.
        gradient: That of the mean loss; of its sum where `optim.accumulate` is above 1.
        terms: Sums of the loss over the batch.
        right: Result of `Objective.right` for the batch.
        model_state: Batch statistics after the step.
    """
    accumulating, steps = program.config.optim.accumulate > 1, program.config.run.steps
    loss, labelled = terms.mean(), terms.labelled
    # the norm of the parts of each replica: where all of a gradient is needed nowhere, it is never all on a device
    gradient = program.share(gradient)
    gradient_norm = optax.tree.norm(gradient)
    if accumulating:
        gradient_norm = gradient_norm / jnp.where(terms.weight > 0, terms.weight, jnp.float32(1))
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    used, extra = finite, {}
    if accumulating:
        # a last batch that is left out must not take those before it along
        last = state.step == steps - 1
        used = finite | (last & (state.opt_state.mini_step > 0))
        gradient = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), gradient)
        extra = {"weight": jnp.where(finite, terms.weight, jnp.float32(0)), "last": last}
    updates, opt_state = program.optimizer.update(gradient, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)

    def chosen(when: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(when, a, b), new, old)

    params, opt_state = chosen(used, (params, opt_state), (state.params, state.opt_state))
    model_state = chosen(finite, model_state, state.model_state)
    metrics = {
        "loss": loss,
        program.objective.score: right / jnp.maximum(labelled, 1).astype(jnp.float32),
        "gradient_norm": gradient_norm,
        "learning_rate": program.schedule(state.step),
        "labelled": labelled,
        "finite": finite,
    }
    return TrainState(state.step + 1, params, model_state, opt_state), metrics


def make_eval_step(program: Program, *, turned: bool = False, shared: bool = False) -> EvalStep:
    """Make the evaluation step: sums over one batch without augmentation, dropout, smoothing or class weights.

    `loss_sum` divided by `labelled` is comparable between runs. With `turned`, each image is looked at in all its eight
    turns and mirrors (`model.turns`) and the logarithms of the answers are averaged. `shared` is as of
    `make_train_step`.
    """
    if program.layout is not None:
        return EvalStep(make_pipeline(program).evaluate)

    def evaluate(
        params: Any, model_state: Any, batch: dict[str, Any], *values: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        own = program.with_values(*values) if values else program
        if own.modalities:
            x = present_modalities(own, batch)
            sums = own.objective.sums(_look(own, params, model_state, x, turned), batch["label"])
            return sums | {"seen": seen_shares(own, batch)}
        x_BHWC = present(own, batch["image"], batch["observed"], batch.get("day"))
        observed = as_images(batch["observed"])
        label = _itself(x_BHWC, observed) if own.objective.task.rebuild else batch["label"]
        return own.objective.sums(_look(own, params, model_state, x_BHWC, turned), label)

    param_shardings = evaluation_params(program.shardings.params, program.shardings.opt_state)
    whole = replicated(program.mesh)
    lies = (param_shardings, program.shardings.model_state, batch_shardings(program), *([whole] if shared else []))
    jitted = jax.jit(evaluate, in_shardings=lies, out_shardings=whole)
    return EvalStep(jitted, tuple(batch_shardings(program)), (program.values(),) if shared else ())


def make_predict_step(program: Program) -> PredictStep:
    """Make the prediction step: class probabilities of a batch of images, float32 (B, H, W, K) or (B, K).

    With `model.turns` they are means over the turns of each image; of values, the values themselves; of reconstructed
    images the error (B, H, W, 1): the root of the mean square over bands, in standard deviations of each band.

    `observed` (B, H, W) marks the pixels with data; without it, a pixel holds none that is 0 in every band or not
    finite in one.
    """
    if program.layout is not None:
        names = tuple(name for name in batch_shardings(program) if name != "label")
        return PredictStep(make_pipeline(program).predict, names if program.modalities else None)

    def predict(
        params: Any, model_state: Any, image: jax.Array, observed: jax.Array, day: jax.Array | None = None
    ) -> jax.Array:
        batch = {"image": image, "observed": observed, **({} if day is None else {"day": day})}
        return answer_batch(program, params, model_state, batch)

    lies = batch_shardings(program)
    param_shardings = evaluation_params(program.shardings.params, program.shardings.opt_state)
    answers = batch_sharding(program.mesh, image=not program.objective.task.per_image)
    if program.modalities:

        def predict_several(params: Any, model_state: Any, batch: dict[str, Any]) -> jax.Array:
            return answer_batch(program, params, model_state, batch)

        inputs = {name: at for name, at in lies.items() if name != "label"}
        jitted = jax.jit(
            predict_several,
            in_shardings=(param_shardings, program.shardings.model_state, inputs),
            out_shardings=answers,
        )
        return PredictStep(jitted, tuple(inputs))
    days = (lies["day"],) if "day" in lies else ()
    shardings = (param_shardings, program.shardings.model_state, lies["image"], lies["observed"], *days)
    return PredictStep(jax.jit(predict, in_shardings=shardings, out_shardings=answers))


def answer_batch(program: Program, params: Any, model_state: Any, batch: Batch) -> jax.Array:
    """Return what the prediction step returns for a batch, as a function without shardings that others may trace."""
    turned = program.config.model.turns
    if program.modalities:
        return program.objective.answer(_look(program, params, model_state, present_modalities(program, batch), turned))
    x_BHWC = present(program, batch["image"], batch["observed"], batch.get("day"))
    logits = _look(program, params, model_state, x_BHWC, turned)
    if program.objective.task.rebuild:
        return jnp.sqrt(jnp.square(logits - x_BHWC).mean(axis=-1, keepdims=True))
    return program.objective.answer(logits)


def make_embed_step(program: Program) -> Callable[[TrainState, Batch], jax.Array]:
    """Make the step `embed(state, batch) -> vectors (B, Z)`: the code of each image, averaged over its pixels."""
    lies = batch_shardings(program)

    def run(params: Any, model_state: Any, image: jax.Array, observed: jax.Array) -> jax.Array:
        return program.embed(params, model_state, present(program, image, observed)).mean(axis=(1, 2))

    param_shardings = evaluation_params(program.shardings.params, program.shardings.opt_state)
    shardings = (param_shardings, program.shardings.model_state, lies["image"], lies["observed"])
    jitted = jax.jit(run, in_shardings=shardings, out_shardings=batch_sharding(program.mesh))

    def embed(state: TrainState, batch: Batch) -> jax.Array:
        params = evaluation_params(state.params, state.opt_state)
        vectors: jax.Array = jitted(params, state.model_state, batch["image"], batch["observed"])
        return vectors

    return embed


def prepare_batch(
    program: Program, batch: Batch, key: jax.Array, mesh: Mesh
) -> tuple[Any, list[tuple[jax.Array, jax.Array]]]:
    """Return augmented and normalised images (of several modalities a dict), and each label with its share of the loss.

    There is one label, or two if mixed; of several modalities one for all together, and one for each alone.
    """
    if program.modalities:
        return prepare_modalities(program, batch, key, mesh)
    data = program.config.data
    rebuild = program.objective.task.rebuild
    names = ["image", *([] if rebuild else ["label"]), "observed"]
    arrays = tuple(as_images(batch[name]) for name in names)
    if data.augment:
        turned = augment(arrays, key=key, zoom=data.zoom)
        # after a quarter turn the compiler would keep images split by columns
        arrays = constrain(turned, tuple(batch_sharding(mesh, image=a.ndim > 2) for a in arrays))
    image, observed = arrays[0], arrays[-1]
    x_BHWC = normalise(program, image, observed)
    # the target is the image before `disturb` changes it
    label = _itself(x_BHWC, observed) if rebuild else arrays[1]
    if is_on(data.jitter) or is_on(data.band_dropout):
        x_BHWC = disturb(x_BHWC, key=key, jitter=data.jitter, band_dropout=data.band_dropout)
    if "day" in batch:
        x_BHWC = series_of(jnp.where(observed.astype(bool)[..., None], x_BHWC, 0), observed, batch["day"])
    if data.mix != "none":
        x_BHWC, label, other = mix(x_BHWC, label, key=key, kind=data.mix, alpha=data.mix_alpha)
        if other is not None:
            return x_BHWC, [(label, 1 - other.share), (other.label, other.share)]
    return x_BHWC, [(label, jnp.float32(1))]


def normalise(program: Program, image_BHWC: jax.Array, observed_BHW: jax.Array) -> jax.Array:
    """Return (image - mean) / std as float32, and 0, the mean, where nothing was observed."""
    x_BHWC = (image_BHWC.astype(jnp.float32) - program.mean) * (np.float32(1) / program.std)
    return jnp.where(observed_BHW.astype(bool)[..., None], x_BHWC, jnp.float32(0))


def present(program: Program, image: jax.Array, observed: jax.Array, day: jax.Array | None = None) -> jax.Array:
    """Return the input of the network for evaluation and prediction: normalised, and with days for series."""
    image, observed = as_images(image), as_images(observed)
    x_BHWC = normalise(program, image, observed)
    return x_BHWC if day is None else series_of(x_BHWC, observed, day)


def _itself(x_BHWC: jax.Array, observed_BHW: jax.Array) -> jax.Array:
    """Return the image as the target: nan where nothing was observed."""
    return jnp.where(observed_BHW.astype(bool)[..., None], x_BHWC, jnp.float32(jnp.nan))


def _look(program: Program, params: Any, model_state: Any, x: Any, turned: bool) -> jax.Array:
    """Return logits, or their mean over the eight turns; images that are not square are seen once."""
    b, height, width = jax.tree.leaves(x)[0].shape[:3]
    if not turned or height != width:
        return program.apply(params, model_state, x, train=False)[0]

    def every(x_BHWC: jax.Array) -> jax.Array:
        # the turns of a sample follow each other, so that a batch that is split over devices stays where it is
        return jnp.stack([turn(x_BHWC) for turn, _ in turns()], axis=1).reshape(8 * b, *x_BHWC.shape[1:])

    logits, _ = program.apply(params, model_state, jax.tree.map(every, x), train=False)
    logits = logits.reshape(b, 8, *logits.shape[1:])
    if not program.objective.task.per_image:
        logits = jnp.stack([back(logits[:, i]) for i, (_, back) in enumerate(turns())], axis=1)
    return logits.mean(axis=1)


def _inputs(program: Program, batch: Batch) -> Any:
    """Return the input of the network for a batch without its label: an array, or one for each modality."""
    if program.modalities:
        return present_modalities(program, batch)
    return present(program, batch["image"], batch["observed"])


def make_pipeline(program: Program) -> Pipeline:
    """Make the parts of a program with a layout, and the walk through their schedule."""
    optim = program.config.optim
    # its own clipping is switched off, not left out, so that its state is that of every other strategy
    unclipped = optim if optim.clip_norm is None else optim.model_copy(update={"clip_norm": float("inf")})
    return Pipeline(
        program,
        prepare=partial(prepare_batch, program),
        normalise=partial(_inputs, program),
        seen=partial(seen_shares, program) if program.modalities else None,
        optimizer=build_optimizer(unclipped, program.config.run.steps),
    )


def batch_shardings(program: Program) -> dict[str, Any]:
    """Return the sharding of each array of a batch that a program uses."""
    if program.modalities:
        return modality_shardings(program)
    mesh, task = program.mesh, program.objective.task
    series = program.config.data.dates != 1
    lies = {"image": stored_sharding(mesh, 5 if series else 4), "observed": stored_sharding(mesh, 4 if series else 3)}
    if not task.rebuild:
        lies["label"] = stored_sharding(mesh, 1 if task.per_image else 3)
    return lies | {"day": batch_sharding(mesh)} if series else lies
