"""The table of placements: `terrashard survey examples/multimodal.toml --measure` on the simulated world.

Runs the command that a user types, on the cube of `multimodal.py`, and keeps what it says in docs/placements/; with
`--dask` on two workers of a Dask cluster of this machine. `multimodal_page.py` writes the table of docs/placements.md
from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from harness import HERE, OUT, machine
from multimodal import FULL, make_world

TABLES = HERE.parent / "docs" / "placements"
HIDDEN = ("--set", "model.alone=0", "--set", "data.modality_dropout=0.3")
"""Hidden modalities, as of a plain network: one answer a step, whose operations are those of evaluation, too."""
EXAMPLE = HERE.parent / "examples" / "multimodal.toml"


def survey(*words: str, epochs: float, side: int) -> dict[str, Any]:
    """Run the command; return its document with the seconds that it took."""
    command = [sys.executable, "-m", "cli.main", "survey", str(EXAMPLE), "--measure", "--json"]
    command += ["--epochs", f"{epochs:g}", "--set", f"data.cube={make_world(OUT, side)}", *HIDDEN, *words]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"seconds": time.perf_counter() - began, "epochs": epochs, "side": side, "machine": machine()}


def survey_on_dask(epochs: float, side: int, workers: int, port: int) -> dict[str, Any]:
    """Run the command on the workers of a Dask cluster of this machine; the same port continues an interrupted one."""
    from distributed import LocalCluster

    options: dict[str, Any] = {
        "n_workers": workers,
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "scheduler_port": port,
    }
    opened: Any = LocalCluster
    with opened(**options, dashboard_address=None) as cluster:
        return survey("--dask", cluster.scheduler_address, epochs=epochs, side=side) | {"workers": workers}


def main() -> int:
    """Run the command here or on a Dask cluster, and keep its document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dask", type=int, metavar="WORKERS", help="on a Dask cluster of so many workers")
    parser.add_argument("--port", type=int, default=0, help="port of its scheduler")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=FULL.side, help="side of the simulated world, pixels")
    options = parser.parse_args()
    size = {"epochs": options.epochs, "side": options.side}
    document = survey_on_dask(workers=options.dask, port=options.port, **size) if options.dask else survey(**size)
    name = "table-dask" if options.dask else "table"
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    for one in document["placements"]:
        seen = one.get("measured", {})
        print(f"  {one['placement']:26} {one.get('why_not') or seen.get('why_not') or seen}", flush=True)
    print(f"  {document['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
