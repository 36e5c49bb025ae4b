"""`work_together` runs trials of one process side by side, as a population, where that is faster than one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import jax

from jaxtrain.launching.stopping import asked_to_stop
from jaxtrain.prepare import prepare
from jaxtrain.shared import SharedParts, group_of
from jaxtrain.tuning.population import Population, PopulationSpeed, make_population_step, measure_population
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.worker import Budget, OnTrial, TrialNews, work
from zarr_store.errors import Preempted

__all__ = ["decide_population", "work_together"]

_MOST = 8
"""Size of the population that is measured, unless the search has fewer trials or members."""
MEASURED = ("gpu", "tpu")
"""Platforms on which a population may be faster; XLA has no fast code for grouped convolutions on processors."""
_POLL_S = 0.1


def decide_population(folder: StudyFolder, budget: Budget, shared: SharedParts) -> PopulationSpeed | None:
    """Measure whether a population is faster on this device, for the configuration without the space.

    The answer is kept in the study for each kind of device, so that it is measured once.

    Args:
        folder: The search.
        budget: Limits of the search.
        shared: Data and compiled steps of the process.

    Returns:
        The measurement; None where there is nothing to run together, or the device is a processor.
    """
    plan = folder.plan
    size = plan.members or min(_MOST, budget.trials or _MOST)
    if size < 2 or jax.default_backend() not in MEASURED:
        return None
    config = plan.config_of({}, fold=0 if plan.folds else None, where="configuration of the search")
    card, ready = prepare(config, shared.open(config.data.cube), None)
    parts = shared.parts_of(card, config)
    if parts.program.layout is not None:  # a pipeline shares no programs
        return None
    study = folder.study()
    device = parts.program.mesh.devices.flat[0].device_kind
    for known in study.user_attrs.get("populations", []):
        if known["device"] == device and known["size"] == size:
            return PopulationSpeed(device, size, known["alone_s"], known["together_s"])
    step = shared.together(group_of(card, config), size, lambda: make_population_step(parts, size))
    speed = measure_population(parts, ready, size, step)
    study.set_user_attr("populations", [*study.user_attrs.get("populations", []), speed.to_dict()])
    return speed


def work_together(
    folder: StudyFolder, budget: Budget, population: int | None, *, name: str = "0", number: int = 0,
    on_trial: OnTrial | None = None, on_note: Callable[[str], None] = lambda _: None,
    shared: SharedParts | None = None,
) -> dict[str, int]:  # fmt: skip
    """Run trials until the budget is used up, as `work` does, several of them as one program.

    Args:
        folder: The search.
        budget: Limits of the search.
        population: Trials that run as one program; 1 for one after the other, None to measure which is faster.
        name: Name of this process.
        number: Number of this process among the workers.
        on_trial: Called when a trial begins and ends.
        on_note: Called with a line about the measurement.
        shared: What the trials of this process have in common.

    Returns:
        How many times each group of trials was compiled; "GROUP together" counts the program of a population.

    Raises:
        InvalidInput: The first trials all failed for the same reason.
        Preempted: The process was stopped by a signal; the same call continues.
    """
    shared = SharedParts() if shared is None else shared
    if population is None:
        speed = decide_population(folder, budget, shared)
        if speed is not None:
            on_note(f"{speed.words()}: {'together' if speed.is_faster else 'one after the other'}")
        population = speed.size if speed is not None and speed.is_faster else 1
    if population == 1:
        work(folder, budget, name=name, number=number, on_trial=on_trial, shared=shared)
        return shared.compiled()
    lanes = Population(shared, population, always_full=folder.plan.members > 0)
    guard, failures = threading.Lock(), list[BaseException]()

    def tell(news: TrialNews) -> None:
        if on_trial is not None:
            with guard:
                on_trial(news)

    def run(place: int) -> None:
        try:
            work(folder, budget, name=f"{name}.{place}", number=number + 10_000 * place, on_trial=tell,
                 shared=shared, joined=partial(lanes.member, place))  # fmt: skip
        except BaseException as error:  # noqa: BLE001  raised below, in the thread of the caller
            failures.append(error)
            shared.stop.set()

    folder.study()  # opened once, before several threads ask for it
    threads = [threading.Thread(target=run, args=(place,), name=f"trial-{place}") for place in range(population)]
    with asked_to_stop() as asked:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL_S)
                if asked:
                    shared.stop.set()
    if failures:
        raise next((error for error in failures if not isinstance(error, Preempted)), failures[0])
    return shared.compiled() | {f"{key} together": count for key, count in lanes.compiled().items()}
