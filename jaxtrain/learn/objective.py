"""`Objective` holds the loss of a task and the counts of its evaluation.

Letters in shapes: B sample, H row, W column, K class; `…` stands for (B, H, W) where pixels are labelled and (B,) where
images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxtrain.config import OptimConfig
from jaxtrain.data.task import Task
from jaxtrain.learn.losses import LossTerms, binary_terms, cross_entropy_terms, dice_terms, huber_terms, square_terms
from jaxtrain.models.modality import views_of
from zarr_store.errors import InvalidInput

__all__ = ["BINS", "Objective", "confusion"]

BINS = 15
"""Bins of confidence for the calibration error (Guo et al. 2017, arXiv:1706.04599)."""


@dataclass(frozen=True)
class Objective:
    """The loss of a task and the counts of its evaluation.

    Attributes:
        task: Task of the network.
        optim: Loss, smoothing and its numbers.
        class_weights: Per class, or None.

    Raises (when made):
        InvalidInput: The loss is not one for the task.
    """

    task: Task
    optim: OptimConfig
    class_weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        value, loss = self.task.values, self.optim.loss
        if value != (loss in ("huber", "mse")):
            known = "huber or mse" if value else "cross_entropy, focal or dice"
            kind = "values" if value else "classes"
            raise InvalidInput(f"optim.loss = {loss!r}, but {kind} are learned: choose {known}")
        if self.task.several and loss == "dice":
            raise InvalidInput("optim.loss = 'dice' is for one class per pixel or image: choose cross_entropy or focal")

    @property
    def score(self) -> str:
        """Name of the score that is `right` divided by the number of labels."""
        return "r2" if self.task.values else "accuracy"

    def terms(self, logits: jax.Array, label: jax.Array) -> LossTerms:
        """Return the sums that make up the training loss.

        Args:
            logits: float32 (…, K).
            label: As a batch holds it: (…) class index, (B, K) 0/1, or (…) value; of a reconstructed image, the
                image (…, K) as the network takes it, nan where nothing was observed.
        """
        optim = self.optim
        if self.task.values:
            return self._value_terms(logits, label)
        loss = binary_terms if self.task.several else cross_entropy_terms
        terms = loss(
            logits,
            label,
            class_weights=self.class_weights,
            label_smoothing=optim.label_smoothing,
            focal_gamma=optim.focal_gamma if optim.loss == "focal" else 0.0,
        )
        if optim.loss == "dice":
            # both are means once divided by the weight
            extra = dice_terms(logits, label).mean()
            return terms._replace(loss=terms.loss + extra * terms.weight)
        return terms

    def blend(self, logits: jax.Array, labels: Sequence[tuple[jax.Array, jax.Array]]) -> LossTerms:
        """Return the sums of the loss for several labels, each of which gets a share of loss and weight.

        Args:
            logits: float32 (B, …, K), asked for each label; or (B · L, …, K), where a view of the sample answers for
                each of L labels (`views_of`).
            labels: Each label, as in `terms`, with its share.
        """
        views = views_of(logits, labels[0][0].shape[0])
        found = [self.terms(views[i % len(views)], label).scaled(share) for i, (label, share) in enumerate(labels)]
        return reduce(LossTerms.added, found)

    def right(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """Return how many labels are right, float32; for values, one minus each squared error in standard units."""
        if self.task.values:
            value, target = self._answered(logits), self._standard(label)
            learned = jnp.isfinite(target)
            error = value - jnp.where(learned, target, value)
            return learned.sum(dtype=jnp.float32) - jnp.square(error).sum()
        if self.task.several:
            return ((logits > 0) == (label == 1)).sum(dtype=jnp.float32, where=label.astype(jnp.int32) <= 1)
        return (logits.argmax(axis=-1) == label.astype(jnp.int32)).sum(dtype=jnp.int32).astype(jnp.float32)

    def sums(self, logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Return sums of an evaluation that may be added over batches, without class weights and smoothing.

        - `loss_sum` float32, `labelled` int32: of the plain loss
        - one class: `confusion` int32 (K, K), rows are truth; `calibration` float32 (BINS, 3): number, sum of the
          confidence and number of hits of each bin
        - several: `counts` int32 (K, 4): hits, false alarms, misses, rightly absent
        - values: `errors` float32 (6,): number, Σ error, Σ |error|, Σ error², and of the target's distance d from the
          mean of training Σ d² and Σ d, in units of the value
        """
        if self.task.values:
            terms = self._value_terms(logits, label)
            return {"loss_sum": terms.loss, "labelled": terms.labelled, "errors": self._errors(logits, label)}
        if self.task.several:
            terms = binary_terms(logits, label)
            learned, truth, guess = label.astype(jnp.int32) <= 1, label == 1, logits > 0
            cells = (guess & truth, guess & ~truth, ~guess & truth, ~guess & ~truth)
            counts = jnp.stack([(cell & learned).sum(axis=0, dtype=jnp.int32) for cell in cells], axis=-1)
            return {"loss_sum": terms.loss, "labelled": terms.labelled, "counts": counts}
        terms = cross_entropy_terms(logits, label)
        return {
            "loss_sum": terms.loss,
            "labelled": terms.labelled,
            "confusion": confusion(logits, label),
            "calibration": _calibration(logits, label),
        }

    def answer(self, logits: jax.Array) -> jax.Array:
        """Turn logits into probabilities (…, K), or values (…, 1) in their own unit."""
        if self.task.value is not None:
            mean, std = self.task.value
            values: jax.Array = logits * jnp.float32(std) + jnp.float32(mean)
            return values
        return jax.nn.sigmoid(logits) if self.task.several else jax.nn.softmax(logits, axis=-1)

    def _answered(self, logits: jax.Array) -> jax.Array:
        """Return values in standard units: (…), or (…, K) for a reconstructed image."""
        return logits if self.task.rebuild else logits[..., 0]

    def _value_terms(self, logits: jax.Array, label: jax.Array) -> LossTerms:
        value, target = self._answered(logits), self._standard(label)
        if self.optim.loss == "mse":
            return square_terms(value, target)
        return huber_terms(value, target, delta=self.optim.huber_delta)

    def _standard(self, label: jax.Array) -> jax.Array:
        mean, std = self.task.value or (0.0, 1.0)
        standard: jax.Array = (label.astype(jnp.float32) - jnp.float32(mean)) / jnp.float32(std)
        return standard

    def _errors(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        _, std = self.task.value or (0.0, 1.0)
        target = self._standard(label)
        learned = jnp.isfinite(target)
        target = jnp.where(learned, target, 0)
        error = jnp.where(learned, self._answered(logits) - target, 0) * jnp.float32(std)
        spread = target * jnp.float32(std)
        sums = (learned.astype(jnp.float32), error, jnp.abs(error), error * error, spread * spread, spread)
        return jnp.stack([value.sum() for value in sums])


def confusion(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Count (truth, prediction) over labelled pixels, int32 (K, K); logits (…, K), label (…)."""
    size = logits.shape[-1]
    classes = jnp.arange(size, dtype=jnp.int32)
    samples = logits.shape[0]
    truth = (label.astype(jnp.int32)[..., None] == classes).astype(jnp.float32).reshape(samples, -1, size)
    guess = (logits.argmax(axis=-1).astype(jnp.int32)[..., None] == classes).astype(jnp.float32)
    # a product of 0/1 matrices per sample is exact below 2^24 pixels, and no scatter is needed
    per_sample = jnp.einsum("bpk,bpl->bkl", truth, guess.reshape(samples, -1, size))
    return per_sample.astype(jnp.int32).sum(axis=0)


def _calibration(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Count number, sum of confidence and hits in bins of the confidence of the prediction, float32 (BINS, 3)."""
    label = label.astype(jnp.int32)
    learned = (label >= 0) & (label < logits.shape[-1])
    confidence = jax.nn.softmax(logits, axis=-1).max(axis=-1)
    hit = logits.argmax(axis=-1).astype(jnp.int32) == label
    bin_ = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
    values = (jnp.ones_like(confidence), confidence, hit.astype(jnp.float32))
    # a loop of masked sums: no scatter, and no array with a dimension of bins
    rows = [[jnp.where(learned & (bin_ == i), value, 0).sum() for value in values] for i in range(BINS)]
    return jnp.stack([jnp.stack(row) for row in rows])
