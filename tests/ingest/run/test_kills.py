"""SIGKILL of worker, nanny, scheduler and client at random: the same bytes in the end, and nothing read twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ingest.run.loop import run

from ..growing import NAME, plan_of, scene, tree

RIG = Path(__file__).parents[1] / "kill_rig.py"
THREADS = 2
"""Of the one worker."""
IN_HAND = THREADS + 1
"""Shards that can be half made when something dies."""


class Rig:
    """A scheduler, a nanny with its worker, and the client that runs the plan; whatever dies is started again."""

    def __init__(self, folder: Path, plan: Path, cube: Path, repository: Path) -> None:
        self.folder, self.plan, self.cube = folder, plan, cube
        self.reads, self.gate = folder / "reads.jsonl", folder / "gate"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(repository),
            "TERRASHARD_TEST_READS": str(self.reads),
            "TERRASHARD_TEST_CUBE": str(cube),
            "TERRASHARD_TEST_GATE": str(self.gate),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.codes: list[int] = []
        self.started = 0

    def allow(self, rows: int) -> None:
        """Begin no shard once so many are done."""
        made = self.gate.with_suffix(".new")
        made.write_text(str(rows))
        made.replace(self.gate)

    def start(self, kind: str, *arguments: str) -> None:
        with (self.folder / f"{kind}.log").open("ab") as log:
            self.processes[kind] = subprocess.Popen(
                [sys.executable, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )

    def alive(self, kind: str) -> bool:
        process = self.processes.get(kind)
        return process is not None and process.poll() is None

    def tend(self) -> bool:
        """Start what is not there; True once the client has finished the plan."""
        if not self.alive("scheduler"):
            self.end("nanny")
            self.started += 1
            file = self.folder / f"scheduler-{self.started}.json"
            self.start("scheduler", "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
                       "--no-dashboard", "--no-show", "--scheduler-file", str(file))  # fmt: skip
            wait_for(lambda: file.exists() and file.read_bytes().endswith(b"}"), "the scheduler")
            self.address = json.loads(file.read_text())["address"]
        if not self.alive("nanny"):
            self.start("nanny", "-m", "distributed.cli.dask_worker", self.address, "--nthreads", str(THREADS),
                       "--nworkers", "1", "--no-dashboard", "--host", "127.0.0.1", "--memory-limit", "0",
                       "--death-timeout", "20", "--preload", str(RIG))  # fmt: skip
        if not self.alive("client"):
            if "client" in self.processes:
                self.codes.append(self.processes["client"].returncode)
                if self.codes[-1] == 0:
                    return True
            self.start("client", str(RIG), str(self.plan), str(self.cube), self.address)
        return False

    def pid(self, kind: str) -> int | None:
        if kind != "worker":
            return self.processes[kind].pid if self.alive(kind) else None
        children = psutil.Process(self.processes["nanny"].pid).children(recursive=True) if self.alive("nanny") else []
        return next((child.pid for child in children if "spawn_main" in " ".join(child.cmdline())), None)

    def kill(self, kind: str) -> bool:
        pid = self.pid(kind)
        if pid is None:
            return False
        process = psutil.Process(pid)
        process.send_signal(signal.SIGKILL)
        if kind in self.processes:
            self.processes[kind].wait(20)
        gone, _ = psutil.wait_procs([process], timeout=20)
        return bool(gone)

    def end(self, kind: str) -> None:
        if kind in self.processes:
            for child in psutil.Process(self.processes[kind].pid).children(recursive=True) if self.alive(kind) else []:
                child.kill()
            self.processes[kind].kill()
            self.processes[kind].wait(20)

    def rows(self) -> int:
        return len(list((self.cube / "_terrashard" / "ledger" / NAME).glob("*.json")))


def wait_for(condition: Any, what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not come"
        time.sleep(0.02)


@contextmanager
def a_rig(folder: Path, plan: Path, cube: Path, repository: Path) -> Iterator[Rig]:
    rig = Rig(folder, plan, cube, repository)
    try:
        yield rig
    finally:
        for kind in ("client", "nanny", "scheduler"):
            rig.end(kind)


def kill_and_compare(tmp_path: Path, client: Any, repository: Path, victims: Sequence[str], seed: int) -> Counter[str]:
    """Who was killed, once the cube is the one of a run that nothing befell."""
    rng = random.Random(seed)
    plan = plan_of([scene(tmp_path / "s", day) for day in range(1, len(victims) + 5)])
    assert len(plan.tasks) >= 4 * len(victims), "there are shards left after every kill"
    plan.save(tmp_path / "plan.json")
    cube, whole = tmp_path / "cube.zarr", tmp_path / "whole.zarr"
    order = list(victims)
    rng.shuffle(order)
    killed: Counter[str] = Counter()
    until = time.monotonic() + 60 + 45 * len(victims)  # each kill starts processes anew, seconds of work each
    with a_rig(tmp_path, tmp_path / "plan.json", cube, repository) as rig:
        aim = 1
        rig.allow(aim + 1)  # however slow this process is, the plan does not end before the last kill
        finished = rig.tend()
        while not finished:
            assert time.monotonic() < until, f"not finished with {killed} (seed {seed})"
            if order and rig.rows() >= aim:
                time.sleep(rng.uniform(0, 0.06))
                if rig.kill(order[-1]):
                    killed[order.pop()] += 1
                    aim = rig.rows() + rng.randint(1, 2)
                    rig.allow(aim + 1 if order else len(plan.tasks))
            time.sleep(0.02)
            finished = rig.tend()
        reads = [json.loads(line) for line in rig.reads.read_text().splitlines()]
        codes = rig.codes
    assert killed == Counter(victims), f"every kill hit a living process (seed {seed})"
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) == killed["client"]
    if killed["scheduler"]:
        assert 8 in codes, f"the client says that the scheduler is gone: {codes}"
    again = sum(done for _, done in reads)
    assert again <= 0.05 * len(plan.tasks), f"{again} shards that were done were read again (seed {seed})"
    assert len(reads) <= len(plan.tasks) + IN_HAND * len(victims), f"{len(reads)} reads (seed {seed})"
    run(plan, whole, client=client)
    assert tree(cube) == tree(whole)
    # a finished plan reads no pixel
    assert run(plan, cube, client=client).pixels_read == 0
    return killed


def test_three_kills(tmp_path: Path, local_client: Any, repository: Path) -> None:
    killed = kill_and_compare(tmp_path, local_client, repository, ("worker", "nanny", "scheduler"), seed=3)
    assert killed.total() == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not os.environ.get("TERRASHARD_LONG"), reason="minutes of killing; set TERRASHARD_LONG=1")
def test_twenty_kills(tmp_path: Path, local_client: Any, repository: Path) -> None:
    victims = ("worker",) * 8 + ("nanny",) * 4 + ("client",) * 6 + ("scheduler",) * 2
    assert kill_and_compare(tmp_path, local_client, repository, victims, seed=20).total() == 20
