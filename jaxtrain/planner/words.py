"""Describe the result of a survey in plain words: a table for a terminal, and a verdict."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from jaxtrain.planner.cost import predict
from jaxtrain.planner.profile import Profile, kind_of
from jaxtrain.planner.scaling import Curve
from jaxtrain.planner.survey import Row, Survey, bytes_as_compiled, bytes_on_wire

__all__ = [
    "corrections",
    "curve_table",
    "gather_lines",
    "mesh_text",
    "nothing_fits",
    "sensitivity",
    "sensitivity_line",
    "table",
    "verdict",
]

WIDTH = 118
MOST_GATHERS = 3
"""Gathers of one strategy that are named in a line; `--json` has all."""
FIXED = 0.25
"""Share of a step that does not grow with the batch, above which a larger batch is named."""
UNCHANGED = "Neither links of a tenth or of ten times the bandwidth nor more memory would change this."
MOVED = 0.2
"""Share by which each number of a profile is moved to see how much depends on it."""


def mesh_text(row: Row) -> str:
    """Return the mesh as `--set` would have it, such as `data=4 zero=3`."""
    if row.candidate.config is None:
        return "–"
    mesh = row.candidate.config.mesh
    parts = [f"{name}={size}" for name, size in mesh.axes.items() if size > 1]
    parts += [f"zero={mesh.zero}"] if mesh.zero else []
    parts += [f"schedule={mesh.schedule}"] if mesh.pipe > 1 else []
    parts += ["remat"] if row.candidate.config.model.remat else []
    return " ".join(parts) or "data=1"


def table(survey: Survey) -> str:
    """Return all strategies as a table for a terminal: the quickest first, then those that do not fit."""
    config = survey.network.config
    title = (
        f"{config.model.name}, batch {config.run.batch_size} of {config.data.patch} × {config.data.patch} px, "
        f"{survey.devices} devices of {survey.profile.name}"
    )
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    measured = [("measured", "error")] if survey.mean_error is not None else []
    raw = ["raw MB"] if any(row.corrected for row in survey.rows) else []
    for name in (
        "mesh",
        "step ms",
        *(name for pair in measured for name in pair),
        "compute",
        "memory",
        "exchange",
        "idle",
        "busy",
        "images/s",
        "efficiency",
        "peak GB",
        "sent MB",
        *raw,
    ):
        made.add_column(name, justify="left" if name == "mesh" else "right", no_wrap=name != "mesh")
    for row in sorted(survey.rows, key=lambda one: (not one.fits, one.seconds)):
        if row.facts is None or row.prediction is None:
            continue
        values, p = row.to_dict(), row.prediction
        sent = sum(size for kinds in bytes_on_wire(row.facts).values() for size in kinds.values())
        mark = "" if row.fits else " (does not fit)"
        times = [p.step_s, p.compute_s, p.memory_s, p.collective_s, p.idle_s]
        seen = (
            [f"{1e3 * row.measured_s:.2f}", f"{row.seconds / row.measured_s - 1:+.0%}"] if row.measured_s else ["", ""]
        )
        made.add_row(
            mesh_text(row) + mark, f"{1e3 * times[0]:.2f}", *(seen if measured else []),
            *(f"{1e3 * t:.2f}" for t in times[1:]), f"{values['busy_share']:.0%}", f"{values['images_per_s']:.0f}",
            "" if row.efficiency is None else f"{row.efficiency:.0%}",
            f"{values['peak_bytes_per_device'] / 1e9:.2f}", f"{sent / 1e6:.2f}" + ("*" if row.corrected else ""),
            *([f"{sum(bytes_as_compiled(row.facts).values()) / 1e6:.2f}"] if raw else []),
        )  # fmt: skip
    drawn, lines = _drawn(made), []
    if survey.mean_error is not None:
        lines.append(f"predictions miss the measured steps by {survey.mean_error:.1%} on average")
    lines += corrections(survey.rows, survey.profile)
    lines += gather_lines(survey.rows)
    lines += [f"cannot be: {row.candidate.strategy}: {row.why_not}" for row in survey.rows if not row.fits]
    return "\n".join([drawn, *dict.fromkeys(lines)])  # lines of the table may be equal, and each belongs to its row


def corrections(rows: Sequence[Row], profile: Profile) -> list[str]:
    """Return the corrections for the target in one line; none where nothing was corrected."""
    found = list(dict.fromkeys(text for row in rows for text in row.corrected))
    if not found:
        return []
    return [
        f"* as {profile.name} sends it, not as the programs were compiled here (raw MB): {'; '.join(found)}"
    ]  # fmt: skip


def gather_lines(rows: Sequence[Row]) -> list[str]:
    """Return one line for each strategy that gathers activations: how many, and the layers that cause it."""
    lines = []
    for row in rows:
        if row.gathers:
            more = f" and {len(row.gathers) - MOST_GATHERS} more" if len(row.gathers) > MOST_GATHERS else ""
            lines.append(f"accidental gathers of {mesh_text(row)}: {'; '.join(row.gathers[:MOST_GATHERS])}{more}")
    return lines


def curve_table(curves: Sequence[Curve]) -> str:
    """Return scaling curves as a table for a terminal; an epoch's cost is in the currency of the profile."""
    every = [point for curve in curves for point in curve.points]
    priced = any(point.epoch_cost is not None for point in every)
    made = Table(title="each replica keeps its windows", title_justify="left", box=None, pad_edge=False)
    columns = ("strategy", "devices", "batch", "step ms", "images/s", "efficiency", "sent MB", "peak GB", "epoch s")
    for name in (*columns, "device hours", *(["cost"] if priced else [])):
        made.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for curve in curves:
        for point in curve.points:
            cost = "" if point.epoch_cost is None else f"{point.epoch_cost:.2f}"
            made.add_row(
                curve.strategy + ("" if point.fits else " (does not fit)"), str(point.devices), str(point.batch),
                f"{1e3 * point.step_s:.2f}", f"{point.images_per_s:.0f}", f"{point.efficiency:.1%}",
                f"{point.sent_bytes / 1e6:.2f}", f"{point.peak_bytes / 1e9:.2f}", f"{point.epoch_s:.3g}",
                f"{point.epoch_device_hours:.3g}", *([cost] if priced else []),
            )  # fmt: skip
    lines = [_drawn(made), *(f"cannot be: {one.strategy}: {one.why_not}" for one in curves if not one.points)]
    large = [point for point in every if point.batch > round(point.epoch_s * point.images_per_s)]
    if large:
        first = min(large, key=lambda point: point.batch)
        lines.append(
            f"an epoch has {first.epoch_s * first.images_per_s:.0f} windows, fewer than the batch of {first.devices} "
            "devices: from there on an epoch is a part of a step"
        )
    return "\n".join(lines)


