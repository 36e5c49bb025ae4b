"""stackstac's view of a plan against the cube of the same plan: the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.task import RULES_VERSION
from ingest.raster.read import read_on_grid
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.stack import stack
from ingest.testing import make_scene, probe_headers
from zarr_store.errors import AssetUnreadable, UnknownName
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.spec import Layout


@pytest.fixture(scope="module")
def mixed_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Four scenes of one day: on the lattice, half a pixel off, of the next zone; one with an offset."""
    rng = np.random.default_rng(5)
    zone33 = Grid("EPSG:32633", (20.0, 0.0, 700_000.0, 0.0, -20.0, 5_000_020.0), (90, 80))
    half = Grid("EPSG:32633", (20.0, 0.0, 700_810.0, 0.0, -20.0, 4_999_630.0), (90, 80))
    zone34 = Grid("EPSG:32634", (20.0, 0.0, 228_000.0, 0.0, -20.0, 5_004_000.0), (110, 120))
    scenes = []
    for number, (grid, offset) in enumerate([(zone33, 0), (half, -1000), (zone34, 0), (zone33, -1000)]):
        dn = {band: rng.integers(1, 9000, grid.shape).astype(np.uint16) for band in ("red", "nir")}
        dn["red"][rng.random(grid.shape) < 0.05] = 0
        scl = rng.choice(np.array([0, 4, 5, 9], np.uint8), size=grid.shape, p=[0.1, 0.4, 0.3, 0.2])
        scenes.append(
            make_scene(
                tmp_path_factory.mktemp("mixed"),
                f"S{number}",
                grid,
                {**dn, "scl": scl},
                dn_offset=offset,
                cloud_cover=float(number),
                datetime=f"2023-08-10T10:00:0{number}Z",
            )
        )
    config = IngestConfig(bands=("red", "nir", "scl"), crs="EPSG:32633", resolution=20)
    return plan_scenes(scenes, probe_headers(scenes), config, layout=Layout("t", (1, 64, 64), (1, 64, 64)))


def compare(array: Any, cube: dict[str, np.ndarray], plan: Plan, first: int = 0) -> tuple[int, int]:
    """Compare every pixel that has a source; returns how many there were, and how many numbers of them were clipped.

    The view of one band does not know the others, so it has 0 where the file has 0. In the cube such a pixel has a
    source only if another band shows that a provider clipped the number, which is then stored as 1.
    """
    scenes = {scene.item: scene for task in plan.tasks for scene in task.sources}
    names = plan.recipes[0].spec.band_names
    compared = clipped = 0
    for row in range(array.sizes["time"]):
        view = array[row].values
        steps, ys, xs = np.nonzero(cube["source_item"] == row)
        expected = cube["reflectance"][steps, :, ys, xs].T
        assets = [scenes[first + row].asset(name) for name in names]
        raw = np.stack([read_on_grid(a, a.header, plan.grid, a.resampling, stored=a.stored) for a in assets if a])
        zero = raw[:, ys, xs] == 0
        assert (expected[zero] == 1).all()
        np.testing.assert_array_equal(view[: len(names), ys, xs], np.where(zero, 0, expected))
        np.testing.assert_array_equal(view[len(names), ys, xs], cube["scl"][steps, ys, xs])
        compared, clipped = compared + len(steps), clipped + int(zero.sum())
    return compared, clipped


