"""`Background` is the mean and covariance of usual rows; the score of RX is the distance from it.

RX (Reed & Xiaoli 1990, doi:10.1109/29.60107) scores a row by its squared Mahalanobis distance. Of rows from one normal
distribution it follows χ² with as many degrees of freedom as there are features.

Letters in shapes: F feature, G whitened feature, N row.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.moments import Moments
from zarr_store.errors import InvalidInput

__all__ = ["Background", "make_background", "score_rows"]

F64 = npt.NDArray[np.float64]
_PIECE = 1 << 16
"""Rows of a piece, which one compiled program scores on one device."""
_UNROLLED = 24
"""Most features whose products are written out in the program; with more, it is a product of matrices."""
_SINGULAR = 1e-10
"""Smallest eigenvalue of a correlation matrix, over its largest, that still counts as not singular."""


@dataclass(frozen=True)
class Background:
    """Mean and covariance of usual rows.

    Attributes:
        mean: float64 (feature,).
        whitening: float64 (feature, feature); whitened = whitening · (row − mean) has unit covariance. Made lower
            triangular, which changes no distance.
        shrinkage: Share of the diagonal in the covariance.
        count: Number of rows that it was made from.
    """

    mean: F64
    whitening: F64
    shrinkage: float
    count: int

    def __post_init__(self) -> None:
        if np.triu(self.whitening, 1).any():  # as earlier releases kept it
            lower = np.linalg.qr(self.whitening[::-1, ::-1])[1][::-1, ::-1]
            object.__setattr__(self, "whitening", np.ascontiguousarray(lower))

    def whiten(self, values: npt.NDArray[Any]) -> F64:
        """Whiten (feature, …), in float64."""
        flat = values.reshape(len(values), -1).astype(np.float64) - self.mean[:, None]
        whitened: F64 = (self.whitening @ flat).reshape(values.shape)
        return whitened

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"mean": self.mean.tolist(), "whitening": self.whitening.tolist(), "shrinkage": self.shrinkage,
                "count": self.count}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(np.array(data["mean"], np.float64), np.array(data["whitening"], np.float64),
                   float(data["shrinkage"]), int(data["count"]))  # fmt: skip


def make_background(
    moments: Moments,
    labels: Sequence[str],
    *,
    shrinkage: float | None = 0.0,
    where: str = "the data",
    remedy: str = "other features",
) -> Background:
    """Make the background of rows with these moments.

    Args:
        moments: Moments of the rows.
        labels: Names of the features, for errors.
        shrinkage: Share of the diagonal, 0 to 1, which replaces as much of the covariance; None estimates it by OAS
            (Chen, Wiesel, Eldar & Hero 2010, doi:10.1109/TSP.2010.2053029) on the correlations.
        where: Name of the data, for errors.
        remedy: Advice on how to choose other features, for errors.

    Raises:
        InvalidInput: The covariance is singular.
    """
    spread = np.sqrt(np.diag(moments.covariance))
    constant = [name for name, value in zip(labels, spread, strict=True) if not value > 0]
    if constant:
        raise InvalidInput(
            f"the covariance of {where} is singular: {', '.join(constant[:8])} "
            f"{'has' if len(constant) == 1 else 'have'} one value everywhere; choose {remedy}"
        )
    correlation = moments.covariance / np.outer(spread, spread)
    share = _oas(correlation, moments.count) if shrinkage is None else shrinkage
    shrunk = (1.0 - share) * correlation + share * np.eye(len(spread))
    variance, vectors = np.linalg.eigh(shrunk)
    if variance[0] < _SINGULAR * variance[-1]:
        few = moments.count <= len(spread)
        reason = (
            f"{moments.count} rows are too few for {len(spread)} features"
            if few
            else f"{_combined(vectors[:, 0], labels)} depend on each other"
        )
        raise InvalidInput(f"the covariance of {where} is singular: {reason}; add --shrinkage auto, or choose {remedy}")
    factor = np.linalg.cholesky(shrunk)
    whitening = np.tril(np.linalg.solve(factor, np.eye(len(spread)))) / spread[None, :]
    return Background(moments.mean, whitening, float(share), moments.count)


def score_rows(values: npt.NDArray[np.float32], background: Background, *, device: int = 0) -> npt.NDArray[np.float32]:
    """Return the squared Mahalanobis distance of each row of float32 (feature, row).

    Numbers are float64 on the device: bands depend on each other so closely that float32 would keep four digits.

    Args:
        values: The rows.
        background: Mean and covariance of usual rows.
        device: Number of the device; counted around those there are.
    """
    devices = jax.local_devices()
    place = devices[device % len(devices)]
    rows = values.shape[1]
    found = np.empty(rows, np.float32)
    with jax.enable_x64(True):
        fixed = [jax.device_put(one, place) for one in (background.mean, background.whitening)]
        pending = []
        for start in range(0, rows, _PIECE):
            piece = values[:, start : start + _PIECE]
            here = piece.shape[1]
            if here < _PIECE:
                piece = np.pad(piece, ((0, 0), (0, _PIECE - here)))
            pending.append((start, here, _score(jax.device_put(piece, place), *fixed)))
        for start, here, scores in pending:
            found[start : start + here] = np.asarray(scores)[:here]
    return found


@jax.jit
def _score(x_FN: jax.Array, mean_F: jax.Array, whitening_GF: jax.Array) -> jax.Array:
    features = x_FN.shape[0]
    if features > _UNROLLED:
        centred_FN = x_FN.astype(jnp.float64) - mean_F[:, None]
        whitened_GN = jnp.dot(whitening_GF, centred_FN, precision=jax.lax.Precision.HIGHEST)
        total_N: jax.Array = functools.reduce(lambda total, row: total + row * row, whitened_GN, jnp.float64(0.0))
        return total_N.astype(jnp.float32)
    # written out, it is one loop over the rows that stays in registers, and the zeros of the triangle are left out
    centred = [x_FN[f].astype(jnp.float64) - mean_F[f] for f in range(features)]
    score_N = jnp.zeros(x_FN.shape[1], jnp.float64)
    for g in range(features):
        row_F = whitening_GF[g]
        terms = (row_F[f] * centred[f] for f in range(g + 1))
        whitened_N = functools.reduce(operator.add, terms)
        score_N = score_N + whitened_N * whitened_N
    return score_N.astype(jnp.float32)


def _oas(correlation: F64, count: int) -> float:
    p = len(correlation)
    squares, trace = float(np.square(correlation).sum()), float(np.trace(correlation))
    below = (count + 1.0 - 2.0 / p) * (squares - trace * trace / p)
    above = (1.0 - 2.0 / p) * squares + trace * trace
    return 1.0 if below <= 0 else min(1.0, max(0.0, above / below))


def _combined(vector: F64, labels: Sequence[str]) -> str:
    names = [name for name, value in zip(labels, vector, strict=True) if abs(value) > 0.1 * np.abs(vector).max()]
    return ", ".join(names[:8])
