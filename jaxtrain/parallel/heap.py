"""Keep the memory of a step in the process for the next step; read the peak of the process.

On a processor XLA allocates the memory of every step again, some hundred megabytes. The C library takes
blocks of that size from the system and gives them back, so that each step faults in every page again: a quarter of a
step of the default U-Net.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["keep_freed_memory", "process_peak_bytes", "return_freed_memory"]

# mallopt(3) and malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
_BY_USER = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(environment: Mapping[str, str] | None = None) -> bool:
    """Ask the C library to keep what is freed, in one arena, and return whether it will.

    Call it before anything touches a device: threads that have an arena of their own keep it, and an arena other than
    the first cannot hold a block as large as a step's. What the process holds then is the most that it ever needed.
    Where the C library is not glibc, or the environment has settings for it, all stays as it is.
    """
    env = os.environ if environment is None else environment
    if any(name in env for name in _BY_USER):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    return all(set_option(option, value) == 1 for option, value in wanted)


def return_freed_memory() -> None:
    """Return what is free in the middle of the heap to the system, where the C library can.

    After many allocations of many sizes the free blocks lie between others, and the heap grows although less is in use.
    What the next step needs is faulted in again, so call it between large pieces of work and not between steps.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def process_peak_bytes() -> int:
    """Return the largest memory of this process so far, bytes.

    On Linux it is that of the program alone: `getrusage` begins with what the process that started it held.
    """
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
