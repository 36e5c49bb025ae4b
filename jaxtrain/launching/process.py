"""`Process` is one process of a run on this machine; `Running` is what the launcher knows of a process anywhere."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

__all__ = ["OnLine", "Process", "Running"]

OnLine = Callable[[int, str, str], None]
"""Function that gets (process, "stdout" or "stderr", line without its end)."""


class Running(Protocol):
    """One process of a run, wherever it runs."""

    def code(self) -> int | None:
        """Return the exit code of the process, negative for a signal; None while it runs."""

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the process to end (SIGTERM: it saves first), or kill it."""

    def finish(self) -> int:
        """Wait for the end of the process and its last lines; return its exit code."""


class Process:
    """One process of a run on this machine, whose lines are passed on as they come.

    Args:
        command: Program and arguments.
        number: Number of the process in the run.
        environment: Added to that of this process.
        on_line: Called from threads of its own.
    """

    def __init__(self, command: Sequence[str], number: int, environment: Mapping[str, str], on_line: OnLine) -> None:
        self.number = number
        values = {**os.environ, **environment, "TERRASHARD_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            list(command), env=values, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace",
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which signals all in the same way
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._hand_on, args=(name, on_line), name=f"{name}-{number}", daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _hand_on(self, name: str, on_line: OnLine) -> None:
        stream = self._process.stdout if name == "stdout" else self._process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                on_line(self.number, name, line.rstrip("\n"))

    def code(self) -> int | None:
        """Return the exit code of the process; None while it runs."""
        return self._process.poll()

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the process to end (SIGTERM: it saves first), or kill it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill() if at_once else self._process.terminate()

    def finish(self) -> int:
        """Wait for the end of the process and its last lines."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join(timeout=2.0)
        return code
