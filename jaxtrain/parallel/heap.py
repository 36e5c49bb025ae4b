"""Keep freed memory in the process for the next step, and read how much memory the process holds.

On a CPU, XLA allocates several hundred megabytes in every step. By default, the C library gets blocks of that size from
the system and returns them after the step. So each step faults in every page again, which takes a quarter of a step of
the default U-Net.
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
"""Number of steps after which the heap holds all memory that a step needs."""
_GROWTH_BYTES = 8 << 20
"""Growth of the process after which freed memory is returned to the system."""
_USER_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory(environment: Mapping[str, str] | None = None) -> bool:
    """Ask the C library to keep what is freed, in one arena, and return whether it will.

    Call it before anything touches a device: threads that have an arena of their own keep it, and an arena other than
    the first cannot hold a block as large as a step's. The process then keeps as much memory as it needed at its peak.
    Nothing is changed if the C library is not glibc, or if the environment has settings for it.
    """
    env = os.environ if environment is None else environment
    if any(name in env for name in _USER_VARIABLES):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    return all(set_option(option, value) == 1 for option, value in wanted)


def return_freed_memory() -> None:
    """Return freed memory inside the heap to the system, if the C library can.

    After many allocations of different sizes, freed blocks lie between used ones, and the heap is larger than the
    memory in use. The next step must fault its memory in again, so call this between large pieces of work and not
    between steps.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Returns freed memory to the system whenever a process of many equal steps has grown, which bounds its peak.

    Between steps, blocks of other sizes take parts of the freed memory, so the next step needs new memory, and the heap
    grows with the number of steps. Memory is returned only after such growth, because a step must fault it in again.

    Args:
        growth_bytes: Growth that is accepted, bytes.
    """

    def __init__(self, growth_bytes: int = _GROWTH_BYTES) -> None:
        self._growth = growth_bytes
        self._steps = 0
        self._usual_bytes = 0

    def after_step(self) -> bool:
        """Return freed memory to the system if the process has grown since its first steps; return whether it had."""
        now = resident_bytes()
        self._steps += 1
        if self._steps <= _STEPS:
            self._usual_bytes = max(self._usual_bytes, now)
        elif now > self._usual_bytes + self._growth:
            self.release()
            return True
        return False

    def release(self) -> None:
        """Return freed memory now, and measure again in the next steps how much the process usually holds."""
        return_freed_memory()
        self._steps = self._usual_bytes = 0


def resident_bytes() -> int:
    """Return the memory that this process holds now, bytes; 0 if the system does not report it."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def process_peak_bytes() -> int:
    """Return the largest memory of this process so far, bytes.

    Linux reports the peak of this program alone, while the peak of `getrusage` includes that of its parent process.
    """
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
