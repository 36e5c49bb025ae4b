"""`verify_files` compares whole source files with the checksums that their items state (`file:checksum`, a multihash).

An ingest reads parts of a file, so it cannot check a checksum of the whole. Where a proxy or a broken upload gives
other bytes of the right length in an uncompressed file, only this check finds it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ingest.plan.stored import check_hrefs, kept_plan
from ingest.plan.task import SourceAsset
from ingest.raster.download import ReplacedError, stream_whole
from ingest.raster.faults import PermanentError, TransientError, cause_of
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.trust.redact import redact_url
from zarr_store.read import open_cube
from zarr_store.regular import open_regular
from zarr_store.verify import draw_shards

__all__ = ["FilesReport", "parse_multihash", "verify_files"]

_HASHES = {
    0x11: "sha1",
    0x12: "sha256",
    0x13: "sha512",
    0x14: "sha3_512",
    0x16: "sha3_256",
    0x20: "sha384",
    0xD5: "md5",
    0xB240: "blake2b",
}
"""Codes of the multihash table, for the hashes that hashlib has."""


@dataclass(frozen=True)
class FilesReport:
    """The result of comparing files with their stated checksums.

    Attributes:
        checked: Number of files that were hashed.
        different: Scene, asset and file whose bytes are not what its item states.
        unread: Files that could not be read this time, with the cause.
        unstated: Number of files for which no checksum that can be read is stated.

    Example:
        >>> import ingest
        >>> ingest.verify_files("cube.zarr", allow_local="world").unread
        ()
    """

    checked: int
    different: tuple[str, ...]
    unread: tuple[str, ...]
    unstated: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        return {**vars(self), "different": list(self.different), "unread": list(self.unread)}


def parse_multihash(text: str) -> tuple[str, bytes] | None:
    """Split a hexadecimal multihash into (name for hashlib, digest); None for other text and for unknown hashes.

    >>> parse_multihash("1220" + "00" * 32)[0]
    'sha256'
    """
    try:
        data = bytes.fromhex(text.removeprefix("0x"))
        code, at = _varint(data, 0)
        size, at = _varint(data, at)
    except (ValueError, IndexError):
        return None
    name = _HASHES.get(code)
    digest = data[at:]
    return (name, digest) if name is not None and len(digest) == size == hashlib.new(name).digest_size else None


def verify_files(
    url: str | os.PathLike[str],
    config: IngestConfig,
    *,
    share: float = 1.0,
    seed: int = 0,
    on_file: Callable[[int, int], None] | None = None,
) -> FilesReport:
    """Read the source files of shards as a whole, and compare them with the checksums that their items state.

    Args:
        url: The cube.
        config: Trust, timeouts and retries.
        share: Part of the written shards whose files are checked; `seed` draws them as `verify_cube` does.
        seed: Seed of the draw of a partial check.
        on_file: Called with (checked, total) after each file.
    """
    cube, plan = open_cube(url), kept_plan(url)
    access = Access.of(config)
    drawn = {(name, row.index) for name, row in draw_shards(cube, share, seed)}
    check_hrefs(plan, config, tasks=[task for task in plan.tasks if (task.collection, task.index) in drawn])
    files: dict[str, SourceAsset] = {
        asset.href: asset
        for task in plan.tasks
        if (task.collection, task.index) in drawn
        for scene in task.sources
        for asset in scene.assets
    }
    stated = {href: parsed for href, a in files.items() if (parsed := parse_multihash(a.checksum or "")) is not None}
    different, unread = [], []
    for done, (href, (name, digest)) in enumerate(sorted(stated.items()), 1):
        place = f"scene {files[href].scene}, asset {files[href].key} ({redact_url(href)})"
        try:
            if not _has_digest(href, name, digest, access):
                different.append(f"{place} does not have the {name} that its item states")
        except (PermanentError, TransientError, OSError, ValueError) as error:  # also an invalid host name
            unread.append(f"{place}: {cause_of(error, href)}")
        if on_file:
            on_file(done, len(stated))
    return FilesReport(len(stated) - len(unread), tuple(different), tuple(unread), len(files) - len(stated))


def _has_digest(href: str, name: str, digest: bytes, access: Access) -> bool:
    """Return whether a file has a digest; servers behind one name may state several versions of the right bytes."""
    try:
        return _digest(href, name, access) == digest
    except ReplacedError:
        if _digest(href, name, access, any_version=True) == digest:
            return True
        raise


def _digest(href: str, name: str, access: Access, *, any_version: bool = False) -> bytes:
    if urlsplit(href).scheme in ("http", "https", "s3"):
        running = hashlib.new(name)
        stream_whole(href, access, running.update, any_version=any_version)
        return running.digest()
    if "://" in href:
        raise PermanentError("expected a local path or an http, https or s3 URL; files of other schemes are never read")
    with open_regular(href) as file:
        return hashlib.file_digest(file, name).digest()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
