"""The last trials go to the workers that end them first."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta

from optuna.trial import FrozenTrial, TrialState, create_trial

from jaxtrain.tuning import worker as worker_module
from jaxtrain.tuning.handout import Pace, paces_of, takes_another
from jaxtrain.tuning.search import begin_search
from jaxtrain.tuning.worker import Budget

from ..cube_factory import shared_cube, tiny_config
from .test_search import SHORT, write_space

NOON = datetime(2026, 1, 1, 12)


def trial(number: int, worker: str, seconds: float, *, steps: int = 100, began: datetime | None = None) -> FrozenTrial:
    """A trial of a worker that has ended after some seconds, or began at a time and still runs."""
    about = {"host": "h", "worker": worker, "steps": steps, "seconds": seconds}
    if began is None:
        made = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs=about)
    else:
        made = create_trial(state=TrialState.RUNNING, user_attrs=about)
        made.datetime_start = began
    made.number = number
    return made


def test_a_slow_worker_leaves_the_last_trials_to_a_fast_one():
    slow, fast = Pace("slow", 100.0), Pace("fast", 10.0, busy=5.0)
    assert [takes_another("slow", left, [slow, fast]) for left in (1, 5, 9, 10, 11, 30)] == [False] * 3 + [True] * 3
    assert takes_another("fast", 1, [Pace("slow", 100.0, busy=3.0), Pace("fast", 10.0)])


def test_equal_workers_and_unknown_ones_take_what_is_there():
    assert takes_another("one", 1, [Pace("one", 10.0), Pace("two", 10.0, busy=0.0)])
    assert takes_another("new", 1, [Pace("fast", 1.0, busy=1.0)])
    assert not takes_another("new", 0, [])


def test_speeds_come_from_what_was_recorded():
    """A worker that trained 100 steps in 40 s, beside one that needs 4 s and began its trial 3 s ago."""
    trials = [trial(0, "slow", 40.0), trial(1, "fast", 4.0), trial(2, "fast", 2.0, steps=50),
              trial(3, "fast", 0.0, steps=0, began=NOON - timedelta(seconds=3))]  # fmt: skip
    mean = (100 + 100 + 50) / 3
    slow, fast = paces_of(trials, "h slow", NOON)
    assert (slow.worker, fast.worker) == ("h slow", "h fast")
    assert abs(slow.seconds - 0.4 * mean) < 1e-9
    assert abs(fast.seconds - 0.04 * mean) < 1e-9
    assert abs(fast.busy - (fast.seconds - 3)) < 1e-9
    assert not takes_another("h slow", 2, [slow, fast])
    assert takes_another("h slow", 20, [slow, fast])
    assert paces_of(trials[:1], "h slow", NOON) == [Pace("h slow", 40.0)]
    # a worker that has ended is not waited for
    assert [pace.worker for pace in paces_of(trials[:3], "h slow", NOON)] == ["h slow"]


def test_a_search_asks_who_takes_its_last_trials(tmp_path):
    """The slow worker of a search leaves its last trials to the fast one, which is busy with a trial that ends soon."""
    config, space = tiny_config(shared_cube(), **SHORT), {"optim.learning_rate": [1e-3, 1e-2]}
    study = begin_search(config, write_space(tmp_path, space), tmp_path / "study", sampler="random", pruner="median")
    ended = [trial(0, "slow", 40.0), trial(1, "fast", 4.0)]
    for one in ended:
        one.user_attrs["host"] = socket.gethostname()
    busy = trial(2, "fast", 0.0, steps=0, began=datetime.now() - timedelta(seconds=3))
    busy.user_attrs["host"] = socket.gethostname()

    def takes(worker, trials, wanted):
        return worker_module._what_now(study, Budget(trials=wanted), trials, 0.0, worker) is worker_module._NOW

    assert not takes("slow", [*ended, busy], 5)
    assert takes("slow", [*ended, busy], 40)
    assert takes("fast", ended, 5)
    assert takes("slow", ended, 5)  # nobody is busy: it is not left to a worker that may have ended
