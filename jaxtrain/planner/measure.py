"""Put measured steps beside predicted ones, and correct the predictions by what one device showed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtrain.planner.candidates import Candidate, with_mesh
from jaxtrain.planner.cost import Prediction, predict
from jaxtrain.planner.survey import Row, Survey, compile_candidates
from zarr_store.errors import InvalidInput, TerrashardError

__all__ = ["MOST_MEASURED", "corrected", "measure_rows", "run_measurer"]

MOST_MEASURED = 8
SECONDS = 1800
FLAG = "--xla_force_host_platform_device_count"


def measure_rows(survey: Survey, *, most: int = MOST_MEASURED) -> Survey:
    """Run the quickest strategies that fit on this machine, in turns; return the survey with what was measured.

    One device is measured with them. The ratio of its step to its prediction is what the profile does not know of this
    network, and corrects the computing time of all strategies.

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
    alone = with_mesh(network.config, {"data": 1})
    if isinstance(alone, str):
        raise InvalidInput(f"one device cannot run this configuration: {alone}")
    single = Candidate("one device", 1, alone)
    facts = compile_candidates(network, [single], profile, 1, lambda _done, _all: None)[id(single)]
    if isinstance(facts, str):
        raise InvalidInput(f"one device cannot run this configuration: {facts}")
    chosen = sorted((row for row in survey.rows if row.fits), key=lambda row: row.seconds)[:most]
    configs = [alone, *(row.candidate.config for row in chosen)]
    requests = [
        {"config": config.model_dump(mode="json"), "card": network.card, "dtypes": network.dtypes}
        for config in configs
        if config is not None
    ]
    first, *others = run_measurer(requests, survey.devices)
    ratio = first["seconds"] / predict(facts, profile, network.config.model.precision).step_s
    found = {id(row): answer for row, answer in zip(chosen, others, strict=True)}
    rows = tuple(_measured(row, found.get(id(row), {}), ratio) for row in survey.rows)
    return replace(survey, rows=rows, ratio=ratio, alone_s=first["seconds"])


def run_measurer(requests: Sequence[Mapping[str, Any]], devices: int) -> list[dict[str, Any]]:
    """Return the answers of `jaxtrain.planner.measurer`, run in a process of its own.

    Raises:
        TerrashardError: it ended without an answer.
    """
    flags = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(FLAG)]
    environment = {**os.environ, "XLA_FLAGS": " ".join([*flags, f"{FLAG}={devices}"])}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jaxtrain.planner.measurer"],
        input=json.dumps(list(requests)), capture_output=True, text=True, env=environment, timeout=SECONDS,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TerrashardError(f"the strategies could not be measured: {last[0]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def corrected(prediction: Prediction, ratio: float) -> Prediction:
    """Return the prediction with its computing time times a ratio; exchanges stay as they are."""
    parts = {
        "compute_s": prediction.compute_s * ratio,
        "memory_s": prediction.memory_s * ratio,
        "idle_s": prediction.idle_s * ratio,
    }
    return replace(prediction, **parts, step_s=sum(parts.values()) + prediction.collective_s)


def _measured(row: Row, answer: Mapping[str, Any], ratio: float) -> Row:
    prediction = None if row.prediction is None else corrected(row.prediction, ratio)
    if "why_not" in answer:
        return replace(row, prediction=prediction, fits=False, why_not=answer["why_not"])
    return replace(row, prediction=prediction, measured_s=answer.get("seconds"), every=tuple(answer.get("every", ())))
