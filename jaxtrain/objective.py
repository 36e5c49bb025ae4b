"""`Task` and `Objective`: what a network answers, what its answer costs, and what is counted when it is judged.

Letters in shapes: B sample, K class; `…` stands for (B, H, W) where pixels are labelled and (B,) where images are.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxtrain.config import OptimConfig
from jaxtrain.losses import LossTerms, cross_entropy_terms

__all__ = ["Objective", "Task", "confusion"]


@dataclass(frozen=True)
class Task:
    """What is answered.

    Attributes:
        per_image: One answer for an image, not one for each pixel.
        several: A sample may have several classes.
    """

    per_image: bool = False
    several: bool = False


@dataclass(frozen=True)
class Objective:
    """The loss of a task, and what is counted.

    Attributes:
        task: What is answered.
        optim: Loss, smoothing and its numbers.
        class_weights: Per class, or None.
    """

    task: Task
    optim: OptimConfig
    class_weights: NDArray[np.float32] | None = None

    def terms(self, logits: jax.Array, label: jax.Array) -> LossTerms:
        """Sums that make up the training loss of float32 logits (…, K) and class indices (…)."""
        return cross_entropy_terms(
            logits, label, class_weights=self.class_weights, label_smoothing=self.optim.label_smoothing
        )

    def right(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """How much of what is labelled is right, float32."""
        return (logits.argmax(axis=-1) == label.astype(jnp.int32)).sum(dtype=jnp.int32).astype(jnp.float32)

    def sums(self, logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """What may be added over batches to judge a model, without class weights and smoothing.

        - `confusion` int32 (K, K), rows are truth, columns prediction
        - `loss_sum` float32, the sum of -log p(truth) over what is labelled; `labelled` int32
        """
        terms = cross_entropy_terms(logits, label)
        return {"confusion": confusion(logits, label), "loss_sum": terms.loss, "labelled": terms.labelled}

    def answer(self, logits: jax.Array) -> jax.Array:
        """Logits → probabilities (…, K)."""
        return jax.nn.softmax(logits, axis=-1)


def confusion(logits: jax.Array, label: jax.Array) -> jax.Array:
    """int32 (K, K) counts of (truth, prediction) over what is labelled; logits (…, K), label (…)."""
    size = logits.shape[-1]
    classes = jnp.arange(size, dtype=jnp.int32)
    samples = logits.shape[0]
    truth = (label.astype(jnp.int32)[..., None] == classes).astype(jnp.float32).reshape(samples, -1, size)
    guess = (logits.argmax(axis=-1).astype(jnp.int32)[..., None] == classes).astype(jnp.float32)
    # a product of 0/1 matrices per sample is exact below 2^24 pixels, and no scatter is needed
    per_sample = jnp.einsum("bpk,bpl->bkl", truth, guess.reshape(samples, -1, size))
    return per_sample.astype(jnp.int32).sum(axis=0)
