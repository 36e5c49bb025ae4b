"""Measure the free memory of the host and of its devices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import jax

__all__ = ["free_bytes", "free_device_bytes"]


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this machine, or this container, has left; None where that is not known."""
    known = []
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found is not None:
            known.append(int(found[1]) * 1024)
    except OSError:
        pass
    try:
        limit, used = (cgroup / name for name in ("memory.max", "memory.current"))
        known.append(max(0, int(limit.read_text()) - int(used.read_text())))
    except (OSError, ValueError):  # no such limit: "max"
        pass
    return min(known, default=None)


def free_device_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Return the bytes that the fullest of some devices has left; None where they have no memory of their own."""
    left = []
    for device in devices:
        found = device.memory_stats() or {}
        if "bytes_limit" not in found:
            return None
        left.append(int(found["bytes_limit"]) - int(found.get("bytes_in_use", 0)))
    return min(left, default=None)
