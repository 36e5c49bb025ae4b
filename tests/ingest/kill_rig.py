"""Processes of `test_kills.py`: as a Dask worker's preload it counts reads, as a script it is the client."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_LOG = "TERRASHARD_TEST_READS"
_GATE = "TERRASHARD_TEST_GATE"


def wait_at_gate(ledger: Path, seconds: float = 120.0) -> None:
    """Until fewer shards are done than the file of the gate allows, so that no plan ends before its kills; without a
    gate nothing is waited for.
    """
    if _GATE not in os.environ:
        return
    gate, until = Path(os.environ[_GATE]), time.monotonic() + seconds
    while len(list(ledger.glob("*.json"))) >= int(gate.read_text()) and time.monotonic() < until:
        time.sleep(0.01)


def dask_setup(_worker: Any) -> None:
    """In each worker: note every shard that is filled, and whether the ledger said already that it is done."""
    from distributed import Worker

    import ingest.run.task as making
    from ingest.run.shard import fill_shard
    from zarr_store.read import open_cube

    # a worker that has lost its scheduler gives its threads 30 s before it ends; nothing here needs them
    kind: Any = Worker
    close = kind.close

    def close_soon(self: Any, timeout: float = 2.0, **more: Any) -> Any:
        return close(self, timeout=min(timeout, 2.0), **more)

    kind.close = close_soon
    fill, cube = fill_shard, os.environ["TERRASHARD_TEST_CUBE"]

    def counted(task: Any, *arguments: Any, **more: Any) -> Any:
        wait_at_gate(Path(cube, "_terrashard", "ledger", task.collection))
        row = open_cube(cube).ledger(task.collection).get(task.index)
        line = json.dumps([list(task.index), row is not None and row.state == "done"]) + "\n"
        descriptor = os.open(os.environ[_LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        time.sleep(float(os.environ.get("TERRASHARD_TEST_PAUSE_S", "0.04")))  # so that something is under way
        return fill(task, *arguments, **more)

    making.fill_shard = counted  # type: ignore[attr-defined]  # it imports the name for itself


def main(plan: str, cube: str, scheduler: str) -> int:
    from ingest.plan.plan import Plan
    from ingest.request.config import IngestConfig
    from ingest.run.loop import run
    from zarr_store.errors import TerrashardError

    try:
        return run(Plan.load(plan), cube, config=IngestConfig(scheduler=scheduler)).exit_code
    except TerrashardError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
