"""`Store`: where a cube lives. A URL becomes something that bytes, Zarr metadata and pixels go through.

Pixels go through tensorstore, metadata through zarr-python, and the ledger and the lock through the small byte
interface here. `FolderStore` is a folder of a file system: a write is durable (fsync of file and directory) and atomic
(written beside, then renamed). `ObjectStore` of `objects.py` is a bucket, with the same promises; `IcechunkStore` of
`repository.py` is a repository in a folder, with one commit for each run. Where tensorstore has no driver, `virtual.py`
reads the pixels through zarr-python. No key leads out of its store, and in a folder no link does (`keys.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from zarr_store.bounded import MOST_METADATA, read_file
from zarr_store.crash import crashpoint
from zarr_store.durable import PendingFile, sync_folder, sync_tree, umask
from zarr_store.errors import AccessError, IntegrityError, InvalidInput, NoSpace
from zarr_store.keys import check_key, path_to_read, path_to_write, refuse_links

__all__ = ["REPOSITORY_MARKER", "FolderStore", "Kind", "Pending", "Store", "store_for", "translate_os_errors"]

OBJECT_SCHEMES = ("s3", "gs", "az")
REPOSITORY_MARKER = "_terrashard/store.json"
"""A folder with this file is an Icechunk repository of ours."""

Kind = Literal["folder", "icechunk"]


@contextlib.contextmanager
def translate_os_errors(what: str) -> Iterator[None]:
    """Turn a full disk into `NoSpace` and a refused write into `AccessError`, naming `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left for {what}: {error.strerror}; free some and repeat the command") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessError(f"cannot write {what}: {error.strerror}; check its permissions") from error
        raise
    except ValueError as error:  # tensorstore reports errors of files and buckets as ValueError, its code in front
        text = str(error)
        if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
            raise NoSpace(f"no space left for {what}; free some and repeat the command") from error
        if text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            raise AccessError(f"cannot write {what}: access denied; check the credentials and their rights") from error
        if text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")):
            raise AccessError(f"cannot reach {what}; check the endpoint and repeat the command") from error
        raise


class Pending(Protocol):
    """Something that is written once `finish` has returned; before, and after `abandon`, there is nothing of it."""

    @property
    def digest(self) -> str:
        """SHA-256 of its bytes."""

    def finish(self) -> None:
        """Put it in its place, atomically and durably."""

    def abandon(self) -> None:
        """Leave nothing of it; does nothing after `finish`."""


class Store(ABC):
    """What holds one cube. `where` and `url` are for messages; keys are relative, with slashes."""

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Store:
        """The store at a path, a file:// URL or a bucket's s3://, gs:// or az:// URL.

        Raises:
            InvalidInput: The URL has another scheme, or holds credentials.
        """
        text = os.fspath(url)
        if urlsplit(text).scheme in OBJECT_SCHEMES:
            from zarr_store.objects import ObjectStore  # here: most cubes are folders, and obstore takes time to load

            return ObjectStore.at(text)
        folder = FolderStore.at(text)
        return _repository(folder) if (folder.root / REPOSITORY_MARKER).is_file() else folder

    @property
    def kind(self) -> Kind:
        """What holds the cube: plain objects, or an Icechunk repository."""
        return "folder"

    def below(self, path: str) -> Store:
        """The part of the store below `path`, as a store of its own that is just as closed.

        Raises:
            IntegrityError: The path leads out of the store.
        """
        return Store.at(f"{self.url}/{check_key(path, self.url)}")

    def check_inside(self, path: str = "") -> None:  # noqa: B027  # a bucket has no links
        """Refuse links that lead out of the store, before another library opens the files below `path` by their paths.

        Raises:
            IntegrityError: There is such a link.
        """

    @property
    @abstractmethod
    def url(self) -> str:
        """As `at` takes it."""

    @abstractmethod
    def where(self, key: str) -> str:
        """A key's place, for people."""

    @abstractmethod
    def exists(self, key: str = "") -> bool:
        """Whether something is at `key`; without one, whether the store holds anything but a cube half begun."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The bytes at `key`, or None where there are none."""

    def digest(self, key: str) -> str | None:
        """SHA-256 of the bytes at `key`, or None where there are none."""
        data = self.read(key)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """`read` of each key."""
        return [self.read(key) for key in keys]

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Replace the bytes at `key` atomically and durably."""

    def begin(self, key: str, parts: Iterable[bytes]) -> Pending:
        """The first half of `write`: all parts, one after the other, each as it comes where the store can.

        What only waits for a disk or a bucket is the second half, `Pending.finish`.
        """
        return _PendingBytes(self, key, b"".join(parts))

    @abstractmethod
    def create_exclusive(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` only if nothing is there; True if it was written."""

    @abstractmethod
    def take(self, key: str, held: bytes, data: bytes) -> bool:
        """Put `data` in the place of exactly the bytes `held`; True if it was, False if something else was there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove what is at `key`, if anything is."""

    @abstractmethod
    def list(self, prefix: str, suffix: str = "") -> list[str]:
        """Keys of the files directly in the folder `prefix`, sorted; temporary files are left out."""

    @abstractmethod
    def tensorstore(self, path: str) -> dict[str, Any]:
        """Tensorstore's key-value store for the array at `path`; holds no credentials."""

    def open_array(self, path: str, context: ts.Context) -> ts.TensorStore:
        """The array at `path`, read-only; reading a chunk that was never written raises."""
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
        """Finish what a run left undone that died while it ended; only under the cube's lock."""

    def commit(self, message: str, *, still_ours: Callable[[], bool]) -> str | None:
        """End a run: what it wrote becomes one snapshot, where the store has any; the snapshot's id, else None.

        Args:
            message: Of the snapshot.
            still_ours: Whether the caller's lock holds.
        """
        del message, still_ours
        return None

    @abstractmethod
    def zarr(self) -> Any:
        """What zarr-python and xarray open: a path or a Zarr store."""

    @abstractmethod
    def beside(self) -> contextlib.AbstractContextManager[Store]:
        """A fresh store that becomes this one at the end, and leaves nothing on an error."""


