"""From windows to batches on the mesh: read ahead in threads, in the order of the run.

Letters: B windows, H = W = patch, C bands. A batch is
    image     B H W C   stored numbers of the cube (uint16 reflectance, float32 backscatter)
    label     B H W     uint8 class index, 255 = not learnt; or float32 value, nan = not learnt
    observed  B H W     uint8, 1 where the network may see the pixel
Of series of T dates image and observed have an axis T after W (B H W T C), and there is
    day       B T       uint16 day of the year, from 1
Casting, normalising and augmenting are done on the device.

Bounds: `threads` batches are decoded at once, and at most `threads + prefetch` are held; tensorstore itself decodes on
its own pool, and keeps decoded chunks in the cube's cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np
import numpy.typing as npt
import tensorstore as ts

from jaxtrain.config import DataConfig
from jaxtrain.data.classes import NOT_LEARNT, Classes
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.shuffle import ChunkOrder
from jaxtrain.data.targets import Target, resolve_target
from jaxtrain.data.windows import Windows
from jaxtrain.parallel.mesh import batch_sharding
from zarr_store.errors import IntegrityError, InvalidInput, UnknownName
from zarr_store.index import TrainingIndex
from zarr_store.read import Cube, await_read
from zarr_store.regions import Region
from zarr_store.spec import STATUS_MASKED, STATUS_OBSERVED, CubeSpec

__all__ = ["BatchStream", "HostBatch", "OnUnreadable", "Reader", "WindowReader", "band_positions", "local_rows",
           "put_batch", "series_dates"]  # fmt: skip

HostBatch = dict[str, np.ndarray]
Rows = npt.NDArray[np.int32]
OnUnreadable = Callable[[npt.NDArray[np.int32], IntegrityError], None]


def band_positions(spec: CubeSpec, bands: Sequence[str]) -> tuple[int, ...]:
    """Positions of the named bands in the main array; all where none is named.

    Raises:
        UnknownName: A band that the collection lacks.
    """
    for band in bands:
        if band not in spec.band_names:
            raise UnknownName.of("band", band, spec.band_names, f"collection {spec.collection} (data.bands)")
    return tuple(spec.band_names.index(band) for band in bands or spec.band_names)


def series_dates(config: DataConfig, spec: CubeSpec) -> int:
    """Dates of a window of a cube.

    Raises:
        InvalidInput: The cube has fewer than are asked for, or only one where there should be several.
    """
    held = len(spec.times)
    if config.dates == 1:
        return 1
    if held < 2 or (config.dates != "all" and config.dates > held):
        raise InvalidInput(
            f"data.dates = {config.dates!r}, but {spec.collection} has {held} dates: ingest more, or ask for fewer"
        )
    return held if config.dates == "all" else config.dates


class Reader(Protocol):
    """What reads rows into batches: windows of a cube, or samples of a store."""

    def read(self, rows: Rows) -> HostBatch:
        """Read rows, int32 (B, 3) of (time, y, x) or (sample, y, x)."""
        ...


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of one collection.

    Attributes:
        cube: The open cube.
        collection: Group that is read.
        bands: Positions in the main array, in the order of the network's channels.
        patch: Side of a window, pixels.
        learn_masked: Whether pixels of status masked are seen and learnt.
        target: What is learnt, or None where only the image is wanted.
        table: uint8 (256,) layer value → class index, of classes.
        index: What is known of the chunks: the status of those that are observed throughout is not read.
        lenient: Chunks that, by the index, were never written read as not observed; else they raise.
        dates: Dates of a window that follow each other; its row has the first.
        on_unreadable: Asked about each window whose chunk is damaged or gone: it raises, or the window counts as not
            observed and not labelled. None raises.
    """

    cube: Cube
    collection: str
    bands: tuple[int, ...]
    patch: int
    learn_masked: bool
    target: Target | None = None
    table: npt.NDArray[np.uint8] | None = None
    index: TrainingIndex | None = None
    lenient: bool = False
    dates: int = 1
    on_unreadable: OnUnreadable | None = None

    @classmethod
    def of(
        cls, cube: Cube, config: DataConfig, classes: Classes, target: Target | None = None,
        index: TrainingIndex | None = None,
    ) -> WindowReader:  # fmt: skip
        """The reader of a training run; without a target, of what `data.label` means. Series may have gaps."""
        spec = cube.spec(config.collection)
        bands = band_positions(spec, config.bands)
        target = target or resolve_target(cube, config)
        dates = series_dates(config, spec)
        table = None if target.values else classes.table()
        learnt = None if target.place == "image" else target
        index = index or cube.index(config.collection)
        return cls(cube, config.collection, bands, config.patch, config.learn_masked, learnt, table, index,
                   lenient=dates > 1, dates=dates)  # fmt: skip

    def read(self, rows: Rows) -> HostBatch:
        """Read windows; those that cannot be read hold nothing to see or to learn, if `on_unreadable` allows it.

        Args:
            rows: int32 (B, 3) of (time, y, x).

        Returns:
            image, observed, of series day, and, with a target, label; without one, `clear`: 1 where the pixel is not
            masked.

        Raises:
            MissingShard: A shard under a window is absent.
            CorruptShard: Its checksum does not match; the message names the box.
        """
        read = self._read if self.dates == 1 else self._read_series
        try:
            return read(rows)
        except IntegrityError:
            if self.on_unreadable is None:
                raise
        parts: list[HostBatch | None] = []
        for row in rows:
            try:
                parts.append(read(row[None]))
            except IntegrityError as error:
                self.on_unreadable(row, error)
                parts.append(None)
        nothing = self._nothing()
        if self.dates > 1:
            nothing["day"] = np.ones((1, self.dates), np.uint16)
        return {name: np.concatenate([(part or nothing)[name] for part in parts]) for name in nothing}

    def _read(self, rows: Rows) -> HostBatch:
        """All reads are under way before the first is waited for, and share chunks."""
        spec = self.cube.spec(self.collection)
        side, count = self.patch, len(rows)
        target = self.target
        # a part that no box covers must read as nothing; otherwise all of the memory is written below
        make = np.zeros if self.lenient else np.empty
        parts: dict[str, np.ndarray] = {"status": make((count, side, side), np.uint8)}
        if target is not None:
            parts[target.name] = make((count, side, side), target.dtype)
        image_BCHW = make((count, len(self.bands), side, side), spec.array(spec.kind).dtype)
        parts[spec.kind] = image_BCHW
        known = self._observed_throughout(rows)
        parts["status"][known] = STATUS_OBSERVED
        self._fetch(rows, parts, known)
        observed = parts["status"] == STATUS_OBSERVED
        if self.learn_masked:
            observed |= parts["status"] == STATUS_MASKED
        # bands come last only as a view: moving them is quicker in JAX, on its way to the device
        result = {"image": np.moveaxis(image_BCHW, 1, -1), "observed": observed.view(np.uint8)}
        if target is None:
            result["clear"] = (parts["status"] == STATUS_OBSERVED).astype(np.uint8)
        else:
            label = target.decode(parts[target.name], self.table)
            if not known.all():
                label[~observed] = target.nothing
            result["label"] = label
        return result

    def _observed_throughout(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Windows (B,) whose chunks are observed in every pixel, which the index says."""
        found = np.zeros(len(rows), bool)
        if self.index is not None:
            ct, cy, cx = self.index.chunk
            whole, last = self.index.whole, self.patch - 1
            for i, (t, y, x) in enumerate(rows.tolist()):
                found[i] = whole[t // ct, y // cy : (y + last) // cy + 1, x // cx : (x + last) // cx + 1].all()
        return found

    def _fetch(self, rows: Rows, parts: Mapping[str, np.ndarray], known: npt.NDArray[np.bool_] | None = None) -> None:
        """Fill arrays (B, …, patch, patch) by name: all reads are under way before the first is waited for.

        The status of windows where it is `known` (B,) is not read.
        """
        pending = []
        with ts.Batch() as batch:
            for name, part in parts.items():
                into = ts.array(part)  # decoded straight into the batch, without a copy between
                for i, row in enumerate(rows):
                    if name == "status" and known is not None and known[i]:
                        continue
                    y, x = int(row[1]), int(row[2])
                    for box in self._boxes(row):
                        place = into[i, ..., box.y0 - y : box.y1 - y, box.x0 - x : box.x1 - x]
                        pending.append((name, box, place.write(self._view(name, box), batch=batch)))
        for name, box, read in pending:
            await_read(read, f"{self.cube.url} {self.collection}/{name} {box}")

    def _read_series(self, rows: Rows) -> HostBatch:
        """Windows of several dates: the dates are read as windows of their own, and moved behind the pixels."""
        count, times, side = len(rows), self.dates, self.patch
        every = np.repeat(rows, times, axis=0)
        every[:, 0] += np.tile(np.arange(times, dtype=np.int32), count)
        flat = replace(self, target=None, dates=1)._read(every)
        image = np.moveaxis(flat["image"], -1, 1).reshape(count, times, -1, side, side).transpose(0, 3, 4, 1, 2)
        observed = flat["observed"].reshape(count, times, side, side)
        result = {"image": image, "observed": observed.transpose(0, 2, 3, 1), "day": self._days(every[:, 0])}
        if self.target is None:
            result["clear"] = flat["clear"].reshape(observed.shape).max(axis=1)
            return result
        target, seen = self.target, observed.any(axis=1)
        if target.place == "label":
            stored = np.zeros((count, side, side), target.dtype)
            replace(self, lenient=False)._fetch(rows, {target.name: stored})
            label = target.decode(stored, self.table)
        else:
            # of a layer with dates, each pixel's last date on which it was observed and labelled
            stored = np.zeros((count * times, side, side), target.dtype)
            self._fetch(every, {target.name: stored})
            dated = target.decode(stored, self.table).reshape(observed.shape)
            label = np.full((count, side, side), target.nothing)
            for t in range(times):
                known = np.isfinite(dated[:, t]) if target.values else dated[:, t] != NOT_LEARNT
                label = np.where(known & (observed[:, t] == 1), dated[:, t], label)
        label[~seen] = target.nothing
        result["label"] = label
        return result

    def _days(self, times: npt.NDArray[np.int32]) -> npt.NDArray[np.uint16]:
        """Day of the year of each date, (B, T)."""
        moments = self.cube.spec(self.collection).time_values.astype("datetime64[D]")
        since: npt.NDArray[np.int64] = (moments - moments.astype("datetime64[Y]")).astype(np.int64)
        found: npt.NDArray[np.uint16] = (since[times] + 1).astype(np.uint16)
        return found.reshape(-1, self.dates)

    def _nothing(self) -> HostBatch:
        """One window without anything to see or to learn, in the form of `read`."""
        side = (1, self.patch, self.patch)
        many = side if self.dates == 1 else (*side, self.dates)
        spec = self.cube.spec(self.collection)
        empty = np.zeros(side, np.uint8)
        image = np.zeros((*many, len(self.bands)), spec.array(spec.kind).dtype)
        last = {"clear": empty} if self.target is None else {"label": np.full(side, self.target.nothing)}
        return {"image": image, "observed": np.zeros(many, np.uint8), **last}

    def _boxes(self, row: npt.NDArray[np.int32]) -> list[Region]:
        """What is read of a window: all of it, or, where chunks are absent and that is allowed, those that are not."""
        t, y, x = (int(v) for v in row)
        whole = Region(t, t + 1, y, y + self.patch, x, x + self.patch)
        if self.index is None or not self.lenient:
            return [whole]
        ct, cy, cx = self.index.chunk
        rows, columns = range(y // cy, -(-whole.y1 // cy)), range(x // cx, -(-whole.x1 // cx))
        present = self.index.present[t // ct]
        if present[rows.start : rows.stop, columns.start : columns.stop].all():
            return [whole]
        chunks = [
            Region(t, t + 1, i * cy, (i + 1) * cy, j * cx, (j + 1) * cx) for i in rows for j in columns if present[i, j]
        ]
        return [box for chunk in chunks if (box := chunk.intersect(whole))]

    def _view(self, name: str, box: Region) -> ts.TensorStore:
        y, x = slice(box.y0, box.y1), slice(box.x0, box.x1)
        if self.target is not None and name == self.target.name:
            handle = self.target.array(self.cube, self.collection)
            return handle[y, x] if handle.rank == 2 else handle[box.t0, y, x]
        handle = self.cube.tensorstore(self.collection, name)
        if handle.rank == 3:
            return handle[box.t0, y, x]
        if self.bands == tuple(range(handle.shape[1])):
            return handle[box.t0, :, y, x]
        return handle[box.t0, :, y, x][list(self.bands)]


def local_rows(sharding: jax.sharding.Sharding, size: int) -> slice:
    """The rows of a batch of `size` that this process must read.

    Raises:
        InvalidInput: They are not one run of rows, as on a mesh whose devices are not in order of processes.
    """
    spans = sorted(
        (index[0].start or 0, size if index[0].stop is None else index[0].stop)
        for index in sharding.addressable_devices_indices_map((size,)).values()
        if index is not None
    )
    low, high = spans[0][0], max(stop for _, stop in spans)
    reach = low
    for start, stop in spans:
        if start > reach:
            raise InvalidInput(
                f"this process's devices hold rows {spans} of a batch, expected one run of rows; order the mesh's data "
                "axis by process"
            )
        reach = max(reach, stop)
    return slice(low, high)


def put_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, size: int) -> dict[str, jax.Array]:
    """Make global arrays on the mesh from the rows that this process has read.

    Args:
        batch: Local rows of each array; of images whole ones, also where the mesh splits images.
        sharding: Splits the leading axis; images (three dimensions or more) are split further as its mesh says.
        size: Rows of the global batch.
    """
    first = local_rows(sharding, size).start
    mesh = sharding.mesh if isinstance(sharding, jax.NamedSharding) else None
    images = batch_sharding(mesh, image=True) if isinstance(mesh, jax.sharding.Mesh) else sharding
    make: Callable[..., jax.Array] = jax.make_array_from_callback

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            cut: np.ndarray = array[(slice(start - first, stop - first), *index[1:])]
            return cut

        return make((size, *array.shape[1:]), images if array.ndim >= 3 else sharding, part, dtype=array.dtype)

    return {name: place(array) for name, array in batch.items()}


class BatchStream:
    """Batches `first` … `last - 1`, read ahead; a context manager that iterates (number, window rows, host batch).

    With an order, batch k holds the samples k·size … (k+1)·size - 1 of the run. Without one it holds the windows of
    those numbers, once, and the last batch is filled up with windows that are neither observed nor labelled.

    Args:
        reader: Reads windows.
        windows: Those to read.
        size: Windows of a batch, over all processes.
        sharding: Says which of them this process reads.
        order: The order of the samples of the run.
        first, last: Numbers of batches.
        threads: Batches that are decoded at once.
        prefetch: Batches that may wait for the device.
        place: Whether batches come as global arrays on the devices (`put_batch`), which the reading threads see to.
    """

    def __init__(
        self,
        reader: Reader,
        windows: Windows,
        *,
        size: int,
        sharding: jax.sharding.Sharding,
        order: SampleOrder | ChunkOrder | None = None,
        first: int = 0,
        last: int | None = None,
        threads: int = 2,
        prefetch: int = 2,
        place: bool = False,
    ) -> None:
        self._reader, self._windows, self._order, self._size = reader, windows, order, size
        self._local = local_rows(sharding, size)
        self._first = first
        self._last = -(-len(windows) // size) if last is None else last
        self._depth = threads + prefetch
        self._sharding, self._place = sharding, place
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch")
        self._stopped = threading.Event()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def rows(self, number: int) -> Rows:
        """Windows of batch `number` over all processes, int32 (size, 3) or fewer at the end of one pass."""
        start = number * self._size
        if self._order is not None:
            return self._windows.rows[self._order.indices(start, self._size)]
        return self._windows.rows[start : start + self._size]

    def __iter__(self) -> Iterator[tuple[int, Rows, Any]]:
        ahead: deque[tuple[int, Rows, Future[Any]]] = deque()
        submitted = self._first
        while ahead or submitted < self._last:
            while submitted < self._last and len(ahead) < self._depth:
                rows = self.rows(submitted)
                ahead.append((submitted, rows, self._pool.submit(self._read, rows)))
                submitted += 1
            number, rows, pending = ahead.popleft()
            yield number, rows, pending.result()

    def _read(self, rows: Rows) -> Mapping[str, Any]:
        if self._stopped.is_set():
            return {}
        missing = self._size - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
        batch = self._reader.read(filled[self._local])
        extra = np.arange(self._size)[self._local] >= len(rows)
        if extra.any():
            batch["observed"][extra] = 0
            if "label" in batch:
                label = batch["label"]
                label[extra] = np.nan if np.issubdtype(label.dtype, np.floating) else NOT_LEARNT
        return put_batch(batch, self._sharding, self._size) if self._place else batch
