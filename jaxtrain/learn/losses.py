"""Masked losses, averaged over the labelled pixels or images of the global batch.

Letters in shapes: B sample, H row, W column, K class; `…` stands for (B, H, W) or (B,).

Sums are taken before the one division. Under `jit` with a batch split over devices both sums become all-reduces, so the
loss and its gradient do not depend on the mesh, nor on how unevenly labelled pixels are spread over devices. A mean of
per-device means would depend on both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxtrain.traced import is_on

__all__ = ["IGNORE", "LossTerms", "binary_terms", "cross_entropy", "cross_entropy_terms", "dice_terms", "huber_terms",
           "square_terms"]  # fmt: skip

IGNORE = 255
"""Label of a pixel that is not trained on; so is every label at or above the number of classes."""


class LossTerms(NamedTuple):
    """Sums over all pixels of a batch; they may be added over batches."""

    loss: jax.Array
    """Weighted sum of the per-pixel losses, float32."""
    weight: jax.Array
    """Sum of the weights, float32; the number of labelled pixels where classes have no weights."""
    labelled: jax.Array
    """Number of labelled pixels, int32."""

    def mean(self) -> jax.Array:
        """Return the mean loss: zero, with zero gradient, where no pixel is labelled."""
        return self.loss / jnp.where(self.weight > 0, self.weight, jnp.float32(1))

    def scaled(self, share: jax.Array) -> LossTerms:
        """Return the sums with a share of their loss and weight."""
        return self._replace(loss=share * self.loss, weight=share * self.weight)

    def added(self, other: LossTerms) -> LossTerms:
        """Add the loss and the weight of other answers for the same samples, whose labels do not count again."""
        return self._replace(loss=self.loss + other.loss, weight=self.weight + other.weight)


def cross_entropy_terms(
    logits_BHWK: jax.Array,
    label_BHW: jax.Array,
    *,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> LossTerms:
    """Return the sums that make up the mean loss.

    Args:
        logits_BHWK: float32 scores, (…, K).
        label_BHW: class index (…), any integer type; 255 = not labelled.
        class_weights: float32 (K,), of the true class; none for equal weights.
        label_smoothing: share s of the target that is spread evenly over all classes (Szegedy et al. 2016,
            arXiv:1512.00567).
        focal_gamma: g of the focal loss -(1 - p)^g log p (Lin et al. 2017, arXiv:1708.02002); 0 for cross-entropy.
    """
    classes = logits_BHWK.shape[-1]
    label_BHW = label_BHW.astype(jnp.int32)
    learned_BHW = (label_BHW >= 0) & (label_BHW < classes)
    # comparison instead of a gather: a gather along a split batch is what the partitioner does worst
    truth_BHWK = label_BHW[..., None] == jnp.arange(classes, dtype=jnp.int32)
    log_p_BHWK = jax.nn.log_softmax(logits_BHWK, axis=-1)
    loss_BHW = -jnp.where(truth_BHWK, log_p_BHWK, 0).sum(axis=-1)
    if is_on(focal_gamma):
        # not below a rounding of 1 - p, where the power has no gradient
        loss_BHW = loss_BHW * jnp.maximum(-jnp.expm1(-loss_BHW), 1e-6) ** focal_gamma
    if is_on(label_smoothing):
        loss_BHW = (1 - label_smoothing) * loss_BHW - label_smoothing * log_p_BHWK.mean(axis=-1)
    if class_weights is None:
        weight_BHW = learned_BHW.astype(jnp.float32)
    else:
        weight_BHW = jnp.where(truth_BHWK, class_weights, 0).sum(axis=-1)
    # where, not a product: 0 * inf is nan
    loss = jnp.where(learned_BHW, loss_BHW * weight_BHW, 0).sum()
    return LossTerms(loss, weight_BHW.sum(), learned_BHW.sum(dtype=jnp.int32))


def cross_entropy(
    logits_BHWK: jax.Array,
    label_BHW: jax.Array,
    *,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Return the mean over labelled pixels, weighted by `class_weights`; see `cross_entropy_terms`.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy(jnp.zeros((1, 1, 2, 4)), jnp.array([[[0, 255]]]))), 4)
    1.3863
    """
    terms = cross_entropy_terms(logits_BHWK, label_BHW, class_weights=class_weights, label_smoothing=label_smoothing)
    return terms.mean()


