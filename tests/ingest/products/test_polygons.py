"""Polygons of a map, against GDAL's polygons of the whole map at once, and as other libraries read the files."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely
from pyogrio.errors import DataSourceError, FeatureError
from rasterio.features import rasterize
from scipy import ndimage

from ingest.products import layer as layers
from ingest.products.layer import ClassLayer
from ingest.products.outlines import draw_patches, simplify
from ingest.products.patches import find_patches
from ingest.products.vector_file import write_polygons
from zarr_store.errors import AccessError, InvalidInput, NoSpace, NothingFound
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (70, 50))
NAMES = ("water", "forest", "town")


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "STRIP", 16)


def layer_of(classes: np.ndarray, grid: Grid = GRID) -> ClassLayer:
    confidence = np.where(classes == 255, 255, 40 + 10 * classes).astype(np.uint8)
    return ClassLayer(grid, NAMES, ((0, 0, 255), (0, 255, 0), (255, 0, 0)), 255,
                      lambda rows: classes[rows], lambda rows: confidence[rows])  # fmt: skip


def classes_of(seed: int, smooth: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(3, *GRID.shape))
    classes = ndimage.gaussian_filter(noise, (0, smooth, smooth)).argmax(axis=0).astype(np.uint8)
    classes[20:26, 10:30] = 255
    return classes


def drawn_of(layer: ClassLayer, **options: Any) -> tuple[Any, list[Any]]:
    patches = find_patches(layer, **options)
    parts = list(draw_patches(layer, patches))
    return patches, parts


def gdal_shapes(classes: np.ndarray, folder: Path) -> list[tuple[dict[str, Any], int]]:
    """GDAL's polygons, made in another process: they need a driver that terrashard switches off in this one."""
    np.save(folder / "classes.npy", classes)
    code = (
        "import json, sys, numpy; from affine import Affine; from rasterio.features import shapes; "
        "a = numpy.load(sys.argv[1]); t = Affine(*json.loads(sys.argv[2])); "
        "print(json.dumps([(s, int(v)) for s, v in shapes(a, mask=a < 3, connectivity=4, transform=t)]))"
    )
    place = json.dumps(list(GRID.affine)[:6])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "classes.npy"), place], check=True, capture_output=True, text=True
    )
    return [(shape, value) for shape, value in json.loads(done.stdout)]


@pytest.mark.parametrize(("seed", "smooth"), [(0, 0.0), (1, 1.0), (2, 4.0)])
def test_patches_across_strips_are_one_polygon_as_gdal_draws_the_whole(
    seed: int, smooth: float, tmp_path: Path
) -> None:
    classes = classes_of(seed, smooth)
    patches, parts = drawn_of(layer_of(classes))
    made = {(int(patches.value[p]), shapely.normalize(shape).wkb)
            for part in parts for p, shape in zip(part.patch, part.shape, strict=True)}  # fmt: skip
    whole = [(value, shapely.normalize(shapely.make_valid(shapely.geometry.shape(s), method="structure")))
             for s, value in gdal_shapes(classes, tmp_path)]  # fmt: skip
    assert made == {(value, shapely.normalize(shapely.simplify(shape, 0)).wkb) for value, shape in whole}
    assert len(patches) == len(whole) == sum(len(part.patch) for part in parts)
    assert patches.area.sum() == 100.0 * (classes < 3).sum()
    by_class = [shapely.area(np.array([s for v, s in whole if v == k], object)).sum() for k in range(3)]
    assert [patches.area[patches.value == k].sum() for k in range(3)] == pytest.approx(by_class)
    assert patches.confidence.tolist() == pytest.approx((40 + 10 * patches.value).tolist())


def test_small_patches_go_into_a_neighbour() -> None:
    classes = classes_of(3, 1.0)
    least = 1500.0  # 15 pixels
    raw, _ = drawn_of(layer_of(classes))
    patches, parts = drawn_of(layer_of(classes), min_area=least)
    assert 0 < len(patches) < len(raw) / 4
    assert patches.merged > 0
    assert patches.area.min() >= least
    assert patches.area.sum() == raw.area.sum()
    shapes_in_order = [(shape, int(patches.value[p])) for part in parts
                       for p, shape in zip(part.patch, part.shape, strict=True)]  # fmt: skip
    burnt = rasterize(shapes_in_order, GRID.shape, fill=255, transform=GRID.affine, dtype="uint8")
    np.testing.assert_array_equal(burnt == 255, classes == 255)
    for k in range(3):
        labels, count = ndimage.label(classes == k)
        sizes = 100.0 * np.bincount(labels.ravel(), minlength=count + 1)
        large = (sizes >= least)[labels] & (labels > 0)
        assert (burnt[large] == k).all(), "a patch that is large enough keeps its class"
        _, count = ndimage.label(burnt == k)
        assert count == (patches.value == k).sum(), "patches of one class that touch are one"


def test_an_island_in_no_data_stays() -> None:
    classes = np.full(GRID.shape, 255, np.uint8)
    classes[15:17, 5:7] = 1  # across a strip
    patches, parts = drawn_of(layer_of(classes), min_area=1e6)
    assert (len(patches), patches.merged, patches.area.tolist()) == (1, 0, [400.0])
    assert parts[0].shape[0].equals(shapely.box(500_050, 4_999_830, 500_070, 4_999_850))


