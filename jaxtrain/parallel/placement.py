"""Place the branches of a network on groups of devices, and cut them into parts.

A network of several modalities is a tree: each branch takes an input of its own, and the fusion takes the results of
all. `placement.groups` names what each group of devices holds:

    [["s2", "fusion"], ["s1"]]              branches on two groups, the fusion with the first of them
    [["s2"], ["s1"], ["fusion"]]            the fusion on a third group
    [["s2.1", "s1.1"], ["s2.2", "s1.2", "fusion"]]      layers in stages: the branch s2 in two parts, and s1 too

A number after the name of a branch, or of the fusion, means one of several parts, which take equally long. Groups are
as large as the other axes of the mesh say, so replicas and split filters combine with every placement. The parts
become programs of their own, which `parallel/pipeline.py` runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from jaxtrain.models.units import FUSION, Unit
from jaxtrain.parallel.links import groups_of
from jaxtrain.parallel.schedule import balance_cuts
from jaxtrain.parallel.stages import Layout, Part, owners
from zarr_store.errors import InvalidInput

__all__ = ["Streams", "check_groups", "place_branches", "place_stages", "split_name"]


@dataclass(frozen=True)
class Streams:
    """The units of a network with branches, and what each costs."""

    units: Mapping[str, Sequence[Unit]]
    """Units of each branch, by its name, and of the fusion, which comes last."""
    costs: Mapping[str, Sequence[float]]

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches."""
        return tuple(name for name in self.units if name != FUSION)

    @property
    def all_units(self) -> list[Unit]:
        """All units in the order of the streams, the fusion last."""
        return [unit for units in self.units.values() for unit in units]


def split_name(name: str, streams: Sequence[str]) -> tuple[str, int]:
    """Return the stream and the number of its part, from 1; 0 for a whole stream.

    >>> split_name("s2.1", ["s2", "fusion"]), split_name("fusion", ["s2", "fusion"])
    (('s2', 1), ('fusion', 0))
    """
    found = re.fullmatch(r"(.+)\.([1-9]\d{0,3})", name)
    return (found[1], int(found[2])) if name not in streams and found else (name, 0)


def check_groups(groups: Sequence[Sequence[str]], branches: Sequence[str]) -> dict[str, list[int]]:
    """Return the group of each part of every stream; branches come in the order of the network, the fusion last.

    Args:
        groups: The table `placement.groups`.
        branches: Names of the network's branches.

    Raises:
        InvalidInput: A group is empty, or a name is unknown, missing, twice there, or a part is left out.
    """
    streams = [*branches, FUSION]
    known = f"its branches are {', '.join(branches)}, and there is {FUSION}"
    places: dict[str, dict[int, int]] = {name: {} for name in streams}
    for number, group in enumerate(groups):
        if not group:
            raise InvalidInput(f"group {number} of placement.groups is empty: name a branch there, or leave it out")
        for name in group:
            stream, part = split_name(name, streams)
            if stream not in places:
                raise InvalidInput(f"placement.groups names {name!r}, which this network does not have: {known}")
            if part in places[stream]:
                raise InvalidInput(f"placement.groups names {name!r} twice: a part lies on one group, drop one of them")
            places[stream][part] = number
    for stream, parts in places.items():
        if not parts:
            raise InvalidInput(f"placement.groups leaves out {stream!r}: add it to a group; {known}")
        if 0 in parts and len(parts) > 1:
            raise InvalidInput(
                f"placement.groups names {stream!r} as a whole and a part of it: name either {stream!r}, or all of its "
                f"parts {stream}.1, {stream}.2, …"
            )
        if 0 not in parts and sorted(parts) != [*range(1, len(parts) + 1)]:
            missing = next(n for n in range(1, max(parts) + 1) if n not in parts)
            raise InvalidInput(f"placement.groups names {stream}.{max(parts)}, but no {stream}.{missing}: add it")
    return {stream: [parts[number] for number in sorted(parts)] for stream, parts in places.items()}


def place_branches(mesh: Mesh, streams: Streams, names: Sequence[str], groups: Sequence[Sequence[str]]) -> Layout:
    """Place the streams on groups of devices as `placement.groups` says.

    Args:
        mesh: Mesh whose first axis is `pipe`.
        streams: The branches and the fusion.
        names: Paths of all parameters and batch statistics.
        groups: What each group holds.

    Raises:
        InvalidInput: The groups do not fit the network or the mesh, or a branch has fewer places to cut than parts.
    """
    homes = check_groups(groups, streams.branches)
    if len(groups) != mesh.shape.get("pipe", 1):
        raise InvalidInput(
            f"placement.groups has {len(groups)} groups, the mesh {mesh.shape.get('pipe', 1)}: leave mesh.pipe out, it "
            "follows from the groups"
        )
    starts = {stream: _cut(stream, streams, len(home), mesh) for stream, home in homes.items()}
    return _layout(mesh, streams, names, homes, starts)


