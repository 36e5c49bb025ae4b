"""Reducers, indices and clipping against plain numpy over small scenes in real files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom

from ingest.pixels import composite
from ingest.pixels.indices import INDICES
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.scene import Scene
from ingest.testing import make_scene, probe_headers
from zarr_store.create import create_cube
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.spec import CubeSpec, Layout
from zarr_store.write import ShardWriter

SIZE = (40, 34)
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), SIZE)
LAYOUT = Layout("test", (1, 8, 8), (1, 24, 24))
BANDS = ("green", "red", "nir", "scl")
MASKED = (0, 1, 3, 8, 9, 10)


def month(folder: Path, count: int = 5, **fields: Any) -> list[Scene]:
    """Scenes of one month, each with its own offset, clouds, holes and saturated pixels."""
    rng = np.random.default_rng(5)
    scenes = []
    for number in range(count):
        choice = np.array([0, 1, 700, 999, 1000, 1001, 3333, 5000, 65535], np.uint16)
        pixels: dict[str, np.ndarray] = {band: rng.choice(choice, size=SIZE) for band in BANDS[:3]}
        pixels["scl"] = rng.choice(np.array([0, 3, 4, 5, 9], np.uint8), p=[0.05, 0.1, 0.3, 0.35, 0.2], size=SIZE)
        scenes.append(
            make_scene(
                folder, f"S{number}", GRID, pixels, datetime=f"2023-08-{3 * number + 1:02d}T10:00:00Z",
                dn_offset=(0, -1000)[number % 2], cloud_cover=float(10 * number), **fields,
            )
        )  # fmt: skip
    return scenes


def assemble(plan: Plan) -> dict[str, np.ndarray]:
    recipe = plan.recipes[0]
    whole = {a.name: np.full(recipe.spec.array_shape(a.name), 77, a.dtype) for a in recipe.spec.arrays()}
    for task in plan.tasks:
        filled = fill_shard(task, recipe)
        assert set(filled.arrays) == set(whole)
        t, y, x = task.region.slices
        for name, part in filled.arrays.items():
            assert part.dtype == whole[name].dtype
            whole[name][(t, slice(None), y, x) if part.ndim == 4 else (t, y, x)] = part
    return whole


def observations_of(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(values (scene, band, y, x) int64, seen, clear, scl), least cloudy first, by numpy alone."""
    values, seen, clear, classes = [], [], [], []
    for scene in sorted(scenes, key=lambda s: (s.cloud_cover, s.id)):
        raw = []
        for band in BANDS:
            with rasterio.open(scene.assets[band].href) as dataset:
                raw.append(dataset.read(1).astype(np.int64))
        dn, scl = np.stack(raw[:3]), raw[3]
        moved = np.where(dn == 65535, dn, np.clip(dn + scene.dn_offset, 1, 65535))
        there = (dn != 0).any(axis=0) & (scl != 0)  # 0 in some bands of what the class has seen is a clipped number
        values.append(moved)
        seen.append(there)
        clear.append(there & ~np.isin(scl, MASKED))
        classes.append(scl)
    return np.stack(values), np.stack(seen), np.stack(clear), np.stack(classes)


@pytest.mark.parametrize("reduce", ["median", "mean"])
def test_reduced_pixels_equal_numpy(tmp_path: Path, reduce: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = month(tmp_path)
    config = IngestConfig(bands=BANDS, group="month", reduce=reduce, indices="ndvi,ndwi")
    plan = plan_scenes(scenes, probe_headers(scenes), config, layout=LAYOUT)
    got = assemble(plan)
    values, seen, clear, classes = observations_of(scenes)
    count = clear.sum(axis=0)
    assert set(np.unique(count)) >= {0, 1, 2, 3}, "even and odd numbers of observations must occur"
    stack = np.where(clear[:, None], values.astype(float), np.nan)
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning):
        exact = np.nanmedian(stack, axis=0) if reduce == "median" else np.nanmean(stack, axis=0)
    first_clear, first_seen = clear.argmax(axis=0), seen.argmax(axis=0)
    fallback = np.take_along_axis(values, first_seen[None, None], axis=0)[0]
    expected = np.where(count > 0, np.floor(np.nan_to_num(exact) + 0.5), np.where(seen.any(axis=0), fallback, 0))
    np.testing.assert_array_equal(got["reflectance"][0], expected)
    np.testing.assert_array_equal(got["observations"][0], count)
    np.testing.assert_array_equal(got["status"][0], np.where(count > 0, 1, np.where(seen.any(axis=0), 2, 0)))
    layer = np.take_along_axis(classes, np.where(count > 0, first_clear, first_seen)[None], axis=0)[0]
    np.testing.assert_array_equal(got["scl"][0], np.where(seen.any(axis=0), layer, 0))
    for name in ("ndvi", "ndwi"):
        a, b = (expected[BANDS.index(band)].astype(np.int64) for band in INDICES[name].bands)
        valid = (a > 0) & (b > 0) & (a < 65535) & (b < 65535)
        index = np.where(valid, np.rint(10_000 * (a - b) / np.maximum(a + b, 1)), -32768)
        np.testing.assert_array_equal(got[name][0], index, err_msg=name)
        assert valid.mean() > 0.3
    # the same pixels when a median may keep next to nothing: shards are then made in strips
    monkeypatch.setattr(composite, "_MEDIAN_BYTES", 1)
    monkeypatch.setattr(composite, "_STRIP_ROWS", 7)
    assert len(composite.strips(plan.tasks[0].region, plan.specs[0], 5)) == (4 if reduce == "median" else 1)
    for name, array in assemble(plan).items():
        np.testing.assert_array_equal(array, got[name], err_msg=name)


