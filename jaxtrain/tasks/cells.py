"""`Cells` group the rows of a block that lie close together, so that a pass of k-means need not look at each row.

The rows are cut by a grid along the principal axes of the block. Where the same centre is nearest in all of a cell, the
cell goes to it as one, by its count and its sum; only rows of other cells are compared one by one. This is the
filtering of Pelleg & Moore (1999, doi:10.1145/312129.312248) and Kanungo et al. (2002, doi:10.1109/TPAMI.2002.1017616)
on a grid in place of a tree. Every row gets the centre that it would get alone: a cell is decided only where the
difference is larger than what float32 could round away.

Letters in shapes: A axis, F feature, N row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.assign import Assigned, assign_rows
from jaxtrain.tasks.moments import Moments
from jaxtrain.tasks.scaling import Scaling

__all__ = ["Cells", "assign_cells", "make_cells"]

F64 = npt.NDArray[np.float64]
MOST_FEATURES = 16
"""Most features with which rows are cut into cells; with more, few cells would have one nearest centre."""
_OUTSIDE = 65_535
"""Code of the rows outside the grid; also the most cells of a grid."""
_ROWS = 16
"""Rows for each cell of the grid, at least: a cell must be much cheaper than its rows."""
_LEAST = 1 << 13
"""Rows below which a block has no cells."""
_SAMPLE = 8192
_TAIL = 0.005
"""Share of the rows beyond each end of an axis that the grid leaves out: far rows would make all cells large."""
_AXES = 4
"""Most axes that are cut."""
_PIECE = 1 << 15
_WORTH = 0.5
"""Share of rows in undecided cells above which the block is computed row by row."""


@dataclass(frozen=True)
class Cells:
    """The cells of one block.

    Attributes:
        codes: uint16 (row,): code of the cell of each row; 65535 outside the grid.
        numbers: int64 (cell,): codes that occur, ascending.
        count: int64 (cell,): rows.
        total: float64 (feature, cell): sums of the rows.
        middle: float64 (axis, cell): middle of the cell along the axes that are cut.
        half: float64 (axis,): half the size of a cell along all axes, rounding included.
        origin: float64 (feature,): where the axes cross.
        axes: float64 (axis, feature): unit vectors; those that are cut come first.
        centre: float64 (axis,): middle of the grid along all axes.
        moments: Moments of all rows.
    """

    codes: npt.NDArray[np.uint16]
    numbers: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    total: F64
    middle: F64
    half: F64
    origin: F64
    axes: F64
    centre: F64
    moments: Moments

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.codes.nbytes + self.numbers.nbytes + self.count.nbytes + self.total.nbytes + self.middle.nbytes


class _Grid(NamedTuple):
    origin: F64
    axes: F64
    low: F64
    high: F64
    bins: npt.NDArray[np.int64]


def make_cells(values: npt.NDArray[np.float32], *, device: int = 0) -> Cells | None:
    """Cut float32 (feature, row) into cells; None of few rows, of many features, and of rows that are all the same."""
    features, rows = values.shape
    if rows < _LEAST or features > MOST_FEATURES:
        return None
    grid = _make_grid(values)
    if grid is None:
        return None
    codes = _codes(values, grid, device)
    wide = codes.astype(np.int64)
    counts = np.bincount(wide, minlength=_OUTSIDE + 1)
    numbers = np.flatnonzero(counts[:_OUTSIDE])
    sums = [np.bincount(wide, row, _OUTSIDE + 1)[numbers] for row in values]
    total: npt.NDArray[np.float64] = np.stack(sums, dtype=np.float64)
    step = (grid.high - grid.low) / grid.bins
    cut = int((grid.bins > 1).sum())
    place = np.stack(np.unravel_index(numbers, grid.bins[:cut])) if cut else np.zeros((0, len(numbers)))
    middle = grid.low[:cut, None] + (place + 0.5) * step[:cut, None]
    # a row may be rounded across the edge of its cell
    rounding = 2.0**-21 * features * (np.abs(grid.origin).sum() + np.abs([grid.low, grid.high]).max(initial=0.0))
    return Cells(codes, numbers, counts[numbers], total, middle, step / 2 + rounding, grid.origin, grid.axes,
                 (grid.low + grid.high) / 2, Moments.of(values))  # fmt: skip


def assign_cells(
    values: npt.NDArray[np.float32], cells: Cells, scaling: Scaling, centres: F64, *, device: int = 0
) -> Assigned:
    """Assign the rows of one block, cell by cell where that is certain.

    Args:
        values: (feature, row).
        cells: Cells of these rows.
        scaling: Scaling of the rows.
        centres: (k, scaled).
        device: Number of the device; counted around those there are.

    Returns:
        Members, sums and inertia; no labels.
    """
    label, decided = _decide(cells, scaling, centres)
    open_rows = len(values[0]) - int(cells.count[decided].sum())
    if open_rows > _WORTH * len(values[0]):
        return assign_rows(values, scaling, centres, device=device)
    undecided = np.ones(_OUTSIDE + 1, bool)
    undecided[cells.numbers[decided]] = False
    at = np.flatnonzero(np.take(undecided, cells.codes, mode="clip"))
    found = assign_rows(np.stack([np.take(row, at) for row in values]), scaling, centres, device=device)
    mean, matrix = _as_float32(scaling)
    k, label = len(centres), label[decided]
    count = np.bincount(label, cells.count[decided], k)
    sums = np.stack([np.bincount(label, row[decided], k) for row in cells.total], axis=1) - count[:, None] * mean
    members = found.members + np.rint(count).astype(np.int64)
    total = found.total + _product(sums, matrix.T)
    near = centres.astype(np.float32).astype(np.float64)
    inertia = _squares(cells.moments, mean, matrix) + float((members * np.square(near).sum(axis=1)).sum())
    return found._replace(members=members, total=total, inertia=max(0.0, inertia - 2.0 * float((total * near).sum())))


def _decide(cells: Cells, scaling: Scaling, centres: F64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the centre that is nearest to the middle of each cell, and whether it is nearest in all of the cell."""
    mean, matrix = _as_float32(scaling)
    near = centres.astype(np.float32).astype(np.float64)
    # squared distance less |x|², as a linear function of the place along the axes
    along = -2.0 * _product(near, matrix)
    slope = _product(along, cells.axes.T)
    level = np.square(near).sum(axis=1) + _product(along, (cells.origin - mean)[:, None])[:, 0]
    cut = len(cells.middle)
    level = level + (slope[:, cut:] * cells.centre[cut:]).sum(axis=1)
    score = np.repeat(level[:, None], len(cells.numbers), axis=1)
    for axis, middle in enumerate(cells.middle):
        score += slope[:, axis, None] * middle
    label = score.argmin(axis=0)
    best = score[label, np.arange(len(label))]
    room = np.full(len(label), np.inf)
    for at in range(len(near)):
        reach = (np.abs(slope - slope[at]) * cells.half).sum(axis=1)
        reach[at] = -np.inf  # a centre is no rival of itself
        chosen = np.flatnonzero(label == at)
        room[chosen] = (score[:, chosen] - reach[:, None]).min(axis=0) - best[chosen]
    farthest = (np.abs(cells.centre) + np.abs(cells.middle).max(initial=0.0) + cells.half).sum()
    size = np.abs(matrix).max() * (farthest + np.abs(cells.origin - mean).sum() + np.abs(mean).sum())
    largest = float(np.sqrt(np.square(near).sum(axis=1).max()))
    rounding = 2.0**-20 * sum(matrix.shape) * largest * (largest + 2.0 * size)
    return label, room > rounding


