"""The byte store: atomic, exclusive, and honest about full or foreign places."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from zarr_store.backends import open_store
from zarr_store.errors import AccessError, InvalidInput, NoSpace
from zarr_store.folder import FolderStore
from zarr_store.store import Store, translate_os_errors


def test_write_read_list_delete(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b")
    assert isinstance(store, FolderStore)
    assert store.root.name == "a b"
    store.write("x/2.json", b"two")
    store.write("x/1.json", b"one")
    (store.root / "x/.3.json.abc.partial").write_bytes(b"half")
    assert store.list("x", ".json") == ["x/1.json", "x/2.json"]
    assert store.read("x/2.json") == b"two"
    store.delete("x/2.json")
    assert store.read("x/2.json") is None
    assert (store.root / "x/1.json").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_write_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write("k", b"old")
    fired = []

    def full(descriptor: int) -> None:
        fired.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"no space left for .*k"):
        store.write("k", b"new")
    assert fired
    assert store.read("k") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_parts_are_written_as_they_come_and_hashed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    sizes: list[int] = []

    def parts() -> Iterator[bytes]:
        for part in (b"one", b"", b"two"):
            yield part
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "c").iterdir()))

    store.write("c/0", b"before")
    pending = store.begin("c/0", parts())
    assert pending.digest == hashlib.sha256(b"onetwo").hexdigest()
    assert sizes == [6 + 3, 6 + 3, 6 + 6], "nothing is held back"
    assert store.read("c/0") == b"before", "what is not finished is not there"
    pending.finish()
    assert store.read("c/0") == b"onetwo"
    pending.abandon()
    assert store.read("c/0") == b"onetwo", "what is finished stays"
    store.begin("c/0", [b"three"]).abandon()
    assert store.read("c/0") == b"onetwo"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["0"]


def test_a_store_that_takes_whole_objects_writes_at_the_end(tmp_path: Path) -> None:
    """What buckets do: the base class over a store that knows no parts."""
    store = FolderStore(tmp_path)
    pending = Store.begin(store, "k", iter([b"one", b"two"]))
    assert pending.digest == hashlib.sha256(b"onetwo").hexdigest()
    assert store.read("k") is None
    pending.abandon()
    assert store.read("k") is None
    pending.finish()
    assert store.read("k") == b"onetwo"


def test_create_exclusive_writes_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.create_exclusive("k", b"1")
    assert not store.create_exclusive("k", b"2")
    assert store.read("k") == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_beside_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cube")

    def interrupted() -> None:
        with store.beside() as fresh:
            fresh.write("zarr.json", b"{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with store.beside() as fresh:
        fresh.write("zarr.json", b"{}")
        assert not store.exists()
    assert store.read("zarr.json") == b"{}"


def test_errors_of_the_file_system_are_translated() -> None:
    with pytest.raises(AccessError, match="check its permissions"), translate_os_errors("here"):
        raise OSError(errno.EROFS, "Read-only file system")
    with pytest.raises(NoSpace), translate_os_errors("here"):
        raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)}")
    with pytest.raises(NoSpace, match="ulimit -f"), translate_os_errors("here"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with pytest.raises(ValueError, match="other"), translate_os_errors("here"):
        raise ValueError("other")


@pytest.mark.parametrize("scheme", ["https", "ftp", "memory"])
def test_other_schemes_are_refused_without_their_secrets(scheme: str) -> None:
    with pytest.raises(InvalidInput, match="local or mounted") as caught:
        open_store(f"{scheme}://user:hunter2@bucket/cube?token=abc")
    assert "hunter2" not in str(caught.value)
    assert "abc" not in str(caught.value)
