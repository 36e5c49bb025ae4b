"""`crashpoint`: named places between durable steps, at each of which a process may die without anything being lost.

Tests let a process end at the n-th place that it reaches, for every n, and repeat the run. Otherwise a place costs one
comparison.
"""

from __future__ import annotations

import os

__all__ = ["EXIT_CODE", "arm", "crashpoint", "reached"]

EXIT_CODE = 86
"""Exit code of a process that ends at a crash point, so that a test can recognise it."""

_VARIABLE = "TERRASHARD_CRASH_AT"
_at = int(os.environ.get(_VARIABLE) or 0)
_names: list[str] = []


def crashpoint(name: str) -> None:
    """Mark a place where dying must be harmless; the process ends here at once if a test has chosen this place."""
    if not _at:
        return
    _names.append(name)
    if len(_names) == _at:
        os._exit(EXIT_CODE)


def arm(at: int) -> None:
    """Die at the `at`-th crash point from now on; 0 disarms, and a number that is never reached only counts."""
    global _at
    _at = at
    _names.clear()


def reached() -> tuple[str, ...]:
    """Return the names of the crash points passed since `arm`."""
    return tuple(_names)
