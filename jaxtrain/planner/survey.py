"""`survey_run` compares every way of spreading a run over a number of devices, and chooses one.

Nothing of the data is read but what describes them. Programs are compiled in other processes for devices that need not
be there, and are kept, so that a survey which is interrupted goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.planner.bound import Least
from jaxtrain.planner.candidates import Candidate, candidates, with_mesh
from jaxtrain.planner.children import compile_all
from jaxtrain.planner.collectives import Dialect, raw_bytes, wire_bytes
from jaxtrain.planner.cost import Prediction, peak_bytes, predict
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.framing import header_bytes
from jaxtrain.planner.profile import Profile
from jaxtrain.planner.scale import smallest_mesh
from jaxtrain.prepare import prepare

__all__ = ["Network", "Row", "Survey", "describe_network", "survey_run"]

USABLE = 0.9
"""Share of a device's memory that a program can use; the rest is the system's and the libraries'."""
SAME = 0.02
"""Predictions that differ by less are the same, and the plainer strategy is taken."""


TOO_MUCH = "GB too much"
"""Words of each reason that is the memory of a device."""
LESS_STATE = "mesh.zero = 3 over more devices, mesh.model or a smaller model.width"
LESS_WORK = "mesh.space, a smaller run.batch_size or data.patch"


@dataclass(frozen=True)
class Network:
    """The subject of a survey: a run, the description of its data, and the arrays of its batches."""

    config: TrainConfig
    card: Mapping[str, Any]
    dtypes: Mapping[str, str]
    windows: int
    """Windows of an epoch."""


