"""Searches beside separate trainings (part sharing), beside Optuna with PyTorch (part twin), and beside full trials
without early stops (demo, eurosat); which rule should end trials early (part rules).

The worlds are that of `terrashard demo` and the EuroSAT patches of the shared data, with small networks. Both sides of
a comparison train the same configurations in the same order, because the sampler draws at random from one seed. What
was measured is kept in benchmarks/out/tune, so that a call that was cut short goes on with the next measurement.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from harness import HERE, OUT, Row, arguments, publish
from tune_replay import Costs, compare_rules, curves_of

SHARED = Path(os.environ.get("TERRASHARD_SHARED_DATA", HERE.parent.parent / "shared" / "data"))
KEPT = OUT / "tune"
DEMO: dict[str, dict[str, Any]] = {
    "data": {
        "label": "landcover", "patch": 64, "bands": ["blue", "green", "red", "rededge2", "nir", "swir16", "swir22"],
        "classes": {"1": "water", "2": "wetland", "3": "forest", "4": "grassland", "5": "cropland", "6": "bare",
                    "7": "built"},
        "split": {"block_m": 1280, "validation": 0.15, "test": 0.15},
    },
    "model": {"name": "unet", "width": 8, "depth": 2, "dropout": 0.1},
    "run": {"batch_size": 16, "log_every": 10},
}  # fmt: skip
EUROSAT: dict[str, dict[str, Any]] = {
    "data": {"jitter": 0.1, "split": {"cell_deg": 0.5, "validation": 0.05, "test": 0.2}},
    "model": {"name": "resnet", "width": 8, "blocks": [1, 1, 1, 1], "stem": "patch", "norm": "group", "dropout": 0.1},
    "optim": {"warmup_steps": 10},
    "run": {"batch_size": 64, "log_every": 10},
}
SPACE = {
    "optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "optim.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
    "model.dropout": {"low": 0.05, "high": 0.4},
    "data.jitter": {"low": 0.01, "high": 0.2},
}  # fmt: skip
SHARE = 0.4
"""Time that a search with ASHA is given, of that of full trials, so that it ends within half of it."""
COSTS = {"demo": Costs(0.024, 0.007), "eurosat": Costs(0.09, 0.01)}
"""From the seconds of trials of 1, 4 and 12 validations, and of continued ones, in such searches with ASHA."""
COMMAND = [sys.executable, "-m", "cli.main"]


def call(*arguments_: object) -> str:
    """Run the terrashard command and return what it prints."""
    done = subprocess.run([*COMMAND, *map(str, arguments_)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments_))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured under a name, or measure it and keep it."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        found = measure()
        KEPT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        print(f"  {name}: {found['seconds']:.1f} s", flush=True)
    found = json.loads(path.read_text())
    return dict(found)


def demo_cube() -> Path:
    """The cube of the demo; made once."""
    cube = OUT / "tune-demo" / "cube.zarr"
    if not cube.exists():
        call("demo", "--out", cube.parent)
    return cube


def eurosat_store() -> Path:
    """The sample store of EuroSAT; made once."""
    store = OUT / "eurosat.zarr"
    if not store.exists():
        call("samples", SHARED / "patches" / "eurosat_rgb", store)
    return store


def write(name: str, settings: dict[str, dict[str, Any]], data: Path, steps: int, every: int) -> tuple[Path, Path]:
    """Write configuration and space of a search."""
    values = {**settings, "data": {**settings["data"], "cube": str(data)}}
    values["run"] = {**settings["run"], "steps": steps, "evaluate_every": every, "checkpoint_every": steps}
    KEPT.mkdir(parents=True, exist_ok=True)
    config, space = KEPT / f"{name}.toml", KEPT / f"{name}-space.toml"
    config.write_text(tomli_w.dumps(values))
    space.write_text(tomli_w.dumps(SPACE))
    return config, space


def search(name: str, files: tuple[Path, Path], pruner: str, *limits: object) -> dict[str, Any]:
    """Run a search from its command; return its document with its seconds."""

    def measure() -> dict[str, Any]:
        folder = KEPT / name
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        told = call("tune", files[0], "--space", files[1], "--out", folder, "--sampler", "random", "--pruner", pruner,
                    "--seeds", 0, "--json", *limits)  # fmt: skip
        return {**json.loads(told), "seconds": time.perf_counter() - began}

    return kept(name, measure)


def command(name: str, config: Path, trial: dict[str, Any]) -> float:
    """Return the seconds of a training by itself with the values of a trial."""

    def measure() -> dict[str, Any]:
        run = KEPT / f"{name}-{trial['number']}"
        shutil.rmtree(run, ignore_errors=True)
        began = time.perf_counter()
        call(
            "train",
            config,
            "--out",
            run,
            "--quiet",
            *(f"--set={key}={value}" for key, value in trial["values"].items()),
        )
        return {"seconds": time.perf_counter() - began}

    return float(kept(f"{name}-{trial['number']}", measure)["seconds"])


def sharing(size: str, trials: int, steps: int, commands: int) -> list[Row]:
    """Trials an hour of one search beside those of the same configurations as separate commands."""
    files = write(f"{size}-sharing", DEMO, demo_cube(), steps, steps)
    found = search(f"{size}-sharing", files, "none", "--trials", trials)
    apart = [command(f"{size}-alone", files[0], trial) for trial in found["trials"][:commands]]
    rates = [3600 * trials / found["seconds"], 3600 * len(apart) / sum(apart)]
    compiled = max(count for groups in found["compiled"].values() for count in groups.values())
    return [
        Row("trials an hour of a search, times those of commands", rates[0] / rates[1], 3.0,
            note=f"{rates[0]:.0f} and {rates[1]:.0f}; {trials} trials and {len(apart)} commands of {steps} steps"),
        Row("compilations of a group of trials", compiled, 1, at_most=True),
    ]  # fmt: skip


def twin(size: str, trials: int, steps: int) -> list[Row]:
    """Trials an hour of a search beside the same search written with Optuna and PyTorch (`tune_twin.py`)."""
    if importlib.util.find_spec("torch") is None:
        print('  skipped: the search in PyTorch (the extra "bench" brings torch)')
        return []
    files = write(f"{size}-sharing", DEMO, demo_cube(), steps, steps)
    found = search(f"{size}-sharing", files, "none", "--trials", trials)

    def measure() -> dict[str, Any]:
        began = time.perf_counter()
        words = [sys.executable, str(HERE / "tune_twin.py"), *map(str, files), "--trials", str(trials)]
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        return {**json.loads(told), "seconds": time.perf_counter() - began}

    theirs = kept(f"{size}-twin", measure)
    return [
        Row("trials an hour of a search, times those of Optuna and PyTorch", theirs["seconds"] / found["seconds"],
            note=f"{3600 * trials / found['seconds']:.0f} and {3600 * trials / theirs['seconds']:.0f}; {trials} trials "
                 f"of {steps} steps; best scores {found['best']['value']:.4f} and {theirs['best']:.4f}"),
    ]  # fmt: skip


def early(size: str, world: str, trials: int, steps: int, every: int) -> list[Row]:
    """The best score of ASHA in half of the time of full trials, beside theirs."""
    settings, data = (DEMO, demo_cube()) if world == "demo" else (EUROSAT, eurosat_store())
    name = f"{size}-{world}"
    files = write(name, settings, data, steps, every)
    full = search(f"{name}-full", files, "none", "--trials", trials)
    # the command itself takes time to start and to end, and a trial that has begun goes on to its next rung
    hours = SHARE * full["seconds"] / 3600
    half = search(f"{name}-half", files, "asha", "--hours", f"{hours:.5f}")
    best, count = full["best"]["value"], sum(trial["continues"] is None for trial in half["trials"])
    return [
        Row(f"{world}: time of ASHA, of that of {trials} full trials", half["seconds"] / full["seconds"], 0.5,
            at_most=True, note=f"{half['seconds']:.0f} s with {count} trials, {full['seconds']:.0f} s; {steps} steps"),
        Row(f"{world}: its best score minus that of full trials", half["best"]["value"] - best, 0.0,
            note=f"{half['best']['value']:.4f} and {best:.4f}"),
    ]  # fmt: skip


def rules(size: str, world: str, trials: int, steps: int, every: int) -> list[Row]:
    """Rules that stop trials early, replayed on full trials (`tune_replay.py`)."""
    settings, data = (DEMO, demo_cube()) if world == "demo" else (EUROSAT, eurosat_store())
    name = f"{size}-rules-{world}"
    search(name, write(name, settings, data, steps, every), "none", "--trials", trials)
    return compare_rules(world, curves_of(KEPT / name), SHARE, COSTS[world])


def main() -> int:
    options = arguments(__doc__ or "", parts=("sharing", "twin", "rules", "demo", "eurosat"))
    size = "full" if options.full else "quick"
    rows: list[Row] = []
    if options.part in (None, "sharing"):
        rows += sharing(size, *((20, 60, 20) if options.full else (8, 20, 3)))
    if options.part in (None, "twin"):
        rows += twin(size, *((20, 60) if options.full else (8, 20)))
    if options.part in (None, "rules"):
        rows += rules(size, "demo", 40, 60, 5) + rules(size, "eurosat", 40, 120, 10)
    for world, sizes in (("demo", ((24, 120, 10), (16, 60, 5))), ("eurosat", ((24, 300, 25), (16, 120, 10)))):
        if options.part in (None, world):
            rows += early(size, world, *sizes[0 if options.full else 1])
    topic = "tune" if options.part is None else f"tune-{options.part}"
    return 0 if publish(topic, rows, full=options.full) else 1


if __name__ == "__main__":
    sys.exit(main())
