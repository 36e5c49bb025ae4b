"""Predict a map of a whole cube in strips, so that memory does not grow with the scene.

The network looks at windows of the size that it was trained on. Windows overlap, and each pixel gets the weighted mean
of the probabilities of all windows over it; a window's weight falls to zero towards its edge along a raised cosine, so
no window edge shows. Where several dates are used, the probabilities of the dates on which a pixel was seen are
averaged: an ensemble over time that also fills clouds. A model that was trained on masked pixels sees those too; they
count only where no date is clear, so that a map shows a cloud only where there was never anything else.

Windows lie on one lattice of the whole grid, so the result does not depend on how it is cut for the work. Work goes
along vertical bands of at most `_BAND` columns, and down each band one row of windows at a time: what is held is one
row of windows × classes in float32, whatever the height, width or number of dates.

Letters: B windows, H = W = patch, K classes.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.numbers import convert_to, cube_numbers, unlike_training
from jaxtrain.data.reader import WindowReader, series_dates
from jaxtrain.data.windows import Windows
from jaxtrain.display import result_table
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.inference.blend import Sink, Strips, window_starts
from jaxtrain.inference.maps import CHUNK, NODATA, Map, MapWriter, create_map, open_map
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import PredictStep, make_predict_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import ModelCard, load_card
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.index import TrainingIndex
from zarr_store.read import open_cube
from zarr_store.spec import CubeSpec

__all__ = ["MapResult", "predict"]

_BAND = 4096
"""Width of a band, pixels: at patch 256 and 10 classes one row of windows is 42 MB; neighbours share an overlap."""

_MASKED_SAY = np.float32(1e-3)
"""Weight of a masked date beside a clear one."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, repr=False)
class MapResult:
    """The map that `predict` has made.

    Attributes:
        map: Path of the map.
        shape: (height, width), pixels.
        dates: Dates that were averaged.
        pixels: Number of pixels of each class, by class name.
        nodata: Number of pixels without a class or value.
        values: Mean, minimum and maximum of a map of values; None for a map of classes.
        windows: Number of windows that were predicted, over all dates.
        seconds: Wall time.
        warnings: What may limit the map: damaged checkpoints, another resolution, absent chunks.

    Example:
        >>> made = predict("runs/zagreb", "zagreb.zarr", "one_day.zarr", time="2023-08-11")
        >>> made.dates
        ('2023-08-11T10:00:00',)
        >>> sum(made.pixels.values()) + made.nodata == made.shape[0] * made.shape[1]
        True
    """

    map: str
    shape: tuple[int, int]
    dates: tuple[str, ...]
    pixels: dict[str, int]
    nodata: int
    values: dict[str, float] | None
    windows: int
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __repr__(self) -> str:
        height, width = self.shape
        kind = f"{len(self.pixels)} classes" if self.values is None else "values"
        return f"<MapResult {self.map}: {kind}, {height}×{width} px, {len(self.dates)} dates>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return result_table(f"Map {self.map}", {
            "shape": "×".join(map(str, self.shape)), "dates": ", ".join(self.dates), **self.pixels,
            **(self.values or {}), "nodata": self.nodata, "warnings": "\n".join(self.warnings),
        })  # fmt: skip


