"""Search, plan and run from Python: in a script, in a running event loop, with clients of all kinds."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import ingest
from zarr_store import open_cube
from zarr_store.errors import CubeMismatch, InvalidInput, UnknownName

from .conftest import SELECTION


def test_scenes_know_where_they_were_found(workplace: Path) -> None:
    found = ingest.find_scenes("world/catalog.json", **SELECTION)
    assert len(found) == 2
    assert [scene.id for scene in found[1:]] == [found[1].id]
    later = found.where(lambda scene: scene.datetime >= "2022-06")
    by_list = ingest.make_plan([found[1]], bands=["red", "nir"], found_in="world/catalog.json")
    assert ingest.make_plan(later).specs == by_list.specs
    with pytest.raises(InvalidInput, match="found_in=SOURCE"):
        ingest.make_plan([found[1]])


def test_settings_lie_over_a_configuration_and_errors_name_all_of_it(workplace: Path) -> None:
    config = ingest.IngestConfig(bands=("red", "nir", "green"), bbox=(16.2, 45.1, 16.3, 45.2))
    found = ingest.find_scenes("world/catalog.json", config, bands=cast(Any, np.array(["red"])), geometry=None)
    assert found.config.selection.bands == ("red",)
    assert found.config.selection.bbox == config.selection.bbox
    square = {"type": "Polygon", "coordinates": [[[15, 44], [17, 44], [17, 46], [15, 46], [15, 44]]]}
    assert ingest.find_scenes("world/catalog.json", config, geometry=square).config.selection.bbox is None
    with pytest.raises(UnknownName, match="did you mean 'bands'"):
        ingest.make_plan("world/catalog.json", band=["red"])  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match=r"bbox: .*; .*resolution|resolution: .*; bbox"):
        ingest.make_plan("world/catalog.json", resolution=-1.0, bbox=(16, 50, 17, 40))


def test_a_plan_that_was_saved_is_checked_before_it_runs(workplace: Path, client: Any) -> None:
    plan = ingest.make_plan("world/catalog.json", **SELECTION)
    plan.save("plan.json")
    # the folder of the scenes is a link here, and what it leads to lies outside of that of plan.json
    assert ingest.run_plan("plan.json", "other.zarr", client=client, allow_local="world").exit_code == 0
    # the same plan, as somebody would send it: below its own folder are no scenes, and its word for it counts nothing
    Path("sent").mkdir()
    plan.save("sent/plan.json")
    for sent in ("sent/plan.json", ingest.Plan.load("plan.json")):
        with pytest.raises(InvalidInput, match="--allow-local"):
            ingest.run_plan(sent, "third.zarr", client=client)
    assert not Path("third.zarr").exists()
    assert ingest.run_plan("sent/plan.json", "third.zarr", client=client, allow_local="world").exit_code == 0


def test_trust_that_a_plan_was_made_with_holds_for_its_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingest.run import loop

    seen: list[Any] = []
    monkeypatch.setattr(loop, "run", lambda plan, cube, *, config, **_: seen.append(config))
    plan = ingest.make_plan("world/catalog.json", **SELECTION, allow_private_hosts=True, allow_hosts=["a.org"])
    ingest.run_plan(plan, "other.zarr", retries=1)
    trust = seen[0].trust
    assert (trust.allow_private_hosts, trust.allow_hosts, seen[0].running.retries) == (True, ("a.org",), 1)
    plan.save("plan.json")
    ingest.run_plan("plan.json", "other.zarr", allow_local=[str(Path("world").resolve())])
    assert (seen[1].trust.allow_private_hosts, seen[1].trust.allow_hosts) == (False, ())


def test_the_current_client_is_used_and_an_asynchronous_one_refused(workplace: Path, client: Any) -> None:
    from distributed import Client

    from ingest.run.cluster import choose_client

    default = ingest.IngestConfig()
    assert choose_client(None, default) is None
    with client.as_current():
        assert choose_client(None, default) is client
        assert choose_client(None, ingest.IngestConfig(workers=3)) is None, "a cluster was asked for"
    assert choose_client(client, ingest.IngestConfig(workers=3)) is client

    async def within() -> None:
        async with Client(client.scheduler.address, asynchronous=True) as other:
            plan = ingest.make_plan("world/catalog.json", **SELECTION)
            with pytest.raises(InvalidInput, match="asynchronous"):
                ingest.run_plan(plan, "other.zarr", client=other)

    asyncio.run(within())


def test_the_whole_runs_inside_a_running_event_loop(workplace: Path, client: Any) -> None:
    """As in Jupyter, whose cells run in a loop: plain calls block the cell and work."""

    async def cell() -> tuple[Any, Any]:
        assert asyncio.get_running_loop()
        plan = ingest.make_plan(ingest.find_scenes("world/catalog.json", **SELECTION))
        report = ingest.run_plan(plan, "looped.zarr", client=client)
        lazy = open_cube("looped.zarr").dataset("sentinel-2-l2a", chunks="shards", scaled=True, masked=True)
        with client.as_current():
            mean = lazy.reflectance.mean("time").compute()
        stack = ingest.open_stack(plan)
        with client.as_current():
            stack.isel(time=0).compute()
        return report, mean

    report, mean = asyncio.run(cell())
    assert len(report.written) == 2
    assert np.isfinite(mean).any()


SCRIPT = """
print("ran")
import ingest
plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red"], datetime="2022-06")
print(repr(ingest.run_plan(plan, "scripted.zarr", workers=1, progress=True)))
"""
LOOPED = """
import asyncio, ingest
async def cell():
    plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red"], datetime="2022-06")
    return ingest.run_plan(plan, "scripted.zarr", workers=1, progress=True)
