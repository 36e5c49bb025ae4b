"""A full disk: named, nothing counted as written, and the same write succeeds when there is room again."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zarr_store import CubeSpec, ShardWriter, create_cube, open_cube
from zarr_store.errors import NoSpace
from zarr_store.store import check_room, space_number

from .conftest import ITEMS, NAME, cut


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_is_named_and_resumable(small_disk: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    path = small_disk / "cube.zarr"
    create_cube(path, [spec], items=ITEMS, provenance={})
    index, region = next(iter(spec.shards().items()))
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    writer = ShardWriter(path, NAME)
    with pytest.raises(NoSpace, match=r"no space left for .*free some and repeat"):
        writer.write(region, cut(pixels, region), key="k", sources=[])
    assert os.statvfs(small_disk).f_bavail == 0  # the fault fired
    assert open_cube(path).ledger(NAME).get(index) is None
    (small_disk / "ballast").unlink()
    assert writer.write(region, cut(pixels, region), key="k", sources=[]).state == "done"
    np.testing.assert_array_equal(open_cube(path).read(NAME, "reflectance", region), cut(pixels, region)["reflectance"])


def test_a_full_disk_creates_no_cube(small_disk: Path, spec: CubeSpec) -> None:
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(NoSpace):
        create_cube(small_disk / "cube.zarr", [spec], items=ITEMS, provenance={})
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_the_limit_on_the_size_of_a_file_is_met_by_a_probe_of_the_size(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        check_room(tmp_path, "x", size=1 << 20)
        with pytest.raises(NoSpace, match="ulimit -f"):
            check_room(tmp_path, "x", size=3 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_room_that_was_freed_again_counts(tmp_path: Path) -> None:
    check_room(tmp_path, "x", room=1000)
    with pytest.raises(NoSpace, match=r"no space left for x: about \d+ bytes are needed .*free some"):
        check_room(tmp_path, "x", room=1 << 60)


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EMFILE, errno.EIO])
def test_another_fault_of_the_probe_does_not_hide_that_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fired = []

    def refused(**_: object) -> None:
        fired.append(number)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    check_room(tmp_path, "x")
    assert fired


def test_the_text_of_an_error_behind_tells_that_there_is_no_room() -> None:
    outer = RuntimeError("could not add a feature")
    outer.__cause__ = RuntimeError("failed to execute insert : database or disk is full")
    assert space_number(outer) == errno.ENOSPC
    outer.__cause__ = None
    outer.__context__ = OSError(f"_tiffWriteProc: {os.strerror(errno.EFBIG)}.")
    assert space_number(outer) == errno.EFBIG
    assert space_number(RuntimeError("disk I/O error")) is None
