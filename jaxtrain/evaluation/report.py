"""Write `report.html`, one file that shows data, course and scores of a run; it loads nothing else."""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.data.arrays import Reader
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.data.windows import Windows
from jaxtrain.evaluation.gallery import Shown, collect_shown, draw_shown
from jaxtrain.evaluation.replicas import draw_shares, list_changes, list_replicas
from jaxtrain.evaluation.tiles import Tile, collect_tiles, draw_tiles, name_shown
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import ModelCard
from zarr_store.folder import FolderStore

if TYPE_CHECKING:  # matplotlib is imported by what draws: training starts without it
    from matplotlib.figure import Figure

    from jaxtrain.learn.state import Program, TrainState
    from jaxtrain.learn.step import PredictStep

__all__ = ["OtherExamples", "collect_examples", "write_report"]

_MAPS = 6
_PART_COLOURS = ("#4c78a8", "#f58518", "#54a24b")
_NOTHING = "#ececec"


@dataclass(frozen=True)
class OtherExamples:
    """Tiles of other data than the part of the run that a report is about.

    Attributes:
        name: Name of the data.
        examples: Tiles to show.
        dates: Dates of each cube; none of images.
    """

    name: str
    examples: Sequence[Tile] | Sequence[Shown]
    dates: tuple[tuple[str, ...], ...] = ()


def collect_examples(
    program: Program,
    predict: PredictStep,
    state: TrainState,
    reader: Reader,
    windows: Windows,
    names: Sequence[str],
) -> list[Tile] | list[Shown]:
    """Collect the worst windows or, for whole images, the worst predictions; every call takes the same ones.

    Args:
        program: Gives the mesh.
        predict: Result of `make_predict_step(program)`.
        state: The model.
        reader: Reads windows with labels.
        windows: Windows to choose from, usually the test part.
        names: Names of the classes.
    """
    if not len(windows):
        return []
    if reader.shows == "images" and program.objective.task.rebuild:
        return []
    if reader.shows == "images":
        return collect_shown(program, predict, state, reader, windows, names)
    return collect_tiles(program, predict, state, reader, windows)


def write_report(
    run: Path,
    card: ModelCard,
    *,
    examples: Sequence[Tile] | Sequence[Shown],
    evaluation: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    other: OtherExamples | None = None,
) -> Path:
    """Write RUN/report.html.

    Args:
        run: The run directory.
        card: Model card of the run.
        examples: Tiles of the run's own data to show.
        evaluation: Scores of the run's own data, as `evaluate` returns them.
        evaluations: All scores of the run; those that are not `evaluation` are shown in a table, by data and part.
        other: Tiles of other data or of another part.
    """
    import jinja2

    history = read_metrics(run)
    steps = [line for line in history if line["kind"] == "train"]
    validations = [line for line in history if line["kind"] == "validation"]
    intervals = [line["seconds"] for line in steps if line.get("seconds")]
    waits = [line["input_wait_s"] for line in steps if line.get("input_wait_s") is not None]
    config = card.config
    splits = card.split.by_blocks
    size = config.run.batch_size
    interval = statistics.median(intervals) if intervals else None
    counted = card.statistics["class_pixels"]
    total = max(sum(counted.values()), 1)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    html = template.render(
        title=run.name or str(run),
        card=card,
        config_json=json.dumps(config.model_dump(mode="json"), indent=1, ensure_ascii=False),
        steps_done=steps[-1]["step"] if steps else 0,
        last_validation=validations[-1] if validations else None,
        evaluation=evaluation,
        windows_per_s=size / interval if interval else None,
        pixels_per_s=size * config.data.patch**2 / interval if interval else None,
        step_ms=1000 * interval if interval else None,
        input_wait=sum(waits) / sum(intervals) if waits and intervals else None,
        bands=list(zip(card.bands, card.mean, card.std, strict=True)),
        classes=[(n, c, v, counted[n], counted[n] / total) for n, c, v in
                 zip(card.classes.names, card.classes.colours, card.classes.values, strict=True)],
        held_out=card.statistics.get("held_out", {}),
        curves=_png(_curves(steps, validations)) if steps else None,
        replicas=(replicas := list_replicas(steps)),
        shares=_png(draw_shares(steps)) if replicas else None,
        changes=list_changes(run) if replicas else [],
        efficiency=steps[-1].get("efficiency") if steps else None,
        values=card.task.values,
        confusion=_png(_confusion(evaluation)) if evaluation and evaluation["confusion_matrix"] else None,
        tiles=_draw_examples(examples, card),
        others=[scores for scores in evaluations if scores != evaluation],
        other_name=None if other is None else other.name,
        other_tiles=None if other is None else _draw_examples(other.examples, card, other.dates),
        unit=card.unit,
        shown_bands=name_shown(card.shown_bands).removeprefix("image: "),
        split_maps=[_png(_split_map(split)) for split in splits[:_MAPS]],
        cubes=[ground.cube for ground in card.grounds] or [card.cube],
        block=splits[0].block if splits else None,
        block_counts=card.split.counts(),
        leakage=_describe_leakage(card),
    )  # fmt: skip
    FolderStore(run.absolute()).write("report.html", html.encode())
    return run / "report.html"


