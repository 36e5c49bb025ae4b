"""Small runs: the shards are made in threads of this process, with the bytes and errors of a cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import ingest.run.here as here
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.request.config import IngestConfig
from ingest.run.here import is_small
from ingest.run.loop import IngestEvent, run
from ingest.run.task import ingest_shard
from ingest.testing import make_scene
from ingest.worker import slots
from ingest.worker.slots import computing, take_turns
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.spec import Layout
from zarr_store.verify import verify_cube

TILE = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (64, 64))
LAYOUT = Layout("test", (1, 32, 32), (1, 64, 64))
CONFIG = IngestConfig(bands=("red", "scl"), retries=0)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Four dates, one shard each."""
    scenes = []
    for day in range(4):
        red = np.random.default_rng(day).integers(300, 3000, TILE.shape).astype(np.uint16)
        bands: dict[str, Any] = {"red": red, "scl": np.full(TILE.shape, 4, np.uint8)}
        scenes.append(make_scene(tmp_path / "scenes", f"S{day}", TILE, bands, datetime=f"2023-08-{10 + day}T10:00:00Z"))
    return plan_scenes(scenes, probe_scenes(scenes, CONFIG), CONFIG, layout=LAYOUT)


def content(cube: Path) -> dict[str, bytes]:
    """The stored pixels of a cube."""
    return {str(path.relative_to(cube)): path.read_bytes() for path in sorted(cube.rglob("c/*")) if path.is_file()}


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.run.work.open_cluster", lambda *_, **__: pytest.fail("a cluster was started"))


def test_a_run_that_died_is_continued_in_processes_of_its_own(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends the process would end the same command again and again, and never be left out."""
    enter = CubeLock.__enter__

    def after_a_death(lock: CubeLock) -> CubeLock:
        enter(lock).took_over = True
        return lock

    monkeypatch.setattr(CubeLock, "__enter__", after_a_death)
    monkeypatch.setattr("ingest.run.loop.make_here", lambda *_: pytest.fail("it ran in this process"))
    asked: list[int] = []
    monkeypatch.setattr("ingest.run.work.make_shards", lambda _, tasks, *__: asked.append(len(tasks)))
    run(plan, tmp_path / "cube.zarr", config=CONFIG)
    assert asked == [4]


def test_what_a_plan_states_cannot_make_a_large_run_small() -> None:
    """The statistics of a plan are not in its digest, so somebody may have changed them."""
    tasks = [SimpleNamespace(collection="s2", sources=[1])]
    for stated, small in (((-(10**15), 2 << 30), False), ((1e400, 0), False), ((5, 5), True)):
        numbers = dict(zip(("bytes_to_read", "bytes_to_write"), stated, strict=True))
        plan: Any = SimpleNamespace(tasks=tasks, statistics={"s2": numbers})
        assert is_small(plan, cast("Any", tasks), IngestConfig()) is small


def test_two_runs_in_threads_of_one_process_keep_a_limit_each_way() -> None:
    first, second = take_turns(1), take_turns(2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with computing(), computing():
        pass
    second.__exit__(None, None, None)
    assert slots._here == []


def test_the_bytes_are_those_of_a_cluster(
    plan: Plan, tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan, tmp_path / "there.zarr", config=CONFIG, client=local_client)
    monkeypatch.setattr("ingest.run.work.open_cluster", lambda *_, **__: pytest.fail("a cluster was started"))
    events: list[IngestEvent] = []
    report = run(plan, tmp_path / "here.zarr", config=CONFIG, on_event=events.append)
    assert len(report.written) == 4
    assert [event.kind for event in events] == ["planned", *["shard"] * 4, "finished"], "without a scheduler, no page"
    there = content(tmp_path / "there.zarr")
    assert len(there) > 4
    assert content(tmp_path / "here.zarr") == there
    assert not verify_cube(tmp_path / "here.zarr").damage


@pytest.mark.parametrize(
    "asked",
    [{"workers": 1}, {"workers": "1..4"}, {"memory": "1GB"}, {"dashboard": ":8787"}, {"scheduler": "tcp://x:1"}],
)
def test_who_asks_for_a_cluster_gets_one(plan: Plan, asked: dict[str, Any]) -> None:
    assert here.is_small(plan, plan.tasks, CONFIG)
    assert not here.is_small(plan, plan.tasks, IngestConfig(**asked))


def test_much_to_do_is_done_by_processes(plan: Plan) -> None:
    facts = dict(plan.statistics["sentinel-2-l2a"])
    large = Plan(**{**vars(plan), "statistics": {"sentinel-2-l2a": facts | {"bytes_to_read": 3 << 30}}})
    assert not here.is_small(large, plan.tasks, CONFIG)
    assert here.is_small(large, plan.tasks[:1], CONFIG), "what is left of it counts"
    unknown = Plan(**{**vars(plan), "statistics": {}})
    assert not here.is_small(unknown, plan.tasks, CONFIG)


def test_a_defect_fails_its_shard_and_no_other(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cluster: None
) -> None:
    make = ingest_shard

    def broken(task: Any, *args: Any, **more: Any) -> Any:
        if task.index[0] == 1:
            raise ValueError("a defect")
        return make(task, *args, **more)

    monkeypatch.setattr(here, "ingest_shard", broken)
    report = run(plan, tmp_path / "cube.zarr", config=CONFIG)
    assert (len(report.written), len(report.failed), report.exit_code) == (3, 1, 3)
    assert "ValueError: a defect" in report.errors[0]
    with pytest.raises(ValueError, match="a defect"):
        run(plan, tmp_path / "cube.zarr", config=CONFIG.model_copy(
            update={"running": CONFIG.running.model_copy(update={"on_error": "fail"})}))  # fmt: skip
    monkeypatch.undo()
    assert len(run(plan, tmp_path / "cube.zarr", config=CONFIG).written) == 1


def test_a_lost_file_ends_the_run_only_if_asked(plan: Plan, tmp_path: Path, no_cluster: None) -> None:
    Path(plan.tasks[2].sources[0].assets[0].href).unlink()
    failing = CONFIG.model_copy(update={"running": CONFIG.running.model_copy(update={"on_error": "fail"})})
    with pytest.raises(AssetUnreadable, match="on-error fail"):
        run(plan, tmp_path / "cube.zarr", config=failing)
    report = run(plan, tmp_path / "cube.zarr", config=CONFIG)
    assert (len(report.partial), report.exit_code) == (1, 3)
    assert open_cube(tmp_path / "cube.zarr").ledger("sentinel-2-l2a").get((0, 0, 0)).state == "done"


def test_an_interrupt_leaves_what_is_done(plan: Plan, tmp_path: Path, no_cluster: None) -> None:
    def interrupt(event: IngestEvent) -> None:
        if event.kind == "shard":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "cube.zarr", config=CONFIG, on_event=interrupt)
    report = run(plan, tmp_path / "cube.zarr", config=CONFIG)
    assert len(report.skipped) >= 1
    assert len(report.skipped) + len(report.written) == 4
    assert not verify_cube(tmp_path / "cube.zarr").damage


def test_threads_take_turns_to_compute() -> None:
    inside, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2)

    def work() -> None:
        nonlocal inside, most
        with computing():
            with lock:
                inside += 1
                most = max(most, inside)
            together.wait(10)
            with lock:
                inside -= 1

    with take_turns(2):
        threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert (most, inside) == (2, 0)