print("ran", repr(asyncio.run(cell())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [SCRIPT, LOOPED], ids=["plain", "in a loop"])
def test_a_script_without_a_main_guard_starts_its_own_processes(workplace: Path, code: str) -> None:
    Path("script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran") == 1, "a worker ran the script once more"
    assert "scripted.zarr: 1 written, 0 partial, 0 done before, 0 failed" in done.stdout
    assert "dashboard: http://127.0.0.1" in done.stderr
    assert "ingest: 1/1 shards" in done.stderr


def test_only_workers_of_dask_start_without_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from multiprocessing import spawn

    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    from ingest.worker.spawn import main_module_left_alone

    def keys(name: str) -> set[str]:
        return {key for key in spawn.get_preparation_data(name) if key.startswith("init_main")}

    before = spawn.get_preparation_data
    assert keys("Dask Worker process (from Nanny)"), "the test is run from a main module"
    with main_module_left_alone(), main_module_left_alone():
        assert not keys("Dask Worker process (from Nanny)")
        assert keys("Process-1") == keys("own")
        assert keys("own")
    assert spawn.get_preparation_data is before


def test_a_cube_grows_is_refreshed_and_overwritten(workplace: Path, client: Any) -> None:
    with client.as_current():
        plan = ingest.make_plan("world/catalog.json", **SELECTION, datetime="2022-04")
        assert len(ingest.run_plan(plan, "grown.zarr").written) == 1
        grown = ingest.append_scenes("grown.zarr", "world/catalog.json", datetime="2022-06")
        assert (len(grown.written), len(grown.skipped)) == (1, 1)
        assert len(open_cube("grown.zarr").spec("sentinel-2-l2a").times) == 2
        assert ingest.refresh_scenes("grown.zarr", "world/catalog.json").written == ()
        other = ingest.make_plan("world/catalog.json", collections="sentinel-2-l2a", bands="green")
        with pytest.raises(CubeMismatch):
            ingest.run_plan(other, "grown.zarr")
        assert len(ingest.run_plan(other, "grown.zarr", overwrite=True).written) == 2
        assert open_cube("grown.zarr").spec("sentinel-2-l2a").band_names == ("green",)


def test_a_broken_shard_is_found_and_healed(workplace: Path, client: Any) -> None:
    shard = next(path for path in Path("cube.zarr/sentinel-2-l2a/reflectance/c").rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    report = ingest.repair_cube("cube.zarr", client=client, allow_local="world")
    assert [one.state for one in report.damage] == ["corrupt"]
    assert len(report.ingest.written) == 1
    assert ingest.verify_sources("cube.zarr", allow_local="world").different == ()


def test_what_the_catalogue_has_more_is_named(workplace: Path, client: Any) -> None:
    plan = ingest.make_plan("world/catalog.json", **SELECTION, datetime="2022-04")
    ingest.run_plan(plan, "half.zarr", client=client)
    assert ingest.audit_cube("half.zarr", "world/catalog.json").missing == ()
    missing = ingest.audit_cube("half.zarr", "world/catalog.json", datetime="2022").missing
    assert [row["datetime"][:7] for row in missing] == ["2022-06"]
