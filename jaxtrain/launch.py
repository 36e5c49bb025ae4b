"""Start the processes of one run and keep them together: one that dies ends all, and all are restarted.

The launcher holds no array and imports no JAX, so it stays small, may start processes safely, and cannot die of what
kills them. A restart is the same command once more: a run continues from its newest undamaged checkpoint by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from zarr_store.errors import InvalidInput

__all__ = ["LaunchConfig", "Outcome", "Process", "free_port", "launch", "restart_wanted"]

OnLine = Callable[[int, str, str], None]
"""Function that gets (process, "stdout" or "stderr", line without its end)."""

_POLL_S = 0.1
_LAST_WORDS_S = 3.0
"""Seconds that the other processes get to report why they end, after one has ended."""
PREEMPTED = 75
_FINAL = (2, 4, 5, 6, 7, PREEMPTED, 130)
"""Exit codes after which a restart is useless: the cause stays, or the user has asked for the end."""


@dataclass(frozen=True)
class LaunchConfig:
    """Settings of a launch.

    Attributes:
        processes: Number of processes, at least 1.
        restarts: Largest number of restarts of all processes after one died.
        grace_s: Seconds that processes get to save and end after SIGTERM.
        pause_s: Seconds to wait before a restart.
    """

    processes: int
    restarts: int = 3
    grace_s: float = 60.0
    pause_s: float = 1.0

    def __post_init__(self) -> None:
        if self.processes < 1 or self.restarts < 0 or self.grace_s < 0:
            raise InvalidInput(f"expected processes ≥ 1 and restarts ≥ 0, got {self.processes} and {self.restarts}")


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
        """Exit code of the process; None while it runs."""
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


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def restart_wanted(code: int) -> bool:
    """Return whether a run with this exit code may succeed when it is started again."""
    return code != 0 and code not in _FINAL


def first_cause(codes: Sequence[int]) -> int:
    """Return the exit code that explains the others: a code of a known error, else any that is not 0."""
    known = [code for code in codes if code in _FINAL]
    others = [code for code in codes if code]
    return (known or others or [0])[0]


def launch(
    command: Sequence[str],
    config: LaunchConfig,
    *,
    on_line: OnLine,
    on_restart: Callable[[int, str], None] = lambda _number, _why: None,
) -> Outcome:
    """Run a command as the cooperating processes of one run, until all are done or too many restarts have failed.

    SIGTERM and Ctrl-C are handed on: the run saves, and ends with 75 or 130.

    Args:
        command: Program and arguments, the same for all.
        config: Number of processes and restarts.
        on_line: Gets every line they write.
        on_restart: Called with (number of the restart, why).
    """
    restarts = 0
    with _asked_to_stop() as asked:
        while True:
            codes, cause = _attempt(command, config, on_line, asked)
            if asked:
                return Outcome(PREEMPTED if asked[0] == signal.SIGTERM else 130, restarts, codes)
            if not restart_wanted(cause) or restarts == config.restarts:
                # a signal's number is no exit code; 1 means that the run failed
                return Outcome(cause if cause >= 0 else 1, restarts, codes)
            restarts += 1
            on_restart(restarts, describe(codes))
            time.sleep(config.pause_s)


def describe(codes: Sequence[int]) -> str:
    """Describe in words how processes ended.

    >>> describe([-9, 1])
    'process 0 was killed by SIGKILL, process 1 ended with code 1'
    """
    parts = []
    for number, code in enumerate(codes):
        if code < 0:
            parts.append(f"process {number} was killed by {signal.Signals(-code).name}")
        elif code:
            parts.append(f"process {number} ended with code {code}")
    return ", ".join(parts) or "all processes ended well"


def _attempt(
    command: Sequence[str], config: LaunchConfig, on_line: OnLine, asked: list[int]
) -> tuple[tuple[int, ...], int]:
    """Start all processes once; return their exit codes, and the code that explains them."""
    port = free_port()
    running: list[Process] = []
    try:
        for number in range(config.processes):
            environment = {
                "TERRASHARD_COORDINATOR": f"127.0.0.1:{port}",
                "TERRASHARD_PROCESSES": str(config.processes),
                "TERRASHARD_PROCESS": str(number),
                "TERRASHARD_LOCAL_PROCESS": str(number),
                "TERRASHARD_LOCAL_PROCESSES": str(config.processes),
            }
            running.append(Process(command, number, environment, on_line))
        cause = _watch(running, config, asked)
    finally:
        for process in running:
            process.stop(at_once=True)
        codes = tuple(process.finish() for process in running)
    return codes, cause


def _watch(running: Sequence[Process], config: LaunchConfig, asked: list[int]) -> int:
    """Wait until all have succeeded or one has failed; then the others get some seconds to report."""
    told_at: float | None = None
    failed_at: float | None = None
    while True:
        codes = [process.code() for process in running]
        now = time.monotonic()
        if asked and told_at is None:
            told_at = now
            for process in running:
                process.stop()
        ended = [code for code in codes if code is not None]
        if len(ended) == len(codes):
            return first_cause(ended)
        if any(ended) and failed_at is None:
            failed_at = now
        if failed_at is not None and now - failed_at > (config.grace_s if _leaving(ended) else _LAST_WORDS_S):
            return first_cause(ended)
        if told_at is not None and (now - told_at > config.grace_s or len(asked) > 1):
            return first_cause(ended)
        time.sleep(_POLL_S)


def _leaving(codes: Sequence[int]) -> bool:
    """Return whether all that ended were asked to stop: then the others are saving, and end the same way."""
    return all(code in (0, PREEMPTED) for code in codes)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Yield the list of signals that have come; a second one means to stop at once.

    Ctrl-C is left ignored where it was ignored at the start: so shells start what a script puts in the background.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        number: signal.signal(number, lambda got, _frame: asked.append(got))
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGTERM
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
