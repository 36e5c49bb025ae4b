"""A plan that asks for overviews names each that it reads, and counts what its server will send."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import AssetProbe, probe_scenes
from ingest.raster.access import header_cache
from ingest.raster.limits import Access
from ingest.raster.overview import overview_cache
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.scene import Scene
from ingest.testing import make_scene

from .test_small_region import COG, TILE, RangeServer, forget, ground, scene_at, server, write_cog

__all__ = ["server"]  # the fixture
BANDS = {"blue": ground(seed=1), "red": ground(seed=2)}
CONFIG: dict[str, Any] = {"bands": "blue,red", "resolution": 40, "mask": "scl", "allow_private_hosts": True}


def plan_at(scene: Scene, **settings: Any) -> Plan:
    config = IngestConfig(**{**CONFIG, **settings})
    return plan_scenes([scene], probe_scenes([scene], config, source="http://127.0.0.1/"), config, source="x")


def fill(plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of a plan of one shard."""
    (task,) = plan.tasks
    return fill_shard(task, plan.recipes[0], access=Access.of(IngestConfig(**CONFIG), "http://127.0.0.1/")).arrays


def with_classes(server: RangeServer) -> Scene:
    """A scene of two bands with averages, and of classes whose overviews hold clouds that are not there."""
    scene = scene_at(server, {**BANDS, "scl": np.full(TILE.shape, 9, np.uint8)})
    for band, pixels in BANDS.items():
        write_cog(server.root / "S" / f"{band}.tif", pixels, overview_resampling="AVERAGE")
    path = server.root / "S" / "scl.tif"
    with rasterio.open(path, "w", **{**COG, "driver": "GTiff", "dtype": "uint8", "tiled": True,
                                     "blockxsize": 256, "blockysize": 256}) as file:  # fmt: skip
        file.write(np.full(TILE.shape, 9, np.uint8), 1)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], Resampling.average)
    with rasterio.open(path, "r+") as file:
        file.write(np.full(TILE.shape, 4, np.uint8), 1)
    return scene


def test_a_plan_names_the_overviews_that_it_reads(server: RangeServer) -> None:
    scene = with_classes(server)
    plan, whole = plan_at(scene, read_overviews=True), plan_at(scene)
    (planned,) = plan.tasks[0].sources
    assert {asset.band: asset.overview for asset in planned.assets} == {"blue": 4, "red": 4, "scl": None}
    one = {"factor": 4, "resampling": "not stated"}
    assert plan.provenance()["collections"]["sentinel-2-l2a"]["overviews"] == {"S": {"blue": one, "red": one}}
    assert "  overviews 2 files at 1/4 (not stated)" in plan.summary().splitlines()
    assert "S: blue, red: overviews at 1/4 are read; the file does not state how they were made" in plan.summary()
    assert Plan.from_json(plan.to_json()) == plan
    assert '"overview' not in whole.to_json(), "a plan without the option is as releases of before write it"
    assert [task.key for task in plan.tasks] != [task.key for task in whole.tasks]
    probe = probe_scenes([scene], IngestConfig(**CONFIG, read_overviews=True), source="http://127.0.0.1/")[scene.key]
    assert AssetProbe.from_dict(json.loads(json.dumps(probe.assets["blue"].to_dict()))) == probe.assets["blue"]
    assert len(probe.assets["blue"].reduced) == 3
    arrays, full = fill(plan), fill(whole)
    assert (arrays["status"] == 1).all(), "classes come from all pixels: no cloud is seen"
    for number, band in enumerate(BANDS):
        with rasterio.open(server.root / "S" / f"{band}.tif", OVERVIEW_LEVEL=1) as file:
            np.testing.assert_array_equal(arrays["reflectance"][0, number], file.read(1))
    # an average of averages differs by their rounding alone
    assert 0 < np.abs(arrays["reflectance"].astype(int) - full["reflectance"]).max() <= 1


