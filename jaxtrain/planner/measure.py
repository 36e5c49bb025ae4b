"""Measure steps, compare them with the predictions, and correct the predictions by measurements of computing alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.planner.candidates import Candidate, with_mesh
from jaxtrain.planner.cost import Prediction, exchange_seconds, program_seconds
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.machine import run_here
from jaxtrain.planner.profile import Profile
from jaxtrain.planner.survey import Network, Row, Survey, compile_candidates
from zarr_store.errors import InvalidInput, TerrashardError

__all__ = [
    "MOST_MEASURED",
    "Probe",
    "Ratios",
    "compute_probes",
    "compute_ratios",
    "corrected",
    "measure_rows",
    "request_of",
    "run_measurer",
]

MOST_MEASURED = 8
SECONDS = 1800


def measure_rows(survey: Survey, *, most: int = MOST_MEASURED) -> Survey:
    """Run the quickest strategies that fit on this machine by turns; return the survey with what was measured.

    With them, probes measure what computing costs without exchange, and what the exchange of the gradient costs after
    it. The ratios to their predictions are what the profile does not know, and correct all strategies.

    Args:
        survey: of this machine's profile.
        most: Number of strategies that are run, the quickest first.

    Raises:
        InvalidInput: the survey is of another machine.
        TerrashardError: the process that measures ended without an answer.
    """
    if survey.profile.name != "this-machine":
        raise InvalidInput(f"--measure runs on this machine, and the profile is {survey.profile.name}: leave one out")
    network, profile = survey.network, survey.profile
    compute = compute_probes(network, survey.devices, profile)
    chosen = sorted((row for row in survey.rows if row.fits), key=lambda row: row.seconds)[:most]
    requests = [request_of(network, row.candidate.config) for row in chosen if row.candidate.config is not None]
    answers = run_measurer([*(probe.request for probe in compute), *requests], survey.devices, profile.processes)
    first, others = answers[: len(compute)], answers[len(compute) :]
    ratios = compute_ratios(compute, [one["seconds"] for one in first], profile)
    found = {id(row): answer for row, answer in zip(chosen, others, strict=True)}
    alone_s = first[0]["seconds"]
    rows = tuple(
        replace(_measured(row, found.get(id(row), {}), ratios, profile.processes), alone_s=alone_s)
        for row in survey.rows
    )
    return replace(survey, rows=rows, ratio=ratios.shared, alone_s=alone_s)


@dataclass(frozen=True)
class Probe:
    """A measurement in addition to the strategies.

    It is the program of one device, run by some devices at once, each on its part of the batch and without exchange; or
    the exchange of the gradient after it.
    """

    request: dict[str, Any]
    facts: Facts
    copies: int
    devices: int
    """Devices that a strategy keeps busy, for which the copies stand."""

    @property
    def is_exchange(self) -> bool:
        """Whether the exchange is measured, and not the computing."""
        return "exchange" in self.request

    def predicted(self, profile: Profile) -> float:
        """Return the seconds that the profile predicts for a step."""
        (program,) = self.facts.programs
        if self.is_exchange:
            return exchange_seconds(program.collectives, self.facts.mesh, profile)
        return sum(program_seconds(program, profile, self.request["config"]["model"]["precision"], self.devices))


def compute_probes(network: Network, devices: int, profile: Profile) -> list[Probe]:
    """Return the probes that measure a network without its strategies.

    These are one device alone, all devices that a processor runs at once, and the exchange of their gradient.

    Raises:
        InvalidInput: one device cannot run this configuration.
    """
    size = network.config.run.batch_size
    wanted = [(1, 1, size)]
    if devices > 1 and profile.device.together is not None and size % devices == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted.append((devices if profile.processes > 1 else min(devices, cores), devices, size // devices))
    made = []
    for copies, standing, windows in wanted:
        run = network.config.run.model_copy(update={"batch_size": windows})
        config = with_mesh(network.config.model_copy(update={"run": run}), {"data": 1})
        if isinstance(config, str):
            raise InvalidInput(f"one device cannot run this configuration: {config}")
        made.append((copies, standing, Candidate("one device", 1, config)))
    both = _data_parallel(network, devices) if len(wanted) > 1 and wanted[-1][0] == devices else []
    every = [*(one for *_, one in made), *both]
    facts = compile_candidates(network, every, profile, 2, lambda _done, _all: None)
    probes = []
    for copies, standing, one in made:
        known = facts[id(one)]
        if isinstance(known, str) or one.config is None:
            raise InvalidInput(f"one device cannot run this configuration: {known}")
        probes.append(Probe({**request_of(network, one.config), "copies": copies}, known, copies, standing))
    for one in both:
        known = facts[id(one)]
        if not isinstance(known, str) and (arrays := _summed(known)):
            request = {**probes[-1].request, "exchange": arrays}
            probes.append(Probe(request, known, devices, devices))
    return probes


def _data_parallel(network: Network, devices: int) -> list[Candidate]:
    config = with_mesh(network.config, {"data": devices})
    return [] if isinstance(config, str) else [Candidate("data", devices, config)]


def _summed(facts: Facts) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and type of each array that data-parallel devices sum in a step, in order."""
    types = {"f32": "float32", "bf16": "bfloat16", "s32": "int32", "u32": "uint32"}
    return [
        (shape, types.get(dtype, "float32"))
        for program in facts.programs
        for one in program.collectives
        if one.kind == "all-reduce" and "data" in one.axes
        for _ in range(one.count)
        for shape, dtype in zip(one.shapes, one.types, strict=True)
    ]


