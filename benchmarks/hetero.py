"""Unequal replicas: their rate over the sum of their rates alone, shares that follow a change of speed, and kills.

Each replica is a process of its own, which a quota of processor time slows down (`hetero_crew.py`). This needs the
right to make control groups, which root has. Replicas are compiled at full speed; quotas begin after that.

    python benchmarks/hetero.py --part unet          # 1:1, 2:1, 3:1, 5:1, 4:2:1:1; --ratio 3:1 for one of them
    python benchmarks/hetero.py --part resnet
    python benchmarks/hetero.py --part change        # one of two replicas slows down to a third, and recovers
    python benchmarks/hetero.py --part kills         # one of three is killed, twenty times
    python benchmarks/hetero.py --part restart       # one of two is killed where both are needed: from a checkpoint
    python benchmarks/hetero.py --part ordinary      # 1:1 beside ordinary data parallelism
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Row, publish
from hetero_crew import CHUNK, Crew, Process, Quota, rate
from hetero_efficiency import HEADROOM, RATIOS, collect, measure
from hetero_ordinary import measure_ordinary

PARTS = ("unet", "resnet", "change", "kills", "restart", "ordinary")
BATCH, BATCH_FULL = 192, 384
"""Windows of 48 × 48 pixels of a step, quick and full: 384 have the pixels of 13 windows of 256 × 256."""


def change(*, full: bool) -> list[Row]:
    """One of two replicas gets a third of its time in the middle of a run, and all of it again later."""
    third = 40 if full else 30
    with Crew("unet", 2, BATCH) as crew:
        crew.give([HEADROOM] * 2)
        seen: list[dict[str, Any]] = []
        with crew.group([0, 1], 3 * third):
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
    with Crew("unet", 3, BATCH) as crew:
        whole = crew.run(range(3), steps)
        expected, step_s = whole[-1]["loss"], BATCH / rate(whole, BATCH, 2)
        gaps, losses, right, hits = [], [], 0, 0
        for trial in range(trials):
            victim = rng.randrange(3)
            with crew.group(range(3), steps):
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


def restart(*, full: bool) -> list[Row]:
    """Kill one of two replicas of a run that needs both: all start again from the newest checkpoint."""
    rng, trials, gaps, exact = random.Random(0), 5 if full else 2, [], 0
    with tempfile.TemporaryDirectory() as folder:
        config = _small_run(Path(folder))
        for trial in range(trials):
            run = Path(folder) / f"run{trial}"
            command = [sys.executable, "-m", "cli.main", "launch", "-n", "2", "--min-processes", "2", "--",
                       "train", str(config), "--out", str(run)]  # fmt: skip
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
                try:
                    _wait_for_steps(run, rng.randrange(25, 35), launcher)
                    before = len(_steps(run))
                    victims = _children(launcher.pid)
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    killed = time.monotonic()
                    _wait_for_steps(run, before + 3, launcher)  # two that were under way may still be written
                    gaps.append(time.monotonic() - killed)
                    code = launcher.wait(timeout=300)
                finally:
                    launcher.terminate()
            last = {line["step"]: line for line in _steps(run)}
            exact += code == 0 and sorted(last) == list(range(RESTART_STEPS))
            print(f"  restart {trial + 1}: next step after {gaps[-1]:.1f} s, exit code {code}", flush=True)
    return [
        Row("restarted runs that ended with every step", exact, trials),
        Row("seconds from the kill to the next step, from a checkpoint, longest", max(gaps), 40, at_most=True,
            note=f"median {statistics.median(gaps):.1f} s"),
    ]  # fmt: skip


RESTART_STEPS = 60


def _small_run(folder: Path) -> Path:
    """Make a store of random patches, and the configuration of a run of two replicas."""
    import numpy as np
    from PIL import Image

    rng, places = np.random.default_rng(0), ["file,latitude,longitude"]
    for name in ("bright", "dark"):
        (folder / "patches" / name).mkdir(parents=True)
        for number in range(200):
            pixels = rng.integers(0, 128, (64, 64, 3), np.uint8) + np.uint8(127 if name == "bright" else 0)
            Image.fromarray(pixels).save(folder / "patches" / name / f"{name}-{number}.png")
            latitude, longitude = rng.uniform(40, 50), rng.uniform(0, 20)
            places.append(f"{name}/{name}-{number}.png,{latitude:.4f},{longitude:.4f}")
    (folder / "patches" / "coordinates.csv").write_text("\n".join(places) + "\n")
    store, config = folder / "store.zarr", folder / "run.toml"
    subprocess.run(
        [sys.executable, "-m", "cli.main", "samples", str(folder / "patches"), str(store)], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    config.write_text(
        f'[data]\ncube = "{store}"\n[data.split]\ncell_deg = 0.5\n'
        '[model]\nname = "resnet"\nwidth = 16\nblocks = [1, 1, 1, 1]\nnorm = "group"\n'
        f"[run]\nsteps = {RESTART_STEPS}\nbatch_size = 64\ncheckpoint_every = 20\nevaluate_every = {RESTART_STEPS}\n"
        "[hetero]\nenabled = true\nchunk = 8\n"
    )
    return config


def _steps(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the steps that a run has recorded."""
    try:
        lines = [json.loads(text) for text in (run / "shares.jsonl").read_text().splitlines() if text.endswith("}")]
    except FileNotFoundError:
        return []
    return [line for line in lines if "shares" in line]


def _wait_for_steps(run: Path, count: int, launcher: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while len(_steps(run)) < count:
        if launcher.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the run has ended or stands still after {len(_steps(run))} of {count} steps")
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the published figures; takes long")
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--ratio", choices=RATIOS, action="append", help="only this ratio of unet or resnet")
    parser.add_argument("--turns", type=int, default=4, help="turns of the part ordinary; they add up over calls")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the control groups are removed on the way out
    try:
        Quota("try").close()
    except OSError as error:
        print(f"  skipped: quotas of processor time cannot be set here ({error}); run it as root")
        return 0
    passed, batch = True, BATCH_FULL if args.full else BATCH
    for part in [args.part] if args.part else PARTS:
        match part:
            case "unet" | "resnet":
                for _ in measure(part, args.ratio or list(RATIOS), batch, full=args.full):
                    publish(f"hetero-{part}", collect(part, full=args.full), full=args.full)
                rows = collect(part, full=args.full)
            case "change":
                rows = change(full=args.full)
            case "kills":
                rows = kills(full=args.full)
            case "restart":
                rows = restart(full=args.full)
            case _:
                rows = measure_ordinary(batch, args.turns, full=args.full)
        passed &= publish(f"hetero-{part}", rows, full=args.full)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
