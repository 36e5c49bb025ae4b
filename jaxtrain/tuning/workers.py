"""`run_workers` runs a search on several processes, on any machines, and replaces those that die."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from optuna.trial import TrialState

from jaxtrain.launching.places import Places
from jaxtrain.launching.process import Running
from jaxtrain.launching.stopping import asked_to_stop
from jaxtrain.tuning.process import ORDER
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.worker import Budget, OnTrial, TrialNews
from zarr_store.errors import AccessError, InvalidInput, Preempted, TerrashardError

__all__ = ["WORKER", "order", "run_workers"]

WORKER = ("-m", "jaxtrain.tuning.process")
"""Arguments of Python for a worker, whose order is in its environment."""
_POLL_S, _GRACE_S, _MOST_DEATHS = 0.1, 60.0, 5


@dataclass
class _Worker:
    number: int
    running: Running
    deaths: int = 0
    ended: bool = False
    lines: list[str] = field(default_factory=list)
    """The last lines of stderr, for the message where it dies."""


def order(folder: StudyFolder, budget: Budget, number: int, start: int = 0, population: int | None = 1) -> str:
    """Return the order of a worker, as the variable `ORDER` of its environment.

    Args:
        folder: The search, as the worker's machine sees it.
        budget: When to end.
        number: Number of the worker.
        start: How many times it was started before.
        population: Trials that run as one program; None to measure whether that is faster.
    """
    return json.dumps({"study": str(folder.path.absolute()), "budget": asdict(budget), "name": str(number),
                       "number": number + 100 * start, "population": population})  # fmt: skip


def run_workers(
    folder: StudyFolder, places: Places, budget: Budget, *, on_trial: OnTrial | None = None,
    on_note: Callable[[str], None] = lambda _: None, population: int | None = 1,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Run a search on several processes until its budget is used up.

    Args:
        folder: The search; all processes must see its folder.
        places: Where the processes run, with `WORKER` as their command; one for each.
        budget: When to end.
        on_trial: Called when a trial begins and ends.
        on_note: Called with a line about a process that died.
        population: Trials of each process that run as one program; None to measure whether that is faster.

    Returns:
        For each worker, how many times each group of trials was compiled.

    Raises:
        InvalidInput: The first trials all failed alike.
        AccessError: Workers die again and again.
        Preempted: This process was told to stop; so were the workers.
    """
    news: queue.Queue[tuple[int, str, str]] = queue.Queue()
    compiled: dict[str, dict[str, int]] = {}
    failure: list[TerrashardError] = []
    began = time.monotonic()

    def start(number: int, times: int) -> Running:
        left = budget if budget.seconds is None else Budget(
            budget.trials, max(0.0, budget.seconds - (time.monotonic() - began)), budget.steps
        )  # fmt: skip
        values = {ORDER: order(folder, left, number, times, population)}
        return places.start(number, values, lambda at, stream, text: news.put((at, stream, text)))

    def hear(crew: Sequence[_Worker]) -> None:
        while True:
            try:
                number, stream, text = news.get_nowait()
            except queue.Empty:
                return
            if stream == "stderr":
                crew[number].lines = [*crew[number].lines[-4:], text]
            else:
                _take_in(number, text, compiled, failure, on_trial, on_note)

    with asked_to_stop() as asked:
        crew: list[_Worker] = []
        try:
            crew += [_Worker(number, start(number, 0)) for number in range(len(places.names))]
            while not all(one.ended for one in crew) and not asked and not failure:
                time.sleep(_POLL_S)
                hear(crew)
                for one in crew:
                    code = None if one.ended else one.running.code()
                    if code is None:
                        continue
                    one.running.finish()
                    hear(crew)
                    one.ended = True
                    if code and not failure:
                        _forget(folder, one.number)
                        one.deaths += 1
                        last = one.lines[-1] if one.lines else "it said nothing"
                        if one.deaths >= _MOST_DEATHS:
                            raise AccessError(f"worker {one.number} died {one.deaths} times, last with {code}: {last}")
                        on_note(f"worker {one.number} ended with {code}: {last}; its trial goes on from its checkpoint")
                        one.running, one.ended = start(one.number, one.deaths), False
        finally:
            _end([one for one in crew if not one.ended])
        hear(crew)
    if failure:
        raise failure[0]
    if asked:
        raise Preempted(f"stopped: trials of {folder.path} are saved; continue with: terrashard tune {folder.path}")
    return compiled


def _take_in(
    number: int,
    text: str,
    compiled: dict[str, dict[str, int]],
    failure: list[TerrashardError],
    on_trial: OnTrial | None,
    on_note: Callable[[str], None],
) -> None:
    """Read one line of a worker."""
    try:
        line: dict[str, Any] = json.loads(text)
    except ValueError:
        return
    if "compiled" in line:
        compiled[str(number)] = line["compiled"]
    elif "note" in line:
        on_note(f"worker {number}: {line['note']}")
    elif "error" in line:
        if line["code"] == InvalidInput.exit_code:
            failure.append(InvalidInput(line["error"]))
    elif on_trial is not None and set(line) == set(TrialNews.__dataclass_fields__):
        on_trial(TrialNews(**line))


def _forget(folder: StudyFolder, number: int) -> None:
    """Free the trial of a worker that has ended, also where it ran on another machine."""
    held = [trial.number for trial in folder.trials() if trial.state == TrialState.RUNNING
            and str(trial.user_attrs.get("worker")).split(".")[0] == str(number)]  # fmt: skip
    folder.release(held)


def _end(crew: Sequence[_Worker]) -> None:
    """Ask workers to stop, so that they save first; kill those that do not."""
    for one in crew:
        one.running.stop()
    until = time.monotonic() + _GRACE_S
    for one in crew:
        while one.running.code() is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        if one.running.code() is None:
            one.running.stop(at_once=True)
        one.running.finish()