def _drawn(made: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, no_color=True, highlight=False, legacy_windows=False).print(made)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def verdict(survey: Survey) -> str:
    """Return the recommended strategy, the reason, its limits, and what would change the answer."""
    choice = survey.choice
    if choice is None or choice.prediction is None or choice.facts is None:
        return nothing_fits(survey)
    p = choice.prediction
    said = [f"Take {mesh_text(choice)} ({choice.candidate.strategy}): {1e3 * p.step_s:.2f} ms a step are predicted."]
    others = sorted(
        (row for row in survey.rows if row.fits and row.candidate.strategy != choice.candidate.strategy),
        key=lambda row: row.seconds,
    )
    if others:
        second = others[0]
        said.append(
            f"The quickest other strategy, {second.candidate.strategy} ({mesh_text(second)}), takes "
            f"{second.seconds / p.step_s:.2f} times as long."
        )
    parts = {"arithmetic": p.compute_s - p.launch_s, "starting instructions": p.launch_s, "memory traffic": p.memory_s,
             "exchange between devices": p.collective_s, "waiting of stages": p.idle_s}  # fmt: skip
    name, seconds = max(parts.items(), key=lambda part: part[1])
    said.append(f"What limits it is {name}: {seconds / max(p.step_s, 1e-12):.0%} of the step.")
    if choice.corrected:
        raw, sent = (sum(one.values()) for one in (bytes_as_compiled(choice.facts), _sent(choice)))
        said.append(
            f"It sends {sent / 1e6:.2f} MB a step as {survey.profile.name} does it, and {raw / 1e6:.2f} MB as compiled "
            f"here ({'; '.join(choice.corrected)})."
        )
    if choice.gathers:
        said.append(f"It gathers activations, which no sound strategy does: {gather_lines([choice])[0]}.")
    said += _changes(survey)
    return " ".join(said)


def nothing_fits(survey: Survey) -> str:
    """Return one line with the reason of each strategy, and what would fit."""
    reasons: dict[str, list[str]] = {}
    for row in survey.rows:
        names = reasons.setdefault(row.why_not, [])
        if row.candidate.strategy not in names:
            names.append(row.candidate.strategy)
    told = [f"{names[0]}: {why}" + (f" (so {', '.join(names[1:])})" if names[1:] else "")
            for why, names in reasons.items()]  # fmt: skip
    return f"no strategy fits {survey.devices} devices. {' · '.join(told)}{_ways_out(survey)}"


def _ways_out(survey: Survey) -> str:
    """Return numbers of devices and a batch that can be divided; nothing where the batch is not what is in the way."""
    batch, n = survey.network.config.run.batch_size, survey.devices
    if batch % n == 0:
        return ""
    below = max(one for one in range(1, n) if batch % one == 0)
    above = next((one for one in range(n + 1, batch + 1) if batch % one == 0), None)
    numbers = f"{below} or {above} devices divide" if above else f"{below} devices divide"
    return f". The batch of {batch} is what {numbers}; {n} devices divide one of {n * math.ceil(batch / n)}"


