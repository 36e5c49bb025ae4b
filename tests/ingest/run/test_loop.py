"""Runs: what is written, what is skipped, and what is left after faults, kills and signals."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ingest.run.task as making
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.cluster import open_cluster, resolve_dashboard
from ingest.run.loop import IngestEvent, run
from ingest.run.shard import fill_shard
from ingest.testing import make_scene, probe_headers
from ingest.worker.guard import memory_note
from zarr_store.errors import AccessError, AssetUnreadable, CubeMismatch, InvalidInput, Locked, NoSpace
from zarr_store.grid import Grid
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.spec import LAYOUTS, Layout
from zarr_store.write import ShardWriter

SIZE = (70, 66)
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), SIZE)
CONFIG = IngestConfig(bands=("red", "nir", "scl"))
NAME = "sentinel-2-l2a"


def make_plan(folder: Path, *, days: int = 2, shard: int = 32, config: IngestConfig = CONFIG) -> Plan:
    """Two half-overlapping scenes a day."""
    rng = np.random.default_rng(1)
    scenes = []
    for day in range(days):
        for part in range(2):
            grid = Grid(GRID.crs, (20.0, 0.0, 500_000.0 + 600 * part, 0.0, -20.0, 5_000_000.0), SIZE)
            pixels: dict[str, np.ndarray] = {b: rng.integers(1, 9000, SIZE).astype(np.uint16) for b in ("red", "nir")}
            pixels["scl"] = rng.choice(np.array([0, 4, 5, 9], np.uint8), size=SIZE)
            scenes.append(
                make_scene(folder, f"D{day}P{part}", grid, pixels, datetime=f"2023-08-{10 + day:02d}T10:00:0{part}Z")
            )
    return plan_scenes(scenes, probe_headers(scenes), config, layout=Layout("t", (1, 16, 16), (1, shard, shard)))


def tree(path: Path) -> dict[str, str]:
    """Every file but the lock → its hash."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "lock.json"
    }


