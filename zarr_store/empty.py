"""Empty shards: those that no scene reaches cost no file. One object of a collection lists them all.

A cube spans its whole region, and two fields far apart leave most of it without a scene. Such a shard is complete when
it is listed. It differs from a shard that was never written: reading that one raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from zarr_store.bounded import load_json
from zarr_store.chunk_stats import ChunkStats
from zarr_store.errors import IntegrityError
from zarr_store.regions import Region
from zarr_store.spec import CubeSpec
from zarr_store.store import Store

__all__ = ["EmptyShards", "drop_empty", "empty_key", "fill_empty", "keep_empty", "read_empty"]

_MOST_BYTES = 256 << 20
"""Largest list, bytes; a million shards have about 100 MB."""


@dataclass(frozen=True)
class EmptyShards:
    """The empty shards of a collection.

    Attributes:
        shards: Index → region, and the digest of all that determined that it is empty.
        chunk: Size of a chunk as (time, y, x).
        bands: Number of bands.
        class_layers: Names of the class layers.
    """

    shards: Mapping[tuple[int, int, int], tuple[Region, str]]
    chunk: tuple[int, ...] = ()
    bands: int = 0
    class_layers: tuple[str, ...] = ()

    def stats(self, region: Region) -> tuple[ChunkStats, ...]:
        """Return the counts of the chunks of one shard: nothing was observed."""
        count = int(np.prod([-(-size // step) for size, step in zip(region.shape, self.chunk, strict=True)]))
        zeros = (0.0,) * self.bands
        return (ChunkStats(0, 0, 0, zeros, zeros, {name: {} for name in self.class_layers}),) * count


def read_empty(store: Store, collection: str) -> EmptyShards:
    """Read the empty shards of a collection.

    Raises:
        IntegrityError: The list cannot be read.
    """
    key = empty_key(collection)
    data = store.read(key)
    if data is None:
        return EmptyShards({})
    try:
        document = load_json(data, store.where(key), most=_MOST_BYTES)
        shards = {}
        for index, region, row_key in document["shards"]:
            t, y, x = (int(number) for number in index)
            shards[t, y, x] = (Region.from_list(region), str(row_key))
        chunk, layers = tuple(map(int, document["chunk"])), tuple(map(str, document["class_layers"]))
        if len(chunk) != 3 or min(chunk) < 1:
            raise ValueError(f"the chunk is {chunk}")
        return EmptyShards(shards, chunk, int(document["bands"]), layers)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            f"{store.where(key)} is not a list of empty shards ({type(error).__name__}: {error}); `terrashard repair` "
            "makes it again"
        ) from error


def keep_empty(store: Store, spec: CubeSpec, shards: Iterable[tuple[tuple[int, int, int], Region, str]]) -> None:
    """Write the list of empty shards as (index, region, key); only under the cube's lock. No file where there is none.

    Args:
        store: Store of the cube.
        spec: The collection.
        shards: All its empty shards.
    """
    key = empty_key(spec.collection)
    listed = [[list(index), region.to_list(), row_key] for index, region, row_key in sorted(shards)]
    document: dict[str, Any] = {
        "bands": len(spec.bands),
        "class_layers": list(spec.class_layers),
        "chunk": list(spec.layout.chunk),
        "shards": listed,
    }
    data = json.dumps(document, sort_keys=True).encode()
    there = store.read(key)
    if listed and there != data:
        store.write(key, data)
    elif not listed and there is not None:
        store.delete(key)


def drop_empty(store: Store, collection: str) -> str | None:
    """Remove a list that cannot be read, so that its shards count as never made; return its key, None if it can be."""
    try:
        read_empty(store, collection)
    except IntegrityError:
        store.delete(empty_key(collection))
        return empty_key(collection)
    return None


def fill_empty(handle: ts.TensorStore, fill: float, regions: Iterable[Region]) -> ts.TensorStore:
    """Make empty shards of an array read as its fill value; reading any other absent shard still raises.

    Args:
        handle: The array, (time, y, x) or (time, band, y, x).
        fill: Its fill value.
        regions: The pixels of the empty shards.
    """
    boxes = _joined(regions)
    if not boxes:
        return handle
    blank = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "memory"}},
        create=True,
        open=True,
        dtype=handle.dtype,
        fill_value=np.array(fill, handle.dtype.numpy_dtype),
        shape=handle.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=[min(size, 256) for size in handle.shape]),
    ).result()
    parts = [blank[(t, slice(None), y, x) if handle.rank == 4 else (t, y, x)] for t, y, x in (b.slices for b in boxes)]
    return ts.overlay([handle, *parts])


def _joined(regions: Iterable[Region]) -> list[Region]:
    """Return the regions, with neighbours along x joined, then equal rows along y, so that there are few."""
    rows: list[Region] = []
    for one in sorted(regions, key=lambda r: (r.t0, r.y0, r.x0)):
        last = rows[-1] if rows else None
        if last and (last.t0, last.t1, last.y0, last.y1, last.x1) == (one.t0, one.t1, one.y0, one.y1, one.x0):
            rows[-1] = Region(last.t0, last.t1, last.y0, last.y1, last.x0, one.x1)
        else:
            rows.append(one)
    boxes: list[Region] = []
    for one in sorted(rows, key=lambda r: (r.t0, r.x0, r.x1, r.y0)):
        last = boxes[-1] if boxes else None
        if last and (last.t0, last.t1, last.x0, last.x1, last.y1) == (one.t0, one.t1, one.x0, one.x1, one.y0):
            boxes[-1] = Region(last.t0, last.t1, last.y0, one.y1, last.x0, last.x1)
        else:
            boxes.append(one)
    return boxes


def empty_key(collection: str) -> str:
    """Return the key of the list of empty shards of a collection."""
    return f"_terrashard/empty/{collection}.json"
