"""The part of a report about unequal replicas: the share and speed of each, and who joined and left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.hetero.history import read_events

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReplicaRow", "draw_shares", "list_changes", "list_replicas"]

_MOST_CHANGES = 40
"""Changes of the group that a report lists."""


@dataclass(frozen=True)
class ReplicaRow:
    """One replica of a run.

    Attributes:
        name: Its name.
        steps: Steps in which it was a member.
        share: Its part of all chunks of these steps.
        rate: Median of the windows that it computed in a second, without waiting; None if it never computed any.
        waiting: Part of the time in which it waited for others; None if not known.
    """

    name: str
    steps: int
    share: float
    rate: float | None
    waiting: float | None


def list_replicas(steps: Sequence[Mapping[str, Any]]) -> list[ReplicaRow]:
    """Return a row for each replica from the lines of a history; none of a run without replicas."""
    rows = []
    shared = [line for line in steps if line.get("shares")]
    for name in dict.fromkeys(name for line in shared for name in line["shares"]):
        mine = [line for line in shared if name in line["shares"]]
        rates = [line["rates"][name] for line in mine if name in line["rates"]]
        timed = [line for line in mine if line.get("seconds") and name in line["waiting"]]
        spent = sum(line["seconds"] for line in timed)
        rows.append(
            ReplicaRow(
                name,
                len(mine),
                sum(line["shares"][name] for line in mine) / sum(sum(line["shares"].values()) for line in mine),
                statistics.median(rates) if rates else None,
                min(1.0, sum(line["waiting"][name] for line in timed) / spent) if spent else None,
            )
        )
    return sorted(rows, key=lambda row: row.name)


def list_changes(run: Path) -> list[dict[str, Any]]:
    """Return the recorded changes of the group, without those of shares alone; the last of many."""
    return [event for event in read_events(run) if event["event"] != "shares"][-_MOST_CHANGES:]


def draw_shares(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the chunks that each replica computed in each step, one on top of the other."""
    shared = [line for line in steps if line.get("shares")]
    names = sorted({name for line in shared for name in line["shares"]})
    x = np.array([line["step"] for line in shared])
    y = np.array([[line["shares"].get(name, 0) for line in shared] for name in names], float)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(x, y, labels=names, step="post", alpha=0.85)
    axes.set(xlabel="step", ylabel="chunks", xlim=(x[0], max(x[-1], x[0] + 1)))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
