"""Label every row of a table with fitted clusters, and sum what their table and curves need in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from jaxtrain.data.classes import Classes
from jaxtrain.inference.maps import NODATA, create_map
from jaxtrain.tasks.assign import assign_rows
from jaxtrain.tasks.cluster_model import ClusterModel
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, SampleTable, VectorTable
from jaxtrain.tasks.work import TableRef, Workers

__all__ = ["LabelJob", "Labelled", "label_table"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """Sums over the rows of each cluster.

    Attributes:
        count: int64 (k,) rows.
        inertia: Sum of squared scaled distances.
        mean: float64 (k, feature), physical; nan of an empty cluster.
        std: float64 (k, feature).
        season: float64 (k, time, band): mean of the clear observations of each date; nan where there are none. Has no
            dates where the rows have none.
    """

    count: npt.NDArray[np.int64]
    inertia: float
    mean: F64
    std: F64
    season: F64


@dataclass(frozen=True)
class LabelJob:
    """Label the rows of a block, and sum what their table and curves need."""

    ref: TableRef
    model: ClusterModel

    def __call__(self, number: int) -> dict[str, Any]:
        block, k = self.ref.block(number), self.model.k
        found = assign_rows(block.values, self.model.scaling, self.model.centres, device=number, final=True)
        labels = np.full(block.shape, NODATA, np.uint8)
        nearness = np.full(block.shape, NODATA, np.uint8)
        labels.ravel()[block.at], nearness.ravel()[block.at] = found.labels, found.nearness
        return {
            "labels": labels, "nearness": nearness, "inertia": found.inertia,
            "count": found.members, "total": found.sums, "squares": found.squares,
            "season": _season(self.ref.table, number, labels, k),
        }  # fmt: skip


def _season(table: Table, number: int, labels: npt.NDArray[np.uint8], k: int) -> tuple[F64, F64]:
    """Return sums and counts (k, time, band) of the clear observations of each date in one box of a cube."""
    if not isinstance(table, CubeTable) or len(table.reader.times) < 2:
        return np.zeros((k, 0, 0)), np.zeros((k, 0, 0))
    values, _ = table.reader.read(table.reader.boxes[number])
    chosen = labels != NODATA
    picked = labels[chosen]
    sums, counts = np.zeros((k, *values.shape[:2])), np.zeros((k, *values.shape[:2]))
    for t, date in enumerate(values):
        for b, band in enumerate(date):
            row = band[chosen]
            seen = np.isfinite(row)
            sums[:, t, b] = np.bincount(picked[seen], row[seen].astype(np.float64), k)
            counts[:, t, b] = np.bincount(picked[seen], minlength=k)
    return sums, counts


def label_table(
    table: Table,
    model: ClusterModel,
    classes: Classes,
    out: Path | None,
    workers: Workers,
    *,
    attributes: dict[str, Any],
    on_block: Callable[[int, int], None] | None = None,
) -> Labelled:
    """Label all rows and write them.

    Args:
        table: The rows.
        model: The clusters.
        classes: Their names and colours.
        out: Where the labels go: a map of a cube, or a Zarr group of samples or vectors; None keeps none.
        workers: Workers that compute the blocks.
        attributes: JSON: what made the labels.
        on_block: Called with (blocks done, blocks in all).
    """
    job = LabelJob(TableRef.of(table), model)
    sums: dict[str, Any] = {}

    def results() -> Any:
        for number, found in enumerate(workers.map(job, range(len(table)))):
            for name in ("count", "total", "squares", "inertia"):
                sums[name] = sums.get(name, 0) + found[name]
            season, seen = found["season"]
            sums["season"], sums["seen"] = sums.get("season", 0) + season, sums.get("seen", 0) + seen
            yield number, found["labels"], found["nearness"]
            if on_block:
                on_block(number + 1, len(table))

    if out is None:
        for _ in results():
            pass
    elif isinstance(table, CubeTable):
        with create_map(out, table.reader.spec.grid, classes, attributes=attributes) as writer:
            _write_map(writer, table, results())
    else:
        _write_rows(out, table, results(), attributes)
    count = sums["count"].astype(np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = sums["total"] / count[:, None]
        mean = model.scaling.mean.astype(np.float32) + apart
        std = np.sqrt(np.maximum(sums["squares"] / count[:, None] - np.square(apart), 0.0))
        season = sums["season"] / sums["seen"]
    return Labelled(count, float(sums["inertia"]), mean, std, season)


def _write_map(writer: Any, table: CubeTable, results: Any) -> None:
    for number, labels, nearness in results:
        box = table.reader.boxes[number]
        writer.write(box.y0, box.x0, labels, nearness)


def _write_rows(out: Path, table: Table, results: Any, attributes: dict[str, Any]) -> None:
    """Write labels of samples (sample, y, x) or vectors (sample,), with the places of vectors."""
    root = zarr.create_group(str(out), attributes={"terrashard_clusters": attributes})
    sizes = table.store.spec.size if isinstance(table, SampleTable) else ()
    rows = table.store.spec.count if isinstance(table, SampleTable) else len(table.vectors)  # type: ignore[attr-defined]
    dims = ("sample", "y", "x")[: 1 + len(sizes)]
    for name in ("cluster", "nearness"):
        root.create_array(
            name, shape=(rows, *sizes), chunks=(max(1, min(rows, (1 << 20) // max(int(np.prod(sizes)), 1))), *sizes),
            dtype="uint8", fill_value=NODATA, compressors=[ZstdCodec(level=3, checksum=True)], dimension_names=dims,
            attributes={"nodata": NODATA},
        )  # fmt: skip
    done = 0
    arrays: list[Any] = [root["cluster"], root["nearness"]]
    for _, *layers in results:
        for array, layer in zip(arrays, layers, strict=True):
            array[done : done + len(layer)] = layer
        done += len(layers[0])
    if isinstance(table, VectorTable):
        for name, values in table.places.items():
            array = root.create_array(
                name, shape=values.shape, chunks=values.shape,
                dtype="str" if values.dtype.kind in "OUT" else values.dtype,
                compressors=[ZstdCodec(level=3, checksum=True)], dimension_names=("sample",),
            )  # fmt: skip
            array[...] = values
