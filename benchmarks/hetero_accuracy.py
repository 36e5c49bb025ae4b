"""EuroSAT with two replicas of the speeds 3:1 compared with two equal ones: accuracy of three seeds, and time.

Both sides are `terrashard train` in two processes of one core each, with the recipe of `examples/eurosat.toml` at 600
steps and norm = "group" (no replica holds the statistics of a whole batch). Quotas of processor time make 3:1.

    python benchmarks/hetero_accuracy.py --part accuracy     # six runs; how busy the machine is does not matter
    python benchmarks/hetero_accuracy.py --part time         # seconds of a step with five ways to split the batch
    python benchmarks/hetero_accuracy.py --part time --way follow     # one of them; the table comes with the last one

The data are in `../shared/data`, or in `TERRASHARD_SHARED_DATA`; without them this says so and passes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, OUT, Row, publish
from hetero_crew import Quota

SHARED = Path(os.environ.get("TERRASHARD_SHARED_DATA", HERE.parent.parent / "shared" / "data"))
PATCHES, STORE = SHARED / "patches" / "eurosat_rgb", OUT / "eurosat.zarr"
CHUNKS, STEPS = 16, 600
EQUAL_SPLIT = [CHUNKS // 2] * 2
FAST, SLOW = 0.9, 0.3
"""Cores of the two replicas at 3:1."""


class Run:
    """A run of two replicas, each in a control group and on a core of its own."""

    def __init__(
        self, out: Path, *, seed: int, steps: int, quotas: Sequence[float | None], checkpoint_every: int = STEPS
    ) -> None:
        from jaxtrain.hetero.coordinator import Coordinator

        self.out, self.steps = out, steps
        secret = secrets.token_hex(16)
        self.coordinator = Coordinator("127.0.0.1:0", secret, min_members=2, max_members=2, expected=2)
        settings = (f"data.cube={STORE}", "model.norm=group", f"run.seed={seed}", f"run.steps={STEPS}",
                    f"run.evaluate_every={STEPS}", f"run.checkpoint_every={checkpoint_every}", "hetero.enabled=true",
                    f"hetero.chunk={64 // CHUNKS}", "hetero.silence_s=900")  # fmt: skip
        words = [sys.executable, "-m", "cli.main", "train", str(HERE.parent / "examples" / "eurosat.toml"),
                 "--out", str(out), *(word for setting in settings for word in ("--set", setting))]  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        self.quotas = [Quota(f"{name}-{secrets.token_hex(2)}") for name in ("0", "1")]
        for number, quota in enumerate(self.quotas):
            environment = {
                **os.environ, "TERRASHARD_HETERO_COORDINATOR": self.coordinator.address, "JAX_PLATFORMS": "cpu",
                "TERRASHARD_HETERO_SECRET": secret, "TERRASHARD_HETERO_NAME": str(number),
                "TERRASHARD_LOCAL_PROCESSES": "2", "TERRASHARD_LOCAL_PROCESS": str(number),
                "JAX_COMPILATION_CACHE_DIR": str(OUT / "compiled"),
            }  # fmt: skip
            with (out.parent / f"{out.name}-{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["taskset", "-c", str(min(number, (os.cpu_count() or 1) - 1)), *words], env=environment,
                    stdout=subprocess.DEVNULL, stderr=log,
                )  # fmt: skip
            quota.hold(process.pid)
            quota.give(quotas[number])
            self.processes.append(process)

    def lines(self) -> list[dict[str, Any]]:
        """Return the steps that are recorded so far."""
        with contextlib.suppress(FileNotFoundError):
            texts = (self.out / "metrics.jsonl").read_text().splitlines()
            return [line for text in texts if text.endswith("}") and (line := json.loads(text))["kind"] == "train"]
        return []

    def wait_for(self, step: int) -> float:
        """Wait until a step is recorded; return the time."""
        while len(self.lines()) < step:
            if any(process.poll() for process in self.processes):
                raise RuntimeError(f"a replica has ended early: see {self.out}-*.log")
            time.sleep(0.05)
        return time.monotonic()

    def finish(self, *, wait: bool) -> None:
        """Wait for the end of both replicas, or end them."""
        for process in self.processes:
            if not wait:
                process.kill()
            code = process.wait()
            if wait and code:
                raise RuntimeError(f"a replica has ended with code {code}: see {self.out}-*.log")
        for quota in self.quotas:
            quota.close()
        self.coordinator.close()


def make_store() -> None:
    if not STORE.exists():
        subprocess.run([sys.executable, "-m", "cli.main", "samples", str(PATCHES), str(STORE)], check=True)


def accuracy_of(run: Path) -> float:
    command = [sys.executable, "-m", "cli.main", "evaluate", str(run), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["accuracy"])


def accuracy(seeds: int) -> list[Row]:
    """Return accuracies on the test split; a run that has been done stays where it is."""
    found: dict[str, list[float]] = {"3:1": [], "1:1": []}
    shares: list[str] = []
    for seed in range(seeds):
        for side, quotas in {"3:1": (FAST, SLOW), "1:1": (None, None)}.items():
            out = OUT / f"hetero-eurosat-{side.replace(':', '-')}-{seed}"
            if not (out / "report.html").exists():
                Run(out, seed=seed, steps=STEPS, quotas=quotas).finish(wait=True)
            found[side].append(100 * accuracy_of(out))
            if side == "3:1":
                last = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
                split = [line["shares"] for line in last if line["kind"] == "train"]
                half = split[len(split) // 2 :]
                shares.append(f"{statistics.mean(line['0'] for line in half):.1f} of {CHUNKS}")
            print(f"  seed {seed}, {side}: {found[side][-1]:.2f} %", flush=True)
    mean = {side: statistics.mean(values) for side, values in found.items()}
    each = {side: ", ".join(f"{value:.2f}" for value in values) for side, values in found.items()}
    return [
        Row("accuracy at 1:1, %", mean["1:1"], 97, note=f"seeds: {each['1:1']}; {STEPS} steps of 64"),
        Row("accuracy at 3:1, %", mean["3:1"], 97, note=f"seeds: {each['3:1']}; mean share of 0: {', '.join(shares)}"),
        Row("distance of the means, points", abs(mean["3:1"] - mean["1:1"]), 0.2, at_most=True),
    ]


def seconds_of_step(
    shares: Sequence[int] | None, quotas: Sequence[float], warm: int, steps: int
) -> tuple[float, list[int]]:
    """Return the median seconds of a step, and the last shares."""
    with tempfile.TemporaryDirectory() as folder:
        out, before = Path(folder) / "run", 0
        if shares is not None:  # a run that continues repeats the shares that are recorded
            begun = Run(out, seed=0, steps=STEPS, quotas=(None, None), checkpoint_every=1)
            try:
                begun.wait_for(before := 3)
            finally:
                begun.finish(wait=False)
            split = {"0": list(range(shares[0])), "1": list(range(shares[0], CHUNKS))}
            lines = (json.dumps({"step": step, "shares": split}) + "\n" for step in range(STEPS))
            (out / "shares.jsonl").write_text("".join(lines))
        run = Run(out, seed=0, steps=STEPS, quotas=(None, None))
        try:
            run.wait_for(before + 2)
            for quota, cores in zip(run.quotas, quotas, strict=True):
                quota.give(cores)
            began = run.wait_for(before + 2 + warm)
            spent = (run.wait_for(before + 2 + warm + steps) - began) / steps
            return spent, list(run.lines()[-1]["shares"].values())
        finally:
            run.finish(wait=False)


@dataclass(frozen=True)
class Way:
    """A way to split the batch, at the speeds of the two replicas.

    Attributes:
        name: In words.
        quotas: Cores of the replicas.
        split: `own` for shares that follow, `equal`, or `start` for those that were found at 3:1.
        warm: Steps before the measured ones, in which shares settle.
        steps: Measured steps.
    """

    name: str
    quotas: tuple[float, float]
    split: str
    warm: int
    steps: int


WAYS = {
    "follow": Way("shares that follow", (FAST, SLOW), "own", 15, 30),
    "equal": Way("equal split", (FAST, SLOW), "equal", 3, 15),
    "static": Way("split measured at the start", (FAST, SLOW), "start", 3, 30),
    "follow-exchanged": Way("speeds exchanged, shares that follow", (SLOW, FAST), "own", 15, 30),
    "static-exchanged": Way("speeds exchanged, split measured at the start", (SLOW, FAST), "start", 3, 12),
}
"""`follow` comes first: it finds the shares that `static` keeps."""
KEPT = OUT / "hetero-time.jsonl"


def read_times() -> dict[str, dict[str, Any]]:
    """Return what was measured so far, by way: the median of all measurements, and the newest shares."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in map(json.loads, KEPT.read_text().splitlines()):
            every = [*found.get(line["way"], {}).get("every", []), line["seconds"]]
            found[line["way"]] = {**line, "seconds": statistics.median(every), "every": every}
    return found


