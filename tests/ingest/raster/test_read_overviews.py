"""Where overviews are asked for, pixels come from one that was checked; one that does not fit is not used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from ingest.raster.access import open_asset
from ingest.raster.overview import Overviews, choose_overview, find_overviews
from ingest.raster.ranges import find_range_file
from ingest.raster.read import read_on_grid
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (500, 610))
FACTORS = [2, 4, 8]


def pixels(dtype: str = "uint16") -> np.ndarray:
    rows, cols = np.mgrid[: GRID.height, : GRID.width]
    made = np.random.default_rng(5).integers(1, 60, GRID.shape) + 3 * rows + 5 * cols
    made = made.astype(dtype)
    made[40:200, 50:90] = 0
    return made


def write(
    path: Path, resampling: Resampling = Resampling.average, values: np.ndarray | None = None, **profile: Any
) -> Path:
    write_raster(path, GRID, pixels() if values is None else values, **profile)
    with rasterio.open(path, "r+") as file:
        file.build_overviews(FACTORS, resampling)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("overviews") / "data.tif")


def ref(path: Path, **fields: Any) -> AssetRef:
    return AssetRef("blue", "blue", str(path), **{"grid": GRID, "nodata": 0, "kind": "data", **fields})


def found_in(path: Path) -> Overviews:
    with open_asset(str(path)) as dataset:
        return find_overviews(dataset, find_range_file(dataset), GRID)


def test_an_overview_is_read_as_gdal_reads_it(file: Path) -> None:
    usable = found_in(file).usable
    assert [(one.factor, one.resampling) for one in usable] == [(2, "average"), (4, "average"), (8, "average")]
    for level, one in enumerate(usable):
        assert one.grid.bounds == pytest.approx(GRID.bounds), "an eighth of 610 pixels is 77 wider ones"
        with rasterio.open(file, OVERVIEW_LEVEL=level) as dataset:
            expected = dataset.read(1)
        got: np.ndarray = read_on_grid(ref(file), GRID, one.grid, "bilinear", overview=one.factor)
        np.testing.assert_array_equal(got, expected)
        corner = one.grid.window(7, 5, 20, 30)
        got = read_on_grid(ref(file), GRID, corner, "bilinear", overview=one.factor)
        np.testing.assert_array_equal(got, expected[7:27, 5:35])
    whole: np.ndarray = read_on_grid(ref(file), GRID, GRID.coarsen(4), "bilinear")
    coarse: np.ndarray = read_on_grid(ref(file), GRID, GRID.coarsen(4), "bilinear", overview=4)
    both = (whole > 0) & (coarse > 0)
    assert both.mean() > 0.85
    assert np.abs(whole.astype(int) - coarse)[both].mean() < 15, "153 pixels are a little narrower than 40 m"
    assert (whole != coarse).any(), "but not read in the same way"


@pytest.mark.parametrize(
    ("size", "factor"), [(10, 1), (19, 1), (20, 2), (39, 2), (40, 4), (79.95, 8), (80, 8), (900, 8)]
)
def test_the_coarsest_that_is_fine_enough_is_chosen(file: Path, size: float, factor: int) -> None:
    target = Grid(GRID.crs, (size, 0.0, 500_000.0, 0.0, -size, 5_000_000.0), (6, 6))
    chosen = choose_overview(found_in(file).usable, GRID, target)
    assert (chosen.factor if chosen else 1) == factor
    made: np.ndarray = read_on_grid(ref(file), None, target, "bilinear", overview="any")
    named: np.ndarray = read_on_grid(ref(file), GRID, target, "bilinear", overview=chosen.factor if chosen else None)
    np.testing.assert_array_equal(made, named)


def nonsense(path: Path, dtype: str = "uint16") -> Path:
    """Pixels whose overviews hold something else."""
    write(path, values=np.full(GRID.shape, 99, dtype))
    with rasterio.open(path, "r+") as dataset:
        dataset.write(pixels(dtype) if dtype == "uint16" else np.full(GRID.shape, 4, dtype), 1)
    return path


def test_classes_and_backscatter_never_come_from_overviews(tmp_path: Path) -> None:
    target = GRID.coarsen(4)
    data = nonsense(tmp_path / "data.tif")
    assert (read_on_grid(ref(data), GRID, target, "bilinear", overview="any") == 99).all()
    assert (read_on_grid(ref(data), GRID, target, "bilinear") != 99).any()
    classes = nonsense(tmp_path / "scl.tif", "uint8")
    asset = ref(classes, kind="class")
    assert (read_on_grid(asset, GRID, target, "bilinear", stored="uint8", overview="any") == 4).all()
    radar = nonsense(tmp_path / "vv.tif", "float32")
    asset = ref(radar)
    assert (read_on_grid(asset, GRID, target, "bilinear", stored="float32", overview="any") == 4).all()
    other = ref(data, nodata=7)  # in an average, a pixel of 7 has had a weight
    assert (read_on_grid(other, GRID, target, "bilinear", overview="any") != 99).any()


def edited(path: Path, target: Path, change: Callable[[bytearray, list[int]], None]) -> Path:
    """A copy whose directories, which begin at the given bytes, were changed."""
    data = bytearray(path.read_bytes())
    at, places = struct.unpack_from("<I", data, 4)[0], []
    while at:
        places.append(at)
        (count,) = struct.unpack_from("<H", data, at)
        (at,) = struct.unpack_from("<I", data, at + 2 + 12 * count)
    change(data, places)
    target.write_bytes(data)
    return target


def put(data: bytearray, at: int, tag: int, value: int) -> None:
    """Set the value of a tag of one number, or the place of one of several."""
    (count,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into(
                "<H" if struct.unpack_from("<H", data, entry + 2)[0] == 3 else "<I", data, entry + 8, value
            )
            return
    raise KeyError(tag)


def test_overviews_that_do_not_fit_are_not_used(tmp_path: Path, file: Path) -> None:
    def state_nodata(data: bytearray, places: list[int]) -> None:
        (count,) = struct.unpack_from("<H", data, places[1])
        entries = range(places[1] + 2, places[1] + 2 + 12 * count, 12)
        entry = next(e for e in entries if struct.unpack_from("<H", data, e)[0] == 42113)
        data[entry + 8 : entry + 10] = b"7\0"

    cases = {
        "wide": (
            edited(file, tmp_path / "wide.tif", lambda d, p: put(d, p[1], 256, 300)),
            "1/2: it has 250×300 pixels",
        ),
        "tiles": (edited(file, tmp_path / "tiles.tif", lambda d, p: put(d, p[1], 322, 40)), "1/2: its blocks cannot"),
        "nodata": (edited(file, tmp_path / "nodata.tif", state_nodata), "1/2: it states nodata 7"),
    }
    for name, (path, reason) in cases.items():
        found = found_in(path)
        assert reason in found.refusal, name
        assert 2 not in [one.factor for one in found.usable], name
        assert {4, 8} <= {one.factor for one in found.usable}, name
        with pytest.raises(AssetUnreadable, match=r"not the one that was planned: it had an overview at 1/2, now 1/4"):
            read_on_grid(ref(path), GRID, GRID.coarsen(2), "bilinear", overview=2)
    whole = {
        "no nodata": (write(tmp_path / "none.tif", nodata=None), "states no nodata value, expected 0"),
        "other nodata": (write(tmp_path / "seven.tif", nodata=7), "states nodata 7, expected 0"),
        "big endian": (write(tmp_path / "big.tif", endianness="BIG"), "cannot be read without GDAL"),
        "jpeg": (write(tmp_path / "jpeg.tif", values=pixels("uint8"), compress="JPEG"), "1/8: its blocks cannot"),
        "none": (write_raster(tmp_path / "bare.tif", GRID, pixels()), "it has none"),
    }
    for name, (path, reason) in whole.items():
        found = found_in(path)
        assert reason in found.refusal, (name, found.refusal)
        assert found.usable == (), name
        read_on_grid(ref(path), GRID, GRID.coarsen(2), "bilinear", overview="any")


def test_a_block_elsewhere_than_stated_and_a_loop_are_refused(tmp_path: Path, file: Path) -> None:
    def loop(data: bytearray, places: list[int]) -> None:
        (count,) = struct.unpack_from("<H", data, places[-1])
        struct.pack_into("<I", data, places[-1] + 2 + 12 * count, places[1])

    looped = found_in(edited(file, tmp_path / "loop.tif", loop))
    assert looped.usable == ()
    assert looped.refusal == "their directories cannot be read without GDAL"
    masked = tmp_path / "masked.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_raster(masked, GRID, pixels())
        with rasterio.open(masked, "r+") as dataset:
            dataset.write_mask(np.ones(GRID.shape, bool))
            dataset.build_overviews(FACTORS, Resampling.average)
    assert found_in(masked).refusal == "the file has a mask"


def test_the_resampling_is_what_the_file_states(tmp_path: Path) -> None:
    for kind in (Resampling.nearest, Resampling.cubic):
        found = found_in(write(tmp_path / f"{kind.name}.tif", kind))
        assert {one.resampling for one in found.usable} == {kind.name}
