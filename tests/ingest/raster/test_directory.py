"""The tags of a TIFF are read strictly: known ones are told, anything else is left to GDAL, and lies are errors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from ingest.raster.access import open_asset, with_raster
from ingest.raster.blocks import BlockReader, ContradictionError, Packing
from ingest.raster.directory import Directory
from ingest.raster.gdal_read import WarnedError, read_window
from ingest.raster.limits import Access
from ingest.raster.ranges import BlockPlaceError, Head, RangeFile, block_span
from ingest.raster.read import read_on_grid
from ingest.scenes.scene import AssetRef
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

from ..fuzz_files import SHAPE, TILED, cut_blocks, good_files, hostile_files, scene, tiff, tiles, written


def file_of(data: bytes, head: int = 16384, asked: list[Any] | None = None) -> RangeFile:
    def get(span: tuple[int, int]) -> bytes:
        if asked is not None:
            asked.append(span)
        return data[slice(*span)]

    return RangeFile(Head("x", data[:head], len(data), None, True, 0.0), get, remote=False)


def read(path: Path) -> np.ndarray:
    access = Access(attempts=1)
    grid = with_raster(str(path), lambda raster: raster.header.grid, scene="S", asset="a", access=access)
    return read_on_grid(AssetRef(key="a", href=str(path), band="a"), None, grid, "nearest", scene="S", access=access)


def test_the_tags_of_plain_files_are_told() -> None:
    told = Directory.of(file_of(good_files()["tiles-zstd-uint16-2"]))
    assert told is not None
    assert (told.shape, told.block, told.dtype, told.compression, told.predictor) == (
        SHAPE, (64, 64), "uint16", "ZSTD", 2,
    )  # fmt: skip
    assert Directory.of(file_of(good_files()["hand-big"])) is not None
    for name in ("tiles-deflate-float32-3", "tiles-zstd-int16-2", "big-none", "cog-deflate", "overviews", "nodata"):
        assert Directory.of(file_of(good_files()[name])) is not None, f"{name} is decoded by GDAL, and slower"


@pytest.mark.parametrize(
    "tags",
    [{317: 0}, {317: 4}, {317: [2, 2]}, {317: (1, b"\2")}, {317: (4, b"\0\0\0\0")}, {266: 2}, {274: 2}, {277: 2},
     {284: 2},
     {258: 12}, {258: [16, 16]}, {262: 0}, {262: 2}, {338: 1}, {339: 4}, {339: 3}, {32998: 2}, {347: 1}, {278: 64},
     {330: 8}, {254: 1}, {65000: 1}, {324: [8, 8]}, {325: None}, {322: 0}, {259: 5}, {259: 7}, {317: 2}],
    ids=str,
)  # fmt: skip
def test_any_other_tag_type_count_or_value_is_left_to_gdal(tags: dict[int, Any]) -> None:
    blocks = tiles(scene("uint16"))
    assert Directory.of(file_of(tiff(blocks, {}))) is not None
    assert Directory.of(file_of(tiff(blocks, tags))) is None


def test_what_is_out_of_order_or_said_twice_is_left_to_gdal() -> None:
    for name in ("predictor-twice", "predictor-behind-all", "big-many-tags", "directory-nowhere", "counts-huge"):
        assert Directory.of(file_of(hostile_files()[name])) is None
    assert Directory.of(file_of(good_files()["mm-zstd"])) is None


def test_a_predictor_that_gdal_refuses_gives_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(hostile_files()["predictor-0"])
    with pytest.raises(AssetUnreadable):
        read(tmp_path / "a.tif")


def test_a_file_that_gdal_reads_otherwise_is_an_error(tmp_path: Path) -> None:
    """The bytes are those of one file and the dataset is another: as a parser that is fooled would see it."""
    (tmp_path / "a.tif").write_bytes(good_files()["tiles-zstd-uint16-1"])
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert Packing.of(dataset, file_of(good_files()["tiles-zstd-uint16-1"])) is not None
        for other in ("tiles-zstd-uint16-2", "tiles-deflate-uint16-1", "tiles-zstd-int16-1"):
            with pytest.raises(ContradictionError, match="GDAL reads"):
                BlockReader.of(dataset, file_of(good_files()[other]))


def test_reading_the_tags_costs_no_request_and_little_time() -> None:
    asked: list[Any] = []
    file = file_of(written("uint16", driver="COG", blocksize=128, compress="deflate"), asked=asked)
    begun = time.process_time()
    for _ in range(100):
        directory = Directory.of(file)
        assert directory is not None
        assert directory.spans(file) is not None
    assert not asked
    assert (time.process_time() - begun) / 100 < 0.005


def test_a_block_of_absurd_size_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(hostile_files()["sizes-huge"])
    with rasterio.open(tmp_path / "a.tif") as dataset, pytest.raises(BlockPlaceError, match="are refused"):
        block_span(dataset, 0, 0)


def test_pixels_that_gdal_makes_up_with_a_warning_are_an_error(tmp_path: Path) -> None:
    whole = written("uint8", **TILED, compress="jpeg")
    (tmp_path / "a.tif").write_bytes(cut_blocks(whole))
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.read(1).shape == SHAPE, "GDAL reads it"
    with rasterio.open(tmp_path / "a.tif") as dataset, pytest.raises(WarnedError, match=r"(?i)premature end"):
        read_window(dataset, window=((64, 128), (64, 128)))
    with pytest.raises(AssetUnreadable, match=r"(?i)premature end"):
        read(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(whole)
    assert read(tmp_path / "b.tif").any()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("share", [0.99, 0.9, 0.5])
def test_a_jpeg_2000_that_is_cut_short_is_an_error_and_never_zeros(tmp_path: Path, share: float) -> None:
    """GDAL decodes several tiles in threads and loses their errors, unless it is told not to."""
    whole = good_files()["jp2-uint16"]
    path = tmp_path / "a.jp2"
    path.write_bytes(whole[: int(len(whole) * share)])
    np.save(tmp_path / "true.npy", scene("uint16"))
    alone = "import sys, numpy, rasterio; print((rasterio.open(sys.argv[1]).read(1) != numpy.load(sys.argv[2])).sum())"
    # in a process of its own, which has read nothing with terrashard
    command = [sys.executable, "-c", alone, str(path), str(tmp_path / "true.npy")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(told.stdout) > 0, "GDAL on its own gives pixels that are not those of the file"
    with pytest.raises(AssetUnreadable):
        read(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read(path), scene("uint16"))


@pytest.mark.parametrize("name", ["mm-deflate", "strips-deflate"])
def test_damaged_deflated_blocks_that_gdal_reads_all_the_same_are_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tif"
    good = good_files()[name]
    path.write_bytes(good)
    np.testing.assert_array_equal(read(path), scene("uint16"))
    with open_asset(str(path)) as dataset:
        start, stop = block_span(dataset, 0, 0) or (0, 0)
    fired = 0
    for at in range(start + 20, stop - 20, max(1, (stop - start) // 60)):
        path.unlink()
        path.write_bytes(good[:at] + b"\xff\xff" + good[at + 2 :])
        with rasterio.open(path) as dataset, contextlib.suppress(rasterio.errors.RasterioError):
            fired += bool((dataset.read(1) != scene("uint16")).any())
        with pytest.raises(AssetUnreadable):
            read(path)
    assert fired, "GDAL refused each, too"


@pytest.mark.parametrize("place", [(1e-309, 0.0), (10.0, 1e300), (float("nan"), 0.0), (1e-3, 1e9)], ids=str)
def test_places_that_no_pixel_has_are_errors(tmp_path: Path, place: tuple[float, float]) -> None:
    size, left = place
    transform = rasterio.Affine(size, 0, left, 0, -size, 0)
    (tmp_path / "a.tif").write_bytes(written("uint16", **TILED, transform=transform))
    with pytest.raises(AssetUnreadable, match="place that no pixel has"):
        read(tmp_path / "a.tif")


def test_places_of_true_files_are_fine(tmp_path: Path) -> None:
    for size, left, top in ((10, 5e5, 9e6), (0.01, 0, 10), (1e5, -2e7, 2e7)):
        (tmp_path / "a.tif").write_bytes(written("uint16", transform=rasterio.Affine(size, 0, left, 0, -size, top)))
        with open_asset(str(tmp_path / "a.tif")) as dataset:
            from ingest.raster.header import grid_of

            assert isinstance(grid_of(dataset), Grid)