def _make_grid(values: npt.NDArray[np.float32]) -> _Grid | None:
    features, rows = values.shape
    sample = values[:, :: -(-rows // _SAMPLE)].astype(np.float64)
    moments = Moments.of(sample)
    variance, vectors = np.linalg.eigh(moments.covariance)
    axes = np.ascontiguousarray(vectors[:, ::-1].T)
    if not variance[-1] > 0:
        return None
    placed = _product(axes, sample - moments.mean[:, None])
    low, high = np.quantile(placed, [_TAIL, 1.0 - _TAIL], axis=1)
    wide = np.maximum(high - low, 1e-6 * (high - low).max())
    if not wide.max() > 0:
        return None
    low, high = low - 0.05 * wide, low + 1.05 * wide
    bins = np.ones(features, np.int64)
    most, step = min(_OUTSIDE, rows // _ROWS), wide.max()
    while True:
        finer = np.maximum(1, np.ceil((high - low)[:_AXES] / step)).astype(np.int64)
        if finer.prod() > most:
            break
        bins[: len(finer)], step = finer, step / 1.1
    order = np.argsort(bins == 1, kind="stable")
    return _Grid(moments.mean, axes[order], low[order], high[order], bins[order])


def _codes(values: npt.NDArray[np.float32], grid: _Grid, device: int) -> npt.NDArray[np.uint16]:
    devices = jax.local_devices()
    place = devices[device % len(devices)]
    bins = grid.bins.astype(np.float32)
    stride = np.concatenate([np.cumprod(grid.bins[::-1])[::-1][1:], [1]]) * (grid.bins > 1)
    numbers = (grid.origin, grid.axes, grid.low, bins / (grid.high - grid.low), bins, stride)
    fixed = [jax.device_put(np.asarray(one, np.float32), place) for one in numbers]
    rows, pending = values.shape[1], []
    for start in range(0, rows, _PIECE):
        piece = values[:, start : start + _PIECE]
        if piece.shape[1] < _PIECE:
            piece = np.pad(piece, ((0, 0), (0, _PIECE - piece.shape[1])))
        pending.append(_code(jax.device_put(piece, place), *fixed))
    return np.concatenate([np.asarray(one) for one in pending])[:rows]


@jax.jit
def _code(
    x_FN: jax.Array, origin_F: jax.Array, axes_AF: jax.Array, low_A: jax.Array, scale_A: jax.Array, bins_A: jax.Array,
    stride_A: jax.Array,
) -> jax.Array:  # fmt: skip
    placed_AN = jnp.dot(axes_AF, x_FN - origin_F[:, None], precision=jax.lax.Precision.HIGHEST)
    bin_AN = jnp.floor((placed_AN - low_A[:, None]) * scale_A[:, None])
    inside_N = ((bin_AN >= 0) & (bin_AN < bins_A[:, None])).all(axis=0)
    code_N = (bin_AN * stride_A[:, None]).sum(axis=0)
    return jnp.where(inside_N, code_N, _OUTSIDE).astype(jnp.uint16)


def _as_float32(scaling: Scaling) -> tuple[F64, F64]:
    """Return mean and matrix as rows are scaled by them."""
    return scaling.mean.astype(np.float32).astype(np.float64), scaling.matrix.astype(np.float32).astype(np.float64)


def _squares(moments: Moments, mean: F64, matrix: F64) -> float:
    """Return the sum of the squared scaled rows."""
    apart = _product(matrix, (moments.mean - mean)[:, None])
    spread = (_product(matrix, moments.scatter) * matrix).sum()
    return float(spread + moments.count * np.square(apart).sum())


def _product(left: F64, right: F64) -> F64:
    """Return the product of matrices in an order of sums that depends on no library and no number of threads."""
    found = np.zeros((left.shape[0], right.shape[1]))
    for at in range(left.shape[1]):
        found += left[:, at, None] * right[None, at]
    return found
