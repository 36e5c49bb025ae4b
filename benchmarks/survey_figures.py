"""Figures of docs/survey.md from its numbers, and from the result of `planner_scaling.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness import RESULTS
from matplotlib.figure import Figure
from survey_sketches import SKETCHES

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2")
PANELS = (
    ("step_s", "step, ms", 1e3, "log"),
    ("efficiency", "efficiency", 1.0, "linear"),
    ("sent_bytes", "sent, MB", 1e-6, "log"),
    ("peak_bytes", "memory, GB", 1e-9, "log"),
)


def draw_network(numbers: dict[str, Any], key: str) -> Figure:
    """Step time, efficiency, bytes and memory over the number of devices, a column for each machine."""
    curves = numbers["curves"][key]
    figure = Figure(figsize=(10, 10), layout="constrained")
    grid = figure.subplots(len(PANELS), len(curves), sharex=True, sharey="row")
    for column, (profile, found) in enumerate(curves.items()):
        for row, (name, label, factor, scale) in enumerate(PANELS):
            axes = grid[row, column]
            for number, curve in enumerate(found):
                points = [p for p in curve["points"] if p[name] > 0]
                axes.plot([p["devices"] for p in points], [factor * p[name] for p in points], "o-", markersize=3,
                          color=COLOURS[number], label=curve["strategy"])  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale(scale)
            axes.grid(alpha=0.3)
            if name == "efficiency":
                axes.set_ylim(0, 1.1)
            if name == "peak_bytes":
                axes.axhline(numbers["memory"][profile] / 1e9, color="black", lw=0.8, ls="--")
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(profile)
        grid[-1, column].set_xlabel("devices")
    grid[0, 0].legend(frameon=False, fontsize=7)
    return figure


def published_curves() -> dict[str, tuple[list[tuple[int, float]], list[float]]]:
    """Efficiency by GPUs, and with each assumption at another value, of each publication."""
    document = json.loads((RESULTS / "planner-scaling-full.json").read_text(encoding="utf-8"))
    found: dict[str, tuple[list[tuple[int, float]], list[float]]] = {}
    for row in document["rows"]:
        title, _, what = row["name"].partition(": ")
        points, others = found.setdefault(title, ([], []))
        on = re.fullmatch(r"efficiency on (\d+) GPUs", what)
        if on:
            points.append((int(on[1]), row["value"]))
        elif what.startswith("efficiency if"):
            others.append(row["value"])
    return found


def draw_published() -> Figure:
    """What was published, and what is predicted, with the range of the assumptions."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, (title, (points, others)) in enumerate(published_curves().items()):
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[number], markersize=4, label=f"predicted: {title}")
        last = points[-1][0] * 1.06**number
        axes.plot([last, last], [min(others), max(others)], color=COLOURS[number], lw=3, alpha=0.4)
    axes.axhline(1.0, color="black", lw=0.8, ls="--", label="published: linear (Sedona 2019: near linear)")
    axes.plot([256], [0.9], "k*", markersize=12, label="published: 90 % on 256 GPUs (Goyal 2017)")
    axes.plot([352], [1 / 1.12], "k^", markersize=7, label="published: steps 12 % longer on 352 GPUs (Goyal 2017)")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", ylabel="efficiency", ylim=(0.7, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    return figure


def draw_all(numbers: dict[str, Any]) -> list[str]:
    """Write every picture of the page; the same numbers give the same bytes."""
    figures = {name: make() for name, make in SKETCHES.items()}
    figures |= {f"on-{key}": draw_network(numbers, key) for key in numbers["networks"]}
    figures["published"] = draw_published()
    for name, figure in figures.items():
        figure.savefig(IMAGES / f"survey-{name}.png", dpi=100, metadata={"Software": None})
    return sorted(figures)
