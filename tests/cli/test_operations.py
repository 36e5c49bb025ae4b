"""Keeping a cube from the command line: append, audit, verify with sources, repair, retry, and one run at a time."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from ingest.plan.stored import kept_plan
from ingest.simulate import SimulateConfig, simulate
from ingest.simulate.server import serve
from zarr_store import CubeLock, open_cube

Run = Callable[..., Any]
NAME = "sentinel-2-l2a"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dates = (dt.date(2021, 8, 8), dt.date(2022, 4, 20))
    config = SimulateConfig(tiles=1, tile_px=64, overlap_px=0, dates=dates, radar_dates=(dt.date(2022, 4, 18),))
    return simulate(tmp_path_factory.mktemp("w") / "world", config).path


def test_a_cube_is_made_kept_and_grown(run: Run, world: Path, tmp_path: Path, snapshot: Callable[[Path], Any]) -> None:
    source, cube = world / "catalog.json", tmp_path / "cube.zarr"
    options = ("--collection", NAME, "--bands", "red,scl", "--workers", 1)
    first = run("ingest", source, cube, *options, "--datetime", "2021")
    assert first.code == 0, first.err
    # what a cube says of its own source is not believed: the error says what to type
    trust = ("--allow-local", world)
    unbelieved = run("audit", cube)
    assert unbelieved.code == 2
    assert f"--source {source}" in unbelieved.error_line()
    assert run("audit", cube, "--source", source).code == 0
    # the catalogue has a date more: nothing of it was asked for, until it is
    assert run("audit", cube, *trust).code == 0
    found = run("audit", cube, *trust, "--datetime", "2021/2022", "--json")
    assert (found.code, len(found.json["missing"]), found.json["removed"]) == (3, 1, [])

    # a second run at the same time is told who holds the cube
    with CubeLock(cube, "another ingest"):
        locked = run("ingest", source, cube, "--append", "--datetime", "2022")
        assert locked.code == 5
        assert f"pid {os.getpid()}" in locked.error_line()
        assert "another ingest" in locked.error_line()
        assert run("repair", cube).code == 5

    grown = run("ingest", source, cube, "--append", "--datetime", "2022", "--workers", 1, "--json")
    assert grown.code == 0, grown.err
    assert (len(grown.json["written"]), grown.json["skipped"]) == (1, 1)
    assert len(open_cube(cube).spec(NAME).times) == 2
    before = snapshot(cube)
    again = run("ingest", source, cube, "--append", "--datetime", "2022", "--json")
    assert (again.code, again.json["written"], again.json["pixels_read"]) == (0, [], 0)
    assert run("audit", cube, *trust).code == 0, "both dates count as asked for now"
    unbelieved = run("verify", cube, "--sources")
    assert unbelieved.code == 2
    assert f"--allow-local {world}" in unbelieved.error_line()
    sound = run("verify", cube, "--sources", "--json", *trust)
    assert (sound.code, sound.json["sources"]["checked"]) == (0, 2), sound.err
    assert run("retry-failed", cube, "--json").json["written"] == []
    assert snapshot(cube) == before

    earlier = run("ingest", source, tmp_path / "late.zarr", *options, "--datetime", "2022")
    assert earlier.code == 0, earlier.err
    refused = run("ingest", source, tmp_path / "late.zarr", "--append", "--datetime", "2021")
    assert refused.code == 2
    assert "lies before the last date of the cube" in refused.error_line()

    # damage is named with what to do, and that heals it
    shard = next(path for path in sorted((cube / NAME / "status" / "c").rglob("*")) if path.is_file())
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-3] + b"xyz")
    damaged = run("verify", cube)
    assert damaged.code == 6
    assert "terrashard repair" in damaged.out
    unbelieved = run("repair", cube)
    assert unbelieved.code == 2
    assert f"--allow-local {world}" in unbelieved.error_line()
    healed = run("repair", cube, *trust, "--workers", 1, "--json")
    assert (healed.code, len(healed.json["damage"])) == (0, 1), healed.err
    assert shard.read_bytes() == kept


def test_a_file_that_is_replaced_on_its_server_is_audited_and_refreshed(run: Run, world: Path, tmp_path: Path) -> None:
    copy, cube = tmp_path / "world", tmp_path / "cube.zarr"
    shutil.copytree(world, copy)
    with serve(copy) as server:
        options = ("--collection", NAME, "--bands", "red,scl", "--datetime", "2021", "--workers", 1)
        made = run("ingest", server.stac_url, cube, *options)
        assert made.code == 0, made.err
        trust = "--allow-private-hosts"
        asked = server.requests
        unbelieved = run("audit", cube)
        assert unbelieved.code == 2
        assert f"--source {server.stac_url}" in unbelieved.error_line()
        assert server.requests == asked, "nothing was asked of it"
        assert run("audit", cube, trust).code == 0
        hrefs = [a.href for task in kept_plan(cube).tasks for s in task.sources for a in s.assets if a.band == "red"]
        file = copy / hrefs[0].partition("/files/")[2]
        with rasterio.open(file, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
            dataset.write(np.full(dataset.shape, 4321, "uint16"), 1)
        assert run("audit", cube, trust, "--no-files").code == 0, "the catalogue says nothing of it"
        found = run("audit", cube, trust, "--json")
        assert (found.code, [row["assets"] for row in found.json["replaced"]]) == (3, [["red"]]), found.err
        fresh = run("ingest", server.stac_url, cube, "--refresh", "--workers", 1, "--json")
        assert (fresh.code, len(fresh.json["written"])) == (0, 1), fresh.err
        assert 4321 in open_cube(cube).dataset(NAME).reflectance.values
        assert run("audit", cube, trust).code == 0


def test_a_plan_file_is_checked_like_a_catalogue(run: Run, world: Path, tmp_path: Path) -> None:
    source, plan = world / "catalog.json", tmp_path / "plan.json"
    assert run("plan", source, "--collection", NAME, "--bands", "red,scl", "-o", plan).code == 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    text = plan.read_text().replace(f'"source": "{source}"', f'"source": "{moved}/catalog.json"')
    plan.write_text(text)
    outcome = run("ingest", plan, tmp_path / "cube.zarr")
    assert outcome.code == 2
    assert "--allow-local" in outcome.error_line()
    assert not (tmp_path / "cube.zarr").exists()
    with_plan = run("ingest", plan, tmp_path / "cube.zarr", "--append")
    assert with_plan.code == 2


def test_a_cube_without_a_plan_says_what_to_do(run: Run, cube: Path) -> None:
    for command in ("repair", "retry-failed", "audit"):
        outcome = run(command, cube)
        assert outcome.code == 2
        assert "keeps no plan" in outcome.error_line()
        assert "Example" in run(command, "--help").out


def test_a_plan_says_what_running_it_needs(run: Run, world: Path, tmp_path: Path) -> None:
    """The command that `plan` prints works as it is printed."""
    plan, cube = tmp_path / "plan.json", tmp_path / "cube.zarr"
    selected = ("--collection", NAME, "--bands", "red,scl", "--datetime", "2021")
    made = run("plan", world / "catalog.json", *selected, "-o", plan)
    assert made.code == 0, made.err
    line = made.out.partition("`terrashard ")[2].partition("`")[0]
    assert line == f"ingest {plan} CUBE --allow-local {world}"
    refused = run("ingest", plan, cube)
    assert refused.code == 2
    assert f"add --allow-local {world}" in refused.error_line()
    ran = run(*[cube if word == "CUBE" else word for word in line.split()], "--workers", 1)
    assert ran.code == 0, ran.err
    # beside its scenes a plan needs nothing
    beside = world.parent / "plan.json"
    assert f"`terrashard ingest {beside} CUBE` runs" in run("plan", world / "catalog.json", *selected, "-o", beside).out
    beside.unlink()
