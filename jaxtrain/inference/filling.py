"""`Scene` predicts the shards of a map, so that memory does not grow with the scene.

The network looks at windows. In a blend they have the size of training and overlap, and each pixel gets the weighted
mean of the probabilities of all windows over it; a window's weight falls to zero towards its edge along a raised
cosine, so no window edge shows. An exact map takes the middle of each window only, which has as much around it as the
network looks at: that is what one pass over the whole scene would give.

Where several dates are joined by their mean, the probabilities of the dates on which a pixel was seen are averaged: an
ensemble over time that also fills clouds. A model that was trained on masked pixels sees those too; they count only
where no date is clear, so that a map shows a cloud only where there was never anything else.

What is held is one shard of the map, one row of windows × classes and some batches, whatever the height, width or
number of dates.

Letters: B windows, H, W pixels of a window, K classes.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.modality_reader import ModalityReader, enlarge
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.windows import Windows
from jaxtrain.inference.blend import Box, BoxBlock, Cores, Strips, Votes
from jaxtrain.inference.lattice import Lattice
from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.making import Making
from jaxtrain.inference.maps import CHUNK
from jaxtrain.inference.options import MapOptions
from jaxtrain.inference.seen import windows_seen
from jaxtrain.inference.window_order import WindowOrder
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import PredictStep
from jaxtrain.parallel.heap import FreedMemory
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import ModelCard
from zarr_store.index import TrainingIndex
from zarr_store.ledger import ShardIndex
from zarr_store.regions import Region
from zarr_store.spec import CubeSpec

__all__ = ["Filled", "Progress", "Scene"]

Progress = Callable[[int, int], None]
Answers = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""A window of one date: its row (time, y, x), probabilities (H, W, K), how well each pixel was seen (H, W)."""

_MASKED_SAY = np.float32(1e-3)
"""Weight of a masked date, where a clear one has weight 1."""


@dataclass(frozen=True)
class Filled:
    """The work that a process has done for a map.

    Attributes:
        windows: Number of windows that were predicted, over all dates.
        forward_s: Seconds in which the devices ran the network.
        seconds: Seconds in all.
        shards: Number of shards.
        pixels: Pixels of these shards, over all dates.
    """

    windows: int = 0
    forward_s: float = 0.0
    seconds: float = 0.0
    shards: int = 0
    pixels: int = 0


