"""Replicas for measurements: processes that are compiled once, serve many groups, and are slowed down by the system.

Each replica is one thread on one core, as a device of a processor is. A quota of processor time (a control group)
makes it slow, as a smaller or busier machine would be; nothing in the program waits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, Self

from harness import OUT

CHUNK, SIDE, BANDS, CLASSES = 8, 48, 4, 6
WINDOWS = 480
PERIOD_US = 10_000
"""Period of a quota: short beside a chunk."""

Steps = list[dict[str, Any]]


# ---- A replica: it waits for jobs on its standard input and writes a line for each step.


def make_config(network: str, batch: int) -> Any:
    from jaxtrain.config import TrainConfig

    model = {"name": "unet", "width": 8, "depth": 2} if network == "unet" else {
        "name": "resnet", "depth": 10, "width": 16}  # fmt: skip
    return TrainConfig.model_validate(
        {
            "data": {"cube": "none", "patch": SIDE}, "model": model, "mesh": {"data": 1},
            "run": {"batch_size": batch, "steps": 1000, "shuffle": "windows", "prefetch": 1},
            "hetero": {"enabled": True, "chunk": CHUNK, "silence_s": 5.0},
        }
    )  # fmt: skip


def make_ready(network: str) -> Any:
    """Training data in memory, with what a replica asks of them."""
    import numpy as np

    from jaxtrain.data.classes import Classes
    from jaxtrain.data.order import SampleOrder
    from jaxtrain.data.windows import Windows

    rng = np.random.default_rng(0)
    image = rng.integers(300, 4000, (WINDOWS, BANDS, SIDE, SIDE)).astype(np.uint16)
    label = rng.integers(0, CLASSES, (WINDOWS, SIDE, SIDE) if network == "unet" else (WINDOWS,)).astype(np.uint8)
    observed = np.ones((WINDOWS, SIDE, SIDE), np.uint8)

    def begin(rows: Any) -> Any:
        at = rows[:, 0]
        return lambda: {"image": image[at], "label": label[at], "observed": observed[at]}

    rows = np.zeros((WINDOWS, 3), np.int32)
    rows[:, 0] = np.arange(WINDOWS)
    names = [f"class {i}" for i in range(CLASSES)]
    return SimpleNamespace(
        reader=SimpleNamespace(begin=begin, read=lambda rows: begin(rows)()), digest="benchmark", bands=("a", "b"),
        plan=SimpleNamespace(parts={"train": Windows(SIDE, rows)}), order=lambda _run: SampleOrder(0, WINDOWS),
        classes=SimpleNamespace(to_list=lambda: names), make=Classes,
    )  # fmt: skip


def make_program(config: Any, mesh: Any = None) -> Any:
    """Build the network of a configuration; on the configuration's mesh if none is given."""
    import numpy as np

    from jaxtrain.learn.state import build_program
    from jaxtrain.parallel.mesh import make_mesh

    return build_program(
        config, channels=BANDS, classes=CLASSES, mesh=mesh or make_mesh(config.mesh), mean=np.full(BANDS, 2000.0),
        std=np.full(BANDS, 900.0),
    )  # fmt: skip


def serve_replica(network: str, core: int) -> None:
    """Run the jobs that come on the standard input."""
    os.sched_setaffinity(0, {core})

    import jax
    import numpy as np

    from jaxtrain.hetero.chunks import make_chunk_programs
    from jaxtrain.hetero.replica import join_group, warm_up
    from jaxtrain.parallel.rendezvous import Group

    def say(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    first, ready = make_config(network, CHUNK), make_ready(network)
    program = make_program(first)
    programs = make_chunk_programs(program)
    warm_up(programs, first, ready)
    key = jax.random.key(0)
    fresh = program.init(key)
    say(kind="ready")
    for text in sys.stdin:
        job = json.loads(text)
        config = make_config(network, job["batch"])
        group = Group(job["address"], job["secret"], job["name"], False, job["count"])
        with join_group(group, config, ready, programs, Path(job["out"]), state_step=job["state_step"]) as member:
            state = member.received[0] if member.received else jax.tree.map(lambda leaf: leaf.copy(), fresh)
            say(kind="joined", at=time.time(), step=member.first)
            for number, _, assignment in member.steps(state, member.first, job["steps"]):
                state, metrics, work = member.train_step(state, assignment, key=jax.random.fold_in(key, number))
                say(kind="step", step=number, at=time.time(), shares=work.shares, loss=float(metrics["loss"]),
                    chunks=work.chunks, leads=member.leads, rates=work.rates, waiting=work.waiting)  # fmt: skip
            member.finish(lambda: None)
            total = float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(state.params)))
            say(kind="done", params=total, recompiles=member.recompiles())


# ---- The side that starts them.


