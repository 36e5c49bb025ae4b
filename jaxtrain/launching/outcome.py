"""`Outcome` is the result of a launch: how its processes ended, and what that says about the run."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FINAL", "INTERRUPTED", "LOST", "PREEMPTED", "Outcome", "describe", "first_cause", "restart_wanted"]

PREEMPTED, INTERRUPTED = 75, 130
LOST = 255
"""Exit code of a process whose machine cannot be reached, as `ssh` itself gives it."""
FINAL = (2, 4, 5, 6, 7, PREEMPTED, INTERRUPTED)
"""Exit codes after which a restart is useless: the cause stays, or the user has asked for the end."""


@dataclass(frozen=True)
class Outcome:
    """The result of a launch.

    Attributes:
        exit_code: 0, or that of the process that ended first with another.
        restarts: Number of restarts.
        codes: Exit code of each process in the last attempt; negative is a signal.
    """

    exit_code: int
    restarts: int
    codes: tuple[int, ...]


def restart_wanted(code: int) -> bool:
    """Return whether a run with this exit code may succeed when it is started again."""
    return code != 0 and code not in FINAL


def first_cause(codes: Sequence[int]) -> int:
    """Return the exit code that explains the others: a code of a known error, else any that is not 0."""
    known = [code for code in codes if code in FINAL]
    others = [code for code in codes if code]
    return (known or others or [0])[0]


def describe(codes: Sequence[int], names: Sequence[str] | None = None) -> str:
    """Describe in words how processes ended.

    >>> describe([-9, 1])
    'process 0 was killed by SIGKILL, process 1 ended with code 1'
    >>> describe([0, 7], ["gpu-a", "gpu-b"])
    'process gpu-b ended with code 7'
    """
    parts = []
    for number, code in enumerate(codes):
        name = number if names is None else names[number]
        if code < 0:
            parts.append(f"process {name} was killed by {_signal_name(-code)}")
        elif code:
            parts.append(f"process {name} ended with code {code}")
    return ", ".join(parts) or "all processes ended well"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
