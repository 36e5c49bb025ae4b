"""Compare the placements of a network with branches: bytes sent, operations, memory and time of each.

The list is that of Aspri, Tsagkatakis & Tsakalides (2020, doi:10.3390/rs12172670), who split a network of several
modalities over a cluster in several ways: all of it on each device, its branches on devices of their own with the
fusion on one of them or on another, its layers in stages, its filters split, and mixtures of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jaxtrain.config import TrainConfig
from jaxtrain.models.units import FUSION
from jaxtrain.planner.candidates import Candidate
from jaxtrain.planner.cost import peak_bytes, predict, program_seconds
from jaxtrain.planner.facts import Facts
from jaxtrain.planner.framing import header_bytes
from jaxtrain.planner.profile import Profile
from jaxtrain.planner.survey import Network, compile_candidates, flops_by_stage
from zarr_store.errors import InvalidInput

__all__ = ["Placed", "PlacementRow", "branches_of", "list_placements", "place_run", "sent_by_all", "survey_placements"]

ONE, REPLICATED = "one device", "data parallel"


@dataclass(frozen=True)
class Placed:
    """One placement of one run."""

    name: str
    candidate: Candidate

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.candidate.devices


@dataclass(frozen=True)
class PlacementRow:
    """The predicted costs of one placement."""

    placed: Placed
    facts: Facts | None
    why_not: str = ""
    step_s: float = math.nan
    """Predicted seconds of a step."""
    busy: tuple[float, ...] = ()
    """Share of the step in which each device, or each of a group, computes, as predicted."""
    fixed_bytes: float = math.nan
    """Bytes that all devices send in a step, whatever its batch: gradients and counts."""
    window_bytes: float = math.nan
    """Bytes that all devices send for each window of a batch: activations and their gradients."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON."""
        config = self.placed.candidate.config
        found: dict[str, Any] = {"placement": self.placed.name, "devices": self.placed.devices}
        if config is not None:
            found["settings"] = {"placement": config.placement.model_dump(mode="json", exclude_defaults=True),
                                 "mesh": config.mesh.model_dump(mode="json", exclude_unset=True)}  # fmt: skip
        if self.facts is None:
            return found | {"why_not": self.why_not}
        sent = sent_by_all(self.facts)
        return found | {
            "bytes_step": sum(sent.values()), "bytes_by_kind": sent, "header_bytes": header_bytes(self.facts),
            "bytes_fixed": self.fixed_bytes, "bytes_window": self.window_bytes,
            "flops_devices": flops_by_stage(self.facts), "busy_devices": list(self.busy),
            "peak_bytes_device": peak_bytes(self.facts), "predicted_step_s": self.step_s,
            "batch": self.facts.batch,
        }  # fmt: skip


def branches_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the branches of a run's network; none where it has no branches."""
    return tuple(config.data.modalities) if config.model.name == "multimodal" else ()


def place_run(config: TrainConfig, placement: Mapping[str, Any], mesh: Mapping[str, Any]) -> TrainConfig | str:
    """Return the run with another placement, or why it cannot be."""
    values = {**config.model_dump(exclude={"mesh", "placement"}), "placement": dict(placement), "mesh": dict(mesh)}
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def list_placements(config: TrainConfig) -> list[Placed]:
    """List the placements that are compared, the plainest first.

    Args:
        config: The run; its own mesh plays no part unless it has a placement. That one is listed, too, with its mesh,
            such as replicas that divide the optimiser (`mesh.zero`).

    Raises:
        InvalidInput: The network has no branches, or a single one.
    """
    names = branches_of(config)
    if len(names) < 2:
        raise InvalidInput(
            f"model.name = {config.model.name!r} has no branches to place: take a network with two modalities or more "
            "(model.name = 'multimodal'), or survey it without placements"
        )
    first, *others = names
    *before, last = names
    branches: list[tuple[str, list[list[str]], dict[str, Any]]] = [
        (f"branches, fusion with {first}", [[first, FUSION], others], {}),
        (f"branches, fusion with {last}", [before, [last, FUSION]], {}),
        ("branches, fusion apart", [[first], others, [FUSION]], {}),
        ("branches × replicas", [[first, FUSION], others], {"data": 2}),
        ("branches × filters", [[first, FUSION], others], {"model": 2}),
    ]
    wanted: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (ONE, {}, {"data": 1}),
        (REPLICATED, {"kind": "replicated", "parts": 2}, {}),
        ("layers in stages", {"kind": "stages", "parts": 2}, {"data": 1}),
        ("filters split", {"kind": "filters", "parts": 2}, {"data": 1}),
        *((name, {"kind": "branches", "groups": groups}, {"data": 1} | mesh) for name, groups, mesh in branches),
    ]
    own = config.placement
    if own.kind != "mesh":
        table = own.model_dump(mode="json", exclude_unset=True)
        configured = ("as configured", table, config.mesh.model_dump(mode="json", exclude_unset=True))
        made = place_run(config, *configured[1:])
        listed = [place_run(config, placement, mesh) for _, placement, mesh in wanted]
        if not any(_alike(made, other) for other in listed):
            wanted.append(configured)
    found = []
    for name, placement, mesh in wanted:
        made = place_run(config, placement, mesh)
        if isinstance(made, str):
            found.append(Placed(name, Candidate(name, len(placement.get("groups", ())) or 2, None, made)))
        else:
            found.append(Placed(name, Candidate(name, made.mesh.size, made)))
    return found


