"""Accuracy of the recipes of `examples/`: three seeds each, from scratch, by the commands that a user types.

Every run is `terrashard train` and `terrashard evaluate` in processes of their own, on stores that `terrashard samples`
and `terrashard ingest` make of the shared data (`../shared/data`, or `TERRASHARD_SHARED_DATA`); without those data it
says so and passes. Tests lie apart from training by place, or by date. Time is that of `train`, start, compilation and
report included: seconds on the clock, and of the processor. Other arguments: names of recipes, such as `pines`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import HERE, OUT, Row, publish

SHARED = Path(os.environ.get("TERRASHARD_SHARED_DATA", HERE.parent.parent / "shared" / "data"))
EXAMPLES = HERE.parent / "examples"
COMMAND = str(Path(sys.executable).with_name("terrashard"))
ZAGREB = ("--collection", "sentinel-2-l2a", "--bands", "blue,green,red,nir,scl", "--mask", "scl", "--workers", "2")


@dataclass(frozen=True)
class Recipe:
    """One file of `examples/`, and the scores it is to reach."""

    config: str
    store: tuple[str, ...]
    """The command that makes the store, without its address, which comes third."""
    limits: dict[str, float]
    """Score → aim of the first variant."""
    variants: dict[str, tuple[str, ...]]
    """Name of a variant → its settings, beside those of the file."""
    seconds: float | None = None
    """Aim for the time of one training on an idle machine of two cores."""
    shown: tuple[str, ...] = field(default=("accuracy", "average_accuracy", "miou"))


RECIPES = {
    "eurosat": Recipe(
        "eurosat.toml",
        ("samples", str(SHARED / "patches" / "eurosat_rgb")),
        {"accuracy": 0.98},
        {"unseen cells": (), "unseen cells, another split": ("data.split.seed=1",)},
        seconds=180,
    ),
    "pines": Recipe(
        "indian_pines.toml",
        (
            "samples",
            str(SHARED / "hyperspectral" / "Indian_pines_corrected.npy"),
            "--labels",
            str(SHARED / "hyperspectral" / "Indian_pines_gt.npy"),
        ),
        {"accuracy": 0.95, "average_accuracy": 0.90},
        {"checkerboard": (), "checkerboard with a buffer": ("data.split.buffer_px=5",)},
    ),
    "zagreb": Recipe(
        "zagreb_scl.toml",
        ("ingest", str(SHARED / "scenes" / "zagreb" / "catalog.json"), *ZAGREB),
        {},
        {"unseen blocks": (), "unseen date": ('data.split.test_dates=["2023-08-20"]',)},
    ),
}


def call(*arguments: str) -> tuple[str, float, float]:
    """Run the command; what it printed, seconds on the clock and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([COMMAND, *arguments], check=False, capture_output=True, text=True)
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"terrashard {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout, clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_store(name: str, recipe: Recipe) -> Path:
    """The store of a recipe; made once."""
    store = OUT / "accuracy" / f"{name}.zarr"
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        verb, source, *more = recipe.store
        call(verb, source, str(store), *more)
    return store


def learn(name: str, recipe: Recipe, store: Path, settings: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Train and evaluate once; the scores, with `clock_s` and `processor_s` of the training."""
    run = OUT / "accuracy" / f"{name}-run"
    shutil.rmtree(run, ignore_errors=True)
    given = [part for text in (f"data.cube={store}", f"run.seed={seed}", *settings) for part in ("--set", text)]
    _, clock, processor = call("train", str(EXAMPLES / recipe.config), "--out", str(run), *given)
    scores: dict[str, Any] = json.loads(call("evaluate", str(run), "--json")[0])
    return {**scores, "clock_s": clock, "processor_s": processor}


def rows_of(variant: str, recipe: Recipe, runs: list[dict[str, Any]], *, aims: bool) -> list[Row]:
    """A row for each score and time: the mean of the seeds, and every one of them in the note."""
    rows = []
    for score in recipe.shown:
        values = [100 * run[score] for run in runs]
        spread = f"sd {statistics.stdev(values):.2f}, " if len(values) > 1 else ""
        limit = 100 * recipe.limits[score] if aims and score in recipe.limits else None
        note = f"{spread}seeds {', '.join(f'{v:.2f}' for v in values)}"
        rows.append(Row(f"{variant}: {score.replace('_', ' ')}, %", statistics.mean(values), limit, note=note))
    classes = runs[0]["per_class"]
    for name in classes:
        told = [run["per_class"][name] for run in runs]
        mean = {key: statistics.mean(100 * (one[key] or 0) for one in told) for key in ("recall", "f1", "iou")}
        first = ", ".join(f"{key} {100 * (told[0][key] or 0):.1f}" for key in ("recall", "f1", "iou"))
        note = f"recall {mean['recall']:.1f}, IoU {mean['iou']:.1f}; seed 0: {first}, {told[0]['support']} pixels"
        rows.append(Row(f"{variant}: F1 of {name}, %", mean["f1"], note=note))
    clock = [run["clock_s"] for run in runs]
    limit = recipe.seconds if aims else None
    rows.append(Row(f"{variant}: training, s", statistics.mean(clock), limit, at_most=True))
    rows.append(Row(f"{variant}: training, s of the processor", statistics.mean(run["processor_s"] for run in runs)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; all where none is named")
    parser.add_argument("--full", action="store_true", help="three seeds and every variant; else one of each")
    args = parser.parse_args()
    if not SHARED.is_dir():
        print(f"  skipped, no real data at {SHARED}; set TERRASHARD_SHARED_DATA")
        return 0
    good = True
    for name in args.recipes or RECIPES:
        recipe = RECIPES[name]
        store = make_store(name, recipe)
        rows: list[Row] = []
        for number, (variant, settings) in enumerate(recipe.variants.items()):
            if number and not args.full:
                break
            runs = []
            for seed in range(3 if args.full else 1):
                runs.append(learn(name, recipe, store, settings, seed))
                shown = ", ".join(f"{score} {runs[-1][score]:.4f}" for score in recipe.shown)
                print(f"  {name}, {variant}, seed {seed}: {shown} in {runs[-1]['clock_s']:.0f} s", flush=True)
            rows += rows_of(variant, recipe, runs, aims=not number)
        good &= publish(f"accuracy-{name}", rows, full=args.full)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
