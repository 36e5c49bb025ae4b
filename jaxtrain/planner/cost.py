"""Predict the seconds of a step from the operations of its programs and the speed of a machine.

An instruction takes as long as the slower of its arithmetic and its memory traffic (the roofline of Williams, Waterman
& Patterson 2009, doi:10.1145/1498765.1498785), and the machine's cost of starting it. A collective takes the latency of
its messages and its bytes on the wire over the bandwidth of the narrowest link that it crosses. Stages of a pipeline
follow their schedule, and wait for each other where it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtrain.parallel.schedule import Work, bubble, order_of, order_of_tree, trace
from jaxtrain.planner.collectives import Collective
from jaxtrain.planner.facts import Compiled, Facts
from jaxtrain.planner.hlo import Array
from jaxtrain.planner.profile import Profile
from zarr_store.errors import InvalidInput

__all__ = ["Prediction", "collective_seconds", "exchange_seconds", "peak_bytes", "predict", "program_seconds"]

BACKWARD = 2 / 3
"""Share of the computing time in which gradients can travel: the backward pass costs twice the forward pass."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step, and their parts. The parts add up to the step."""

    step_s: float
    compute_s: float
    """Seconds of instructions that arithmetic limits, and of starting instructions (`launch_s`)."""
    memory_s: float
    """Seconds of instructions that memory traffic limits."""
    collective_s: float
    """Seconds of exchanges that do not overlap with computing."""
    idle_s: float
    """Seconds in which stages of a pipeline wait."""
    hidden_s: float
    """Seconds of exchanges that overlap with computing; they are not part of the step."""
    bubble: float
    """Share of the idle time of a pipeline's schedule, as predicted."""
    launch_s: float = 0.0
    """Part of `compute_s` for starting instructions."""


def predict(facts: Facts, profile: Profile, precision: str) -> Prediction:
    """Predict the seconds of one step.

    Args:
        facts: what the programs of the strategy do.
        profile: the machine.
        precision: number type of the convolutions, `model.precision`.

    Raises:
        InvalidInput: the profile joins fewer devices than the strategy needs.
    """
    devices = math.prod(facts.mesh.values())
    if profile.link(devices) is None:
        most = profile.links[-1].devices
        raise InvalidInput(f"profile {profile.name} joins at most {most} devices, the mesh needs {devices}")
    if facts.schedule:
        return _piped(facts, profile, precision)
    (program,) = facts.programs
    computed, moved = program_seconds(program, profile, precision, devices)
    total = exchange_seconds(program.collectives, facts.mesh, profile)
    # only what nobody waits for can be hidden: gradients on their way, and parameters gathered ahead of their layer
    data = [one for one in program.collectives if "data" in one.axes]
    along_data = exchange_seconds(data, facts.mesh, profile)
    hidden = min(profile.overlap * along_data, BACKWARD * (computed + moved))
    started = launch_seconds(program, profile, devices)
    return Prediction(computed + moved + total - hidden, computed, moved, total - hidden, 0.0, hidden, 0.0, started)


def program_seconds(program: Compiled, profile: Profile, precision: str, devices: int) -> tuple[float, float]:
    """Return the seconds of one execution that arithmetic and that memory traffic take, without exchanges.

    Args:
        program: what a device runs.
        profile: the machine.
        precision: number type of the convolutions.
        devices: Devices that work at the same time; those of a processor share its cores.
    """
    device = profile.device
    if device.measured and program.kinds:
        return _measured_seconds(program, profile, precision, devices)
    peak = device.peak.get(precision, device.peak.get("float32", 0.0)) * device.reached  # type: ignore[call-overload]  # any text
    computed = moved = 0.0
    for flops, elements, size, count in program.work:
        arithmetic = flops / peak + elements / device.elementwise
        traffic = size / (device.bandwidth * device.reached_bandwidth)
        if arithmetic >= traffic:
            computed += count * (arithmetic + device.launch)
        else:
            moved += count * traffic
            computed += count * device.launch
    slower = device.slowed(devices)
    return computed * slower, moved * slower