@dataclass(frozen=True)
class _PendingBytes:
    """All bytes of an object, for a store that takes them at once."""

    store: Store
    key: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def finish(self) -> None:
        self.store.write(self.key, self.data)

    def abandon(self) -> None:
        """There is nothing of it but these bytes."""


def store_for(url: str | os.PathLike[str], kind: Kind | None) -> Store:
    """Where a cube of a kind goes: what is there already is opened as what it is.

    Raises:
        InvalidInput: As `Store.at`; or the place cannot hold a repository.
    """
    store = Store.at(url)
    if kind != "icechunk" or store.kind == kind:
        return store
    if not isinstance(store, FolderStore):
        raise InvalidInput(
            f"--store icechunk: {store.url} is in a bucket, and a run stages its shards as files beside the "
            "repository; give a local or mounted folder"
        )
    return store if store.exists() else _repository(store)


def _repository(folder: FolderStore) -> Store:
    from zarr_store.repository import IcechunkStore  # here: it is an extra, and few cubes are repositories

    return IcechunkStore(folder.root)


@dataclass(frozen=True)
class FolderStore(Store):
    """A folder on a local file system that holds one cube, map or run."""

    root: Path
    top: Path | None = None
    """The folder that the user named, where `root` is only a part of it; links above it are the user's own."""

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Self:
        """The folder at a path or file:// URL.

        Raises:
            InvalidInput: The URL has a scheme that is not a local file.
        """
        text = os.fspath(url)
        parts = urlsplit(text)
        if parts.scheme == "file":
            return cls(Path(unquote(parts.path)).absolute())
        if parts.scheme in ("azure", "abfs", "abfss", "adl"):
            raise InvalidInput(
                f"cannot open {parts.scheme}://…: for Azure give az://container/prefix, with the account in "
                "AZURE_STORAGE_ACCOUNT_NAME"
            )
        if "://" in text:
            raise InvalidInput(
                f"cannot open {parts.scheme}://{parts.hostname or ''}…: expected a path on a local or mounted file "
                "system, and for cubes also s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
            )
        return cls(Path(text).expanduser().absolute())

    @property
    def url(self) -> str:
        return str(self.root)

    def below(self, path: str) -> FolderStore:
        return FolderStore(self.root / check_key(path, self.url), self._top)

    def check_inside(self, path: str = "") -> None:
        refuse_links(self._top, self._to_read(path))

    @property
    def _top(self) -> Path:
        return self.top or self.root

    def _to_read(self, key: str = "") -> Path:
        return path_to_read(self._top, self._from_top(key)) if key or self.top else self.root

    def _to_write(self, key: str) -> Path:
        return path_to_write(self._top, self._from_top(check_key(key, self.url)))

    def _from_top(self, key: str) -> str:
        above = self.root.relative_to(self._top).as_posix()
        return key if above == "." else f"{above}/{key}" if key else above

    def where(self, key: str) -> str:
        return str(self.root / key)

    def exists(self, key: str = "") -> bool:
        return self._to_read(key).exists()

    def read(self, key: str) -> bytes | None:
        path = self._to_read(key)
        try:
            return read_file(path, MOST_METADATA) if key.endswith(".json") else path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except InvalidInput as error:
            raise IntegrityError(f"{error}; restore it") from error

    def digest(self, key: str) -> str | None:
        try:
            with self._to_read(key).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        pending = self.begin(key, [data])
        with translate_os_errors(self.where(key)):
            pending.finish()

    def begin(self, key: str, parts: Iterable[bytes]) -> Pending:
        path = self._to_write(key)
        with translate_os_errors(str(path)):
            return PendingFile(path, key, parts)

    def create_exclusive(self, key: str, data: bytes) -> bool:
        # the file appears complete or not at all: it is linked into place, and a link never replaces
        path = self._to_write(key)
        with translate_os_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                crashpoint(f"before linking {key}")
                os.link(beside, path)
                crashpoint(f"after linking {key}")
            except FileExistsError:
                return False
            finally:
                os.unlink(beside)
        return True

    def take(self, key: str, held: bytes, data: bytes) -> bool:
        # Renaming is atomic: of two runs that both saw `held` only one moves it away, and what it moved is looked at
        # again in case the other had already put its own there.
        path = self._to_write(key)
        try:
            descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".stale", dir=path.parent)
        except FileNotFoundError:
            return False
        os.close(descriptor)
        aside = Path(name)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            aside.unlink()
            return False
        if aside.read_bytes() != held:
            os.replace(aside, path)
            return False
        aside.unlink()
        return self.create_exclusive(key, data)

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._to_write(key).unlink()

    def list(self, prefix: str, suffix: str = "") -> list[str]:
        folder = self._to_read(prefix)
        if not folder.is_dir():
            return []
        return sorted(
            f"{prefix}/{entry.name}"
            for entry in os.scandir(folder)
            if entry.is_file() and entry.name.endswith(suffix) and not entry.name.endswith(".partial")
        )

    def clear(self, path: str) -> None:
        """Remove a folder and all that is in it, if it is there; links are removed and not followed."""
        shutil.rmtree(self._to_write(path), ignore_errors=True)

    def tensorstore(self, path: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self._to_read(path)}/"}

    def zarr(self) -> str:
        return str(self.root)

    @contextlib.contextmanager
    def beside(self) -> Iterator[FolderStore]:
        """A fresh store next to this one; it becomes this one at the end, and disappears on an error."""
        if self.top is not None:
            path_to_write(self.top, self._from_top(""))
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with translate_os_errors(self.url):
            folder = tempfile.mkdtemp(prefix=f".{self.root.name}.", suffix=".partial", dir=self.root.parent)
        try:
            os.chmod(folder, 0o777 & ~umask())
            with translate_os_errors(self.url):
                yield FolderStore(Path(folder))
                sync_tree(Path(folder))  # what appears in one rename must be on the disk before it
                crashpoint("before the cube appears")
                os.rename(folder, self.root)  # fails if something non-empty has appeared there meanwhile
                sync_folder(self.root.parent)
                crashpoint("after the cube appears")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
