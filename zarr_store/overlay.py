"""`OverlayStore`: staged files over a snapshot, as a read-only Zarr store for zarr-python and xarray."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from zarr_store.errors import IntegrityError

__all__ = ["OverlayStore", "snapshot_get", "snapshot_has"]

_CHUNK = re.compile(r"(?P<array>.+)/c(/\d+)*")


async def snapshot_get(
    store: Any, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
) -> Buffer | None:
    """Read a key of a snapshot, None if it has none; Icechunk 1 raises if the array of the key does not exist.

    Raises:
        IntegrityError: Icechunk cannot or may not read it.
    """
    chunk = _CHUNK.fullmatch(key)
    if chunk and not await store.exists(f"{chunk['array']}/zarr.json"):
        return None
    try:
        found: Buffer | None = await store.get(key, prototype, byte_range)
    except Exception as error:
        if all(kind.__name__ != "IcechunkError" for kind in type(error).__mro__):  # Icechunk 2 has subclasses
            raise
        # also chunks that lie in files or at addresses outside (virtual ones): nobody here allows Icechunk to fetch any
        cause = " ".join(str(error).split())[:200]
        raise IntegrityError(
            f"{key} of the Icechunk repository cannot be read ({cause}); the cube was not made by terrashard alone, or "
            "is damaged: restore it from a copy"
        ) from error
    return found


async def snapshot_has(store: Any, key: str) -> bool:
    """Return whether a snapshot has a key."""
    chunk = _CHUNK.fullmatch(key)
    if chunk and not await store.exists(f"{chunk['array']}/zarr.json"):
        return False
    return bool(await store.exists(key))


class OverlayStore(Store):
    """Zarr store that reads a key from the staged files, else, unless it was deleted, from the snapshot.

    Args:
        below: Zarr store of the snapshot.
        staged: Folder of staged files; need not exist.
        gone: Folder with an empty file for each key that was deleted.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, below: Store, staged: Path, gone: Path) -> None:
        super().__init__(read_only=True)
        self._below = below
        self._above = LocalStore(staged, read_only=True)
        self._gone = gone
        self._is_open = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OverlayStore) and (self._below, self._above) == (other._below, other._above)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"icechunk://{self._above.root}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        # the folder exists only during runs, and LocalStore needs one
        found = await self._above.get(key, prototype, byte_range) if self._above.root.is_dir() else None
        if found is not None or (self._gone / key).exists():
            return found
        return await snapshot_get(self._below, key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        if (self._above.root / key).is_file():
            return True
        return not (self._gone / key).exists() and await snapshot_has(self._below, key)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        seen = set()
        for store in self._layers(prefix):
            async for key in store.list_prefix(prefix):
                if key not in seen and (store is self._above or not (self._gone / key).exists()):
                    seen.add(key)
                    yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        seen = set()
        for store in self._layers(prefix):
            async for key in store.list_dir(prefix):
                if key not in seen:
                    seen.add(key)
                    yield key

    def _layers(self, prefix: str) -> tuple[Any, ...]:
        """Return the stores that may hold keys below a prefix."""
        return (self._above, self._below) if (self._above.root / prefix).is_dir() else (self._below,)
