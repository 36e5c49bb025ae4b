"""Damage is named, and only what is damaged is made again; a plan's hrefs are checked before anything is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

import ingest.raster.access as access
import ingest.run.task as making
from ingest.plan.plan import Plan
from ingest.plan.stored import check_hrefs, keep_plan
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.run.task import ingest_shard
from ingest.upkeep.repair import repair, retry_failed, verify_sources
from zarr_store.errors import InvalidInput, Locked, MissingShard
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.verify import verify_cube
from zarr_store.write import shard_key

from ..growing import NAME, plan_of, scene, tree


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.fixture
def cube(tmp_path: Path, local_client: Any) -> Path:
    run(plan_of([scene(tmp_path / "s", day) for day in (10, 12)]), tmp_path / "cube.zarr", client=local_client)
    return tmp_path / "cube.zarr"


@pytest.fixture
def trust(tmp_path: Path) -> IngestConfig:
    return IngestConfig(allow_local=(str(tmp_path),))


@pytest.mark.parametrize("kind", DAMAGE)
def test_only_the_broken_shard_is_made_again(
    cube: Path, local_client: Any, trust: IngestConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """FAULTS Z06, Z07, Z08."""
    before, index = tree(cube), (1, 1, 0)
    DAMAGE[kind](cube / shard_key(open_cube(cube).spec(NAME), "scl", index))
    assert [one.index for one in verify_cube(cube).damage] == [index], "the fault fired"
    made: list[Any] = []

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        made.append(task.index)
        return fill_shard(task, *args, **more)

    monkeypatch.setattr(making, "fill_shard", fill)
    report = repair(cube, trust, client=local_client)
    assert ([d.index for d in report.damage], made, report.ingest.exit_code) == ([index], [index], 0)
    assert tree(cube) == before
    assert repair(cube, trust, client=local_client).damage == ()
    assert made == [index]


def test_a_damaged_axis_is_written_again(cube: Path, local_client: Any, trust: IngestConfig) -> None:
    before = tree(cube)
    for path in (f"{NAME}/x", f"overview/{NAME}/band", f"{NAME}/time"):
        (cube / path / "c" / "0").write_bytes(b"odd")
    assert len(verify_cube(cube).damaged_axes) == 3, "the fault fired"
    assert repair(cube, trust, client=local_client).ingest.exit_code == 0
    assert tree(cube) == before
    assert verify_cube(cube).damaged_axes == ()


def test_an_unreadable_ledger_row_is_made_again(cube: Path, local_client: Any, trust: IngestConfig) -> None:
    before = tree(cube)
    row = cube / "_terrashard" / "ledger" / NAME / "0-1-1.json"
    row.write_bytes(row.read_bytes()[:30])
    report = repair(cube, trust, client=local_client)
    assert report.rows == (f"_terrashard/ledger/{NAME}/0-1-1.json",)
    assert [made.index for made in report.ingest.written] == [(0, 1, 1)]
    assert tree(cube) == before


def test_repair_without_sources_loses_nothing_more(
    cube: Path, local_client: Any, trust: IngestConfig, tmp_path: Path
) -> None:
    spec, index = open_cube(cube).spec(NAME), (0, 0, 0)
    (cube / shard_key(spec, "scl", index)).unlink()
    shutil.rmtree(tmp_path / "s")
    before = tree(cube)
    report = repair(cube, trust, client=local_client)
    assert (report.ingest.exit_code, [row.index for row in report.ingest.failed]) == (3, [index])
    assert tree(cube) == before, "the good arrays of the shard are still there"
    with pytest.raises(MissingShard):
        open_cube(cube).read(NAME, "scl", spec.shards()[index])


def test_only_what_failed_is_tried_again(tmp_path: Path, local_client: Any, trust: IngestConfig) -> None:
    plan = plan_of([scene(tmp_path / "s", day) for day in (10, 12)])
    bad = tmp_path / "s" / "S2_D12_P0_V0" / "red.tif"
    kept = bad.read_bytes()
    bad.write_text("<html>")
    cube = tmp_path / "cube.zarr"
    first = run(plan, cube, client=local_client)
    assert {row.index[0] for row in first.partial} == {1}
    assert next(iter(first.missing)) == "S2_D12_P0_V0, asset red"
    (cube / "_terrashard/ledger" / NAME / "0-0-0.json").unlink()
    bad.write_bytes(kept)
    again = retry_failed(cube, trust, client=local_client)
    assert {row.index for row in again.written} == {row.index for row in first.partial}
    assert open_cube(cube).ledger(NAME).get((0, 0, 0)) is None, "a shard that did not fail is not touched"
    with CubeLock(cube, "another"), pytest.raises(Locked):
        retry_failed(cube, trust, client=local_client)


def test_pixels_are_compared_with_their_sources(cube: Path, tmp_path: Path, trust: IngestConfig) -> None:
    sound = verify_sources(cube, trust)
    assert (sound.checked, sound.different, sound.unread) == (8, (), ())
    assert verify_sources(cube, trust, share=0.25, seed=1).checked == 2
    scene(tmp_path / "s", 10)  # the same scene, written anew ...
    other = scene(tmp_path / "other", 10, version=1)
    shutil.copy(tmp_path / "other" / other.id / "red.tif", tmp_path / "s" / "S2_D10_P0_V0" / "red.tif")  # ... replaced
    found = verify_sources(cube, trust)
    assert {one.index[0] for one in found.different} == {0}
    assert {one.array for one in found.different} <= {"reflectance", "status", "source_item", "scl"}
    assert "reflectance" in {one.array for one in found.different}
    (tmp_path / "s" / "S2_D12_P0_V0" / "scl.tif").unlink()
    found = verify_sources(cube, trust)
    assert len(found.unread) == 4
    assert "S2_D12_P0_V0, asset scl" in found.unread[0]


def test_a_task_that_ran_already_reads_nothing_and_an_orphan_writes_nothing(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS D08 and D02: run twice, the same bytes; a task of a run that lost its lock leaves the cube alone."""
    plan = plan_of([scene(tmp_path / "s", 10)])
    cube = tmp_path / "cube.zarr"
    run(plan, cube, client=local_client, config=IngestConfig(limit=1))
    first, other = plan.tasks[:2]
    before = tree(cube)
    with CubeLock(cube, "test") as lock:
        assert ingest_shard(first, plan.recipes[0], str(cube), Access(), fence=lock.token)[1] == 0
        row, pixels = ingest_shard(first, plan.recipes[0], str(cube), Access(), fence=lock.token, again=True)
        assert (row.state, pixels > 0, tree(cube)) == ("done", True, before)
        with pytest.raises(Locked, match="has ended or lost its lock"):
            ingest_shard(other, plan.recipes[0], str(cube), Access(), fence="of a run that was killed")
    with pytest.raises(Locked, match="has ended or lost its lock"):
        ingest_shard(first, plan.recipes[0], str(cube), Access(), fence="of a run that ended", again=True)
    assert tree(cube) == before


