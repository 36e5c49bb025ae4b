"""All benchmarks, one process each; the exit status says whether every limit holds.

make bench            # a quick size
make bench FULL=1     # the sizes of the published figures
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

TOPICS = (
    "store_size",
    "ingest_plan",
    "ingest_memory",
    "ingest_speed",
    "small_region",
    "train_input",
    "train_step",
    "train_gpu",
    "train_parallel",
    "planner",
    "hetero_exchange",
    "hetero",
    "accuracy",
    "series",
    "tune",
    "inference",
)


def main() -> int:
    if not importlib.util.find_spec("odc") or not importlib.util.find_spec("odc.stac"):
        print('the peer is not installed; run: .venv/bin/python -m pip install "odc-stac>=0.5"')
        return 2
    folder = Path(__file__).resolve().parent
    failed = []
    for topic in TOPICS:
        print(f"== {topic}", flush=True)
        if subprocess.run([sys.executable, str(folder / f"{topic}.py"), *sys.argv[1:]], check=False).returncode:
            failed.append(topic)
    if failed:
        print(f"\nbelow a limit, or broken: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
