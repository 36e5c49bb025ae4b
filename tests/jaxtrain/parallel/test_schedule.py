"""Schedules against theory: idle time, what is kept, and that nothing comes before what it needs."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest

from jaxtrain.parallel.schedule import Work, balance_cuts, bubble, in_flight, order_of, trace
from zarr_store.errors import InvalidInput


@pytest.mark.parametrize("microbatches", [4, 8, 16])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(
    ("order", "chunks_per_group"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
)
def test_the_bubble_is_what_theory_says(order, chunks_per_group, groups, microbatches):
    chunks = groups * chunks_per_group
    orders = order_of(order, groups=groups, chunks=chunks, microbatches=microbatches)
    share = bubble(trace(orders, chunks=chunks))
    assert share == pytest.approx((groups - 1) / (chunks_per_group * microbatches + groups - 1), rel=0.1)
    assert share <= 1.1 * (groups - 1) / (microbatches + groups - 1)


@pytest.mark.parametrize(("order", "chunks"), [("gpipe", 3), ("1f1b", 3), ("interleaved", 9)])
def test_everything_is_done_once_and_after_what_it_needs(order, chunks):
    orders = order_of(order, groups=3, chunks=chunks, microbatches=6)
    walk = [interval.work for interval in trace(orders, chunks=chunks)]
    kinds: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    assert sorted(walk) == sorted(Work(k, c, m) for k, c, m in itertools.product(kinds, range(chunks), range(6)))
    at = {work: position for position, work in enumerate(walk)}
    for work in walk:
        if work.kind == "forward" and work.chunk:
            assert at[Work("forward", work.chunk - 1, work.microbatch)] < at[work]
        if work.kind == "backward":
            assert at[Work("forward", work.chunk, work.microbatch)] < at[work]
            if work.chunk < chunks - 1:
                assert at[Work("backward", work.chunk + 1, work.microbatch)] < at[work]
    for group, order_of_group in enumerate(orders):
        assert {work.chunk % 3 for work in order_of_group} == {group}
        assert [work for work in walk if work.chunk % 3 == group] == order_of_group


def test_1f1b_keeps_no_more_than_the_stages_that_follow():
    assert [in_flight(o) for o in order_of("gpipe", groups=4, chunks=4, microbatches=8)] == [8, 8, 8, 8]
    assert [in_flight(o) for o in order_of("1f1b", groups=4, chunks=4, microbatches=8)] == [4, 3, 2, 1]


def test_a_slow_stage_makes_the_others_wait():
    orders = order_of("1f1b", groups=2, chunks=2, microbatches=8)
    even = bubble(trace(orders, chunks=2))
    assert bubble(trace(orders, chunks=2, seconds=lambda work: 1.0 + 2.0 * work.chunk)) > even + 0.2


def test_orders_that_cannot_be_are_refused():
    with pytest.raises(InvalidInput, match="1f1b cannot lay 4 chunks on 2 groups"):
        order_of("1f1b", groups=2, chunks=4, microbatches=4)
    with pytest.raises(InvalidInput, match="microbatches 3 must be a multiple"):
        order_of("interleaved", groups=2, chunks=4, microbatches=3)
    with pytest.raises(InvalidInput, match="wait for each other"):
        trace([[Work("backward", 0, 0), Work("forward", 0, 0)]], chunks=1)


def test_cuts_make_the_dearest_part_cheapest():
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0]
    for parts in range(1, 6):
        cuts = balance_cuts(costs, parts)
        assert len(cuts) == parts
        dearest = max(sum(costs[a:b]) for a, b in itertools.pairwise([*cuts, len(costs)]))
        every = itertools.combinations(range(1, len(costs)), parts - 1)
        assert dearest == min(max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *c, len(costs)])) for c in every)
    with pytest.raises(InvalidInput, match="needs 4 stages, this network can be cut into 3 at most"):
        balance_cuts([1, 1, 1], 4)