@pytest.mark.parametrize(
    ("href", "words"),
    [
        ("/vsicurl/http://127.0.0.1/a.tif", "refused"),
        ("/etc/passwd", "outside"),
        ("vrt:///etc/passwd", "refused"),
        ("GTIFF_DIR:1:/etc/passwd", "driver"),
        ("<VRTDataset/>", "inline document"),
        ("file:///etc/passwd", "refused"),
        ("http://169.254.169.254/latest/meta-data", "private"),
        ("https://evil.example/a.tif", "--allow-host evil.example"),
        ("https://catalogue.example/a.tif?sig=CANARY", "carries a signature"),
        ("s3://10.0.0.1/a.tif", "refused"),
    ],
)
def test_hostile_hrefs_of_a_plan_are_refused_before_any_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, href: str, words: str
) -> None:
    """FAULTS S13, S14: a plan is data from outside, also when its digest is right."""
    plan = plan_of([scene(tmp_path / "s", 10)])
    text = plan.to_json().replace(str(tmp_path / "s" / "S2_D10_P0_V0" / "red.tif"), href)
    monkeypatch.setattr(Plan, "digest", property(lambda self: plan_digest(text)))
    hostile = Plan.from_json(text)
    monkeypatch.setattr(access, "find_asset_file", lambda *_, **__: pytest.fail("something was opened"))
    with pytest.raises(InvalidInput, match=words) as caught:
        check_hrefs(hostile, IngestConfig(allow_local=(str(tmp_path),)))
    assert "S2_D10_P0_V0" in str(caught.value)
    assert "CANARY" not in str(caught.value)


def plan_digest(text: str) -> str:
    """What the document says of itself, as a forger would make it fit."""
    return str(json.loads(text)["digest"])


def test_a_plan_with_a_private_source_needs_the_flag(tmp_path: Path) -> None:
    plan = replace(plan_of([scene(tmp_path / "s", 10)]), source="http://127.0.0.1:9/stac")
    with pytest.raises(InvalidInput, match="the plan's source"):
        check_hrefs(plan, IngestConfig(allow_local=(str(tmp_path),)))
    check_hrefs(plan, IngestConfig(allow_local=(str(tmp_path),), allow_private_hosts=True))


def test_signatures_are_never_stored(tmp_path: Path, cube: Path) -> None:
    plan = plan_of([scene(tmp_path / "s", 10)])
    task = plan.tasks[0]
    first = task.sources[0]
    assets = tuple(replace(a, href="https://h/a.tif?sig=CANARY") for a in first.assets)
    forged = replace(plan, tasks=(replace(task, sources=(replace(first, assets=assets),)), *plan.tasks[1:]))
    with pytest.raises(InvalidInput, match="must not be stored"):
        keep_plan(cube, forged)
    assert b"CANARY" not in (cube / "_terrashard/plan.json").read_bytes()


def test_nothing_but_nodata_is_no_damage(tmp_path: Path, local_client: Any) -> None:
    """FAULTS Z09: a shard of which a scene has only nodata is complete, sound, and reads as nodata."""
    half = scene(tmp_path / "s", 10)
    full = scene(tmp_path / "s", 12)
    for band in ("red", "scl"):
        with rasterio.open(tmp_path / "s" / half.id / f"{band}.tif", "r+") as dataset:
            dataset.write(np.zeros((32, 36), dataset.dtypes[0]), 1, window=((0, 32), (0, 36)))
    cube = tmp_path / "cube.zarr"
    assert run(plan_of([half, full]), cube, client=local_client).exit_code == 0
    opened = open_cube(cube)
    shards = opened.spec(NAME).shards()
    empty = [shards[0, 0, x] for x in (0, 1)]
    for region in empty:
        assert not opened.read(NAME, "status", region).any()
    assert opened.read(NAME, "status", shards[0, 1, 0]).any()
    assert {opened.ledger(NAME).get(index).state for index in shards} == {"done"}
    assert verify_cube(cube).damage == ()
