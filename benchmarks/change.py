"""Breaks compared with COLD of pyxccd, on the same simulated pixels: dates, false breaks, and pixels a second.

    python benchmarks/change.py
    PYXCCD_PYTHON=/path/to/python python benchmarks/change.py   # COLD in an environment of its own

Pixels have five bands and 150 dates in five years: 30 % of the dates are under cloud, 5 % of those are missed by the
mask, and half of the pixels have a planted break. COLD runs with its defaults; its blue band is a copy of the first
band, its thermal band one constant. Without pyxccd the figures of ours alone are shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PIXELS, DATES, BANDS = 1000, 150, 5
TOLERANCE = 6
"""Clear dates within which two breaks count as near: those that decide a break. Neither COLD nor pyxccd states one."""
HALF_YEAR = 183
"""Days within which the authors of COLD count a break as right (VZA-COLD; Li et al. 2022)."""


def series(pixels: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Days, values (time, band, pixel), and the first clear day after the planted break, nan in the second half."""
    rng = np.random.default_rng(seed)
    days = np.sort(rng.choice(np.arange(5 * 365), DATES, replace=False)).astype(float)
    size = (BANDS, pixels)
    turn = 2 * np.pi / 365.2425 * days[:, None, None]
    course = rng.uniform(0.02, 0.1, size) * np.cos(turn + rng.uniform(-0.3, 0.3, size))
    values = rng.uniform(0.1, 0.4, size) + course + rng.normal(0, 0.01, (DATES, *size))
    planted = np.full(pixels, np.nan)
    planted[: pixels // 2] = rng.uniform(600, 1400, pixels // 2)
    step = rng.choice([-1, 1], size) * rng.uniform(0.05, 0.1, size)
    values += np.where(days[:, None] >= planted, 1, 0)[:, None] * step
    clear = rng.random((DATES, pixels)) < 0.7
    missed = ~clear & (rng.random((DATES, pixels)) < 0.05)
    values = np.where(clear[:, None], values, np.nan)
    values = np.where(missed[:, None], 0.6, values)
    there = np.isfinite(values[:, 0]) & (days[:, None] >= planted)
    first = np.where(there.any(axis=0), days[there.argmax(axis=0)], np.nan)
    return days, values.astype(np.float32), first


def cold(path: Path) -> None:
    """Dates of the breaks of COLD, as JSON; run by the Python that has pyxccd."""
    from pyxccd import cold_detect

    with np.load(path) as file:
        days, values = file["days"], file["values"]
    base, found = 730_000, []
    began = time.process_time()
    for pixel in range(values.shape[2]):
        there = np.isfinite(values[:, 0, pixel])
        when = (days[there] + base).astype(np.int64)
        bands = [np.ascontiguousarray(np.rint(values[there, band, pixel] * 10_000).astype(np.int64)) for band in
                 range(BANDS)]  # fmt: skip
        constant, clear = np.full(len(when), 2980, np.int64), np.zeros(len(when), np.int64)
        records = cold_detect(when, bands[0], *bands, constant, clear)
        found.append(
            [int(one["t_break"]) - base for one in records if one["t_break"] > 0 and one["change_prob"] == 100]
        )
    print(json.dumps({"breaks": found, "seconds": time.process_time() - began}))


def run_cold(days: npt.NDArray[Any], values: npt.NDArray[Any]) -> dict[str, Any] | None:
    python = os.environ.get("PYXCCD_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import pyxccd"], check=False, capture_output=True).returncode:
        print(f"  COLD skipped: {python} has no pyxccd; install it there, or set PYXCCD_PYTHON")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "series.npz")
        np.savez(path, days=days, values=values)
        done = subprocess.run([python, __file__, "--cold", str(path)], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def nearest(breaks: list[list[int]], wanted: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The break of each pixel that is nearest to a wanted day, nan for none."""
    return np.array([min(some, key=lambda day: abs(day - near)) if some else np.nan
                     for some, near in zip(breaks, wanted, strict=True)])  # fmt: skip


def steps_apart(days: npt.NDArray[Any], values: npt.NDArray[Any], one: Any, other: Any) -> npt.NDArray[Any]:
    """Clear dates between two days of each pixel; inf where one is missing."""
    apart = np.full(len(one), np.inf)
    for pixel in np.flatnonzero(np.isfinite(one) & np.isfinite(other)):
        clear = days[np.isfinite(values[:, 0, pixel])]
        apart[pixel] = abs(int(np.searchsorted(clear, one[pixel])) - int(np.searchsorted(clear, other[pixel])))
    return apart


def percent(holds: Any) -> float:
    return 100 * float(np.mean(holds))


def main() -> int:
    if sys.argv[1:2] == ["--cold"]:
        cold(Path(sys.argv[2]))
        return 0
    from harness import Row, arguments, publish

    from jaxtrain.tasks.harmonic import HarmonicModel, detect_breaks

    asked = arguments(__doc__ or "")
    days, values, first = series(PIXELS, 0)
    half, model = PIXELS // 2, HarmonicModel()
    detect_breaks(days, values, model)  # compiles
    began = time.process_time()
    found = detect_breaks(days, values, model)
    seconds = time.process_time() - began
    ours = [[int(day) for day in found.day[:, pixel] if np.isfinite(day)] for pixel in range(PIXELS)]
    sides, rates = {"terrashard": ours}, {"terrashard": PIXELS / seconds}
    if (peer := run_cold(days, values)) is not None:
        sides["COLD"], rates["COLD"] = peer["breaks"], PIXELS / peer["seconds"]
    rows, dates, right = [], {}, {}
    for name, breaks in sides.items():
        dates[name] = nearest(breaks[:half], first[:half])
        exact = right[name] = steps_apart(days, values, dates[name], first[:half]) == 0
        rows += [
            Row(f"{name}: break at the first clear date after the planted one, %", percent(exact)),
            Row(f"{name}: pixels without a break that have one, %", percent([len(b) > 0 for b in breaks[half:]])),
            Row(f"{name}: pixels with a break that have more than one, %",
                percent([len(b) > 1 for b in breaks[:half]])),
            Row(f"{name}: pixels for a second of the processor", rates[name]),
        ]  # fmt: skip
    if peer is not None:
        apart = steps_apart(days, values, dates["terrashard"], dates["COLD"])
        rows += [
            Row("same date as COLD, % of planted breaks", percent(apart == 0), 95.0),
            Row("same date as COLD, % of the breaks that COLD dates right", percent(apart[right["COLD"]] == 0)),
            Row("COLD right, or both wrong, %: no more can agree", percent(right["COLD"] | ~right["terrashard"])),
            Row(f"within {TOLERANCE} clear dates of COLD, % of planted", percent(apart <= TOLERANCE), 95.0),
            Row("within half a year of COLD, % of planted",
                percent(np.abs(dates["terrashard"] - dates["COLD"]) <= HALF_YEAR), 95.0),
        ]  # fmt: skip
    note = f"{PIXELS} pixels, {half} with a planted break"
    rows = [Row(row.name, float(row.value), row.limit, note=note) for row in rows]
    return 0 if publish("change", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
