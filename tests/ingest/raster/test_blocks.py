"""Blocks decoded without GDAL are what GDAL decodes, in every packing; damage is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from ingest.raster.access import open_asset
from ingest.raster.blocks import BlockReader
from ingest.raster.ranges import Head, RangeFile, find_range_file
from zarr_store.errors import AssetUnreadable

SHAPE = (150, 210)


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    profile = {"driver": "GTiff", "height": pixels.shape[0], "width": pixels.shape[1], "count": 1}
    profile |= {"dtype": pixels.dtype, "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", **(profile | options)) as target:
        target.write(pixels, 1)
    return path


def scene(dtype: str) -> np.ndarray:
    smooth: np.ndarray = np.random.default_rng(4).normal(0, 3, SHAPE).cumsum(axis=1) + 900
    pixels: np.ndarray = np.abs(smooth) % 250 if dtype == "uint8" else np.abs(smooth)
    return pixels.astype(dtype)


TILED = {"tiled": True, "blockxsize": 64, "blockysize": 32}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("compress", ["none", "deflate", "zstd"])
@pytest.mark.parametrize("predicted", [False, True])
def test_every_packing_is_what_gdal_reads(tmp_path: Path, dtype: str, compress: str, predicted: bool) -> None:
    options: dict[str, Any] = {} if compress == "none" else {"compress": compress}
    if predicted and compress != "none":
        options["predictor"] = 3 if dtype == "float32" else 2
    path = write(tmp_path / "a.tif", scene(dtype), **TILED, **options)
    with rasterio.open(path) as plain, open_asset(str(path)) as dataset:
        file = find_range_file(dataset)
        assert file is not None
        reader = BlockReader.of(dataset, file)
        assert reader is not None, "GDAL would have decoded it"
        for row, col, height, width in ((0, 0, *SHAPE), (32, 64, 64, 128), (5, 7, 90, 111), (149, 209, 1, 1)):
            expected = plain.read(1, window=Window(col, row, width, height))
            frame = np.full((height + 2, width + 2), 7, dtype)
            view = frame[1:-1, 1:-1]
            assert reader.read(row, col, height, width, view) is view
            np.testing.assert_array_equal(view, expected)
            assert (frame[0] == 7).all()
            assert (frame[:, -1] == 7).all()
            np.testing.assert_array_equal(reader.read(row, col, height, width), expected)


@pytest.mark.parametrize(
    "options",
    [{"compress": "deflate"}, {**TILED, "compress": "jpeg"}, {**TILED, "compress": "lzw"}, {**TILED, "nbits": 4},
     {**TILED, "endianness": "big"}],
    ids=["strips", "jpeg", "lzw", "four bits", "big-endian"],
)  # fmt: skip
def test_what_is_uncommon_is_left_to_gdal(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.tif", scene("uint8") % 16, **options)
    data = path.read_bytes()
    head = Head(str(path), data[:64], len(data), None, True, 0.0)
    file = RangeFile(head, lambda span: data[slice(*span)], remote=False)
    with rasterio.open(path) as dataset:
        assert BlockReader.of(dataset, file) is None


def test_a_block_that_a_sparse_file_leaves_out_has_no_data(tmp_path: Path) -> None:
    pixels = scene("uint16")
    pixels[:64, :128] = 0
    path = write(tmp_path / "a.tif", pixels, **TILED, compress="deflate", sparse_ok=True, nodata=0)
    with open_asset(str(path)) as dataset:
        assert dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1) is None, "the file is not sparse"
        file = find_range_file(dataset)
        assert file is not None
        reader = BlockReader.of(dataset, file)
        assert reader is not None
        np.testing.assert_array_equal(reader.read(0, 0, *SHAPE), pixels)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_block_is_an_error_and_names_the_block(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.tif", scene("uint16"), **TILED, compress="deflate", predictor=2)
    with rasterio.open(path) as dataset:
        start = int(dataset.get_tag_item("BLOCK_OFFSET_1_2", "TIFF", bidx=1))
        size = int(dataset.get_tag_item("BLOCK_SIZE_1_2", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[start + size // 2] ^= 0x10
    else:
        del data[start + size // 2 :]
    path.write_bytes(bytes(data))
    fired = []

    def read() -> None:
        with open_asset(str(path), scene="S", asset="red") as dataset:
            file = find_range_file(dataset)
            assert file is not None
            reader = BlockReader.of(dataset, file)
            assert reader is not None
            fired.append(reader)
            reader.read(64, 64, 32, 64)

    with pytest.raises(AssetUnreadable, match="block at row 64, column 64 is damaged"):
        read()
    assert fired, "the file was refused before the block was read"
