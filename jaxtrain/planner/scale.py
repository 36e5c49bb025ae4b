"""Extend what was compiled for a few devices to any number along the axis `data`.

More replicas with the same windows each run the same program: only the size of the groups that exchange along `data`
changes, and with ZeRO the part of the state that each holds. So a thousand devices need no program for a thousand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtrain.planner.collectives import Collective, wire_factor
from jaxtrain.planner.facts import Compiled, Facts

__all__ = ["State", "extend", "representative", "smallest_mesh"]

FEWEST = 4
"""Replicas that are compiled for: two would hide the difference between n and n - 1."""


@dataclass(frozen=True)
class State:
    """Bytes of the fullest device on the larger mesh."""

    parameters: int
    optimizer: int


def smallest_mesh(data: int) -> int:
    """Return the number of replicas to compile for, which stands for `data` of them.

    >>> smallest_mesh(3), smallest_mesh(8), smallest_mesh(1024)
    (3, 8, 4)
    """
    return data if data <= 2 * FEWEST else FEWEST


def representative(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request whose program stands for that of a request: the same one on the smallest mesh.

    Args:
        request: for `jaxtrain.planner.compiler.answer`; numbers of replicas with one representative share a program.
    """
    config = request["config"]
    mesh, run = config["mesh"], config["run"]
    least = smallest_mesh(mesh["data"])
    smaller = {"mesh": {**mesh, "data": least}, "run": {**run, "batch_size": run["batch_size"] * least // mesh["data"]}}
    return {**request, "config": {**config, **smaller}}


def extend(facts: Facts, data: int, state: State) -> Facts:
    """Return the facts of the same programs with more replicas.

    Args:
        facts: of the smaller mesh, with as many windows for each replica.
        data: Size of the axis `data`.
        state: what the fullest device holds on the larger mesh.
    """
    before = facts.mesh.get("data", 1)
    if data == before:
        return facts
    saved = facts.parameter_bytes + facts.optimizer_bytes - state.parameters - state.optimizer
    programs = tuple(
        _program(one, before, data, saved if one.name in ("step", "update") else 0) for one in facts.programs
    )
    return replace(
        facts,
        mesh={**facts.mesh, "data": data},
        programs=programs,
        batch=facts.batch * data // before,
        parameter_bytes=state.parameters,
        optimizer_bytes=state.optimizer,
    )


def _program(program: Compiled, before: int, data: int, saved: int) -> Compiled:
    return replace(
        program,
        collectives=tuple(_collective(one, before, data) for one in program.collectives),
        argument_bytes=max(0, program.argument_bytes - saved),
        output_bytes=max(0, program.output_bytes - saved),
        alias_bytes=max(0, program.alias_bytes - saved),
    )


def _collective(one: Collective, before: int, data: int) -> Collective:
    if "data" not in one.axes or one.kind == "collective-permute":
        return one
    group = one.group * data // before
    kind = one.kind
    if kind == "reduce-scatter" and not all(_splits(shape, data) for shape in one.shapes):
        kind = "all-reduce"  # what cannot be split over so many replicas stays whole
    ratio = wire_factor(kind, group) / wire_factor(one.kind, one.group)
    if one.kind == "reduce-scatter":
        ratio = (
            wire_factor(kind, group)
            * (1 if kind == "all-reduce" else 1 / group)
            / (wire_factor(one.kind, one.group) / one.group)
        )
    if kind == "all-gather" and not any(_splits(shape, data) for shape in one.shapes):
        ratio = 0.0
    devices = data / before
    printed = one.printed_bytes
    if printed is not None:  # an all-reduce before it was corrected
        printed *= wire_factor("all-reduce", group) / wire_factor("all-reduce", one.group)
    return replace(
        one, kind=kind, group=group, wire_bytes=one.wire_bytes * ratio, total_bytes=one.total_bytes * ratio * devices,
        printed_bytes=printed,
    )  # fmt: skip


def _splits(shape: Sequence[int], parts: int) -> bool:
    return any(extent % parts == 0 for extent in shape)
