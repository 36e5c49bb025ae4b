"""The offset is decided on all that is known of a scene: no single property and no single sample decides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.enums import Resampling

from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.plan.task import PlannedScene, ShardTask
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.scenes.identity import baseline_of, baselines_of
from ingest.scenes.offsets import read_offset
from ingest.scenes.scene import Scene
from ingest.scenes.search import find_scenes
from ingest.testing import write_raster
from ingest.upkeep.repair import verify_sources
from zarr_store.grid import Grid

Dn = npt.NDArray[np.uint16]
SIDE = 256
GRID = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (SIDE, SIDE))
PRODUCT = "S2A_MSIL2A_20230815T095031_N0509_R079_T33TWM_20230815T155057"
CONFIG = IngestConfig(bands=("blue",), mask="none")


def ground(low: int, high: int, *, seed: int = 1) -> Dn:
    return np.random.default_rng(seed).integers(low, high, (SIDE, SIDE)).astype(np.uint16)


def with_water(share: float, low: int = 920, high: int = 991) -> Dn:
    """Land that carries the +1000, and dark water whose reflectance is slightly negative."""
    dn = ground(1050, 3500)
    rows = int(SIDE * share)
    dn[:rows] = np.random.default_rng(9).integers(low, high, (rows, SIDE))
    return dn


@pytest.fixture
def plan_of(tmp_path: Path, make_item: Callable[..., Any]) -> Callable[..., Plan]:
    """The plan of one item whose blue band holds `dn`; keyword arguments are properties."""

    def make(
        dn: Dn,
        *,
        stated: float | None = -0.1,
        config: IngestConfig = CONFIG,
        red: Dn | None = None,
        **properties: Any,
    ) -> Plan:
        item = make_item(**properties)
        for key, name in (("blue", "B02"), ("red", "B04")):
            raster = item["assets"][key]["raster:bands"][0]
            raster.pop("offset") if stated is None else raster.update(offset=stated)
            pixels = red if key == "red" and red is not None else dn
            write_raster(tmp_path / f"{name}.tif", GRID, pixels)
        (tmp_path / "item.json").write_text(json.dumps(item))
        return make_plan(str(tmp_path / "item.json"), config)

    return make


def values(plan: Plan) -> npt.NDArray[np.int64]:
    (task,) = plan.tasks
    filled = fill_shard(task, plan.recipes[0])
    assert (filled.arrays["status"] == 1).all()
    whole: npt.NDArray[np.int64] = filled.arrays["reflectance"][0, 0].astype(np.int64)
    return whole


def verdict_of(plan: Plan) -> dict[str, Any]:
    (found,) = plan.statistics["sentinel-2-l2a"]["offset_verdicts"].values()
    return dict(found)


@pytest.mark.parametrize("water", [with_water(0.04), with_water(0.1), with_water(0.4), with_water(0.9, 860, 999)])
def test_negative_reflectance_of_water_is_no_reason_to_drop_the_offset(plan_of: Callable[..., Plan], water: Dn) -> None:
    plan = plan_of(water)
    assert np.array_equal(values(plan), np.maximum(water.astype(int) - 1000, 1))
    found = verdict_of(plan)
    assert found["dn_offset"] == -1000
    # the second look never fires here: a small file is read whole at once, in nine parts
    assert found["pixels"]["windows"] == 9
    assert found["pixels"]["share_below_1000"] == pytest.approx(np.mean(water < 1000), abs=1e-3)
    doubted = any("slightly negative reflectance" in text for text in plan.warnings)
    assert doubted == (np.mean(water < 1000) > 0.05)


@pytest.mark.parametrize("land", [ground(50, 2500), ground(200, 3000), ground(100, 700)])
def test_land_that_was_subtracted_is_not_subtracted_again(plan_of: Callable[..., Plan], land: Dn) -> None:
    plan = plan_of(land)
    assert np.array_equal(values(plan), land)
    assert (verdict_of(plan)["verdict"], len(plan.warnings)) == ("repaired", 2)  # that, and the stated grid


def with_shadows(share: float, low: int, high: int) -> Dn:
    """Land that carries the +1000, with shadows of mountains from which too much was subtracted."""
    return with_water(share, low, high)


@pytest.mark.parametrize(
    "dn", [with_shadows(0.08, 450, 740), with_shadows(0.2, 480, 745), with_shadows(0.03, 300, 700)]
)
def test_metadata_that_agree_are_kept_where_shadows_explain_the_pixels(plan_of: Callable[..., Plan], dn: Dn) -> None:
    plan = plan_of(dn)
    assert np.percentile(dn, 1) < 500
    assert np.array_equal(values(plan), np.maximum(dn.astype(int) - 1000, 1))
    assert any("metadata weigh more" in text or "deep shadows" in text for text in plan.warnings), plan.warnings
    # a statement that stands alone is overruled by as many
    if np.mean(dn < 750) > 0.05:
        alone = plan_of(dn, s2__processing_baseline=None, s2__product_uri=None, s2__datatake_id=None)
        assert verdict_of(alone)["verdict"] == "repaired"
        assert np.array_equal(values(alone), dn)


@pytest.mark.parametrize("dn", [with_shadows(0.3, 600, 740), with_shadows(0.1, 200, 480)])
def test_metadata_that_agree_are_overruled_by_what_they_cannot_explain(plan_of: Callable[..., Plan], dn: Dn) -> None:
    plan = plan_of(dn)
    assert np.array_equal(values(plan), dn)
    assert verdict_of(plan)["verdict"] == "repaired"


@pytest.mark.parametrize(
    "named",
    [
        {"s2__product_uri": f"{PRODUCT}.SAFE"},
        {"s2__product_uri": None, "title": PRODUCT},
        {"s2__product_uri": None},  # the datatake alone
        {"s2__product_uri": None, "s2__datatake_id": None, "sentinel2__processing_baseline": "5.09"},
        {"s2__product_uri": None, "s2__datatake_id": None},  # in 2023 no baseline was 02.11: nothing is known
    ],
)
@pytest.mark.parametrize("stated", [None, -0.1])
def test_the_version_of_a_processor_is_no_baseline(
    plan_of: Callable[..., Plan], named: dict[str, Any], stated: float | None
) -> None:
    raised = ground(1050, 3500)
    plan = plan_of(raised, stated=stated, s2__processing_baseline=None, processing__version="2.11", **named)
    assert np.array_equal(values(plan), raised.astype(int) - 1000)
    subtracted = plan_of(ground(50, 2500), stated=stated, s2__processing_baseline=None, processing__version="2.11",
                         **named)  # fmt: skip
    assert np.array_equal(values(subtracted), ground(50, 2500)), "the pixels are still looked at"


def test_baselines_that_contradict_each_other_are_reported_and_the_pixels_decide(plan_of: Callable[..., Plan]) -> None:
    raised = ground(1050, 3500)
    plan = plan_of(raised, stated=None, s2__processing_baseline="03.01")  # its product name says N0509
    assert np.array_equal(values(plan), raised.astype(int) - 1000)
    assert any("contradict themselves" in text and "product name 05.09" in text for text in plan.warnings)
    heard = {one["name"]: one["dn_offset"] for one in verdict_of(plan)["witnesses"]}
    assert heard == {"s2:processing_baseline": 0, "product name": -1000, "datatake id": -1000}


def test_bright_ground_is_no_offset_where_red_is_brighter_still(plan_of: Callable[..., Plan]) -> None:
    desert, red = ground(1100, 1900), ground(2300, 3600, seed=2)
    both = IngestConfig(bands=("blue", "red"), mask="none")
    plan = plan_of(desert, config=both, earthsearch__boa_offset_applied=True, red=red)
    assert np.array_equal(values(plan), desert)
    # the same blue with dark red is ground that carries the offset, and a flag that lies
    lying = plan_of(desert, config=both, earthsearch__boa_offset_applied=True)
    assert np.array_equal(values(lying), desert.astype(int) - 1000)
    assert verdict_of(lying)["verdict"] == "repaired"


def test_old_baselines_keep_their_bright_ground(plan_of: Callable[..., Plan]) -> None:
    bright = ground(1050, 1900)
    names = {"s2__product_uri": PRODUCT.replace("N0509", "N0214"), "s2__datatake_id": None}
    plan = plan_of(bright, stated=None, s2__processing_baseline="02.14", **names)
    assert np.array_equal(values(plan), bright)
    assert verdict_of(plan)["verdict"] == "inconclusive"


def test_baselines_of_every_place() -> None:
    assert baselines_of({"processing:version": "05.11"}, []) == {"processing:version": "05.11"}
    assert baselines_of({"processing:version": "2.11", "datetime": "2019-05-01T00:00:00Z"}, []) == {
        "processing:version (short)": "02.11"
    }
    assert baselines_of({"processing:version": "Sen2Cor 2.11"}, ["x"]) == {}
    href = f"https://host/tiles/{PRODUCT}.SAFE/GRANULE/B02.jp2"
    assert baselines_of({}, ["plain"], [href]) == {"asset href": "05.09"}
    assert baseline_of({"s2:processing_baseline": "02.14", "product name": "05.09", "datatake id": "05.09"}) == "05.09"
    assert baseline_of({"processing:version": "02.11", "datatake id": "05.09"}) == "02.11"
    assert baseline_of({}) is None


def test_a_contradiction_is_looked_at_again_in_windows_of_the_file(
    tmp_path: Path, make_item: Callable[..., Any]
) -> None:
    # an overview of before the subtraction is left in the file
    side = 1280
    land = np.random.default_rng(1).integers(1050, 3500, (side, side)).astype(np.uint16)
    path = tmp_path / "B02.tif"
    grid = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (side, side))
    write_raster(path, grid, np.full((side, side), 300, np.uint16), blockxsize=256, blockysize=256)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2], Resampling.nearest)
        dataset.write(land, 1)
    with rasterio.open(path) as dataset:
        assert read_offset(dataset.read(1, out_shape=(427, 427))).state == "subtracted"
    item = make_item()
    (tmp_path / "item.json").write_text(json.dumps(item))
    (scene,) = find_scenes(str(tmp_path / "item.json"), CONFIG).scenes
    probe = probe_scenes([scene], CONFIG)[scene.key]
    assert (probe.dn_offset, probe.verdict) == (-1000, "confirmed")
    assert probe.reading is not None
    assert probe.reading.windows == 9
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def older(plan: Plan, *, offset: int, **entry: Any) -> Plan:
    """The plan as an earlier release made it: another offset, and none of what was weighed."""
    document = json.loads(plan.to_json())
    (verdict,) = document["facts"]["sentinel-2-l2a"]["offset_verdicts"].values()
    del verdict["witnesses"], verdict["pixels"]
    verdict.update(dn_offset=offset, **entry)
    (row,) = document["items"]["sentinel-2-l2a"]
    row["dn_offset"] = offset
    row["baseline"] = "02.11" if entry["verdict"] == "inconclusive" else row["baseline"]
    for scene in document["scenes"]["sentinel-2-l2a"]:
        scene["dn_offset"] = offset
    recipe = plan.recipes[0]
    sources = tuple(PlannedScene.from_dict(one) for one in document["scenes"]["sentinel-2-l2a"])
    (task,) = plan.tasks
    made = replace(plan, items={"sentinel-2-l2a": (row,)}, statistics=document["facts"],
                   tasks=(ShardTask.of(recipe, task.index, task.region, sources),))  # fmt: skip
    return Plan.from_json(made.to_json())


@pytest.mark.parametrize(
    ("dn", "wrong", "entry", "right"),
    [
        (with_water(0.1), 0, {"verdict": "repaired", "evidence": "raster metadata of the item state -1000"}, "-1000"),
        (ground(1050, 3500), 0, {"verdict": "inconclusive", "evidence": "baseline 02.11"}, "-1000"),
        (ground(50, 2500), -1000, {"verdict": "unchecked", "evidence": "baseline 05.09"}, r"\+0"),
    ],
)
def test_verify_sources_finds_a_cube_that_was_made_with_the_wrong_offset(
    plan_of: Callable[..., Plan], tmp_path: Path, local_client: Any, dn: Dn, wrong: int, entry: Any, right: str
) -> None:
    plan = plan_of(dn)
    trust = IngestConfig(allow_local=(str(tmp_path),))
    run(older(plan, offset=wrong, **entry), tmp_path / "wrong.zarr", client=local_client)
    (found,) = verify_sources(tmp_path / "wrong.zarr", trust).different
    assert found.pixels == SIDE**2
    assert re.search(f"stored with an offset of {wrong:+d}, right is {right}".replace("of +", r"of \+"), str(found))
    run(plan, tmp_path / "right.zarr", client=local_client)
    sound = verify_sources(tmp_path / "right.zarr", trust)
    assert (sound.checked, sound.different, sound.unread) == (1, (), ())
