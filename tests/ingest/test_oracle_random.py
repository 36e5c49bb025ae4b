"""Shards against an oracle that shares no code with the ingest: numpy over whole scenes, in exact fractions.

Worlds are made up by hypothesis: several days of scenes with mixed baselines, zones, lattices, resolutions and
overlaps, with duplicates, split datatakes, lacking bands and files that fail, with masks that grow, clipping, groups
and reducers; some lie on both sides of 180° and are brought to longitude and latitude.
Pixels are multiples of 64, so that no interpolation ends in exactly one half, where the last bit of a float would
decide; and where zones differ the kernel is nearest, because only there can numpy say exactly what is right.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, reject, seed, settings
from hypothesis import strategies as st
from pyproj import Transformer

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import AssetProbe, SceneProbe
from ingest.plan.task import SourceAsset
from ingest.raster import resample
from ingest.raster.resample import pick_resampling, place
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.dedupe import dedupe
from ingest.scenes.footprint import box_region, to_geojson
from ingest.scenes.scene import AssetRef, Scene
from zarr_store.errors import AssetUnreadable, NothingFound
from zarr_store.grid import Grid
from zarr_store.spec import Layout

from .worlds_on_disk import write_scene

CASES = int(os.environ.get("TERRASHARD_ORACLE_CASES", "10000"))
SLICE = 100
"""Worlds of one seed of the long run; each seed is a test of its own."""
SEEDS = range(*map(int, os.environ.get("TERRASHARD_ORACLE_SEEDS", f"0:{-(-CASES // SLICE)}").split(":")))
"""Seeds of the long run, "first:end" in the environment; a short run names one test that is skipped."""
if "TERRASHARD_ORACLE" not in os.environ:
    SEEDS = range(1)
HERE, NEXT = "EPSG:32633", "EPSG:32634"
X0, Y0 = 700_000.0, 5_000_040.0
WEST, EAST = "EPSG:32660", "EPSG:32601"
NEAR_180 = (736_280.0, 4_987_320.0)
"""A corner in zone 60 that is a little west of 180°, so that scenes lie on both sides."""
DEGREES = 0.00015
LAYOUT = Layout("test", (1, 8, 8), (1, 16, 16))
MASKED = (0, 3, 9)
BANDS = ("red", "nir")
DN = np.array([0, 64, 960, 1024, 1088, 5056, 65472], np.uint16)
CLASSES = np.array([0, 3, 4, 5, 9], np.uint8)


@dataclass(frozen=True)
class Made:
    """One scene of a world: what the catalogue says, what the files hold, and whether they can be read."""

    scene: Scene
    pixels: dict[str, np.ndarray]
    broken: str | None
    copy_of: str | None = None
    looked: bool = False
    """Whether the share of clouds was measured; else the catalogue's word counts."""
    told: frozenset[str] = frozenset()
    """Bands whose files say by a mask or by another nodata value than 0 where they have no data."""

    @property
    def cloud_share(self) -> float | None:
        seen = self.pixels["scl"] > 0
        return float(np.isin(self.pixels["scl"][seen], MASKED).mean()) if self.looked and seen.any() else None


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    zone = draw(st.sampled_from(["same", "same", "same", "same", "mixed", "across"]))
    scenes = []
    for _ in range(draw(st.integers(1, 5))):
        other = zone != "same" and draw(st.booleans())
        here, there = (WEST, EAST) if zone == "across" else (HERE, NEXT)
        scenes.append(
            {
                "zone": there if other else here,
                "day": draw(st.integers(1, 3)),
                # pixels of 20 m; a quarter is another lattice, a half would leave nearest undecided
                "shift": tuple(draw(st.integers(-8, 8)) + draw(st.sampled_from([0.0, 0.0, 0.25])) for _ in "yx"),
                "metres": draw(st.sampled_from([20, 20, 20, 40])),
                "dn_offset": draw(st.sampled_from([0, -1000])),
                "nir_offset": draw(st.sampled_from([None, None, None, 0, -1000])),
                "baseline": draw(st.sampled_from(["02.14", "04.00", "05.09"])),
                "cloud_cover": float(draw(st.sampled_from([0, 10, 90]))),
                "looked": draw(st.booleans()),
                "fault": draw(st.sampled_from(["", "", "", "", "red", "scl", "lacking", "copy", "split"])),
            }
        )
    return {
        "scenes": scenes,
        "seed": draw(st.integers(0, 2**31)),
        "crs": "EPSG:4326" if zone == "across" else HERE,
        "kernel": "nearest" if zone != "same" else draw(st.sampled_from(["nearest", "bilinear"])),
        "dilate_m": draw(st.sampled_from([0.0, 20.0, 45.0])),
        "mask": draw(st.sampled_from(["scl", "scl", "none"])),
        "group": draw(st.sampled_from(["solar-day", "item", "month"])),
        "reduce": draw(st.sampled_from(["first", "median", "mean"])),
        "clip": zone != "across" and draw(st.booleans()),
        "files": draw(st.sampled_from([False] * 9 + [True])),
        # small blocks are warped in a tenth of the time; where a shard is cut must not matter
        "block": draw(st.sampled_from([32, 32, 64, resample._BLOCK_PX])),
    }


