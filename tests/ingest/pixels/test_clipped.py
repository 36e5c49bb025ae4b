"""0 in one band: dark ground that a provider clipped, a hole, or the edge of a swath."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ingest.pixels.mosaic as mosaic
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.testing import make_scene, probe_headers, write_raster
from ingest.upkeep.repair import verify_sources
from zarr_store.grid import Grid
from zarr_store.read import open_cube

SIDE = 64
GRID = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (SIDE, SIDE))
WATER, EMPTY, EDGE = slice(0, 16), slice(48, 60), slice(60, 64)
"""Rows of clipped water, of no data in any band and class, and of one band that reaches beyond the swath."""


def pixels(**changes: Any) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(1)
    made = {band: rng.integers(100, 900, (SIDE, SIDE)).astype(np.uint16) for band in ("blue", "red", "nir")}
    made["scl"] = np.full((SIDE, SIDE), 4, np.uint8)
    made["blue"][WATER], made["red"][WATER], made["nir"][WATER], made["scl"][WATER] = 250, 80, 0, 6
    for array in made.values():
        array[EMPTY] = 0
    made["blue"][EDGE] = made["nir"][EDGE] = 0
    made["scl"][EDGE] = 0
    return made | changes


def plan_of(folder: Path, made: dict[str, npt.NDArray[Any]], *, offset: int = 0, **config: Any) -> Plan:
    scene = make_scene(folder, "A", GRID, made, dn_offset=offset)
    settings: dict[str, Any] = {"bands": ("blue", "red", "nir", "scl")} | config
    return plan_scenes([scene], probe_headers([scene]), IngestConfig(**settings))


def filled(plan: Plan) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    (task,) = plan.tasks
    arrays = fill_shard(task, plan.recipes[0]).arrays
    return arrays["reflectance"][0], arrays["status"][0]


@pytest.mark.parametrize("reduce", ["first", "mean", "median"])
@pytest.mark.parametrize("mask", ["scl", "none"])
def test_dark_water_that_was_clipped_is_observed(tmp_path: Path, reduce: str, mask: str) -> None:
    values, status = filled(plan_of(tmp_path, pixels(), reduce=reduce, mask=mask))
    assert (status[WATER] == 1).all()
    assert [np.unique(values[band, WATER]).tolist() for band in range(3)] == [[250], [80], [1]]
    assert not status[EMPTY].any()
    assert not values[:, EMPTY].any()
    assert not status[EDGE].any(), "the class is 0: no swath reaches here, whatever a band says"
    assert (status[16:48] == 1).all()


def test_without_classes_the_other_bands_decide(tmp_path: Path) -> None:
    only: dict[str, Any] = {"bands": ("blue", "red", "nir"), "mask": "none"}
    made = pixels()
    made["red"][EDGE] = 3  # what a lossy overview smears over the edge of a swath
    values, status = filled(plan_of(tmp_path / "dark", made, **only))
    assert (status[WATER] == 1).all()
    assert (values[2, WATER] == 1).all()
    assert not status[EDGE].any()
    made["red"][WATER] = made["blue"][WATER] = 5000  # bright ground has no band of 0: this is a hole
    assert not filled(plan_of(tmp_path / "bright", made, **only))[1][WATER].any()
    raised = pixels()
    for band in ("blue", "red"):
        raised[band][WATER] += 1000
    # 0 would be a reflectance of -0.1 where the offset is still in the numbers
    assert not filled(plan_of(tmp_path / "raised", raised, offset=-1000, **only))[1][WATER].any()


def test_a_file_that_marks_its_nodata_otherwise_has_no_number_0(tmp_path: Path) -> None:
    made = pixels()
    plan = plan_of(tmp_path, made)
    hidden = np.where(made["nir"] == 0, 65000, made["nir"]).astype(np.uint16)
    write_raster(tmp_path / "A" / "nir.tif", GRID, hidden, nodata=65000)
    values, status = filled(plan)
    assert not status[WATER].any()
    assert not values[:, WATER].any()


def test_coarse_pixels_that_reach_beyond_a_swath_are_no_evidence(tmp_path: Path) -> None:
    made = pixels()
    coarse = Grid("EPSG:32633", (20, 0, 500_000, 0, -20, 5_200_000), (SIDE // 2, SIDE // 2))
    made["swir16"] = np.full(coarse.shape, 300, np.uint16)
    made["scl"][EDGE] = 4
    made["red"][EDGE] = 0
    scene = make_scene(tmp_path, "A", GRID, made, grids={"swir16": coarse})
    config = IngestConfig(bands=("blue", "red", "nir", "swir16", "scl"), resolution=10)
    values, status = filled(plan_scenes([scene], probe_headers([scene]), config))
    assert not status[EDGE].any()
    assert (status[WATER] == 1).all()
    assert not values[:, EDGE].any()


def test_verify_sources_finds_pixels_that_one_band_of_0_has_wiped(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, trust = plan_of(tmp_path, pixels()), IngestConfig(allow_local=(str(tmp_path),))
    with monkeypatch.context() as earlier:
        earlier.setattr(mosaic, "clipped_pixels", lambda bands, *_, **__: np.zeros(bands[0].shape, bool))
        run(plan, tmp_path / "cube.zarr", client=local_client)
    assert not open_cube(tmp_path / "cube.zarr").dataset("sentinel-2-l2a").status.values[0, WATER].any()
    found = verify_sources(tmp_path / "cube.zarr", trust).different
    assert {(one.array, one.pixels) for one in found} >= {("status", 16 * SIDE), ("reflectance", 3 * 16 * SIDE)}


def test_pixels_read_are_those_of_the_files(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, pixels())
    (task,) = plan.tasks
    assert fill_shard(task, plan.recipes[0]).pixels_read == 4 * SIDE**2
    fine = plan_of(tmp_path, pixels(), resolution=2.5, resampling="nearest")  # 16 target pixels for each of the file
    read = sum(fill_shard(task, fine.recipes[0]).pixels_read for task in fine.tasks)
    assert 4 * SIDE**2 <= read < 5 * SIDE**2
