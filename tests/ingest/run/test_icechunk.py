"""`--store icechunk`: one commit per run; a killed run leaves the last snapshot, and the next one finishes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingest.run.task as making
from cli.main import main
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from zarr_store.attributes import flatten_attributes
from zarr_store.backends import open_store
from zarr_store.errors import CorruptShard, InvalidInput, Locked, MissingShard
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.spec import Layout
from zarr_store.verify import verify_cube

icechunk = pytest.importorskip("icechunk")

from .. import growing  # noqa: E402

NAME = growing.NAME
ICECHUNK = IngestConfig(store="icechunk")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    scenes = [growing.scene(tmp_path / "scenes", day) for day in (10, 12, 15)]
    return growing.plan_of(scenes, layout=Layout("t", (1, 16, 16), (1, 16, 16)))


class Filled:
    """Indices of shards that were filled, in the order of being begun; once there are `most`, the next ones wait."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.most = 1 << 30
        self.on = threading.Event()


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Filled:
    real, state = fill_shard, Filled()

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        state.seen.append(task.index)
        if len(state.seen) > state.most:
            state.on.wait(90)
        return real(task, *args, **more)

    monkeypatch.setattr(making, "fill_shard", fill)
    return state


def repository_of(cube: Path) -> Any:
    return icechunk.Repository.open(icechunk.local_filesystem_storage(str(cube)))


def messages(cube: Path) -> list[str]:
    return [one.message for one in repository_of(cube).ancestry(branch="main")]


def published(cube: Path) -> Any:
    import xarray as xr

    store = repository_of(cube).readonly_session("main").store
    # attributes as `Cube.dataset` has them: flat, for programs that know no others
    return flatten_attributes(xr.open_zarr(store, group=NAME, chunks=None, mask_and_scale=False).load())


def rows(cube: Path) -> dict[Any, bytes]:
    return {index: row.to_json() for index, row in open_cube(cube).ledger(NAME).rows().items()}


def pixels(cube: Path) -> dict[str, np.ndarray]:
    opened = open_cube(cube)
    spec = opened.spec(NAME)
    return {
        array.name: np.stack(
            [opened.read(NAME, array.name, box) for box in spec.shards().values() if box.y0 == box.x0 == 0]
        )
        for array in spec.arrays()
    }


