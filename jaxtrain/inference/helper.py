"""`python -m jaxtrain.inference.helper FOLDER` fills a part of a map that another process holds.

It writes one line of JSON for each batch to stdout; an error is one line on stderr, and its kind the exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from zarr_store.errors import TerrashardError
from zarr_store.printable import one_line, safe_output, shown
from zarr_store.redact import redact_text

__all__ = ["helper_command", "main"]

_LINE_S = 0.5
"""Seconds between two lines of progress."""


def helper_command(folder: Path) -> list[str]:
    """Return the arguments of Python that start a helper; a launch tells it which of how many it is."""
    return ["-P", "-m", "jaxtrain.inference.helper", str(folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jaxtrain.inference.helper", description="Fill a part of a map.")
    parser.add_argument("folder", type=Path, help="folder in which the map is made")
    parsed = parser.parse_args(arguments)
    number, count = (int(os.environ.get(name, default)) for name, default in (
        ("TERRASHARD_PROCESS", "0"), ("TERRASHARD_PROCESSES", "1")))  # fmt: skip
    with safe_output():
        return _run(parsed.folder, number, count)


def _run(folder: Path, number: int, count: int) -> int:
    said = 0.0

    def on_batch(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > _LINE_S or done == total:
            said = now
            _write({"done": done, "total": total})

    try:
        from jaxtrain.inference.making import open_making
        from jaxtrain.inference.scene import help_making
        from jaxtrain.parallel.heap import keep_freed_memory, process_peak_bytes
        from jaxtrain.parallel.mesh import split_processor
        from jaxtrain.parallel.processes import start_replica

        start_replica()
        _, plan = open_making(folder)
        keep_freed_memory()
        if plan["parts"] > 1:
            split_processor(plan["parts"])
        filled = help_making(folder, (number, count), on_batch)
        _write({**asdict(filled), "peak_host_bytes": process_peak_bytes()})
    except TerrashardError as error:
        sys.stderr.write(f"{one_line(redact_text(f'error: {error}'))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:  # noqa: BLE001  whatever it is, its traceback may quote addresses
        sys.stderr.write(shown(traceback.format_exc()))
        return 1
    return 0


def _write(document: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