@dataclass(frozen=True)
class Scene:
    """The parts of a prediction that stay the same while the map is filled."""

    card: ModelCard
    spec: CubeSpec
    index: TrainingIndex
    reader: WindowReader | ModalityReader
    program: Program
    step: PredictStep
    state: TrainState
    options: MapOptions
    kind: MapLayers
    lattice: Lattice
    groups: tuple[tuple[int, ...], ...]
    """Dates of each map: one group of all, or a group for each date."""

    @property
    def dated(self) -> bool:
        """Whether the map has an axis `time`."""
        return self.options.dates == "each"

    def fill(
        self, making: Making, shards: Mapping[ShardIndex, tuple[Region, str]], on_batch: Progress | None = None
    ) -> Filled:
        """Fill shards, each with its region and key, and write their rows."""
        began = clock.monotonic()
        order, boxes = self._order(shards)
        numbers = order.batches(shards)
        done, busy, freed = 0, 0.0, FreedMemory()
        writer = making.writer()
        run = self.card.config.run
        with (
            BatchStream(
                self.reader, Windows(self.reader.patch, order.rows_of(numbers)), size=order.size,
                sharding=batch_sharding(self.program.mesh), threads=run.read_threads, prefetch=run.prefetch,
            ) as stream,
            ThreadPoolExecutor(1, thread_name_prefix="map") as later,
        ):  # fmt: skip
            batches = self._look(stream)
            written: Future[None] | None = None

            def answers() -> Iterable[Answers]:
                nonlocal done, busy
                rows, probability_BHWK, seen_BHW, seconds = next(batches)
                done, busy = done + 1, busy + seconds
                freed.after_step()
                if on_batch:
                    on_batch(done, len(numbers))
                return zip(rows, probability_BHWK, seen_BHW, strict=True)

            windows_of = order.dealt(shards, numbers, answers)
            for index, (region, key) in shards.items():
                layers, *counted = self._shard(region, zip(windows_of(index), boxes[index], strict=True))
                if written is not None:
                    written.result()

                def write(
                    index: ShardIndex = index, region: Region = region, key: str = key, layers: Any = layers,
                    counted: Any = counted,
                ) -> None:  # fmt: skip
                    making.begin(index, region)
                    writer.put(region.y0, region.x0, layers, time=region.t0 if self.dated else None)
                    making.complete(index, region, key, *counted)
                    freed.release()

                written = later.submit(write)  # the devices go on with the next shard meanwhile
            if written is not None:
                written.result()
        pixels = sum(int(np.prod(region.shape)) for region, _ in shards.values())
        return Filled(order.count(shards), busy, clock.monotonic() - began, len(shards), pixels)

    def _shard(
        self, region: Region, windows: Iterable[tuple[Answers, Box]]
    ) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.int64], int, npt.NDArray[np.int64]]:
        """Return the layers of a shard, its pixels of each class, those with data, and those by modalities."""
        shape = region.shape[1:]
        layers = {
            name: np.full((self.kind.classes, *shape) if name == "probability" else shape,
                          self.kind.nodata(name), self.kind.dtype(name))
            for name in self.kind.names
        }  # fmt: skip
        inside = self._inside(region)
        seen, counts = 0, np.zeros(max(self.kind.classes, 1), np.int64)
        used = np.zeros(1 << len(self.kind.modalities), np.int64)
        for y, x, mean, strength in self._blocks(region, windows):
            known = strength > 0
            top, left = y - region.y0, x - region.x0
            at = (slice(top, top + known.shape[0]), slice(left, left + known.shape[1]))
            if inside is not None:
                known &= inside[at]
            made = self.kind.of(mean, known)
            for name, pixels in made.items():
                layers[name][(..., *at)] = pixels
            seen += int(known.sum())
            if not self.kind.values:
                counts += np.bincount(made["class"][known], minlength=len(counts))
            if self.kind.modalities:
                used += np.bincount(made["modalities"][known], minlength=len(used))
        return layers, counts, seen, used

    def _blocks(self, region: Region, windows: Iterable[tuple[Answers, Box]]) -> Iterator[BoxBlock]:
        """Yield finished blocks inside a region."""
        if self.options.dates != "majority":
            yield from self._joined(region, windows)
            return
        votes = Votes((region.y0, region.y1, region.x0, region.x1), self.kind.classes, len(self.kind.modalities))
        for _, of_date in groupby(windows, key=lambda window: int(window[0][0][0])):
            for block in self._joined(region, of_date):
                votes.add(*block)
        yield from votes.blocks(CHUNK)

    def _joined(self, region: Region, windows: Iterable[tuple[Answers, Box]]) -> Iterator[BoxBlock]:
        """Yield finished blocks inside a region: the mean over the dates of the windows."""
        if self.lattice.core:
            cores = Cores(self.kind.channels)
            for (row, probability_HWK, seen_HW), box in windows:
                yield from cores.add(box, int(row[1]), int(row[2]), probability_HWK, seen_HW)
            yield from cores.finish()
            return
        strips: Strips | None = None
        for (row, probability_HWK, seen_HW), _ in windows:
            y = int(row[1])
            if strips is None:
                patch, overlap = self.lattice.window[0], self.lattice.overlap
                strips = Strips(region.y1, region.x0, region.x1, patch, overlap, self.kind.channels, first=y)
            yield from _cut(strips.advance(y), region)
            strips.add(y, int(row[2]), probability_HWK, seen_HW)
        if strips is not None:
            yield from _cut(strips.advance(None), region)

    def _inside(self, region: Region) -> npt.NDArray[np.bool_] | None:
        area = self.options.area
        return None if area is None else area.mask(region.y0, region.y1, region.x0, region.x1)

    def _order(self, shards: Iterable[ShardIndex]) -> tuple[WindowOrder, dict[ShardIndex, list[Box]]]:
        """Return the order of all windows of the maps of dates that some shards are of, and the boxes of their windows.

        Each window of a shard is needed for its box.
        """
        wanted = set(shards)
        maps = {index[0] for index in wanted}
        windows, boxes = {}, {}
        for index, region in self.lattice.shards(len(self.groups)).items():
            if index[0] in maps:
                windows[index], needed = self._rows(index, region)
                if index in wanted:
                    boxes[index] = needed
        most = max((len(self.groups[number]) for number in maps), default=0)
        shared = self.lattice.shares_edges(self.kind.channels, most)
        return WindowOrder.of(windows, self.lattice.batch, shared=shared), boxes

    def _rows(self, index: ShardIndex, region: Region) -> tuple[npt.NDArray[np.int32], list[Box]]:
        """Return the windows of one shard as (time, y, x), where a chunk was seen, each with the box it is needed for.

        They are sorted by place and then date; by date first where dates vote.
        """
        places = self.lattice.windows(region, self._inside(region))
        dates = self.groups[index[0]]
        every = [(t, place) for place in range(len(places)) for t in dates]
        if self.options.dates == "majority":
            every.sort()
        if not every:
            return np.zeros((0, 3), np.int32), []
        rows = np.array([(t, *places[place][:2]) for t, place in every], np.int64)
        kept = windows_seen(self.reader, self.index, rows, self.lattice.window)
        boxes = [places[place][2] for (_, place), keep in zip(every, kept, strict=True) if keep]
        return rows[kept].astype(np.int32), boxes

    def _look(
        self, stream: BatchStream
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], float]]:
        """Yield (windows, probability_BHWK, seen_BHW, seconds of the devices) of each batch.

        A batch comes one late, so that the devices always have work.
        """

        def look(inputs: dict[str, Any]) -> tuple[npt.NDArray[np.float32], float]:
            began = clock.monotonic()
            answer = _by_class(self.step.of_batch(self.state, inputs)).block_until_ready()
            seconds = clock.monotonic() - began
            return np.moveaxis(np.asarray(answer), 1, -1), seconds

        # in a thread of its own: on a processor the call itself computes, and this thread has windows to join
        with ThreadPoolExecutor(1, thread_name_prefix="look") as pool:
            before: tuple[npt.NDArray[np.int32], Future[Any], npt.NDArray[np.float32], Any] | None = None
            for _, windows, batch in stream:
                inputs, seen = self._inputs(batch)
                present = self._present(batch)
                asked = pool.submit(look, inputs)
                if before is not None:
                    answer, seconds = before[1].result()
                    yield before[0], _joined(answer, before[3]), before[2], seconds
                before = (windows, asked, seen, present)
            if before is not None:
                answer, seconds = before[1].result()
                yield before[0], _joined(answer, before[3]), before[2], seconds

    def _inputs(self, batch: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
        """Return what the network takes of a batch, on its devices, and how well each pixel was seen (B, H, W)."""
        height, width = self.lattice.window
        if isinstance(self.reader, ModalityReader):
            cut = dict(batch)
            observed = cut["seen"]
        else:
            cut = {name: a[..., :height, :width] if a.ndim > 2 else a for name, a in batch.items()}
            observed = cut["observed"] if self.reader.dates == 1 else cut["observed"].max(axis=1)
        inputs = {name: a for name, a in cut.items() if name.startswith(("image", "observed", "day"))}
        there = put_batch(inputs, batch_sharding(self.program.mesh), self.lattice.batch)
        return there, np.where(cut["clear"] == 1, np.float32(1), _MASKED_SAY) * observed

    def _present(self, batch: Mapping[str, np.ndarray]) -> npt.NDArray[np.float32] | None:
        """Return which modalities the network got of each pixel, (B, H, W, modalities); None of other networks."""
        if not self.kind.modalities:
            return None
        found = []
        for one in self.card.modalities:
            observed = batch[f"observed_{one.name}"]
            found.append(enlarge(observed.max(axis=1) if one.dates else observed, one.ratio))
        return np.stack(found, axis=-1).astype(np.float32)


@jax.jit
def _by_class(answer_BHWK: jax.Array) -> jax.Array:
    """Return answers (B, K, H, W), as they are joined."""
    return jnp.moveaxis(answer_BHWK, -1, 1)


def _joined(probability: npt.NDArray[np.float32], present: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """Return probabilities and, of several modalities, which were there, as further channels."""
    return probability if present is None else np.concatenate([probability, present], axis=-1)


def _cut(blocks: Iterable[tuple[int, Any, Any]], region: Region) -> Iterator[BoxBlock]:
    """Keep the rows of blocks that lie in a region."""
    for y, mean, seen in blocks:
        low, high = max(y, region.y0), min(y + len(mean), region.y1)
        if low < high:
            yield low, region.x0, mean[low - y : high - y], seen[low - y : high - y]
