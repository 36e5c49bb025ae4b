"""`Ledger` has one row for each shard; the rows alone decide which shards of a cube are complete.

A row is written after its shard is on disk, as a small JSON file of its own, so that no two writers meet (the commit
of an Icechunk repository makes it one element of an array). It holds the scenes of the shard, those that could not be
read with the reason, the hashes of the stored bytes, and the chunk counts.
Rows carry no clock time: a run that is killed and repeated leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from zarr_store.bounded import load_json
from zarr_store.chunk_stats import ChunkStats
from zarr_store.empty import drop_empty, empty_key, read_empty
from zarr_store.errors import IntegrityError
from zarr_store.regions import Region
from zarr_store.store import Store

__all__ = ["Ledger", "LedgerRow", "ShardIndex", "SourceOutcome"]

_MOST_BYTES = 16 << 20
"""Largest row, bytes; a row of 64 chunks of 13 bands has about 100 kB."""

_AT_ONCE = 512
"""Number of rows that are read together."""

ShardIndex = tuple[int, int, int]
State = Literal["done", "partial", "failed"]


@dataclass(frozen=True)
class SourceOutcome:
    """The outcome of one scene in one shard.

    Attributes:
        item: Row of the collection's item table.
        item_id: Its id, as data.
        state: "read", or "missing" when one of its assets was absent or unreadable.
        asset: The asset that failed.
        reason: The cause, without secrets.
        versions: (asset, version of its file when it was read: size, and ETag or date).
        final: Whether the asset is of a form that is never read, so that to try again changes nothing.

    Example:
        >>> SourceOutcome(3, "S2A_33TWM_20230815_0_L2A", "missing", asset="B04", reason="HTTP 404").state
        'missing'
    """

    item: int
    item_id: str
    state: Literal["read", "missing"]
    asset: str | None = None
    reason: str | None = None
    versions: tuple[tuple[str, str], ...] = ()
    final: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the outcome from its JSON form, which `asdict` returns; also read rows without versions."""
        return cls(**{**data, "versions": tuple((asset, version) for asset, version in data.get("versions", ()))})


@dataclass(frozen=True)
class LedgerRow:
    """One shard: done = every source was read; partial = written, some source missing; failed = nothing written.

    Attributes:
        index: Shard index (t, y, x).
        region: The pixels it holds.
        key: Digest of all that determined the shard's content; another key means it must be made again.
        checksums: Array → SHA-256 of the stored shard object.
        stats: One per chunk, in the order of `CubeSpec.chunks(region)`.

    Example:
        >>> from zarr_store import open_cube
        >>> row = open_cube("cube.zarr").ledger("sentinel-2-l2a").get((0, 0, 0))
        >>> row.state, [source.state for source in row.sources]
        ('done', ['read'])
    """

    index: ShardIndex
    region: Region
    key: str
    state: State
    sources: tuple[SourceOutcome, ...] = ()
    checksums: dict[str, str] | None = None
    stats: tuple[ChunkStats, ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "index": self.index,
                "region": self.region.to_list(),
                "key": self.key,
                "state": self.state,
                "sources": [asdict(source) for source in self.sources],
                "checksums": self.checksums or {},
                "stats": [stats.to_list() for stats in self.stats],
            },
            sort_keys=True,
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        row = load_json(data, "a row", most=_MOST_BYTES)
        t, y, x = row["index"]
        if not all(type(number) is int and number >= 0 for number in (t, y, x)):
            raise ValueError(f"the index of a shard is three whole numbers, got {row['index']!r}")
        if not isinstance(row["key"], str) or row["state"] not in get_args(State):
            raise ValueError(f"a row has a key and a state ({', '.join(get_args(State))}), got {row['state']!r}")
        return cls(
            (t, y, x),
            Region.from_list(row["region"]),
            row["key"],
            row["state"],
            tuple(SourceOutcome.from_dict(source) for source in row["sources"]),
            row["checksums"],
            tuple(ChunkStats.from_list(stats) for stats in row["stats"]),
        )


