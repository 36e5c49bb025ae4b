"""`FolderStore`: a cube, map or run in a folder of a file system.

A write is durable (fsync of file and directory) and atomic (written beside its place, then renamed). No key and no
link leads out of a store (`keys.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, urlsplit

from zarr_store.bounded import MOST_METADATA, read_file
from zarr_store.crash import crashpoint
from zarr_store.durable import PendingFile, sync_folder, sync_tree, umask
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.keys import check_key, path_to_read, path_to_write, refuse_links
from zarr_store.regular import open_regular
from zarr_store.store import Pending, Store, translate_os_errors
from zarr_store.temporary import PARTIAL, STALE

__all__ = ["FolderStore"]


@dataclass(frozen=True)
class FolderStore(Store):
    """A folder on a local file system that holds one cube, map or run."""

    root: Path
    top: Path | None = None
    """The folder that the user named, if `root` is a part of it; links above it are the user's own."""

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Self:
        """Return the store in the folder at a path or file:// URL.

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
            bounded = key.endswith(".json") or key.startswith("_terrashard/")
            return read_file(path, MOST_METADATA) if bounded else path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except InvalidInput as error:
            raise IntegrityError(f"{error}; restore it") from error

    def stream(self, key: str) -> BinaryIO:
        return open_regular(self._to_read(key))

    @property
    def knows_newer(self) -> bool:
        return True

    def is_newer(self, key: str, than: Sequence[str]) -> bool:
        try:
            written = self._to_read(key).stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return False
        changed = []
        for other in than:
            # what is not there was not changed; removing a row changes the folder that held it
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                changed.append(self._to_read(other).stat().st_mtime_ns)
        # of two changes in one tick of the clock none is known to be newer; a time in the future means that the clock
        # was set back
        return written <= time.time_ns() and all(moment < written for moment in changed)

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
            descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                crashpoint(f"before linking {key}")
                os.link(beside, path)
                crashpoint(f"after linking {key}")
            except FileExistsError:
                return False
            except FileNotFoundError:  # the run that holds the lock has just swept the file beside
                return self.create_exclusive(key, data)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
        return True

    def take(self, key: str, held: bytes, data: bytes) -> bool:
        # Renaming is atomic: of two runs that both saw `held` only one moves it away, and what it moved is looked at
        # again in case the other had already put its own there.
        path = self._to_write(key)
        try:
            descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=STALE, dir=path.parent)
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
            if entry.is_file() and entry.name.endswith(suffix) and not entry.name.endswith(PARTIAL)
        )

    def clear(self, path: str) -> None:
        """Remove a folder and its contents, if it exists; links are removed and not followed."""
        shutil.rmtree(self._to_write(path), ignore_errors=True)

    def tensorstore(self, path: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self._to_read(path)}/"}

    def zarr(self) -> str:
        return str(self.root)

    @contextlib.contextmanager
    def beside(self) -> Iterator[FolderStore]:
        """Yield a fresh store next to this one; it replaces this one at the end, and is removed on an error."""
        if self.top is not None:
            path_to_write(self.top, self._from_top(""))
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with translate_os_errors(self.url):
            folder = tempfile.mkdtemp(prefix=f".{self.root.name}.", suffix=PARTIAL, dir=self.root.parent)
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
