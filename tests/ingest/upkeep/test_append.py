"""Cubes that grow: later dates, more scenes of a date, newer copies; readers in the middle, and nothing done twice."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import ingest.run.task as making
from ingest.plan.stored import kept_plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.scenes.search import SearchResult
from ingest.upkeep.audit import compare
from zarr_store.errors import CubeMismatch, InvalidInput, Locked, TerrashardError
from zarr_store.folder import FolderStore
from zarr_store.grow import grow_cube
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.spec import Layout

from ..growing import CONFIG, NAME, extend_with, plan_of, scene, tree


def test_an_appended_cube_is_the_one_made_at_once(tmp_path: Path, local_client: Any) -> None:
    scenes = [scene(tmp_path / "s", day, part=part) for day in (10, 12, 15) for part in (0, 1)]
    cube, whole = tmp_path / "cube.zarr", tmp_path / "whole.zarr"
    run(plan_of([s for s in scenes if "D15" not in s.id]), cube, client=local_client)
    kept = tree(cube, under="_terrashard/ledger")
    # 12 px east of the first tile's edge lie outside the grid of a cube, which is that of both tiles
    report = extend_with(cube, scenes, local_client)
    plan = plan_of(scenes)
    assert (len(report.written), len(report.skipped)) == (len(plan.tasks) // 3, 2 * len(plan.tasks) // 3)
    assert all(tree(cube)[name] == digest for name, digest in kept.items()), "shards that were there are as they were"
    run(plan, whole, client=local_client)
    for part in (NAME, "overview", "_terrashard/ledger"):
        assert tree(cube, under=part) == tree(whole, under=part)
    assert open_cube(cube).provenance["plan"] == open_cube(whole).provenance["plan"] == plan.digest
    # and a plain ingest of all of it finds it complete
    assert len(run(plan, cube, client=local_client).skipped) == len(plan.tasks)


def test_appending_again_reads_and_changes_nothing(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:1]), cube, client=local_client)
    assert extend_with(cube, scenes, local_client).written
    before = tree(cube)
    monkeypatch.setattr(making, "fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
    monkeypatch.setattr("ingest.upkeep.extend.probe_scenes", lambda *_, **__: pytest.fail("a header was read"))
    again = extend_with(cube, scenes, local_client)
    assert (again.written, again.pixels_read, again.exit_code) == ((), 0, 0)
    assert tree(cube) == before


def test_a_date_in_between_is_refused(tmp_path: Path, local_client: Any) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12, 14)]
    cube = tmp_path / "cube.zarr"
    run(plan_of([scenes[0], scenes[2]]), cube, client=local_client)
    before = tree(cube)
    with pytest.raises(InvalidInput, match=r"S2_D12_P0_V0 .* lies before the last date of the cube, 2023-08-14"):
        extend_with(cube, scenes, local_client)
    assert tree(cube) == before


def test_other_rules_are_refused_with_the_difference(tmp_path: Path, local_client: Any) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:1]), cube, client=local_client)
    before = tree(cube)
    for change in ({"mask_dilate_m": 40.0}, {"bands": ("red",)}):
        with pytest.raises(CubeMismatch, match="made by other rules"):
            extend_with(cube, scenes, local_client, config=CONFIG.model_copy(update=change))
    assert tree(cube) == before


def test_a_late_scene_of_a_date_that_is_there_joins_it(tmp_path: Path, local_client: Any) -> None:
    """The rows of the item table keep their numbers, and only shards that the scene reaches are made again."""
    first, late, other = (
        scene(tmp_path / "s", 10),
        scene(tmp_path / "s", 10, part=1),
        scene(tmp_path / "s", 12, part=1),
    )
    cube = tmp_path / "cube.zarr"
    run(plan_of([first, other]), cube, client=local_client)
    report = extend_with(cube, [first, late, other], local_client)
    assert {row.index[0] for row in report.written} == {0}
    assert report.skipped
    opened = open_cube(cube)
    assert [item["id"] for item in opened.items(NAME)] == [first.id, other.id, late.id]
    data = opened.dataset(NAME)
    assert data.sizes["time"] == 2
    assert set(np.unique(data.source_item[0])) == {-1, 0, 2}
    # the pixels are those of a cube made at once, in which only the numbers of the rows differ
    run(plan_of([first, late, other]), tmp_path / "whole.zarr", client=local_client)
    whole = open_cube(tmp_path / "whole.zarr").dataset(NAME)
    np.testing.assert_array_equal(data.reflectance, whole.reflectance)
    np.testing.assert_array_equal(data.status, whole.status)


def test_a_layout_of_several_dates_grows_within_its_last_shard(tmp_path: Path, local_client: Any) -> None:
    layout = Layout("t", (2, 16, 16), (4, 32, 32))
    scenes = [scene(tmp_path / "s", day) for day in (10, 11, 12, 13, 14, 15)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:3], layout=layout), cube, client=local_client)
    assert open_cube(cube).ledger(NAME).counts(4)["done"] == 4
    assert extend_with(cube, scenes, local_client).exit_code == 0
    run(plan_of(scenes, layout=layout), tmp_path / "whole.zarr", client=local_client)
    for part in (NAME, "_terrashard/ledger"):
        assert tree(cube, under=part) == tree(tmp_path / "whole.zarr", under=part)


def test_a_reader_in_the_middle_sees_the_old_cube_or_the_new(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at after every single file that is written while the cube grows (FAULTS Z10)."""
    scenes = [scene(tmp_path / "s", day) for day in (10, 12, 15)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:2]), cube, client=local_client)
    old = open_cube(cube).dataset(NAME).load()
    merged = plan_of(scenes)
    seen: list[tuple[int, int, int, int]] = []
    write = FolderStore.write

    def look(store: Any, key: str, data: bytes) -> None:
        write(store, key, data)
        opened = open_cube(cube)
        direct = xr.open_zarr(cube, group=NAME, mask_and_scale=False, consolidated=True)
        nodes = xr.open_datatree(cube, engine="zarr", mask_and_scale=False)[NAME]
        coarse = xr.open_zarr(cube, group=f"overview/{NAME}", mask_and_scale=False)
        for dataset in (direct, nodes.to_dataset()):
            assert {v.sizes["time"] for v in dataset.data_vars.values() if "time" in v.dims} == {dataset.sizes["time"]}
            xr.testing.assert_equal(dataset.isel(time=slice(0, 2)).load(), old)
        assert len(opened.items(NAME)) == len(opened.spec(NAME).times)
        seen.append((len(opened.spec(NAME).times), direct.sizes["time"], nodes.sizes["time"], coarse.sizes["time"]))

    monkeypatch.setattr(FolderStore, "write", look)
    with CubeLock(cube, "test"):
        grow_cube(cube, merged.specs, items=merged.item_tables(), provenance=merged.provenance())
    assert {size for sizes in seen for size in sizes} == {2, 3}, "looked while it was old, and when it was new"
    assert seen[-1] == (3, 3, 3, 3)
    for before, after in itertools.pairwise(seen):
        assert all(new >= old_size for old_size, new in zip(before, after, strict=True)), "no way back"


