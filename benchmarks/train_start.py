"""Seconds from `terrashard train` to the numbers of its first step, with and without compiled programs of earlier runs.

The default U-Net learns from a cube of two dates of 2048², in a process as a user starts it. The first run of each pair
finds an empty cache of compiled programs, the second one what the first has left; both have new run folders.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import OUT, Row, arguments, publish
from train_input import CLASSES, make_stores

_STEPS = 3


def first_step(config: Path, run: Path, cache: Path) -> tuple[float, float]:
    """(Seconds to the first line of the first step, seconds of processor of the whole command)."""
    shutil.rmtree(run, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(cache)}
    before, began, first = _children_s(), time.perf_counter(), None
    command = [str(Path(sys.executable).with_name("terrashard")), "train", str(config), "--out", str(run)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while child.poll() is None:
        if first is None and metrics.exists() and '"step": 1,' in metrics.read_text():
            first = time.perf_counter() - began
        time.sleep(0.02)
    if child.returncode or first is None:
        raise SystemExit(f"the run ended with {child.returncode}, first step {first}")
    return first, _children_s() - before


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    args = arguments(__doc__ or "")
    OUT.mkdir(exist_ok=True)
    cube, _ = make_stores(False)
    settings = [
        "[data]", f"cube = {json.dumps(str(cube))}", "patch = 128",
        "classes = { " + ", ".join(f"{value} = {json.dumps(name)}" for value, name in CLASSES.items()) + " }",
        "[run]", f"steps = {_STEPS}", "batch_size = 8", "log_every = 1",
    ]  # fmt: skip
    (OUT / "start.toml").write_text("\n".join(settings) + "\n")
    cold, warm, cpu = [], [], []
    cache = OUT / "start-cache"
    for _ in range(max(1, args.repeats // 2)):
        shutil.rmtree(cache, ignore_errors=True)
        cold.append(first_step(OUT / "start.toml", OUT / "start-run", cache)[0])
        for _ in range(2):
            seconds, used = first_step(OUT / "start.toml", OUT / "start-run", cache)
            warm.append(seconds)
            cpu.append(used)
        print(f"  first step after {cold[-1]:.1f} s, then {warm[-2]:.1f} and {warm[-1]:.1f} s", flush=True)
    kept = sum(path.stat().st_size for path in cache.rglob("*-cache"))
    rows = [
        Row("first step of a run, s", statistics.median(warm), 8.0, at_most=True, note="programs of earlier runs"),
        Row("first step of the very first run, s", statistics.median(cold)),
        Row("the whole command, s of processor", statistics.median(cpu), note=f"{_STEPS} steps, validation and report"),
        Row("compiled programs, MB", kept / 1e6, 1100, at_most=True),
    ]  # fmt: skip
    return 0 if publish("train-start", rows, full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
