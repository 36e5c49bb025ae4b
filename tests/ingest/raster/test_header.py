"""A file is opened with GDAL once per process and version, and read without it after that; never by an old header."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from ingest.raster.access import header_cache
from ingest.raster.limits import Access
from ingest.raster.lru import LruCache
from ingest.raster.read import read_on_grid
from ingest.scenes.scene import AssetRef
from ingest.simulate import serve
from ingest.testing import write_raster
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (256, 256))
QUICK = Access(attempts=2, deadline_s=10, backoff_s=0.01, private_names=None)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60_000, GRID.shape).astype(np.uint16)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What GDAL opens meanwhile."""
    header_cache(os.getpid()).clear()
    names: list[str] = []
    real = rasterio.open

    def note(name: Any, *args: Any, **more: Any) -> Any:
        names.append(str(name))
        return real(name, *args, **more)

    monkeypatch.setattr(rasterio, "open", note)
    yield names
    header_cache(os.getpid()).clear()


def read(href: object, window: tuple[int, int, int, int] = (0, 0, 256, 256), access: Access = QUICK) -> np.ndarray:
    asset = AssetRef(key="red", href=str(href), band="red")
    return read_on_grid(asset, None, GRID.window(*window), "nearest", scene="S", access=access)


def test_a_file_is_opened_once_for_all_its_windows(tmp_path: Path, opened: list[str]) -> None:
    path = write_raster(tmp_path / "a.tif", GRID, pixels(1), **TILED)
    opened.clear()
    for window in ((0, 0, 64, 64), (0, 0, 256, 256), (30, 70, 100, 111)):
        row, col, height, width = window
        np.testing.assert_array_equal(read(path, window), pixels(1)[row : row + height, col : col + width])
    assert len(opened) == 1


def test_a_remote_file_too(tmp_path: Path, opened: list[str]) -> None:
    write_raster(tmp_path / "a.tif", GRID, pixels(1), **TILED)
    (tmp_path / "catalog.json").write_text('{"type": "Catalog", "id": "c", "links": []}')
    with serve(tmp_path) as server:
        opened.clear()
        for _ in range(3):
            np.testing.assert_array_equal(read(server.file_url("a.tif")), pixels(1))
        assert len(opened) == 1
        asked = server.requests.total()
        write_raster(tmp_path / "new.tif", GRID, pixels(2), **TILED)
        opened.clear()
        os.replace(tmp_path / "new.tif", tmp_path / "a.tif")
        np.testing.assert_array_equal(read(server.file_url("a.tif")), pixels(2))
        assert len(opened) == 1, "the file that is there now"
        assert server.requests.total() > asked


@pytest.mark.parametrize(
    "options",
    [{**TILED, "endianness": "big"}, {**TILED, "sparse_ok": True}],
    ids=["numbers that GDAL must turn", "a block left out"],
)
def test_what_needs_gdal_is_opened_each_time(tmp_path: Path, opened: list[str], options: dict[str, Any]) -> None:
    some = pixels(1)
    some[:64, :64] = 0
    path = write_raster(tmp_path / "a.tif", GRID, some, **options)
    opened.clear()
    for _ in range(2):
        np.testing.assert_array_equal(read(path), some)
    assert len(opened) == 2


def test_a_file_that_is_replaced_is_opened_anew(tmp_path: Path, opened: list[str]) -> None:
    """Also where size and time stay what they were, as after `cp --preserve`."""
    path = write_raster(tmp_path / "a.tif", GRID, pixels(1), **TILED, compress="none", predictor=1)
    read(path)
    write_raster(tmp_path / "b.tif", GRID, pixels(2), **TILED, compress="none", predictor=1)
    before = path.stat()
    os.utime(tmp_path / "b.tif", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "b.tif", path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    opened.clear()
    np.testing.assert_array_equal(read(path), pixels(2))
    assert len(opened) == 1


def test_limits_hold_for_known_files(tmp_path: Path, opened: list[str]) -> None:
    path = write_raster(tmp_path / "a.tif", GRID, pixels(1), **TILED)
    read(path)
    with pytest.raises(AssetUnreadable, match="more than the 100 allowed"):
        read(path, access=Access(attempts=1, max_pixels=100))


def test_a_file_of_many_blocks_is_asked_for_them_one_by_one(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raster(tmp_path / "a.tif", GRID, pixels(1), **TILED)
    for most, times in ((15, 2), (16, 1)):
        monkeypatch.setattr("ingest.raster.header._MAX_BLOCKS", most)
        opened.clear()
        for _ in range(2):
            np.testing.assert_array_equal(read(path), pixels(1))
        assert len(opened) == times


def test_the_value_not_asked_for_longest_goes_first() -> None:
    kept: LruCache[int] = LruCache(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert [kept.get(name) for name in "abc"] == [1, None, 3]
    kept.drop("a")
    kept.drop("b")
    assert [kept.get(name) for name in "abc"] == [None, None, 3]
    kept.clear()
    assert kept.get("c") is None
