"""The dry run: a plan as text, for the person who decides whether to start it."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from ingest.plan.candidates import Drop
from ingest.plan.overviews import count_overviews
from ingest.plan.task import Recipe, ShardTask
from zarr_store.grid import Grid
from zarr_store.notebook import facts_table
from zarr_store.printable import one_line

__all__ = ["describe", "human_bytes", "plan_table"]

_MAX_LINES = 12
"""Largest number of lines that a list shows."""


class Described(Protocol):
    """The parts of a plan that the dry run shows; `ingest.plan.plan.Plan` has them."""

    @property
    def digest(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def recipes(self) -> tuple[Recipe, ...]: ...
    @property
    def items(self) -> Mapping[str, tuple[Mapping[str, Any], ...]]: ...
    @property
    def tasks(self) -> tuple[ShardTask, ...]: ...
    @property
    def drops(self) -> tuple[Drop, ...]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    @property
    def reasons(self) -> tuple[str, ...]: ...
    @property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]: ...


def describe(plan: Described) -> str:
    """Describe a plan: its grid and why, dates, shards, sources, sizes, verdicts, dropped scenes and warnings."""
    grid = plan.grid
    west, south, east, north = grid.lonlat_bounds()
    lines = [
        f"plan {plan.digest[:12]}" + (f" of {plan.source}" if plan.source else ""),
        f"grid      {grid}",
        f"          x {grid.bounds[0]:.10g} … {grid.bounds[2]:.10g}, y {grid.bounds[1]:.10g} … {grid.bounds[3]:.10g}"
        f"; lon {west:.4f} … {east:.4f}, lat {south:.4f} … {north:.4f}",
        *(f"          {reason}" for reason in plan.reasons),
    ]
    for recipe in plan.recipes:
        lines += _collection(plan, recipe)
    lines += _listed("left out", [f"{d.collection} {d.item_id}: {d.reason}" for d in plan.drops])
    lines += _listed("mind", list(plan.warnings))
    return "\n".join(one_line(line) for line in lines)


def plan_table(plan: Described) -> str:
    """Return the plan as an HTML table for notebooks, with the whole dry run below it."""
    rows: list[tuple[str, object]] = [("source", plan.source), ("grid", plan.grid)]
    for recipe in plan.recipes:
        spec, statistics = recipe.spec, plan.statistics.get(recipe.spec.collection, {})
        first, last = (spec.times[at].partition("T")[0] for at in (0, -1))
        rows += [
            ("collection", f"{spec.collection}: {len(plan.items[spec.collection])} scenes"),
            ("dates", f"{len(spec.times)}, {first} … {last}"),
            ("bands", ", ".join((*spec.band_names, *spec.class_layers))),
            ("shards", f"{spec.shard_count} of up to {'×'.join(map(str, spec.layout.shard))} (time×y×x)"),
            ("effort", f"read about {human_bytes(statistics.get('bytes_to_read', 0))}, write about "
                       f"{human_bytes(statistics.get('bytes_to_write', 0))}"),
        ]  # fmt: skip
    rows += [("left out", len(plan.drops) or ""), ("mind", "\n".join(plan.warnings[:_MAX_LINES]))]
    table = facts_table(f"Plan {plan.digest[:12]}", rows)
    return f"{table}<details><summary>the dry run</summary><pre>{html.escape(describe(plan))}</pre></details>"


def _collection(plan: Described, recipe: Recipe) -> list[str]:
    spec = recipe.spec
    statistics = plan.statistics.get(spec.collection, {})
    tasks = [task for task in plan.tasks if task.collection == spec.collection]
    per_shard = [len(task.sources) for task in tasks]
    empty = sum(count == 0 for count in per_shard)
    verdicts = Counter(entry["verdict"] for entry in statistics.get("offset_verdicts", {}).values())
    rows = plan.items[spec.collection]
    offsets = Counter(row["dn_offset"] for row in rows)
    by_step = Counter(row["step"] for row in rows)
    times = [f"{time.replace('T', ' ')} ({by_step[step]} scenes)" for step, time in enumerate(spec.times)]
    shown = times if len(times) <= _MAX_LINES else [*times[:5], f"… {len(times) - 10} more …", *times[-5:]]
    mask = (
        f"{recipe.mask_layer} classes {', '.join(map(str, recipe.mask_classes))}"
        + (f", grown by {recipe.mask_dilate_m:g} m" if recipe.mask_dilate_m else "")
        if recipe.mask_layer
        else "none"
    )
    layers = f" + {', '.join(spec.class_layers)}" if spec.class_layers else ""
    lines = [
        f"{spec.collection}",
        f"  bands     {', '.join(spec.band_names)}{layers} ({recipe.dtype}); mask {mask}",
        *([f"  indices   {', '.join(f'{i.name} = {i.formula}' for i in spec.derived)}"] if spec.derived else []),
        *([f"  reduced   {spec.reduce} of the clear observations of each step"] if spec.reduce != "first" else []),
        *(["  clipped   pixels outside the geometry have no data"] if recipe.clip else []),
        f"  dates     {len(times)}: {shown[0]}",
        *(f"            {time}" for time in shown[1:]),
        f"  shards    {len(tasks)} of up to {'×'.join(map(str, spec.layout.shard))} (time×y×x), chunks "
        f"{'×'.join(map(str, spec.layout.chunk))}; {min(per_shard)}…{max(per_shard)} scenes each"
        + (f"; {empty} of them hold nothing and cost no file" if empty else ""),
        f"  sources   {len(rows)} scenes; resampled pixels {statistics.get('resampled_share', 0.0):.1%}",
    ]
    if statistics.get("overviews"):
        lines.append(f"  overviews {count_overviews(statistics['overviews'])}")
    if recipe.dtype == "uint16":
        applied = ", ".join(f"{offset:+d} on {count}" for offset, count in sorted(offsets.items()))
        judged = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        lines.append(f"  offset    {applied} scenes ({judged})")
    lines.append(
        f"  effort    read about {human_bytes(statistics.get('bytes_to_read', 0))} in {statistics.get('requests', 0)} "
        f"requests, write about {human_bytes(statistics.get('bytes_to_write', 0))}"
    )
    return lines


def _listed(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    rest = len(entries) - _MAX_LINES
    more = [f"  … and {rest} more"] if rest > 0 else []
    return [f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries[:_MAX_LINES]), *more]


def human_bytes(count: float) -> str:
    """Return a size in bytes as text with a unit.

    >>> human_bytes(1536 * 1024)
    '1.5 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