def _draw_examples(
    examples: Sequence[Tile] | Sequence[Shown], card: ModelCard, dates: Sequence[Sequence[str]] = ()
) -> str | None:
    tiles = [example for example in examples if isinstance(example, Tile)]
    shown = [example for example in examples if isinstance(example, Shown)]
    if tiles:
        values = card.task.values
        truth = "" if card.task.rebuild else card.classes.names[0] if values else "label"
        return _png(draw_tiles(tiles, classes=None if values else card.classes, bands=card.shown_bands,
                               times=dates or card.dates, truth=truth))  # fmt: skip
    return _png(draw_shown(shown, card.shown_bands)) if shown else None


def _describe_leakage(card: ModelCard) -> str | None:
    """Describe in a sentence how near test and training samples lie; None for a cube whose windows lie in blocks."""
    leak = card.statistics.get("leakage")
    if leak is None:
        return None
    word = "The split is random, so it LEAKS: scores are too good. " if leak["leaky"] else ""
    if leak.get("dates"):
        word += f"Tested on held-out dates ({', '.join(leak['dates'])}); their ground was in training on other dates. "
    if leak.get("beside") is not None:
        return f"{word}{leak['beside']:.1%} of the test windows lie on or beside a training window of some date."
    if leak.get("touching") is not None:
        return f"{word}{leak['touching']:.1%} of the test patches hold a training pixel."
    if leak.get("share") is not None:
        return f"{word}{leak['share']:.1%} of the test samples have a training sample nearer than {leak['near_m']:g} m."
    return word or None


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    # no software version or date in the file: the same run gives the same report
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _curves(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    second = "r2" if any("r2" in line for line in steps) else "accuracy"
    for axes, name in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        x = np.array([line["step"] for line in steps])
        y = np.array([line[name] for line in steps], float)
        window = max(1, len(y) // 40)
        axes.plot(x, y, color="#4c78a8", alpha=0.25, linewidth=0.8)
        smooth = np.convolve(y, np.ones(window) / window, mode="valid")
        axes.plot(x[window - 1 :], smooth, color="#4c78a8", label="training")
        points = [(line["step"], line[name]) for line in validations if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color="#f58518", markersize=4, label="validation blocks")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _confusion(evaluation: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    names = evaluation["classes"]
    counts = np.array(evaluation["confusion_matrix"], float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.62 * len(names) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="true")
    axes.set_xticklabels(names, rotation=45, ha="right")
    axes.set_yticklabels(names)
    for i, j in np.ndindex(*share.shape):
        if counts[i, j]:
            axes.text(j, i, f"{share[i, j]:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if share[i, j] > 0.55 else "black")  # fmt: skip
    return figure


def _split_map(split: Split) -> Figure:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, columns = split.parts.shape
    width = 5.0
    height = min(9.0, max(2.0, width * rows * split.block[0] / (columns * split.block[1])))
    figure = Figure(figsize=(width, height + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(split.parts + 1, cmap=ListedColormap([_NOTHING, *_PART_COLOURS]), vmin=0, vmax=3,
                extent=(0, columns * split.block[1], rows * split.block[0], 0), interpolation="nearest")  # fmt: skip
    axes.set(xlabel="x, pixels", ylabel="y, pixels")
    handles = [Patch(color=c, label=p) for p, c in zip(PARTS, _PART_COLOURS, strict=True)]
    figure.legend(handles=[*handles, Patch(color=_NOTHING, label="nothing to learn")], loc="outside lower center",
                  ncols=4, fontsize=7, frameon=False)  # fmt: skip
    return figure