def test_the_number_of_files_that_appending_writes_does_not_grow(tmp_path: Path, local_client: Any) -> None:
    written = []
    for days in (2, 12):
        scenes = [scene(tmp_path / "s", day) for day in range(1, days + 2)]
        cube = tmp_path / f"{days}.zarr"
        run(plan_of(scenes[:-1]), cube, client=local_client, config=IngestConfig(limit=1))
        merged = plan_of(scenes)
        with CubeLock(cube, "test"):
            arguments: dict[str, Any] = {"items": merged.item_tables(), "provenance": merged.provenance()}
            written.append(grow_cube(cube, merged.specs, **arguments))
            assert grow_cube(cube, merged.specs, **arguments) == 0
    assert written[0] == written[1] <= 14


def test_what_is_no_growth_is_refused(tmp_path: Path, local_client: Any) -> None:
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes), cube, client=local_client)
    before = tree(cube)
    for other in (
        plan_of(scenes[:1]),
        plan_of([scenes[1]]),
        plan_of(scenes, layout=Layout("t", (1, 8, 8), (1, 16, 16))),
    ):
        with pytest.raises(CubeMismatch, match="cannot grow into"):
            grow_cube(cube, other.specs, items=other.item_tables(), provenance={})
    assert tree(cube) == before


def test_damaged_metadata_are_named_and_not_written_over(tmp_path: Path, local_client: Any) -> None:
    """FAULTS Z11."""
    scenes = [scene(tmp_path / "s", day) for day in (10, 12)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:1]), cube, client=local_client)
    merged = plan_of(scenes)
    for name in ("zarr.json", f"{NAME}/zarr.json", f"{NAME}/status/zarr.json", f"{NAME}/time/zarr.json"):
        path = cube / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        before = tree(cube)
        with pytest.raises(TerrashardError, match="unreadable metadata") as caught:
            grow_cube(cube, merged.specs, items=merged.item_tables(), provenance={})
        assert str(path) in str(caught.value)
        assert tree(cube) == before
        path.write_bytes(whole)