class Ledger:
    """The rows of one collection of the cube in `store`: the state of each shard and the scenes it was made of.

    Example:
        >>> from zarr_store import open_cube
        >>> sorted(open_cube("cube.zarr").ledger("sentinel-2-l2a").rows())
        [(0, 0, 0), (1, 0, 0)]
    """

    def __init__(self, store: Store, collection: str) -> None:
        self._store = store
        self._collection = collection
        self._folder = f"_terrashard/ledger/{collection}"

    def _key(self, index: ShardIndex) -> str:
        return f"{self._folder}/{'-'.join(str(i) for i in index)}.json"

    @property
    def places(self) -> tuple[str, str]:
        """The folder of the rows, and the list of empty shards: what changes with the state of any shard."""
        return self._folder, empty_key(self._collection)

    def get(self, index: ShardIndex) -> LedgerRow | None:
        """Return the row of one shard, or None if none was written."""
        return self.get_stored(index) or self._empty().get(index)

    def get_stored(self, index: ShardIndex) -> LedgerRow | None:
        """Return the row of one shard that has objects or failed, or None; the list of empty shards is not read."""
        data = self._store.read(self._key(index))
        return None if data is None else self._parse(self._key(index), data)

    def put(self, row: LedgerRow) -> None:
        """Write or replace a row, durably."""
        self._store.write(self._key(row.index), row.to_json())

    def drop(self, index: ShardIndex) -> None:
        """Remove the row of a shard, which then counts as never written."""
        self._store.delete(self._key(index))

    def rows(self) -> dict[ShardIndex, LedgerRow]:
        """Return all rows by shard index, in order; empty shards are among them.

        Raises:
            IntegrityError: A row cannot be read.
        """
        return dict(sorted({**self._empty(), **self.stored_rows()}.items()))

    def _empty(self) -> dict[ShardIndex, LedgerRow]:
        """Return the rows of the empty shards, which have no objects: done, of no source."""
        empty = read_empty(self._store, self._collection)
        return {
            index: LedgerRow(index, region, key, "done", (), {}, empty.stats(region))
            for index, (region, key) in empty.shards.items()
        }

    def iterate_empty(self) -> Iterator[tuple[ShardIndex, Region, str]]:
        """Yield index, region and key of each empty shard."""
        for index, (region, key) in read_empty(self._store, self._collection).shards.items():
            yield index, region, key

    def stored_rows(self) -> dict[ShardIndex, LedgerRow]:
        """Return the rows of the shards that have objects of their own, or failed.

        Raises:
            IntegrityError: A row cannot be read.
        """
        return dict(sorted((row.index, row) for row in self.iterate_rows()))

    def iterate_rows(self) -> Iterator[LedgerRow]:
        """Yield the rows of `stored_rows` in any order; only a few are in memory at a time.

        Raises:
            IntegrityError: A row cannot be read.
        """
        keys = self._store.list(self._folder, ".json")
        for first in range(0, len(keys), _AT_ONCE):
            some = keys[first : first + _AT_ONCE]
            for key, data in zip(some, self._store.read_many(some), strict=True):
                if data is not None:
                    yield self._parse(key, data)

    def stored_indices(self) -> set[ShardIndex]:
        """Return the shards that have a row of their own, from the names of the rows alone.

        Raises:
            IntegrityError: A row has a name that is not one.
        """
        found = set()
        for key in self._store.list(self._folder, ".json"):
            name = key.rpartition("/")[2].removesuffix(".json")
            numbers = name.split("-")
            if len(numbers) != 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
                raise IntegrityError(
                    f"{self._store.where(key)} is not a ledger row (its name is not that of a shard); `terrashard "
                    "repair` makes the shard again"
                )
            found.add((int(numbers[0]), int(numbers[1]), int(numbers[2])))
        return found

    def drop_unreadable(self) -> list[str]:
        """Remove rows that cannot be read, so that their shards count as never written, and return their keys."""
        dropped = [key] if (key := drop_empty(self._store, self._collection)) else []
        for key in self._store.list(self._folder, ".json"):
            data = self._store.read(key)
            try:
                if data is not None:
                    self._parse(key, data)
            except IntegrityError:
                self._store.delete(key)
                dropped.append(key)
        return dropped

    def _parse(self, key: str, data: bytes) -> LedgerRow:
        try:
            row = LedgerRow.from_json(data)
            if self._key(row.index) != key:
                raise ValueError(f"it is the row of shard {row.index}")
            return row
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise IntegrityError(
                f"{self._store.where(key)} is not a ledger row ({type(error).__name__}: {error}); `terrashard "
                "repair` makes the shard again"
            ) from error

    def counts(self, total: int, shards: Mapping[ShardIndex, Region] | None = None) -> dict[str, Any]:
        """Count the shards that are done, partial, failed and pending, of `total`.

        Args:
            total: Number of shards.
            shards: `CubeSpec.shards()`; a row of another region was written before the cube grew, and is pending.
        """
        states = [row.state for row in self.rows().values() if shards is None or shards.get(row.index) == row.region]
        found: dict[str, Any] = {state: states.count(state) for state in ("done", "partial", "failed")}
        return found | {"pending": total - len(states), "total": total}
