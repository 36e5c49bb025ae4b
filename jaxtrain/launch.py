"""Start the processes of one run and keep them together: one that dies ends all, and all are restarted.

A restart is the same command once more: a run continues from its newest undamaged checkpoint by itself. Replicas of a
run that may change its machines are watched by `jaxtrain.launching.replicas` instead.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtrain.launching.outcome import (
    INTERRUPTED,
    PREEMPTED,
    Outcome,
    describe,
    first_cause,
    restart_wanted,
)
from jaxtrain.launching.places import Places, ThisMachine, free_port
from jaxtrain.launching.process import OnLine, Process, Running
from jaxtrain.launching.stopping import asked_to_stop
from zarr_store.errors import InvalidInput

__all__ = ["LaunchConfig", "OnLine", "Outcome", "Process", "describe", "first_cause", "free_port", "launch",
           "launch_at", "restart_wanted"]  # fmt: skip

_POLL_S = 0.1
_LAST_WORDS_S = 3.0
"""Seconds that the other processes get to report why they end, after one has ended."""


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
    return launch_at(ThisMachine(command, config.processes), config, on_line=on_line, on_restart=on_restart)


def launch_at(
    places: Places,
    config: LaunchConfig,
    *,
    on_line: OnLine,
    on_restart: Callable[[int, str], None] = lambda _number, _why: None,
) -> Outcome:
    """Run a command as `launch` does, at any places, with one process at each."""
    restarts = 0
    with asked_to_stop() as asked:
        while True:
            codes, cause = _attempt(places, config, on_line, asked)
            if asked:
                return Outcome(PREEMPTED if asked[0] == signal.SIGTERM else INTERRUPTED, restarts, codes)
            if not restart_wanted(cause) or restarts == config.restarts:
                # a signal's number is no exit code; 1 means that the run failed
                return Outcome(cause if cause >= 0 else 1, restarts, codes)
            restarts += 1
            on_restart(restarts, describe(codes, places.names))
            time.sleep(config.pause_s)


def _attempt(places: Places, config: LaunchConfig, on_line: OnLine, asked: list[int]) -> tuple[tuple[int, ...], int]:
    """Start all processes once; return their exit codes, and the code that explains them."""
    meeting = places.meeting()
    running: list[Running] = []
    try:
        for number in range(config.processes):
            environment = {
                "TERRASHARD_COORDINATOR": meeting,
                "TERRASHARD_PROCESSES": str(config.processes),
                "TERRASHARD_PROCESS": str(number),
            }
            running.append(places.start(number, environment, on_line))
        cause = _watch(running, config, asked)
    finally:
        for process in running:
            process.stop(at_once=True)
        codes = tuple(process.finish() for process in running)
    return codes, cause


def _watch(running: Sequence[Running], config: LaunchConfig, asked: list[int]) -> int:
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
