"""Filling shards against a slow oracle that goes pixel by pixel, over scenes that hypothesis makes up."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.warp import reproject

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.scene import Scene
from ingest.testing import make_scene, probe_headers
from zarr_store.grid import Grid
from zarr_store.spec import Layout

SMALL = Layout("test", (1, 8, 8), (1, 16, 16))
SIZE = (26, 22)
BASE = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), SIZE)
MASKED = (0, 3, 9)


def assemble(plan: Plan, collection: str | None = None) -> dict[str, np.ndarray]:
    """All shards of a plan, put together without a cube."""
    recipe = plan.recipe(collection) if collection else plan.recipes[0]
    times, height, width = recipe.spec.shape
    whole: dict[str, np.ndarray] = {}
    for task in plan.tasks:
        if task.collection != recipe.spec.collection:
            continue
        for name, part in fill_shard(task, recipe).arrays.items():
            shape = (times, len(recipe.spec.bands), height, width) if part.ndim == 4 else (times, height, width)
            array = whole.setdefault(name, np.full(shape, 99, part.dtype))
            t, y, x = task.region.slices
            array[(t, slice(None), y, x) if part.ndim == 4 else (t, y, x)] = part
    return whole


def oracle(scenes: list[Scene], broken: set[str], grid: Grid, dilate_m: float) -> dict[str, np.ndarray]:
    """One day of scenes on `grid`, pixel by pixel, by the documented rules."""
    height, width = grid.shape
    out: dict[str, np.ndarray] = {
        "reflectance": np.zeros((2, height, width), np.uint16),
        "scl": np.zeros((height, width), np.uint8),
        "status": np.zeros((height, width), np.uint8),
        "source_item": np.full((height, width), -1, np.int16),
    }
    rows = {s.id: row for row, s in enumerate(sorted(scenes, key=lambda s: (s.datetime, s.id)))}

    def shift(scene: Scene) -> tuple[float, float]:
        origin = scene.assets["red"].grid.transform
        return ((grid.transform[5] - origin[5]) / 20, (origin[2] - grid.transform[2]) / 20)  # down, right

    def order(scene: Scene) -> tuple[Any, ...]:
        aligned = all(v == int(v) for v in shift(scene))
        return (not aligned, scene.cloud_cover, -float(scene.baseline or 0), scene.id)

    read = {}
    for scene in sorted(scenes, key=order):
        if scene.id in broken or scene.lacking:
            continue
        layers = {}
        for band in ("red", "nir", "scl"):
            with rasterio.open(scene.assets[band].href) as dataset:
                source, transform = dataset.read(1), dataset.transform
            # two pixels wider on each side, so that clouds beyond the edge can grow into the grid
            wide = grid.window(-4, -4, height + 8, width + 8)
            layer = np.zeros(wide.shape, source.dtype)
            kernel = Resampling.nearest if band == "scl" else Resampling.bilinear
            reproject(source, layer, src_transform=transform, src_crs=grid.crs, src_nodata=0, dst_transform=wide.affine,
                      dst_crs=grid.crs, dst_nodata=0, resampling=kernel)  # fmt: skip
            layers[band] = layer
        read[scene.id] = layers
    for y in range(height):
        for x in range(width):
            best: tuple[int, str] | None = None
            for scene in sorted(scenes, key=order):
                if scene.id not in read:
                    continue
                red, nir, scl = (int(read[scene.id][band][y + 4, x + 4]) for band in ("red", "nir", "scl"))
                if not ((red or nir) and scl):  # 0 beside a band with a value is a clipped number
                    continue
                masked = scl in MASKED or any(
                    int(read[scene.id]["scl"][y + 4 + dy, x + 4 + dx]) in set(MASKED) - {0}
                    for dy in range(-2, 3)
                    for dx in range(-2, 3)
                    if math.hypot(dy, dx) * 20 <= dilate_m
                )
                if best is None or (best[0] == 2 and not masked):
                    best = (2 if masked else 1, scene.id)
            if best is None:
                for scene in scenes:
                    if scene.id in broken or scene.lacking:
                        top, left = shift(scene)
                        inside = 0 <= y + 0.5 - top < SIZE[0] and 0 <= x + 0.5 - left < SIZE[1]
                        if inside:
                            out["status"][y, x] = 3
                continue
            scene = next(s for s in scenes if s.id == best[1])
            out["status"][y, x] = best[0]
            out["source_item"][y, x] = rows[scene.id]
            out["scl"][y, x] = read[scene.id]["scl"][y + 4, x + 4]
            for number, band in enumerate(("red", "nir")):
                dn = int(read[scene.id][band][y + 4, x + 4])
                out["reflectance"][number, y, x] = dn if dn == 65535 else min(max(dn + scene.dn_offset, 1), 65535)
    return out


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """Two to four scenes of a day: shifts in half pixels, offsets, clouds, faults."""
    scenes = [
        {
            "shift": (draw(st.integers(-30, 30)) / 2, draw(st.integers(-30, 30)) / 2),
            "dn_offset": draw(st.sampled_from([0, -1000])),
            "baseline": draw(st.sampled_from(["02.14", "04.00", "05.09"])),
            "cloud_cover": float(draw(st.sampled_from([0, 10, 90]))),
            "fault": draw(st.sampled_from(["", "", "", "", "absent", "truncated", "lacking"])),
        }
        for _ in range(draw(st.integers(2, 4)))
    ]
    return {"scenes": scenes, "seed": draw(st.integers(0, 2**31)), "dilate_m": draw(st.sampled_from([0.0, 20.0, 45.0]))}


def build(folder: Path, world: dict[str, Any]) -> tuple[list[Scene], set[str]]:
    rng = np.random.default_rng(world["seed"])
    scenes, broken = [], set()
    for number, spec in enumerate(world["scenes"]):
        down, right = spec["shift"]
        grid = Grid(BASE.crs, (20.0, 0.0, 500_000.0 + 20 * right, 0.0, -20.0, 5_000_000.0 - 20 * down), SIZE)
        pixels: dict[str, np.ndarray] = {
            band: rng.choice(np.array([0, 1, 700, 999, 1000, 1001, 5000, 65535], np.uint16), size=SIZE)
            for band in ("red", "nir")
        }
        pixels["scl"] = rng.choice(np.array([0, 3, 4, 5, 9], np.uint8), p=[0.05, 0.05, 0.5, 0.35, 0.05], size=SIZE)
        lacking = spec["fault"] == "lacking"
        if lacking:
            del pixels["nir"]
        scene = make_scene(
            folder, f"S{number}", grid, pixels, lacking=("nir",) if lacking else (), dn_offset=spec["dn_offset"],
            baseline=spec["baseline"], cloud_cover=spec["cloud_cover"],
        )  # fmt: skip
        scenes.append(scene)
        if spec["fault"] in ("absent", "truncated"):
            broken.add(scene.id)
    return scenes, broken


def break_files(scenes: list[Scene], world: dict[str, Any]) -> None:
    """After the headers were looked at: what a run meets that a plan did not."""
    for scene, spec in zip(scenes, world["scenes"], strict=True):
        path = Path(scene.assets["red"].href)
        if spec["fault"] == "absent":
            path.unlink()
        if spec["fault"] == "truncated":
            data = path.read_bytes()
            path.write_bytes(data[: len(data) - 40])
            with pytest.raises(rasterio.errors.RasterioError), rasterio.open(path) as dataset:
                dataset.read(1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_shards_equal_the_oracle(world: dict[str, Any]) -> None:
    config = IngestConfig(bands=("red", "nir", "scl"), mask_classes=MASKED, mask_dilate_m=world["dilate_m"])
    with tempfile.TemporaryDirectory() as folder:
        scenes, broken = build(Path(folder), world)
        plan = plan_scenes(scenes, probe_headers(scenes), config, layout=SMALL)
        break_files(scenes, world)
        got = assemble(plan)
        expected = oracle(scenes, broken, plan.grid, world["dilate_m"])
    for name in ("status", "source_item", "scl", "reflectance"):
        np.testing.assert_array_equal(got[name][0], expected[name], err_msg=name)


WORLD: dict[str, Any] = {
    "seed": 3,
    "dilate_m": 0.0,
    "scenes": [
        {"shift": (0.0, 0.0), "dn_offset": 0, "baseline": "05.09", "cloud_cover": 0.0, "fault": "truncated"},
        {"shift": (0.0, 12.0), "dn_offset": 0, "baseline": "05.09", "cloud_cover": 50.0, "fault": ""},
    ],
}


def test_a_broken_source_is_missing_where_nothing_else_sees(tmp_path: Path) -> None:
    scenes, _ = build(tmp_path, WORLD)
    config = IngestConfig(bands=("red", "nir", "scl"))
    plan = plan_scenes(scenes, probe_headers(scenes), config, layout=SMALL)
    whole = assemble(plan)
    assert not (whole["status"] == 3).any(), "nothing is broken yet"
    break_files(scenes, WORLD)
    got = assemble(plan)
    assert (got["status"][0, :, :12] == 3).all(), "only the broken scene covers these columns"
    assert not got["reflectance"][0][:, got["status"][0] == 3].any()
    assert (got["source_item"][got["status"] == 3] == -1).all()
    other = got["source_item"] == 1
    assert other.any()
    assert (got["status"][other] != 3).all()
    outcomes = {o.item_id: o for task in plan.tasks for o in fill_shard(task, plan.recipes[0]).outcomes}
    assert (outcomes["S0"].state, outcomes["S0"].asset, outcomes["S1"].state) == ("missing", "red", "read")
    assert str(tmp_path) not in (outcomes["S0"].reason or "")


def test_later_sources_are_read_only_where_they_are_needed(tmp_path: Path) -> None:
    clear = {"shift": (0.0, 0.0), "dn_offset": 0, "baseline": "05.09", "fault": ""}
    scenes, _ = build(tmp_path, {**WORLD, "scenes": [{**clear, "cloud_cover": c} for c in (0.0, 50.0)]})
    full = make_scene(
        tmp_path, "full", BASE,
        {"red": np.full(SIZE, 5, np.uint16), "nir": np.full(SIZE, 6, np.uint16), "scl": np.full(SIZE, 4, np.uint8)},
        cloud_cover=0.0, baseline="09.99",
    )  # fmt: skip
    plan = plan_scenes(
        [*scenes, full], probe_headers([*scenes, full]), IngestConfig(bands=("red", "nir", "scl")), layout=SMALL
    )
    for task in plan.tasks:
        filled = fill_shard(task, plan.recipes[0])
        assert [o.item_id for o in filled.outcomes] == ["full"]
        assert filled.pixels_read == 3 * task.region.shape[1] * task.region.shape[2]


def test_pixels_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    world = {**WORLD, "scenes": [{**s, "fault": "", "shift": (0.5, 3.5 * n)} for n, s in enumerate(WORLD["scenes"])]}
    scenes, _ = build(tmp_path, world)
    config = IngestConfig(bands=("red", "nir", "scl"), mask_dilate_m=65, crs="EPSG:32634", resolution=17)
    probed = probe_headers(scenes)
    small = assemble(plan_scenes(scenes, probed, config, layout=SMALL))
    large = assemble(plan_scenes(scenes, probed, config, layout=Layout("test", (1, 8, 8), (1, 64, 64))))
    assert (small["status"] == 2).any()
    assert (small["status"] == 1).any()
    for name, array in small.items():
        np.testing.assert_array_equal(array, large[name], err_msg=name)


def test_radar_keeps_floats_and_nan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    power = {band: rng.random(SIZE, np.float32) + 0.01 for band in ("vv", "vh")}
    power["vv"][:3] = -32768
    scene = make_scene(
        tmp_path, "S1", BASE, power, collection="sentinel-1-rtc", product="sentinel-1-rtc", platform="sentinel-1a",
        relative_orbit=44, orbit_direction="ascending",
    )  # fmt: skip
    plan = plan_scenes([scene], probe_headers([scene]), IngestConfig(bands=("vv", "vh")), layout=SMALL)
    got = assemble(plan)
    assert got["backscatter"].dtype == np.float32
    assert np.isnan(got["backscatter"][0, :, :3]).all(), "a pixel without vv is not observed at all"
    np.testing.assert_array_equal(got["backscatter"][0, :, 3:], np.stack([power["vv"], power["vh"]])[:, 3:])
    assert (got["status"][0, 3:] == 1).all()
    assert (got["status"][0, :3] == 0).all()


def test_several_times_in_one_shard_stay_apart(tmp_path: Path) -> None:
    days = []
    for day in (10, 12, 14):
        dn = np.full(SIZE, day, np.uint16)
        pixels: dict[str, np.ndarray] = {"red": dn, "nir": dn, "scl": np.full(SIZE, 4, np.uint8)}
        days.append(make_scene(tmp_path, f"D{day}", BASE, pixels, datetime=f"2023-08-{day:02d}T10:00:00Z"))
    layout = replace(SMALL, chunk=(2, 8, 8), shard=(2, 16, 16))
    plan = plan_scenes(days, probe_headers(days), IngestConfig(bands=("red", "nir", "scl")), layout=layout)
    got = assemble(plan)
    assert [np.unique(got["reflectance"][step]).tolist() for step in range(3)] == [[10], [12], [14]]
    assert [np.unique(got["source_item"][step]).tolist() for step in range(3)] == [[0], [1], [2]]