@dataclass(frozen=True)
class Row:
    """One strategy: whether it fits, what it costs, and why."""

    candidate: Candidate
    facts: Facts | None
    prediction: Prediction | None
    fits: bool
    why_not: str = ""
    measured_s: float | None = None
    """Median of measured steps, seconds; None where none was measured."""
    every: tuple[float, ...] = ()
    """All measured steps, seconds."""
    alone_s: float | None = None
    """Seconds that one device alone needs for the windows of a step; None where one device cannot run the network."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step; infinite where there is no prediction."""
        return self.prediction.step_s if self.prediction is not None else math.inf

    @property
    def efficiency(self) -> float | None:
        """Images a second of each device, divided by those of one device alone; None where not known."""
        if self.alone_s is None or self.prediction is None:
            return None
        return self.alone_s / self.prediction.step_s / self.candidate.devices

    @property
    def gathers(self) -> tuple[str, ...]:
        """Gathers of activations, each with the layer that causes it; a sound program has none."""
        programs = () if self.facts is None else self.facts.programs
        return tuple(sorted({name for one in programs for name in one.gathers}))

    @property
    def corrected(self) -> tuple[str, ...]:
        """Corrections from the program of a processor to that of the target, each once."""
        programs = () if self.facts is None else self.facts.programs
        return tuple(sorted({c.corrected for one in programs for c in one.collectives if c.corrected}))

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON."""
        candidate, facts, prediction = self.candidate, self.facts, self.prediction
        mesh: dict[str, Any] = {}
        if candidate.config is not None:
            chosen = candidate.config.mesh
            mesh = {**chosen.axes, "zero": chosen.zero, "schedule": chosen.schedule if chosen.pipe > 1 else None,
                    "placement": " > ".join(chosen.axes), "remat": candidate.config.model.remat}  # fmt: skip
        found: dict[str, Any] = {"mesh": mesh, "strategy": candidate.strategy, "fits": self.fits,
                                 "why_not": self.why_not or None}  # fmt: skip
        if facts is None or prediction is None:
            return found
        peak = peak_bytes(facts)
        per_stage = flops_by_stage(facts)
        return found | {
            "params_bytes_per_device": facts.parameter_bytes,
            "optimizer_bytes_per_device": facts.optimizer_bytes,
            "activation_bytes_per_device": max(0, peak - facts.parameter_bytes - facts.optimizer_bytes),
            "peak_bytes_per_device": peak,
            "flops_per_device": max(per_stage),
            "flops_balance": max(per_stage) / max(sum(per_stage) / len(per_stage), 1e-9),
            "collective_bytes": bytes_on_wire(facts),
            "raw_bytes": bytes_as_compiled(facts),
            "result_bytes": bytes_printed(facts),
            "header_bytes": header_bytes(facts),
            "corrected": list(self.corrected),
            "accidental_gathers": list(self.gathers),
            "bubble": prediction.bubble,
            "predicted_step_s": prediction.step_s,
            "compute_s": prediction.compute_s,
            "launch_s": prediction.launch_s,
            "memory_s": prediction.memory_s,
            "collective_s": prediction.collective_s,
            "idle_s": prediction.idle_s,
            "hidden_s": prediction.hidden_s,
            "images_per_s": facts.batch / prediction.step_s,
            "efficiency": self.efficiency,
            "busy_share": (prediction.compute_s + prediction.memory_s) / prediction.step_s,
            "measured_step_s": self.measured_s,
            "measured_every_s": list(self.every),
            "error": self.seconds / self.measured_s - 1 if self.measured_s else None,
        }


@dataclass(frozen=True)
class Survey:
    """All strategies for one number of devices on one machine, and the one to take."""

    network: Network
    devices: int
    profile: Profile
    rows: tuple[Row, ...]
    ratio: float | None = None
    """Measured step of one device, in predicted ones; None where nothing was measured."""
    alone_s: float | None = None
    """Measured step of one device, seconds."""

    @property
    def mean_error(self) -> float | None:
        """Mean of the shares by which predictions miss the measured steps; None where nothing was measured."""
        missed = [abs(row.seconds / row.measured_s - 1) for row in self.rows if row.measured_s]
        return sum(missed) / len(missed) if missed else None

    @property
    def choice(self) -> Row | None:
        """The strategy to take: the quickest that fits, the plainest of those as quick; None if none fits."""
        fitting = [row for row in self.rows if row.fits]
        if not fitting:
            return None
        best = min(row.seconds for row in fitting)
        return next(row for row in fitting if row.seconds <= best * (1 + SAME))

    def to_dict(self) -> dict[str, Any]:
        """Return the survey as JSON; `verdict` and `sensitivity` are added by who says it in words."""
        choice = self.choice
        return {
            "devices": self.devices,
            "strategies": [row.to_dict() for row in self.rows],
            "choice": None if choice is None else choice.to_dict()["mesh"],
            "profile": self.profile.model_dump(mode="json"),
            "calibration": {
                **self.profile.sources,
                "one_device_measured_s": self.alone_s,
                "one_device_ratio": self.ratio,
            },
            "mean_error": self.mean_error,
            "batch_size": self.network.config.run.batch_size,
            "windows": self.network.windows,
        }


def describe_network(config: TrainConfig) -> Network:
    """Read what a survey must know of a run's data: bands, classes, windows, number types.

    Raises:
        InvalidInput: the configuration does not fit the data.
    """
    card, ready = prepare(config, open_training_data(config.data.cube), None)
    windows = ready.plan.parts["train"]
    batch = ready.reader.read(np.asarray(windows.rows[:1], np.int32))
    dtypes = {name: str(array.dtype) for name, array in batch.items()}
    return Network(config, card.to_dict(), dtypes, len(windows))


def survey_run(
    network: Network,
    devices: int,
    profile: Profile,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Survey:
    """Compare the strategies for a number of devices.

    Args:
        network: from `describe_network`.
        devices: Number of devices, all of which are used.
        profile: the machine that is planned for.
        processes: Processes that compile at the same time.
        on_progress: called with the strategies that are compiled, and all.

    Returns:
        The survey; where no strategy fits, it has no choice, and each row has its reason.
    """
    found = candidates(network.config, devices)
    possible = [one for one in found if one.config is not None]
    alone = _alone(network, devices) if possible else []
    limit = USABLE * profile.device.memory
    facts = compile_candidates(network, [*possible, *alone], profile, processes, on_progress, limit=limit)
    seconds = _alone_seconds(network, next((facts[id(one)] for one in alone), ""), profile)
    rows = [_row(one, facts.get(id(one), one.why_not), network, profile, seconds) for one in found]
    if not any(row.fits for row in rows):  # what a stage computes again it need not keep
        large = [row.candidate for row in rows if row.facts is not None or TOO_MUCH in row.why_not]
        thrifty = [remade for one in large if (remade := _rematerialised(one)) is not None]
        more = compile_candidates(network, thrifty, profile, processes, on_progress, limit=limit)
        rows += [_row(one, more.get(id(one), one.why_not), network, profile, seconds) for one in thrifty]
    return Survey(network, devices, profile, tuple(rows))


def _alone(network: Network, devices: int) -> list[Candidate]:
    """Return one device with its share of the windows, the reference of efficiency; none where it is impossible."""
    size = network.config.run.batch_size
    run = network.config.run.model_copy(update={"batch_size": max(1, size // devices)})
    made = with_mesh(network.config.model_copy(update={"run": run}), {"data": 1})
    return [] if isinstance(made, str) else [Candidate("one device", 1, made)]


def _alone_seconds(network: Network, facts: Facts | str, profile: Profile) -> float | None:
    """Return the seconds that one device alone needs for all windows of a step; None if it cannot run them."""
    if isinstance(facts, str):
        return None
    step = predict(facts, profile, network.config.model.precision).step_s
    return step * network.config.run.batch_size / facts.batch


def compile_candidates(
    network: Network,
    wanted: Sequence[Candidate],
    profile: Profile,
    processes: int,
    on_progress: Callable[[int, int], None],
    *,
    limit: float | None = None,
) -> dict[int, Facts | str]:
    """Return the facts of candidates, or why they cannot be, by the identity of each.

    A candidate that needs more than `limit` bytes of a device in any case is not compiled.
    """
    if not wanted:
        return {}
    dialect = Dialect(profile.scatters, profile.half, pairs=profile.device.kind == "cpu")
    requests, programs = [], []
    for one in wanted:
        assert one.config is not None
        mesh = one.config.mesh
        # gpipe and 1f1b run the same programs, in another order
        alike = mesh.model_copy(update={"schedule": "1f1b"}) if mesh.schedule == "gpipe" else mesh
        config = one.config.model_copy(update={"mesh": alike})
        request = {"config": config.model_dump(mode="json"), "card": network.card, "dtypes": network.dtypes,
                   "dialect": asdict(dialect)}  # fmt: skip
        if request not in requests:
            requests.append(request)
        programs.append(requests.index(request))
    most = max(_compiled_devices(one) for one in wanted)
    done: set[int] = set()

    def tell(number: int) -> None:
        done.add(number)
        on_progress(len(done), len(requests))

    # the programs of a processor are those that are compiled here
    answers = compile_all(requests, most, processes=processes, on_answer=tell, exact=dialect.pairs, limit=limit)
    found: dict[int, Facts | str] = {}
    for one, number in zip(wanted, programs, strict=True):
        answer = answers[number]
        if "why_not" in answer:
            found[id(one)] = answer["why_not"]
        elif "least" in answer:
            found[id(one)] = _far_too_large(Least(**answer["least"]), limit or 0.0)
        else:
            facts = Facts.from_dict(answer["facts"])
            found[id(one)] = replace(facts, schedule=one.mesh.schedule) if facts.schedule else facts
    return found


def _compiled_devices(one: Candidate) -> int:
    return one.mesh.size // one.mesh.data * smallest_mesh(one.mesh.data)


def _rematerialised(one: Candidate) -> Candidate | None:
    if one.config is None or one.config.model.remat or one.config.mesh.pipe > 1:
        return None
    model = one.config.model.model_copy(update={"remat": True})
    return Candidate(f"{one.strategy}+remat", one.devices, one.config.model_copy(update={"model": model}))


def _row(one: Candidate, facts: Facts | str, network: Network, profile: Profile, alone_s: float | None = None) -> Row:
    if isinstance(facts, str):
        return Row(one, None, None, False, facts)
    prediction = predict(facts, profile, network.config.model.precision)
    need, have = peak_bytes(facts), USABLE * profile.device.memory
    if need <= have:
        return Row(one, facts, prediction, True, alone_s=alone_s)
    return Row(one, facts, prediction, False, _too_large(need, have, facts), alone_s=alone_s)


def _too_large(need: float, have: float, facts: Facts) -> str:
    state = facts.parameter_bytes + facts.optimizer_bytes
    way = LESS_STATE if state > need / 2 else f"model.remat, {LESS_WORK}"
    need, have = need / 1e9, have / 1e9
    return f"needs {need:.2f} GB of {have:.2f} GB that can be used, {need - have:.2f} {TOO_MUCH}: {way}"


def _far_too_large(least: Least, have: float) -> str:
    """Return why a strategy was not compiled: which part is too large alone, and what would make it smaller."""
    state = least.state > have
    what = f"{least.state / 1e9:.2f} GB for parameters and moments, {least.layer / 1e9:.2f} GB for its largest layer"
    way = LESS_STATE if state or least.state > least.layer else LESS_WORK
    return (
        f"needs at least {least.total / 1e9:.2f} GB ({what}) of {have / 1e9:.2f} GB that can be used, "
        f"{(least.total - have) / 1e9:.2f} {TOO_MUCH}: {way}"
    )


def flops_by_stage(facts: Facts) -> list[float]:
    """Return the operations of a device of each stage in one step; of one stage without a pipeline."""
    stages = facts.mesh.get("pipe", 1)
    return [sum(one.flops * one.runs for one in facts.programs if one.stage == stage) for stage in range(stages)]


def bytes_on_wire(facts: Facts) -> dict[str, dict[str, float]]:
    """Return the bytes that the busiest device sends in a step, by axis and kind."""
    stages = facts.mesh.get("pipe", 1)
    total: dict[str, dict[str, float]] = {}
    for stage in range(stages):
        mine: dict[str, dict[str, float]] = {}
        for one in facts.programs:
            if one.stage == stage:
                for axis, kinds in wire_bytes(one.collectives).items():
                    for kind, size in kinds.items():
                        place = mine.setdefault(axis, {})
                        place[kind] = place.get(kind, 0.0) + size * one.runs
        sent = sum(one.bytes for one in facts.handovers if stage in (one.source, one.target))
        if sent:
            mine["pipe"] = {"copy": float(sent * facts.microbatches)}
        for axis, kinds in mine.items():
            for kind, size in kinds.items():
                place = total.setdefault(axis, {})
                place[kind] = max(place.get(kind, 0.0), size)
    return total


def bytes_as_compiled(facts: Facts) -> dict[str, float]:
    """Return what `bytes_on_wire` would be, by axis, if the programs ran as a processor's compiler made them."""
    stages = facts.mesh.get("pipe", 1)
    total: dict[str, float] = {}
    for stage in range(stages):
        mine: dict[str, float] = {}
        for one in facts.programs:
            if one.stage == stage:
                for axis, size in raw_bytes(one.collectives).items():
                    mine[axis] = mine.get(axis, 0.0) + size * one.runs
        for axis, size in mine.items():
            total[axis] = max(total.get(axis, 0.0), size)
    copies = bytes_on_wire(facts).get("pipe", {}).get("copy")
    return total | ({"pipe": copies} if copies else {})


def bytes_printed(facts: Facts) -> dict[str, int]:
    """Return the bytes of results of collectives in a step as the compiler printed them, all programs together."""
    total: dict[str, int] = {}
    for one in facts.programs:
        for kind, size in one.result_bytes.items():
            total[kind] = total.get(kind, 0) + size * one.runs
    return total