def test_the_lazy_view_equals_shards_over_lattices_zones_and_offsets(mixed_plan: Plan) -> None:
    recipe = mixed_plan.recipes[0]
    times, height, width = recipe.spec.shape
    cube: dict[str, np.ndarray] = {
        "reflectance": np.zeros((times, 2, height, width), np.uint16),
        "scl": np.zeros((times, height, width), np.uint8),
        "source_item": np.full((times, height, width), -1, np.int16),
    }
    for task in mixed_plan.tasks:
        filled = fill_shard(task, recipe)
        for name, array in cube.items():
            array[(task.region.slices[0], ..., *task.region.slices[1:])] = filled.arrays[name]
    assert set(np.unique(cube["source_item"])) == {-1, 0, 1, 2, 3}, "every scene must win somewhere"
    lazy = stack(mixed_plan, chunk=50)
    assert isinstance(lazy.data, dask.array.Array)
    assert list(lazy.band.values) == ["red", "nir", "scl"]
    assert lazy.dtype == np.uint16
    assert (lazy.sizes["y"], lazy.sizes["x"]) == (height, width)
    np.testing.assert_array_equal(lazy.x, mixed_plan.grid.x())
    with dask.config.set(scheduler="synchronous"):
        compared, clipped = compare(lazy.compute(), cube, mixed_plan)
    assert compared == (cube["source_item"] >= 0).sum()
    assert clipped > 0, "no number was clipped, so the rule for them was not compared"


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("version", range(1, RULES_VERSION + 1))
def test_the_lazy_view_of_a_plan_of_before_has_the_pixels_of_its_cube(version: int, tmp_path: Path) -> None:
    """Versions of the rules differ where pixels are made coarser, at edges of the file and beside missing pixels."""
    grid = Grid("EPSG:32633", (20.0, 0.0, 700_000.0, 0.0, -20.0, 5_000_020.0), (90, 80))
    dn = np.random.default_rng(7).integers(1, 9000, grid.shape).astype(np.uint16)
    dn[20:50, 13:37] = 0
    one = make_scene(tmp_path, "S", grid, {"red": dn, "scl": np.full(grid.shape, 4, np.uint8)})
    config = IngestConfig(bands=("red",), crs="EPSG:32633", resolution=60, resampling="average")
    plan = plan_scenes([one], probe_headers([one]), config, layout=Layout("t", (1, 64, 64), (1, 64, 64)))
    plan = plan.under_rules({plan.recipes[0].spec.collection: version})
    with dask.config.set(scheduler="synchronous"):
        view = stack(plan).compute().values[0, 0]
    compared = 0
    for task in plan.tasks:
        filled = fill_shard(task, plan.recipes[0])
        seen = filled.arrays["source_item"][0] >= 0
        compared += int(seen.sum())
        stored = filled.arrays["reflectance"][0, 0]
        np.testing.assert_array_equal(view[task.region.slices[1:]][seen], stored[seen])
    assert compared > 500


def test_the_lazy_view_equals_the_cube_of_the_real_scenes(zagreb_plan: Plan, zagreb_cube: Any) -> None:
    path, _ = zagreb_cube
    dataset = open_cube(path).dataset("sentinel-2-l2a")
    lazy = stack(zagreb_plan).isel(time=[2, 3])
    with dask.config.set(scheduler="threads", num_workers=2):
        array = lazy.compute()
    cube = {name: dataset[name][1:2].values for name in ("reflectance", "scl", "source_item")}
    cube["source_item"] = np.where(cube["source_item"] >= 0, cube["source_item"] - 2, -1)
    compared, clipped = compare(array, cube, zagreb_plan, first=2)
    assert compared > 1_400_000
    assert clipped > 0


def test_an_unreadable_asset_raises_instead_of_filling(mixed_plan: Plan) -> None:
    lazy = stack(mixed_plan, chunk=50)
    href = Path(next(a.href for t in mixed_plan.tasks for s in t.sources for a in s.assets if s.item == 0))
    kept = href.read_bytes()
    href.unlink()
    try:
        with dask.config.set(scheduler="synchronous"), pytest.raises(AssetUnreadable, match="scene S0"):
            lazy.isel(time=0).compute()
    finally:
        href.write_bytes(kept)


def test_an_unknown_collection_is_named(mixed_plan: Plan) -> None:
    with pytest.raises(UnknownName, match="did you mean 'sentinel-2-l2a'"):
        stack(mixed_plan, "sentinel-2-l2b")
