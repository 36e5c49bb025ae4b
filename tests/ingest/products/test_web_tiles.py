"""Tiles of a web map hold the nearest pixel of the map, as GDAL warps it, in its colours."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rasterio.transform import from_bounds
from rasterio.warp import Resampling, reproject

from ingest.products.layer import ClassLayer
from ingest.products.web_tiles import _array_on_disk, write_pmtiles
from zarr_store.errors import NoSpace, NothingFound
from zarr_store.grid import Grid

pytest.importorskip("pmtiles")
GRID = Grid("EPSG:32633", (10.0, 0.0, 560_000.0, 0.0, -10.0, 5_080_000.0), (600, 500))
COLOURS = ((31, 95, 191), (27, 107, 47), (196, 40, 27))
HALF = np.pi * 6_378_137.0


def layer_of(classes: np.ndarray) -> ClassLayer:
    return ClassLayer(GRID, ("water", "forest", "town"), COLOURS, 255, lambda rows: classes[rows])


def test_tiles_are_the_nearest_pixels(tmp_path: Path) -> None:
    from pmtiles.reader import MmapSource, Reader, all_tiles

    rows, columns = np.mgrid[0:600, 0:500]
    classes = ((rows // 40 + columns // 25) % 3).astype(np.uint8)
    classes[:200, :200] = 255
    done = write_pmtiles(layer_of(classes), tmp_path / "map.pmtiles")
    write_pmtiles(layer_of(classes), tmp_path / "again" / "map.pmtiles")
    assert (tmp_path / "map.pmtiles").read_bytes() == (tmp_path / "again" / "map.pmtiles").read_bytes()
    with (tmp_path / "map.pmtiles").open("rb") as file:
        source = MmapSource(file)
        header, tiles = Reader(source).header(), dict(all_tiles(source))
    assert len(tiles) == done["tiles"]
    # pixels of zoom 14 are 6.6 m at 46° north, those of zoom 13 would be larger than those of the map
    assert [header["min_zoom"], header["max_zoom"]] == done["zooms"]
    assert done["zooms"][1] == 14
    compared = 0
    for (z, x, y), data in tiles.items():
        if z not in (14, 12):
            continue
        size = 2 * HALF / 2**z
        bounds = (-HALF + x * size, HALF - (y + 1) * size, -HALF + (x + 1) * size, HALF - y * size)
        expected = np.full((256, 256), 255, np.uint8)
        reproject(classes, expected, src_transform=GRID.affine, src_crs=GRID.crs, src_nodata=255, dst_nodata=255,
                  dst_transform=from_bounds(*bounds, 256, 256), dst_crs="EPSG:3857", resampling=Resampling.nearest,
                  tolerance=0)  # fmt: skip
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
        wanted = np.concatenate([np.array([*COLOURS, *[(0, 0, 0)] * 253], np.uint8)[expected],
                                 np.where(expected == 255, 0, 255).astype(np.uint8)[..., None]], axis=-1)  # fmt: skip
        # half a pixel of a coarser zoom lies elsewhere: it is a pixel of the finest zoom, not the middle of four
        least = 0.999 if z == 14 else 0.9
        assert (image == wanted).all(axis=-1).mean() >= least, (z, x, y)
        compared += 1
    assert compared > 4


def test_a_map_without_a_class_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(NothingFound, match="no tile"):
        write_pmtiles(layer_of(np.full(GRID.shape, 255, np.uint8)), tmp_path / "map.pmtiles")
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk_is_taken_before_pixels_are_written(tmp_path: Path) -> None:
    """A write to the map of a sparse file on a full disk ends the process by a signal."""
    array = _array_on_disk(tmp_path / "a", np.uint16, (700, 1000))
    assert array.shape == (700, 1000)
    assert (tmp_path / "a").stat().st_blocks * 512 >= array.nbytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            write_pmtiles(layer_of(np.zeros(GRID.shape, np.uint8)), tmp_path / "map.pmtiles")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
