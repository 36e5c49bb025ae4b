"""Servers that state several versions of the same bytes, and servers that state one of other bytes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.raster.asset_file import file_version, file_versions
from ingest.raster.download import head_cache, stream_whole
from ingest.raster.faults import TransientError
from ingest.raster.limits import Access
from ingest.raster.read import read_on_grid
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from ingest.upkeep.checksums import _has_digest
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_100_000.0), (256, 256))
QUICK = Access(attempts=2, deadline_s=20, backoff_s=0.01)
PLAIN = {"compress": "none"}
"""Blocks whose places do not tell one file from another."""


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1200, 9000, GRID.shape).astype(np.uint16)


class Farm:
    """Servers behind one name: `answer` gives the bytes and the headers of the answer with this number."""

    def __init__(self, server: Any, answer: Callable[[int], tuple[bytes, dict[str, str]]]) -> None:
        self.count = itertools.count()
        self.stated: list[str] = []
        self.href = f"{server.url}/B02.tif"

        def reply(request: Any) -> Any:
            data, headers = answer(next(self.count))
            self.stated += headers.values()
            if "Range" not in request.headers:
                return 200, headers, data
            first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
            body = data[int(first) : int(last) + 1]
            return 206, {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}", **headers}, body

        server.answer["/B02.tif"] = reply
        head_cache.cache_clear()

    def read(self) -> np.ndarray:
        ref = AssetRef(band="blue", key="B02", href=self.href, nodata=0)
        return read_on_grid(ref, None, GRID, "nearest", scene="S", access=QUICK)


STATED: dict[str, Callable[[int], dict[str, str]]] = {
    "two in turn": lambda n: {"ETag": f'"inode{n % 2}"'},
    "four at random": lambda n: {"ETag": f'"inode{(n * 7919 >> 3) % 4}"'},
    "another each time": lambda n: {"ETag": f'"{n}"'},
    "weak and strong": lambda n: {"ETag": ("W/" if n % 2 else "") + '"same"'},
    "only dates": lambda n: {"Last-Modified": f"Mon, 07 Aug 2023 10:00:0{n % 3} GMT"},
    "one has no ETag": lambda n: {"ETag": '"a"'} if n % 2 else {"Last-Modified": "Mon, 07 Aug 2023 10:00:00 GMT"},
}


@pytest.mark.parametrize("packing", [{}, PLAIN], ids=["deflate", "plain"])
@pytest.mark.parametrize("stated", STATED.values(), ids=STATED)
def test_the_same_bytes_under_several_versions_are_read(
    server: Any, tmp_path: Path, packing: dict[str, Any], stated: Callable[[int], dict[str, str]]
) -> None:
    data = write_raster(tmp_path / "B02.tif", GRID, pixels(1), **packing).read_bytes()
    farm = Farm(server, lambda n: (data, stated(n)))
    np.testing.assert_array_equal(farm.read(), pixels(1))
    assert len(set(farm.stated)) > 1, "the fault fired"
    assert _has_digest(farm.href, "sha256", hashlib.sha256(data).digest(), QUICK)
    assert not _has_other_digest(farm.href)


def _has_other_digest(href: str) -> bool:
    try:
        return _has_digest(href, "sha256", b"other", QUICK)
    except TransientError:
        return False


@pytest.mark.parametrize("packing", [{}, PLAIN], ids=["deflate", "plain"])
def test_other_bytes_under_another_version_are_never_mixed(
    server: Any, tmp_path: Path, packing: dict[str, Any]
) -> None:
    """Replaced between the head and the blocks: all of the new file. Two files in turn: an error, or all of one."""
    old = write_raster(tmp_path / "old.tif", GRID, pixels(1), **packing).read_bytes()
    new = write_raster(tmp_path / "new.tif", GRID, pixels(2), **packing).read_bytes()
    farm = Farm(server, lambda n: (old, {"ETag": '"old"'}) if n == 0 else (new, {"ETag": '"new"'}))
    np.testing.assert_array_equal(farm.read(), pixels(2))
    assert {'"old"', '"new"'} == set(farm.stated), "the fault fired"
    farm = Farm(server, lambda n: (old, {"ETag": '"old"'}) if n % 2 else (new, {"ETag": '"new"'}))
    got, said = None, ""
    try:
        got = farm.read()
    except AssetUnreadable as error:
        said = error.reason
    assert "replaced while it was read" in said or any(
        got is not None and np.array_equal(got, pixels(seed)) for seed in (1, 2)
    )
    farm = Farm(server, lambda n: (old if n == 0 else new, {"ETag": f'"{n}"'}))
    np.testing.assert_array_equal(farm.read(), pixels(2))


def test_an_audit_knows_a_farm_from_a_replacement(server: Any, tmp_path: Path) -> None:
    data = write_raster(tmp_path / "B02.tif", GRID, pixels(1)).read_bytes()
    farm = Farm(server, lambda n: (data, {"ETag": f'"inode{n % 2}"'}))
    size = len(data)
    both = {f'{size} "inode0"', f'{size} "inode1"'}
    assert set(file_versions(farm.href, QUICK, both) or ()) == both
    assert file_version(farm.href, QUICK) in both
    gone = {f'{size} "before"'}
    assert not (file_versions(farm.href, QUICK, gone) or set()).issuperset(gone)


def test_a_whole_file_of_another_version_is_an_error(server: Any, tmp_path: Path) -> None:
    data = write_raster(tmp_path / "B02.tif", GRID, pixels(1)).read_bytes()
    farm = Farm(server, lambda n: (data, {"ETag": '"old"' if n == 0 else '"new"'}))
    with pytest.raises(TransientError, match="replaced"):
        stream_whole(farm.href, QUICK, lambda _: None)


@pytest.mark.parametrize("rows", [250, 256, 7, 33])
@pytest.mark.parametrize("packing", [
    {"compress": "deflate"}, {"compress": "deflate", "predictor": 2}, {"compress": "none"}, {"compress": "lzw"},
    {"compress": "lzw", "predictor": 2}, {"compress": "zstd"}, {"compress": "packbits"}, {"ENDIANNESS": "BIG"},
    {"BIGTIFF": "YES"}, {"blockysize": 100}, {"compress": "lerc"},
], ids=str)  # fmt: skip
def test_strips_with_a_shorter_last_one_are_read_as_gdal_reads_them(
    server: Any, tmp_path: Path, rows: int, packing: dict[str, Any]
) -> None:
    import rasterio

    grid = GRID.window(0, 0, rows, 256)
    image = pixels(3)[:rows]
    path = tmp_path / "strips.tif"
    write_raster(path, grid, image, tiled=False, **{"blockxsize": 256, "blockysize": 16, **packing})
    with rasterio.open(path) as file:
        assert file.block_shapes[0][1] == 256
        assert not file.profile["tiled"]
    data = path.read_bytes()
    farm = Farm(server, lambda n: (data, {"ETag": '"one"'}))
    for href in (str(path), farm.href):
        ref = AssetRef(band="blue", key="B02", href=href, nodata=0)
        np.testing.assert_array_equal(read_on_grid(ref, grid, grid, "nearest", scene="S", access=QUICK), image)
        low = grid.window(rows - 5, 10, 5, 50)
        got = read_on_grid(ref, grid, low, "nearest", scene="S", access=QUICK)
        np.testing.assert_array_equal(got, image[-5:, 10:60])
