"""Shards of one worker overlap while they wait, and compute one after the other."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import ingest.run.task as making
from ingest.plan.making import plan_scenes
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.testing import make_scene, probe_headers
from ingest.worker import slots
from ingest.worker.slots import computing, run_in_slot
from zarr_store.grid import Grid
from zarr_store.spec import Layout
from zarr_store.write import PackedShard, ShardWriter

from ..clusters import worker_here

pytestmark = pytest.mark.slow

_inside: dict[str, list[int]] = {"seated": [], "reading": [], "computing": []}
_lock = threading.Lock()
_threads: set[str] = set()
"""Those that made shards."""


@contextmanager
def counted(where: str, number: int, most: dict[str, int]) -> Iterator[None]:
    """Be at a place, and note how many are there at once."""
    with _lock:
        _inside[where].append(number)
    yield
    with _lock:
        most[where] = max(most.get(where, 0), len(_inside[where]))
        _inside[where].remove(number)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """One worker of one thread, inside this process."""
    monkeypatch.setattr(slots, "_slots", None)
    with worker_here(1) as client:
        yield client


def work(number: int, remote: bool) -> dict[str, int]:
    """Read, compute and write; returns the most that did each at once."""
    most: dict[str, int] = {}

    def make(give_way: Callable[[], None]) -> str:
        with counted("seated", number, most):
            with counted("reading", number, most):
                time.sleep(0.3)
                with computing(), counted("computing", number, most):
                    time.sleep(0.1)
            give_way()
            time.sleep(0.3)
        return threading.current_thread().name

    name = run_in_slot(make, remote=remote)
    with _lock:
        _threads.add(name)
    return most


@pytest.mark.parametrize(("remote", "reading"), [(True, 2), (False, 1)])
def test_one_waits_while_another_computes(remote: bool, reading: int, client: Client) -> None:
    _threads.clear()
    came = client.gather(client.map(work, range(4), remote=remote, pure=False))
    most = {where: max(one[where] for one in came) for where in _inside}
    assert most["seated"] == 2, "shards in hand at once, for one thread"
    assert most["reading"] == reading, "only what waits for a network is read ahead of its turn"
    assert most["computing"] == 1, "more computed than there are threads"
    assert len(_threads) == 2, "threads stay: in a new one PROJ begins anew"


def test_outside_a_worker_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_slots", None)
    together = threading.Barrier(3)

    def wait(give_way: Callable[[], None]) -> None:
        give_way()
        with computing():
            together.wait(timeout=10)

    def enter() -> None:
        run_in_slot(wait, remote=True)

    threads = [threading.Thread(target=enter, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    together.wait(timeout=10)  # raises if one of them waits for the other
    assert slots._slots is None, "there is nobody to take turns with"


@pytest.mark.parametrize("late", [False, True], ids=["before it gives way", "after it gave way"])
def test_what_goes_wrong_in_a_seat_is_told(late: bool, client: Client) -> None:
    def fail(give_way: Callable[[], None]) -> None:
        if late:
            give_way()
            time.sleep(0.2)
        raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        client.submit(run_in_slot, fail, remote=False).result(timeout=20)


def test_a_shard_is_packed_and_let_go_before_the_next_begins_which_does_not_wait_for_the_disk(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (64, 64))
    band = np.random.default_rng(1).integers(1, 9000, grid.shape).astype(np.uint16)
    bands: dict[str, np.ndarray] = {"red": band, "scl": np.full(grid.shape, 4, np.uint8)}
    scenes = [make_scene(tmp_path / "scenes", "S", grid, bands, datetime="2023-08-10T10:00:00Z")]
    layout = Layout("t", (1, 16, 16), (1, 32, 32))
    plan = plan_scenes(scenes, probe_headers(scenes), IngestConfig(bands=("red", "scl")), layout=layout)
    fill, pack, finish = fill_shard, ShardWriter.pack, PackedShard.finish
    busy, changed = threading.Lock(), threading.Condition()
    make, handed, early = making._make_shard, 0, []
    begun, pixels, told = 0, {}, []

    @contextmanager
    def alone() -> Iterator[None]:
        assert busy.acquire(blocking=False), "two shards are being filled or packed"
        yield
        busy.release()

    def made(*args: Any) -> Any:
        nonlocal handed
        with changed:
            handed += 1
            changed.notify_all()
        return make(*args)

    def filled(*args: Any, **more: Any) -> Any:
        nonlocal begun
        with changed:
            begun += 1
            changed.notify_all()
        with alone():
            return fill(*args, **more)

    def packed(self: Any, region: Any, arrays: Any, **more: Any) -> Any:
        with alone(), changed:
            early.append(changed.wait_for(lambda: handed > begun or begun == len(plan.tasks), timeout=60))
            result = pack(self, region, arrays, **more)
        pixels[result.row.index] = weakref.ref(arrays["reflectance"]), begun
        return result

    def finished(self: Any) -> Any:
        held, before = pixels[self.row.index]
        with changed:
            overlaps = changed.wait_for(lambda: begun > before or begun == len(plan.tasks), timeout=10)
        told.append((held() is None, overlaps))
        return finish(self)

    monkeypatch.setattr(making, "_make_shard", made)
    monkeypatch.setattr(making, "fill_shard", filled)
    monkeypatch.setattr(ShardWriter, "pack", packed)
    monkeypatch.setattr(PackedShard, "finish", finished)
    report = run(plan, tmp_path / "cube.zarr", client=client)
    assert len(told) == len(report.written) == len(plan.tasks) > 2
    assert all(gone for gone, _ in told), "pixels are held while the disk is waited for"
    assert all(overlaps for _, overlaps in told), "the next shard waited for the disk"
    assert all(early), "the next shard was handed over only after this one was packed"
