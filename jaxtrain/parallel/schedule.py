"""Schedule the stages of a pipeline over microbatches, and compute how long stages wait. Pure.

A pipeline cuts a network into chunks. Groups of devices hold one chunk each, or, interleaved, several: with G groups
chunk k lies on group k mod G. A batch is cut into M microbatches. Three orders of work:

- `gpipe` (Huang et al. 2019, arXiv:1811.06965): all forward, then all backward; keeps M activations.
- `1f1b` (Narayanan et al. 2019, PipeDream): one backward after each forward as soon as there is one; group g of G keeps
  at most G - g activations. As idle as gpipe.
- `interleaved` (Narayanan et al. 2021, arXiv:2104.04473): 1f1b over several chunks a group, which shortens the start
  and the end by the number of chunks, at the price of as many more transfers.

With equal stages the share of idle time, the bubble, is (G-1) / (M+G-1) for the first two and (G-1) / (V·M+G-1) for V
chunks a group.

Where a network has branches, its parts are a tree and not a chain: several give their results to one. `after` then
names for each part the one that takes its results, and `order_of_tree` gives the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from zarr_store.errors import InvalidInput

__all__ = ["Interval", "Order", "Work", "balance_cuts", "bubble", "in_flight", "order_of", "order_of_tree", "trace"]

Order = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True, order=True)
class Work:
    """One chunk's forward or backward pass of one microbatch."""

    kind: Literal["forward", "backward"]
    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Interval:
    """Start and end of some work."""

    work: Work
    group: int
    start: float
    end: float


