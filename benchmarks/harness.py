"""Shared parts of all benchmarks: worlds, fair timing of both sides, and a table of ratios with their limits."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
RESULTS = HERE / "results"
BANDS = ("blue", "green", "red", "nir")
WORKERS = 2


@dataclass(frozen=True)
class Row:
    """One figure: `value` must be at least (or at most) `limit`; without a limit it is shown for its own sake.

    One that cannot be right says why in `invalid`, and never passes.
    """

    name: str
    value: float
    limit: float | None = None
    at_most: bool = False
    note: str = ""
    invalid: str = ""

    @property
    def passed(self) -> bool | None:
        if self.invalid:
            return False
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def arguments(description: str, *, parts: Sequence[str] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="the sizes of the published figures; takes long")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the median counts")
    if parts:
        parser.add_argument("--part", choices=parts, help="only this part")
    return parser.parse_args()


def world(full: bool) -> Path:
    """Catalogue of simulated scenes: 4 dates of 2048², or 6 of 4096²; made once."""
    from ingest.simulate import SimulateConfig, simulate

    side, count = (4096, 6) if full else (2048, 4)
    dates = tuple(dt.date(2022, 4, 20) + dt.timedelta(days=10 * i) for i in range(count))
    config = SimulateConfig(tiles=1, tile_px=side, overlap_px=256, dates=dates, radar_dates=())
    return simulate(OUT / f"world-{side}", config).catalog


def medians(sides: Mapping[str, Callable[[], float | None]], repeats: int) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that what else the machine does meets all of them.

    A side may return its own seconds, where it has something to leave out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            own = run()
            spent = time.perf_counter() - began if own is None else own
            if turn:  # the first turn warms imports and caches
                seconds[name].append(spent)
    for name, values in seconds.items():
        print(f"  {name:24} median {statistics.median(values):7.2f} s of {[round(v, 2) for v in values]}", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """In words, without its name."""
    load = os.getloadavg()[0]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f} at the end"
    )


def publish(topic: str, rows: Sequence[Row], *, full: bool) -> bool:
    """Print the rows, keep them under `results/`, and return whether all limits hold."""
    print(f"\n{topic} ({'full' if full else 'quick'} size; {machine()})")
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        limit = f"{sign} {row.limit:g}" if row.limit is not None else ""
        verdict = "INVALID" if row.invalid else {True: "pass", False: "FAIL", None: ""}[row.passed]
        print(f"  {row.name:58} {row.value:9.3g}  {limit:8} {verdict}  {row.invalid or row.note}")
    RESULTS.mkdir(exist_ok=True)
    document = {
        "topic": topic,
        "size": "full" if full else "quick",
        "machine": machine(),
        "rows": [_fields(row) | {"passed": row.passed} for row in rows],
    }
    (RESULTS / f"{topic}-{document['size']}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return all(row.passed is not False for row in rows)


def _fields(row: Row) -> dict[str, object]:
    """The fields of a row as they are kept; `invalid` only where it says something."""
    return {name: value for name, value in asdict(row).items() if name != "invalid" or value}
