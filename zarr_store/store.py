"""`Store` is the place of a cube; all bytes, Zarr metadata and pixels pass through it.

Pixels go through tensorstore, metadata through zarr-python, and the ledger and the lock through the small byte
interface here. `folder.py`, `objects.py` and `repository.py` hold the three kinds of store; `backends.py` opens them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import tensorstore as ts

from zarr_store.errors import AccessError, NoSpace, space_advice

__all__ = ["ITEM_KEY", "REPOSITORY_MARKER", "Kind", "Pending", "Store", "check_room",
           "space_number", "translate_os_errors"]  # fmt: skip

ITEM_KEY = "item.json"
"""Name of the STAC item of a cube or a map; it is no Zarr key."""
REPOSITORY_MARKER = "_terrashard/store.json"
"""Name of the file that marks a folder as an Icechunk repository of terrashard."""

_ROOM_BYTES = 1 << 20
"""Room that is asked for where a library does not say why it could not write, bytes."""
_SQLITE_FULL = "database or disk is full"
"""Message of SQLite for ENOSPC; for EFBIG it is "disk I/O error", as for any other fault."""

Kind = Literal["folder", "icechunk"]


@contextlib.contextmanager
def translate_os_errors(what: str) -> Iterator[None]:
    """Turn a full disk into `NoSpace` and a refused write into `AccessError`; the message names `what`."""
    try:
        yield
    except OSError as error:
        if advice := space_advice(error.errno):
            raise NoSpace(f"no space left for {what}: {error.strerror}; {advice} and repeat the command") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessError(f"cannot write {what}: {error.strerror}; check its permissions") from error
        raise
    except ValueError as error:  # tensorstore reports errors of files and buckets as ValueError, its code in front
        text = str(error)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in text:
                raise NoSpace(f"no space left for {what}; {space_advice(number)} and repeat the command") from error
        if text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            raise AccessError(f"cannot write {what}: access denied; check the credentials and their rights") from error
        if text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")):
            raise AccessError(f"cannot reach {what}; check the endpoint and repeat the command") from error
        raise


def check_room(folder: Path, what: str, *, size: int = 0, room: int = 0) -> None:
    """Refuse where there is no room: many libraries do not say why a write failed, so ask after a failure.

    Only a lack of room is raised: whatever else stands in the way here, the error of the caller says more.

    Args:
        folder: The folder of the file.
        what: The file, for messages.
        size: Bytes that the file had, or would have had; the limit on the size of a file must leave a megabyte more.
        room: Bytes that the file still needed, as the library may have removed what it wrote; at least a megabyte.

    Raises:
        NoSpace: The disk is full, or the file would be larger than is allowed.
    """
    try:
        with translate_os_errors(what), tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(_ROOM_BYTES))
            probe.write(b"\0")  # the first one may have been cut short
            probe.truncate(size + _ROOM_BYTES + 1)  # takes no room, but meets the limit on the size of a file
        free = shutil.disk_usage(folder).free
    except NoSpace:
        raise
    except OSError:
        return
    if free < room:
        raise NoSpace(
            f"no space left for {what}: about {room} bytes are needed and {free} are free; "
            f"{space_advice(errno.ENOSPC)} and repeat the command"
        )


def space_number(error: BaseException) -> int | None:
    """Return the number of the error "no room" that an error, or one behind it, names in its text; None for another.

    >>> space_number(RuntimeError("failed to execute insert : database or disk is full")) == errno.ENOSPC
    True
    """
    step: BaseException | None = error
    while step is not None:
        text = str(step)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in text:
                return number
        if _SQLITE_FULL in text:
            return errno.ENOSPC
        step = step.__cause__ or step.__context__
    return None


class Pending(Protocol):
    """An object that exists once `finish` has returned; before that, and after `abandon`, nothing of it is visible."""

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""

    def finish(self) -> None:
        """Put the object in its place, atomically and durably."""

    def abandon(self) -> None:
        """Remove what was written of the object; has no effect after `finish`."""


class Store(ABC):
    """The place that holds one cube. `where` and `url` are for messages; keys are relative, with slashes."""

    @property
    def kind(self) -> Kind:
        """Kind of the store: plain objects, or an Icechunk repository."""
        return "folder"

    @abstractmethod
    def below(self, path: str) -> Store:
        """Return the part of the store below `path` as a store of its own, whose keys cannot lead out of it either.

        Raises:
            IntegrityError: The path leads out of the store.
        """

    def check_inside(self, path: str = "") -> None:  # noqa: B027  # a bucket has no links
        """Refuse links that lead out of the store, before another library opens the files below `path` by their paths.

        Raises:
            IntegrityError: There is such a link.
        """

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL, as `open_store` takes it."""

    @abstractmethod
    def where(self, key: str) -> str:
        """Return the place of a key, for messages."""

    @abstractmethod
    def exists(self, key: str = "") -> bool:
        """Return whether `key` exists; without one, whether the store holds anything but an unfinished cube."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return the bytes at `key`, or None if there are none."""

    @property
    def knows_newer(self) -> bool:
        """Whether `is_newer` can tell."""
        return False

    def is_newer(self, key: str, than: Sequence[str]) -> bool:
        """Return whether `key` exists and was written after the last change in any of these folders, or of these files.

        A store that does not know says no.
        """
        del key, than
        return False

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of the bytes at `key`, or None if there are none."""
        data = self.read(key)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def stream(self, key: str) -> BinaryIO:
        """Open the bytes at `key` for reading, for what is too large to hold.

        Raises:
            FileNotFoundError: There are none.
        """
        data = self.read(key)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(key))
        return io.BytesIO(data)

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes at each key, as `read` does."""
        return [self.read(key) for key in keys]

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Replace the bytes at `key` atomically and durably."""

    def begin(self, key: str, parts: Iterable[bytes]) -> Pending:
        """Take all parts of an object, one after the other; `Pending.finish` then writes it.

        A store that can writes each part as it comes, so that `finish` only waits for the disk or bucket.
        """
        return _PendingBytes(self, key, b"".join(parts))

    @abstractmethod
    def create_exclusive(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` only if the key is free; return whether it was written."""

    @abstractmethod
    def take(self, key: str, held: bytes, data: bytes) -> bool:
        """Replace exactly the bytes `held` by `data`; return False if something else was there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object at `key`, if there is one."""

    @abstractmethod
    def list(self, prefix: str, suffix: str = "") -> list[str]:
        """Return the keys of the files directly in the folder `prefix`, sorted; temporary files are left out."""

    @abstractmethod
    def tensorstore(self, path: str) -> dict[str, Any]:
        """Return tensorstore's key-value store for the array at `path`; it holds no credentials."""

    def open_array(self, path: str, context: ts.Context) -> ts.TensorStore:
        """Open the array at `path`, read-only; reading a chunk that was never written raises."""
        self.check_inside(path)
        return ts.open(
            {
                "driver": "zarr3",
                "kvstore": self.tensorstore(path),
                "fill_missing_data_reads": False,
                "recheck_cached_data": "open",
            },
            open=True,
            read=True,
            write=False,
            context=context,
        ).result()

    def settle(self) -> None:  # noqa: B027  # most stores have nothing to settle
        """Finish the work of a run that died while it ended; only under the cube's lock."""

    def commit(self, message: str, *, still_ours: Callable[[], bool]) -> str | None:
        """End a run: what it wrote becomes one snapshot, where the store has any; the snapshot's id, else None.

        Args:
            message: Message of the snapshot.
            still_ours: Whether the caller's lock holds.
        """
        del message, still_ours
        return None

    @abstractmethod
    def zarr(self) -> Any:
        """Return a path or a Zarr store, for zarr-python and xarray."""

    @abstractmethod
    def beside(self) -> contextlib.AbstractContextManager[Store]:
        """Open a fresh store that becomes this one at the end of the block, and leaves nothing on an error."""


@dataclass(frozen=True)
class _PendingBytes:
    """An object whose bytes are put at once."""

    store: Store
    key: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def finish(self) -> None:
        self.store.write(self.key, self.data)

    def abandon(self) -> None:
        """Do nothing, as no byte was sent yet."""
