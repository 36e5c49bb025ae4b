"""Masked cross-entropy: the mean is over the labelled pixels of the global batch.

Letters in shapes: B sample, H row, W column, K class.

Sums are taken before the one division. Under `jit` with a batch split over devices both sums become all-reduces, so the
loss and its gradient do not depend on the mesh, nor on how unevenly labelled pixels are spread over devices. A mean of
per-device means would depend on both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["IGNORE", "LossTerms", "cross_entropy", "cross_entropy_terms"]

IGNORE = 255
"""The label of a pixel that is not learnt; so is every label that is not below the number of classes."""


class LossTerms(NamedTuple):
    """Sums over all pixels of a batch; they may be added over batches."""

    loss: jax.Array
    """Weighted sum of the per-pixel losses, float32."""
    weight: jax.Array
    """Sum of the weights, float32; the number of labelled pixels where classes have no weights."""
    labelled: jax.Array
    """Number of labelled pixels, int32."""

    def mean(self) -> jax.Array:
        """The mean loss; zero, with zero gradient, where no pixel is labelled."""
        return self.loss / jnp.where(self.weight > 0, self.weight, jnp.float32(1))


def cross_entropy_terms(
    logits_BHWK: jax.Array,
    label_BHW: jax.Array,
    *,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> LossTerms:
    """The sums that make up the mean loss.

    Args:
        logits_BHWK: float32 scores.
        label_BHW: class index, any integer type; 255 where nothing is learnt.
        class_weights: float32 (K,), of the true class; none for equal weights.
        label_smoothing: share s of the target that is spread evenly over all classes (Szegedy et al. 2016,
            arXiv:1512.00567).
    """
    classes = logits_BHWK.shape[-1]
    label_BHW = label_BHW.astype(jnp.int32)
    learnt_BHW = (label_BHW >= 0) & (label_BHW < classes)
    # comparison instead of a gather: a gather along a split batch is what the partitioner does worst
    truth_BHWK = label_BHW[..., None] == jnp.arange(classes, dtype=jnp.int32)
    log_p_BHWK = jax.nn.log_softmax(logits_BHWK, axis=-1)
    loss_BHW = -jnp.where(truth_BHWK, log_p_BHWK, 0).sum(axis=-1)
    if label_smoothing:
        loss_BHW = (1 - label_smoothing) * loss_BHW - label_smoothing * log_p_BHWK.mean(axis=-1)
    if class_weights is None:
        weight_BHW = learnt_BHW.astype(jnp.float32)
    else:
        weight_BHW = jnp.where(truth_BHWK, class_weights, 0).sum(axis=-1)
    # where, not a product: 0 * inf is nan
    loss = jnp.where(learnt_BHW, loss_BHW * weight_BHW, 0).sum()
    return LossTerms(loss, weight_BHW.sum(), learnt_BHW.sum(dtype=jnp.int32))


def cross_entropy(
    logits_BHWK: jax.Array,
    label_BHW: jax.Array,
    *,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The mean over labelled pixels, weighted by `class_weights`; see `cross_entropy_terms`.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy(jnp.zeros((1, 1, 2, 4)), jnp.array([[[0, 255]]]))), 4)
    1.3863
    """
    terms = cross_entropy_terms(logits_BHWK, label_BHW, class_weights=class_weights, label_smoothing=label_smoothing)
    return terms.mean()