@functools.cache
def transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def build(world: dict[str, Any]) -> list[Made]:
    rng = np.random.default_rng(world["seed"])
    to_next = transformer(HERE, NEXT)
    to_east = transformer(WEST, EAST)
    made = []
    for number, spec in enumerate(world["scenes"]):
        x, y = X0, Y0
        if spec["zone"] == NEXT:
            x, y = (20 * math.floor(v / 20) for v in to_next.transform(X0, Y0))
        elif spec["zone"] != HERE:
            x, y = NEAR_180 if spec["zone"] == WEST else to_east.transform(*NEAR_180)
            x, y = (20 * math.floor(v / 20) for v in (x, y))
        metres = spec["metres"]
        if spec["zone"] == HERE and metres == 40:
            down, right = (math.floor(v) for v in spec["shift"])  # so that 40 m nests in 20 m
        else:
            down, right = spec["shift"]
        size = (20, 18) if metres == 20 else (10, 9)
        grid = Grid(spec["zone"], (metres, 0.0, x + 20 * right, 0.0, -metres, y - 20 * down), size)
        pixels = {band: rng.choice(DN, size=size) for band in BANDS}
        pixels["scl"] = rng.choice(CLASSES, p=[0.05, 0.08, 0.5, 0.27, 0.1], size=size)
        lacking = ("nir",) if spec["fault"] == "lacking" else ()
        item = f"S{number}"
        assets = {
            band: AssetRef(
                band, band, f"/memory/{item}/{band}", grid=grid, nodata=0, kind="class" if band == "scl" else "data"
            )
            for band in pixels
            if band not in lacking
        }
        west, south, east, north = grid.lonlat_bounds()
        footprint = to_geojson(box_region((west, south, east, north)))
        scene = Scene(
            id=item, collection="sentinel-2-l2a", provider="terrashard", assets=assets, lacking=lacking,
            datetime=f"2023-08-{spec['day']:02d}T10:00:{number:02d}Z", bbox=(west, south, east, north),
            footprint=footprint, product="sentinel-2-l2a", dn_offset=spec["dn_offset"],
            baseline=spec["baseline"], cloud_cover=spec["cloud_cover"], platform="sentinel-2a", tile=f"T{number}",
            band_offsets={} if spec["nir_offset"] in (None, spec["dn_offset"]) else {"nir": spec["nir_offset"]},
            relative_orbit=79, datatake=f"GS2A_202308{spec['day']:02d}T100000_0_N", created="2023-09-01T00:00:00Z",
        )  # fmt: skip
        broken = spec["fault"] if spec["fault"] in ("red", "scl") else None
        if spec["fault"] == "split":  # two stations: each has some rows of the tile, and states the whole of it
            rest = {band: values.copy() for band, values in pixels.items()}
            for band in pixels:
                pixels[band][size[0] // 2 + 1 :], rest[band][: size[0] // 2 - 1] = 0, 0
            later = scene.datetime.replace("T10:00:", "T10:01:")
            half = replace(scene, id=f"{item}_south", datetime=later, datastrip="20230801T100012")
            scene = replace(scene, datastrip="20230801T095958")
            made.append(Made(half, rest, None, looked=spec["looked"]))
        made.append(Made(scene, pixels, broken, looked=spec["looked"] and broken != "scl"))
        if spec["fault"] == "copy":  # an older processing of the same granule: it must not give a single pixel
            older = replace(scene, id=f"{item}_old", baseline="01.00", cloud_cover=0.0)
            made.append(
                Made(older, {b: np.full_like(p, 64 if b != "scl" else 4) for b, p in pixels.items()}, None, item)
            )
    return made


def write(made: list[Made], world: dict[str, Any], folder: Path) -> list[Made]:
    """Write the files of a world, and note what they tell."""
    written = []
    for number, one in enumerate(made):
        scene, told = write_scene(one.scene, one.pixels, one.broken, folder, world["seed"] + number)
        written.append(replace(one, scene=scene, told=told))
    return written


def ingest(made: list[Made], world: dict[str, Any]) -> tuple[Plan, dict[str, np.ndarray]]:
    """The way of a real ingest, in most worlds but for files: duplicates, plan, shards."""
    table = {(m.scene.id, band): m for m in made for band in m.pixels}
    scenes, drops = dedupe([m.scene for m in made])
    assert {d.dropped.id for d in drops} == {m.scene.id for m in made if m.copy_of}
    shares = {m.scene.id: m.cloud_share for m in made}
    probes = {
        s.id: SceneProbe(
            {b: AssetProbe(a.grid, str(a.dtype), 0) for b, a in s.assets.items()}, s.dn_offset, "unchecked",
            cloud_share=shares[s.id], band_offsets=s.band_offsets,
        )
        for s in scenes
    }  # fmt: skip
    config = IngestConfig(
        bands=(*BANDS, "scl"), resampling=world["kernel"], mask=world["mask"], mask_classes=MASKED,
        mask_dilate_m=world["dilate_m"], group=world["group"], reduce=world["reduce"], crs=world["crs"],
        resolution=DEGREES if world["crs"] == "EPSG:4326" else 20,
        indices=("ndvi",), geometry=CLIP if world["clip"] else None,
    )  # fmt: skip
    try:
        plan = plan_scenes(scenes, probes, config, layout=LAYOUT)
    except NothingFound:
        reject()
    if world["seed"] % 4 == 0:  # as a worker of another process or a later run has it
        plan = Plan.from_json(plan.to_json())
    recipe = plan.recipes[0]

    def read(asset: SourceAsset, window: Grid) -> np.ndarray:
        one = table[asset.scene, asset.band]
        if one.broken == asset.band:
            raise AssetUnreadable.of(asset.scene, asset.key, "gone", asset.href)
        source = asset.header
        assert source is not None
        values = one.pixels[asset.band]
        kernel = pick_resampling(asset.kind, source, window, asset.resampling)

        def cut(row: int, col: int, height: int, width: int, into: np.ndarray | None = None) -> np.ndarray:
            return values[row : row + height, col : col + width]

        return place(cut, source, window, kernel, dtype=values.dtype, nodata=0)

    got = {a.name: np.zeros(recipe.spec.array_shape(a.name), a.dtype) for a in recipe.spec.arrays()}
    for task in plan.tasks:
        for name, part in fill_shard(task, recipe, reader=None if world["files"] else read).arrays.items():
            t, y, x = task.region.slices
            got[name][(t, slice(None), y, x) if part.ndim == 4 else (t, y, x)] = part
    return plan, got


CLIP = {
    "type": "Polygon",
    "coordinates": [[[17.542, 45.1262], [17.5478, 45.1255], [17.5482, 45.1215], [17.545, 45.124], [17.542, 45.1262]]],
}


# ---------------------------------------------------------------------------------------------------------- oracle


def sample(values: np.ndarray, grid: Grid, target: Grid, kernel: str) -> np.ndarray:
    """`values` on `target` by the definition of nearest or bilinear: centres, weights, fractions."""
    x, y = (v.ravel() for v in np.meshgrid(target.x(), target.y()))
    if grid.crs != target.crs:
        x, y = transformer(target.crs, grid.crs).transform(x, y)
    a, _, c, _, e, f = grid.transform
    col, row = (x - c) / a, (y - f) / e
    height, width = values.shape
    if kernel == "nearest":
        if grid.crs != target.crs:
            # on the line between two pixels the last bit of a projection decides
            assume(min(np.abs(v - np.round(v)).min() for v in (col, row)) > 1e-5)
        i, j = np.floor(row + 1e-9).astype(int), np.floor(col + 1e-9).astype(int)
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        out = np.where(inside, values[np.clip(i, 0, height - 1), np.clip(j, 0, width - 1)], 0)
        return out.reshape(target.shape).astype(np.int64)
    # where the source pixel under the centre has no data there is none, however near others are
    inside = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    inside &= values[np.clip(row.astype(int), 0, height - 1), np.clip(col.astype(int), 0, width - 1)] > 0
    top, left = np.floor(row - 0.5).astype(int), np.floor(col - 0.5).astype(int)
    down, right = row - 0.5 - top, col - 0.5 - left
    total, weights = np.zeros(x.size), np.zeros(x.size)
    for di, wi in ((0, 1 - down), (1, down)):
        for dj, wj in ((0, 1 - right), (1, right)):
            i, j = top + di, left + dj
            there = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            value = np.where(there, values[np.clip(i, 0, height - 1), np.clip(j, 0, width - 1)], 0)
            weight = np.where(value > 0, wi * wj, 0)
            total, weights = total + weight * value, weights + weight
    return (
        np.where(inside & (weights > 1e-9), np.rint(total / np.maximum(weights, 1e-9)), 0)
        .reshape(target.shape)
        .astype(np.int64)
    )


def lattice(grid: Grid, target: Grid) -> bool:
    """Whether target pixels never straddle pixels of `grid`."""
    shift = ((target.transform[2] - grid.transform[2]) / 20, (target.transform[5] - grid.transform[5]) / 20)
    return grid.crs == target.crs and all(abs(v - round(v)) < 1e-9 for v in shift)


def oracle(made: list[Made], world: dict[str, Any], target: Grid, kept: set[str]) -> dict[str, np.ndarray]:
    """All steps, scene by scene over the whole grid, by the documented rules."""
    used = [m for m in made if m.scene.id in kept]
    for one in made:
        if one.scene.id not in kept and not one.copy_of:
            grid = one.scene.assets["red"].grid
            assert grid is not None
            assert not sample(np.ones(grid.shape), grid, target, "nearest").any(), (
                "only scenes beside the grid are dropped"
            )
    rows = {m.scene.id: n for n, m in enumerate(sorted(used, key=lambda m: (m.scene.datetime, m.scene.id)))}
    label = {"solar-day": 10, "month": 7, "item": None}[world["group"]]
    groups: dict[str, list[Made]] = {}
    for one in sorted(used, key=lambda m: m.scene.datetime):
        groups.setdefault(solar_time(one, target)[:label], []).append(one)
    outside = outside_clip(target) if world["clip"] else np.zeros(target.shape, bool)
    steps = [compose(members, world, target, rows, outside) for members in groups.values()]
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def solar_time(one: Made, target: Grid) -> str:
    """The scene's time as the sun has it in the middle of the grid; worlds near 17° E never change their date."""
    if target.crs == HERE:
        return one.scene.datetime
    middle = round((target.bounds[0] + target.bounds[2]) / 2, 9)
    hours = (middle - 360 if middle >= 180 else middle) / 15
    return (dt.datetime.fromisoformat(one.scene.datetime) + dt.timedelta(hours=hours)).isoformat()


def pixel_m(target: Grid) -> tuple[float, float]:
    """Height and width of a pixel on the ground in the middle of the grid, in metres."""
    if target.crs == HERE:
        return 20.0, 20.0
    _, south, _, north = target.bounds
    radians = math.radians((south + north) / 2)
    # lengths of a degree on the WGS 84 ellipsoid (Snyder, Map Projections, 1987, eq. 4-18, 4-19)
    bulge = 1 - 0.00669438 * math.sin(radians) ** 2
    return (
        target.resolution[1] * math.radians(6_378_137 * (1 - 0.00669438) / bulge**1.5),
        target.resolution[0] * math.radians(6_378_137 * math.cos(radians) / bulge**0.5),
    )


def outside_clip(target: Grid) -> np.ndarray:
    from shapely import contains_xy
    from shapely.geometry import shape

    x, y = np.meshgrid(target.x(), target.y())
    return ~contains_xy(shape(CLIP), *transformer(HERE, "EPSG:4326").transform(x, y))


def compose(
    members: list[Made], world: dict[str, Any], target: Grid, rows: dict[str, int], outside: np.ndarray
) -> dict[str, np.ndarray]:
    def order(one: Made) -> tuple[Any, ...]:
        grid = next(iter(one.scene.assets.values())).grid
        assert grid is not None
        rank = 0 if lattice(grid, target) else 1 if grid.crs == target.crs else 2
        cloud = one.scene.cloud_cover if one.cloud_share is None else 100 * one.cloud_share
        return (rank, cloud, -float(one.scene.baseline or 0), one.scene.id)

    shape = target.shape
    value, layer = np.zeros((2, *shape), np.int64), np.zeros(shape, np.int64)
    status, winner, count = np.zeros(shape, int), np.full(shape, -1), np.zeros(shape, int)
    stack, clears, lost = [], [], np.zeros(shape, bool)
    wide = target.window(-4, -4, shape[0] + 8, shape[1] + 8)
    height_m, width_m = pixel_m(target)
    for one in sorted(members, key=order):
        grid = next(iter(one.scene.assets.values())).grid
        assert grid is not None
        if one.scene.lacking or one.broken:
            lost |= sample(np.ones(grid.shape), grid, target, "nearest") > 0
            continue
        dn = np.stack([sample(one.pixels[band], grid, target, world["kernel"]) for band in BANDS])
        scl = sample(one.pixels["scl"], grid, wide, "nearest")
        near = scl[4:-4, 4:-4]
        # a band of 0 beside one with a value, where the class has seen the ground, is a clipped number, unless its file
        # tells in another way where it has no data
        seen = (dn > 0).any(axis=0) & ~outside
        for name, values in zip(BANDS, dn, strict=True):
            if name in one.told:
                seen &= values > 0
        masked = np.zeros(shape, bool)
        # the class layer is kept even where nothing is masked, but then it does not decide what is seen
        seen &= near > 0
        if world["mask"] == "scl":
            masked = np.isin(near, MASKED)
            cloud = np.isin(scl, [m for m in MASKED if m])
            for dy in range(-3, 4):
                for dx in range(-4, 5):
                    if math.hypot(dy * height_m, dx * width_m) <= world["dilate_m"]:
                        masked |= cloud[4 + dy : 4 + dy + shape[0], 4 + dx : 4 + dx + shape[1]]
        added = np.array([one.scene.offset_of(band) for band in BANDS])
        moved = np.clip(dn + added[:, None, None], 1, 65535)
        clear = seen & ~masked
        wins = (clear & (status != 1)) | (seen & (status == 0))
        value[:, wins], layer[wins], winner[wins] = moved[:, wins], near[wins], rows[one.scene.id]
        status[wins] = np.where(clear, 1, 2)[wins]
        count += clear
        stack.append(moved)
        clears.append(clear)
    status[(status == 0) & lost & ~outside] = 3
    if world["reduce"] != "first" and stack:
        for y, x in zip(*np.nonzero(count), strict=True):
            for number in range(2):
                chosen = sorted(int(v[number, y, x]) for v, clear in zip(stack, clears, strict=True) if clear[y, x])
                n = len(chosen)
                pair = (chosen[(n - 1) // 2] + chosen[n // 2], 2) if world["reduce"] == "median" else (sum(chosen), n)
                value[number, y, x] = (2 * pair[0] + pair[1]) // (2 * pair[1])  # nearest, halves up
    red, nir = value
    index = np.where(red > 0, np.rint(10_000 * (nir - red) / np.maximum(nir + red, 1)), -32768)
    out = {"reflectance": value, "scl": layer, "status": status, "ndvi": index}
    return out | ({"source_item": winner} if world["reduce"] == "first" else {"observations": count})


def check(world: dict[str, Any]) -> int:
    """How many voxels were compared; a wrong one is an error."""
    made = build(world)
    with tempfile.TemporaryDirectory() as folder:
        if world["files"]:
            made = write(made, world, Path(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resample, "_BLOCK_PX", world["block"])
            plan, got = ingest(made, world)
    expected = oracle(made, world, plan.grid, {row["id"] for row in plan.items["sentinel-2-l2a"]})
    assert set(got) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=f"{name} of {world}")
    return sum(array.size for array in expected.values())


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(worlds())
def test_every_voxel_of_made_up_worlds(world: dict[str, Any]) -> None:
    assert check(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("TERRASHARD_ORACLE" not in os.environ, reason="set TERRASHARD_ORACLE=1 for 10,000 worlds")
@pytest.mark.parametrize("number", SEEDS)
def test_every_voxel_of_ten_thousand_worlds(number: int) -> None:
    count = 0

    @seed(number)
    @settings(max_examples=SLICE, deadline=None, database=None, suppress_health_check=QUIET, phases=[Phase.generate])
    @given(worlds())
    def many(world: dict[str, Any]) -> None:
        nonlocal count
        check(world)
        count += 1

    many()
    assert count >= SLICE
