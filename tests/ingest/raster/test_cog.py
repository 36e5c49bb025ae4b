from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.errors
from rasterio._err import CPLE_AppDefinedError

from ingest.raster.cog import CogWriter, write_cog
from zarr_store.errors import AccessError, InvalidInput, NoSpace
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_000.0), (300, 420))


def classes() -> np.ndarray:
    y, x = np.mgrid[:300, :420]
    return ((y // 50 + x // 70) % 4).astype(np.uint8)


def test_class_map_keeps_pixels_colours_and_names(tmp_path: Path) -> None:
    names = {0: "no data", 1: "water", 2: "forest & wood", 3: "town"}
    colours = {1: (0, 0, 255), 2: (0, 128, 0), 3: (200, 0, 0)}
    path = write_cog(tmp_path / "map.tif", classes(), GRID, nodata=0, colours=colours, class_names=names, block_px=128)
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(1), classes())
        assert file.nodata == 0
        assert file.crs.to_epsg() == 32633
        assert file.transform == GRID.affine
        assert file.colormap(1)[3] == (200, 0, 0, 255)
        assert file.tags(1)["class_2"] == "forest & wood"
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.block_shapes == [(128, 128)]
        assert file.overviews(1) == [2, 4]
    # GDAL's own form of class names, as gdalinfo and QGIS list them
    assert "<Category>forest &amp; wood</Category>" in (tmp_path / "map.tif.aux.xml").read_text()


def test_class_overviews_hold_only_classes(tmp_path: Path) -> None:
    y, x = np.mgrid[:300, :420]
    noisy = np.where((y % 4 == 0) & (x % 4 == 0), 9, 2).astype(np.uint8)
    path = write_cog(tmp_path / "map.tif", noisy, GRID, colours={2: (1, 1, 1), 9: (2, 2, 2)}, block_px=128)
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read(1))) <= {2, 9}
        assert (file.read(1) == 2).mean() > 0.99  # the commonest of four, not the first


def test_data_overviews_average_without_nodata(tmp_path: Path) -> None:
    data = np.full((300, 420), 1000, np.uint16)
    data[::2, ::2] = 0
    path = write_cog(tmp_path / "data.tif", data, GRID, nodata=0, block_px=128)
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read(1))) == {1000}


def test_blocks_in_any_order_equal_the_array_and_the_bytes(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 9000, (2, 300, 420), dtype=np.uint16)
    whole = write_cog(tmp_path / "whole.tif", data, GRID, nodata=0, descriptions=("red", "nir"))
    boxes = [(r, c) for r in range(0, 300, 77) for c in range(0, 420, 111)][::-1]
    parts = write_cog(
        tmp_path / "parts.tif",
        ((r, c, data[:, r : r + 77, c : c + 111]) for r, c in boxes),
        GRID,
        dtype="uint16",
        count=2,
        nodata=0,
        descriptions=("red", "nir"),
    )
    assert whole.read_bytes() == parts.read_bytes()
    with rasterio.open(parts) as file:
        assert file.descriptions == ("red", "nir")
        assert np.array_equal(file.read(), data)


def test_unwritten_pixels_are_nodata(tmp_path: Path) -> None:
    path = write_cog(tmp_path / "a.tif", [(0, 0, np.ones((10, 10), np.float32))], GRID, dtype="float32", nodata=-32768)
    with rasterio.open(path) as file:
        assert file.read(1)[20, 20] == -32768
        assert file.read(1)[5, 5] == 1


def test_failure_leaves_the_old_file_and_no_remains(tmp_path: Path) -> None:
    path = write_cog(tmp_path / "map.tif", classes(), GRID)
    before = path.read_bytes()

    def broken():
        yield 0, 0, classes()[:50]
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_cog(path, broken(), GRID, dtype="uint8")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"]