@pytest.mark.parametrize("resolution", [20, 40, 30])
@pytest.mark.parametrize("overviews", [True, False])
def test_the_effort_is_what_the_server_sends(server: RangeServer, overviews: bool, resolution: int) -> None:
    scene = scene_at(server, BANDS)
    plan = plan_at(scene, mask="none", read_overviews=overviews, resolution=resolution)
    forget()
    overview_cache(os.getpid()).clear()
    server.asked.clear()
    fill(plan)
    stated = plan.statistics["sentinel-2-l2a"]["bytes_to_read"]
    assert server.sent == pytest.approx(stated, rel=0.05)
    blocks = sum(TILE.height * TILE.width * 10 / 8 for _ in BANDS)  # ground() packs to about 10 bits
    assert (server.sent < blocks / 2) == overviews


def test_a_file_that_lost_its_overview_is_not_read(server: RangeServer) -> None:
    scene = scene_at(server, BANDS)
    plan = plan_at(scene, mask="none", read_overviews=True)
    write_cog(server.root / "S" / "red.tif", BANDS["red"], overviews="NONE")
    forget()
    (task,) = plan.tasks
    access = replace(Access.of(IngestConfig(**CONFIG), "http://127.0.0.1/"), attempts=1)
    (outcome,) = fill_shard(task, plan.recipes[0], access=access).outcomes
    assert outcome.state == "missing"
    assert "it had an overview at 1/4, now none that can be used (it has none)" in str(outcome.reason)


def test_what_is_not_read_from_overviews_is_named(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "S", TILE, {"blue": ground(), "red": ground()})
    with rasterio.open(scene.assets["red"].href, "r+") as file:
        file.build_overviews([2, 4], Resampling.nearest)
    plan = plan_at(scene, mask="none", read_overviews=True)
    assert sorted(plan.warnings) == [
        "sentinel-2-l2a: S: blue: overviews are not read: it has none; all pixels of the file are averaged",
        "sentinel-2-l2a: S: red: the overviews at 1/4 are no plain averages: their resampling is nearest",
    ]
    np.testing.assert_array_equal(
        fill(plan)["reflectance"][0, 0], fill(plan_at(scene, mask="none"))["reflectance"][0, 0]
    )
    fine = plan_at(scene, mask="none", read_overviews=True, resolution=15)
    assert [text.partition(": ")[2] for text in fine.warnings if "overviews" in text] == [
        "--overviews changes nothing: the grid is less than twice as coarse as every file of reflectance"
    ]


def test_a_coarser_overview_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "S", TILE, {"blue": ground()})
    path = Path(scene.assets["blue"].href)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], Resampling.average)
    data, places = bytearray(path.read_bytes()), []
    (at,) = struct.unpack_from("<I", data, 4)
    while at:
        places.append(at)
        (count,) = struct.unpack_from("<H", data, at)
        (at,) = struct.unpack_from("<I", data, at + 2 + 12 * count)
    (count,) = struct.unpack_from("<H", data, places[2])
    entries = [places[2] + 2 + 12 * number for number in range(count)]
    (tile_width,) = (entry for entry in entries if struct.unpack_from("<H", data, entry)[0] == 322)
    struct.pack_into("<H", data, tile_width + 8, 40)  # no multiple of 16
    path.write_bytes(data)
    plan = plan_at(scene, mask="none", read_overviews=True)
    assert plan.tasks[0].sources[0].asset("blue").overview == 2
    (text,) = [text for text in plan.warnings if "overviews" in text]
    assert "S: blue: overviews at 1/2 are read, and no coarser ones: 1/4: its blocks cannot be decoded" in text


def test_a_file_that_could_not_be_opened_is_read_as_if_it_had_been(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, "S", TILE, {"blue": ground(), "red": ground(seed=2)})
    for asset in scene.assets.values():
        with rasterio.open(asset.href, "r+") as file:
            file.build_overviews([2, 4], Resampling.average)
    plan = plan_at(scene, mask="none", read_overviews=True)
    path = Path(scene.assets["red"].href)
    path.rename(tmp_path / "away")
    header_cache(os.getpid()).clear()
    blind = plan_at(scene, mask="none", read_overviews=True)
    (tmp_path / "away").rename(path)
    assert blind.tasks[0].sources[0].asset("red").header is None
    assert [task.key for task in blind.tasks] == [task.key for task in plan.tasks]
    np.testing.assert_array_equal(fill(blind)["reflectance"], fill(plan)["reflectance"])
