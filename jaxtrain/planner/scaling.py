"""Curves from one device to a thousand: time of a step, efficiency, bytes, memory, and the cost of an epoch.

Each replica keeps its windows, so the batch grows with the number of devices (weak scaling), as in the published
measurements of data-parallel training on satellite images. Few programs are compiled; more replicas of them are
computed (`jaxtrain.planner.scale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.planner.candidates import Candidate, name_of, with_mesh
from jaxtrain.planner.cost import peak_bytes, predict
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.profile import Profile
from jaxtrain.planner.survey import USABLE, Network, bytes_on_wire, compile_candidates
from zarr_store.errors import InvalidInput

__all__ = ["Curve", "Point", "grown", "scaling_curves"]

FAMILIES: tuple[dict[str, Any], ...] = (
    {},
    {"zero": 1},
    {"zero": 3},
    {"space": (2, 1)},
    {"model": 2},
    {"pipe": 2, "schedule": "1f1b"},
)
"""Strategies whose curves are drawn: what is named, and `data` over all other devices."""


@dataclass(frozen=True)
class Point:
    """One number of devices."""

    devices: int
    batch: int
    step_s: float
    images_per_s: float
    efficiency: float
    """Images a second of each device, divided by those of one device alone."""
    sent_bytes: float
    """Bytes that the busiest device sends in a step."""
    peak_bytes: int
    fits: bool
    epoch_s: float
    epoch_device_hours: float
    epoch_cost: float | None
    """In the currency of the profile; None where it states no price."""


@dataclass(frozen=True)
class Curve:
    """One strategy over all numbers of devices that it can use."""

    strategy: str
    points: tuple[Point, ...]
    why_not: str = ""
    """Why there is none, in one line."""


def scaling_curves(
    network: Network,
    devices: Sequence[int],
    profile: Profile,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
    families: Sequence[dict[str, Any]] = FAMILIES,
) -> tuple[Curve, ...]:
    """Return the curves of the strategies for some numbers of devices.

    Args:
        network: from `describe_network`; its batch is that of one device.
        devices: Numbers of devices, in any order.
        profile: the machine that is planned for.
        processes: Processes that compile at the same time.
        families: Strategies to draw: what each names of the mesh besides `data`.
        on_progress: called with the programs that are compiled, and all.

    Raises:
        InvalidInput: one device cannot run the configuration.
    """
    config = network.config
    base = with_mesh(config, {"data": 1})
    if isinstance(base, str):
        raise InvalidInput(f"one device cannot run this configuration: {base}")
    per_device = max(1, config.run.batch_size // max(config.mesh.data, 1))
    wanted: dict[tuple[int, int], Candidate] = {(-1, 1): _candidate(network, {"data": 1}, per_device)}
    reasons: dict[int, str] = {}
    for family, values in enumerate(families):
        size = _inner(values)
        for n in sorted(set(devices)):
            data = n // size
            if n % size or n < size or (values.get("zero") and data < 2) or (n == 1 and values):
                continue
            made = _candidate(network, {**values, "data": data}, per_device * n)
            if made.config is None:
                reasons[family] = made.why_not
            else:
                wanted[family, n] = made
    known = compile_candidates(network, list(wanted.values()), profile, processes, on_progress)
    alone = known[id(wanted[-1, 1])]
    if isinstance(alone, str):
        raise InvalidInput(f"one device cannot run this configuration: {alone}")
    rate = per_device / predict(alone, profile, config.model.precision).step_s
    curves = []
    for family, values in enumerate(families):
        points = []
        for (number, n), candidate in wanted.items():
            facts = known.get(id(candidate))
            if number == family and isinstance(facts, Facts):
                points.append(_point(network, facts, n, rate, profile))
            elif number == family and isinstance(facts, str):
                reasons[family] = facts
        name = name_of({**values, "data": 2})
        curves.append(Curve(name, tuple(points), "" if points else reasons.get(family, "no number of devices fits")))
    return tuple(curves)


def grown(network: Network, devices: int) -> Network:
    """Return the network with the batch of so many devices, each of which keeps its windows."""
    config = network.config
    size = devices * max(1, config.run.batch_size // max(config.mesh.data, 1))
    run = config.run.model_copy(update={"batch_size": size})
    return replace(network, config=config.model_copy(update={"run": run}))


def _inner(values: dict[str, Any]) -> int:
    return math.prod(
        math.prod(v) if isinstance(v, tuple) else v for k, v in values.items() if k in ("space", "model", "pipe")
    )


def _candidate(network: Network, values: dict[str, Any], batch: int) -> Candidate:
    run = network.config.run.model_copy(update={"batch_size": batch})
    made = with_mesh(network.config.model_copy(update={"run": run}), values)
    n = _inner(values) * int(values["data"])
    return Candidate(name_of(values), n, None if isinstance(made, str) else made, made if isinstance(made, str) else "")


def _point(network: Network, facts: Facts, devices: int, alone: float, profile: Profile) -> Point:
    step = predict(facts, profile, network.config.model.precision).step_s
    images = facts.batch / step
    epoch = network.windows / images
    hours = epoch * devices / 3600
    peak = peak_bytes(facts)
    return Point(
        devices=devices,
        batch=facts.batch,
        step_s=step,
        images_per_s=images,
        efficiency=images / devices / alone,
        sent_bytes=sum(size for kinds in bytes_on_wire(facts).values() for size in kinds.values()),
        peak_bytes=peak,
        fits=peak <= USABLE * profile.device.memory,
        epoch_s=epoch,
        epoch_device_hours=hours,
        epoch_cost=None if profile.cost_an_hour is None else hours * profile.cost_an_hour,
    )
