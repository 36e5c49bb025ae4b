"""All benchmarks, one process each, then every figure that has an aim; the exit status shows whether all are met.

make bench            # a quick size
make bench FULL=1     # the sizes of the published figures
make bench SHOW=1     # measures nothing: the figures of benchmarks/results with their aims

The peers odc-stac and stackstac are not among the pinned requirements; without them their topics are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import RESULTS

TOPICS: tuple[tuple[str, ...], ...] = (
    ("store_size",),
    ("ingest_plan",),
    ("ingest_memory",),
    ("ingest_speed",),
    ("small_region",),
    ("ingest_floor",),
    ("coarse",),
    ("scale",),
    ("soak",),
    ("train_input",),
    ("train_input", "--part", "kept"),
    ("train_start",),
    ("train_step",),
    ("train_gpu",),
    ("train_parallel",),
    ("planner",),
    ("hetero_exchange",),
    ("hetero",),
    ("accuracy",),
    ("series",),
    ("tune",),
    ("inference",),
    ("multimodal",),
    ("placements",),
    ("kmeans",),
    ("anomaly",),
    ("change",),
    ("append_date",),
)
"""Scripts with their arguments, in order."""
_WITH_PEERS = ("ingest_plan", "ingest_speed", "small_region", "coarse")


def figures(newer_than: float = 0.0) -> list[tuple[str, dict[str, Any]]]:
    """(Topic and size, row) of every figure in the folder of results, from files that were written since."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.stat().st_mtime < newer_than:
            continue
        document = json.loads(path.read_text())
        rows = document.get("rows", ()) if isinstance(document, dict) else ()
        found += [(path.stem, row) for row in rows if isinstance(row, dict) and "limit" in row]
    return found


def show(rows: list[tuple[str, dict[str, Any]]]) -> int:
    """Print every figure that has an aim, and return how many do not meet it."""
    print(f"\n{'every figure with its aim':76} {'value':>9}  aim")
    missed = 0
    for topic, row in rows:
        if row["limit"] is None and not row.get("invalid"):
            continue
        missed += row["passed"] is False
        sign = "≤" if row["at_most"] else "≥"
        aim = "" if row["limit"] is None else f"{sign} {row['limit']:g}"
        verdict = "INVALID" if row.get("invalid") else "" if row["passed"] else "MISSED"
        print(f"  {topic:24} {row['name'][:48]:49} {row['value']:9.3g}  {aim:10} {verdict}".rstrip())
    print(f"{missed} missed, of {sum(row['limit'] is not None for _, row in rows)}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the sizes of the published figures; takes hours")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the figures that are published")
    asked = parser.parse_args()
    if asked.show:
        show(figures())
        return 0
    folder, began, failed = Path(__file__).resolve().parent, time.time(), []
    peers = importlib.util.find_spec("odc") and importlib.util.find_spec("odc.stac")
    for topic, *more in TOPICS:
        print(f"== {' '.join((topic, *more))}", flush=True)
        if topic in _WITH_PEERS and not peers:
            print('  left out, the peer is not installed: .venv/bin/python -m pip install "odc-stac>=0.5"')
            failed.append(f"{topic} (not measured)")
            continue
        command = [sys.executable, str(folder / f"{topic}.py"), *more, *(["--full"] if asked.full else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(" ".join((topic, *more)))
    show(figures(began))
    if failed:
        print(f"\nmissed an aim, or could not be measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
