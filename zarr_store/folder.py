"""`FolderStore`: a cube, map or run in a folder of a file system.

A write is durable (fsync of file and directory) and atomic (written beside its place, then renamed).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from zarr_store.crash import crashpoint
from zarr_store.durable import PendingFile, sync_folder, sync_tree, umask
from zarr_store.errors import InvalidInput
from zarr_store.store import Pending, Store, translate_os_errors

__all__ = ["FolderStore"]


@dataclass(frozen=True)
class FolderStore(Store):
    """A folder on a local file system that holds one cube, map or run."""

    root: Path

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

    def where(self, key: str) -> str:
        return str(self.root / key)

    def exists(self, key: str = "") -> bool:
        return (self.root / key).exists()

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def digest(self, key: str) -> str | None:
        try:
            with (self.root / key).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        pending = self.begin(key, [data])
        with translate_os_errors(self.where(key)):
            pending.finish()

    def begin(self, key: str, parts: Iterable[bytes]) -> Pending:
        path = self.root / key
        with translate_os_errors(str(path)):
            return PendingFile(path, key, parts)

    def create_exclusive(self, key: str, data: bytes) -> bool:
        # the file appears complete or not at all: it is linked into place, and a link never replaces
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

    def take(self, key: str, held: bytes, data: bytes) -> bool:
        # Renaming is atomic: of two runs that both saw `held` only one moves it away, and what it moved is looked at
        # again in case the other had already put its own there.
        path = self.root / key
        aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        if aside.read_bytes() != held:
            os.replace(aside, path)
            return False
        aside.unlink()
        return self.create_exclusive(key, data)

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / key).unlink()

    def list(self, prefix: str, suffix: str = "") -> list[str]:
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        return sorted(
            f"{prefix}/{entry.name}"
            for entry in os.scandir(folder)
            if entry.is_file() and entry.name.endswith(suffix) and not entry.name.endswith(".partial")
        )

    def tensorstore(self, path: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.root / path}/"}

    def zarr(self) -> str:
        return str(self.root)

    @contextlib.contextmanager
    def beside(self) -> Iterator[FolderStore]:
        """A fresh store next to this one; it becomes this one at the end, and disappears on an error."""
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
