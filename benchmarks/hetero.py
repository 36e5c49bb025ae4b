"""Unequal replicas: their rate beside the sum of the rates alone, shares that follow a change of speed, and kills.

Each replica is a process of its own. The system slows it down by a quota of processor time (a control group), as a
smaller or busier machine would be slow; nothing in the program waits. It needs the right to make control groups, which
root has. Replicas are compiled at full speed; quotas begin after that.

    python benchmarks/hetero.py --part unet          # 1:1, 2:1, 3:1, 5:1, 4:2:1:1
    python benchmarks/hetero.py --part resnet
    python benchmarks/hetero.py --part change        # one of two replicas slows down to a third, and recovers
    python benchmarks/hetero.py --part kills         # one of three is killed, twenty times
    python benchmarks/hetero.py --part ordinary      # 1:1 beside ordinary data parallelism
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
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

from harness import OUT, Row, publish

PARTS = ("unet", "resnet", "change", "kills", "ordinary")
RATIOS: tuple[tuple[float, ...], ...] = ((1, 1), (2, 1), (3, 1), (5, 1), (4, 2, 1, 1))
BATCH, CHUNK, SIDE, BANDS, CLASSES = 192, 8, 48, 4, 6
PERIOD_US = 10_000
"""Period of a quota: short beside a chunk."""
HEADROOM = 0.9
"""Part of the cores that all quotas together use: the system and the coordinator need some time too."""


# ---- A replica: it waits for jobs on its standard input and writes a line for each step.


def make_config(network: str) -> Any:
    from jaxtrain.config import TrainConfig

    model = {"name": "unet", "width": 8, "depth": 2} if network == "unet" else {
        "name": "resnet", "depth": 10, "width": 16}  # fmt: skip
    return TrainConfig.model_validate(
        {
            "data": {"cube": "none", "patch": SIDE}, "model": model, "mesh": {"data": 1},
            "run": {"batch_size": BATCH, "steps": 1000, "shuffle": "windows", "prefetch": 1},
            "hetero": {"enabled": True, "chunk": CHUNK, "silence_s": 5.0},
        }
    )  # fmt: skip


def make_ready(network: str) -> Any:
    """Training data in memory, with what a replica asks of them."""
    import numpy as np

    from jaxtrain.data.classes import Classes
    from jaxtrain.data.order import SampleOrder
    from jaxtrain.data.windows import Windows

    rng, count = np.random.default_rng(0), 240
    image = rng.integers(300, 4000, (count, BANDS, SIDE, SIDE)).astype(np.uint16)
    label = rng.integers(0, CLASSES, (count, SIDE, SIDE) if network == "unet" else (count,)).astype(np.uint8)
    observed = np.ones((count, SIDE, SIDE), np.uint8)

    def begin(rows: Any) -> Any:
        at = rows[:, 0]
        return lambda: {"image": image[at], "label": label[at], "observed": observed[at]}

    rows = np.zeros((count, 3), np.int32)
    rows[:, 0] = np.arange(count)
    names = [f"class {i}" for i in range(CLASSES)]
    return SimpleNamespace(
        reader=SimpleNamespace(begin=begin, read=lambda rows: begin(rows)()), digest="benchmark", bands=("a", "b"),
        plan=SimpleNamespace(parts={"train": Windows(SIDE, rows)}), order=lambda _run: SampleOrder(0, count),
        classes=SimpleNamespace(to_list=lambda: names), make=Classes,
    )  # fmt: skip


def make_program(network: str, config: Any) -> Any:
    import numpy as np

    from jaxtrain.learn.state import build_program
    from jaxtrain.parallel.mesh import make_mesh

    return build_program(
        config, channels=BANDS, classes=CLASSES, mesh=make_mesh(config.mesh), mean=np.full(BANDS, 2000.0),
        std=np.full(BANDS, 900.0),
    )  # fmt: skip


def replica(network: str, core: int) -> None:
    os.sched_setaffinity(0, {core})

    import jax
    import numpy as np

    from jaxtrain.hetero.chunks import make_chunk_programs
    from jaxtrain.hetero.replica import join_group, warm_up
    from jaxtrain.parallel.rendezvous import Group

    def say(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    config, ready = make_config(network), make_ready(network)
    program = make_program(network, config)
    programs = make_chunk_programs(program)
    warm_up(programs, config, ready)
    key = jax.random.key(0)
    fresh = program.init(key)
    say(kind="ready")
    for text in sys.stdin:
        job = json.loads(text)
        group = Group(job["address"], job["secret"], job["name"], False, job["count"])
        with join_group(group, config, ready, programs, Path(job["out"]), state_step=job["state_step"]) as member:
            state = member.received[0] if member.received else jax.tree.map(lambda leaf: leaf.copy(), fresh)
            say(kind="joined", at=time.time(), step=member.first)
            for number, _, assignment in member.steps(state, member.first, job["steps"]):
                state, metrics, work = member.train_step(state, assignment, key=jax.random.fold_in(key, number))
                say(kind="step", step=number, at=time.time(), shares=work.shares, loss=float(metrics["loss"]),
                    chunks=work.chunks, leads=member.leads)  # fmt: skip
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
        command = [sys.executable, __file__, "--replica", network, "--number", str(core)]
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

    def wait_for(self, kind: str, timeout_s: float = 300.0) -> list[dict[str, Any]]:
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
    """Replicas that are compiled once and serve many groups."""

    def __init__(self, network: str, count: int) -> None:
        self.network = network
        self.processes = [Process(network, number) for number in range(count)]
        for process in self.processes:
            process.wait_for("ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    @contextlib.contextmanager
    def group(self, count: int, steps: int, *, shares: Sequence[int] | None = None) -> Iterator[Any]:
        """Let the first `count` replicas join a group, with fixed shares or their own."""
        from jaxtrain.hetero.coordinator import Coordinator

        secret = secrets.token_hex(16)
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
                   "state_step": 0}  # fmt: skip
            for number, process in enumerate(self.processes[:count]):
                process.ask({**job, "name": f"r{number}"})
            yield job

    def run(self, quotas: Sequence[float | None], steps: int, *, shares: Sequence[int] | None = None) -> list[Any]:
        """Return the steps of a group, as its first member saw them."""
        for process, quota in zip(self.processes, quotas, strict=False):
            process.quota.give(quota)
        with self.group(len(quotas), steps, shares=shares):
            seen = [process.wait_for("done") for process in self.processes[: len(quotas)]]
        assert all(lines[-1]["recompiles"] == 0 for lines in seen)
        return [line for line in seen[0] if line["kind"] == "step"]

    def alone(self, number: int, quota: float, steps: int) -> float:
        """Return the windows a second of one replica alone, in a group of one."""
        order = self.processes
        self.processes = [order[number], *(p for p in order if p is not order[number])]
        try:
            return rate(self.run([quota], steps), 2)
        finally:
            self.processes = order

    def apart(self, quotas: Sequence[float], steps: int) -> float:
        """Return the summed windows a second of replicas that compute at once, each in a group of its own.

        Nobody waits for anybody here. What is lost beside the rates alone is lost to the machine, whose cores are
        slower when all of them are busy.
        """
        order = self.processes
        with contextlib.ExitStack() as held:
            for number, quota in enumerate(quotas):
                order[number].quota.give(quota)
                self.processes = [order[number]]
                held.enter_context(self.group(1, max(4, round(steps * quota / max(quotas)))))
            self.processes = order
            seen = [process.wait_for("done") for process in order[: len(quotas)]]
        return sum(rate([line for line in lines if line["kind"] == "step"], 2) for lines in seen)


def rate(steps: Sequence[Mapping[str, Any]], skip: int) -> float:
    """Return windows a second from the median interval between steps, without the first ones."""
    times = [line["at"] for line in steps][skip:]
    return float(BATCH * (len(times) - 1) / (times[-1] - times[0]))


def efficiency(network: str, *, full: bool) -> list[Row]:
    chunks, rows = BATCH // CHUNK, []
    steps, warm = (60, 25) if full else (24, 12)
    with Crew(network, 4) as crew:
        for ratio in RATIOS:
            unit = HEADROOM * min((os.cpu_count() or 2) / sum(ratio), 1 / max(ratio))
            quotas = [unit * part for part in ratio]
            alone = [crew.alone(number, quota, 4) for number, quota in enumerate(quotas)]
            mine = crew.run(quotas, steps)
            equal = crew.run(quotas, 5, shares=[chunks // len(ratio)] * len(ratio))
            apart = crew.apart(quotas, 8) if len(set(ratio)) == 1 else None
            together, same = rate(mine, warm), rate(equal, 2)
            name = f"{network} {':'.join(f'{part:g}' for part in ratio)}"
            least = {"3:1": 1.84, "5:1": 2.76}.get(name.split()[1])
            found = " ".join(f"{share}" for share in mine[-1]["shares"].values())
            note = f"{together:.0f} of {sum(alone):.0f} windows/s, alone {', '.join(f'{r:.0f}' for r in alone)}"
            rows.append(Row(f"{name}: efficiency", together / sum(alone), 0.92, note=f"{note}; shares {found}"))
            rows.append(
                Row(f"{name}: rate beside the equal split", together / same, least, note=f"{same:.0f} windows/s")
            )
            if apart is not None:
                lost = f"{name}: both at once without a group, beside the sum alone"
                rows.append(Row(lost, apart / sum(alone), note=f"{apart:.0f} windows/s"))
            for row in rows[-2 if apart is None else -3 :]:
                print(f"  {row.name}: {row.value:.3f} ({row.note})", flush=True)
    return rows


def change(*, full: bool) -> list[Row]:
    """One of two replicas gets a third of its time in the middle of a run, and all of it again later."""
    third = 40 if full else 30
    with Crew("unet", 2) as crew:
        for process in crew.processes:
            process.quota.give(HEADROOM)
        seen: list[dict[str, Any]] = []
        with crew.group(2, 3 * third):
            while len(seen) < 3 * third:
                line = crew.processes[0].lines.get(timeout=120)
                if line["kind"] != "step":
                    continue
                seen.append(line)
                if line["step"] == third - 1:
                    crew.processes[1].quota.give(HEADROOM / 3)
                elif line["step"] == 2 * third - 1:
                    crew.processes[1].quota.give(HEADROOM)
            other = crew.processes[1].wait_for("done")
            crew.processes[0].wait_for("done")
    shares = [line["shares"]["r1"] for line in seen]
    print(f"  shares of the replica that slows down: {shares}", flush=True)

    def followed(first: int) -> int:
        """Return the steps until the share is, to a chunk, what it is at the end of this part of the run."""
        part = shares[first : first + third]
        settled = statistics.median(part[-10:])
        return next((at for at in range(third) if all(abs(share - settled) <= 1 for share in part[at:])), third)

    ends = [statistics.median(shares[at - 10 : at]) for at in (third, 2 * third, 3 * third)]
    note = "share of 24 chunks: " + " → ".join(f"{share:g}" for share in ends)
    return [
        Row("slow-down to a third: steps until shares follow", followed(third), 20, at_most=True, note=note),
        Row("recovery: steps until shares follow", followed(2 * third), 20, at_most=True),
        Row("programs compiled again", other[-1]["recompiles"], 0, at_most=True),
    ]  # fmt: skip


def kills(*, full: bool) -> list[Row]:
    """Kill one of three replicas at a random moment, twenty times; a new one takes its place."""
    rng, steps, trials = random.Random(0), 12, 20 if full else 5
    chunks = BATCH // CHUNK
    with Crew("unet", 3) as crew:
        for process in crew.processes:
            process.quota.give(None)
        whole = crew.run([None] * 3, steps)
        expected, step_s = whole[-1]["loss"], BATCH / rate(whole, 2)
        gaps, losses, right, hits = [], [], 0, 0
        for trial in range(trials):
            victim = rng.randrange(3)
            with crew.group(3, steps):
                for process in crew.processes:
                    process.wait_for("joined")
                time.sleep(rng.uniform(0, (steps - 2) * step_s))
                killed = time.time()
                crew.processes[victim].kill()
                left = [process for number, process in enumerate(crew.processes) if number != victim]
                lines = [process.wait_for("done") for process in left]
            seen = [[line for line in one if line["kind"] == "step"] for one in lines]
            gaps.append(min(line["at"] for line in seen[0] if line["at"] > killed) - killed)
            computed = [sorted(c for part in line["chunks"].values() for c in part) for line in seen[0]]
            right += computed == [list(range(chunks))] * steps and [line["step"] for line in seen[0]] == list(
                range(steps)
            )
            hits += any(len(line["shares"]) == 2 for line in seen[0])
            losses.append(abs(seen[0][-1]["loss"] - expected) / expected)
            assert lines[0][-1]["params"] == lines[1][-1]["params"]
            crew.processes[victim] = Process("unet", victim)
            crew.processes[victim].wait_for("ready")
            print(f"  kill {trial + 1}: next step after {gaps[-1]:.2f} s, loss differs by {losses[-1]:.1e}", flush=True)
    return [
        Row("kills that met a run under way", hits, trials),
        Row("runs with every chunk of every step exactly once", right, trials),
        Row("last loss beside that of a run without a kill, relative", max(losses), 1e-4, at_most=True),
        Row("seconds from the kill to the next step, longest", max(gaps), 10, at_most=True,
            note=f"median {statistics.median(gaps):.2f} s, a step takes {step_s:.2f} s"),
    ]  # fmt: skip


def ordinary(*, full: bool) -> list[Row]:
    """1:1 beside the ordinary data-parallel run of two processes, in turns."""
    turns, steps = 5 if full else 3, 30
    rates: dict[str, list[float]] = {"replicas": [], "ordinary": []}
    with Crew("unet", 2) as crew:
        for _ in range(turns):
            rates["replicas"].append(rate(crew.run([None, None], steps), 8))
            rates["ordinary"].append(_data_parallel(steps))
    mine, theirs = (statistics.median(rates[name]) for name in ("replicas", "ordinary"))
    return [
        Row("1:1: rate beside ordinary data parallelism", mine / theirs, 0.99, note=f"{mine:.0f} of {theirs:.0f}/s")
    ]


def _data_parallel(steps: int) -> float:
    from jaxtrain.launch import free_port

    port = free_port()
    command = [sys.executable, __file__, "--member-of", f"127.0.0.1:{port}", "--steps", str(steps)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
                   "JAX_COMPILATION_CACHE_DIR": str(OUT / "compiled")}  # fmt: skip
    started = [
        subprocess.Popen([*command, "--number", str(n)], stdout=subprocess.PIPE, text=True, env=environment)
        for n in range(2)
    ]
    text, _ = (process.communicate(timeout=300)[0] for process in started)
    return float(next(line for line in text.splitlines() if line.startswith("rate ")).split()[1])


def data_parallel(address: str, number: int, steps: int) -> None:
    """One process of an ordinary run, with the same batches from memory."""
    import jax
    import numpy as np

    from jaxtrain.config import TrainConfig
    from jaxtrain.data.arrays import put_batch
    from jaxtrain.learn.step import make_train_step
    from jaxtrain.parallel.mesh import batch_sharding
    from jaxtrain.parallel.processes import start_distributed

    start_distributed(address, processes=2, process=number)
    config = make_config("unet")
    config = TrainConfig.model_validate({**config.model_dump(exclude_unset=True), "mesh": {"data": 2},
                                         "hetero": {"enabled": False}})  # fmt: skip
    program, ready = make_program("unet", config), make_ready("unet")
    step, state, order = make_train_step(program), program.init(jax.random.key(0)), ready.order(None)
    sharding, times = batch_sharding(program.mesh), []
    for index in range(steps):
        rows = ready.plan.parts["train"].rows[order.indices(index * BATCH, BATCH)]
        own = rows[number * BATCH // 2 : (number + 1) * BATCH // 2]
        batch = put_batch(ready.reader.read(own), sharding, BATCH)
        state, metrics = step(state, batch, key=jax.random.fold_in(jax.random.key(0), index))
        float(metrics["loss"])
        times.append(time.time())
    if number == 0:
        print(f"rate {BATCH * (len(times) - 9) / (times[-1] - times[8])}", flush=True)
    np.asarray(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the published figures; takes long")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    parser.add_argument("--member-of", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replica:
        replica(args.replica, args.number)
        return 0
    if args.member_of:
        data_parallel(args.member_of, args.number, args.steps)
        return 0
    try:
        Quota("try").close()
    except OSError as error:
        print(f"  skipped: quotas of processor time cannot be set here ({error}); run it as root")
        return 0
    passed = True
    for part in [args.part] if args.part else PARTS:
        match part:
            case "unet" | "resnet":
                rows = efficiency(part, full=args.full)
            case "change":
                rows = change(full=args.full)
            case "kills":
                rows = kills(full=args.full)
            case _:
                rows = ordinary(full=args.full)
        passed &= publish(f"hetero-{part}", rows, full=args.full)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