def test_replacing_a_class_map_drops_its_names(tmp_path: Path) -> None:
    path = write_cog(tmp_path / "map.tif", classes(), GRID, class_names={1: "water"})
    write_cog(path, classes().astype(np.uint16), GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": np.zeros((3, 3), np.uint8)}, "shape"),
        ({"data": classes().astype(np.int16), "class_names": {1: "a"}}, "uint8"),
        ({"data": classes(), "block_px": 100}, "multiple of 16"),
        ({"data": [], "dtype": None}, "dtype must be given"),
        ({"data": [(290, 0, classes()[:20])], "dtype": "uint8"}, "leaves the grid"),
        ({"data": [(0, 0, classes().astype(np.int16))], "dtype": "uint8"}, "expected blocks"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arguments: dict, words: str) -> None:
    data = arguments.pop("data")
    with pytest.raises(InvalidInput, match=words):
        write_cog(tmp_path / "x.tif", data, GRID, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise rasterio.errors.RasterioIOError("Write failed")

    monkeypatch.setattr("ingest.raster.cog.rasterio.shutil.copy", full)
    with pytest.raises(AccessError, match="check the folder"):
        write_cog(tmp_path / "x.tif", classes(), GRID)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            write_cog(tmp_path / "x.tif", classes(), GRID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    class Usage:
        free = 1000

    monkeypatch.setattr("ingest.raster.cog.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(NoSpace, match="1000 bytes are free"):
        write_cog(tmp_path / "x.tif", classes(), GRID)
    assert not list(tmp_path.iterdir())


NOISE = np.random.default_rng(0).integers(1, 60_000, (1024, 1024)).astype(np.uint16)
"""Two megabytes that no compression makes smaller."""
NOISE_GRID = Grid("EPSG:32633", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_000.0), (1024, 1024))


@pytest.mark.parametrize("limit", [1_900_000, 2_240_000, 2_300_000])
def test_a_limit_of_some_megabytes_is_named(tmp_path: Path, limit: int) -> None:
    """The first limit stops the blocks, the others only the COG with its overviews, in `close`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            write_cog(tmp_path / "x.tif", NOISE, NOISE_GRID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_the_cog_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDAL raises an error that is none of rasterio's, and has removed its file when the room is measured."""
    fired = []

    def full(*_: object, **__: object) -> None:
        fired.append(1)
        raise CPLE_AppDefinedError(3, 1, "TIFFAppendToStrip:Seek error at scanline 1024")

    class Usage:
        free = 2_000_000

    monkeypatch.setattr("ingest.raster.cog.rasterio.shutil.copy", full)
    with pytest.raises(AccessError, match=r"Seek error .*check the folder"):
        write_cog(tmp_path / "x.tif", NOISE, NOISE_GRID)
    monkeypatch.setattr("ingest.raster.cog.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(NoSpace, match="2000000 are free"):
        write_cog(tmp_path / "x.tif", NOISE, NOISE_GRID)
    assert len(fired) == 2
    assert not list(tmp_path.iterdir())


def test_memory_follows_the_block_not_the_map(tmp_path: Path) -> None:
    # 128 MB of pixels through blocks of 8 MB, under a limit that the whole would break
    code = f"""
import resource, numpy as np, rasterio
from ingest.raster.cog import write_cog
from zarr_store.grid import Grid
grid = Grid("EPSG:32633", (10., 0., 0., 0., -10., 0.), (8192, 8192))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blocks = ((r, 0, np.full((512, 8192), r, np.uint16)) for r in range(0, 8192, 512))
with rasterio.Env(GDAL_CACHEMAX=32 * 2**20):
    write_cog({str(tmp_path / "big.tif")!r}, blocks, grid, dtype="uint16")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert int(done.stdout) < 90, done.stdout


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    one = CogWriter(tmp_path / "m.tif", GRID, dtype="uint8")
    two = CogWriter(tmp_path / "m.tif", GRID, dtype="uint8")
    one.write(0, 0, classes())
    two.write(0, 0, classes())
    one.close()
    two.close()
    with rasterio.open(tmp_path / "m.tif") as file:
        assert np.array_equal(file.read(1), classes())
    assert [p.name for p in tmp_path.iterdir()] == ["m.tif"]
