"""Counters of this process: seconds and bytes of reading, warping, encoding and writing.

They belong to the process, so threads that read ahead of a task count too. Workers send them with every heartbeat, and
the page at `/terrashard` turns them into rates.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STAGES", "count_stage", "stage", "stage_totals"]

STAGES = ("read", "warp", "encode", "write")
"""Names of the stages, in the order in which pixels pass them."""

_totals: dict[str, list[float]] = {}
_lock = threading.Lock()


def count_stage(name: str, seconds: float, nbytes: int) -> None:
    """Add seconds and bytes to the counters of a stage."""
    with _lock:
        total = _totals.setdefault(name, [0.0, 0.0])
        total[0] += seconds
        total[1] += nbytes


@contextmanager
def stage(name: str, nbytes: int = 0) -> Iterator[None]:
    """Time a block as one stage that produces `nbytes`; a block that raises produces none."""
    begun = time.perf_counter()
    done = 0
    try:
        yield
        done = nbytes
    finally:
        count_stage(name, time.perf_counter() - begun, done)


def stage_totals() -> dict[str, list[float]]:
    """Get the [seconds, bytes] of each stage since the process began."""
    with _lock:
        return {name: list(total) for name, total in _totals.items()}