def measure_times(ways: Sequence[str]) -> None:
    """Measure some ways; each is kept at once, since a machine does not stay quiet for all of them."""
    splits: dict[str, list[int] | None] = {"own": None, "equal": EQUAL_SPLIT}
    for name in ways:
        way, known = WAYS[name], read_times()
        if way.split == "start":
            splits["start"] = known["follow"]["shares"]
        seconds, shares = seconds_of_step(splits[way.split], way.quotas, way.warm, way.steps)
        print(f"  {way.name}: {1000 * seconds:.0f} ms a step, shares {shares}", flush=True)
        with KEPT.open("a") as file:
            file.write(json.dumps({"way": name, "seconds": seconds, "shares": shares}) + "\n")


def step_times(ways: Sequence[str]) -> list[Row]:
    """Return the time of the recipe by the seconds of a step with each way to split the batch, once they are there.

    All ways make the same updates, so they reach an accuracy at the same step.
    """
    measure_times(ways)
    found = read_times()
    if missing := [way for way in WAYS if way not in found and not way.endswith("exchanged")]:
        print(f"  not measured yet: {', '.join(missing)}")
        return []
    rows = [
        Row(f"{WAYS[name].name}: seconds to the accuracy", STEPS * line["seconds"],
            note=f"{', '.join(f'{1000 * one:.0f}' for one in line['every'])} ms a step; shares {line['shares']}")
        for name, line in ((name, found[name]) for name in WAYS if name in found)
    ]  # fmt: skip
    spent = {name: line["seconds"] for name, line in found.items()}
    rows += [
        Row("equal split ÷ shares that follow", spent["equal"] / spent["follow"], 1.84),
        Row("split measured at the start ÷ shares that follow", spent["static"] / spent["follow"]),
    ]
    if {"follow-exchanged", "static-exchanged"} <= spent.keys():
        ratio = spent["static-exchanged"] / spent["follow-exchanged"]
        rows.append(Row("split measured at the start ÷ shares that follow, speeds exchanged", ratio, 1))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds; takes long")
    parser.add_argument("--part", choices=("accuracy", "time"), help="only this part")
    parser.add_argument("--way", choices=WAYS, action="append", help="of the part time: only this way to split")
    options = parser.parse_args()
    if not PATCHES.exists():
        print(f"  skipped: no {PATCHES}; set TERRASHARD_SHARED_DATA")
        return 0
    try:
        Quota("try").close()
    except OSError as error:
        print(f"  skipped: quotas of processor time cannot be set here ({error}); run it as root")
        return 0
    make_store()
    passed = True
    if options.part in (None, "accuracy"):
        passed &= publish("hetero-accuracy", accuracy(3 if options.full else 1), full=options.full)
    if options.part in (None, "time"):
        rows = step_times(options.way or list(WAYS))
        passed &= bool(rows) and publish("hetero-time", rows, full=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
