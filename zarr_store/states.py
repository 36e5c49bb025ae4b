"""`ShardStates` says which shards of a collection are done, partial, failed or pending, and under which key.

A ledger has a row for each shard, with statistics of every chunk; a million rows have gigabytes. The states of as many
shards have a byte and a digest each. A run on a folder leaves them in `_terrashard/states`, where they are believed as
long as nothing in the ledger's folder has changed since. The rows stay the truth: without the file they are read.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
import numpy.typing as npt

from zarr_store.bounded import load_json
from zarr_store.errors import TerrashardError
from zarr_store.ledger import Ledger, LedgerRow, ShardIndex, State
from zarr_store.regions import Region
from zarr_store.spec import CubeSpec
from zarr_store.store import Store

__all__ = ["KEPT_FROM", "ShardStates", "StatesWatch", "forget_states", "keep_states", "read_states"]

KEPT_FROM = 4096
"""Number of shards from which on their states are kept; the rows of fewer are read in a second."""
_CODES: tuple[str, ...] = ("pending", *get_args(State))
_DONE = _CODES.index("done")
_KEY_BYTES = 16
_FORMAT = 1
_TICK_S = 0.02
_MOST_HEAD = 1 << 16


@dataclass(frozen=True)
class ShardStates:
    """The states of all shards of one collection.

    Attributes:
        spec: The collection.
        codes: uint8 (T, Y, X): 0 for pending, else the position of the state among those of rows, from 1.
        keys: uint8 (T, Y, X, 16): digest of the key of each row.
    """

    spec: CubeSpec
    codes: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]

    @classmethod
    def none(cls, spec: CubeSpec) -> Self:
        """Return states in which every shard is pending."""
        counts = spec.shard_counts
        return cls(spec, np.zeros(counts, np.uint8), np.zeros((*counts, _KEY_BYTES), np.uint8))

    def put(self, index: ShardIndex, region: Region, key: str, state: str) -> None:
        """Set the state of a shard; one of another region was written before the cube grew, and is pending."""
        if self.spec.shard_at(index) == region:
            self.codes[index] = _CODES.index(state)
            self.keys[index] = np.frombuffer(_digest(key), np.uint8)

    def keep_only(self, indices: Iterable[ShardIndex]) -> None:
        """Set all shards but these to pending."""
        there = np.zeros(self.codes.shape, bool)
        for index in indices:
            if self.spec.shard_at(index) is not None:
                there[index] = True
        self.codes[~there] = 0
        self.keys[~there] = 0

    def state(self, index: ShardIndex) -> str:
        """Return the state of a shard; pending where the cube has no such shard."""
        return str(_CODES[int(self.codes[index])] if self.spec.shard_at(index) is not None else _CODES[0])

    def has_key(self, index: ShardIndex, key: str) -> bool:
        """Return whether the shard has a row, and that has this key."""
        return self.state(index) != _CODES[0] and bytes(self.keys[index].tobytes()) == _digest(key)

    def count(self) -> dict[str, int]:
        """Return the number of shards by state, and in all."""
        found = {state: int(np.count_nonzero(self.codes == number)) for number, state in enumerate(_CODES)}
        return {state: found[state] for state in (*_CODES[1:], _CODES[0])} | {"total": self.codes.size}

    def unfinished(self) -> Iterator[tuple[ShardIndex, str]]:
        """Yield index and state of each shard that is not done, in order."""
        for t, y, x in np.argwhere(self.codes != _DONE):
            yield (int(t), int(y), int(x)), _CODES[self.codes[t, y, x]]

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads: a line of JSON, then the packed arrays."""
        there = self.codes.ravel() != 0
        body = zlib.compress(self.codes.tobytes(), 1) + self.keys.reshape(-1, _KEY_BYTES)[there].tobytes()
        head = {
            "format": _FORMAT,
            "shards": list(self.spec.shard_counts),
            "shape": list(self.spec.shape),
            "states": list(_CODES),
            "keys": int(there.sum()),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        return bytes(json.dumps(head, sort_keys=True).encode() + b"\n" + body)

    @classmethod
    def from_bytes(cls, spec: CubeSpec, data: bytes) -> Self | None:
        """Read the states of a collection; None where they are of another shape, or damaged."""
        line, _, body = data.partition(b"\n")
        try:
            head = load_json(line, "states", most=_MOST_HEAD)
            wanted = {"format": _FORMAT, "shape": list(spec.shape), "shards": list(spec.shard_counts)}
            wanted |= {"states": list(_CODES), "sha256": hashlib.sha256(body).hexdigest()}
            if {name: head[name] for name in wanted} != wanted:
                return None
            count, size = int(head["keys"]), spec.shard_count
            packed = body[: len(body) - count * _KEY_BYTES]
            codes = np.frombuffer(zlib.decompressobj().decompress(packed, size), np.uint8).copy()
            if len(codes) != size or codes.max(initial=0) >= len(_CODES):
                return None
            keys = np.zeros((size, _KEY_BYTES), np.uint8)
            keys[codes != 0] = np.frombuffer(body[len(packed) :], np.uint8).reshape(count, _KEY_BYTES)
        except (ValueError, KeyError, TypeError, OverflowError, zlib.error):
            return None
        return cls(spec, codes.reshape(spec.shard_counts), keys.reshape(*spec.shard_counts, _KEY_BYTES))

    @classmethod
    def of_rows(cls, spec: CubeSpec, rows: Iterable[LedgerRow]) -> Self:
        """Take the states of ledger rows, one after the other."""
        states = cls.none(spec)
        for row in rows:
            states.put(row.index, row.region, row.key, row.state)
        return states


def read_states(store: Store, spec: CubeSpec) -> ShardStates:
    """Read the states of a collection: those that a run has left, or else every row of its ledger.

    Raises:
        IntegrityError: A row cannot be read.
    """
    ledger = Ledger(store, spec.collection)
    if spec.shard_count >= KEPT_FROM and store.is_newer(_key(spec.collection), ledger.places):
        try:
            data = store.read(_key(spec.collection))
        except (OSError, TerrashardError):  # a folder or a pipe of that name: the rows are the truth
            data = None
        kept = ShardStates.from_bytes(spec, data) if data is not None else None
        if kept is not None:
            return kept
    states = ShardStates.none(spec)
    for index, region, key in ledger.iterate_empty():
        states.put(index, region, key, "done")
    for row in ledger.iterate_rows():
        states.put(row.index, row.region, row.key, row.state)
    return states


class StatesWatch:
    """Watch on the states of a collection while a run writes; a row that is done is read once.

    Args:
        store: The cube.
        spec: The collection.
    """

    def __init__(self, store: Store, spec: CubeSpec) -> None:
        self._ledger = Ledger(store, spec.collection)
        self._states = read_states(store, spec)

    def look(self) -> ShardStates:
        """Return the states as they are now.

        Raises:
            IntegrityError: A row cannot be read.
        """
        states, stored = self._states, self._ledger.stored_indices()
        empty = list(self._ledger.iterate_empty())
        states.keep_only([*stored, *(index for index, _, _ in empty)])
        for index, region, key in empty:
            states.put(index, region, key, "done")
        for index in stored:
            row = self._ledger.get_stored(index) if states.state(index) != "done" else None
            if row is not None:
                states.put(row.index, row.region, row.key, row.state)
        return states


def keep_states(store: Store, states: ShardStates) -> None:
    """Leave the states of a large collection for later readers; only under the cube's lock, after the last row."""
    if states.spec.shard_count < KEPT_FROM or not store.knows_newer:
        return
    key, data = _key(states.spec.collection), states.to_bytes()
    if store.read(key) != data or not store.is_newer(key, Ledger(store, states.spec.collection).places):
        store.write(key, data)
        if not store.is_newer(key, Ledger(store, states.spec.collection).places):
            time.sleep(_TICK_S)  # the last row was written in the same tick of the file system's clock
            store.write(key, data)


def forget_states(store: Store, collection: str) -> None:
    """Remove the states of a collection before a row of it changes; only under the cube's lock."""
    store.delete(_key(collection))  # of a store that keeps none, too: a cube may have been copied there


def _key(collection: str) -> str:
    return f"_terrashard/states/{collection}.bin"


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_KEY_BYTES).digest()
