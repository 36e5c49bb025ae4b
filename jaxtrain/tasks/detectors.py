"""Detectors give each row of a table a score; the larger it is, the more unusual the row.

A detector can be sent to another process. It scores a block in the block's own shape, with NaN where there is no row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.background import Background, score_rows
from jaxtrain.tasks.local_rx import score_locally
from jaxtrain.tasks.table import Block
from jaxtrain.tasks.tables import CubeTable, SampleTable
from jaxtrain.tasks.work import TableRef
from zarr_store.errors import InvalidInput

__all__ = ["Detector", "Forest", "LocalRx", "Method", "Neighbours", "Rx", "grow_forest"]

F32 = npt.NDArray[np.float32]
Method = Literal["rx", "local-rx", "autoencoder", "isolation", "embedding"]
_NEAREST = 5
_NEAREST_SHARE = 0.01
"""Smallest share of reference rows that count as nearest, so that rows of one anomaly do not make each other usual."""
_PIECE = 4096
"""Rows whose distances to all reference rows are held at once."""


class Detector(Protocol):
    """Interface of a detector, which scores one block of a table."""

    @property
    def ref(self) -> TableRef: ...

    def __call__(self, number: int) -> F32: ...


@dataclass(frozen=True)
class Rx:
    """Squared Mahalanobis distance from the background."""

    ref: TableRef
    background: Background

    def __call__(self, number: int) -> F32:
        block = self.ref.block(number)
        return _spread(block, score_rows(block.values, self.background, device=number))


@dataclass(frozen=True)
class LocalRx:
    """Squared Mahalanobis distance from the ring around a pixel."""

    ref: TableRef
    background: Background
    inner: int
    outer: int
    shrinkage: float | None

    def __call__(self, number: int) -> F32:
        table = self.ref.table
        chosen: dict[str, Any] = {"inner": self.inner, "outer": self.outer, "shrinkage": self.shrinkage,
                                  "device": number}  # fmt: skip
        if isinstance(table, CubeTable):
            box = table.reader.boxes[number]
            wide = box.grown(self.outer // 2, table.reader.spec.grid.shape)
            block = table.read_box(wide)
            images, inside = _image(block), box.inside(wide)
            if block.dates == 1:
                return score_locally(images, self.background, **chosen)[inside]
            return np.stack([score_locally(images[:, at], self.background, **chosen)[inside]
                             for at in range(block.dates)])  # fmt: skip
        images = _image(self.ref.block(number))
        return np.stack([score_locally(images[:, at], self.background, **chosen) for at in range(images.shape[1])])


@dataclass(frozen=True)
class Neighbours:
    """Mean distance to the nearest reference rows, in units of the background's spread."""

    ref: TableRef
    background: Background
    reference: npt.NDArray[np.float64]

    def __call__(self, number: int) -> F32:
        block = self.ref.block(number)
        rows = self.background.whiten(block.values).T
        devices = jax.local_devices()
        place = devices[number % len(devices)]
        found = np.empty(len(rows), np.float32)
        with jax.enable_x64(True):
            reference = jax.device_put(self.reference, place)
            for start in range(0, len(rows), _PIECE):
                piece = rows[start : start + _PIECE]
                padded = np.pad(piece, ((0, _PIECE - len(piece)), (0, 0)))
                squares = np.asarray(_squares(jax.device_put(padded, place), reference))[: len(piece)]
                found[start : start + len(piece)] = _nearness(squares, rows.shape[1])
        return _spread(block, found)


@dataclass(frozen=True)
class Forest:
    """Isolation forest (Liu, Ting & Zhou 2008, doi:10.1109/ICDM.2008.17) on whitened rows.

    A tree cuts along one feature at a time, and bands go together: what is unusual beside the other bands of a pixel
    lies inside the range of each band.
    """

    ref: TableRef
    background: Background
    forest: Any

    def __call__(self, number: int) -> F32:
        block = self.ref.block(number)
        if not block.values.shape[1]:
            return _spread(block, np.zeros(0, np.float32))
        rows = self.background.whiten(block.values).T
        return _spread(block, (-self.forest.score_samples(rows)).astype(np.float32))


def grow_forest(rows: npt.NDArray[np.float64], seed: int) -> Any:
    """Grow an isolation forest on whitened (row, feature) with scikit-learn.

    Raises:
        InvalidInput: scikit-learn is not installed.
    """
    try:
        ensemble = importlib.import_module("sklearn.ensemble")
    except ImportError as error:
        raise InvalidInput(
            "--method isolation needs scikit-learn, which is not installed: pip install 'terrashard[anomaly]', or "
            "choose another method"
        ) from error
    return ensemble.IsolationForest(n_estimators=200, random_state=seed % (1 << 32)).fit(rows)


@jax.jit
def _squares(row_ND: jax.Array, reference_RD: jax.Array) -> jax.Array:
    products_NR = jnp.dot(row_ND, reference_RD.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(row_ND).sum(1)[:, None] + jnp.square(reference_RD).sum(1)[None] - 2.0 * products_NR


def _nearness(square_NR: npt.NDArray[np.float64], features: int) -> F32:
    """Return the mean distance of each row to its nearest reference rows."""
    count = max(_NEAREST, round(_NEAREST_SHARE * square_NR.shape[1]))
    most = min(count + 1, square_NR.shape[1])
    # numpy, because XLA sorts numbers of 64 bits ten times as slowly on a processor
    nearest_NK = np.partition(square_NR, most - 1, axis=1)[:, :most] if most < square_NR.shape[1] else square_NR.copy()
    nearest_NK.sort(axis=1)
    distance_NK = np.sqrt(np.maximum(nearest_NK, 0.0))
    # a reference row is its own nearest neighbour, which tells nothing about it
    itself_N = nearest_NK[:, 0] < 1e-9 * features
    mean_N = np.where(itself_N, distance_NK[:, 1:].mean(axis=1), distance_NK[:, :-1].mean(axis=1))
    found_N: F32 = mean_N.astype(np.float32)
    return found_N


def _spread(block: Block, scores: F32) -> F32:
    found = np.full(block.shape, np.nan, np.float32)
    found.ravel()[block.at] = scores
    return found


def _image(block: Block) -> F32:
    values = np.full((len(block.values), *block.shape), np.nan, np.float32)
    values.reshape(len(values), -1)[:, block.at] = block.values
    return values


def is_image(table: Any) -> bool:
    """Return whether the rows of a table lie in images."""
    return isinstance(table, CubeTable | SampleTable)