def launch_seconds(program: Compiled, profile: Profile, devices: int) -> float:
    """Return the part of `program_seconds` that is the starting of instructions.

    It is 0 where instructions were measured, because each of those seconds has its start in it.
    """
    if profile.device.measured and program.kinds:
        return 0.0
    return sum(count for *_, count in program.work) * profile.device.launch * profile.device.slowed(devices)


def _measured_seconds(program: Compiled, profile: Profile, precision: str, devices: int) -> tuple[float, float]:
    """Return what `program_seconds` returns, from the curves of a machine that was measured."""
    device = profile.device
    slower = device.peak["float32"] / device.peak.get(precision, device.peak["float32"])  # type: ignore[call-overload]  # any text
    computed = moved = 0.0
    for (flops, _, size, count), kind in zip(program.work, program.kinds, strict=True):
        intensity = flops / size if flops and size else math.inf
        seconds = count * device.seconds(kind, flops or size, devices, intensity=intensity)
        if flops:
            computed += slower * seconds
        else:
            moved += seconds
    return computed, moved


def exchange_seconds(collectives: Sequence[Collective], mesh: Mapping[str, int], profile: Profile) -> float:
    """Return the seconds of all exchanges of one execution, one after the other.

    Compilers for accelerators join small exchanges of one kind along one axis into one message (`Profile.combined`), so
    these pay the latency once for as many bytes; exchanges inside a network's layers wait for each other and are not.
    """
    total = 0.0
    joined: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in collectives:
        if profile.combined and "data" in one.axes and one.kind != "collective-permute":
            joined.setdefault((one.kind, one.axes), []).append(one)
        else:
            total += collective_seconds(one, mesh, profile)
    for (kind, axes), several in joined.items():
        size = sum(one.wire_bytes for one in several)
        if size:
            bandwidth, _ = path_of(axes, mesh, profile)
            messages = math.ceil(size / profile.combined)
            total += messages * _delay(kind, axes, mesh, profile) + size / bandwidth
    return total