def _sent(row: Row) -> dict[str, float]:
    traffic = {} if row.facts is None else bytes_on_wire(row.facts)
    return {axis: sum(kinds.values()) for axis, kinds in traffic.items()}


def sensitivity(survey: Survey) -> dict[str, float]:
    """Return by how much the choice's step changes, as a share, when each number of the profile is 20 % lower.

    A machine that was measured has seconds in place of rates; they are as much longer.
    """
    choice = survey.choice
    if choice is None or choice.facts is None:
        return {}
    precision = survey.network.config.model.precision
    before = predict(choice.facts, survey.profile, precision).step_s
    found = {}
    for name, lower in _lowered(survey.profile, 1 - MOVED).items():
        found[name] = predict(choice.facts, lower, precision).step_s / before - 1
    return found


def sensitivity_line(survey: Survey) -> str:
    """Return the sensitivity in one line, the largest first; empty where no strategy fits."""
    moved = sorted(sensitivity(survey).items(), key=lambda one: -abs(one[1]))
    if not moved:
        return ""
    parts = [f"{name} {share:+.1%}" for name, share in moved if abs(share) >= 0.0005]
    rest = "" if len(parts) == len(moved) else "; the others nothing"
    return f"with one number of the machine 20 % lower, the step changes by: {', '.join(parts)}{rest}"


def _lowered(profile: Profile, factor: float) -> dict[str, Profile]:
    device = profile.device

    def with_device(**values: object) -> Profile:
        return profile.model_copy(update={"device": device.model_copy(update=values)})

    if device.measured:
        kinds = {
            kind: with_device(**{
                field: {name: one.times(1 / factor) if kind_of(name) == kind else one for name, one in curves.items()}
                for field, curves in (("measured", device.measured), ("busy", device.busy))
            })
            for kind in dict.fromkeys(map(kind_of, device.measured))
        }  # fmt: skip
        exchanges = {
            kind: profile.model_copy(update={"exchanges": {**profile.exchanges, kind: curve.times(1 / factor)}})
            for kind, curve in profile.exchanges.items()
        }
        return kinds | exchanges
    links = [link.model_copy(update={"bandwidth": link.bandwidth * factor}) for link in profile.links]
    late = [link.model_copy(update={"latency": link.latency * factor}) for link in profile.links]
    return {
        "peak": with_device(peak={name: value * factor for name, value in device.peak.items()}),
        "bandwidth": with_device(bandwidth=device.bandwidth * factor),
        "elementwise": with_device(elementwise=device.elementwise * factor),
        "launch": with_device(launch=device.launch * factor),
        "links": profile.model_copy(update={"links": tuple(links)}),
        "latency": profile.model_copy(update={"links": tuple(late)}),
    }


def _changes(survey: Survey) -> list[str]:
    """Return the sentences on what would change the answer."""
    now = survey.choice
    assert now is not None
    profile, precision = survey.profile, survey.network.config.model.precision
    links = {
        factor: tuple(link.model_copy(update={"bandwidth": link.bandwidth * factor}) for link in profile.links)
        for factor in (0.1, 10.0)
    }
    said = []
    for factor, word in ((0.1, "a tenth of"), (10.0, "ten times")):
        other = profile.model_copy(update={"links": links[factor]})
        rows = [
            replace(row, prediction=predict(row.facts, other, precision)) if row.facts is not None else row
            for row in survey.rows
        ]
        changed = replace(survey, profile=other, rows=tuple(rows)).choice
        if changed is not None and mesh_text(changed) != mesh_text(now):
            said.append(f"With {word} the bandwidth between devices it would be {mesh_text(changed)}.")
    large = [row for row in survey.rows if row.facts is not None and not row.fits and row.seconds < now.seconds]
    if large:
        quickest = min(large, key=lambda row: row.seconds)
        need = quickest.to_dict()["peak_bytes_per_device"] / 1e9
        said.append(f"With {need:.1f} GB of usable memory on each device it would be {mesh_text(quickest)}.")
    batch = survey.network.config.run.batch_size
    if batch % survey.devices:
        said.append(f"With a batch that {survey.devices} divides (now {batch}), mesh.data = {survey.devices} could be.")
    p, alone = now.prediction, now.candidate.mesh.size == now.candidate.mesh.data
    fixed = 0.0 if p is None else (p.launch_s + (p.collective_s if alone else 0.0)) / max(p.step_s, 1e-12)
    if fixed > FIXED:
        more = f"A larger run.batch_size would use the devices better: {fixed:.0%} of the step does not grow with it."
        return [*(said or [UNCHANGED]), more]
    return said or [UNCHANGED]