@dataclass(frozen=True)
class Ratios:
    """Ratios of measured to predicted seconds, of computing and of exchanges."""

    alone: float
    """Ratio for one device with the whole batch, while the others rest."""
    shared: float
    """Ratio for devices that each have their part of the batch, and work at once."""
    exchange: float = 1.0
    """Ratio for the exchange of the gradient."""

    def of(self, mesh: MeshConfig, processes: int = 1) -> float:
        """Return the ratio for the computing of a strategy.

        One that splits the batch alone runs the instructions of the copies. The stages of a pipeline are predicted at
        the rates of one device alone, where each is one device of one process; those of several processes at the rates
        of all at once, as copies run. One that cuts images or filters runs instructions whose shapes lie between those
        of both measurements.
        """
        if mesh.size == mesh.data or (mesh.size == mesh.pipe and processes > 1):
            return self.shared
        return self.alone if mesh.size == mesh.pipe else math.sqrt(self.alone * self.shared)

    def exchange_of(self, mesh: MeshConfig) -> float:
        """Return the ratio for the exchanges of a strategy; 1 for a pipeline, as hand-overs of stages are not sums.

        >>> Ratios(1.0, 1.0, 0.5).exchange_of(MeshConfig(data=2)), Ratios(1.0, 1.0, 0.5).exchange_of(MeshConfig(pipe=2))
        (0.5, 1.0)
        """
        return self.exchange if mesh.pipe == 1 else 1.0


def compute_ratios(probes: Sequence[Probe], seconds: Sequence[float], profile: Profile) -> Ratios:
    """Return the ratios that the probes show.

    Devices that share cores take turns on them, so few copies on all cores stand for many.
    """
    found: dict[bool, list[float]] = {False: [], True: [1.0]}
    for probe, measured in zip(probes, seconds, strict=True):
        found[probe.is_exchange].append(measured * probe.devices / probe.copies / probe.predicted(profile))
    computing = found[False]
    return Ratios(computing[0], computing[-1], found[True][-1])


def request_of(network: Network, config: TrainConfig) -> dict[str, Any]:
    """Return the request by which `jaxtrain.planner.measurer` runs a configuration."""
    return {"config": config.model_dump(mode="json"), "card": network.card, "dtypes": network.dtypes}


def run_measurer(requests: Sequence[Mapping[str, Any]], devices: int, processes: int = 1) -> list[dict[str, Any]]:
    """Return the answers of `jaxtrain.planner.measurer`, run in processes of their own.

    Raises:
        TerrashardError: one of them ended without an answer.
    """
    try:
        text = run_here("jaxtrain.planner.measurer", devices, processes, given=json.dumps(list(requests)),
                        seconds=SECONDS)  # fmt: skip
    except TerrashardError as error:
        raise TerrashardError(f"the strategies could not be measured: {str(error).splitlines()[0]}") from error
    answers: list[dict[str, Any]] = json.loads(text)
    return answers


def corrected(prediction: Prediction, computing: float, exchange: float = 1.0) -> Prediction:
    """Return the prediction with its computing time times a ratio, and its exchanges times another one."""
    parts = {name: getattr(prediction, name) * computing for name in ("compute_s", "memory_s", "idle_s", "launch_s")}
    exchanged = prediction.collective_s * exchange
    step = (prediction.step_s - prediction.collective_s) * computing + exchanged
    return replace(prediction, **parts, collective_s=exchanged, step_s=step)


def _measured(row: Row, answer: Mapping[str, Any], ratios: Ratios, processes: int) -> Row:
    prediction = row.prediction
    if row.candidate.config is not None and prediction is not None:
        mesh = row.candidate.mesh
        prediction = corrected(prediction, ratios.of(mesh, processes), ratios.exchange_of(mesh))
    if "why_not" in answer:
        return replace(row, prediction=prediction, fits=False, why_not=answer["why_not"])
    return replace(row, prediction=prediction, measured_s=answer.get("seconds"), every=tuple(answer.get("every", ())))
