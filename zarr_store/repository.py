"""`IcechunkStore` is a cube in an Icechunk repository, in which every run is one commit.

Icechunk holds Zarr keys only, and a session that dies takes its changes with it. So a run stages what it writes as
plain files under `_terrashard/staged`, with the promises of a folder: whole shards, each before its ledger row,
resumable at any moment. At its end the one process that holds the cube's lock puts them into the repository and
commits, once. Programs that know Icechunk see the snapshot of the last run that ended; terrashard sees staged shards
over it. The ledger is an array of text, one element to a shard, so pixels and rows change in the same commit.

    zagreb.icechunk/            the repository, as `icechunk.local_filesystem_storage` opens it
    zagreb.icechunk/_terrashard/lock.json plan.json store.json staged/… gone/…

Reference: docs/stores.md, docs/decisions/0003.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import tensorstore as ts
from zarr.core.buffer import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer
from zarr.core.sync import sync

from zarr_store.crash import crashpoint
from zarr_store.errors import AccessError, IntegrityError, InvalidInput, Locked
from zarr_store.folder import FolderStore
from zarr_store.keys import refuse_links
from zarr_store.overlay import OverlayStore, snapshot_get, snapshot_has
from zarr_store.store import ITEM_KEY, REPOSITORY_MARKER, Kind, Pending, Store, translate_os_errors
from zarr_store.temporary import is_temporary
from zarr_store.virtual import open_virtual

__all__ = ["IcechunkStore"]

_STAGED = "_terrashard/staged"
_GONE = "_terrashard/gone"
_COMMITTING = "_terrashard/committing"
"""Key of the number of the commit under way; after a crash it shows whether that commit was made."""
_LEDGER = "_terrashard/ledger/"
_BRANCH = "main"
_AT_ONCE = 8
"""Number of objects of a commit that are in memory at a time."""
_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


@dataclass(frozen=True)
class IcechunkStore(Store):
    """A cube in an Icechunk repository in a local or mounted folder."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    @property
    def kind(self) -> Kind:
        return "icechunk"

    @property
    def _files(self) -> FolderStore:
        return FolderStore(self.root)

    @property
    def _staged(self) -> FolderStore:
        return self._files.below(_STAGED)

    def below(self, path: str) -> Store:
        return self._files.below(path)

    def check_inside(self, path: str = "") -> None:
        del path  # chunks of all arrays lie together
        self._staged.check_inside()

    def where(self, key: str) -> str:
        if _is_own(key) or self._staged.exists(key):
            return (self._files if _is_own(key) else self._staged).where(key)
        return f"{self.root} (snapshot {self._head()[:12]}): {key}"

    def exists(self, key: str = "") -> bool:
        return self.root.exists() if not key else self.read(key) is not None

    def read(self, key: str) -> bytes | None:
        return self.read_many([key])[0]

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        found = [(self._files if _is_own(key) else self._staged).read(key) for key in keys]
        absent = [
            i
            for i, key in enumerate(keys)
            if found[i] is None and not _is_own(key) and not self._files.exists(f"{_GONE}/{key}")
        ]
        if absent:
            store = self._snapshot()
            kept = _run(_gather([_get(store, _zarr_key(keys[i])) for i in absent]))
            for i, data in zip(absent, kept, strict=True):
                found[i] = _unframed(keys[i], data)
        return found

    def stream(self, key: str) -> BinaryIO:
        return self._files.stream(key) if _is_own(key) else super().stream(key)

    def write(self, key: str, data: bytes) -> None:
        (self._files if _is_own(key) else self._staged).write(key, data)

    def begin(self, key: str, parts: Iterable[bytes]) -> Pending:
        return (self._files if _is_own(key) else self._staged).begin(key, parts)

    def create_exclusive(self, key: str, data: bytes) -> bool:
        if not _is_own(key) and self.read(key) is not None:
            return False
        return (self._files if _is_own(key) else self._staged).create_exclusive(key, data)

    def take(self, key: str, held: bytes, data: bytes) -> bool:
        return (self._files if _is_own(key) else self._staged).take(key, held, data)

    def delete(self, key: str) -> None:
        if _is_own(key):
            self._files.delete(key)
            return
        # the mark before the file goes: in between the key must not show what the snapshot has
        if _run(snapshot_has(self._snapshot(), _zarr_key(key))) and not self._files.exists(f"{_GONE}/{key}"):
            self._files.write(f"{_GONE}/{key}", b"")
        self._staged.delete(key)

    def list(self, prefix: str, suffix: str = "") -> list[str]:
        if not f"{prefix}/".startswith(_LEDGER):
            return self._files.list(prefix, suffix)
        session = self._session()
        committed = [
            f"{prefix}/{'-'.join(map(str, index))}.json"
            for index in _run(_coordinates(session, prefix))
            if not self._files.exists(f"{_GONE}/{prefix}/{'-'.join(map(str, index))}.json")
        ]
        return sorted({*self._staged.list(prefix, suffix), *(key for key in committed if key.endswith(suffix))})

    def tensorstore(self, path: str) -> dict[str, Any]:
        """Return the key-value store in which shards of an array are staged."""
        key = f"{path}/zarr.json"
        if self._staged.read(key) is None and (data := self.read(key)) is not None:
            self._staged.write(key, data)  # tensorstore opens no array without it
        return self._staged.tensorstore(path)

    def open_array(self, path: str, context: ts.Context) -> ts.TensorStore:
        """Open an array through zarr-python, as tensorstore does not know Icechunk."""
        self.check_inside()
        overlay = self.zarr()
        return open_virtual(overlay, path, context, exists=lambda key: _run(overlay.exists(key)))

    def zarr(self) -> Any:
        """Return a read-only Zarr store: the staged files over the last snapshot."""
        return OverlayStore(self._snapshot(), self.root / _STAGED, self.root / _GONE)

    @contextlib.contextmanager
    def beside(self) -> Iterator[Store]:
        """Yield a fresh repository without a commit; files are staged for the first one."""
        icechunk = _icechunk()
        with self._files.beside() as folder:
            # the older of the two formats: it is read by every release, on each Python that this package supports
            version = {} if icechunk.__version__.startswith("1.") else {"spec_version": 1}
            icechunk.Repository.create(icechunk.local_filesystem_storage(folder.url), **version)
            folder.write(REPOSITORY_MARKER, json.dumps({"store": "icechunk", "branch": _BRANCH}).encode())
            yield FolderStore(Path(folder.url) / _STAGED)

    def settle(self) -> None:
        """Finish the work that a crash right after a commit left; only under the cube's lock."""
        number = self._files.read(_COMMITTING)
        if number is None:
            return
        head = next(iter(self._repository().ancestry(branch=_BRANCH)))
        if head.metadata.get("terrashard_run") == number.decode():
            self._clear()
        else:
            self._files.delete(_COMMITTING)

    def commit(self, message: str, *, still_ours: Callable[[], bool]) -> str | None:
        """Put all staged files into the repository, as one commit.

        Args:
            message: Message of the commit.
            still_ours: Whether the caller's lock holds; asked right before the commit.

        Returns:
            The snapshot; None where nothing was staged.

        Raises:
            Locked: The lock was lost, or another process has committed meanwhile. Nothing was committed.
        """
        icechunk = _icechunk()
        self.settle()
        session = self._repository().writable_session(_BRANCH)
        with translate_os_errors(self.url):
            _run(self._put_all(session.store))
        if not session.has_uncommitted_changes:
            self._clear()
            return None
        number = secrets.token_hex(8)
        self._files.write(_COMMITTING, number.encode())
        if not still_ours():
            raise Locked(f"{self.url}: this run has lost its lock; what it staged stays, and nothing was committed")
        crashpoint("before the commit")
        try:
            snapshot = str(session.commit(message, metadata={"terrashard_run": number}))
        except icechunk.ConflictError as error:
            raise Locked(
                f"{self.url}: another program has committed to this repository meanwhile; nothing of this run was: "
                "repeat the command, it continues with the staged files"
            ) from error
        crashpoint("after the commit")
        self._clear()
        return snapshot

    async def _put_all(self, store: Any) -> None:
        for name in (_STAGED, _GONE):
            self._files.below(name).check_inside()
        staged = self.root / _STAGED
        keys = [
            path.relative_to(staged).as_posix()
            for path in sorted(staged.rglob("*"))
            if path.is_file() and not is_temporary(path.name)
        ]
        gone = self.root / _GONE
        dropped = {path.relative_to(gone).as_posix() for path in gone.rglob("*") if path.is_file()} - set(keys)
        metadata = {key: (staged / key).read_bytes() for key in keys if key.endswith("zarr.json")}
        rows = [key for key in keys if key.startswith(_LEDGER)]
        for key, data in (metadata | await _ledger_arrays(store, rows)).items():
            if await _get(store, key) != data:  # a run that only wrote pixels leaves the arrays as they are
                await store.set(key, _buffer(data))
        turn = asyncio.Semaphore(_AT_ONCE)

        async def put(key: str) -> None:
            async with turn:
                data = await asyncio.to_thread((staged / key).read_bytes)
                await store.set(_zarr_key(key), _buffer(_framed(key, data)))

        await asyncio.gather(*(put(key) for key in keys if key not in metadata))
        for key in sorted(dropped):
            await store.delete(_zarr_key(key))

    def _clear(self) -> None:
        """Remove the staged files, which the snapshot now holds."""
        crashpoint("before what is staged goes")
        for name in (_STAGED, _GONE):
            self._files.clear(name)
        crashpoint("after what is staged went")
        self._files.delete(_COMMITTING)

    def _repository(self) -> Any:
        return _open(str(self.root), os.getpid())

    def _head(self) -> str:
        return str(self._repository().lookup_branch(_BRANCH))

    def _session(self) -> Any:
        return _session(str(self.root), os.getpid(), self._head())

    def _snapshot(self) -> Any:
        return self._session().store


