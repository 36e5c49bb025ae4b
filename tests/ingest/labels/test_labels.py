"""Labels from outside: on the cube's grid to the pixel, or refused (FAULTS T18); whole or not there (FAULTS Z04)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import rasterio
import shapely
from pyproj import CRS, Transformer
from rasterio.transform import from_origin

from ingest.labels.layer import import_labels
from ingest.request.geometry import load_geometry
from zarr_store import BandSpec, Cube, CubeSpec, Grid, Layout, ShardWriter, create_cube, open_cube, verify_cube
from zarr_store.errors import CubeMismatch, IntegrityError, InvalidInput, NothingFound, UnknownName
from zarr_store.labels import NOT_LABELLED, find_labels, open_label

SHAPE = (96, 128)
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), SHAPE)


def truth(height: int = SHAPE[0], width: int = SHAPE[1]) -> np.ndarray:
    """Three classes in shapes without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.where(y * 2 + x < 110, 1, np.where((x - 90) ** 2 + (y - 60) ** 2 < 600, 2, 3)).astype(np.uint8)


def make_cube(url: Path) -> Cube:
    kind = truth().astype(np.uint16)
    main = np.stack([kind * 700 + 100, 2500 - kind * 500])[None]
    spec = CubeSpec("s2", "reflectance", (BandSpec("red"), BandSpec("nir")), GRID, ("2023-08-10T10:00:00",), ("scl",),
                    Layout("tiny", (1, 32, 32), (1, 64, 64)))  # fmt: skip
    create_cube(url, [spec], items={"s2": [{"id": "a", "datetime": "2023-08-10T10:00:00Z"}]}, provenance={})
    writer = ShardWriter(url, "s2")
    arrays = {"reflectance": main, "scl": truth()[None], "status": np.ones((1, *SHAPE), np.uint8),
              "source_item": np.zeros((1, *SHAPE), np.int16)}  # fmt: skip
    for region in spec.shards().values():
        t, y, x = region.slices
        cut = {name: a[t, :, y, x] if a.ndim == 4 else a[t, y, x] for name, a in arrays.items()}
        writer.write(region, cut, key="k", sources=())
    return open_cube(url)


@pytest.fixture
def cube(tmp_path: Path) -> Cube:
    return make_cube(tmp_path / "cube.zarr")


def raster(path: Path, pixels: np.ndarray, *, transform: Any = None, crs: Any = "EPSG:32633", nodata: Any = 0) -> Path:
    transform = from_origin(500_000, 5_000_000, 10, 10) if transform is None else transform
    with rasterio.open(path, "w", driver="GTiff", height=pixels.shape[0], width=pixels.shape[1], count=1,
                       dtype=pixels.dtype, crs=crs, transform=transform, nodata=nodata) as file:  # fmt: skip
        file.write(pixels, 1)
    return path


def stored(cube: Cube, name: str = "t") -> np.ndarray:
    return open_label(cube, name).read()


def test_a_raster_on_the_same_pixels_is_copied(cube: Cube, tmp_path: Path) -> None:
    values = truth()
    values[:5] = 0
    report = import_labels(cube.url, raster(tmp_path / "t.tif", values), name="t", names={1: "field", 3: "wood"})
    expected = np.where(np.isin(values, [1, 3]), values, NOT_LABELLED)
    np.testing.assert_array_equal(stored(cube), expected)
    assert report.classes == {
        name: {"value": v, "pixels": int((values == v).sum())} for v, name in ((1, "field"), (3, "wood"))
    }
    assert report.warnings == ()
    again = import_labels(cube.url, tmp_path / "t.tif", name="t", names={1: "field", 3: "wood"})
    assert (again.written, again.digest) == (False, report.digest)


def test_large_values_are_numbered_anew_and_names_may_join_them(cube: Cube, tmp_path: Path) -> None:
    source = raster(tmp_path / "t.tif", truth().astype(np.uint16) * 111)
    with pytest.raises(InvalidInput, match="name the values that you need with --names"):
        import_labels(cube.url, source, name="t")
    assert find_labels(cube) == ()
    import_labels(cube.url, source, name="t", names={111: "green", 222: "blue", 333: "green"})
    assert open_label(cube, "t").spec.classes == ((0, "blue"), (1, "green"))
    np.testing.assert_array_equal(stored(cube), np.where(truth() == 2, 0, 1))


