"""A second signal while a run shuts down (FAULTS C09): it ends at once, and the cube goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ingest.run.loop import run
from zarr_store.read import open_cube

from ..growing import NAME, plan_of, scene, tree

SCRIPT = """
import sys, time
import ingest.run.cluster as clusters
from cli.main import main

class SlowToClose(clusters.LocalCluster):
    # as long as one with a worker that does not answer

    def __exit__(self, *error):
        sys.stderr.write("closing\\n")
        sys.stderr.flush()
        time.sleep(60)
        return super().__exit__(*error)

if __name__ == "__main__":
    clusters.LocalCluster = SlowToClose
    sys.exit(main(["ingest", sys.argv[1], sys.argv[2], "--workers", "1", "--allow-local", sys.argv[3]]))
"""


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once_and_nothing_is_lost(
    tmp_path: Path, local_client: Any, repository: Path
) -> None:
    """Told to stop by a batch system, and then by somebody at the keyboard who will not wait."""
    plan = plan_of([scene(tmp_path / "s", day) for day in range(1, 13)])
    plan.save(tmp_path / "plan.json")
    cube, script, said = tmp_path / "cube.zarr", tmp_path / "script.py", tmp_path / "said"
    script.write_text(SCRIPT)
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "plan.json"), str(cube), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(repository)}, stdout=log, stderr=log,
        )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        ledger = cube / "_terrashard" / "ledger" / NAME
        until = time.monotonic() + 120
        while not ledger.is_dir() or len(list(ledger.glob("*.json"))) < 3:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < until, "no shard was written"
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        while b"closing" not in said.read_bytes():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < until, "the run does not shut down"
            time.sleep(0.02)
        assert process.poll() is None, "it is still shutting down when the second signal comes"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, said.read_text()
        assert b"stopped at once" in said.read_bytes()
        assert (cube / "_terrashard" / "lock.json").exists(), "there was no time to give the lock back"
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, "workers end with their run, however it ends"
    finally:
        every: list[subprocess.Popen[bytes] | psutil.Process] = [process, *children]
        for one in every:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
    rows = open_cube(cube).ledger(NAME).rows()
    assert len(rows) >= 3
    report = run(plan, cube, client=local_client)
    assert report.exit_code == 0
    assert len(report.skipped) == sum(row.state == "done" for row in rows.values())
    run(plan, tmp_path / "whole.zarr", client=local_client)
    assert tree(cube) == tree(tmp_path / "whole.zarr")
