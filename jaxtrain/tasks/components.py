"""`find_components` writes the principal components of a cube, sample store or embedding into a folder.

OUT/components.zarr   component (component, y, x) float32 of a cube; (sample, component, …) of samples and vectors
OUT/pca.json          mean, scale, vectors and explained variance
"""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from jaxtrain.tasks.folder import TaskFolder
from jaxtrain.tasks.layers import Layer, create_layers
from jaxtrain.tasks.moments import table_moments
from jaxtrain.tasks.scaling import Scaling, make_scaling
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, Dates, SampleTable, open_table
from jaxtrain.tasks.work import LocalWorkers, TableRef, Workers
from zarr_store.errors import InvalidInput

__all__ = ["ComponentsResult", "find_components"]


@dataclass(frozen=True)
class ComponentsResult:
    """The components that `find_components` has written.

    Attributes:
        out: Folder of the results.
        features: The features.
        mean: Mean of each feature.
        scale: Divisor of each feature; 1 unless standardised.
        vectors: (component, feature) unit vectors of the scaled features.
        variance: Variance along each component.
        ratio: Share of the variance of all features.
        pixels: Rows.
        seconds: Wall time.
        warnings: Warnings about limits of the result.
    """

    out: str
    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    vectors: tuple[tuple[float, ...], ...]
    variance: tuple[float, ...]
    ratio: tuple[float, ...]
    pixels: int
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _ProjectJob:
    ref: TableRef
    scaling: Scaling

    def __call__(self, number: int) -> npt.NDArray[np.float32]:
        block = self.ref.block(number)
        scores = np.full((len(self.scaling.matrix), *block.shape), np.nan, np.float32)
        scores.reshape(len(scores), -1)[:, block.at] = self.scaling.apply(block.values)
        return scores


def find_components(
    data: str | PathLike[str],
    out: str | PathLike[str],
    count: int = 3,
    *,
    collection: str | None = None,
    bands: str | tuple[str, ...] = (),
    time: str | None = None,
    dates: Dates = "mean",
    standardise: bool = False,
    workers: Workers | None = None,
    leads: bool = True,
    finish: Callable[[Path, ComponentsResult], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ComponentsResult:
    """Compute principal components in two passes: one for the covariance, one to project every row.

    Args:
        data: A cube, a sample store, or vectors.
        out: Folder of the results; it appears when they are complete.
        count: Number of components.
        collection: Collection of a cube; None for its first.
        bands: Bands and stored indices; none for all bands.
        time: Dates of a cube; None for all.
        dates: Rule by which dates become features; see `open_table`.
        standardise: Divide each feature by its standard deviation first.
        workers: Workers that compute; None takes this process.
        leads: Whether this process writes the results.
        finish: Adds files to the folder before it appears.
        on_progress: Called with (step, done, in all).

    Raises:
        InvalidInput: More components than features, or something else is at `out`.
        NothingFound: Nothing was observed.
    """
    began, workers = clock.monotonic(), workers or LocalWorkers()
    table = open_table(str(data), collection=collection, bands=bands, time=time, dates=dates)
    if not 1 <= count <= len(table.features):
        raise InvalidInput(f"-n {count}: {table.url} has {len(table.features)} features; give 1 to that number")
    report = on_progress or (lambda step, done, total: None)
    moments = table_moments(table, workers, on_block=lambda done, total: report("read", done, total))
    scaling, found = make_scaling(moments, standardise=standardise, components=count)
    assert found is not None
    scale = moments.std if standardise else np.ones(len(moments.mean))
    result = ComponentsResult(
        out=str(out), features=tuple(one.label for one in table.features), mean=_tuple(moments.mean),
        scale=_tuple(scale), vectors=tuple(_tuple(row) for row in found.vectors), variance=_tuple(found.variance),
        ratio=_tuple(found.ratio), pixels=moments.count, seconds=0.0, warnings=table.warnings,
    )  # fmt: skip
    blocks = workers.map(_ProjectJob(TableRef.of(table), scaling), range(len(table)))
    if not leads:
        for _ in blocks:
            pass
        return result
    with TaskFolder(str(out), "pca", {"data": table.digest, "count": count, "standardise": standardise}) as folder:
        folder.clear()
        write = _writer(folder.path / "components.zarr", table, count)
        for number, scores in enumerate(blocks):
            write(number, scores)
            report("project", number + 1, len(table))
        result = replace(result, seconds=round(clock.monotonic() - began, 3))
        text = json.dumps(result.to_dict(), indent=1) + "\n"
        (folder.path / "pca.json").write_text(text, encoding="utf-8")
        if finish:
            finish(folder.path, result)
        folder.publish({"components": count, "data": table.url})
    return result


def _writer(path: Path, table: Table, count: int) -> Callable[[int, npt.NDArray[np.float32]], None]:
    about = {"terrashard_components": {"data": table.url, "components": count}}
    if isinstance(table, CubeTable):
        layer = Layer("float32", np.nan, ("component", count), {"long_name": "principal component"})
        group = create_layers(path, table.reader.spec.grid, {"component": layer}, attributes=about)
        cube_layer: Any = group["component"]
        boxes = table.reader.boxes

        def write_box(number: int, scores: npt.NDArray[np.float32]) -> None:
            box = boxes[number]
            cube_layer[:, box.y0 : box.y1, box.x0 : box.x1] = scores

        return write_box
    sizes = table.store.spec.size if isinstance(table, SampleTable) else ()
    rows = table.store.spec.count if isinstance(table, SampleTable) else len(table.vectors)  # type: ignore[attr-defined]
    root = zarr.create_group(str(path), attributes=about)
    array: Any = root.create_array(
        "component", shape=(rows, count, *sizes), chunks=(min(rows, 65_536 if not sizes else 16), count, *sizes),
        dtype="float32", fill_value=np.nan, compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=("sample", "component", "y", "x")[: 2 + len(sizes)],
    )  # fmt: skip
    done = [0]

    def write_rows(_number: int, scores: npt.NDArray[np.float32]) -> None:
        array[done[0] : done[0] + scores.shape[1]] = np.moveaxis(scores, 0, 1)
        done[0] += scores.shape[1]

    return write_rows


def _tuple(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