def place_stages(mesh: Mesh, streams: Streams, names: Sequence[str], stages: int) -> Layout:
    """Place the layers of all branches in stages: the first layers of every branch on the first group, and so on.

    Args:
        mesh: Mesh whose first axis is `pipe`.
        streams: The branches and the fusion.
        names: Paths of all parameters and batch statistics.
        stages: Number of stages.

    Raises:
        InvalidInput: The network has fewer layers than there are stages.
    """
    deepest = max(len(streams.units[name]) for name in streams.branches)
    offset = {name: deepest if name == FUSION else 0 for name in streams.units}
    levels = [0.0] * (deepest + len(streams.units[FUSION]))
    whole = [True] * len(levels)
    for name, units in streams.units.items():
        for i, (unit, cost) in enumerate(zip(units, streams.costs[name], strict=True)):
            levels[offset[name] + i] += cost
            if offset[name] + i + 1 < len(levels):
                whole[offset[name] + i + 1] &= _may_follow(unit, mesh) or i + 1 == len(units)
    cuts = _balanced(levels, whole, stages)
    homes: dict[str, list[int]] = {}
    starts: dict[str, list[int]] = {}
    for name, units in streams.units.items():
        stage_of = [sum(offset[name] + i >= cut for cut in cuts) - 1 for i in range(len(units))]
        starts[name] = [i for i, stage in enumerate(stage_of) if not i or stage != stage_of[i - 1]]
        homes[name] = [stage_of[i] for i in starts[name]]
    return _layout(mesh, streams, names, homes, starts)


def _may_follow(unit: Unit, mesh: Mesh) -> bool:
    """Return whether a cut may follow a unit: with split filters the inside of a block lies split."""
    return unit.whole or mesh.shape.get("model", 1) == 1


def _balanced(costs: Sequence[float], may_begin: Sequence[bool], parts: int) -> list[int]:
    """Return the first of each of some runs of equal cost, where only some places may begin one."""
    first = [position for position, may in enumerate(may_begin) if may]
    ends = [*first[1:], len(costs)]
    cuts = balance_cuts([sum(costs[a:b]) for a, b in zip(first, ends, strict=True)], parts)
    return [first[cut] for cut in cuts]


def _cut(stream: str, streams: Streams, parts: int, mesh: Mesh) -> list[int]:
    """Return the first unit of each part of a stream.

    Raises:
        InvalidInput: There are fewer places to cut than parts.
    """
    units = streams.units[stream]
    may_begin = [True, *(_may_follow(unit, mesh) for unit in units[:-1])]
    if parts > sum(may_begin):
        named = "the fusion" if stream == FUSION else f"the branch {stream}"
        places = sum(may_begin)
        can = f"can be cut into {places} parts at most" if places > 1 else "cannot be cut"
        raise InvalidInput(
            f"placement.groups cuts {named} into {parts} parts, but it {can}: name fewer parts of it, or give it a "
            "larger depth"
        )
    return _balanced(streams.costs[stream], may_begin, parts)


def _layout(
    mesh: Mesh, streams: Streams, names: Sequence[str], homes: Mapping[str, list[int]],
    starts: Mapping[str, list[int]],
) -> Layout:  # fmt: skip
    """Make the parts of all streams, and let the last part of each branch give to the first one of the fusion."""
    joined = sum(len(home) for stream, home in homes.items() if stream != FUSION)
    last = joined + len(homes[FUSION]) - 1
    parts: list[Part] = []
    begin = 0
    for stream, units in streams.units.items():
        ends = [*starts[stream][1:], len(units)]
        for i, (start, end) in enumerate(zip(starts[stream], ends, strict=True)):
            k, inner = len(parts), i + 1 < len(ends)
            after = k + 1 if inner else None if k == last else joined
            name = stream if len(ends) == 1 else f"{stream}.{i + 1}"
            source = stream if not i and stream != FUSION else ""
            parts.append(Part(name, (begin + start, begin + end), homes[stream][i], after, source))
        begin += len(units)
    units = streams.all_units
    return Layout(groups_of(mesh), tuple(parts), tuple(unit.name for unit in units), owners(parts, units, names))
