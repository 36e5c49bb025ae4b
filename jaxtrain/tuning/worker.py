"""`work` runs the trials of a search in one process, one after the other, until its budget is used up.

Several processes may work on one search. A trial whose process has died, or was told to stop, is continued from its
checkpoint by whoever looks for work next.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from jaxtrain.runs.rundir import load_card
from jaxtrain.shared import SharedParts, Sharing, group_of
from jaxtrain.tuning.handout import paces_of, takes_another
from jaxtrain.tuning.inheritance import free_generations
from jaxtrain.tuning.rungs import FACTOR, PASSED, PAUSED, Training, count_begun, first_of, promote
from jaxtrain.tuning.study import FINISHED, StudyFolder
from jaxtrain.tuning.trial import DataChanged, run_trial
from zarr_store.errors import AccessError, InvalidInput, Locked, NoSpace, Preempted, TerrashardError

__all__ = ["Budget", "OnTrial", "TrialNews", "work"]

_NOW, _LATER = object(), object()
_PAUSE_S = 0.2
_BEGINS = 0.75
"""Share of time or steps in which a search that pauses trials begins new ones."""
_HELD_S = 30.0
"""Time until a worker looks again at a trial that another process still trains."""
SAME_FAILURES = 5
"""Number of first trials after which a search ends if all of them failed for one reason."""


@dataclass(frozen=True)
class Budget:
    """Limits after which a search begins no trial; each may be None.

    A search that pauses trials spends the last quarter of time or steps on those that it began before.

    Attributes:
        trials: Trials in all.
        seconds: Time of this call.
        steps: Training steps of all trials together.
    """

    trials: int | None = None
    seconds: float | None = None
    steps: int | None = None

    def is_over(self, trials: list[FrozenTrial], seconds: float, share: float = 1.0) -> bool:
        """Return whether a share of time or steps is used up."""
        if self.seconds is not None and seconds >= share * self.seconds:
            return True
        done = sum(trial.user_attrs.get("steps", 0) for trial in trials)
        return self.steps is not None and done >= share * self.steps

    def left(self, trials: list[FrozenTrial]) -> int | None:
        """Return how many trials may begin; None for any number. A promoted trial began before."""
        return None if self.trials is None else max(0, self.trials - count_begun(trials))


@dataclass(frozen=True)
class TrialNews:
    """One trial has begun, ended or failed.

    Attributes:
        number: Number of the trial.
        state: "begun", "complete", "pruned", "paused" or "failed".
        value: Its score; None if there is none.
        message: One line.
        worker: Name of the process.
        finished: Trials that have ended so far, or are paused.
    """

    number: int
    state: str
    value: float | None
    message: str
    worker: str
    finished: int


OnTrial = Callable[[TrialNews], None]


def work(
    folder: StudyFolder, budget: Budget, *, name: str = "0", number: int = 0, on_trial: OnTrial | None = None,
    shared: SharedParts | None = None, joined: Callable[[], AbstractContextManager[Sharing]] | None = None,
) -> SharedParts:  # fmt: skip
    """Run trials until the budget is used up.

    Args:
        folder: The search.
        budget: Limits of the search.
        name: Name of this process.
        number: Number of this process among the workers, for draws of its own.
        on_trial: Called when a trial begins and ends.
        shared: What the trials of this process have in common, from an earlier call.
        joined: Gives what one training shares, and takes it back; None for `shared` itself.

    Returns:
        What the trials had in common, for the count of compilations.

    Raises:
        InvalidInput: The first trials all failed for the same reason, or the data are no longer those of the search.
        AccessError, NoSpace: What has nothing to do with the values of a trial stopped it; the same call continues it.
        Preempted: The process was told to stop; the same call continues.
    """
    shared = SharedParts() if shared is None else shared
    space, began = folder.plan.read_space(), time.monotonic()
    study = folder.study(offset=1000 * number + len(folder.trials()))
    sharing: Callable[[], AbstractContextManager[Sharing]] = joined or (lambda: contextlib.nullcontext(shared))
    not_before: dict[int, float] = {}
    while True:
        if shared.stop.is_set():
            raise Preempted(f"stopped: trials of {folder.path} are saved; the same command continues")
        with _next_trial(folder, study, budget, began, name, not_before) as trial:
            if trial is None:
                return shared
            if isinstance(trial, optuna.Trial):
                try:
                    _run_one(folder, study, space, trial, sharing, name, on_trial)
                except Locked:  # its worker counted as dead but still trains it: the trial is neither lost nor failed
                    not_before[trial.number] = time.monotonic() + _HELD_S
                    continue
        if trial is _LATER:
            time.sleep(_PAUSE_S)
            continue
        _stop_if_all_fail_alike(study)


@contextlib.contextmanager
def _next_trial(
    folder: StudyFolder, study: optuna.Study, budget: Budget, began: float, name: str, not_before: dict[int, float]
) -> Iterator[optuna.Trial | object | None]:
    """Yield a trial that this process holds: one that was interrupted, else a new one.

    Yields None if there is no work, and `_LATER` while the next one waits for trials that others run. Trials in
    `not_before` are not looked at until that time, of the monotonic clock.
    """
    with contextlib.ExitStack() as held:
        trial: optuna.Trial | object | None = None
        with folder.asking():
            trials = study.get_trials(deepcopy=False)
            for known in trials:
                waits = not_before.get(known.number, 0.0) > time.monotonic()
                if known.state == TrialState.RUNNING and not waits and _take(folder, known, held):
                    trial = optuna.Trial(study, known._trial_id)
                    break
            if trial is None:
                trial = _what_now(folder, budget, trials, time.monotonic() - began, name)
                if trial is _NOW or isinstance(trial, Training):
                    trial = asked = promote(study, trial) if isinstance(trial, Training) else study.ask()
                    held.enter_context(folder.holding(asked.number))
        yield trial


def _what_now(
    folder: StudyFolder, budget: Budget, trials: list[FrozenTrial], seconds: float, name: str
) -> object | Training | None:
    """Return what this worker does next.

    Returns:
        A paused training to continue, `_NOW` to begin a trial, `_LATER` to wait for others, None to leave all to them.
    """
    plan = folder.plan
    left, over = budget.left(trials), budget.is_over(trials, seconds)
    begins = left != 0 and not over
    if plan.pauses:
        rungs = plan.rungs(trials)
        chosen = None if over else rungs.promoted()
        if chosen is None and (not begins or budget.is_over(trials, seconds, _BEGINS)):
            enough = max(1, len(rungs.trainings) // FACTOR) if left == 0 else None
            chosen = rungs.to_finish(1 if over else enough)
        if chosen is not None:
            return chosen
    if not begins:
        return None
    if plan.members:
        generation, member = divmod(len(trials), plan.members)
        if generation >= plan.generations:
            return None
        before = trials[len(trials) - member - plan.members : len(trials) - member] if generation else []
        return _NOW if all(trial.state in FINISHED for trial in before) else _LATER
    if left is None:
        return _NOW
    worker = f"{socket.gethostname()} {name}"
    # Optuna keeps local times without a zone
    paces = paces_of(trials, worker, datetime.now())
    if takes_another(worker, left, paces):
        return _NOW
    # a trial that runs may pause, and leave another one to be finished
    return _LATER if plan.pauses and any(trial.state == TrialState.RUNNING for trial in trials) else None


def _take(folder: StudyFolder, known: FrozenTrial, held: contextlib.ExitStack) -> bool:
    """Take over a trial that no process runs any longer."""
    try:
        held.enter_context(folder.holding(known.number))
    except Locked:
        return False
    return True


def _run_one(
    folder: StudyFolder, study: optuna.Study, space: Any, trial: optuna.Trial,
    sharing: Callable[[], AbstractContextManager[Sharing]], name: str, on_trial: OnTrial | None,
) -> None:  # fmt: skip
    def tell(state: str, value: float | None, message: str) -> None:
        if on_trial is not None:
            states = {first_of(known): known.state for known in study.get_trials(deepcopy=False)}
            ended = sum(known in FINISHED for known in states.values())
            on_trial(TrialNews(trial.number, state, value, message, name, ended))

    trial.set_user_attr("worker", name)
    trial.set_user_attr("host", socket.gethostname())
    score = folder.plan.score

    def end(value: float | None, state: TrialState | None = None) -> None:
        first = folder.run_of(first_of(trial)) / ("fold-0" if folder.plan.folds else "")
        with contextlib.suppress(TerrashardError, OSError):  # a trial may fail before its run begins
            card = load_card(first)
            trial.set_user_attr("group", group_of(card, card.config))
        study.tell(trial, value, state=state)

    def fail(error: Exception) -> None:
        reason = str(error).splitlines()[0][:1000] if str(error) else type(error).__name__
        trial.set_user_attr("reason", reason.removeprefix(f"trial {trial.number}: "))
        end(None, TrialState.FAIL)
        tell("failed", None, trial.user_attrs["reason"])

    try:
        result = run_trial(folder, space, trial, sharing, on_begin=lambda _: tell("begun", None, _values(trial)))
    except optuna.TrialPruned as pruned:
        end(None, TrialState.PRUNED)
        ended = study.get_trials(deepcopy=False)[trial.number]
        shown = "" if ended.value is None else f": {score} {ended.value:.4f}"
        if PAUSED in ended.user_attrs:
            tell("paused", ended.value, f"paused after {pruned}{shown}")
            return  # its checkpoint stays
        tell("pruned", ended.value, f"stopped early after {pruned}{shown}")
    except (Preempted, Locked):
        raise
    except DataChanged as error:
        if PASSED not in trial.user_attrs:  # what a promoted trial has trained stays: the data may be restored
            trial.set_user_attr("reason", str(error))
            end(None, TrialState.FAIL)
        raise
    except (AccessError, NoSpace) as error:
        if _may_lie_in_its_values(error, trial):
            fail(error)
        else:
            raise  # the trial stays a running one, which the same search continues from its checkpoint
    except (TerrashardError, ValueError, ArithmeticError, MemoryError) as error:
        fail(error)
    else:
        end(result.value)
        spread = f" (folds {', '.join(f'{value:.4f}' for value in result.folds)})" if len(result.folds) > 1 else ""
        tell("complete", result.value, f"{score} {result.value:.4f}{spread}")
    best = folder.best()
    if folder.plan.members:
        free_generations(folder, keep=None if best is None else best.number)
        return
    folder.free_space(first_of(trial), keep=best is not None and best.number == trial.number)


def _may_lie_in_its_values(error: Exception, trial: optuna.Trial) -> bool:
    """Return whether other values could have avoided an error; not where the same training has worked before."""
    return isinstance(error, AccessError) and PASSED not in trial.user_attrs


def _values(trial: optuna.Trial) -> str:
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in trial.params.items())  # fmt: skip


def _stop_if_all_fail_alike(study: optuna.Study) -> None:
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state in FINISHED][:SAME_FAILURES]
    reasons = Counter(_kind(trial) for trial in ended if trial.state == TrialState.FAIL)
    if len(ended) == SAME_FAILURES and reasons and reasons.most_common(1)[0][1] == SAME_FAILURES:
        raise InvalidInput(
            f"the first {SAME_FAILURES} trials failed alike, so the search ends: {ended[0].user_attrs.get('reason')}"
        )


def _kind(trial: FrozenTrial) -> str:
    """Return a reason without its numbers, which differ from trial to trial."""
    return "".join(letter for letter in str(trial.user_attrs.get("reason")) if not letter.isdigit())
