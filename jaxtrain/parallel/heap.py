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

__all__ = ["FreedMemory", "keep_freed_memory", "process_peak_bytes", "resident_bytes", "return_freed_memory"]

# mallopt(3) and malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
_STEPS = 4
"""Steps after which the heap holds again what steps need."""
_GROWTH_BYTES = 8 << 20
"""Growth from which on free memory goes back."""
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


class FreedMemory:
    """Returns freed memory to the system when a process of many equal steps has grown, so that its peak stays put.

    Blocks of other sizes are cut from the memory that the next step needs, which then needs more: without a bound the
    heap grows with the number of steps. Only growth is answered, because what is returned must be faulted in again.

    Args:
        growth_bytes: Growth that is left alone, bytes.
    """

    def __init__(self, growth_bytes: int = _GROWTH_BYTES) -> None:
        self._growth = growth_bytes
        self._steps = 0
        self._usual = 0

    def after_step(self) -> bool:
        """Return freed memory if the process has grown since the first steps after the last time; returns whether."""
        now = resident_bytes()
        self._steps += 1
        if self._steps <= _STEPS:
            self._usual = max(self._usual, now)
        elif now > self._usual + self._growth:
            self.release()
            return True
        return False

    def release(self) -> None:
        """Return freed memory; what the process holds after the next steps is what it usually needs."""
        return_freed_memory()
        self._steps = self._usual = 0


def resident_bytes() -> int:
    """Return the memory that this process holds now, bytes; 0 where the system does not tell."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def process_peak_bytes() -> int:
    """Return the largest memory of this process so far, bytes.

    On Linux it is that of the program alone: `getrusage` begins with what the process that started it held.
    """
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
