"""The compiled step of k-means: assign rows to their nearest centre and sum them by centre.

A block is cut into pieces of one fixed size, and each piece is computed by one program on one device. Sums of pieces
are added on the host in float64, in their order. So labels and centres are the same on any number of devices.

Letters in shapes: K centre, F feature, S scaled feature, N row, R run of rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.scaling import Scaling

__all__ = ["Assigned", "assign_rows"]

_PIECE = 1 << 15
"""Rows of a piece: scores of 8 centres take 1 MB, which stays in the cache of a core."""
_RUN = 512
"""Rows that are summed in float32 before the sums go to float64; so few that no library splits them over threads."""


class Assigned(NamedTuple):
    """What the rows of a block give.

    Attributes:
        labels: uint8 (row,): nearest centre; of two that are as near, the first.
        nearness: uint8 (row,): 100 · (1 − distance to the nearest / distance to the second), per cent.
        members: int64 (k,) rows of each centre.
        total: float64 (k, scaled): sum of the scaled rows of each centre.
        inertia: Sum of squared distances.
        farthest: (squared distance, scaled row) of the row that is farthest from its centre.
    """

    labels: npt.NDArray[np.uint8]
    nearness: npt.NDArray[np.uint8]
    members: npt.NDArray[np.int64]
    total: npt.NDArray[np.float64]
    inertia: float
    farthest: tuple[float, npt.NDArray[np.float64]]


def assign_rows(
    values: npt.NDArray[np.float32], scaling: Scaling, centres: npt.NDArray[np.float64], *, device: int = 0,
    final: bool = False,
) -> Assigned:  # fmt: skip
    """Assign the rows of one block.

    Args:
        values: (feature, row).
        scaling: How rows are scaled.
        centres: (k, scaled).
        device: Number of the device; counted around those there are.
        final: Also give labels, nearness and the farthest row, which iterations do not need.
    """
    devices = jax.local_devices()
    place = devices[device % len(devices)]
    k, size = centres.shape
    padded = max(2, 1 << (k - 1).bit_length())
    full = np.zeros((padded, size), np.float32)
    full[:k] = centres
    # scores leave out |x|², which is the same for all centres; a centre that only fills up is never the nearest
    half = np.where(np.arange(padded) < k, np.square(full.astype(np.float64)).sum(axis=1), np.inf).astype(np.float32)
    diagonal = np.array_equal(scaling.matrix, np.diag(np.diag(scaling.matrix))) and size == len(scaling.mean)
    matrix = np.diag(scaling.matrix) if diagonal else scaling.matrix
    fixed = [jax.device_put(np.asarray(one, np.float32), place) for one in (scaling.mean, matrix, full, half)]
    rows = values.shape[1]
    pending = []
    for start in range(0, rows, _PIECE):
        piece = values[:, start : start + _PIECE]
        here = piece.shape[1]
        if here < _PIECE:
            piece = np.pad(piece, ((0, 0), (0, _PIECE - here)))
        pending.append((here, _step(jax.device_put(piece, place), np.int32(here), *fixed, final=final)))
    count, total, inertia = np.zeros(k, np.int64), np.zeros((k, size)), 0.0
    labels, nearness = np.zeros(rows if final else 0, np.uint8), np.zeros(rows if final else 0, np.uint8)
    farthest = (-1.0, np.zeros(size))
    done = 0
    for here, results in pending:
        sums, squares, *more = (np.asarray(one) for one in results)
        total += sums[:, :k, :size].sum(axis=0, dtype=np.float64)
        count += np.rint(sums[:, :k, size].sum(axis=0, dtype=np.float64)).astype(np.int64)
        inertia += float(squares.sum(dtype=np.float64))
        if final:
            labels[done : done + here], nearness[done : done + here] = more[0][:here], more[1][:here]
            if float(more[2]) > farthest[0]:
                farthest = (float(more[2]), more[3].astype(np.float64))
        done += here
    return Assigned(labels, nearness, count, total, inertia, farthest)


@functools.partial(jax.jit, static_argnames="final")
def _step(
    x_FN: jax.Array, rows: jax.Array, mean_F: jax.Array, matrix: jax.Array, centres_KS: jax.Array, half_K: jax.Array,
    *, final: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    highest = jax.lax.Precision.HIGHEST
    x_FN = x_FN - mean_F[:, None]
    s_SN = x_FN * matrix[:, None] if matrix.ndim == 1 else jnp.dot(matrix, x_FN, precision=highest)
    score_KN = half_K[:, None] - 2.0 * jnp.dot(centres_KS, s_SN, precision=highest)
    best_N, label_N = score_KN[0], jnp.zeros(score_KN.shape[1], jnp.int32)
    for at in range(1, score_KN.shape[0]):
        nearer_N = score_KN[at] < best_N  # strictly: of two that are as near, the first stays
        best_N = jnp.where(nearer_N, score_KN[at], best_N)
        label_N = jnp.where(nearer_N, at, label_N)
    valid_N = jnp.arange(x_FN.shape[1]) < rows
    square_N = jnp.where(valid_N, jnp.maximum(best_N + jnp.square(s_SN).sum(axis=0), 0.0), 0.0)
    runs = x_FN.shape[1] // _RUN
    label_RN = jnp.where(valid_N, label_N, -1).reshape(runs, _RUN)
    one_RKN = (label_RN[:, None] == jnp.arange(len(half_K))[None, :, None]).astype(jnp.float32)
    with_one_SN = jnp.concatenate([s_SN, jnp.ones_like(s_SN[:1])])
    rows_RSN = with_one_SN.reshape(len(with_one_SN), runs, _RUN).transpose(1, 0, 2)
    sums_RKS = jnp.einsum("rkn,rsn->rks", one_RKN, rows_RSN, precision=highest)
    squares_R = square_N.reshape(runs, _RUN).sum(axis=1)
    if not final:
        return sums_RKS, squares_R
    others_KN = jnp.where(jnp.arange(len(half_K))[:, None] == label_N[None], jnp.inf, score_KN)
    second_N = jnp.maximum(others_KN.min(axis=0) + jnp.square(s_SN).sum(axis=0), 1e-30)
    near_N = 100.0 * (1.0 - jnp.sqrt(jnp.minimum(square_N / second_N, 1.0)))
    far = jnp.argmax(square_N)
    return (
        sums_RKS,
        squares_R,
        label_N.astype(jnp.uint8),
        jnp.rint(near_N).astype(jnp.uint8),
        square_N[far],
        s_SN[:, far],
    )