def test_another_crs_and_resolution_take_the_nearest_pixel(cube: Cube, tmp_path: Path) -> None:
    """The oracle looks up the class at each pixel's centre in the other raster."""
    west, _, east, north = GRID.lonlat_bounds()
    fine = np.random.default_rng(0).integers(1, 4, (40, 50)).astype(np.uint8)
    step = (east - west) / 40
    source = raster(
        tmp_path / "t.tif", fine, transform=from_origin(west - step, north + step, step, step), crs="EPSG:4326"
    )
    import_labels(cube.url, source, name="t")
    y, x = np.meshgrid(GRID.y(), GRID.x(), indexing="ij")
    lon, lat = Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True).transform(x, y)
    column, row = (lon - (west - step)) / step, (north + step - lat) / step
    near_edge = (np.abs(column - np.round(column)) < 0.02) | (np.abs(row - np.round(row)) < 0.02)
    expected = fine[np.floor(row).astype(int), np.floor(column).astype(int)]
    assert near_edge.mean() < 0.1
    np.testing.assert_array_equal(stored(cube)[~near_edge], expected[~near_edge])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": from_origin(500_005, 4_999_995, 10, 10)}, "0.50 pixels down and 0.50 right"),
        ({"transform": rasterio.Affine(10, 0, 500_000, 0, 10, 5_000_000 - 960)}, "north-up"),
        ({"transform": rasterio.Affine(10, 1, 500_000, 1, -10, 5_000_000)}, "north-up"),
        ({"crs": None}, "no coordinate reference system"),
        ({"crs": "EPSG:32632"}, "outside the cube"),
    ],
)
def test_t18_a_raster_that_does_not_lie_as_labels_would_is_refused(
    cube: Cube, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = raster(tmp_path / "t.tif", truth(), **change)
    with pytest.raises(InvalidInput, match=message):
        import_labels(cube.url, source, name="t")
    assert find_labels(cube) == ()
    assert not (Path(cube.url) / "labels").exists()


def test_t18_half_a_pixel_is_taken_if_it_is_meant_and_any_other_shift_is_said(cube: Cube, tmp_path: Path) -> None:
    half = raster(tmp_path / "h.tif", truth(), transform=from_origin(500_005, 5_000_000, 10, 10))
    assert any("0.50 right" in line for line in import_labels(cube.url, half, name="h", shifted=True).warnings)
    other = raster(tmp_path / "o.tif", truth(), transform=from_origin(500_002, 5_000_000, 10, 10))
    assert any("0.20 right" in line for line in import_labels(cube.url, other, name="o").warnings)
    np.testing.assert_array_equal(stored(cube, "o")[:, 1:], truth()[:, 1:])


def test_t18_labels_that_fit_the_image_mirrored_are_warned_of(cube: Cube, tmp_path: Path) -> None:
    report = import_labels(cube.url, raster(tmp_path / "t.tif", truth()[::-1].copy()), name="t")
    assert any("fit the image better upside down" in line for line in report.warnings)


def polygons() -> tuple[list[Any], list[str]]:
    x0, y0 = 500_000, 5_000_000
    big = shapely.Polygon([(x0 + 33, y0 - 41), (x0 + 610, y0 - 95), (x0 + 520, y0 - 700), (x0 + 71, y0 - 655)])
    small = shapely.Point(x0 + 330, y0 - 330).buffer(123)
    far = shapely.box(x0 + 99_000, y0, x0 + 99_500, y0 + 400)
    return [small, big, far, shapely.Point(x0, y0)], ["pond", "field", "field", "mark"]


def write_polygons(path: Path, crs: str) -> Path:
    shapes, names = polygons()
    to = Transformer.from_crs("EPSG:32633", crs, always_xy=True).transform
    moved = [shapely.transform(s, lambda xy: np.column_stack(to(*xy.T))) for s in shapes]
    wkb, values = np.array(shapely.to_wkb(np.array(moved)), object), np.array(names, object)
    if path.suffix == ".parquet":
        column = {"encoding": "WKB", "geometry_types": [], "crs": CRS(crs).to_json_dict()}
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        table = pa.table({"geometry": pa.array(list(wkb), pa.binary()), "use": pa.array(names)})
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
    else:
        pyogrio.raw.write(str(path), wkb, [values], ["use"], geometry_type="Unknown", crs=crs)
    return path


@pytest.mark.parametrize(
    ("name", "crs"), [("p.geojson", "EPSG:4326"), ("p.gpkg", "EPSG:32633"), ("p.parquet", "EPSG:3035")]
)
def test_polygons_have_the_pixels_whose_centre_they_hold_and_the_smaller_counts(
    cube: Cube, tmp_path: Path, name: str, crs: str
) -> None:
    source = write_polygons(tmp_path / name, crs)
    report = import_labels(cube.url, source, name="t", attribute="use")
    (pond, field, _, _), _ = polygons()
    y, x = np.meshgrid(GRID.y(), GRID.x(), indexing="ij")
    expected = np.where(shapely.contains_xy(pond, x, y), 1, np.where(shapely.contains_xy(field, x, y), 0, NOT_LABELLED))
    # corners are moved, edges are not bent to the millimetre: a centre may lie on either side of an edge
    assert (stored(cube) != expected).mean() < 5e-4
    assert list(report.classes) == ["field", "pond"]
    assert any("1 of 4 features that are no polygons" in line for line in report.warnings)
    assert any("1 polygons outside" in line for line in report.warnings)
    touched = import_labels(cube.url, source, name="u", attribute="use", all_touched=True, background="rest")
    assert touched.labelled == touched.pixels
    assert touched.classes["field"]["pixels"] > report.classes["field"]["pixels"]
    # a background that polygons have, too, is one class with them, and the first
    import_labels(cube.url, source, name="v", attribute="use", background="pond")
    assert open_label(cube, "v").spec.classes == ((0, "pond"), (1, "field"))
    assert not (stored(cube, "v") == NOT_LABELLED).any()


def write_geoparquet(path: Path, about: dict[str, Any], rows: int = 1, text: str = "field") -> Path:
    x0, y0 = 500_000, 5_000_000
    wkb = shapely.to_wkb(shapely.box(x0 + 50, y0 - 500, x0 + 500, y0 - 50))
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB", **about}}}
    use = pa.array([text] * rows).dictionary_encode()
    table = pa.table({"geometry": pa.array([wkb] * rows, pa.binary()), "use": use})
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
    return path


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"encoding": "point"}, "expected GeoParquet with a column of WKB, got column 'geometry' of encoding 'point'"),
        ({"crs": "EPSG:nonsense"}, "EPSG:nonsense"),
    ],
)
def test_labels_and_regions_read_geoparquet_by_one_reader(
    cube: Cube, tmp_path: Path, about: dict[str, Any], message: str
) -> None:
    source = write_geoparquet(tmp_path / "p.parquet", about)
    for read in (lambda: import_labels(cube.url, source, name="t"), lambda: load_geometry(source)):
        with pytest.raises(InvalidInput, match=message):
            read()