def _alike(one: TrainConfig | str, other: TrainConfig | str) -> bool:
    """Return whether two runs put the same parts on the same devices."""
    if isinstance(one, str) or isinstance(other, str):
        return False
    return (
        one.placement.kind == other.placement.kind
        and one.placement.groups == other.placement.groups
        and (one.mesh == other.mesh)
    )


def survey_placements(
    network: Network,
    profile: Profile,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[PlacementRow, ...]:
    """Predict the costs of each placement; programs are compiled in other processes, and nothing is trained.

    A placement whose devices exchange within a group is compiled for its batch and for twice that, so what travels for
    each window is known apart from what travels once a step. Groups of one device send each other windows alone.

    Args:
        network: The run and its data.
        profile: The machine.
        processes: Processes that compile at the same time.
        on_progress: Called with the programs that are compiled, and all.
    """
    placed = list_placements(network.config)
    wanted, doubles = [], {}
    for one in placed:
        config = one.candidate.config
        if config is None:
            continue
        wanted.append(one.candidate)
        if _inside(config.mesh.axes) > 1:
            double = _of_batch(config, 2 * network.config.run.batch_size)
            doubles[one.name] = Candidate(one.name, one.devices, double)
    facts = compile_candidates(network, [*wanted, *doubles.values()], profile, processes, on_progress)
    return tuple(
        _row(one, facts.get(id(one.candidate), one.candidate.why_not), facts.get(id(doubles.get(one.name))), network,
             profile)
        for one in placed
    )  # fmt: skip


def _inside(axes: Mapping[str, int]) -> int:
    """Return the number of devices of each group."""
    return math.prod(size for name, size in axes.items() if name != "pipe")


def sent_by_all(facts: Facts) -> dict[str, float]:
    """Return the bytes that all devices send in a step, by kind of exchange."""
    total: dict[str, float] = {}
    for one in facts.programs:
        for collective in one.collectives:
            total[collective.kind] = total.get(collective.kind, 0.0) + one.runs * collective.total_bytes
    handed = sum(one.bytes for one in facts.handovers)
    if handed:
        total["copy"] = 2.0 * _inside(facts.mesh) * facts.microbatches * handed
    return {kind: size for kind, size in total.items() if size}


def busy_shares(facts: Facts, profile: Profile, precision: str, step_s: float) -> tuple[float, ...]:
    """Return the share of a step in which a device of each stage computes, as predicted."""
    stages = facts.mesh.get("pipe", 1)
    devices = math.prod(facts.mesh.values())
    found = []
    for stage in range(stages):
        mine = [one for one in facts.programs if one.stage == stage]
        seconds = sum(one.runs * sum(program_seconds(one, profile, precision, devices)) for one in mine)
        found.append(min(1.0, seconds / step_s) if step_s else 0.0)
    return tuple(found)


def _of_batch(config: TrainConfig, batch: int) -> TrainConfig:
    run = config.run.model_copy(update={"batch_size": batch})
    return config.model_copy(update={"run": run})


def _row(
    one: Placed, facts: Facts | str, doubled: Facts | str | None, network: Network, profile: Profile
) -> PlacementRow:
    if isinstance(facts, str):
        return PlacementRow(one, None, facts)
    precision = network.config.model.precision
    step = predict(facts, profile, precision).step_s
    sent = sum(sent_by_all(facts).values())
    fixed, window = math.nan, math.nan
    if doubled is None:
        fixed, window = 0.0, sent / facts.batch
    elif isinstance(doubled, Facts):
        more = sum(sent_by_all(doubled).values()) - sent
        window = more / facts.batch
        fixed = sent - more
    return PlacementRow(one, facts, "", step, busy_shares(facts, profile, precision, step), fixed, window)
