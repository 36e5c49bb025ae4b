"""`Clock` measures the speed of training and the share of time spent waiting for input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["Clock"]

T = TypeVar("T")


class Clock:
    """Windows per second over intervals between steps; compiling, validation and saving do not count.

    Args:
        size: Windows of a step.
    """

    def __init__(self, size: int) -> None:
        self._size, self._seconds, self._steps, self._waited = size, 0.0, 0, 0.0
        self._since: float | None = None
        self._wait = 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches, and count the time that the loop waits for each.

        The loop is a step ahead of the device, so this is the most that the device can have waited.
        """
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait += time.monotonic() - began
            yield batch

    def waited(self, seconds: float) -> None:
        """Count seconds of the step under way that were spent waiting for its input."""
        self._wait += seconds

    def tick(self) -> tuple[float | None, float | None]:
        """Return the seconds since the previous step and the part spent waiting for input; None after a pause."""
        before, self._since = self._since, time.monotonic()
        waited, self._wait = self._wait, 0.0
        if before is None:
            return None, None
        seconds = self._since - before
        self._seconds += seconds
        self._waited += waited
        self._steps += 1
        return round(seconds, 4), round(waited, 4)

    def pause(self) -> None:
        """Stop the clock until the next step, as what follows is not training."""
        self._since = None

    def rate(self) -> float | None:
        """Return the windows per second so far; None before anything was measured."""
        return round(self._steps * self._size / self._seconds, 2) if self._seconds else None

    def input_wait(self) -> float | None:
        """Return the share of the time so far that was spent waiting for input; None before anything was measured."""
        return round(self._waited / self._seconds, 4) if self._seconds else None