def _delay(kind: str, axes: Sequence[str], mesh: Mapping[str, int], profile: Profile) -> float:
    """Return the seconds for which the messages of one exchange follow each other, level by level of the links.

    Members of a node exchange first, then one of each node with those of other nodes, so a thousand devices wait for
    the slow links as often as there are nodes, not as often as there are devices.
    """
    if kind == "collective-permute":
        return path_of(axes, mesh, profile)[1]
    nearest, group, span = _extent(axes, mesh)
    seconds, joined = 0.0, 1
    for link in profile.links:
        reached = min(group, max(1, (link.devices or span) // nearest))
        if reached > joined:
            parts = math.ceil(reached / joined)
            # on GPUs small messages take a tree, elsewhere they go round a ring
            seconds += link.latency * (math.ceil(math.log2(parts)) if profile.device.kind == "gpu" else parts - 1)
            joined = reached
    return 2 * seconds if kind == "all-reduce" else seconds


def collective_seconds(one: Collective, mesh: Mapping[str, int], profile: Profile) -> float:
    """Return the seconds of a collective in one execution, alone on its links."""
    if not one.wire_bytes:
        return 0.0
    if curve := profile.exchanges.get(one.kind):
        # a processor exchanges the arrays of one instruction one after the other
        arrays = (Array(kind, shape).bytes for kind, shape in zip(one.types, one.shapes, strict=True))
        return one.count * sum(map(curve.at, arrays))
    bandwidth, _ = path_of(one.axes, mesh, profile)
    return one.count * _delay(one.kind, one.axes, mesh, profile) + one.wire_bytes / bandwidth


def path_of(axes: Sequence[str], mesh: Mapping[str, int], profile: Profile) -> tuple[float, float]:
    """Return bandwidth and latency of the narrowest link between devices that differ along some axes.

    Devices that share a node use its ways out together, so a group with k devices in each node has k times the
    bandwidth of one between nodes, and at most that inside.
    """
    nearest, group, span = _extent(axes, mesh)
    bandwidth, latency, reached = math.inf, 0.0, 1
    for link in profile.links:
        # devices of the group within the level inside: all of them share its ways out
        bandwidth = min(bandwidth, link.bandwidth * max(1, min(reached // nearest, group)))
        latency = link.latency
        reached = link.devices or span
        if span <= reached:
            break
        bandwidth = math.inf if link.devices is not None and nearest >= link.devices else bandwidth
    return bandwidth, latency


def _extent(axes: Sequence[str], mesh: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the distance of the nearest members of a group along some axes, their number, and what they span."""
    names = list(mesh)
    strides = {name: math.prod([*mesh.values()][names.index(name) + 1 :]) for name in names}
    span = 1 + sum(strides[name] * (mesh[name] - 1) for name in axes)
    group = math.prod(mesh[name] for name in axes)
    return min((strides[name] for name in axes if mesh[name] > 1), default=1), group, span


def peak_bytes(facts: Facts) -> int:
    """Return the bytes that the fullest device needs at once.

    A stage of a pipeline keeps its state, its gradient, the batch, the images of its microbatches, the activations of
    those under way, and what arrived before its turn, beside what its largest program needs for itself.
    """
    if not facts.schedule:
        return facts.programs[0].peak_bytes
    flying, early = _in_flight(facts), _arrived_early(facts)
    most = 0
    for stage in range(facts.mesh["pipe"]):
        mine = [one for one in facts.programs if one.stage == stage]
        passes = [one for one in mine if one.name in ("forward", "backward")]
        # what a stage holds throughout: its state and the gradient; with ZeRO-1 each replica sums a whole one apart
        totals = {one.part: one.argument_bytes - one.output_bytes for one in mine if one.name == "total"}
        state = sum(one.argument_bytes + max(0, totals.get(one.part, 0)) for one in mine if one.name == "update")
        images = sum(one.output_bytes for one in mine if one.name == "images")
        under_way = sum(flying[one.part] * _kept(one) for one in mine if one.name == "forward")
        work = max((_needs(one) for one in passes), default=0)
        last = max((_needs(one) for one in mine if one not in passes), default=0)
        most = max(most, state + images + under_way + early[stage] + work, state + last)
    return most + facts.batch_bytes


def _arrived_early(facts: Facts) -> list[int]:
    """Return for each stage the most bytes that others handed to it and that no pass of it counts as its own.

    These are activations that wait for their forward pass, and gradients until their backward pass has ended.
    """
    homes = facts.homes or tuple(part % facts.mesh["pipe"] for part in range(facts.parts))
    size = {one.giver: one.bytes for one in facts.handovers}
    now, most = [0] * facts.mesh["pipe"], [0] * facts.mesh["pipe"]
    for interval in trace(_orders(facts), chunks=facts.parts, after=facts.takers):
        part, here, forward = interval.work.chunk, homes[interval.work.chunk], interval.work.kind == "forward"
        givers = [giver for giver, taker in enumerate(facts.takers) if taker == part]
        taken = givers if forward else [part]  # sizes go by the part that gave forward
        sent = [part] if forward else givers
        used = sum(size.get(giver, 0) for giver in taken)
        now[here] -= used if forward else 0
        most[here] = max(most[here], now[here])
        now[here] -= 0 if forward else used
        for giver in sent:
            taker = facts.takers[giver]
            if taker is not None:
                now[homes[taker if forward else giver]] += size.get(giver, 0)
    return most


def _kept(forward: Compiled) -> int:
    """Return the bytes that a forward pass leaves for its backward pass."""
    kept = forward.output_bytes if forward.kept_bytes is None else forward.kept_bytes
    return kept + forward.borrowed_bytes


def _needs(program: Compiled) -> int:
    """Return the bytes that a program needs besides its arguments, and besides what is counted as under way."""
    return program.temporary_bytes + program.output_bytes - program.alias_bytes - (program.kept_bytes or 0)


def _orders(facts: Facts) -> list[list[Work]]:
    if facts.takers != (*range(1, facts.parts), None):
        return order_of_tree(facts.takers, facts.homes, microbatches=facts.microbatches)
    schedule: str = facts.schedule
    return order_of(schedule, groups=facts.mesh["pipe"], chunks=facts.parts, microbatches=facts.microbatches)  # type: ignore[arg-type]  # one of three


def _in_flight(facts: Facts) -> dict[int, int]:
    """Return the most microbatches of each part whose forward pass is done and whose backward pass is not."""
    most = dict.fromkeys(range(facts.parts), 0)
    for order in _orders(facts):
        now = dict.fromkeys(range(facts.parts), 0)
        for work in order:
            now[work.chunk] += 1 if work.kind == "forward" else -1
            most[work.chunk] = max(most[work.chunk], now[work.chunk])
    return most


def _piped(facts: Facts, profile: Profile, precision: str) -> Prediction:
    inside = {name: size for name, size in facts.mesh.items() if name != "pipe"}
    devices = math.prod(facts.mesh.values())
    # of devices that share a processor, those of waiting stages leave it to the others; another process does not
    apart = profile.processes > 1
    busy = devices if profile.device.together is None or apart else math.prod(inside.values())
    seconds: dict[tuple[str, int], tuple[float, float, float]] = {}
    for one in facts.programs:
        exchange = exchange_seconds(one.collectives, inside, profile)
        seconds[one.name, one.part] = (*program_seconds(one, profile, precision, busy), exchange)
    bandwidth, latency = path_of(("pipe",), facts.mesh, profile)
    given = {one.giver: latency + one.bytes / bandwidth for one in facts.handovers}
    if apart and (permute := profile.exchanges.get("collective-permute")):  # each array is a message of its own
        given = {one.giver: one.arrays * permute.at(one.bytes / one.arrays) for one in facts.handovers}
    stages = facts.mesh["pipe"]
    givers = [[part for part, taker in enumerate(facts.takers) if taker == k] for k in range(facts.parts)]

    def computing(work: Work) -> float:
        return sum(seconds[work.kind, work.chunk])

    def cost(work: Work) -> float:
        sends = [work.chunk] if work.kind == "forward" else givers[work.chunk]
        return computing(work) + sum(given.get(part, 0.0) for part in sends)

    intervals = trace(_orders(facts), chunks=facts.parts, seconds=cost, after=facts.takers)
    span = max(interval.end for interval in intervals)
    work = sum(interval.end - interval.start for interval in intervals)
    if apart:
        span = _in_turn(facts, computing, given)
    elif profile.device.together is not None:  # what all stages do must pass through the cores they share
        span = max(span, work * max(1, math.prod(inside.values())) / profile.device.together)
    edges = [sum(seconds[name, part]) for name, part in seconds if name == "images"]
    ends: dict[int, float] = {}
    for (name, part), value in seconds.items():
        if name in ("total", "update"):
            ends[part] = ends.get(part, 0.0) + sum(value)
    updates = [*ends.values()]
    step = span + sum(edges) + max(updates, default=0.0)
    runs = {(one.name, one.part): one.runs for one in facts.programs}
    share = [sum(runs[at] * value[i] for at, value in seconds.items()) / stages for i in range(3)]
    handed = 2 * facts.microbatches * sum(given.values()) / stages
    busy_s = min(step, sum(share) + handed)
    started = sum(one.runs * launch_seconds(one, profile, busy) for one in facts.programs) / stages
    idle = max(0.0, step - busy_s)
    return Prediction(step, share[0], share[1], share[2] + handed, idle, 0.0, bubble(intervals), started)


def _in_turn(facts: Facts, computing: Callable[[Work], float], given: Mapping[int, float]) -> float:
    """Return the seconds of the passes of a pipeline whose stages lie in several processes.

    All processes walk through one schedule, and each runs its programs in that order. A copy between two processes is a
    program of both. So at each copy the earlier process waits for the later one.
    """
    homes = facts.homes or tuple(part % facts.mesh["pipe"] for part in range(facts.parts))
    clock = [0.0] * facts.mesh["pipe"]
    for interval in trace(_orders(facts), chunks=facts.parts, after=facts.takers):
        work = interval.work
        clock[homes[work.chunk]] += computing(work)
        for giver, taker in enumerate(facts.takers):
            goes = giver == work.chunk if work.kind == "forward" else taker == work.chunk
            if goes and taker is not None and homes[giver] != homes[taker]:
                both = homes[giver], homes[taker]
                ends = max(clock[k] for k in both) + given.get(giver, 0.0)
                for k in both:
                    clock[k] = ends
    return max(clock)