def test_radar_is_averaged_in_linear_power_and_orbits_stay_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    power = rng.random((3, 2, *SIZE), np.float32) + np.float32(0.001)
    power[0, 0, :5] = -32768
    scenes = [
        make_scene(
            tmp_path, f"R{n}", GRID, {"vv": power[n, 0], "vh": power[n, 1]}, collection="sentinel-1-rtc",
            product="sentinel-1-rtc", platform="sentinel-1a", relative_orbit=(44, 44, 124)[n],
            orbit_direction=("ascending", "ascending", "descending")[n], datetime=f"2023-08-0{n + 1}T05:00:00Z",
        )
        for n in range(3)
    ]  # fmt: skip
    config = IngestConfig(bands=("vv", "vh"), group="month", reduce="mean")
    plan = plan_scenes(scenes, probe_headers(scenes), config, layout=LAYOUT)
    assert plan.specs[0].times == ("2023-08-01T05:00:00", "2023-08-03T05:00:00")
    got = assemble(plan)
    expected = power.astype(np.float64)
    both = ((expected[0] + expected[1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(got["backscatter"][0, :, 5:], both[:, 5:])
    np.testing.assert_array_equal(got["backscatter"][0, :, :5], power[1][:, :5])
    np.testing.assert_array_equal(got["backscatter"][1], power[2])
    assert got["observations"][0, :5].max() == 1
    assert (got["observations"][0, 5:] == 2).all()
    decibels = 10 * np.log10(expected[:2, :, 5:])
    assert np.abs(10 ** ((decibels[0] + decibels[1]) / 20) - both[:, 5:]).max() > 0.01, "a mean of decibels is another"


def test_a_lost_scene_is_missing_only_where_no_other_sees(tmp_path: Path) -> None:
    scenes = month(tmp_path, 3)
    plan = plan_scenes(
        scenes, probe_headers(scenes), IngestConfig(bands=BANDS, group="month", reduce="median"), layout=LAYOUT
    )
    Path(scenes[1].assets["red"].href).unlink()
    got = assemble(plan)
    _, seen, clear, _ = observations_of([scenes[0], scenes[2]])
    np.testing.assert_array_equal(got["observations"][0], clear.sum(axis=0))
    np.testing.assert_array_equal(got["status"][0] == 3, ~seen.any(axis=0))
    states = {o.item_id: o.state for t in plan.tasks for o in fill_shard(t, plan.recipes[0]).outcomes}
    assert states == {"S0": "read", "S1": "missing", "S2": "read"}


def test_the_cube_keeps_counts_and_indices(tmp_path: Path) -> None:
    scenes = month(tmp_path)
    config = IngestConfig(bands=BANDS, group="month", reduce="mean", indices="ndvi")
    plan = Plan.from_json(plan_scenes(scenes, probe_headers(scenes), config, layout=LAYOUT).to_json())
    cube = tmp_path / "cube.zarr"
    create_cube(cube, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
    writer = ShardWriter(cube, "sentinel-2-l2a")
    for task in plan.tasks:
        writer.write(task.region, fill_shard(task, plan.recipes[0]).arrays, key=task.key, sources=())
    opened = open_cube(cube)
    assert opened.spec("sentinel-2-l2a") == plan.specs[0]
    dataset = opened.dataset("sentinel-2-l2a")
    whole = assemble(plan)
    assert "source_item" not in dataset
    for name in ("observations", "ndvi", "reflectance"):
        np.testing.assert_array_equal(dataset[name].values, whole[name])
    assert dataset.ndvi.attrs["formula"] == "(nir - red) / (nir + red)"
    assert "reduced   mean" in plan.summary()
    assert "ndvi = (nir - red) / (nir + red)" in plan.summary()


def test_median_memory_is_bounded_by_strips() -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (2048, 2048))
    spec = _spec(grid, "median")
    region = spec.shards()[0, 0, 0]
    for scenes in (3, 30, 300):
        parts = composite.strips(region, spec, scenes)
        assert [parts[0].y0, parts[-1].y1] == [0, 2048]
        assert all(a.y1 == b.y0 for a, b in itertools.pairwise(parts))
        assert all(part.y0 % 256 == 0 for part in parts)
        rows = max(part.shape[1] for part in parts)
        assert scenes * rows * 2048 * 9 <= max(composite._MEDIAN_BYTES, scenes * 256 * 2048 * 9)
    assert composite.strips(region, _spec(grid, "mean"), 300) == [region]


def _spec(grid: Grid, reduce: Any) -> CubeSpec:
    from zarr_store.spec import LAYOUTS, BandSpec

    bands = tuple(BandSpec(name, 0, 1e-4) for name in ("blue", "green", "red", "nir"))
    return CubeSpec("c", "reflectance", bands, grid, ("2023-08-01T00:00:00",), (), LAYOUTS["train"], reduce=reduce)


def test_indices_that_cannot_be_are_named(tmp_path: Path) -> None:
    scenes = month(tmp_path, 1)
    with pytest.raises(UnknownName, match="ndvi"):
        plan_scenes(scenes, probe_headers(scenes), IngestConfig(bands=BANDS, indices="ndvj"))
    with pytest.raises(InvalidInput, match=r"nbr is made of nir08 and swir22.*add nir08,swir22 to --bands"):
        plan_scenes(scenes, probe_headers(scenes), IngestConfig(bands=BANDS, indices="nbr"))
    radar = make_scene(
        tmp_path, "R", GRID, {"vv": np.ones(SIZE, np.float32)}, collection="sentinel-1-rtc", product="sentinel-1-rtc"
    )
    with pytest.raises(InvalidInput, match="only backscatter"):
        plan_scenes([radar], probe_headers([radar]), IngestConfig(bands=("vv",), indices="ndvi"))


POLYGON = {
    "type": "Polygon",
    "coordinates": [
        [[15.0012, 45.1526], [15.0068, 45.1519], [15.0071, 45.1482], [15.004, 45.1501], [15.0015, 45.1478],
         [15.0012, 45.1526]],
        [[15.003, 45.151], [15.004, 45.151], [15.004, 45.1515], [15.003, 45.1515], [15.003, 45.151]],
    ],
}  # fmt: skip


@pytest.mark.parametrize("reduce", ["first", "median"])
def test_pixels_outside_the_polygon_have_no_data(tmp_path: Path, reduce: str) -> None:
    scenes = month(tmp_path, 2)
    asked: dict[str, Any] = {"bands": BANDS, "reduce": reduce, "group": "month", "geometry": POLYGON, "indices": "ndvi"}
    clipped = plan_scenes(scenes, probe_headers(scenes), IngestConfig(**asked), layout=LAYOUT)
    whole = plan_scenes(scenes, probe_headers(scenes), IngestConfig(**asked, clip=False), layout=LAYOUT)
    assert clipped.grid == whole.grid
    assert clipped.digest != whole.digest
    grid = clipped.grid
    outside = geometry_mask(
        [transform_geom("EPSG:4326", grid.crs, POLYGON)], grid.shape, grid.affine, all_touched=False
    )
    assert 0.2 < outside.mean() < 0.8
    cut, kept = assemble(clipped), assemble(whole)
    for name, array in kept.items():
        fill = clipped.specs[0].array(name).fill
        np.testing.assert_array_equal(cut[name], np.where(outside, fill, array).astype(array.dtype), err_msg=name)
    assert "clipped" in clipped.summary()
    for scene in scenes:  # a lost file is missing inside the polygon and nothing outside
        Path(scene.assets["red"].href).unlink()
    np.testing.assert_array_equal(assemble(clipped)["status"][0], np.where(outside, 0, 3))


def test_nothing_is_read_for_shards_outside_the_polygon(tmp_path: Path) -> None:
    scenes = month(tmp_path, 1)
    corner = {
        "type": "MultiPolygon",
        "coordinates": [
            [[[15.0, 45.1535], [15.0005, 45.1535], [15.0005, 45.153], [15.0, 45.1535]]],
            [[[15.0083, 45.1466], [15.0085, 45.1466], [15.0085, 45.1468], [15.0083, 45.1466]]],
        ],
    }
    plan = plan_scenes(
        scenes,
        probe_headers(scenes),
        IngestConfig(bands=BANDS, geometry=corner),
        layout=Layout("t", (1, 8, 8), (1, 8, 8)),
    )
    used = [bool(task.sources) for task in plan.tasks]
    assert 0 < sum(used) < len(used) / 2
    line = {"type": "LineString", "coordinates": [[15.001, 45.1526], [15.0068, 45.1519]]}
    assert plan_scenes(scenes, probe_headers(scenes), IngestConfig(bands=BANDS, geometry=line)).recipes[0].clip is None
