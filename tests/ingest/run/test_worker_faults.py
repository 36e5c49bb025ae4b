"""Workers that cannot spill, are cut off, fall silent, or are all gone: no run waits for ever, same bytes."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from ingest.run import liveness as attendance
from ingest.run.loop import IngestEvent, run
from zarr_store.errors import AccessError

from ..clusters import worker_here
from ..growing import plan_of, scene, tree

RIG = Path(__file__).parents[1] / "kill_rig.py"


class Wire:
    """Forwards one port of 127.0.0.1 to another, until it is cut or falls silent."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.ends: list[socket.socket] = []
        self.silent = threading.Event()
        self.carried = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(self.target)
                self.ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.silent.is_set():
                    continue  # swallowed: both ends believe that the other is there
                self.carried += len(data)
                sink.sendall(data)

    def cut(self) -> int:
        """Close everything; the number of connections that were open."""
        self.server.close()
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(self.ends) // 2


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not come"
        time.sleep(0.02)


@contextmanager
def a_far_worker(wire: Wire, client: Any, folder: Path, cube: Path, repository: Path) -> Iterator[Any]:
    """A worker that reaches the scheduler through the wire, and takes seconds for each shard."""
    environment = {
        **os.environ, "PYTHONPATH": str(repository), "TERRASHARD_TEST_READS": str(folder / "reads.jsonl"),
        "TERRASHARD_TEST_CUBE": str(cube), "TERRASHARD_TEST_PAUSE_S": "3",
    }  # fmt: skip
    log = (folder / "worker.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{wire.port}", "--nthreads", "1",
         "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--memory-limit", "0", "--death-timeout", "60",
         "--preload", str(RIG)],
        env=environment, stdout=log, stderr=log, cwd=folder,
    )  # fmt: skip
    try:
        wait_for(lambda: len(client.scheduler_info()["workers"]) == 2, "the far worker")
        yield process
    finally:
        process.kill()
        process.wait(30)
        log.close()
        wait_for(lambda: len(client.scheduler_info()["workers"]) == 1, "the end of the far worker")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silent"])
def test_d07_d12_a_worker_that_is_cut_off_or_falls_silent_loses_its_shards_to_others(
    tmp_path: Path, local_client: Any, repository: Path, how: str
) -> None:
    plan = plan_of([scene(tmp_path / "s", day) for day in (1, 2, 3)])
    cube = tmp_path / "cube.zarr"
    wire = Wire("127.0.0.1", int(local_client.scheduler.address.rpartition(":")[2]))
    reads, happened = tmp_path / "reads.jsonl", []

    def interfere() -> None:
        wait_for(lambda: reads.exists() and reads.read_text(), "a shard at the far worker")
        if how == "cut":
            happened.append(wire.cut())
            return
        wire.silent.set()
        happened.append(len(wire.ends) // 2)

        async def judge(dask_scheduler: Any) -> None:
            # as Dask does by itself when nothing was heard for five minutes
            usual, dask_scheduler.worker_ttl = dask_scheduler.worker_ttl, 0.5
            try:
                for worker in dask_scheduler.workers.values():
                    worker.last_seen = time.time() + (-60 if worker.nthreads == 1 else 60)
                await dask_scheduler.check_worker_ttl()
            finally:
                dask_scheduler.worker_ttl = usual

        local_client.run_on_scheduler(judge)

    with a_far_worker(wire, local_client, tmp_path, cube, repository) as process:
        troublemaker = threading.Thread(target=interfere, daemon=True)
        troublemaker.start()
        report = run(plan, cube, client=local_client)
        troublemaker.join(30)
        assert happened, "the wire was cut"
        assert happened[0] >= 1
        assert wire.carried > 0
        assert (report.exit_code, len(report.written)) == (0, len(plan.tasks))
        if how == "cut":
            assert process.wait(60) is not None, "a worker that has lost its scheduler ends"
        wire.cut()
    run(plan, tmp_path / "whole.zarr", client=local_client)
    assert tree(cube) == tree(tmp_path / "whole.zarr")


def test_a_run_whose_workers_are_all_gone_ends_and_goes_on_later(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "OWN_PATIENCE_S", 1.0)
    monkeypatch.setattr(attendance, "_LOOK_S", 0.1)
    plan = plan_of([scene(tmp_path / "s", day) for day in range(1, 7)])
    cube = tmp_path / "cube.zarr"
    with worker_here(1, set_as_default=False) as client:

        async def remove(dask_scheduler: Any) -> None:
            for address in list(dask_scheduler.workers):
                await dask_scheduler.remove_worker(address, stimulus_id="test", close=True)

        def send_home(event: IngestEvent) -> None:
            if event.kind == "shard" and event.done == 1:
                client.run_on_scheduler(remove)

        with pytest.raises(AccessError, match=r"all workers ended, and none came back within 1 s.*continues") as ended:
            run(plan, cube, client=client, on_event=send_home)
    assert ended.value.exit_code == 8
    report = run(plan, cube, client=local_client)
    assert report.skipped
    assert report.written
    assert len(report.skipped) + len(report.written) == len(plan.tasks)


def test_d06_a_full_spill_folder_does_not_hold_up_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards are never results, so there is nothing to spill, whatever else fills the worker's memory and folder."""
    disk = tmp_path / "spill"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system needs privileges")
    plan = plan_of([scene(tmp_path / "s", 1)])
    try:
        with (
            dask.config.set({"distributed.worker.memory.pause": False, "distributed.worker.memory.terminate": False}),
            LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1",
                         dashboard_address="127.0.0.1:0", memory_limit="20MB", local_directory=str(disk)) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):  # fmt: skip
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
            with caplog.at_level(logging.ERROR, "distributed.spill"):
                held = client.scatter([np.random.default_rng(n).bytes(8 << 20) for n in range(3)])
                assert run(plan, tmp_path / "cube.zarr", client=client).exit_code == 0
            assert os.statvfs(disk).f_bavail == 0
            assert "Spill to disk failed" in caplog.text
            assert [len(future.result()) for future in held] == [8 << 20] * 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