def predict(
    run: str | PathLike[str],
    cube: str | Path,
    out: str | Path,
    *,
    time: str | None = None,
    probabilities: bool = False,
    overlap: int | None = None,
    on_batch: Progress | None = None,
) -> MapResult:
    """Map a whole cube.

    Args:
        run: The run directory; its best checkpoint is used where `run.monitor` names a score, else its newest
            undamaged one.
        cube: A cube with the bands of the model; it need not be the training cube.
        out: Path of the new map (Zarr). An existing map is replaced when the new one is complete.
        time: One date, as in the cube ("2023-08-15" is enough where it is unambiguous); None: the mean over all dates
            on which a pixel was clear; if it never was and the model was trained on masked pixels, over all dates.
        probabilities: Also keep the probability of every class.
        overlap: Pixels that neighbouring windows share, at most half a patch; None: a quarter of it.
        on_batch: Called with (batches done, batches in all).

    Returns:
        Where the map is, its shape in pixels, and how many pixels each class has.

    Raises:
        InvalidInput: The run or the target is something else; the overlap does not fit.
        UnknownName: The cube lacks the collection, a band or the date.
        CorruptShard: A shard is damaged.

    Example:
        >>> made = predict("runs/zagreb", "zagreb.zarr", "zagreb_map.zarr")
        >>> made.shape, list(made.pixels)
        ((192, 160), ['vegetation', 'not vegetated', 'water'])
    """
    began = clock.monotonic()
    run = Path(run)
    card = load_card(run)
    if card.grid is None:
        raise InvalidInput(
            f"{run} was trained on a sample store and predicts for whole images, so it makes no map; "
            "evaluate it on another store with `terrashard evaluate --data STORE`"
        )
    opened = open_cube(cube)
    config = card.config.data
    spec = opened.spec(config.collection)
    patch = config.patch
    overlap = patch // 4 if overlap is None else overlap
    if not 0 <= overlap <= patch // 2:
        raise InvalidInput(f"overlap {overlap} must be between 0 and half a patch ({patch // 2} pixels)")
    series = series_dates(config, spec)
    dates = tuple(range(len(spec.times))) if time is None else (spec.find_time(time),)
    if series > 1:
        if time is not None:
            raise InvalidInput(f"{run} looks at {series} dates at once, so --time does not apply: leave it out")
        dates = tuple(range(0, len(spec.times) - series + 1, series))
    index = opened.index(config.collection)
    bands = spec.find_bands(card.bands)
    conversion, notes = convert_to(card.numbers, cube_numbers(spec, bands), opened.url)
    reader = WindowReader(opened, config.collection, bands, patch, config.learn_masked, index=index, lenient=True,
                          dates=series, conversion=conversion)  # fmt: skip
    program, state, step, passed_over = restore_model(run, card)
    warnings = [*passed_over, *notes, *unlike_training(card.mean, card.std, index, bands, conversion, opened.url)]
    if spec.grid.resolution != card.grid.resolution:
        warnings.append(
            f"pixels of {opened.url} are {spec.grid.resolution}, the model was trained on {card.grid.resolution}"
        )
    absent = int((~index.present).sum())
    if absent:
        warnings.append(f"{absent} of {index.present.size} chunks of {opened.url} were never written: no data there")
    names = tuple(spec.times[t + i] for t in dates for i in range(series))
    attributes = {
        "run": str(run.absolute()),
        "step": step,
        "cube": opened.url,
        "collection": config.collection,
        "dates": names,
        "bands": card.bands,
    }
    scene = _Scene(card, spec, index, reader, program, make_predict_step(program), state, dates, overlap)
    counts = np.zeros(256, np.int64)
    values = card.task.values
    if values and probabilities:
        raise InvalidInput(f"{run} predicts values, which have no probabilities: leave --probabilities out")
    with create_map(
        out, spec.grid, card.answers, attributes=attributes, probabilities=probabilities, values=values
    ) as writer:
        looked_at = scene.fill(writer, counts, on_batch)
    return MapResult(
        map=str(out),
        shape=spec.grid.shape,
        dates=names,
        pixels={name: int(counts[i]) for i, name in enumerate(card.answers.names)},
        nodata=int(counts[NODATA]),
        values=_summarise(open_map(out)) if values else None,
        windows=looked_at,
        seconds=round(clock.monotonic() - began, 3),
        warnings=tuple(warnings),
    )


def _summarise(made: Map) -> dict[str, float]:
    total, count, low, high = 0.0, 0, np.inf, -np.inf
    for row in range(0, made.grid.height, CHUNK):
        values = made.read("value", slice(row, min(row + CHUNK, made.grid.height)))
        values = values[np.isfinite(values)].astype(np.float64)
        if values.size:
            total, count = total + values.sum(), count + values.size
            low, high = min(low, values.min()), max(high, values.max())
    return {"mean": total / count, "minimum": float(low), "maximum": float(high)} if count else {}


