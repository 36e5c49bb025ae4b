"""Sketches of the strategies for docs/survey.md; that of the pipeline shows the schedules that training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxtrain.parallel.schedule import order_of, trace

BLUE, ORANGE, GREEN, RED, GREY = "#4c78a8", "#f58518", "#54a24b", "#e45756", "#d9d9d9"


def _sheet(height: float = 2.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 16), ylim=(0, 2 * height))
    return figure, axes


def _box(axes: Any, x: float, y: float, w: float, h: float, colour: str, text: str = "", **more: Any) -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor="white", **more))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=7)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "", both: bool = True) -> None:
    style = {"arrowstyle": "<->" if both else "->", "color": "black", "lw": 1.0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.18, text, ha="center", va="bottom", fontsize=7)


def sketch_data() -> Figure:
    """Two devices, each with all parameters and a half of the windows."""
    figure, axes = _sheet()
    for number, left in enumerate((1.0, 9.5)):
        axes.text(left, 4.0, f"device {number}", fontsize=8)
        for window in range(4):
            _box(axes, left + 0.8 * window, 2.8, 0.7, 0.8, GREY, str(4 * number + window))
        axes.text(left + 3.4, 3.1, "windows", fontsize=7)
        _box(axes, left, 1.2, 3.1, 1.1, BLUE, "all parameters, all moments")
    _arrow(axes, (4.3, 1.7), (9.3, 1.7), "all-reduce of the gradient")
    return figure


def sketch_zero() -> Figure:
    """What each of two devices holds of parameters and moments."""
    figure, axes = _sheet()
    for column, (name, halves) in enumerate((("zero = 0", (0, 0)), ("zero = 1", (0, 1)), ("zero = 3", (1, 1)))):
        axes.text(1.0 + 5.2 * column, 4.0, name, fontsize=8)
        for device in range(2):
            y = 2.4 - 1.4 * device
            axes.text(0.1 + 5.2 * column, y + 0.4, f"{device}", fontsize=8)
            for kind, (split, colour) in enumerate(zip(halves, (BLUE, ORANGE), strict=True)):
                left, width = 0.6 + 5.2 * column + 2.1 * kind, 2.0
                text = ("parameters", "moments")[kind]
                _box(axes, left, y, width, 1.0, GREY)
                half = width / 2 if split else width
                _box(axes, left + (half * device if split else 0), y, half, 1.0, colour, text if not split else "half")
    return figure


def sketch_filter() -> Figure:
    """A block of two convolutions whose filters lie on two devices."""
    figure, axes = _sheet()
    for device in range(2):
        y = 2.6 - 1.8 * device
        axes.text(0.1, y + 0.4, f"device {device}", fontsize=8)
        _box(axes, 2.2, y, 1.6, 1.0, GREY, "all windows")
        _box(axes, 5.0, y, 2.4, 1.0, BLUE, f"half {device} of the\nfilters, conv 1")
        _box(axes, 8.4, y, 2.4, 1.0, GREEN, f"half {device} of the\ninputs, conv 2")
        _arrow(axes, (3.9, y + 0.5), (4.9, y + 0.5), both=False)
        _arrow(axes, (7.5, y + 0.5), (8.3, y + 0.5), both=False)
    _arrow(axes, (11.3, 3.4), (11.3, 0.9))
    axes.text(11.6, 2.1, "all-reduce of the\nblock's output", fontsize=7)
    return figure


def sketch_spatial() -> Figure:
    """One image in four parts of rows, and the rows that they borrow."""
    figure, axes = _sheet(2.6)
    for device in range(4):
        y = 4.0 - 1.15 * device
        _box(axes, 3.0, y, 5.0, 0.95, BLUE if device % 2 else GREEN, f"rows of device {device}")
        if device < 3:
            _box(axes, 3.0, y - 0.06, 5.0, 0.14, RED)
            _arrow(axes, (8.6, y + 0.35), (8.6, y - 0.65))
    axes.text(9.0, 2.6, "each convolution borrows its halo (red):\nkernel // 2 rows from each neighbour", fontsize=7)
    return figure


def sketch_pipeline() -> Figure:
    """The three schedules over four microbatches: who computes what, and when."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, name, chunks in zip(panels, ("gpipe", "1f1b", "interleaved"), (2, 2, 4), strict=True):
        orders = order_of(name, groups=2, chunks=chunks, microbatches=4)  # type: ignore[arg-type]  # one of three
        for interval in trace(orders, chunks=chunks):
            work = interval.work
            colour = BLUE if work.kind == "forward" else ORANGE
            stage = work.chunk % 2
            axes.barh(stage, interval.end - interval.start, left=interval.start, color=colour, edgecolor="white",
                      alpha=1.0 if work.chunk < 2 else 0.6)  # fmt: skip
            axes.text((interval.start + interval.end) / 2, stage, str(work.microbatch), ha="center", va="center",
                      fontsize=7)  # fmt: skip
        axes.set_yticks([0, 1], ["stage 0", "stage 1"], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=8, loc="left")
    label = "time (a forward pass takes 1, a backward pass 2; blue: forward, orange: backward)"
    panels[-1].set_xlabel(label, fontsize=8)
    return figure


def sketch_hybrid() -> Figure:
    """A mesh of eight devices: two replicas of four, each an image in halves with halved filters."""
    figure, axes = _sheet()
    for replica in range(2):
        left = 0.8 + 7.6 * replica
        axes.text(left, 4.0, f"replica {replica}: its windows", fontsize=8)
        for part in range(2):
            for half in range(2):
                text = f"rows {part}, filters {half}"
                _box(axes, left + 3.2 * half, 2.4 - 1.2 * part, 3.0, 1.0, (BLUE, GREEN)[half], text)
    axes.text(0.8, 0.5, "data = 2, space = 2, model = 2: each axis exchanges only among its own members", fontsize=7)
    return figure


def sketch_remat() -> Figure:
    """Activations that are kept, and those that are computed again."""
    figure, axes = _sheet()
    for row, (name, kept) in enumerate((("kept", (1, 1, 1, 1, 1, 1)), ("computed again", (1, 0, 0, 1, 0, 0)))):
        y = 2.8 - 1.7 * row
        axes.text(0.1, y + 0.35, name, fontsize=8)
        for layer, keep in enumerate(kept):
            _box(axes, 3.4 + 2.0 * layer, y, 1.8, 0.9, BLUE if keep else GREY, f"layer {layer}")
    axes.text(3.4, 0.5, "grey: dropped after the forward pass, computed again in the backward pass", fontsize=7)
    return figure


SKETCHES: dict[str, Callable[[], Figure]] = {
    "data": sketch_data, "zero": sketch_zero, "filter": sketch_filter, "spatial": sketch_spatial,
    "pipeline": sketch_pipeline, "hybrid": sketch_hybrid, "remat": sketch_remat,
}  # fmt: skip