def test_a_run_is_one_commit_and_every_reader_opens_it(
    plan: Plan, tmp_path: Path, local_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    cube, plain = tmp_path / "cube", tmp_path / "plain"
    ask = ["ingest", str(tmp_path / "plan.json"), str(cube), "--allow-local", str(tmp_path)]
    ask += ["--scheduler", local_client.scheduler.address]
    assert main([*ask, "--store", "icechunk"]) == 0, capsys.readouterr().err
    assert messages(cube) == [f"ingest of plan {plan.digest[:12]}", "Repository initialized"]
    assert run(plan, plain, client=local_client).written
    assert rows(cube) == rows(plain)
    expected = open_cube(plain).dataset(NAME).load()
    assert published(cube).identical(expected)
    assert open_cube(cube).dataset(NAME).load().identical(expected)
    for name, stored in pixels(plain).items():
        np.testing.assert_array_equal(pixels(cube)[name], stored)
    for command in ("info", "status", "verify"):
        assert main([command, str(cube)]) == 0, capsys.readouterr().err
    assert "complete" in capsys.readouterr().out
    # the same again: nothing is read, nothing is committed, with or without saying what the store is
    before = growing.tree(cube)
    assert main(ask) == 0
    assert growing.tree(cube) == before
    assert main([*ask, "--store", "folder"]) == 2
    assert "is held by icechunk, not folder" in capsys.readouterr().err


def test_a_killed_run_leaves_the_last_snapshot_and_is_finished_by_the_next(
    plan: Plan, tmp_path: Path, repository: Path, local_client: Any, filled: Filled
) -> None:
    cube, whole = tmp_path / "cube", tmp_path / "whole"
    run(plan, whole, client=local_client, config=ICECHUNK)
    run(plan, cube, client=local_client, config=IngestConfig(store="icechunk", limit=2))
    first = published(cube)
    filled.seen.clear()
    filled.most = 6
    (tmp_path / "plan.json").write_text(plan.to_json())
    client = subprocess.Popen(
        [
            sys.executable, str(Path(__file__).parents[1] / "kill_rig.py"),
            str(tmp_path / "plan.json"), str(cube), local_client.scheduler.address,
        ],
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while len(rows(cube)) < 6 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait(10)
    assert client.returncode == -signal.SIGKILL, "it was killed while it worked"
    filled.on.set()
    while making._being_made:  # its tasks end by themselves
        time.sleep(0.05)
    staged, total = len(rows(cube)), len(plan.tasks)
    assert 6 <= staged < total, "it died in the middle"
    assert len(messages(cube)) == 2, "nothing of it was committed"
    assert published(cube).identical(first), "who knows Icechunk sees the run before"
    assert not verify_cube(cube).damage, "and what is staged is whole"
    filled.seen.clear()
    report = run(plan, cube, client=local_client)
    assert len(filled.seen) == total - staged == len(report.written), "what was staged is not read again"
    assert len(messages(cube)) == 3
    assert rows(cube) == rows(whole)
    assert published(cube).identical(published(whole))


def test_growing_and_healing_are_commits_of_their_own(plan: Plan, tmp_path: Path, local_client: Any) -> None:
    cube = tmp_path / "cube"
    scenes = [growing.scene(tmp_path / "more", day) for day in (10, 12, 15)]
    newer = growing.scene(tmp_path / "more", 12, version=1)
    run(growing.plan_of(scenes[:2]), cube, client=local_client, config=ICECHUNK)
    first = repository_of(cube).lookup_branch("main")
    growing.extend_with(cube, [scenes[0], newer, scenes[2]], local_client, refresh=True)
    assert len(messages(cube)) == 3
    assert published(cube).sizes["time"] == 3
    plain = tmp_path / "plain"
    run(growing.plan_of(scenes[:2]), plain, client=local_client)
    growing.extend_with(plain, [scenes[0], newer, scenes[2]], local_client, refresh=True)
    assert published(cube).identical(open_cube(plain).dataset(NAME).load())
    assert rows(cube) == rows(plain)
    # the first snapshot is still there, as it was
    import xarray as xr

    old = xr.open_zarr(repository_of(cube).readonly_session(snapshot_id=first).store, group=NAME, chunks=None)
    assert old.sizes["time"] == 2
    # a row that is dropped is gone from the cube, and from the repository with the next commit
    with CubeLock(cube, "test") as lock:
        open_cube(cube).ledger(NAME).drop((0, 0, 0))
        assert (0, 0, 0) not in rows(cube)
        assert (0, 0, 0) in open_cube(plain).ledger(NAME).rows()
        store = open_store(cube)
        assert store.commit("drop", still_ours=lambda: store.read("_terrashard/lock.json") is not None) is not None
        assert lock.token
    assert (0, 0, 0) not in rows(cube)


def test_z18_one_committer_only(plan: Plan, tmp_path: Path, local_client: Any) -> None:
    cube = tmp_path / "cube"
    run(plan, cube, client=local_client, config=ICECHUNK)
    store = open_store(cube)
    # under the lock of one, no second run begins
    with CubeLock(cube, "first"), pytest.raises(Locked, match="first"):
        run(plan, cube, client=local_client)
    store.write(f"{NAME}/note/zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    # who has lost the lock commits nothing
    with pytest.raises(Locked, match="has lost its lock"):
        store.commit("late", still_ours=lambda: False)
    assert len(messages(cube)) == 2

    # another program commits between our looking and our commit
    def intrude() -> bool:
        session = repository_of(cube).writable_session("main")
        import zarr

        zarr.create_group(session.store, path="foreign")
        session.commit("foreign")
        return True

    with pytest.raises(Locked, match="another program has committed"):
        store.commit("ours", still_ours=intrude)
    assert messages(cube)[0] == "foreign"
    assert store.read(f"{NAME}/note/zarr.json") is not None, "what was staged stays"
    assert store.commit("ours, again", still_ours=lambda: True) is not None
    assert messages(cube)[0] == "ours, again"


def test_absent_and_damaged_shards_are_not_read_as_pixels(plan: Plan, tmp_path: Path, local_client: Any) -> None:
    cube = tmp_path / "cube"
    run(plan, cube, client=local_client, config=IngestConfig(store="icechunk", limit=1))
    opened = open_cube(cube)
    done = next(iter(opened.ledger(NAME).rows().values()))
    absent = next(box for index, box in opened.spec(NAME).shards().items() if index != done.index)
    opened.read(NAME, "reflectance", done.region)
    with pytest.raises(MissingShard):
        opened.read(NAME, "reflectance", absent)
    key = f"{NAME}/reflectance/c/{done.index[0]}/0/{done.index[1]}/{done.index[2]}"
    data = bytearray(open_store(cube).read(key) or b"")
    data[len(data) // 3] ^= 0xFF
    open_store(cube).write(key, bytes(data))
    with pytest.raises(CorruptShard):
        open_cube(cube).read(NAME, "reflectance", done.region)
    assert [one.state for one in verify_cube(cube).damage] == ["corrupt"]


def test_what_cannot_be_a_repository_is_refused_before_anything_is_made(
    plan: Plan, tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="is in a bucket"):
        run(plan, "s3://bucket/cube", config=ICECHUNK)
    monkeypatch.setitem(sys.modules, "icechunk", None)
    with pytest.raises(InvalidInput, match=r"pip install 'terrashard\[icechunk\]'"):
        run(plan, tmp_path / "cube", client=local_client, config=ICECHUNK)
    assert not list(tmp_path.glob("*cube*"))


def test_chunks_that_lie_in_a_file_elsewhere_are_not_read(plan: Plan, tmp_path: Path) -> None:
    cube = tmp_path / "cube.icechunk"
    run(plan, cube, config=ICECHUNK)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"s" * 4096)
    prefix = f"file://{elsewhere}/"
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(prefix, icechunk.local_filesystem_store(str(elsewhere)))
    )
    storage = icechunk.local_filesystem_storage(str(cube))
    access = getattr(icechunk.credentials, "LocalFileSystemAccess", None)  # releases before 2 take None for it
    repository = icechunk.Repository.open(storage, config=config, authorize_virtual_chunk_access={prefix: access})
    repository.save_config()
    session = repository.writable_session("main")
    session.store.set_virtual_ref(f"{NAME}/x/c/0", f"{prefix}secret", offset=0, length=4096)
    session.commit("virtual")
    told = subprocess.run(
        [sys.executable, "-c", f"from zarr_store import open_cube; open_cube({str(cube)!r}).dataset({NAME!r})"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "IntegrityError" in told.stderr.splitlines()[-1], told.stderr[-2000:]
    assert "x/c/0 of the Icechunk repository cannot be read" in told.stderr
