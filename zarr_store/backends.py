"""`Store`: where a cube lives. A URL becomes something that bytes, Zarr metadata and pixels go through.

Pixels go through tensorstore, metadata through zarr-python, and the ledger and the lock through the small byte
interface here. A write is durable (fsync of file and directory) and atomic (written beside, then renamed).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from zarr_store.crash import crashpoint
from zarr_store.errors import AccessError, InvalidInput, NoSpace

__all__ = ["Store", "translate_os_errors"]


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
    except ValueError as error:  # tensorstore reports file system errors as ValueError with the text of errno
        text = str(error)
        if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
            raise NoSpace(f"no space left for {what}; free some and repeat the command") from error
        raise


@dataclass(frozen=True)
class Store:
    """A folder on a local file system that holds one cube (or map)."""

    root: Path

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Self:
        """The store at a path or file:// URL.

        Raises:
            InvalidInput: The URL has a scheme that is not a local file.
        """
        text = os.fspath(url)
        parts = urlsplit(text)
        if parts.scheme == "file":
            return cls(Path(unquote(parts.path)).absolute())
        if "://" in text:
            raise InvalidInput(
                f"cannot open {parts.scheme}://{parts.hostname or ''}…: cubes live on a local or mounted file system; "
                "give a path"
            )
        return cls(Path(text).expanduser().absolute())

    @property
    def url(self) -> str:
        return str(self.root)

    def exists(self, key: str = "") -> bool:
        return (self.root / key).exists()

    def read(self, key: str) -> bytes | None:
        """The bytes at `key`, or None where there are none."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        """Replace the bytes at `key` atomically and durably."""
        path = self.root / key
        with translate_os_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                # mkstemp makes private files; a cube is shared like any other file
                os.chmod(beside, 0o666 & ~_umask())
                crashpoint(f"before {key}")
                os.replace(beside, path)
                crashpoint(f"after {key}")
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
                raise
            _sync_folder(path.parent)

    def create_exclusive(self, key: str, data: bytes) -> bool:
        """Write `data` at `key` only if nothing is there; True if it was written.

        The file appears complete or not at all: it is linked into place, and a link never replaces.
        """
        path = self.root / key
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

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / key).unlink()

    def list(self, prefix: str, suffix: str = "") -> list[str]:
        """Keys of the files directly in the folder `prefix`, sorted; temporary files are left out."""
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        return sorted(
            f"{prefix}/{entry.name}"
            for entry in os.scandir(folder)
            if entry.is_file() and entry.name.endswith(suffix) and not entry.name.endswith(".partial")
        )

    def tensorstore(self, path: str) -> dict[str, Any]:
        """Tensorstore's key-value store for the array at `path`."""
        return {"driver": "file", "path": f"{self.root / path}/"}

    @contextlib.contextmanager
    def beside(self) -> Iterator[Store]:
        """A fresh store next to this one; it becomes this one at the end, and disappears on an error."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with translate_os_errors(self.url):
            folder = tempfile.mkdtemp(prefix=f".{self.root.name}.", suffix=".partial", dir=self.root.parent)
        try:
            os.chmod(folder, 0o777 & ~_umask())
            with translate_os_errors(self.url):
                yield Store(Path(folder))
                crashpoint("before the cube appears")
                os.rename(folder, self.root)  # fails if something non-empty has appeared there meanwhile
                _sync_folder(self.root.parent)
                crashpoint("after the cube appears")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