def test_two_that_append_at_once_lose_nothing(tmp_path: Path, local_client: Any) -> None:
    """FAULTS Z03: the second is told at once; what it adds later stands beside what the first added."""
    scenes = [scene(tmp_path / "s", day) for day in (10, 12, 15)]
    cube = tmp_path / "cube.zarr"
    run(plan_of(scenes[:1]), cube, client=local_client)
    with CubeLock(cube, "append"), pytest.raises(Locked, match="held by append"):
        extend_with(cube, scenes, local_client)
    extend_with(cube, scenes[:2], local_client)
    extend_with(cube, [scenes[0], scenes[2]], local_client)
    assert [item["id"] for item in open_cube(cube).items(NAME)] == [s.id for s in scenes]
    assert open_cube(cube).ledger(NAME).counts(12)["done"] == 12


def test_a_newer_copy_is_taken_in_and_only_its_shards_are_made_again(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [scene(tmp_path / "s", day) for day in (10, 12, 15)]
    newer = scene(tmp_path / "s", 12, version=1)
    cube = tmp_path / "cube.zarr"
    run(plan_of(old), cube, client=local_client)
    found = [old[0], newer, old[2]]
    # without --refresh nothing happens, and above all the copy is not added as a scene of its own
    assert extend_with(cube, found, local_client).written == ()
    before = tree(cube)
    report = extend_with(cube, found, local_client, append=False, refresh=True)
    assert {row.index[0] for row in report.written} == {1}
    assert len(report.skipped) == 2 * len(report.written)
    opened = open_cube(cube)
    assert [item["id"] for item in opened.items(NAME)] == [*(s.id for s in old), newer.id]
    assert opened.items(NAME)[1]["superseded_by"] == newer.id
    changed = {name for name, digest in tree(cube).items() if before.get(name) != digest and "/c/" in name}
    assert changed
    assert all("/c/1/" in name for name in changed), "only the second date was written"
    run(plan_of([old[0], newer, old[2]]), tmp_path / "whole.zarr", client=local_client)
    whole = open_cube(tmp_path / "whole.zarr").dataset(NAME)
    np.testing.assert_array_equal(opened.dataset(NAME).reflectance, whole.reflectance)
    np.testing.assert_array_equal(opened.dataset(NAME).status, whole.status)
    before = tree(cube)
    monkeypatch.setattr(making, "fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
    assert extend_with(cube, found, local_client, refresh=True).written == ()
    assert tree(cube) == before


def test_a_newer_copy_that_cannot_be_read_costs_nothing_that_is_there(tmp_path: Path, local_client: Any) -> None:
    old, newer = scene(tmp_path / "s", 10), scene(tmp_path / "s", 10, version=1)
    cube = tmp_path / "cube.zarr"
    run(plan_of([old]), cube, client=local_client)
    pixels = tree(cube, under=NAME + "/reflectance/c")
    red = tmp_path / "s" / newer.id / "red.tif"
    kept = red.read_bytes()
    red.write_bytes(b"<html>log in</html>")
    report = extend_with(cube, [newer], local_client, refresh=True)
    assert (report.exit_code, report.written, report.partial) == (3, (), ())
    assert len(report.failed) == 4
    assert "stays as it was" in report.errors[0]
    assert f"{newer.id}, asset red" in next(iter(report.missing))
    assert tree(cube, under=NAME + "/reflectance/c") == pixels
    red.write_bytes(kept)
    assert len(extend_with(cube, [newer], local_client, refresh=True).written) == 4


def test_the_catalogue_of_today_beside_a_cube(tmp_path: Path) -> None:
    old = [scene(tmp_path / "s", day) for day in (10, 12, 15)]
    newer, fresh = scene(tmp_path / "s", 12, version=1), scene(tmp_path / "s", 20)
    half = scene(tmp_path / "s", 15, version=1, rows=8)  # same datatake, other ground: no copy
    news = compare(plan_of(old), SearchResult((old[0], newer, half, fresh)))
    assert [s.id for s in news.missing] == [half.id, fresh.id]
    assert {key[1]: row for key, (_, row) in news.superseded.items()} == {newer.id: 1}
    assert {key[1] for key in news.removed} == {old[1].id, old[2].id}
    same = compare(plan_of(old), SearchResult(tuple(old)))
    assert (same.missing, dict(same.superseded), same.removed) == ((), {}, ())


def test_the_plan_that_a_cube_keeps_is_its_own(tmp_path: Path, local_client: Any) -> None:
    plan = plan_of([scene(tmp_path / "s", 10)])
    cube = tmp_path / "cube.zarr"
    run(plan, cube, client=local_client, config=IngestConfig(limit=1))
    assert kept_plan(cube) == plan
    document = json.loads((cube / "_terrashard/plan.json").read_text())
    document["scenes"][NAME][0]["assets"][0]["href"] = "/etc/passwd"
    (cube / "_terrashard/plan.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match="was changed after it was made"):
        kept_plan(cube)
