"""The short form of `benchmarks/soak.py`: a worker is killed, the server fails; nothing is lost, doubled or kept."""

from __future__ import annotations

import importlib
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ingest.request.config import IngestConfig
from ingest.run.cluster import count_in_flight, open_cluster
from ingest.run.loop import IngestEvent, run
from ingest.simulate.server import serve
from zarr_store.read import open_cube

KILLED_AT = (20, 55)
"""Shards after which the only worker is killed."""


def test_kills_and_faults_lose_nothing_double_nothing_and_leave_nothing_behind(
    tmp_path: Path, repository: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    soak = importlib.import_module("soak")
    scenes = soak.make_files(tmp_path / "files", 1)
    config = IngestConfig(workers=1, threads_per_worker=1, allow_private_hosts=True, retries=6)
    ended: Counter[tuple[int, ...]] = Counter()
    held: list[int] = []
    killed: list[int] = []
    remembered: list[int] = []
    with serve(tmp_path / "files", faults={"*": "503every:20"}) as server:
        plan = soak.make_plan(scenes, server.url)
        calm = run(plan, tmp_path / "calm.zarr", client=local_client, config=config)
        with open_cluster(config) as client:
            cluster: Any = client.cluster

            def watch(event: IngestEvent) -> None:
                if event.kind != "shard" or event.row is None:
                    return
                ended[event.row.index] += 1
                held.append(len(cluster.scheduler.tasks))
                connections = [*cluster.scheduler.stream_comms.values(), *cluster.scheduler.client_comms.values()]
                remembered.extend(len(one.recent_message_log) for one in (*connections, client.scheduler_comm))
                if event.done in KILLED_AT:
                    (worker,) = cluster.workers.values()
                    os.kill(worker.process.pid, signal.SIGKILL)
                    killed.append(worker.process.pid)

            report = run(plan, tmp_path / "killed.zarr", client=client, config=config, on_event=watch)
            own = client.run(lambda dask_worker: dask_worker.batched_stream.recent_message_log.maxlen)
            most, left = count_in_flight(client, config), len(cluster.scheduler.tasks)
        faults = server.faults["503every"]
    assert len(set(killed)) == len(KILLED_AT)
    assert faults >= 0.04 * 2 * 3 * len(plan.tasks) / 2
    assert (calm.exit_code, report.exit_code, report.errors) == (0, 0, ())
    assert ended == dict.fromkeys((task.index for task in plan.tasks), 1)
    assert len(report.written) == len(plan.tasks) == 100
    assert not any(row.stats for row in report.written), "statistics of chunks stay in the ledger"
    assert max(held) <= most + 1, "the scheduler knows the shards in flight, and none of those that ended or wait"
    assert left <= 1
    assert 1 < max(remembered) <= 20, "Dask keeps the tasks that it has sent, a thousand of them unless it is told"
    assert set(own.values()) == {20}
    assert soak.tree(tmp_path / "killed.zarr") == soak.tree(tmp_path / "calm.zarr")
    assert open_cube(tmp_path / "killed.zarr").states(soak.COLLECTION).count()["done"] == 100