def times(path: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_second_run_reads_and_changes_nothing(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "scenes")
    cube = tmp_path / "cube.zarr"
    events: list[IngestEvent] = []
    first = run(plan, cube, client=local_client, on_event=events.append)
    assert (first.exit_code, len(first.written), first.pending) == (0, len(plan.tasks), 0)
    assert first.pixels_read > 0
    assert [e.kind for e in events[:2]] == ["planned", "dashboard"]
    assert [e.done for e in events if e.kind == "shard"] == list(range(1, len(plan.tasks) + 1))
    before = tree(cube), times(cube)
    monkeypatch.setattr(making, "fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
    monkeypatch.setattr("ingest.run.work.open_cluster", lambda *_, **__: pytest.fail("a cluster was started"))
    second = run(plan, cube)
    assert (len(second.written), len(second.skipped), second.pixels_read, second.exit_code) == (
        0,
        len(plan.tasks),
        0,
        0,
    )
    assert "nothing to do" in second.summary()
    assert "0 written" in second.summary()
    assert (tree(cube), times(cube)) == before
    assert not list(cube.rglob("lock.json"))


def test_the_cube_keeps_where_it_came_from(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    run(plan, tmp_path / "cube.zarr", client=local_client)
    cube = open_cube(tmp_path / "cube.zarr")
    assert cube.provenance["plan"] == plan.digest
    assert [item["id"] for item in cube.items(NAME)] == ["D0P0", "D0P1"]
    assert cube.provenance["collections"][NAME]["offset_verdicts"]["D0P0"]["verdict"] == "unchecked"
    rows = cube.ledger(NAME).rows()
    assert {row.key for row in rows.values()} == {task.key for task in plan.tasks}
    status = cube.dataset(NAME)["status"].values
    assert cube.index(NAME).observed.sum() == (status == 1).sum() > 0


def test_an_unreadable_scene_is_named_and_its_pixels_are_missing(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    bad = tmp_path / "scenes" / "D0P0" / "nir.tif"
    kept = bad.read_bytes()
    bad.write_text("<html>Please log in</html>")
    cube = tmp_path / "cube.zarr"
    report = run(plan, cube, client=local_client)
    assert report.exit_code == 3
    assert report.partial
    assert list(report.missing) == ["D0P0, asset nir"]
    assert "not a TIFF" in report.missing["D0P0, asset nir"]
    assert "D0P0, asset nir" in report.summary()
    dataset = open_cube(cube).dataset(NAME)
    status, pixels = dataset["status"].values, dataset["reflectance"].values
    assert (status[0, :, :30] == 3).all(), "only the broken scene covers these columns"
    assert not pixels[0][:, status[0] == 3].any()
    assert (open_cube(cube).index(NAME).missing.sum(), open_cube(cube).index(NAME).observed.sum()) == (
        (status == 3).sum(), (status == 1).sum()
    )  # fmt: skip
    assert str(tmp_path / "scenes") not in (cube / "_terrashard").joinpath("ledger", NAME, "0-0-0.json").read_text()
    skipped = run(plan, cube, client=local_client, config=IngestConfig(on_error="skip"))
    assert (skipped.exit_code, len(skipped.written), len(skipped.partial)) == (3, 0, len(report.partial))
    # once the file is back the same call heals the cube, and it is the one an untroubled run makes
    bad.write_bytes(kept)
    healed = run(plan, cube, client=local_client)
    assert (healed.exit_code, len(healed.written)) == (0, len(report.partial))
    run(plan, tmp_path / "other.zarr", client=local_client)
    assert tree(cube) == tree(tmp_path / "other.zarr")


def test_on_error_fail_stops_at_the_first_unreadable_asset(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    (tmp_path / "scenes" / "D0P1" / "scl.tif").unlink()
    with pytest.raises(AssetUnreadable, match="scene D0P1, asset scl"):
        run(plan, tmp_path / "cube.zarr", client=local_client, config=IngestConfig(on_error="fail"))


def test_another_plan_is_refused(tmp_path: Path, local_client: Any) -> None:
    cube = tmp_path / "cube.zarr"
    run(make_plan(tmp_path / "scenes", days=1), cube, client=local_client)
    before = tree(cube)
    other_mask = make_plan(tmp_path / "scenes", days=1, config=CONFIG.model_copy(update={"mask_dilate_m": 40.0}))
    with pytest.raises(CubeMismatch, match=r"mask_dilate_m: default → 40"):
        run(other_mask, cube, client=local_client)
    with pytest.raises(CubeMismatch, match="times"):
        run(make_plan(tmp_path / "scenes"), cube, client=local_client)
    assert tree(cube) == before


def test_something_else_at_the_target_is_left_alone(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    with pytest.raises(InvalidInput, match="not a terrashard cube"):
        run(plan, folder, client=local_client)
    assert [p.name for p in folder.rglob("*")] == ["a.jpg"]


def test_a_shard_made_by_other_rules_is_made_again(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    cube = tmp_path / "cube.zarr"
    run(plan, cube, client=local_client)
    before = tree(cube)
    ledger = open_cube(cube).ledger(NAME)
    ledger.put(replace(ledger.rows()[0, 1, 1], key="of another release"))
    report = run(plan, cube, client=local_client)
    assert [row.index for row in report.written] == [(0, 1, 1)]
    assert tree(cube) == before


def test_a_limit_leaves_the_rest_for_later(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    cube = tmp_path / "cube.zarr"
    first = run(plan, cube, client=local_client, config=IngestConfig(limit=4))
    assert (len(first.written), first.pending) == (4, len(plan.tasks) - 4)
    second = run(plan, cube, client=local_client)
    assert (len(second.written), len(second.skipped), second.pending) == (len(plan.tasks) - 4, 4, 0)


def test_a_locked_cube_is_left_alone(tmp_path: Path, local_client: Any) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    run(plan, tmp_path / "cube.zarr", client=local_client, config=IngestConfig(limit=1))
    with CubeLock(tmp_path / "cube.zarr", "another ingest"), pytest.raises(Locked, match=f"pid {os.getpid()}"):
        run(plan, tmp_path / "cube.zarr", client=local_client)


def test_a_full_disk_is_named_and_the_run_goes_on_later(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    written: list[Any] = []
    real = ShardWriter.pack

    def full(self: Any, region: Any, *args: Any, **more: Any) -> Any:
        if len(written) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(region)
        return real(self, region, *args, **more)

    monkeypatch.setattr(ShardWriter, "pack", full)
    with pytest.raises(NoSpace, match="no space left"):
        run(plan, tmp_path / "cube.zarr", client=local_client)
    monkeypatch.undo()
    report = run(plan, tmp_path / "cube.zarr", client=local_client)
    assert (len(report.written), len(report.skipped)) == (len(plan.tasks) - 3, 3)


def test_a_shard_that_cannot_be_made_is_listed_and_the_others_are(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    poison, real = plan.tasks[2].index, fill_shard

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        if task.index == poison:
            raise MemoryError("poison")
        return real(task, *args, **more)

    monkeypatch.setattr(making, "fill_shard", fill)
    report = run(plan, tmp_path / "cube.zarr", client=local_client)
    assert (report.exit_code, [row.index for row in report.failed]) == (3, [poison])
    assert "poison" in report.errors[0]
    assert len(report.written) == len(plan.tasks) - 1
    monkeypatch.undo()
    assert len(run(plan, tmp_path / "cube.zarr", client=local_client).written) == 1


def test_a_dead_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "scenes")
    killed: list[int] = []

    def kill(event: IngestEvent) -> None:
        if event.kind == "dashboard":
            assert event.url is not None
            assert event.url.startswith("http://127.0.0.1:"), "the dashboard is known before work starts"
        if event.kind == "shard" and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
            killed.append(workers[0].pid)
            workers[0].kill()
            assert_loopback_only(workers)

    report = run(plan, tmp_path / "cube.zarr", config=IngestConfig(workers=2), on_event=kill)
    assert killed
    assert (report.exit_code, len(report.written)) == (0, len(plan.tasks))


def test_what_a_dead_worker_left_half_written_is_gone_when_the_run_ends(tmp_path: Path, local_client: Any) -> None:
    plan, cube = make_plan(tmp_path, days=3), tmp_path / "cube.zarr"
    left: list[Path] = []

    def leave(event: IngestEvent) -> None:
        if event.kind == "shard" and not left:
            left.append(cube / "sentinel-2-l2a" / "status" / ".0.x7y8z9.partial")
            left[0].write_bytes(b"half")

    run(plan, cube, client=local_client, on_event=leave)
    assert left
    assert not left[0].exists()
    run(plan, tmp_path / "whole.zarr", client=local_client)
    assert tree(cube) == tree(tmp_path / "whole.zarr")


def test_d04_d05_a_shard_that_ends_every_worker_is_given_up_with_a_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "scenes", days=1, shard=96)
    assert len(plan.tasks) == 1
    pids: set[int] = set()
    # workers die at the first step of a shard, as if the system had killed them for their memory
    monkeypatch.setenv("TERRASHARD_CRASH_AT", "1")

    def watch(event: IngestEvent) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # dying at this moment
                if "spawn_main" in " ".join(process.cmdline()):
                    pids.add(process.pid)

    config = IngestConfig(workers=1, memory="500MB")
    report = run(plan, tmp_path / "cube.zarr", config=config, on_event=watch)
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids), "they died, or ended with the run"
    assert (report.exit_code, len(report.failed)) == (3, 1)
    assert "4 workers died while they made it" in report.errors[0]
    assert "--memory" in report.errors[0]


def test_d05_workers_get_their_memory_limit_and_too_little_is_said(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "scenes", days=1, shard=96)
    recipe = plan.recipes[0]
    large = replace(recipe.spec, grid=replace(recipe.spec.grid, shape=(4096, 4096)), layout=LAYOUTS["archive"])
    with open_cluster(IngestConfig(workers=1, memory="700MB")) as client:
        assert [w["memory_limit"] for w in client.scheduler_info()["workers"].values()] == [7 * 10**8]
        assert memory_note(client, recipe.spec) is None
        said = memory_note(client, large)
    assert said is not None
    assert "may use 667 MiB" in said
    assert "--memory" in said


def assert_loopback_only(processes: list[psutil.Process]) -> None:
    for process in [psutil.Process(), *processes[1:]]:
        for socket in process.net_connections(kind="tcp"):
            if socket.status == psutil.CONN_LISTEN:
                assert socket.laddr.ip == "127.0.0.1"


SCRIPT = """
import sys, time
from ingest.request.config import IngestConfig
from ingest.plan.plan import Plan
from ingest.run.loop import run
from zarr_store.errors import Preempted

if __name__ == "__main__":
    try:
        # each shard that ends holds the next ones up, so that there is time to interrupt
        run(Plan.load(sys.argv[1]), sys.argv[2], config=IngestConfig(workers=1),
            on_event=lambda event: time.sleep(0.2 if event.kind == "shard" else 0))
    except Preempted:
        sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, local_client: Any, repository: Path, number: signal.Signals
) -> None:
    plan = make_plan(tmp_path / "scenes", days=4)
    plan.save(tmp_path / "plan.json")
    cube = tmp_path / "cube.zarr"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "plan.json"), str(cube)], env=environment)
    ledger = cube / "_terrashard" / "ledger" / NAME
    deadline = time.monotonic() + 120
    while not ledger.is_dir() or len(list(ledger.glob("*.json"))) < 5:
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, "the run never wrote five shards"
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "workers outlive their run"
    rows = open_cube(cube).ledger(NAME).rows()
    assert 5 <= len(rows) < len(plan.tasks), "the run was not interrupted"
    assert (cube / "_terrashard" / "lock.json").exists() == (number == signal.SIGKILL)
    report = run(plan, cube, client=local_client)
    assert (len(report.skipped), len(report.written)) == (len(rows), len(plan.tasks) - len(rows))
    run(plan, tmp_path / "whole.zarr", client=local_client)
    assert tree(cube) == tree(tmp_path / "whole.zarr")


def test_no_scheduler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.run.cluster._CONNECT_S", 1)
    cluster = open_cluster(IngestConfig(scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(AccessError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        cluster.__enter__()


def test_settings_become_limits() -> None:
    assert Access.of(IngestConfig(retries=2)).attempts == 3
    assert Access.of(IngestConfig(on_error="skip")).attempts == 1
    assert resolve_dashboard("0.0.0.0:8787") == "0.0.0.0:8787"
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        resolve_dashboard("http://x")


def test_a_run_refuses_gdal_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "scenes", days=1)
    monkeypatch.setenv("GDAL_NUM_THREADS", "2")
    with pytest.raises(InvalidInput, match="GDAL_NUM_THREADS"):
        run(plan, tmp_path / "cube.zarr")
    assert not (tmp_path / "cube.zarr").exists()


def test_workers_that_run_elsewhere_find_a_cube_named_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "scenes")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with open_cluster(IngestConfig(workers=1)) as client:
        client.run(os.chdir, str(tmp_path / "elsewhere"))
        assert len(run(plan, "cube.zarr", client=client).written) == len(plan.tasks)
