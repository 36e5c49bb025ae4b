"""Searches beside separate trainings (part sharing), and beside full trials without early stops (part asha).

The world is that of `terrashard demo`, small. Both sides of a comparison train the same configurations in the same
order, because the sampler draws at random from one seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w
from harness import OUT, Row, arguments, publish

CONFIG: dict[str, dict[str, Any]] = {
    "data": {
        "label": "landcover", "patch": 64, "bands": ["blue", "green", "red", "rededge2", "nir", "swir16", "swir22"],
        "classes": {"1": "water", "2": "wetland", "3": "forest", "4": "grassland", "5": "cropland", "6": "bare",
                    "7": "built"},
        "split": {"block_m": 1280, "validation": 0.15, "test": 0.15},
    },
    "model": {"name": "unet", "width": 8, "depth": 2, "dropout": 0.1},
    "run": {"batch_size": 16, "log_every": 10},
}  # fmt: skip
SPACE = {
    "optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "optim.weight_decay": {"low": 1e-5, "high": 1e-1, "log": True},
    "model.dropout": {"low": 0.05, "high": 0.4},
    "data.jitter": {"low": 0.01, "high": 0.2},
}  # fmt: skip
COMMAND = [sys.executable, "-m", "cli.main"]


def call(*arguments_: object) -> str:
    """Run the terrashard command and return what it prints."""
    done = subprocess.run([*COMMAND, *map(str, arguments_)], check=True, capture_output=True, text=True)
    return done.stdout


def demo_cube() -> Path:
    """The cube of the demo; made once."""
    cube = OUT / "tune-demo" / "cube.zarr"
    if not cube.exists():
        call("demo", "--out", cube.parent)
    return cube


def write(name: str, steps: int, every: int) -> tuple[Path, Path]:
    """Write configuration and space of a search."""
    values = {**CONFIG, "data": {**CONFIG["data"], "cube": str(demo_cube())}}
    values["run"] = {**CONFIG["run"], "steps": steps, "evaluate_every": every, "checkpoint_every": steps}
    config, space = OUT / f"tune-{name}.toml", OUT / f"tune-{name}-space.toml"
    config.write_text(tomli_w.dumps(values))
    space.write_text(tomli_w.dumps(SPACE))
    return config, space


def search(name: str, config: Path, space: Path, trials: int, pruner: str) -> tuple[dict[str, Any], float, Path]:
    """Run a search from its command; return its document, its seconds and its folder."""
    folder = OUT / f"tune-{name}"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    began = time.perf_counter()
    told = call("tune", config, "--space", space, "--out", folder, "--trials", trials, "--sampler", "random",
                "--pruner", pruner, "--seeds", 0, "--json")  # fmt: skip
    return json.loads(told), time.perf_counter() - began, folder


def sharing(trials: int, steps: int) -> list[Row]:
    """Trials an hour of one search beside the same configurations as separate commands."""
    config, space = write("sharing", steps, steps)
    found, together, folder = search("sharing", config, space, trials, "none")
    began = time.perf_counter()
    for trial in found["trials"]:
        run = folder / "alone" / str(trial["number"])
        call("train", config, "--out", run, "--quiet",
             *(f"--set={name}={value}" for name, value in trial["values"].items()))  # fmt: skip
    apart = time.perf_counter() - began
    compiled = max(count for groups in found["compiled"].values() for count in groups.values())
    return [
        Row(f"trials an hour, search of {trials} beside separate commands", apart / together, 3.0,
            note=f"{together:.0f} s and {apart:.0f} s, {steps} steps each"),
        Row("compilations of a group of trials", compiled, 1, at_most=True),
    ]  # fmt: skip


def asha(trials: int, steps: int, every: int) -> list[Row]:
    """Steps and time of a search with early stops beside one of full trials."""
    config, space = write("asha", steps, every)
    full, full_s, _ = search("full", config, space, trials, "none")
    early, early_s, _ = search("asha", config, space, trials, "asha")
    used = [sum(trial["steps"] for trial in one["trials"]) for one in (early, full)]
    return [
        Row("score of the early search minus that of full trials", early["best"]["value"] - full["best"]["value"], 0.0,
            note=f"{early['best']['value']:.4f} and {full['best']['value']:.4f}, {trials} trials"),
        Row("steps of the early search, of those of full trials", used[0] / used[1], 0.5, at_most=True),
        Row("time of the early search, of that of full trials", early_s / full_s, 0.5, at_most=True,
            note=f"{early_s:.0f} s and {full_s:.0f} s"),
    ]  # fmt: skip


def main() -> int:
    options = arguments(__doc__ or "", parts=("sharing", "asha"))
    rows: list[Row] = []
    if options.part != "asha":
        rows += sharing(*((20, 60) if options.full else (6, 20)))
    if options.part != "sharing":
        rows += asha(*((24, 120, 10) if options.full else (12, 60, 5)))
    topic = "tune" if options.part is None else f"tune-{options.part}"
    return 0 if publish(topic, rows, full=options.full) else 1


if __name__ == "__main__":
    sys.exit(main())
