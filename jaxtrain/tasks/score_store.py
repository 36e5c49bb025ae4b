"""Scores and masks of anomalies on disk: layers of a cube's grid, or arrays of samples and vectors.

OUT/anomalies.zarr/score   (y, x) float32; (sample, y, x) of samples; (sample,) of vectors; NaN where nothing was seen
OUT/anomalies.zarr/mask    uint8 of the same shape: 1 where the score exceeds the threshold, 255 where nothing was seen
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from jaxtrain.inference.maps import NODATA
from jaxtrain.tasks.layers import Layer, create_layers
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import VECTORS_IN_BLOCK, CubeTable, SampleTable, VectorTable

__all__ = ["ScoreStore"]

_ROWS = 512
_VECTORS = 1 << 16


class ScoreStore:
    """The arrays `score` and `mask` of one result.

    Args:
        path: The Zarr group; it is made where nothing is.
        table: The rows that are scored.
        attributes: JSON: what made them.
    """

    def __init__(self, path: Path, table: Table, attributes: dict[str, Any]) -> None:
        self.table = table
        if not (path / "zarr.json").exists():
            _create(path, table, attributes)
        self.group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        self.score: Any = self.group["score"]
        self.mask: Any = self.group["mask"]

    def write(self, number: int, scores: npt.NDArray[np.float32]) -> None:
        """Write the scores of a block, in its shape."""
        if isinstance(self.table, CubeTable):
            box = self.table.reader.boxes[number]
            self.score[box.y0 : box.y1, box.x0 : box.x1] = scores
            return
        # blocks of samples and vectors are of one length, but for the last
        size = self.table.samples_in_block if isinstance(self.table, SampleTable) else VECTORS_IN_BLOCK
        first = number * size
        self.score[first : first + len(scores)] = scores

    def strips(self) -> Iterator[tuple[slice, npt.NDArray[np.float32], npt.NDArray[np.uint64]]]:
        """Yield the scores some rows at a time, with the numbers of the rows in the table."""
        length = self.score.shape[0]
        width = int(np.prod(self.score.shape[1:], dtype=np.int64))
        step = _ROWS if isinstance(self.table, CubeTable) else max(1, _VECTORS // width)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            scores = np.asarray(self.score[rows])
            ids = np.arange(rows.start * width, rows.stop * width, dtype=np.uint64).reshape(scores.shape)
            yield rows, scores, ids

    def flag(self, threshold: float) -> tuple[int, int]:
        """Write the mask, and return the number of flagged rows and of scored rows."""
        flagged = scored = 0
        for rows, scores, _ in self.strips():
            seen = np.isfinite(scores)
            above = seen & (scores > threshold)
            self.mask[rows] = np.where(seen, above, NODATA).astype(np.uint8)
            flagged, scored = flagged + int(above.sum()), scored + int(seen.sum())
        return flagged, scored

    def read(self, rows: slice) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Read scores and mask of some rows."""
        return np.asarray(self.score[rows]), np.asarray(self.mask[rows]) == 1


def _create(path: Path, table: Table, attributes: dict[str, Any]) -> None:
    about = {"terrashard_anomalies": attributes}
    notes: dict[str, dict[str, Any]] = {"score": {"long_name": "anomaly score"},
             "mask": {"long_name": "anomaly", "flag_values": [0, 1], "flag_meanings": "usual anomaly"}}  # fmt: skip
    if isinstance(table, CubeTable):
        create_layers(path, table.reader.spec.grid, {
            "score": Layer("float32", np.nan, attributes=notes["score"]),
            "mask": Layer("uint8", NODATA, attributes=notes["mask"]),
        }, attributes=about)  # fmt: skip
        return
    sizes = table.store.spec.size if isinstance(table, SampleTable) else ()
    rows = table.store.spec.count if isinstance(table, SampleTable) else len(table.vectors)  # type: ignore[attr-defined]
    root = zarr.create_group(str(path), attributes=about)
    chunk = max(1, min(rows, _VECTORS // max(int(np.prod(sizes)), 1)))
    for name, dtype, fill in (("score", "float32", np.nan), ("mask", "uint8", NODATA)):
        root.create_array(
            name, shape=(rows, *sizes), chunks=(chunk, *sizes), dtype=dtype, fill_value=fill,
            compressors=[ZstdCodec(level=3, checksum=True)], dimension_names=("sample", "y", "x")[: 1 + len(sizes)],
            attributes=notes[name],
        )  # fmt: skip
    if isinstance(table, VectorTable):
        for name, values in table.places.items():
            array: Any = root.create_array(
                name, shape=values.shape, chunks=values.shape,
                dtype="str" if values.dtype.kind in "OUT" else values.dtype,
                compressors=[ZstdCodec(level=3, checksum=True)], dimension_names=("sample",),
            )  # fmt: skip
            array[...] = values
