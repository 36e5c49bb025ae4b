"""`launch_replicas` runs replicas that may join and leave: one that dies does not end the others.

Each place has at most one process at a time. A process that dies is replaced after a pause that grows, a bounded number
of times; one that had worked for a minute resets the count. A place that cannot be reached is tried again for as
long as others work: a host may come back hours later. The run ends when a process reports that it is done,
when it is asked to, or when fewer processes are left than it needs.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtrain.launching.outcome import (
    INTERRUPTED,
    LOST,
    PREEMPTED,
    Outcome,
    describe,
    first_cause,
    restart_wanted,
)
from jaxtrain.launching.places import Places
from jaxtrain.launching.process import OnLine, Running
from jaxtrain.launching.stopping import asked_to_stop
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["ReplicaConfig", "launch_replicas"]

_POLL_S = 0.1
_LONGEST_PAUSE_S = 30.0
NAME = "TERRASHARD_HETERO_NAME"


@dataclass(frozen=True)
class ReplicaConfig:
    """Settings of a launch of replicas.

    Attributes:
        processes: Number of processes to start.
        least: Fewest processes with which the run goes on.
        most: Largest number of processes, with those that others start; None is no limit.
        replace: Whether a process that dies is replaced.
        restarts: How often a place gets a new process, after one that worked for less than `steady_s`.
        grace_s: Seconds that processes get to save and end after SIGTERM.
        pause_s: Seconds before the first replacement; twice as long each time after.
        steady_s: Seconds of work after which the next death counts as the first one.
        prefix: Beginning of the names of its processes, which no other launcher of the group has.
    """

    processes: int
    least: int = 1
    most: int | None = None
    replace: bool = True
    restarts: int = 3
    grace_s: float = 60.0
    pause_s: float = 1.0
    steady_s: float = 60.0
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.restarts < 0 or self.grace_s < 0:
            raise InvalidInput(f"expected processes ≥ 1 and restarts ≥ 0, got {self.processes} and {self.restarts}")
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise InvalidInput(
                f"--min-processes {self.least} --max-processes {self.most}: expected 1 ≤ min ≤ max; leave "
                "one of them out"
            )
        if self.most is not None and self.processes > self.most:
            raise InvalidInput(
                f"{self.processes} processes are more than --max-processes {self.most}; start fewer, or give a "
                "larger limit"
            )


@dataclass
class _Slot:
    """One place: its process, and the outcomes of earlier ones."""

    number: int
    name: str
    running: Running | None = None
    started: float = 0.0
    count: int = 0
    failures: int = 0
    due: float | None = 0.0
    code: int = 0

    def wait(self, config: ReplicaConfig, now: float, *, bounded: bool) -> float | None:
        """Return the pause before the next process, None if there will be none."""
        if now - self.started >= config.steady_s:
            self.failures = 0
        if not config.replace or (bounded and self.failures >= config.restarts):
            return None
        pause = min(config.pause_s * 2.0 ** min(self.failures, 16), _LONGEST_PAUSE_S)
        self.failures += 1
        return pause


def launch_replicas(
    places: Places,
    config: ReplicaConfig,
    environment: Mapping[str, str],
    *,
    on_line: OnLine,
    on_event: Callable[[str], None] = lambda _text: None,
    members: Callable[[], int] = lambda: 0,
) -> Outcome:
    """Run a command as replicas that may join and leave, until the run is done or too few of them are left.

    Args:
        places: One for each process.
        config: Numbers and limits.
        environment: Variables of the group, which every process gets, with a name of its own.
        on_line: Gets every line they write.
        on_event: Called with each event, as a sentence for the user.
        members: Number of members of the group, with those that others have started.
    """
    with asked_to_stop() as asked:
        run = _Replicas(places, config, environment, on_line, on_event, members, asked)
        try:
            return run.watch()
        finally:
            run.end()


class _Replicas:
    """The state of one launch."""

    def __init__(
        self,
        places: Places,
        config: ReplicaConfig,
        environment: Mapping[str, str],
        on_line: OnLine,
        on_event: Callable[[str], None],
        members: Callable[[], int],
        asked: list[int],
    ) -> None:
        self.places, self.config, self.environment = places, config, environment
        self.on_line, self.on_event, self.members, self.asked = on_line, on_event, members, asked
        self.slots = [_Slot(number, places.names[number]) for number in range(config.processes)]
        self.restarts = 0
        self.done = False
        self.failed_after: list[int] = []
        """Exit codes of processes that failed although the run was done: the report may be incomplete."""
        self.cause: int | None = None
        self.told_at: float | None = None

    def watch(self) -> Outcome:
        while True:
            now = time.monotonic()
            for slot in self.slots:
                self._look_at(slot, now)
            stopping = self.done or self.told_at is not None or bool(self.asked)
            waiting = [slot for slot in self.slots if slot.due is not None and not stopping]
            for slot in waiting:
                if slot.due is not None and now >= slot.due:
                    self._start(slot, now)
            alive = [slot for slot in self.slots if slot.running is not None]
            others = 0 if stopping else self.members() - len(alive)
            if not alive and not waiting and others <= 0:
                return self._outcome()
            if not stopping and len(alive) + len(waiting) + max(others, 0) < self.config.least:
                self._give_up(alive)
            if self.asked and self.told_at is None:
                self._tell(alive)
            if self.told_at is not None and (now - self.told_at > self.config.grace_s or len(self.asked) > 1):
                for slot in alive:
                    if slot.running is not None:
                        slot.running.stop(at_once=True)
            time.sleep(_POLL_S)

    def end(self) -> None:
        """End whatever still runs."""
        left = [slot.running for slot in self.slots if slot.running is not None]
        for running in left:
            running.stop(at_once=True)
        for running in left:
            running.finish()

    def _start(self, slot: _Slot, now: float) -> None:
        name = self.config.prefix + (slot.name if slot.count == 0 else f"{slot.name}.{slot.count}")
        slot.started, slot.due = now, None
        slot.count += 1
        try:
            slot.running = self.places.start(slot.number, {**self.environment, NAME: name}, self.on_line)
        except AccessError as error:
            slot.code = LOST
            self._replace(slot, now, str(error))

    def _look_at(self, slot: _Slot, now: float) -> None:
        if slot.running is None or slot.running.code() is None:
            return
        slot.code = slot.running.finish()
        slot.running = None
        how = describe([slot.code], [slot.name])
        if slot.code == 0:
            self.done = True
        elif self.done:
            self.failed_after.append(slot.code)
            self.on_event(f"{how} after the run was done")
        elif self.told_at is not None or self.asked:
            pass  # it ends as it was asked to
        elif restart_wanted(slot.code):
            self._replace(slot, now, how)
        elif slot.code in (PREEMPTED, INTERRUPTED):
            self.on_event(f"{how}: it was asked to leave, and is not replaced; the others go on")
        else:
            self.on_event(f"{how}: a new process would end the same way, so none takes its place")

    def _replace(self, slot: _Slot, now: float, why: str) -> None:
        others_work = any(other.running is not None for other in self.slots if other is not slot)
        pause = slot.wait(self.config, now, bounded=not (slot.code == LOST and others_work))
        if pause is None:
            tried = f" after {slot.failures} new ones" if slot.failures else ""
            self.on_event(f"{why}; no process takes its place{tried}, the others go on")
            return
        slot.due = now + pause
        self.restarts += 1
        count = f" ({slot.failures} of {self.config.restarts})" if slot.failures <= self.config.restarts else ""
        self.on_event(f"{why}; the others go on, and a new process starts in {pause:g} s{count}")

    def _give_up(self, alive: list[_Slot]) -> None:
        self.cause = first_cause([slot.code for slot in self.slots])
        self.on_event(
            f"{len(alive)} processes are left and the run needs {self.config.least} (--min-processes): they save and "
            "end; the same command continues from the newest checkpoint"
        )
        self._tell(alive)

    def _tell(self, alive: list[_Slot]) -> None:
        self.told_at = time.monotonic()
        for slot in alive:
            if slot.running is not None:
                slot.running.stop()

    def _outcome(self) -> Outcome:
        codes = tuple(slot.code for slot in self.slots)
        if self.asked and not self.done:
            cause = PREEMPTED if self.asked[0] == signal.SIGTERM else INTERRUPTED
        elif self.done:
            cause = first_cause(self.failed_after)
        else:
            cause = first_cause(codes) if self.cause is None else self.cause
        # a signal's number is no exit code; 1 means that the run failed
        return Outcome(cause if cause >= 0 else 1, self.restarts, codes)