class Quota:
    """A control group that gives a process part of the time of one core."""

    def __init__(self, name: str) -> None:
        first, second = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
        self._second = not first.is_dir()
        self._folder = (second if self._second else first) / f"terrashard-bench-{os.getpid()}-{name}"
        self._folder.mkdir()

    def give(self, cores: float | None) -> None:
        """Set the quota in cores; None for no limit."""
        quota = None if cores is None else max(1000, round(cores * PERIOD_US))
        if self._second:
            (self._folder / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD_US}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._folder / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))

    def hold(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        for _ in range(50):
            try:
                self._folder.rmdir()
                return
            except OSError:  # its process is still ending
                time.sleep(0.1)


class Process:
    """One replica's process, compiled and waiting for a job."""

    def __init__(self, network: str, number: int) -> None:
        self.lines: Queue[dict[str, Any]] = Queue()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(OUT / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }  # fmt: skip
        # the first one has a core, the others share the next: each is one thread, as a device of a processor is
        core = min(number, (os.cpu_count() or 1) - 1)
        command = [sys.executable, __file__, network, str(core)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.quota = Quota(f"{number}-{secrets.token_hex(2)}")
        self.quota.hold(self._process.pid)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put({"kind": "end"})

    def wait_for(self, kind: str, timeout_s: float = 300.0) -> Steps:
        """Return all lines up to the first of a kind."""
        lines = []
        until = time.monotonic() + timeout_s
        while True:
            line = self.lines.get(timeout=max(0.1, until - time.monotonic()))
            lines.append(line)
            if line["kind"] == kind:
                return lines
            if line["kind"] == "end":
                raise RuntimeError(f"a replica has ended before it said {kind!r}")

    def ask(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.quota.close()


class Crew:
    """Replicas that are compiled once and serve many groups.

    Args:
        network: `unet` or `resnet`.
        count: Number of replicas.
        batch: Windows of a step.
    """

    def __init__(self, network: str, count: int, batch: int) -> None:
        self.network, self.batch = network, batch
        self.processes: list[Process] = []
        try:
            self.processes += [Process(network, number) for number in range(count)]
            for process in self.processes:
                process.wait_for("ready")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    @property
    def chunks(self) -> int:
        """Chunks of a step."""
        return self.batch // CHUNK

    @contextlib.contextmanager
    def group(
        self, numbers: Sequence[int], steps: int, *, shares: Sequence[int] | None = None, batch: int | None = None
    ) -> Iterator[None]:
        """Let replicas join a group, with fixed shares or their own."""
        from jaxtrain.hetero.coordinator import Coordinator

        secret, count = secrets.token_hex(16), len(numbers)
        with (
            tempfile.TemporaryDirectory() as folder,
            Coordinator("127.0.0.1:0", secret, min_members=1, max_members=8, expected=count) as coordinator,
        ):
            if shares is not None:
                ends = [sum(shares[: i + 1]) for i in range(count)]
                line = {f"r{i}": list(range(ends[i] - shares[i], ends[i])) for i in range(count)}
                (Path(folder) / "shares.jsonl").write_text(
                    "".join(json.dumps({"step": step, "shares": line}) + "\n" for step in range(steps))
                )
            job = {"address": coordinator.address, "secret": secret, "count": count, "steps": steps, "out": folder,
                   "state_step": 0, "batch": batch or self.batch}  # fmt: skip
            for place, number in enumerate(numbers):
                self.processes[number].ask({**job, "name": f"r{place}"})
            yield

    def give(self, quotas: Sequence[float | None]) -> None:
        """Set the quotas of the first replicas."""
        for process, quota in zip(self.processes, quotas, strict=False):
            process.quota.give(quota)

    def run(
        self, numbers: Sequence[int], steps: int, *, shares: Sequence[int] | None = None, batch: int | None = None
    ) -> Steps:
        """Return the steps of a group, as its first member saw them."""
        with self.group(numbers, steps, shares=shares, batch=batch):
            seen = [self.processes[number].wait_for("done") for number in numbers]
        assert all(lines[-1]["recompiles"] == 0 for lines in seen)
        return [line for line in seen[0] if line["kind"] == "step"]

    def apart(self, steps: Sequence[int]) -> float:
        """Return the summed windows a second of replicas that compute at once, each in a group of its own.

        Nobody waits for anybody and nothing is exchanged: this is what the machine gives. Only steps count during which
        all of them were at work.
        """
        with contextlib.ExitStack() as held:
            for number, count in enumerate(steps):
                held.enter_context(self.group([number], count))
            seen = [process.wait_for("done") for process in self.processes[: len(steps)]]
        times = [[line["at"] for line in lines if line["kind"] == "step"] for lines in seen]
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        total = 0.0
        for own in times:
            spans = [b - a for a, b in itertools.pairwise(own) if a >= first and b <= last]
            total += self.batch / statistics.median(spans or [own[-1] - own[-2]])
        return total

    def calibrate(self, parts: Sequence[float], most: float) -> list[float]:
        """Return quotas with which the rates alone have the given ratio; the fastest replica gets `most` of a core."""
        quotas = [most * part / max(parts) for part in parts]
        self.give(quotas)
        batch = 4 * CHUNK
        fastest = max(range(len(parts)), key=lambda number: parts[number])
        goal = rate(self.run([fastest], 12, batch=batch), batch, 3)
        for number, part in enumerate(parts):
            for _ in range(3 if part != max(parts) else 0):
                found = rate(self.run([number], 10, batch=batch), batch, 3)
                wanted = goal * part / max(parts)
                if abs(found / wanted - 1) < 0.02:
                    break
                quotas[number] = min(most, quotas[number] * wanted / found)
                self.give(quotas)
        return quotas


def rate(steps: Sequence[Mapping[str, Any]], batch: int, skip: int, *again: Sequence[Mapping[str, Any]]) -> float:
    """Return windows a second by the median interval between the steps of one or several runs, without the first."""
    times = [[line["at"] for line in run][skip:] for run in (steps, *again)]
    return float(batch / statistics.median(b - a for own in times for a, b in itertools.pairwise(own)))


if __name__ == "__main__":
    serve_replica(sys.argv[1], int(sys.argv[2]))