def test_a_geoparquet_file_with_an_unknown_crs_gives_no_labels(cube: Cube, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="its CRS is unknown"):
        import_labels(cube.url, write_geoparquet(tmp_path / "p.parquet", {"crs": None}), name="t")
    assert find_labels(cube) == ()


def test_a_geoparquet_file_of_labels_that_swells_is_refused(
    cube: Cube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utm = {"crs": CRS("EPSG:32633").to_json_dict()}
    source = write_geoparquet(tmp_path / "p.parquet", utm, rows=5_000, text="field" * 1_000)
    assert source.stat().st_size < 1 << 20, "25 MB of text in a small file"
    assert import_labels(cube.url, source, name="t", attribute="use").labelled
    monkeypatch.setattr("ingest.labels.vectors._MOST_BYTES", 1 << 20)
    with pytest.raises(InvalidInput, match="once decoded"):
        import_labels(cube.url, source, name="u", attribute="use")


def test_values_are_kept_as_numbers(cube: Cube, tmp_path: Path) -> None:
    height = (truth() * 3.25).astype(np.float32)
    height[:4] = -9999
    import_labels(cube.url, raster(tmp_path / "h.tif", height, nodata=-9999), name="height", kind="values")
    expected = np.where(height == -9999, np.nan, height)
    np.testing.assert_array_equal(stored(cube, "height"), expected)
    coarse = raster(
        tmp_path / "c.tif",
        np.full((SHAPE[0] * 4, SHAPE[1] * 4), 7.5, np.float32),
        transform=from_origin(500_000, 5_000_000, 2.5, 2.5),
    )
    coarse_mean = import_labels(cube.url, coarse, name="mean", kind="values")
    assert coarse_mean.labelled == coarse_mean.pixels
    np.testing.assert_allclose(stored(cube, "mean"), 7.5)


def test_mistakes_are_said_before_anything_is_written(cube: Cube, tmp_path: Path) -> None:
    source = write_polygons(tmp_path / "p.gpkg", "EPSG:32633")
    tif = raster(tmp_path / "t.tif", truth())
    for call, error, message in (
        ({"source": source, "attribute": "usee"}, UnknownName, "did you mean 'use'"),
        ({"source": source, "attribute": "use", "kind": "values"}, InvalidInput, "holds no numbers"),
        ({"source": tif, "attribute": "use"}, InvalidInput, "apply to polygons"),
        ({"source": tif, "resampling": "average"}, InvalidInput, "mixes class values"),
        ({"source": tif, "band": 2}, InvalidInput, "there is no band 2"),
        ({"source": tif, "name": "scl"}, InvalidInput, "has an array scl"),
        ({"source": tif, "names": {9: "nothing"}}, NothingFound, "gives no label"),
        ({"source": tmp_path / "no.tif"}, InvalidInput, "cannot read"),
    ):
        with pytest.raises(error, match=message):
            import_labels(cube.url, **{"name": "t", **call})  # type: ignore[arg-type]
    assert find_labels(cube) == ()


def test_another_source_needs_replace_and_damage_is_found(cube: Cube, tmp_path: Path) -> None:
    import_labels(cube.url, raster(tmp_path / "a.tif", truth()), name="t")
    other = raster(tmp_path / "b.tif", np.full(SHAPE, 2, np.uint8))
    with pytest.raises(CubeMismatch, match="--replace"):
        import_labels(cube.url, other, name="t")
    np.testing.assert_array_equal(stored(cube), truth())
    assert import_labels(cube.url, other, name="t", replace=True).written
    assert (stored(cube) == 2).all()
    assert verify_cube(cube.url).damaged_labels == ()
    shard = Path(cube.url) / "labels/t/label/c/1/1"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert "is corrupt" in verify_cube(cube.url).damaged_labels[0]
    shard.unlink()
    assert "is missing" in verify_cube(cube.url).damaged_labels[0]


def test_a_damaged_layer_is_made_again_by_the_same_import(cube: Cube, tmp_path: Path) -> None:
    source = raster(tmp_path / "a.tif", truth())
    before = import_labels(cube.url, source, name="t")
    assert not import_labels(cube.url, source, name="t").written
    shard, about = Path(cube.url) / "labels/t/label/c/1/1", Path(cube.url) / "labels/t/zarr.json"
    whole = shard.read_bytes()
    for spoil in (lambda: shard.write_bytes(whole[:-1] + b"\0"), shard.unlink):
        spoil()
        assert verify_cube(cube.url).damaged_labels
        assert import_labels(cube.url, source, name="t").written
        assert verify_cube(cube.url).damaged_labels == ()
        assert shard.read_bytes() == whole
    about.write_text("{")
    with pytest.raises(IntegrityError, match="again with --replace"):
        import_labels(cube.url, source, name="t")
    made = import_labels(cube.url, source, name="t", replace=True)
    assert made.written
    assert made.digest == before.digest
    assert verify_cube(cube.url).damaged_labels == ()
    np.testing.assert_array_equal(stored(cube), truth())


KILL = """
import gc, os, shutil, sys
from pathlib import Path
from ingest.labels.features import read_features
from ingest.labels.layer import import_labels
from ingest.request import parquet
from zarr_store import open_cube, verify_cube
from zarr_store.crash import arm
from zarr_store.labels import find_labels, open_label

cube, first, second = sys.argv[1:]


def apart(work):  # tensorstore must not be forked, so that the parent never uses it
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin(replacing):
    shutil.rmtree(Path(cube, "labels"), ignore_errors=True)
    if replacing:
        shutil.copytree(Path(cube + "-first"), Path(cube, "labels"))


def keep_first():
    import_labels(cube, Path(first), name="t")
    Path(cube, "labels").rename(cube + "-first")


def die(at):
    arm(at)
    import_labels(cube, Path(second), name="t", replace=True)


def mend():
    import_labels(cube, Path(second), name="t", replace=True)
    assert open_label(open_cube(cube), "t").counts == {"class 2": 96 * 128}
    assert find_labels(open_cube(cube)) == ("t",) and not verify_cube(cube).damaged_labels


gc.collect()
gc.freeze()  # a collection would write into every object, and the child would get copies of all memory
gc.disable()
deaths = []
assert apart(keep_first) == 0
for replacing in (False, True):
    for at in range(1, 100):
        begin(replacing)
        code = apart(lambda: die(at))
        if code == 0:
            break
        assert code == 86, code
        deaths.append(at)
        assert apart(mend) == 0, (replacing, at)
print(len(deaths))
"""


def test_dying_at_every_step_leaves_a_cube_that_the_same_command_mends(
    cube: Cube, tmp_path: Path, repository: Path
) -> None:
    sources = [raster(tmp_path / "a.tif", truth()), raster(tmp_path / "b.tif", np.full(SHAPE, 2, np.uint8))]
    done = subprocess.run(
        [sys.executable, "-c", KILL, cube.url, *map(str, sources)],
        env={**os.environ, "PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 12, "fewer durable steps than there were: is a crash point gone?"


def stating(path: Path, pixels: np.ndarray, **stated: Any) -> Path:
    """Write a raster on the grid of the cube that states scale, offset, unit or a mask."""
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
        path, "w", driver="GTiff", height=SHAPE[0], width=SHAPE[1], count=1, dtype=pixels.dtype, crs="EPSG:32633",
        transform=from_origin(500_000, 5_000_000, 10, 10), nodata=stated.get("nodata"),
    ) as file:  # fmt: skip
        file.write(pixels, 1)
        file.scales, file.offsets = (stated.get("scale", 1.0),), (stated.get("offset", 0.0),)
        file.units = (stated.get("unit", ""),)
        if "mask" in stated:
            file.write_mask(np.where(stated["mask"], 0, 255).astype(np.uint8))
    return path


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_values_are_those_that_scale_and_offset_of_the_file_mean(cube: Cube, tmp_path: Path, dtype: str) -> None:
    pixels = (truth().astype(int) * 500 + 12).astype(dtype)
    pixels[:3] = -9999
    tif = stating(tmp_path / "h.tif", pixels, scale=0.01, offset=2.0, unit="m", nodata=-9999)
    import_labels(cube.url, tif, name="h", kind="values")
    expected = np.where(pixels == -9999, np.nan, pixels.astype(float) * 0.01 + 2)
    np.testing.assert_allclose(stored(cube, "h"), expected, rtol=1e-6)
    assert open_label(cube, "h").spec.origin["unit"] == "m"
    with pytest.raises(InvalidInput, match=r"states scale 0\.01 and offset 2, which classes cannot have"):
        import_labels(cube.url, stating(tmp_path / "c.tif", truth(), scale=0.01, offset=2.0), name="c")


def test_what_a_file_masks_and_what_is_no_number_gets_no_label(cube: Cube, tmp_path: Path) -> None:
    hole = np.zeros(SHAPE, bool)
    hole[5:9, 3:30] = True
    import_labels(cube.url, stating(tmp_path / "c.tif", truth(), mask=hole), name="c")
    np.testing.assert_array_equal(stored(cube, "c"), np.where(hole, NOT_LABELLED, truth()))
    both = np.where(np.arange(SHAPE[0])[:, None] < 3, 77, truth()).astype(np.uint8)
    import_labels(cube.url, stating(tmp_path / "b.tif", both, mask=hole, nodata=77), name="b")
    np.testing.assert_array_equal(stored(cube, "b"), np.where(hole | (both == 77), NOT_LABELLED, truth()))
    values = truth().astype(np.float64)
    values[0, :3] = np.inf, -np.inf, 1e300
    values[hole] = -5
    report = import_labels(cube.url, stating(tmp_path / "v.tif", values, mask=hole), name="v", kind="values")
    assert report.labelled == hole.size - hole.sum() - 3
    assert np.isnan(stored(cube, "v")[0, :3]).all()


def test_a_class_of_255_is_not_taken_for_no_label(cube: Cube, tmp_path: Path) -> None:
    water = np.where(truth() == 1, 255, 0).astype(np.uint8)
    tif = stating(tmp_path / "w.tif", water)
    with pytest.raises(InvalidInput, match="class values 0 … 255, but 0 … 254 can be stored, as 255 stands for"):
        import_labels(cube.url, tif, name="w")
    assert find_labels(cube) == ()
    report = import_labels(cube.url, tif, name="w", names={0: "land", 255: "water"})
    assert {name: one["pixels"] for name, one in report.classes.items()} == {
        "land": int((water == 0).sum()), "water": int((water == 255).sum())
    }  # fmt: skip
    stated = import_labels(cube.url, stating(tmp_path / "n.tif", water, nodata=255), name="n")
    assert stated.labelled == (water == 0).sum()