def _is_own(key: str) -> bool:
    """Return whether a key is of the run and not of the cube; such keys are not Zarr keys, and no commit holds them."""
    own = key.startswith("_terrashard/") and not key.startswith(_LEDGER) and not key.endswith("/zarr.json")
    return own or key == ITEM_KEY


def _zarr_key(key: str) -> str:
    """Return the key in the repository, where rows of the ledger are elements of an array."""
    if not key.startswith(_LEDGER) or not key.endswith(".json") or key.endswith("/zarr.json"):
        return key
    folder, _, name = key.removesuffix(".json").rpartition("/")
    return f"{folder}/c/{name.replace('-', '/')}"


def _framed(key: str, data: bytes) -> bytes:
    """Return one element of an array of text in Zarr's `vlen-utf8`: the count, the length, the bytes."""
    if not key.startswith(_LEDGER):
        return data
    return (1).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


def _unframed(key: str, data: bytes | None) -> bytes | None:
    return data if data is None or not key.startswith(_LEDGER) else data[8:]


async def _ledger_arrays(store: Any, rows: Sequence[str]) -> dict[str, bytes]:
    """Return the metadata of the ledger's arrays, large enough for `rows` and for what is there."""
    documents: dict[str, Any] = {}
    for key in rows:
        folder, _, name = key.removesuffix(".json").rpartition("/")
        at = f"{folder}/zarr.json"
        if at not in documents:
            held = await _get(store, at)
            documents[at] = json.loads(held) if held else _text_array()
        index = (int(part) for part in name.split("-"))
        documents[at]["shape"] = [max(a, i + 1) for a, i in zip(documents[at]["shape"], index, strict=True)]
    if documents:
        documents = {f"{_LEDGER}zarr.json": _GROUP, **documents}
    return {key: json.dumps(document).encode() for key, document in documents.items()}


