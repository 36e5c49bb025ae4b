"""Write the pixels of a cube in whole shards, from any process.

`ShardWriter` fills exactly one shard of every array of a collection and then writes the ledger row, so two writers
never touch one file (chunk-wise writes into shards lose pixels without an error, dask#12583).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zarr_store.backends import open_store
from zarr_store.chunk_stats import ChunkStats
from zarr_store.crash import crashpoint
from zarr_store.errors import Locked, MisalignedWrite
from zarr_store.ledger import Ledger, LedgerRow, ShardIndex, SourceOutcome
from zarr_store.lock import read_token
from zarr_store.pack import pack_chunk, pack_shard
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import (
    OVERVIEW_FACTOR,
    STATUS_MASKED,
    STATUS_NODATA,
    STATUS_OBSERVED,
    CubeSpec,
    overview_positions,
)
from zarr_store.store import Pending, translate_os_errors

__all__ = ["PackedShard", "ShardWriter", "not_finite", "shard_key"]


class ShardWriter:
    """Writer of whole shards of one collection. It pickles as its arguments, and opens the arrays in its new process.

    Args:
        url: The cube.
        collection: Group of the cube.
        fence: Token of the lock under which is written; a writer whose run has lost the lock writes nothing more.
            None asks for no lock.
        spec: The collection, where the caller knows it: then the metadata of the cube, which list all scenes, are not
            read for each shard. None reads them.

    Example:
        A shard that is read and written again under the key that it has:

        >>> from zarr_store import open_cube
        >>> cube = open_cube("cube.zarr")
        >>> spec = cube.spec("sentinel-2-l2a")
        >>> row = next(iter(cube.ledger(spec.collection).rows().values()))
        >>> arrays = {array.name: cube.read(spec.collection, array.name, row.region) for array in spec.arrays()}
        >>> ShardWriter("cube.zarr", spec.collection).write(row.region, arrays, key=row.key, sources=row.sources).state
        'done'
    """

    def __init__(
        self, url: str | Path, collection: str, *, fence: str | None = None, spec: CubeSpec | None = None
    ) -> None:
        self.url = str(url)
        self.collection = collection
        self.fence = fence
        self._given = spec
        self._cube: Cube | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cube": None}

    def write(
        self,
        region: Region,
        arrays: Mapping[str, np.ndarray],
        *,
        key: str,
        sources: Sequence[SourceOutcome],
    ) -> LedgerRow:
        """Write one shard of every array, durably, and then its ledger row: `pack` and `PackedShard.finish`."""
        return self.pack(region, arrays, key=key, sources=sources).finish()

    def pack(
        self,
        region: Region,
        arrays: Mapping[str, np.ndarray],
        *,
        key: str,
        sources: Sequence[SourceOutcome],
    ) -> PackedShard:
        """Pack one shard of every array: the part of a write that needs a processor; readers see nothing of it yet.

        Args:
            region: Exactly one shard (cut at the grid's edge).
            arrays: Every array of the collection, in the spec's dtype: the main one (time, band, y, x), the others
                (time, y, x). They are no longer needed once this returns. A pixel of which a number is not finite gets
                the status of no data.
            key: Digest of all that determined the content.
            sources: Outcome of each scene.

        Raises:
            MisalignedWrite: The region is not one shard, or an array is absent, superfluous or misshapen.
            NoSpace: The disk is full; what was there before stays.
        """
        spec = self._spec()
        index = self._check(spec, region, arrays)
        store = open_store(self.url)
        arrays = _finite(spec, arrays)
        stats: list[ChunkStats] = []
        pending: dict[str, Pending] = {}
        try:
            with translate_os_errors(f"{self.url} {self.collection} shard {index}"):
                for array in spec.arrays():
                    parts = pack_shard(
                        arrays[array.name],
                        spec.box(array.name, spec.layout.chunk),
                        spec.box(array.name, spec.layout.shard),
                        spec.layout,
                        array.fill,
                        look=self._counter(spec, region, arrays, stats) if array.name == spec.kind else None,
                    )
                    pending[array.name] = store.begin(shard_key(spec, array.name, index), parts)
                overview = self._overview(spec, arrays[spec.kind])
                pending["overview"] = store.begin(f"overview/{shard_key(spec, spec.kind, index)}", [overview])
        except BaseException:
            for one in pending.values():
                one.abandon()
            raise
        state: Any = "partial" if any(s.state == "missing" for s in sources) else "done"
        checksums = {array.name: pending[array.name].digest for array in spec.arrays()}
        row = LedgerRow(index, region, key, state, tuple(sources), checksums, tuple(stats))
        return PackedShard(self, row, tuple(pending.values()))

    def fail(self, region: Region, *, key: str, sources: Sequence[SourceOutcome]) -> LedgerRow:
        """Record that a shard could not be made; its pixels stay absent, and reading them raises."""
        row = LedgerRow(self._index(self._spec(), region), region, key, "failed", tuple(sources))
        self.ledger().put(row)
        return row

    def _counter(
        self, spec: CubeSpec, region: Region, arrays: Mapping[str, np.ndarray], stats: list[ChunkStats]
    ) -> Callable[[np.ndarray], None]:
        """Return a function that counts each chunk of the main array for the training index while it is packed."""
        boxes = iter(spec.chunks(region).values())

        def count(main: np.ndarray) -> None:
            t, y, x = next(boxes).within(region)
            layers = {name: arrays[name][t, y, x] for name in spec.class_layers}
            stats.append(ChunkStats.of(main, arrays["status"][t, y, x], layers))

        return count

    def check_fence(self) -> None:
        """Refuse to continue if the run has lost its lock.

        Raises:
            Locked: Another run has it.
        """
        if self.fence is not None and read_token(open_store(self.url)) != self.fence:
            raise Locked(
                f"{self.url}: the run that this shard was made for has ended or lost its lock; nothing more is written "
                "for it, the run that holds the cube now makes the shard"
            )

    def ledger(self) -> Ledger:
        """Return the ledger of the collection."""
        if self._given is not None:
            return Ledger(open_store(self.url), self.collection)
        return self._open().ledger(self.collection)

    def _spec(self) -> CubeSpec:
        return self._given or self._open().spec(self.collection)

    def _open(self) -> Cube:
        if self._cube is None:
            self._cube = open_cube(self.url)
        return self._cube

    def _index(self, spec: CubeSpec, region: Region) -> ShardIndex:
        t, y, x = spec.layout.shard
        index = (region.t0 // t, region.y0 // y, region.x0 // x)
        if spec.shard_at(index) != region:
            raise MisalignedWrite(
                f"{self.collection}: a write must be exactly one shard, e.g. {spec.shard_at(index)}, got {region}; "
                f"cut tasks along shards of {spec.layout.shard} (time, y, x)"
            )
        return index

    def _check(self, spec: CubeSpec, region: Region, arrays: Mapping[str, np.ndarray]) -> ShardIndex:
        index = self._index(spec, region)
        expected = {a.name: a for a in spec.arrays()}
        if set(arrays) != set(expected):
            raise MisalignedWrite(
                f"{self.collection}: a shard needs the arrays {sorted(expected)}, got {sorted(arrays)}"
            )
        times, height, width = region.shape
        for name, array in expected.items():
            shape = (times, len(spec.bands), height, width) if "band" in array.dims else region.shape
            if arrays[name].shape != shape or arrays[name].dtype != array.dtype:
                raise MisalignedWrite(
                    f"{self.collection}/{name}: expected {array.dtype} {shape} for {region}, "
                    f"got {arrays[name].dtype} {arrays[name].shape}"
                )
        return index

    def _overview(self, spec: CubeSpec, main: np.ndarray) -> bytes:
        """Return the overview of a shard: every 8th pixel each way, as one chunk."""
        step = OVERVIEW_FACTOR
        if any(size % step for size in main.shape[2:]):
            rows, cols = (overview_positions(size) for size in main.shape[2:])
            thinned = main[:, :, rows[:, np.newaxis], cols]
        else:  # the same pixels by strides, which takes a fifth of the time
            thinned = main[:, :, step // 2 :: step, step // 2 :: step]
        t, y, x = spec.layout.shard
        array = spec.array(spec.kind)
        chunk = spec.box(array.name, (t, y // step, x // step))
        return pack_chunk(thinned, chunk, array.fill)


def _finite(spec: CubeSpec, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return the arrays of a shard with the status of no data wherever a number is not finite."""
    main, status = arrays[spec.kind], arrays["status"]
    if main.dtype.kind != "f":
        return arrays
    lost = not_finite(main, status)
    if not lost.any():
        return arrays
    return {**arrays, "status": np.where(lost, np.uint8(STATUS_NODATA), status)}


def not_finite(main: np.ndarray, status: np.ndarray) -> np.ndarray:
    """Return which pixels (time, y, x) are marked as observed or masked though a number of theirs is not finite."""
    lost: np.ndarray = ~np.isfinite(main).all(axis=1) & np.isin(status, (STATUS_OBSERVED, STATUS_MASKED))
    return lost


@dataclass(frozen=True)
class PackedShard:
    """A packed shard that is not yet stored; storing it is mostly waiting for a disk or a bucket.

    Attributes:
        writer: The writer that packed it.
        row: Its row for the ledger; the state is "partial" if a source is missing.
        pending: The objects of all arrays, and of the overview.
    """

    writer: ShardWriter
    row: LedgerRow
    pending: tuple[Pending, ...]

    def finish(self) -> LedgerRow:
        """Write the objects, durably, and then the ledger row, which is returned.

        Raises:
            NoSpace: The disk is full; the shard counts as not written.
            Locked: The run that the writer belongs to has lost its lock.
        """
        index, ledger = self.row.index, self.writer.ledger()
        try:
            self.writer.check_fence()
            ledger.drop(index)  # until the new row is there the shard counts as not written
            crashpoint(f"row dropped {index}")
            with translate_os_errors(f"{self.writer.url} {self.writer.collection} shard {index}"):
                for one in self.pending:
                    one.finish()
            crashpoint(f"pixels written {index}")
            # another run may have begun to write here meanwhile: then the row is not ours to write
            self.writer.check_fence()
        except BaseException:
            for one in self.pending:
                one.abandon()
            raise
        ledger.put(self.row)
        return self.row


def shard_key(spec: CubeSpec, array: str, index: ShardIndex) -> str:
    """Return the key of the stored object of one shard of one array."""
    t, y, x = index
    parts = (t, 0, y, x) if "band" in spec.array(array).dims else (t, y, x)
    return f"{spec.collection}/{array}/c/{'/'.join(str(p) for p in parts)}"
