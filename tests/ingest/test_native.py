"""Native grids: each band keeps its pixels, as groups of one cube whose grids nest and whose shards share their ground.

The oracle is plain numpy on the arrays that were written: no pixel of a native group is resampled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.scenes.scene import Scene
from ingest.scenes.search import SearchResult
from ingest.testing import make_scene, probe_headers
from ingest.upkeep.append import merge_plans
from ingest.upkeep.audit import compare
from ingest.upkeep.contradictions import refuse_contradictions
from ingest.upkeep.repair import repair
from zarr_store.errors import CubeMismatch, InvalidInput
from zarr_store.grid import Grid
from zarr_store.nesting import nested_layouts, nesting_factor
from zarr_store.read import open_cube
from zarr_store.spec import LAYOUTS, Layout
from zarr_store.verify import verify_cube

from .growing import tree

ROOT = Path(__file__).parents[2]
CRS = "EPSG:32633"
EAST, NORTH = 500_000.0, 5_100_000.0
SIZES = {"red": 10, "nir": 10, "rededge1": 20, "swir16": 20, "coastal": 60}
GROUPS = {10: ("red", "nir"), 20: ("rededge1", "swir16"), 60: ("coastal",)}
MASKED = (0, 1, 3, 8, 9, 10)
CONFIG = IngestConfig(bands=(*SIZES, "scl"), native=True)
SHARD = Layout("t", (1, 48, 48), (1, 96, 96))
"""Shards of 96, 48 and 16 pixels: several of each size lie inside a scene."""


def grid_of(size: int, east: float, pixels: tuple[int, int]) -> Grid:
    return Grid(CRS, (float(size), 0.0, east, 0.0, -float(size), NORTH), pixels)


def make(folder: Path, day: int, part: int, *, side_m: int = 1_440) -> tuple[Scene, dict[str, np.ndarray]]:
    """One scene of three sizes, 480 m further east for each part; SCL is the same in each block of 60 m.

    The swath ends inside the scene: the last 240 m of the south are without data in all bands.
    """
    rng = np.random.default_rng(10 * day + part)
    east = EAST + 480.0 * part
    shapes = {size: (side_m // size, side_m // size) for size in (10, 20, 60)}
    pixels: dict[str, np.ndarray] = {
        band: rng.integers(1, 9000, shapes[size]).astype(np.uint16) for band, size in SIZES.items()
    }
    blocks = rng.choice(np.array([3, 4, 5, 9], np.uint8), size=shapes[60])
    blocks[-4:] = 0
    for band, size in SIZES.items():
        pixels[band][-240 // size :] = 0
    pixels["scl"] = blocks.repeat(3, axis=0).repeat(3, axis=1)
    grids = {band: grid_of(size, east, shapes[size]) for band, size in {**SIZES, "scl": 20}.items()}
    scene = make_scene(
        folder, f"D{day}P{part}", grids["red"], pixels, grids=grids, datetime=f"2023-08-{day:02d}T10:00:0{part}Z",
        platform="sentinel-2a", tile=f"33TW{'LM'[part]}", relative_orbit=79, datatake=f"GS2A_{day:06d}_N05.09",
        baseline="05.09", created="2023-09-01T00:00:00Z",
    )  # fmt: skip
    return scene, pixels


def plan_of(scenes: Sequence[Scene], config: IngestConfig = CONFIG, layout: Layout | None = SHARD) -> Plan:
    return plan_scenes(scenes, probe_headers(scenes), config, layout=layout)


def oracle(
    size: int, days: dict[int, list[tuple[Scene, dict[str, np.ndarray]]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bands (T, B, y, x), status and SCL of one group: clear pixels of the first scene first, then masked ones."""
    height, width, step = 1_440 // size, 1_920 // size, 480 // size
    bands = np.zeros((len(days), len(GROUPS[size]), height, width), np.uint16)
    status, classes = (np.zeros((len(days), height, width), np.uint8) for _ in range(2))
    for t, members in enumerate(days.values()):
        for wanted in (1, 2):
            for part, (_, pixels) in enumerate(members):
                scl = pixels["scl"]
                scl = scl.repeat(2, axis=0).repeat(2, axis=1) if size == 10 else scl[::3, ::3] if size == 60 else scl
                at = (slice(None), slice(part * step, part * step + height))
                state = np.where(np.isin(scl, MASKED), 2, 1)
                take = (scl > 0) & (state == wanted) & (status[t][at] == 0)
                for number, band in enumerate(GROUPS[size]):
                    bands[t, number][at][take] = pixels[band][take]
                status[t][at][take] = wanted
                classes[t][at][take] = scl[take]
    return bands, status, classes


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[Scene, dict[str, np.ndarray]]]]:
    folder = tmp_path_factory.mktemp("native-scenes")
    return {day: [make(folder, day, part) for part in range(2)] for day in (10, 12)}