def dice_terms(logits_BHWK: jax.Array, label_BHW: jax.Array) -> LossTerms:
    """Return one minus the mean Dice overlap of the classes in the batch (Milletari et al. 2016, arXiv:1606.04797).

    The overlap of a class is 2 Σ p t / (Σ p + Σ t) over the labelled pixels of the global batch, so it weighs a rare
    class as much as a common one. The loss counts once for each labelled pixel, so that it adds to a mean over pixels.
    """
    classes = logits_BHWK.shape[-1]
    label_BHW = label_BHW.astype(jnp.int32)
    learned_BHW = (label_BHW >= 0) & (label_BHW < classes)
    truth = (label_BHW[..., None] == jnp.arange(classes, dtype=jnp.int32)).astype(jnp.float32)
    p = jnp.where(learned_BHW[..., None], jax.nn.softmax(logits_BHWK, axis=-1), 0)
    axes = tuple(range(label_BHW.ndim))
    both_K, sum_K, there_K = (p * truth).sum(axes), (p + truth).sum(axes), truth.sum(axes) > 0
    overlap_K = 2 * both_K / jnp.maximum(sum_K, 1e-6)
    occurring = jnp.maximum(there_K.sum(dtype=jnp.int32), 1).astype(jnp.float32)
    loss = jnp.where(there_K, 1 - overlap_K, 0).sum() / occurring
    labelled = learned_BHW.sum(dtype=jnp.int32)
    return LossTerms(loss * labelled.astype(jnp.float32), labelled.astype(jnp.float32), labelled)


def binary_terms(
    logits_BK: jax.Array,
    label_BK: jax.Array,
    *,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> LossTerms:
    """Return sums of the binary cross-entropy of each class, for samples with several classes.

    Args:
        logits_BK: float32 scores.
        label_BK: 1 = has the class, 0 = has not, 255 = not labelled.
        class_weights: float32 (K,), of samples that have the class.
        label_smoothing: share s by which targets move from 0 and 1 towards 0.5.
        focal_gamma: As in `cross_entropy_terms`.
    """
    learned = label_BK.astype(jnp.int32) <= 1
    truth = label_BK.astype(jnp.int32) == 1
    target = jnp.where(truth, 1 - label_smoothing / 2, label_smoothing / 2)
    loss = jax.nn.softplus(logits_BK) - logits_BK * target
    if is_on(focal_gamma):
        p = jax.nn.sigmoid(logits_BK)
        loss = loss * jnp.maximum(jnp.where(truth, 1 - p, p), 1e-6) ** focal_gamma
    weight = jnp.where(
        learned, 1.0 if class_weights is None else jnp.where(truth, jnp.asarray(class_weights), 1.0), 0.0
    )
    return LossTerms(jnp.where(learned, loss * weight, 0).sum(), weight.sum(), learned.sum(dtype=jnp.int32))


def huber_terms(value: jax.Array, target: jax.Array, *, delta: float = 1.0) -> LossTerms:
    """Return sums of the Huber loss (Huber 1964) over finite targets: square up to `delta`, linear beyond.

    Args:
        value: float32 (…), predicted.
        target: float32 (…); nan = not labelled.
        delta: in the unit of both.
    """
    learned = jnp.isfinite(target)
    # the target is replaced before it is used: the gradient of a masked nan is nan
    error = value - jnp.where(learned, target, value)
    size = jnp.abs(error)
    loss = jnp.where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta))
    labelled = learned.sum(dtype=jnp.int32)
    return LossTerms(loss.sum(), labelled.astype(jnp.float32), labelled)


def square_terms(value: jax.Array, target: jax.Array) -> LossTerms:
    """Return sums of the squared error over finite targets; arguments as in `huber_terms`."""
    learned = jnp.isfinite(target)
    error = value - jnp.where(learned, target, value)
    labelled = learned.sum(dtype=jnp.int32)
    return LossTerms(jnp.square(error).sum(), labelled.astype(jnp.float32), labelled)
