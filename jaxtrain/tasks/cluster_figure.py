"""Draw the spectrum and the seasonal course of clusters, and the curves by which their number is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data.classes import Classes
from jaxtrain.tasks.choice import Choice
from jaxtrain.tasks.labelling import Labelled
from jaxtrain.tasks.table import Feature

__all__ = ["draw_clusters"]


def draw_clusters(
    path: Path, classes: Classes, choice: Choice | None, features: Sequence[Feature], labelled: Labelled,
    times: Sequence[str], bands: Sequence[Feature],
) -> None:  # fmt: skip
    """Draw one PNG: spectra with their spread, then the course of each band, then the curves of several k."""
    from matplotlib.figure import Figure

    course = labelled.season.size > 0
    shown = list(range(len(bands)))[:6] if course else []
    panels = 1 + len(shown) + (3 if choice else 0)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    axes = iter(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel())
    spectrum = next(axes)
    waves = [one.wavelength_um for one in features]
    known = [wave for wave in waves if wave is not None]
    x = np.array(known) if len(known) == len(waves) and len(set(known)) > 1 else np.arange(len(features), dtype=float)
    order = np.argsort(x, kind="stable")
    for at in range(len(classes)):
        mean, std = labelled.mean[at][order], labelled.std[at][order]
        label = f"{classes.names[at]} ({labelled.count[at] / max(int(labelled.count.sum()), 1):.0%})"
        spectrum.plot(x[order], mean, color=classes.colours[at], marker="o", markersize=3, label=label)
        spectrum.fill_between(x[order], mean - std, mean + std, color=classes.colours[at], alpha=0.12, linewidth=0)
    if len(features) <= 16:
        spectrum.set_xticks(x[order], [features[at].label for at in order], rotation=60, fontsize=7)
    spectrum.set_title("Mean and spread of each cluster", fontsize=9)
    spectrum.set_ylabel(_unit(features[0]))
    if len(classes) <= 20:
        spectrum.legend(fontsize=6, ncols=2)
    days = np.array([time.removesuffix("Z") for time in times], "datetime64[s]")
    for band in shown:
        panel = next(axes)
        for at in range(len(classes)):
            panel.plot(days, labelled.season[at][:, band], color=classes.colours[at], marker=".", linewidth=1)
        panel.set_title(f"{bands[band].name}, by date", fontsize=9)
        panel.tick_params(axis="x", rotation=30, labelsize=7)
    if choice:
        numbers = choice.k
        for title, values in (("inertia of a row", choice.inertia), ("silhouette", choice.silhouette),
                              ("gap", choice.gap)):  # fmt: skip
            panel = next(axes)
            panel.plot(numbers, values, marker="o", markersize=3, color="#0072b2")
            if title == "gap":
                panel.errorbar(numbers, values, yerr=choice.gap_error, color="#0072b2", linewidth=0.8)
            panel.axvline(choice.suggested, color="#d55e00", linewidth=0.8)
            panel.set_title(f"{title} by k; suggested {choice.suggested}", fontsize=9)
    for unused in axes:
        unused.set_axis_off()
    figure.savefig(path, dpi=110)


def _unit(feature: Feature) -> str:
    return {"1": "reflectance", "": ""}.get(feature.unit, feature.unit)