def _text_array() -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0, 0, 0],
        "data_type": "string",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "",
        "codecs": [{"name": "vlen-utf8"}],
        "attributes": {"description": "one row of the ledger for each shard, as JSON"},
        "dimension_names": ["time", "y", "x"],
        "storage_transformers": [],
    }


async def _get(store: Any, key: str) -> bytes | None:
    found = await snapshot_get(store, key, default_buffer_prototype())
    return None if found is None else bytes(found.to_bytes())


async def _gather(waiting: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*waiting))


async def _coordinates(session: Any, path: str) -> list[tuple[int, ...]]:
    if not await session.store.exists(f"{path}/zarr.json"):
        return []
    return [tuple(index) async for index in session.chunk_coordinates(f"/{path}")]


def _buffer(data: bytes) -> Any:
    return Buffer.from_bytes(data)


def _run(coroutine: Any) -> Any:
    return sync(coroutine)


def _icechunk() -> Any:
    try:
        import icechunk
    except ImportError as error:
        raise InvalidInput(
            "a cube of --store icechunk needs the package icechunk, which is not installed; add it with "
            "pip install 'terrashard[icechunk]'"
        ) from error
    if not os.environ.get("ICECHUNK_LOG"):
        icechunk.set_logs_filter("error")  # it warns of concurrent commits on local disks: the cube's lock forbids them
    return icechunk


@functools.lru_cache(maxsize=16)
def _open(root: str, process: int) -> Any:
    """Open a repository once for each process, as a client cannot be used after a fork."""
    del process
    icechunk = _icechunk()
    refuse_links(Path(root), Path(root))  # Icechunk opens its files by their paths
    try:
        return icechunk.Repository.open(icechunk.local_filesystem_storage(root))
    except icechunk.IcechunkError as error:
        kind = IntegrityError if Path(root).is_dir() else AccessError
        raise kind(
            f"{root} is marked as an Icechunk cube, but its repository cannot be opened "
            f"({str(error).strip().splitlines()[0][:200]}); restore the folder from a copy"
        ) from error


@functools.lru_cache(maxsize=64)
def _session(root: str, process: int, snapshot: str) -> Any:
    return _open(root, process).readonly_session(snapshot_id=snapshot)
