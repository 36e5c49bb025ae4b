"""`write_report` writes `report.html`, one file about a run: the outcome of each shard, rates, failures and causes.

The ledger has what is stored, the plan what was asked for, and `RunRecord` what only the cluster knew. The policy of
the page forbids it to load anything else. Names from catalogues are data and are escaped. Dask's own performance
report is in a frame of its own, which cannot reach the page around it.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ingest.plan.dry_run import human_bytes
from ingest.plan.outlines import outlines_of
from ingest.trust.redact import redact_text, redact_url
from ingest.worker.meters import STAGES
from zarr_store.folder import FolderStore
from zarr_store.ledger import LedgerRow, ShardIndex
from zarr_store.printable import printable
from zarr_store.read import open_cube

if TYPE_CHECKING:
    from ingest.plan.plan import Plan
    from ingest.run.loop import IngestReport
    from ingest.run.record import RunRecord
    from zarr_store.spec import CubeSpec

__all__ = ["write_report"]

STATES = ("done", "partial", "failed", "pending")
WORDS = {"done": "done", "partial": "missing a scene", "failed": "failed", "pending": "pending"}

_MOST_CELLS = 4000
"""Largest number of rectangles on a map, which a browser has to hold; with more shards several share one."""
_MOST_DATES = 400
"""Largest number of dates in a list."""
_MOST_ROWS = 2000
"""Largest number of rows in any other table."""
_SIDE_PX = 640.0
"""Longer side of a map in pixels."""


def write_report(path: str | Path, record: RunRecord, report: IngestReport) -> None:
    """Write the report on a run as one HTML file.

    Args:
        path: The file; an older one is replaced as a whole.
        record: The record that the run has filled.
        report: The report that the run returned.

    Raises:
        ValueError: No run has filled the record.
    """
    if record.plan is None:
        raise ValueError("the record has no plan: give it to `run` or `extend` before writing its report")
    folder = Path(path).absolute()
    text = _template().render(**_contents(record.plan, record, report))
    FolderStore.at(folder.parent).write(folder.name, text.encode())


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html")


class _Document(str):
    """A page of Dask, whose scripts stay as they are and whose data is safe already."""


def _printable(value: Any) -> Any:
    """Escape the characters of a template's value that a browser would obey in place of showing them."""
    return printable(value) if isinstance(value, str) and not isinstance(value, _Document) else value


def _contents(plan: Plan, record: RunRecord, report: IngestReport) -> dict[str, Any]:
    cube = open_cube(report.cube)
    keys = {(task.collection, task.index): task.key for task in plan.tasks}
    collections, failures = [], []
    for spec in plan.specs:
        rows = cube.ledger(spec.collection).rows()
        valid = {i: row for i, row in rows.items() if keys.get((spec.collection, i)) == row.key}
        collections.append(_collection(plan, spec, valid))
        failures += _failures(spec, valid)
    named = {(f["collection"], tuple(f["index"])) for f in failures}
    words = [redact_text(text) for text in report.errors]
    return {
        "state": "complete" if report.exit_code == 0 and not report.pending else "not complete",
        "cube": redact_url(report.cube),
        "written_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "facts": _summary(plan, record, report),
        "settings": [(name, _short(value)) for name, value in sorted(plan.config.items())],
        "grid": [str(plan.grid), *plan.reasons],
        "collections": collections,
        "rates": _rates(record),
        "failures": [_redacted(f) for f in failures[:_MOST_ROWS]],
        "more_failures": max(0, len(failures) - _MOST_ROWS),
        "shards_failed": len(named),
        "errors": words[:_MOST_ROWS],
        "drops": [(d.collection, d.item_id, redact_text(d.reason)) for d in plan.drops[:_MOST_ROWS]],
        "more_drops": max(0, len(plan.drops) - _MOST_ROWS),
        "warnings": [redact_text(text) for text in plan.warnings],
        "verdicts": _verdicts(plan),
        "performance": None if record.performance is None else _Document(record.performance),
        "why_none": record.why_none,
        "words": WORDS,
    }


def _summary(plan: Plan, record: RunRecord, report: IngestReport) -> list[tuple[str, str]]:
    workers, threads = record.workers
    packages = ("terrashard", "dask", "rasterio", "zarr", "tensorstore")
    return [
        ("source", redact_url(plan.source) or "not known"),
        ("plan", plan.digest[:12]),
        ("shards written", str(len(report.written))),
        ("with a scene missing", str(len(report.partial))),
        ("done before", str(len(report.skipped))),
        ("failed", str(len(report.failed))),
        ("left for later", str(report.pending)),
        ("source pixels read", f"{report.pixels_read:,}"),
        ("wall time", f"{report.seconds:.1f} s"),
        ("time on the cluster", f"{record.seconds:.1f} s"),
        ("workers", f"{workers} with {threads} threads" if workers else "none"),
        (
            "releases",
            ", ".join([f"Python {platform.python_version()}"] + [f"{name} {_release(name)}" for name in packages]),
        ),
    ]


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _short(value: Any) -> str:
    text = redact_text(value) if isinstance(value, str) else redact_text(repr(value))
    return text if len(text) <= 300 else f"{text[:299]}…"


def _redacted(failure: Mapping[str, Any]) -> dict[str, Any]:
    return {**failure, "reason": redact_text(failure["reason"])}


