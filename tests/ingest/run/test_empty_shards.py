"""Shards that no scene reaches cost no file; they are complete, read as no data, and differ from lost ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.scenes.search import SearchResult, find_scenes
from ingest.upkeep.extend import extend
from ingest.upkeep.repair import repair, verify_sources
from zarr_store.errors import IntegrityError, MissingShard
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import Layout
from zarr_store.verify import verify_cube

from ..small_scenes import land, make_scene, write_items, write_tif

NAME = "sentinel-2-l2a"
CONFIG = IngestConfig(bands="blue", mask="none")
LAYOUT = Layout("test", (1, 64, 64), (1, 64, 64))
WHOLE = Region(0, 1, 0, 384, 0, 384)


def _plan(source: Path, config: IngestConfig = CONFIG) -> Plan:
    scenes = find_scenes(str(source), config).scenes
    return plan_scenes(scenes, probe_scenes(scenes, config), config, layout=LAYOUT, source=str(source))


def _read(cube: Cube, array: str = "reflectance", region: Region = WHOLE) -> np.ndarray:
    return cube.read(NAME, array, region)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, local_client: Any) -> tuple[Path, Path, Plan, Any]:
    """Two scenes of one shard each in opposite corners of 6 × 6 shards: (folder, cube, plan, report)."""
    folder = tmp_path_factory.mktemp("far")
    a = write_tif(folder / "a/B02.tif", land(seed=1))
    b = write_tif(folder / "b/B02.tif", land(seed=2), corner=(503_200, 5_096_800))
    items = [make_scene("A", {"B02": a}), make_scene("B", {"B02": b}, s2__mgrs_tile="33TWL")]
    plan = _plan(write_items(folder, *items))
    return folder, folder / "cube.zarr", plan, run(plan, folder / "cube.zarr", client=local_client)


def test_empty_shards_have_no_file_and_the_plan_says_so(far: tuple[Path, Path, Plan, Any]) -> None:
    _, cube, plan, report = far
    assert "36 of up to 1×64×64" in plan.summary()
    assert "34 of them hold nothing and cost no file" in plan.summary()
    statistics = plan.statistics[NAME]
    assert statistics["empty_shards"] == 34
    assert statistics["bytes_to_write"] < 64 * 64 * 2 * (2 + 1 + 2)
    pixels = [path for path in cube.rglob("c/*") if path.is_file() and f"/{NAME}/reflectance/" in str(path)]
    pixels += [path for path in cube.glob(f"{NAME}/*/c/**/*") if path.is_file()]
    assert len({path for path in pixels if "reflectance" in str(path)}) == 2
    assert len(list((cube / "_terrashard/ledger" / NAME).iterdir())) == 2
    assert (len(report.written), report.empty, report.exit_code) == (36, 34, 0)
    assert "36 shards written (34 of them empty, without a file)" in report.summary()


def test_they_are_complete_and_read_as_no_data(far: tuple[Path, Path, Plan, Any], local_client: Any) -> None:
    folder, path, plan, _ = far
    cube = open_cube(path)
    spec = cube.spec(NAME)
    assert cube.ledger(NAME).counts(36, spec.shards()) == {
        "done": 36,
        "partial": 0,
        "failed": 0,
        "pending": 0,
        "total": 36,
    }
    whole = _read(cube)[0, 0]
    assert np.array_equal(whole[:64, :64], land(seed=1) - 1000)
    assert np.array_equal(whole[320:, 320:], land(seed=2) - 1000)
    assert np.count_nonzero(whole) == 2 * 64 * 64
    assert np.unique(_read(cube, "source_item")).tolist() == [-1, 0, 1]
    assert np.array_equal(whole, cube.dataset(NAME).reflectance.values[0, 0])
    index = cube.index(NAME)
    assert index.present.all()
    assert index.observed.sum() == 2 * 64 * 64
    again = run(plan, path, client=local_client)
    assert (again.written, len(again.skipped), again.exit_code) == ((), 36, 0)
    assert verify_cube(path).damage == ()
    sources = verify_sources(path, IngestConfig(allow_local=(str(folder),)))
    assert (sources.checked, sources.different, sources.unread) == (36, (), ())


def test_a_lost_shard_is_not_taken_for_an_empty_one(far: tuple[Path, Path, Plan, Any], tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "cube.zarr"
    shutil.copytree(far[1], copied)
    (copied / NAME / "reflectance/c/0/0/5/5").unlink()
    cube = open_cube(copied)
    assert not _read(cube, region=Region(0, 1, 0, 384, 64, 128)).any()
    with pytest.raises(MissingShard):
        _read(cube)
    assert [damage.index for damage in verify_cube(copied).damage] == [(0, 5, 5)]


def test_a_list_that_cannot_be_read_is_an_error_and_is_made_again(
    far: tuple[Path, Path, Plan, Any], tmp_path: Path, local_client: Any
) -> None:
    import shutil

    copied = tmp_path / "cube.zarr"
    shutil.copytree(far[1], copied)
    lists = copied / "_terrashard/empty" / f"{NAME}.json"
    before = lists.read_bytes()
    lists.write_bytes(before[:200])
    with pytest.raises(IntegrityError, match="not a list of empty shards"):
        open_cube(copied).ledger(NAME).rows()
    repair(copied, IngestConfig(allow_local=(str(far[0]),)), client=local_client)
    assert lists.read_bytes() == before


def test_a_scene_that_comes_later_fills_what_was_empty(
    far: tuple[Path, Path, Plan, Any], tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder, path, _, _ = far
    copied = tmp_path / "cube.zarr"
    shutil.copytree(path, copied)
    late = write_tif(folder / "late/B02.tif", land(seed=3), corner=(500_640, 5_100_000))
    scenes = [
        *find_scenes(str(folder / "items.json"), CONFIG).scenes,
        *find_scenes(str(write_items(folder, make_scene("C", {"B02": late}, s2__mgrs_tile="33TXM"), name="c.json")),
                     CONFIG).scenes,
    ]  # fmt: skip
    monkeypatch.setattr("ingest.upkeep.extend.find_scenes", lambda *_, **__: SearchResult(tuple(scenes)))
    config = CONFIG.model_copy(update={"allow_local": (str(folder),)})
    report = extend("", copied, config, client=local_client)
    assert [row.index for row in report.written] == [(0, 0, 1)]
    cube = open_cube(copied)
    assert np.array_equal(_read(cube)[0, 0, :64, 64:128], land(seed=3) - 1000)
    assert cube.ledger(NAME).counts(36)["done"] == 36
    assert (0, 0, 1) in cube.ledger(NAME).stored_rows()
