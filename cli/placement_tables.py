"""Tables of placements: predictions of the planner, measurements, and bytes of an epoch over the batch size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.planner.placements import PlacementRow

__all__ = ["batch_table", "bytes_of_epoch", "measured_table", "placement_table", "placements_document"]

WIDTH = 132


def placement_table(rows: Sequence[PlacementRow], windows: int) -> str:
    """Return the planner's predictions for each placement as a table.

    Args:
        rows: The placements.
        windows: Windows of an epoch.
    """
    lines, wrong = [], []
    for row in rows:
        values = row.to_dict()
        if "why_not" in values:
            wrong.append(f"cannot be: {row.placed.name}: {row.why_not}")
            continue
        steps = max(1, round(windows / values["batch"]))
        lines.append([
            row.placed.name, str(row.placed.devices), _mega(values["bytes_step"]), _mega(values["bytes_step"] * steps),
            _mega(values["bytes_fixed"]), _kilo(values["bytes_window"]),
            " ".join(f"{flops / 1e9:.2f}" for flops in values["flops_devices"]),
            " ".join(f"{share:.0%}" for share in values["busy_devices"]),
            f"{values['peak_bytes_device'] / 1e6:.0f}", f"{1e3 * values['predicted_step_s']:.1f}",
        ])  # fmt: skip
    names = ("placement", "devices", "MB/step", "MB/epoch", "of it fixed", "kB/window", "GFLOP of each", "busy",
             "peak MB", "step ms")  # fmt: skip
    return "\n".join([_drawn("placements, predicted", names, lines), *wrong])


def batch_table(rows: Sequence[PlacementRow], windows: int) -> str:
    """Return the bytes of an epoch for several batches as a table.

    With data parallelism the bytes fall as the batch grows, because an epoch has fewer steps. With a placed network
    they hardly change.

    Args:
        rows: The placements.
        windows: Windows of an epoch.
    """
    known = [(row, values) for row in rows if row.facts is not None for values in [row.to_dict()]]
    batches = sorted({size for _, values in known for size in _batches(values["batch"])})
    lines = []
    for row, values in known:
        if values["bytes_step"]:
            lines.append([row.placed.name, *(_mega(bytes_of_epoch(values, windows, size)) for size in batches)])
    names = ("placement", *(f"batch {size}" for size in batches))
    return _drawn("MB of an epoch over the batch, predicted", names, lines)


def bytes_of_epoch(values: Mapping[str, Any], windows: int, batch: int) -> float:
    """Return the bytes of an epoch: in each step a fixed part, and a part for each window of the batch.

    >>> bytes_of_epoch({"bytes_fixed": 10.0, "bytes_window": 3.0}, windows=64, batch=16)
    232.0
    """
    steps = max(1, round(windows / batch))
    return float(steps * (values["bytes_fixed"] + values["bytes_window"] * batch))


def _batches(batch: int) -> tuple[int, ...]:
    return (batch // 2 or 1, batch, 2 * batch, 4 * batch)


def measured_table(rows: Sequence[PlacementRow], measured: Mapping[str, Mapping[str, Any]], windows: int) -> str:
    """Return the measurements of each placement as a table, next to the planner's bytes."""
    lines, wrong = [], []
    for row in rows:
        seen = measured.get(row.placed.name)
        if seen is None or "why_not" in seen:
            if seen is not None:
                wrong.append(f"not measured: {row.placed.name}: {seen['why_not']}")
            continue
        values = row.to_dict()
        told, sent = values["bytes_step"] + values["header_bytes"], seen.get("bytes_step")
        steps = max(1, round(windows / values["batch"]))
        lines.append([
            row.placed.name, _mega(told), "" if sent is None else _mega(sent),
            "" if sent is None else _mega(sent * steps), _off(told, sent),
            f"{1e3 * seen['step_s']:.1f}", " ".join(f"{share:.0%}" for share in seen["busy"]),
            f"{1e3 * seen['inference_s']:.1f}", f"{seen['train_s']:.1f}" if "train_s" in seen else "",
            _score(seen), f"{seen['train_loss']:.5f}" if "train_loss" in seen else "",
        ])  # fmt: skip
    names = ("placement", "with headers", "carried", "MB/epoch", "off", "step ms", "processor", "inference ms",
             "epochs s", "accuracy", "last loss")  # fmt: skip
    return "\n".join([_drawn("placements, measured", names, lines), *wrong])


def placements_document(
    rows: Sequence[PlacementRow], windows: int, measured: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return predictions and measurements as JSON."""
    found = []
    for row in rows:
        one = row.to_dict()
        if "batch" in one:
            one["bytes_epoch"] = one["bytes_step"] * max(1, round(windows / one["batch"]))
            one["bytes_epoch_of_batch"] = {
                str(size): bytes_of_epoch(one, windows, size) for size in _batches(one["batch"])
            }
        seen = measured.get(row.placed.name)
        found.append(one | ({} if seen is None else {"measured": dict(seen)}))
    return found


def _off(told: float, seen: float | None) -> str:
    return "" if not seen or not told else f"{told / seen - 1:+.1%}"


def _score(seen: Mapping[str, Any]) -> str:
    score = seen.get("accuracy", seen.get("r2"))
    return "" if score is None else f"{score:.4f}"


def _mega(size: float) -> str:
    return f"{size / 1e6:.3f}"


def _kilo(size: float) -> str:
    return f"{size / 1e3:.1f}"


def _drawn(title: str, names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in names:
        made.add_column(name, justify="left" if name == "placement" else "right", no_wrap=name == "placement")
    for line in lines:
        made.add_row(*line)
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None).print(made)
    return out.getvalue().rstrip()