def _rates(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for name in [*STAGES, *sorted(set(record.stages) - set(STAGES))]:
        counted = record.stages.get(name)
        if counted is None or not (counted["seconds"] or counted["bytes"]):
            continue
        whole = name == "write" and not record.stages.get("encode", {}).get("bytes")
        rows.append(
            {
                "name": "encode and write" if whole else name,
                "bytes": human_bytes(counted["bytes"]),
                "busy": f"{counted['seconds']:.1f} s",
                "busy_rate": f"{counted['bytes'] / 1e6 / counted['seconds']:.1f} MB/s" if counted["seconds"] else "–",
                "rate": f"{counted['bytes'] / 1e6 / record.seconds:.1f} MB/s" if record.seconds else "–",
            }
        )
    return rows


def _failures(spec: CubeSpec, rows: Mapping[ShardIndex, LedgerRow]) -> list[dict[str, Any]]:
    failures = []
    for index, row in rows.items():
        if row.state == "done":
            continue
        base = {
            "collection": spec.collection,
            "index": index,
            "time": spec.times[row.region.t0].replace("T", " "),
            "state": row.state,
        }
        missing = [source for source in row.sources if source.state == "missing"]
        failures += [
            {**base, "item": s.item_id, "asset": s.asset or "", "reason": s.reason or "unreadable"} for s in missing
        ]
        if not missing:
            failures.append({**base, "item": "", "asset": "", "reason": "the shard could not be made; see the errors"})
    return failures


def _verdicts(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for collection, facts in plan.statistics.items():
        entries = facts.get("offset_verdicts", {})
        rows.append(
            {
                "collection": collection,
                "counts": sorted(Counter(str(entry.get("verdict")) for entry in entries.values()).items()),
                "items": [
                    (item, entry.get("verdict"), entry.get("dn_offset"), entry.get("evidence") or "")
                    for item, entry in list(entries.items())[:_MOST_ROWS]
                ],
                "more": max(0, len(entries) - _MOST_ROWS),
            }
        )
    return [entry for entry in rows if entry["items"]]


def _collection(plan: Plan, spec: CubeSpec, rows: Mapping[ShardIndex, LedgerRow]) -> dict[str, Any]:
    states = {index: rows[index].state if index in rows else "pending" for index in spec.shards()}
    by_time: dict[int, Counter[str]] = {}
    for (t, _, _), state in states.items():
        by_time.setdefault(t, Counter())[state] += 1
    dates = [
        {"time": spec.times[t * spec.layout.shard[0]].replace("T", " "), "parts": _parts(by_time[t])}
        for t in sorted(by_time)
    ]
    counts = Counter(states.values())
    west, south, east, north = spec.grid.lonlat_bounds()
    return {
        "name": spec.collection,
        "kind": spec.kind,
        "counts": [(state, counts.get(state, 0)) for state in STATES],
        "total": len(states),
        "dates": dates[:_MOST_DATES],
        "more_dates": max(0, len(dates) - _MOST_DATES),
        "lonlat": f"lon {west:.4f} … {east:.4f}, lat {south:.4f} … {north:.4f}",
        "crs": spec.grid.crs if spec.grid.crs.startswith("EPSG:") else "a CRS without a code",
        "shape": " × ".join(map(str, (*spec.shape[:1], len(spec.bands), *spec.shape[1:]))),
        "map": _map(plan, spec, states),
    }


def _parts(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """List the shares of a stacked bar that are not empty."""
    total = sum(counts.values())
    return [
        {"state": state, "count": counts[state], "share": counts[state] / total}
        for state in STATES
        if counts.get(state)
    ]


def _map(plan: Plan, spec: CubeSpec, states: Mapping[ShardIndex, str]) -> dict[str, Any]:
    """Make the rectangles and outlines of an SVG, in which each place is a stacked bar over all its dates."""
    _, rows, columns = spec.layout.shard
    height, width = spec.grid.shape
    ny, nx = math.ceil(height / rows), math.ceil(width / columns)
    together = max(1, math.ceil(math.sqrt(ny * nx / _MOST_CELLS)))
    cells: dict[tuple[int, int], Counter[str]] = {}
    for (_, y, x), state in states.items():
        cells.setdefault((y // together, x // together), Counter())[state] += 1
    scale = _SIDE_PX / max(width, height)
    step_y, step_x = rows * together * scale, columns * together * scale
    gap = min(1.5, 0.08 * min(step_y, step_x))
    drawn: list[dict[str, Any]] = []
    for (y, x), counts in sorted(cells.items()):
        top, left = y * step_y, x * step_x
        bottom, right = min(top + step_y, height * scale), min(left + step_x, width * scale)
        at = bottom - gap
        title = f"row {y}, column {x}: " + ", ".join(f"{counts[s]} {WORDS[s]}" for s in STATES if counts.get(s))
        for part in _parts(counts):
            tall = max(0.0, bottom - gap - top) * part["share"]
            at -= tall
            drawn.append(
                {
                    "x": left,
                    "y": at,
                    "w": max(0.0, right - left - gap),
                    "h": tall,
                    "state": part["state"],
                    "title": title,
                }
            )
    rings: Sequence[Sequence[Sequence[float]]] = outlines_of(plan, spec)
    lines = [" ".join(f"{u * width * scale:.1f},{v * height * scale:.1f}" for u, v in ring) for ring in rings]
    return {"width": width * scale, "height": height * scale, "cells": drawn, "rings": lines, "together": together}
