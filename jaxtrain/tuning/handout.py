"""`takes_another` hands out the last trials by measured speed, so that a slow worker does not hold up the end.

Each worker takes the next trial when it is free, so a fast one gets more. Only the last trials need more than that: a
worker that would end one later than the busy faster workers leaves it to them.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

__all__ = ["Pace", "paces_of", "takes_another", "worker_of"]

_NEWEST = 5
"""Number of newest trials of a worker that give its speed."""


@dataclass(frozen=True)
class Pace:
    """The speed of a worker.

    Attributes:
        worker: Its host and name.
        seconds: Time that it needs for a trial.
        busy: Time until its trial under way ends; 0 if it has none.
    """

    worker: str
    seconds: float
    busy: float = 0.0


def takes_another(worker: str, left: int, paces: Sequence[Pace]) -> bool:
    """Return whether a worker that is free takes one of the last trials, or leaves all of them to faster ones.

    The trials are handed out in thought, each to the worker that would end it first. A worker of unknown speed takes
    one, and is measured.

    Args:
        worker: The worker that asks.
        left: Trials that have not begun.
        paces: Speeds of this worker and of those that are busy.

    >>> slow, fast = Pace("slow", 100.0), Pace("fast", 10.0, busy=5.0)
    >>> takes_another("slow", 3, [slow, fast]), takes_another("slow", 30, [slow, fast])
    (False, True)
    """
    if all(pace.worker != worker for pace in paces):
        return left > 0
    ends = [(pace.busy + pace.seconds, pace.worker != worker, pace.seconds, pace.worker) for pace in paces]
    heapq.heapify(ends)
    for _ in range(left):
        end, other, seconds, name = ends[0]
        if name == worker:
            return True
        heapq.heapreplace(ends, (end + seconds, other, seconds, name))
    return False


def worker_of(trial: FrozenTrial) -> str:
    """Return host and name of the worker of a trial; empty if none has begun it."""
    about = trial.user_attrs
    return f"{about.get('host', '')} {about.get('worker', '')}".strip()


def paces_of(trials: Sequence[FrozenTrial], worker: str, now: datetime) -> list[Pace]:
    """Return the speed of a worker and of those that run a trial, as far as trials of theirs have ended.

    Args:
        trials: All trials, in order.
        worker: The worker that asks.
        now: Time by the clock that Optuna uses, local and without a zone.
    """
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
             and trial.user_attrs.get("steps")]  # fmt: skip
    if not ended:
        return []
    steps = statistics.fmean(trial.user_attrs["steps"] for trial in ended)
    since = {worker_of(trial): trial.datetime_start for trial in trials if trial.state == TrialState.RUNNING}
    found = []
    for name in dict.fromkeys([worker, *since]):
        rates = [trial.user_attrs["seconds"] / trial.user_attrs["steps"] for trial in ended if worker_of(trial) == name]
        if not rates:
            continue
        seconds = statistics.median(rates[-_NEWEST:]) * steps
        began = since.get(name)
        spent = 0.0 if began is None else (now - began).total_seconds()
        found.append(Pace(name, seconds, 0.0 if began is None else max(0.0, seconds - spent)))
    return found
