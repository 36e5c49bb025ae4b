"""A long ingest of small shards while workers are killed and the server fails: memory, bytes, and no shard lost.

Scenes of 640² lie on a server of this machine, which answers each 20th request with 503. Two worker processes make
shards of 64²; one of them is killed with SIGKILL again and again. Scheduler, client and workers are processes of their
own, and the memory of each is noted every second. Then the same plan runs undisturbed, in threads of one process and
without Dask, and both cubes are compared, byte by byte. `--shards` and `--kill-every` say how long and how hard;
`make bench` runs a short form.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import OUT, WORKERS, Row, publish

HERE = Path(__file__).resolve()
COLLECTION = "sentinel-2-l2a"
SIDE, SHARD, CHUNK = 640, 64, 32
PER_DATE = (SIDE // SHARD) ** 2
THREADS = "threads"
"""In place of a scheduler's address: the run makes its shards in threads of its own."""
_WARM_S = 10.0
"""Seconds after which a process has imported what it needs."""


def make_files(root: Path, dates: int) -> list[Any]:
    """Scenes of red, nir and classes, with clouds."""
    import datetime as dt

    from ingest.testing import make_scene
    from zarr_store.grid import Grid

    grid = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (SIDE, SIDE))
    rng, scenes = np.random.default_rng(0), []
    (root / "catalog.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "catalog.json").write_text(json.dumps({"type": "Catalog", "id": "soak", "links": []}))
    for day in range(dates):
        blocks = rng.integers(0, 9000, (2, SIDE // 8, SIDE // 8)) + 1
        red, nir = (np.kron(b, np.ones((8, 8), int)).astype(np.uint16) for b in blocks)
        classes = np.kron(rng.choice([4, 5, 9], (SIDE // 16, SIDE // 16)), np.ones((16, 16), int)).astype(np.uint8)
        moment = dt.datetime(2020, 1, 1, 10, tzinfo=dt.UTC) + dt.timedelta(days=day)
        stamp = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        scenes.append(make_scene(root, f"day{day:04d}", grid, {"red": red, "nir": nir, "scl": classes}, datetime=stamp))
    return scenes


def make_plan(scenes: list[Any], server: str) -> Any:
    """The plan of scenes whose files the server has."""
    from ingest.plan.making import plan_scenes
    from ingest.request.config import IngestConfig
    from ingest.testing import probe_headers
    from zarr_store.spec import Layout

    probes = probe_headers(scenes)
    served = [
        replace(one, assets={
            band: replace(asset, href=f"{server}/files/{one.id}/{band}.tif") for band, asset in one.assets.items()
        })
        for one in scenes
    ]  # fmt: skip
    config = IngestConfig(collections=(COLLECTION,), bands=("red", "nir", "scl"))
    return plan_scenes(served, probes, config, layout=Layout("train", (1, CHUNK, CHUNK), (1, SHARD, SHARD)))


def run_client(plan: str, cube: str, scheduler: str) -> int:
    """A run in a process of its own: on a scheduler, or in threads without one; what ended how goes to stdout."""
    from ingest.plan.plan import Plan
    from ingest.request.config import IngestConfig
    from ingest.run.loop import run

    # a killed worker takes several small shards with it; one that dies four times of kills alone is no fault of its own
    config = IngestConfig(allow_private_hosts=True, retries=6)
    if scheduler != THREADS:
        config = IngestConfig(allow_private_hosts=True, retries=6, scheduler=scheduler)
    ended: Counter[str] = Counter()

    def note(event: Any) -> None:
        if event.kind == "shard":
            ended["-".join(map(str, event.row.index))] += 1

    report = run(Plan.load(plan), cube, config=config, on_event=note)
    print(json.dumps({"code": report.exit_code, "written": len(report.written), "failed": list(report.errors)[:3],
                      "shards": len(ended), "twice": sum(count > 1 for count in ended.values())}))  # fmt: skip
    return report.exit_code


def run_scheduler() -> int:
    """A scheduler with its workers in a process of its own; it ends when its standard input closes."""
    import dask
    from distributed import LocalCluster

    from ingest.run.cluster import CLUSTER_SETTINGS
    from ingest.worker.guard import WORKER_ENVIRONMENT

    os.environ.update(WORKER_ENVIRONMENT)
    with (
        dask.config.set({**CLUSTER_SETTINGS, "distributed.scheduler.allowed-failures": 10}),
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0,
            silence_logs=50,
        ) as cluster,
    ):  # fmt: skip
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
    return 0


def list_workers(scheduler: int) -> list[int]:
    """Ids of the worker processes that a scheduler's nannies have started."""
    import psutil

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(scheduler).children():
            with suppress(psutil.Error):
                if any("spawn_main" in word for word in child.cmdline()):
                    found.append(child.pid)
    return found


class Memory:
    """Notes the resident memory of processes every second: (seconds, shards on disk, bytes) by process and life."""

    def __init__(self, ledger: Path) -> None:
        self.notes: dict[str, list[tuple[float, int, int]]] = {}
        self._pids: dict[int, str] = {}
        self._ledger, self._done = ledger, threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def name(self, pid: int, name: str) -> None:
        self._pids[pid] = name

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def shards(self) -> int:
        with suppress(FileNotFoundError):
            return sum(entry.name.endswith(".json") for entry in os.scandir(self._ledger))
        return 0

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(1.0):
            now, shards = time.monotonic() - self._began, self.shards()
            for pid, name in list(self._pids.items()):
                with suppress(psutil.Error):
                    self.notes.setdefault(f"{name} {pid}", []).append(
                        (now, shards, psutil.Process(pid).memory_info().rss)
                    )

    def slope(self, name: str, *, after: int = 0) -> tuple[float, float]:
        """(kB that a process grows by in 1,000 shards, its largest MB), over all lives of that name.

        Only what was noted when more than `after` shards were done counts for the growth.
        """
        xs, ys, most = [], [], 0
        for life, notes in self.notes.items():
            if life.rpartition(" ")[0] != name:
                continue
            warm = [note for note in notes if note[0] - notes[0][0] > _WARM_S and note[1] > after]
            most = max([most, *(rss for _, _, rss in notes)])
            if len(warm) > 4:
                shards, rss = (np.array([note[n] for note in warm], float) for n in (1, 2))
                xs.append(shards - shards.mean())
                ys.append(rss - rss.mean())
        if not xs:
            return float("nan"), most / 1e6
        x, y = np.concatenate(xs), np.concatenate(ys)
        return float((x * y).sum() / max((x * x).sum(), 1.0)), most / 1e6

    def level(self, name: str, shards: int) -> float:
        """Median MB of a process while it was noted nearest to a number of shards, over all lives of that name."""
        notes = [note for life, some in self.notes.items() if life.rpartition(" ")[0] == name for note in some]
        near = sorted(notes, key=lambda note: abs(note[1] - shards))[:9]
        return float(np.median([note[2] for note in near])) / 1e6 if near else float("nan")


@contextmanager
def started_scheduler() -> Iterator[tuple[int, str]]:
    """Id and address of a scheduler that ends with the context."""
    command = [sys.executable, str(HERE), "--scheduler"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    to_child, from_child = process.stdin, process.stdout
    if to_child is None or from_child is None:
        raise RuntimeError("the scheduler was started without pipes")
    try:
        yield process.pid, from_child.readline().strip()
    finally:
        to_child.close()
        process.wait(60)


def killed_run(plan: Path, cube: Path, *, kill_every_s: float, seed: int = 0) -> tuple[dict[str, Any], Memory, int]:
    """A run whose workers are killed: what its client said, the memory, and how many workers were killed."""
    memory, kills, rng = Memory(cube / "_terrashard" / "ledger" / COLLECTION), 0, random.Random(seed)
    with started_scheduler() as (scheduler, address):
        command = [sys.executable, str(HERE), "--client", str(plan), str(cube), address]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        memory.name(client.pid, "client")
        memory.name(scheduler, "scheduler")
        memory.start()
        born: dict[int, float] = {}
        killed_at = time.monotonic()
        while client.poll() is None:
            time.sleep(0.5)
            now = time.monotonic()
            alive = list_workers(scheduler)
            for pid in alive:
                memory.name(pid, "worker")
                born.setdefault(pid, now)
            # one that works: on a busy machine it takes seconds until a new one does
            working = [pid for pid in alive if now - born[pid] >= _WARM_S]
            if now - killed_at >= kill_every_s and working and memory.shards():
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(working), signal.SIGKILL)
                    kills += 1
                killed_at = now
        memory.stop()
    return said_by(client), memory, kills


def said_by(client: subprocess.Popen[str]) -> dict[str, Any]:
    said = client.communicate()[0]
    if not said.strip():
        raise SystemExit(f"the client ended with {client.returncode} and said nothing")
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told


def tree(cube: Path) -> dict[str, str]:
    return {
        path.relative_to(cube).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cube.rglob("*"))
        if path.is_file()
    }


def soak(shards: int, kill_every_s: float) -> list[Row]:
    from ingest.simulate.server import serve

    root = OUT / "soak"
    shutil.rmtree(root, ignore_errors=True)
    scenes = make_files(root / "files", max(1, round(shards / PER_DATE)))
    with serve(root / "files", faults={"*": "503every:20"}) as server:
        plan = make_plan(scenes, server.url)
        plan.save(root / "plan.json")
        print(f"{len(plan.tasks)} shards, a worker is killed every {kill_every_s:g} s", flush=True)
        began = time.monotonic()
        told, memory, kills = killed_run(root / "plan.json", root / "killed.zarr", kill_every_s=kill_every_s)
        seconds = time.monotonic() - began
        faults, requests = sum(server.faults.values()), sum(server.requests.values())
        port = server.port
    print(f"  {told}, {kills} kills, {faults} faults in {requests} requests, {seconds:.0f} s", flush=True)
    with serve(root / "files", port=port):
        began = time.monotonic()
        command = [sys.executable, str(HERE), "--client", str(root / "plan.json"), str(root / "calm.zarr"), THREADS]
        calm = said_by(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        calm_s = time.monotonic() - began
    print(f"  undisturbed: {calm}, {calm_s:.0f} s", flush=True)
    killed, undisturbed = tree(root / "killed.zarr"), tree(root / "calm.zarr")
    different = sum(killed.get(name) != digest for name, digest in undisturbed.items()) + len(
        set(killed) - set(undisturbed)
    )
    count = len(plan.tasks)
    rows = [
        Row("shards", count, note=f"{seconds:.0f} s with kills and faults, {calm_s:.0f} s undisturbed, in threads"),
        Row("workers killed", kills, 2),
        Row("share of requests answered with 503", faults / max(1, requests), 0.04),
        Row("files", len(undisturbed)),
        Row("files that differ from those of the undisturbed run", different, 0, at_most=True),
        Row("shards that did not end as done", count - told["written"], 0, at_most=True),
        Row("shards that ended twice", told["twice"], 0, at_most=True),
    ]  # fmt: skip
    for name in ("scheduler", "client", "worker"):
        grown, most = memory.slope(name)
        limit = 5.0 if name != "worker" else None
        levels = ", ".join(f"{memory.level(name, count * tenth // 10):.0f}" for tenth in (1, 3, 5, 7, 9))
        rows.append(
            Row(f"growth of the {name}, MB in 1,000 shards", grown / 1000.0, limit, at_most=True,
                note=f"at most {most:.0f} MB; {levels} MB after 1, 3, 5, 7 and 9 tenths")
        )  # fmt: skip
        later = memory.slope(name, after=count // 2)[0] / 1000.0
        rows.append(Row(f"growth of the {name} in the second half, MB in 1,000 shards", later, limit, at_most=True))
    shutil.rmtree(root)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--client"]:
        return run_client(*sys.argv[2:5])
    if sys.argv[1:2] == ["--scheduler"]:
        return run_scheduler()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="10,000 shards, a kill every minute")
    parser.add_argument("--shards", type=int, help="number of shards; a multiple of 100")
    parser.add_argument("--kill-every", type=float, help="seconds between two kills")
    asked = parser.parse_args()
    shards = asked.shards or (10_000 if asked.full else 1_000)
    rows = soak(shards, asked.kill_every or (60.0 if asked.full else 10.0))
    return 0 if publish("soak", rows, full=shards >= 10_000) else 1


if __name__ == "__main__":
    sys.exit(main())