@dataclass(frozen=True)
class _Scene:
    """The parts of a prediction that stay the same while the map is filled."""

    card: ModelCard
    spec: CubeSpec
    index: TrainingIndex
    reader: WindowReader
    program: Program
    step: PredictStep
    state: TrainState
    dates: tuple[int, ...]
    overlap: int

    def fill(self, writer: MapWriter, counts: npt.NDArray[np.int64], on_batch: Progress | None) -> int:
        """Fill the map, add the pixels of each class to `counts`, and return the number of windows."""
        height, width = self.spec.grid.shape
        patch = self.reader.patch
        if patch > min(height, width):
            raise InvalidInput(
                f"the cube's grid of {height}×{width} pixels is smaller than the model's patch {patch}; train with a "
                "smaller data.patch"
            )
        bands = [(x0, min(x0 + _BAND, width)) for x0 in range(0, width, _BAND)]
        work = [(band, self._rows(*band)) for band in bands]
        size = self._batch_size()
        total = sum(-(-len(rows) // size) for _, rows in work)
        if not total:
            raise NothingFound(
                f"{self.reader.cube.url} has nothing observed on {len(self.dates)} dates; is the ingest complete?"
            )
        done = 0
        for (x0, x1), rows in work:
            strips = Strips(height, x0, x1, patch, self.overlap, len(self.card.classes))
            sink = Sink(writer, x0, counts, values=self.card.task.values)
            with BatchStream(
                self.reader, Windows(patch, rows), size=size, sharding=batch_sharding(self.program.mesh),
                threads=self.card.config.run.read_threads, prefetch=self.card.config.run.prefetch,
            ) as stream:  # fmt: skip
                for windows, probability_BHWK, seen_BHW in self._look(stream, size):
                    # the last batch is filled up: only the first rows are windows
                    for row, probability_HWK, seen_HW in zip(windows, probability_BHWK, seen_BHW, strict=False):
                        sink.put(strips.advance(int(row[1])))
                        strips.add(int(row[1]), int(row[2]), probability_HWK, seen_HW)
                    done += 1
                    if on_batch:
                        on_batch(done, total)
            sink.put(strips.advance(None))
            sink.flush()
        return sum(len(rows) for _, rows in work)

    def _starts(self, size: int) -> npt.NDArray[np.int64]:
        return window_starts(size, self.reader.patch, self.overlap)

    def _batch_size(self) -> int:
        axis = int(self.program.mesh.shape["data"])
        return -(-self.card.config.run.batch_size // axis) * axis

    def _rows(self, x0: int, x1: int) -> npt.NDArray[np.int32]:
        """Return the windows of one band as (time, y, x), sorted by y, x, date, where a chunk was seen."""
        height, width = self.spec.grid.shape
        patch = self.reader.patch
        ys = self._starts(height)
        xs = self._starts(width)
        xs = xs[(xs < x1) & (xs + patch > x0)]
        y, x, t = np.meshgrid(ys, xs, np.array(self.dates), indexing="ij")
        rows = np.stack([t, y, x], axis=-1).reshape(-1, 3)
        index = self.index
        seen = (index.observed + index.masked > 0) if self.reader.learn_masked else index.observed > 0
        by_date = (seen & index.present)[np.arange(len(self.spec.times)) // index.chunk[0]]
        if self.reader.dates > 1:
            by_date = np.stack([by_date[t : t + self.reader.dates].any(axis=0) for t in range(len(by_date))])
        return rows[self._touches(rows, by_date)].astype(np.int32)

    def _touches(self, rows: npt.NDArray[np.int64], chunks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which windows touch one of `chunks` (times, rows, columns)."""
        _, cy, cx = self.index.chunk
        sums = np.pad(chunks.astype(np.int64).cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
        t, y, x = rows[:, 0], rows[:, 1], rows[:, 2]
        last = self.reader.patch - 1
        y0, y1, x0, x1 = y // cy, (y + last) // cy + 1, x // cx, (x + last) // cx + 1
        found: npt.NDArray[np.bool_] = sums[t, y1, x1] - sums[t, y0, x1] - sums[t, y1, x0] + sums[t, y0, x0] > 0
        return found

    def _look(
        self, stream: BatchStream, size: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Yield (windows, probability_BHWK, seen_BHW) of each batch, one late so that the device always has work."""
        sharding = batch_sharding(self.program.mesh)
        before: tuple[npt.NDArray[np.int32], jax.Array, npt.NDArray[np.float32]] | None = None
        for _, windows, batch in stream:
            there = put_batch({n: batch[n] for n in ("image", "observed", "day") if n in batch}, sharding, size)
            observed = batch["observed"] if self.reader.dates == 1 else batch["observed"].max(axis=1)
            seen = np.where(batch["clear"] == 1, np.float32(1), _MASKED_SAY) * observed
            now = (windows, self.step(self.state, there.pop("image"), **there), seen)
            if before is not None:
                yield before[0], np.asarray(before[1]), before[2]
            before = now
        if before is not None:
            yield before[0], np.asarray(before[1]), before[2]