def test_simplified_neighbours_keep_their_common_border() -> None:
    layer = layer_of(classes_of(4, 3.0))
    _, parts = drawn_of(layer, min_area=1500)
    before = np.concatenate([part.shape for part in parts])
    after = np.concatenate([part.shape for part in simplify(parts, 25.0, 10.0)])
    assert shapely.get_num_coordinates(after).sum() < shapely.get_num_coordinates(before).sum() * 0.6
    assert shapely.coverage_is_valid(after)
    assert shapely.is_valid(after).all()
    overlap = shapely.area(after).sum() - shapely.area(shapely.union_all(after))
    assert abs(overlap) < 1e-3
    # each alone, borders would move apart
    assert not shapely.coverage_is_valid(shapely.simplify(before, 25.0))


@pytest.mark.parametrize("suffix", [".parquet", ".geojson", ".gpkg"])
def test_files_hold_the_same_polygons_and_have_equal_bytes(tmp_path: Path, suffix: str) -> None:
    layer = layer_of(classes_of(5, 2.0))
    first, again = tmp_path / f"a{suffix}", tmp_path / "again" / f"a{suffix}"
    done = write_polygons(layer, first, min_area=500)
    write_polygons(layer, again, min_area=500)
    assert first.read_bytes() == again.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    patches, parts = drawn_of(layer, min_area=500)
    shape = np.concatenate([part.shape for part in parts])
    order = np.concatenate([part.patch for part in parts])
    assert done["polygons"] == len(patches)
    if suffix == ".parquet":
        table = pq.read_table(first)
        geo = json.loads(pq.read_metadata(first).metadata[b"geo"])
        column = geo["columns"]["geometry"]
        assert (geo["version"], column["encoding"], column["crs"]["id"]["code"]) == ("1.1.0", "WKB", 32633)
        assert column["bbox"] == shapely.total_bounds(shape).tolist()
        read = shapely.from_wkb(table["geometry"].to_pylist())
        assert table["bbox"][0].as_py()["xmin"] == shapely.bounds(read[0])[0]
        assert shapely.is_ccw(shapely.get_exterior_ring(read)).all()
        fields = {name: table[name].to_pylist() for name in ("class", "name", "area_m2", "confidence")}
    else:
        about, _, wkb, columns = pyogrio.raw.read(first)
        read = shapely.from_wkb(wkb)
        fields = {name: list(column) for name, column in zip(about["fields"], columns, strict=True)}
    if suffix == ".geojson":
        assert about["crs"] == "EPSG:4326"
        west, south, east, north = GRID.lonlat_bounds()
        assert (shapely.bounds(read) >= np.array([west, south, west, south]) - 1e-6).all()
        assert (shapely.bounds(read) <= np.array([east, north, east, north]) + 1e-6).all()
        assert shapely.is_ccw(shapely.get_exterior_ring(read)).all()
    else:
        assert shapely.equals(read, shape).all()
    assert fields["class"] == patches.value[order].tolist()
    assert fields["name"] == [NAMES[value] for value in patches.value[order]]
    assert fields["area_m2"] == patches.area[order].tolist()
    assert fields["confidence"] == pytest.approx(patches.confidence[order], abs=0.006)


@pytest.mark.parametrize("suffix", [".parquet", ".geojson", ".gpkg"])
def test_a_file_for_which_there_is_no_room(tmp_path: Path, suffix: str) -> None:
    """The system itself refuses to write on; sqlite and GDAL do not say why."""
    layer = layer_of(classes_of(0, 0.0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            write_polygons(layer, tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "free", "words"),
    [
        ("failed to execute insert : database or disk is full", 1 << 40, "free some"),
        ("Failed to commit transaction", 10_000, r"about \d+ bytes are needed and 10000 are free"),
    ],
)
def test_a_full_disk_that_sqlite_has_freed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, free: int, words: str
) -> None:
    """SQLite takes its changes back before anything can be measured."""
    fired = []

    def full(*_: object, **__: object) -> None:
        fired.append(1)
        raise FeatureError("Could not add feature to layer") from RuntimeError(text)

    monkeypatch.setattr("pyogrio.raw.write", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(NoSpace, match=words):
        write_polygons(layer_of(classes_of(0, 0.0)), tmp_path / "a.gpkg")
    assert fired
    assert list(tmp_path.iterdir()) == []


def test_a_geopackage_that_cannot_be_written_names_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise DataSourceError("Failed to commit transaction")

    monkeypatch.setattr("pyogrio.raw.write", broken)
    with pytest.raises(AccessError, match=r"check the folder, and that it has room for \d+ bytes"):
        write_polygons(layer_of(classes_of(0, 0.0)), tmp_path / "a.gpkg")


@pytest.mark.parametrize(("limit", "strip"), [(3 << 20, 16), (5_000_000, 512)])
def test_a_geopackage_over_a_limit_of_some_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, strip: int
) -> None:
    """A probe of one megabyte would fit; over the second limit is only the spatial index, of which GDAL is silent."""
    monkeypatch.setattr(layers, "STRIP", strip)
    grid = Grid(GRID.crs, GRID.transform, (160, 160))
    y, x = np.mgrid[:160, :160]
    layer = layer_of(((y + x) % 2).astype(np.uint8), grid)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(NoSpace, match="ulimit -f"):
            write_polygons(layer, tmp_path / "a.gpkg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    layer = layer_of(classes_of(6, 2.0))
    for path, options, words in (
        (tmp_path / "a.shp", {}, r"\*.parquet, \*.geojson, \*.gpkg"),
        (tmp_path / "a.gpkg", {"min_area": -1.0}, "--min-area -1.0"),
        (tmp_path / "a.gpkg", {"tolerance": float("nan")}, "--simplify nan"),
    ):
        with pytest.raises(InvalidInput, match=words):
            write_polygons(layer, path, **options)
    with pytest.raises(NothingFound, match="no pixel"):
        write_polygons(layer_of(np.full(GRID.shape, 255, np.uint8)), tmp_path / "a.gpkg")
    assert list(tmp_path.iterdir()) == []
