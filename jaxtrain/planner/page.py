"""Write `survey.html`, one file with the figures of a survey; it loads nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from jaxtrain.planner.scaling import Curve
from jaxtrain.planner.survey import Row, Survey, bytes_on_wire
from jaxtrain.planner.words import corrections, gather_lines, mesh_text, sensitivity, verdict
from zarr_store.folder import FolderStore

__all__ = ["draw_memory", "draw_pareto", "draw_scaling", "draw_times", "draw_traffic", "write_page"]

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")
PARTS = (
    ("compute_s", "arithmetic"),
    ("memory_s", "memory traffic"),
    ("collective_s", "exchange"),
    ("idle_s", "waiting"),
)
MOST_ROWS = 24


def write_page(path: Path, surveys: Sequence[Survey], curves: Sequence[Curve] = ()) -> Path:
    """Write the page of one or several surveys.

    Args:
        path: the file.
        surveys: of the same network, each for a number of devices.
        curves: from `scaling_curves`; none for a page without.
    """
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    ).get_template("survey.html.j2")  # fmt: skip
    html = template.render(
        title=f"Survey of {surveys[0].network.config.model.name}",
        config=surveys[0].network.config,
        windows=surveys[0].network.windows,
        surveys=[_section(one) for one in surveys],
        scaling=_png(draw_scaling(curves)) if curves else None,
        missing=[curve for curve in curves if not curve.points],
    )
    path = path.absolute()
    FolderStore(path.parent).write(path.name, html.encode())
    return path


def _section(survey: Survey) -> dict[str, Any]:
    rows = shown(survey)
    return {
        "devices": survey.devices,
        "profile": survey.profile,
        "verdict": verdict(survey),
        "rows": [(mesh_text(row), row, row.to_dict(), _sent(row)) for row in rows],
        "refused": [row for row in survey.rows if not row.fits],
        "mean_error": survey.mean_error,
        "corrections": corrections(survey.rows, survey.profile),
        "gathers": gather_lines(survey.rows),
        "sensitivity": sensitivity(survey),
        "figures": [
            ("Predicted time of a step, and its parts", _png(draw_times(rows))),
            ("Bytes that the busiest device sends in a step, by axis of the mesh", _png(draw_traffic(rows))),
            ("Memory of the fullest device", _png(draw_memory(rows, survey.profile.device.memory))),
            ("Time and memory: nothing is better in both than what lies on the line", _png(draw_pareto(rows))),
        ],
    }


def _sent(row: Row) -> float:
    traffic = {} if row.facts is None else bytes_on_wire(row.facts)
    return sum(size for kinds in traffic.values() for size in kinds.values())


def shown(survey: Survey) -> list[Row]:
    """Return the strategies with a prediction, the quickest first."""
    rows = [row for row in survey.rows if row.facts is not None and row.prediction is not None]
    return sorted(rows, key=lambda row: (not row.fits, row.seconds))[:MOST_ROWS]


def _bars(rows: Sequence[Row]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 0.8 + 0.3 * max(len(rows), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), [mesh_text(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def draw_times(rows: Sequence[Row]) -> Figure:
    """Draw the parts of each step as bars, and what was measured as a mark."""
    figure, axes = _bars(rows)
    left = [0.0] * len(rows)
    for (name, label), colour in zip(PARTS, COLOURS, strict=False):
        values = [1e3 * getattr(row.prediction, name) for row in rows]
        axes.barh(range(len(rows)), values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    seen = [(1e3 * row.measured_s, place) for place, row in enumerate(rows) if row.measured_s]
    if seen:
        axes.plot(*zip(*seen, strict=True), "k|", markersize=12, markeredgewidth=2, label="measured")
    axes.set_xlabel("milliseconds")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_traffic(rows: Sequence[Row]) -> Figure:
    """Draw the bytes on the wire as bars, one colour for each axis of the mesh."""
    figure, axes = _bars(rows)
    found = [bytes_on_wire(row.facts) if row.facts is not None else {} for row in rows]
    names = sorted({axis for one in found for axis in one})
    left = [0.0] * len(rows)
    for number, axis in enumerate(names):
        values = [sum(one.get(axis, {}).values()) / 1e6 for one in found]
        axes.barh(range(len(rows)), values, left=left, color=COLOURS[number % len(COLOURS)], label=axis)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("megabytes")
    if names:
        axes.legend(frameon=False, fontsize=8, title="axis", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_memory(rows: Sequence[Row], memory: float) -> Figure:
    """Draw parameters, moments and everything else as bars beside the memory of a device."""
    figure, axes = _bars(rows)
    left = [0.0] * len(rows)
    names = ("params_bytes_per_device", "optimizer_bytes_per_device", "activation_bytes_per_device")
    values = [row.to_dict() for row in rows]
    for name, label, colour in zip(
        names, ("parameters", "optimiser", "activations and the rest"), COLOURS, strict=False
    ):
        sizes = [one[name] / 1e9 for one in values]
        axes.barh(range(len(rows)), sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if max(left, default=0.0) > memory / 4e9:
        axes.axvline(memory / 1e9, color="#e45756", label="memory of a device")
    axes.set_xlabel("gigabytes")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_pareto(rows: Sequence[Row]) -> Figure:
    """Draw time against memory, and the line of strategies that none beats in both."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(row.to_dict()["peak_bytes_per_device"] / 1e9, 1e3 * row.seconds, mesh_text(row)) for row in rows]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color=COLOURS[0])
    front: list[tuple[float, float]] = []
    for x, y, name in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
            axes.annotate(name, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=COLOURS[1])
    axes.set(xlabel="gigabytes of the fullest device", ylabel="milliseconds of a step")
    axes.grid(alpha=0.3)
    return figure


def draw_scaling(curves: Sequence[Curve]) -> Figure:
    """Draw step time, rate, efficiency, bytes, memory and the cost of an epoch over the number of devices."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplots(3, 2)
    priced = any(point.epoch_cost is not None for curve in curves for point in curve.points)
    cost = ("epoch_cost", "cost of an epoch") if priced else ("epoch_device_hours", "device hours of an epoch")
    wanted = (
        ("step_s", "milliseconds of a step", 1e3, "log"), ("images_per_s", "images a second", 1.0, "log"),
        ("efficiency", "efficiency", 1.0, "linear"), ("sent_bytes", "megabytes sent in a step", 1e-6, "log"),
        ("peak_bytes", "gigabytes of memory", 1e-9, "log"), (*cost, 1.0, "log"),
    )  # fmt: skip
    for axes, (name, label, factor, scale) in zip(panels.flat, wanted, strict=True):
        for number, curve in enumerate(curves):
            if curve.points:
                x = [point.devices for point in curve.points]
                y = [factor * getattr(point, name) for point in curve.points]
                axes.plot(x, y, "o-", markersize=3, color=COLOURS[number % len(COLOURS)], label=curve.strategy)
        axes.set_xscale("log", base=2)
        axes.set_yscale(scale)
        axes.set(xlabel="devices", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[1, 0].set_ylim(0, 1.05)
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    # no software version or date in the file: the same survey gives the same page
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
