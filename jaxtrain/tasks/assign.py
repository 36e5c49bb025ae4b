"""The compiled step of k-means: assign rows to their nearest centre and sum them by centre.

A block is cut into pieces of one fixed size, and each piece is computed by one program on one device. Sums of pieces
are added on the host in float64, in their order. So labels and centres are the same on any number of devices.

Letters in shapes: K centre, F feature, S scaled feature, N row, R run of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.scaling import Scaling

__all__ = ["Assigned", "assign_rows"]

_PIECE = 1 << 15
"""Rows of a piece: scores of 8 centres take 1 MB, which stays in the cache of a core."""
_UNROLLED = 256
"""Most products of centres and features that are written out in the program; with more, it is a product of matrices."""
_RUN = 512
"""Rows that are summed in float32 before the sums go to float64; so few that no library splits them over threads."""


class Assigned(NamedTuple):
    """Labels and sums of the rows of a block.

    Attributes:
        labels: uint8 (row,): nearest centre; of two that are as near, the first.
        nearness: uint8 (row,): 100 · (1 − distance to the nearest / distance to the second), per cent.
        members: int64 (k,) rows of each centre.
        total: float64 (k, scaled): sum of the scaled rows of each centre.
        inertia: Sum of squared distances.
        farthest: (squared distance, scaled row) of the row that is farthest from its centre.
        sums, squares: float64 (k, feature): sums of row − mean of the scaling, and of its square, of each centre; empty
            unless asked for.
    """

    labels: npt.NDArray[np.uint8]
    nearness: npt.NDArray[np.uint8]
    members: npt.NDArray[np.int64]
    total: npt.NDArray[np.float64]
    inertia: float
    farthest: tuple[float, npt.NDArray[np.float64]]
    sums: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]


def assign_rows(
    values: npt.NDArray[np.float32], scaling: Scaling, centres: npt.NDArray[np.float64], *, device: int = 0,
    final: bool = False,
) -> Assigned:  # fmt: skip
    """Assign the rows of one block.

    Args:
        values: (feature, row).
        scaling: Scaling of the rows.
        centres: (k, scaled).
        device: Number of the device; counted around those there are.
        final: Also give labels, nearness, the farthest row, sums and squares, which iterations do not need.
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
        given = jax.device_put(piece, place)
        # apart, because one program would compute labels again in each loop that reads them
        labelled = _label(given, np.int32(here), *fixed, final=final)
        pending.append((here, labelled[3:], _sum(*labelled[:3], given, fixed[0], count=padded, final=final)))
    sums, inertia = np.zeros((k, size + 1 + (2 * len(values) if final else 0))), 0.0
    labels, nearness = np.zeros(rows if final else 0, np.uint8), np.zeros(rows if final else 0, np.uint8)
    farthest = (-1.0, np.zeros(size))
    done = 0
    for here, more, (of_runs, squares, *far) in pending:
        sums += np.asarray(of_runs)[:, :k].sum(axis=0, dtype=np.float64)
        inertia += float(np.asarray(squares).sum(dtype=np.float64))
        if final:
            labels[done : done + here], nearness[done : done + here] = (np.asarray(one)[:here] for one in more)
            if float(far[0]) > farthest[0]:
                farthest = (float(far[0]), np.asarray(far[1]).astype(np.float64))
        done += here
    total, count = sums[:, :size], np.rint(sums[:, size]).astype(np.int64)
    plain, squared = np.split(sums[:, size + 1 :], 2, axis=1)
    return Assigned(labels, nearness, count, total, inertia, farthest, plain, squared)


@functools.partial(jax.jit, static_argnames="final")
def _label(
    x_FN: jax.Array, rows: jax.Array, mean_F: jax.Array, matrix: jax.Array, centres_KS: jax.Array, half_K: jax.Array,
    *, final: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Return label (−1 beyond the rows), squared distance and scaled row; of the final pass, label and nearness."""
    highest = jax.lax.Precision.HIGHEST
    x_FN = x_FN - mean_F[:, None]
    s_SN = x_FN * matrix[:, None] if matrix.ndim == 1 else jnp.dot(matrix, x_FN, precision=highest)
    count, size = centres_KS.shape
    if count * size <= _UNROLLED:  # one loop over the rows that keeps all scores in registers
        score_KN: Sequence[jax.Array] | jax.Array = [
            functools.reduce(lambda left, at: left - 2.0 * centres_KS[k, at] * s_SN[at], range(size), half_K[k])
            for k in range(count)
        ]
    else:
        score_KN = half_K[:, None] - 2.0 * jnp.dot(centres_KS, s_SN, precision=highest)
    best_N, label_N = score_KN[0], jnp.zeros(x_FN.shape[1], jnp.int32)
    second_N = jnp.full_like(best_N, jnp.inf)
    for at in range(1, count):
        nearer_N = score_KN[at] < best_N  # strictly: of two that are as near, the first stays
        second_N = jnp.where(nearer_N, best_N, jnp.minimum(second_N, score_KN[at]))
        best_N = jnp.where(nearer_N, score_KN[at], best_N)
        label_N = jnp.where(nearer_N, at, label_N)
    length_N = functools.reduce(lambda left, row: left + row * row, s_SN, jnp.zeros_like(best_N))
    valid_N = jnp.arange(x_FN.shape[1]) < rows
    square_N = jnp.where(valid_N, jnp.maximum(best_N + length_N, 0.0), 0.0)
    found = (jnp.where(valid_N, label_N, -1), square_N, s_SN)
    if not final:
        return found
    near_N = 100.0 * (1.0 - jnp.sqrt(jnp.minimum(square_N / jnp.maximum(second_N + length_N, 1e-30), 1.0)))
    return (*found, label_N.astype(jnp.uint8), jnp.rint(near_N).astype(jnp.uint8))


@functools.partial(jax.jit, static_argnames=("count", "final"))
def _sum(
    label_N: jax.Array, square_N: jax.Array, s_SN: jax.Array, x_FN: jax.Array, mean_F: jax.Array, *, count: int,
    final: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Sum scaled rows and ones by centre in each run; in the final pass also plain rows, squares, and the farthest."""
    runs = label_N.shape[0] // _RUN
    one_RKN = (label_N.reshape(runs, _RUN)[:, None] == jnp.arange(count)[None, :, None]).astype(jnp.float32)
    columns = [s_SN, jnp.ones_like(s_SN[:1])]
    if final:
        x_FN = x_FN - mean_F[:, None]
        columns += [x_FN, x_FN * x_FN]
    wide_SN = jnp.concatenate(columns)
    rows_RSN = wide_SN.reshape(len(wide_SN), runs, _RUN).transpose(1, 0, 2)
    sums_RKS = jnp.einsum("rkn,rsn->rks", one_RKN, rows_RSN, precision=jax.lax.Precision.HIGHEST)
    squares_R = square_N.reshape(runs, _RUN).sum(axis=1)
    if not final:
        return sums_RKS, squares_R
    far = jnp.argmax(square_N)
    return sums_RKS, squares_R, square_N[far], s_SN[:, far]
