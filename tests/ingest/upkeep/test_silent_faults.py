"""`verify --sources` names the shard and the kind of disagreement of cubes that earlier faults made without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingest.plan.plan import Plan
from ingest.plan.stored import keep_plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.upkeep.disagreement import name_disagreement
from ingest.upkeep.repair import verify_sources
from zarr_store import ShardWriter, create_cube

from ..small_scenes import land, make_scene, plan_of, write_items, write_tif

Arrays = dict[str, np.ndarray]
NAME = "sentinel-2-l2a"


def store(plan: Plan, path: Path, spoil: Callable[[Arrays], object] = lambda arrays: None) -> None:
    """Write the cube of a plan in this process, each shard as `spoil` leaves its arrays."""
    create_cube(path, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
    keep_plan(path, plan)
    for task in plan.tasks:
        filled = fill_shard(task, plan.recipe(task.collection))
        spoil(filled.arrays)
        writer = ShardWriter(path, task.collection)
        writer.write(task.region, filled.arrays, key=task.key, sources=filled.outcomes)


def _wiped(arrays: Arrays) -> None:
    dark = arrays["reflectance"][0, 0] < 500
    arrays["reflectance"][0, :, dark] = 0
    arrays["status"][0, dark] = 0
    arrays["source_item"][0, dark] = -1


def _subtracted_again(arrays: Arrays) -> None:
    main = arrays["reflectance"]
    main[...] = np.where(main > 0, np.maximum(main.astype(int) - 1000, 1), 0)


def _unmasked(arrays: Arrays) -> None:
    hidden = arrays["status"][0] == 0
    arrays["reflectance"][0, :, hidden] = 2777
    arrays["status"][0, hidden] = 1
    arrays["source_item"][0, hidden] = 0


KINDS: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "offset dropped": (lambda arrays: np.add(arrays["reflectance"], 1000, out=arrays["reflectance"],
                                             where=arrays["reflectance"] > 0), "1000 too high: an offset was not"),
    "offset twice": (_subtracted_again, "1000 too low: an offset was"),
    "scale ignored": (lambda arrays: arrays["reflectance"].__imul__(5), "5 times as large: a scale was ignored"),
    "mask ignored": (_unmasked, "a mask or nodata value was ignored"),
    "one nodata for all": (_wiped, "they were taken for no data"),
    "another raster": (lambda arrays: arrays["reflectance"].__imul__(0).__iadd__(
        land(seed=9)), "they are of other pixels, or of another file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def optical(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("optical")
    pixels = land(seed=4)
    pixels[:, :8] = 0
    source = write_items(folder, make_scene("A", {"B02": write_tif(folder / "a.tif", pixels)}))
    return folder, plan_of(source)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_silent_fault_is_named(optical: tuple[Path, Plan], tmp_path: Path, kind: str) -> None:
    folder, plan = optical
    spoil, words = KINDS[kind]
    store(plan, tmp_path / "cube.zarr", spoil)
    found = verify_sources(tmp_path / "cube.zarr", IngestConfig(allow_local=(str(folder),)))
    (one,) = [one for one in found.different if one.array == "reflectance"]
    assert words in one.why, one.why
    assert one.index == plan.tasks[0].index
    assert f"{NAME}/reflectance shard (0, 0, 0)" in str(one)


def test_a_sound_cube_has_none(optical: tuple[Path, Plan], tmp_path: Path) -> None:
    folder, plan = optical
    store(plan, tmp_path / "cube.zarr")
    found = verify_sources(tmp_path / "cube.zarr", IngestConfig(allow_local=(str(folder),)))
    assert (found.checked, found.different, found.unread, found.doubted) == (1, (), (), ())


def test_decibels_in_place_of_power_are_named() -> None:
    decibel = np.random.default_rng(1).uniform(-25, -5, (1, 1, 16, 16)).astype(np.float32)
    power = np.power(10, decibel / 10, dtype=np.float32)
    assert "decibels in place of linear power" in name_disagreement(decibel, power)
    assert "of another file" in name_disagreement(power[..., ::-1], power)


def test_a_half_of_a_datatake_that_was_dropped_is_named(tmp_path: Path) -> None:
    whole = land(seed=5)
    upper, lower = whole.copy(), whole.copy()
    upper[34:], lower[:30] = 0, 0
    paths = [write_tif(tmp_path / f"{name}.tif", pixels) for name, pixels in (("N", upper), ("S", lower))]
    north = make_scene("N", {"B02": paths[0]}, s2__granule_id="L2A_T33TWM_A042547_20230810T100559")
    south = make_scene("S", {"B02": paths[1]}, s2__granule_id="L2A_T33TWM_A042547_20230810T101212")
    source = write_items(tmp_path, north, name="all.json")
    plan = plan_of(source)  # as an earlier release made it: the other half is not in the plan
    store(plan, tmp_path / "cube.zarr")
    trust = IngestConfig(allow_local=(str(tmp_path),))
    assert verify_sources(tmp_path / "cube.zarr", trust).different == ()
    write_items(tmp_path, north, south, name="all.json")
    (one,) = verify_sources(tmp_path / "cube.zarr", trust).different
    assert one.pixels == 30 * 64
    assert "scene S, another part of datatake" in one.why