@pytest.fixture(scope="module")
def plan(days: dict[int, Any]) -> Plan:
    return plan_of([scene for members in days.values() for scene, _ in members])


@pytest.fixture(scope="module")
def cube(plan: Plan, local_client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "cube.zarr"
    assert run(plan, path, client=local_client).exit_code == 0
    return path


def test_every_voxel_of_every_size_is_that_of_its_file(cube: Path, days: dict[int, Any]) -> None:
    opened = open_cube(cube)
    assert opened.collections == tuple(f"sentinel-2-l2a_{size}m" for size in GROUPS)
    for size, bands in GROUPS.items():
        name = f"sentinel-2-l2a_{size}m"
        spec, dataset = opened.spec(name), opened.dataset(name)
        assert (spec.grid.resolution, spec.band_names) == ((size, size), bands)
        main, status, classes = oracle(size, days)
        seen = status > 0
        assert seen.mean() > 0.4
        np.testing.assert_array_equal(dataset.status.values, status)
        np.testing.assert_array_equal(dataset.scl.values, classes)
        np.testing.assert_array_equal(dataset.reflectance.values, main)
        assert opened.provenance["collections"][name]["resampled_share"] == 0.0


def test_edges_coincide_and_shards_share_their_ground(cube: Path) -> None:
    opened = open_cube(cube)
    specs = [opened.spec(name) for name in opened.collections]
    assert opened.grid == specs[0].grid
    assert [nesting_factor(specs[0].grid, spec.grid) for spec in specs] == [1, 2, 6]
    assert len({spec.grid.bounds for spec in specs}) == 1
    assert [spec.layout.shard[1] for spec in specs] == [96, 48, 16]
    grounds = [
        {at: spec.grid.window(r.y0, r.x0, *r.shape[1:]).bounds for at, r in spec.shards().items()} for spec in specs
    ]
    assert len(grounds[0]) > 2
    assert grounds[0] == grounds[1] == grounds[2]
    assert specs[0].times == specs[1].times == specs[2].times


def test_a_native_group_is_the_plain_cube_of_its_bands(plan: Plan, days: dict[int, Any]) -> None:
    """The same bands on one grid of 20 m, without --native: the same pixels, scene by scene."""
    scenes = [scene for members in days.values() for scene, _ in members]
    config = IngestConfig(bands=("rededge1", "swir16", "scl"), resolution=20)
    plain = plan_of(scenes, config, layout=Layout("t", (1, 24, 24), (1, 48, 48)))
    native = [task for task in plan.tasks if task.collection.endswith("_20m")]
    assert [task.index for task in native] == [task.index for task in plain.tasks]
    for ours, theirs in zip(native, plain.tasks, strict=True):
        filled = fill_shard(ours, plan.recipe(ours.collection)).arrays
        expected = fill_shard(theirs, plain.recipes[0]).arrays
        for name, pixels in expected.items():
            np.testing.assert_array_equal(filled[name], pixels)


def test_a_plan_file_is_the_plan_and_shows_the_effort_of_each_size(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert (again, again.digest) == (plan, plan.digest)
    assert [again.catalogue(recipe.spec.collection) for recipe in again.recipes] == ["sentinel-2-l2a"] * 3
    text = plan.summary()
    assert "native: bands keep their pixels of 10m, 20m, 60m" in text
    assert text.count("effort    read about") == 3
    assert repr(plan).startswith("<Plan of 4 scenes:")


def test_verify_and_repair_know_the_groups(cube: Path, plan: Plan, tmp_path: Path, local_client: Any) -> None:
    import shutil

    copy = tmp_path / "cube.zarr"
    shutil.copytree(cube, copy)
    shard = copy / "sentinel-2-l2a_60m" / "reflectance" / "c" / "0" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert [one.collection for one in verify_cube(copy).damage] == ["sentinel-2-l2a_60m"]
    folder = next(iter(plan.tasks[0].sources[0].assets)).href.rpartition("/")[0].rpartition("/")[0]
    assert len(repair(copy, IngestConfig(allow_local=(folder,)), client=local_client).damage) == 1
    assert verify_cube(copy).damage == ()
    assert (copy / shard.relative_to(copy)).read_bytes() == (cube / shard.relative_to(copy)).read_bytes()


def test_audit_and_append_see_one_collection(plan: Plan, days: dict[int, Any], tmp_path: Path) -> None:
    known = [scene for members in days.values() for scene, _ in members]
    new, pixels = make(tmp_path, 20, 0)
    news = compare(plan, SearchResult((*known, new)))
    assert ([scene.id for scene in news.missing], news.superseded, news.removed) == (["D20P0"], {}, ())
    newer = replace(known[0], id="D10P0_again", created="2024-01-01T00:00:00Z", baseline="05.10")
    assert list(compare(plan, SearchResult((*known, newer))).superseded) == [("sentinel-2-l2a", "D10P0_again")]
    fresh = plan_scenes([new], probe_headers([new]), CONFIG, layout=SHARD, grid=plan.grid, kept=plan.recipes)
    merged = merge_plans(plan, fresh, replaces={}, config=plan.config)
    assert [len(recipe.spec.times) for recipe in merged.recipes] == [3, 3, 3]
    task = next(t for t in merged.tasks if t.collection.endswith("_60m") and t.index == (2, 0, 0))
    filled = fill_shard(task, merged.recipe(task.collection)).arrays
    seen = filled["status"][0] > 0
    assert seen.any()
    np.testing.assert_array_equal(filled["reflectance"][0, 0][seen], pixels["coastal"][:16, :16][seen])


def test_other_rules_are_refused_when_a_native_cube_is_continued(plan: Plan) -> None:
    refuse_contradictions(plan, CONFIG)
    with pytest.raises(CubeMismatch, match="native: yes → no"):
        refuse_contradictions(plan, CONFIG.model_copy(update={"native": False}))
    with pytest.raises(CubeMismatch, match="bands: "):
        refuse_contradictions(plan, CONFIG.model_copy(update={"bands": ("red", "scl")}))


def test_a_collection_of_one_size_keeps_its_name_and_its_own_grid(tmp_path: Path) -> None:
    config = IngestConfig(bands=("red", "coastal", "vv"), mask="none", native=True)
    optical, radar = make(tmp_path, 10, 0)[0], Grid(CRS, (20.0, 0.0, EAST, 0.0, -20.0, NORTH), (72, 72))
    s1 = make_scene(tmp_path, "S1", radar, {"vv": np.ones(radar.shape, np.float32)}, datetime="2023-08-10T05:00:00Z",
                    collection="sentinel-1-rtc", product="sentinel-1-rtc")  # fmt: skip
    made = plan_scenes([s1, optical], probe_headers([s1, optical]), config)
    assert [(r.spec.collection, r.catalogue, r.spec.grid.resolution[0]) for r in made.recipes] == [
        ("sentinel-2-l2a_10m", "sentinel-2-l2a", 10.0),
        ("sentinel-1-rtc", "sentinel-1-rtc", 20.0),
        ("sentinel-2-l2a_60m", "sentinel-2-l2a", 60.0),
    ]
    assert all(recipe.native for recipe in made.recipes)


def test_files_that_cannot_be_opened_have_the_size_of_their_product(tmp_path: Path) -> None:
    scene = make(tmp_path, 10, 0)[0]
    Path(scene.assets["swir16"].href).write_bytes(b"gone")
    made = plan_of([scene], IngestConfig(bands=("red", "swir16"), mask="none", native=True))
    assert [recipe.spec.grid.resolution[0] for recipe in made.recipes] == [10, 20]


@pytest.mark.parametrize("resolution", [15, 25])
def test_sizes_that_do_not_nest_are_refused(tmp_path: Path, resolution: int) -> None:
    scene = odd_scene(tmp_path, Grid(CRS, (float(resolution), 0, EAST, 0, -float(resolution), NORTH), (24, 24)))
    with pytest.raises(
        InvalidInput, match=rf"pixels of swir16 are {resolution} m wide, which is {resolution / 10:g} times"
    ):
        plan_of([scene], IngestConfig(bands=("red", "swir16"), mask="none", native=True), None)


def test_pixels_whose_edges_lie_apart_are_refused(tmp_path: Path) -> None:
    scene = odd_scene(tmp_path, Grid(CRS, (20.0, 0, EAST + 5, 0, -20.0, NORTH), (36, 36)))
    with pytest.raises(InvalidInput, match=r"native grids must nest: pixels of red \(10m\) begin 0.5 pixels right"):
        plan_of([scene], IngestConfig(bands=("red", "swir16"), mask="none", native=True), None)


def odd_scene(folder: Path, swir: Grid) -> Scene:
    red = Grid(CRS, (10.0, 0.0, EAST, 0.0, -10.0, NORTH), (72, 72))
    pixels = {"red": np.ones(red.shape, np.uint16), "swir16": np.ones(swir.shape, np.uint16)}
    return make_scene(folder, "ODD", red, pixels, grids={"swir16": swir})


def test_options_that_contradict_native_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--native keeps the pixel size of each band, --resolution 10 asks"):
        IngestConfig.from_flat({"native": True, "resolution": 10})
    scene = make(tmp_path, 10, 0)[0]
    with pytest.raises(InvalidInput, match="--index ndre is made of bands of different pixel sizes"):
        plan_of([scene], IngestConfig(bands=("nir", "rededge1"), mask="none", native=True, indices=("ndre",)), None)
    made = plan_of([scene], IngestConfig(bands=("red", "nir", "swir16"), mask="none", native=True, indices=("ndvi",)))
    assert [[index.name for index in recipe.spec.derived] for recipe in made.recipes] == [["ndvi"], []]


@pytest.mark.parametrize("profile", list(LAYOUTS))
def test_layouts_of_all_sizes_share_their_ground(profile: str) -> None:
    made = nested_layouts(LAYOUTS[profile], (1, 2, 6))
    assert len({layout.shard[1] * factor for factor, layout in made.items()}) == 1
    for layout in made.values():
        assert layout.shard[1] % layout.chunk[1] == 0
        assert layout.chunk[1] % 8 == 0
        assert layout.chunk[1] <= LAYOUTS[profile].chunk[1]
    assert nested_layouts(LAYOUTS[profile], (1,)) == {1: LAYOUTS[profile]}


def test_grids_nest_or_say_why_not() -> None:
    fine = Grid(CRS, (10.0, 0.0, EAST, 0.0, -10.0, NORTH), (12, 18))
    assert nesting_factor(fine, fine.coarsen(6)) == 6
    shifted = Grid(CRS, (20.0, 0.0, EAST + 10, 0.0, -20.0, NORTH), (6, 9))
    for coarse, why in (
        (replace(fine.coarsen(2), crs="EPSG:32634"), "its CRS is EPSG:32634"),
        (Grid(CRS, (15.0, 0.0, EAST, 0.0, -15.0, NORTH), (8, 12)), "one pixel of it is 1.5 pixels"),
        (shifted, "it begins 1 pixels right of"),
        (Grid(CRS, (20.0, 0.0, EAST, 0.0, -20.0, NORTH), (6, 8)), "it covers 12×16 pixels"),
    ):
        with pytest.raises(InvalidInput, match=why):
            nesting_factor(fine, coarse)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.ingest import die_everywhere
from ingest.plan.plan import Plan
from zarr_store import crash
os._exit = lambda _code: os.kill(os.getpid(), signal.SIGKILL)
crash.arm(int(sys.argv[3]))
die_everywhere.run(Plan.from_json(Path(sys.argv[1]).read_text()), sys.argv[2], client=die_everywhere.CLIENT)
"""


def test_a_native_ingest_that_is_killed_goes_on_with_the_same_bytes(
    plan: Plan, cube: Path, local_client: Any, tmp_path: Path
) -> None:
    path, file = tmp_path / "cube.zarr", tmp_path / "plan.json"
    file.write_text(plan.to_json())
    command = [sys.executable, "-c", KILLED, str(file), str(path), "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = open_cube(path)
    before = sum(len(killed.ledger(name).rows()) for name in killed.collections)
    assert 0 < before < len(plan.tasks)
    assert run(plan, path, client=local_client).exit_code == 0
    assert tree(path) == tree(cube)
