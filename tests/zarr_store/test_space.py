"""A full disk: named, nothing counted as written, and the same write succeeds when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zarr_store import CubeSpec, ShardWriter, create_cube, open_cube
from zarr_store.errors import NoSpace

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