def order_of(order: Order, *, groups: int, chunks: int, microbatches: int) -> list[list[Work]]:
    """Return the work of each group, in order.

    Args:
        order: Name of the schedule.
        groups: G, groups of devices.
        chunks: parts of the network, a multiple of G; for `gpipe` and `1f1b` equal to it.
        microbatches: M; for `interleaved` a multiple of G.

    Raises:
        InvalidInput: the numbers do not fit the schedule.
    """
    if chunks % groups or (order != "interleaved" and chunks != groups):
        raise InvalidInput(f"the schedule {order} cannot lay {chunks} chunks on {groups} groups of devices")
    if order == "interleaved" and microbatches % groups:
        raise InvalidInput(
            f"the schedule interleaved sends microbatches in rounds of mesh.pipe = {groups}: mesh.microbatches "
            f"{microbatches} must be a multiple of it"
        )
    per_group = chunks // groups
    total = per_group * microbatches

    def work(kind: Literal["forward", "backward"], group: int, number: int) -> Work:
        # rounds of G microbatches through the first chunk of the group, then the same G through the next one
        span = groups * per_group
        slot = number % span // groups
        chunk = (slot if kind == "forward" else per_group - 1 - slot) * groups + group
        return Work(kind, chunk, number // span * groups + number % groups)

    result = []
    for group in range(groups):
        if order == "interleaved":
            forward = [work("forward", group, n) for n in range(total)]
            backward = [work("backward", group, n) for n in range(total)]
            ahead = min(2 * (groups - group - 1) + (per_group - 1) * groups, total)
        else:
            forward = [Work("forward", group, m) for m in range(microbatches)]
            backward = [Work("backward", group, m) for m in range(microbatches)]
            ahead = total if order == "gpipe" else min(groups - group - 1, total)
        steady = [w for pair in zip(forward[ahead:], backward, strict=False) for w in pair]
        result.append([*forward[:ahead], *steady, *backward[total - ahead :]])
    return result


def order_of_tree(after: Sequence[int | None], homes: Sequence[int], *, microbatches: int) -> list[list[Work]]:
    """Return the work of each group, in order, where several parts may give their results to one.

    Each group takes what can begin first: backward passes before forward passes, and of these the oldest microbatch. A
    part keeps at most as many activations as there are parts from it to the last one.

    Args:
        after: For each part the one that takes its results; None of the last part. A part comes before its taker.
        homes: Group of each part.
        microbatches: M.

    >>> order_of_tree([2, 2, None], [0, 1, 0], microbatches=1)[1]
    [Work(kind='forward', chunk=1, microbatch=0), Work(kind='backward', chunk=1, microbatch=0)]
    """
    chunks = len(after)
    depth = [1] * chunks
    for part in reversed(range(chunks)):
        taker = after[part]
        depth[part] = 1 if taker is None else depth[taker] + 1
    cost = {"forward": 1.0, "backward": 2.0}
    clock, done = [0.0] * (max(homes) + 1), dict[Work, float]()
    result: list[list[Work]] = [[] for _ in clock]
    passed = {kind: [0] * chunks for kind in cost}
    while len(done) < 2 * chunks * microbatches:
        ready: list[tuple[float, str, int, int]] = []
        for part in range(chunks):
            for kind in ("backward", "forward"):
                number = passed[kind][part]
                flying = passed["forward"][part] - passed["backward"][part]
                if number == microbatches or (kind == "forward" and flying == depth[part]):
                    continue
                work = Work(kind, part, number)
                needed = _needs(work, after)
                if all(other in done for other in needed):
                    start = max([clock[homes[part]], *(done[other] for other in needed)])
                    ready.append((start, kind, number, part))
        start, kind, number, part = min(ready)  # the word "backward" comes before "forward"
        work = Work(kind, part, number)  # type: ignore[arg-type]  # one of two
        clock[homes[part]] = done[work] = start + cost[kind]
        passed[kind][part] += 1
        result[homes[part]].append(work)
    return result


def trace(
    orders: Sequence[Sequence[Work]],
    *,
    chunks: int,
    seconds: Callable[[Work], float] | None = None,
    after: Sequence[int | None] | None = None,
) -> list[Interval]:
    """Simulate groups that follow their order and wait for their inputs; return the intervals, sorted by start.

    Sorted so, it is one order of all work in which nothing comes before what it needs.

    Args:
        orders: Work of each group, in order.
        chunks: parts of the network.
        seconds: Duration of some work; None for 1 forward and 2 backward, divided by the chunks of a group.
        after: For each part the one that takes its results; None for a chain.

    Raises:
        InvalidInput: the orders wait for each other.
    """
    scale = len(orders) / chunks
    takers = [*range(1, chunks), None] if after is None else after
    cost = seconds or (lambda work: scale * (1.0 if work.kind == "forward" else 2.0))
    done: dict[Work, float] = {}
    clock, position = [0.0] * len(orders), [0] * len(orders)
    found: list[Interval] = []
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        moved = False
        for group, order in enumerate(orders):
            while position[group] < len(order):
                work = order[position[group]]
                needed = _needs(work, takers)
                if any(other not in done for other in needed):
                    break
                start = max([clock[group], *(done[other] for other in needed)])
                clock[group] = done[work] = start + cost(work)
                found.append(Interval(work, group, start, done[work]))
                position[group] += 1
                moved = True
        if not moved:
            raise InvalidInput("the stages of this schedule wait for each other")
    return sorted(found, key=lambda interval: (interval.start, interval.end, interval.group))


def bubble(intervals: Sequence[Interval]) -> float:
    """Return the share of the time of all groups, from the first start to the last end, in which they are idle."""
    groups = {interval.group for interval in intervals}
    span = max(i.end for i in intervals) - min(i.start for i in intervals)
    busy = sum(i.end - i.start for i in intervals)
    return 1 - busy / (span * len(groups))


def in_flight(order: Sequence[Work]) -> int:
    """Return the largest number of activations that a group keeps at once."""
    return max(accumulate(1 if work.kind == "forward" else -1 for work in order))


def balance_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Choose the first unit of each part so that the most expensive part is as cheap as possible.

    Args:
        costs: Cost of each unit of the network, in order.
        parts: Number of runs of units, each at least one unit long.

    Raises:
        InvalidInput: there are fewer units than parts.

    >>> balance_cuts([4, 1, 1, 1, 1, 4], 3)
    [0, 1, 5]
    """
    if parts > len(costs):
        raise InvalidInput(
            f"mesh.pipe needs {parts} stages, this network can be cut into {len(costs)} at most: lower mesh.pipe or "
            "mesh.chunks, or take a deeper network"
        )
    sums = [0.0, *accumulate(float(cost) for cost in costs)]
    # best[n] after p rounds: (cost of the most expensive part, cuts) of the first n units in p parts
    best: list[tuple[float, list[int]]] = [(total, [0]) for total in sums]
    for part in range(2, parts + 1):
        best = [
            min(
                ((max(best[cut][0], sums[end] - sums[cut]), [*best[cut][1], cut]) for cut in range(part - 1, end)),
                default=(float("inf"), []),
            )
            for end in range(len(sums))
        ]
    return best[-1][1]


def _needs(work: Work, after: Sequence[int | None]) -> list[Work]:
    if work.kind == "forward":
        return [Work("forward", part, work.microbatch) for part, taker in enumerate(after) if taker == work.chunk]
    own, taker = Work("forward", work.chunk, work.microbatch), after[work.chunk]
    return [own] if taker is None else [own, Work("backward", taker, work.microbatch)]
