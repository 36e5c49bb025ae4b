"""Placements are read and refused in one line each, and the order of a tree lets branches compute at the same time."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
from pydantic import ValidationError

from jaxtrain.config import TrainConfig
from jaxtrain.parallel.placement import check_groups
from jaxtrain.parallel.schedule import Work, in_flight, order_of_tree, trace
from zarr_store.errors import InvalidInput

BRANCHES = ("s2", "s1")


def config_of(placement, **sections):
    base = {"data": {"cube": "none.zarr", "patch": 16}, "model": {"depth": 1}, "run": {"batch_size": 8}}
    return TrainConfig.model_validate({**base, **sections, "placement": placement})


@pytest.mark.parametrize(
    ("placement", "mesh"),
    [
        ({"kind": "replicated", "parts": 4}, {"data": 4, "model": 1}),
        ({"kind": "stages"}, {"pipe": 2, "data": 1, "model": 1}),
        ({"kind": "filters", "parts": 2}, {"data": 1, "model": 2}),
        ({"kind": "branches", "groups": [["s2"], ["s1"], ["fusion"]]}, {"pipe": 3, "data": 1, "model": 1}),
    ],
)
def test_the_mesh_follows_from_the_placement(placement, mesh):
    config = config_of(placement)
    assert config.mesh.axes == mesh
    # what a run keeps opens again, also where only what was set is kept
    for values in (config.model_dump(mode="json"), config.model_dump(exclude_unset=True)):
        assert TrainConfig.model_validate(values) == config


def test_groups_combine_with_replicas_and_one_microbatch_is_the_whole_batch():
    mesh = config_of({"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}, mesh={"data": 2}).mesh
    assert (mesh.size, mesh.microbatches) == (4, 1)


@pytest.mark.parametrize(
    ("placement", "mesh", "message"),
    [
        ({"kind": "stages", "parts": 2}, {"pipe": 4}, "'stages' has 2 parts, and mesh.pipe = 4: leave mesh.pipe out"),
        ({"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}, {"pipe": 3}, "has 2 groups, and mesh.pipe = 3"),
        ({"kind": "stages", "groups": [["s2"]]}, {}, "use kind = 'branches', or leave the groups out"),
        ({"kind": "branches", "parts": 2, "groups": [["s2"]]}, {}, "parts = 2 has no meaning"),
        ({"parts": 2}, {}, "parts = 2 has no meaning for placement.kind = 'mesh'"),
        ({"kind": "replicated"}, "auto", "leave one of them out"),
        ({"kind": "branch"}, {}, "Input should be 'mesh', 'replicated', 'branches', 'stages' or 'filters'"),
    ],
)
def test_a_placement_that_contradicts_itself_or_the_mesh_is_refused(placement, mesh, message):
    with pytest.raises(ValidationError) as caught:
        config_of(placement, mesh=mesh)
    (line,) = caught.value.errors()
    assert message in str(line["msg"])


def test_names_become_the_group_of_each_part():
    groups = [["s2.1", "s1"], ["s2.2"], ["fusion"]]
    assert check_groups(groups, BRANCHES) == {"s2": [0, 1], "s1": [0], "fusion": [2]}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["s2", "fusion"], ["s3"]], "names 's3', which this network does not have: its branches are s2, s1"),
        ([["s2", "fusion"]], "leaves out 's1': add it to a group"),
        ([["s2"], ["s1"]], "leaves out 'fusion'"),
        ([["s2", "fusion"], ["s1", "s2"]], "names 's2' twice"),
        ([["s2", "fusion"], ["s1", "s2.1"]], "as a whole and a part of it"),
        ([["s2.1", "fusion"], ["s1", "s2.3"]], "names s2.3, but no s2.2"),
        ([["s2", "s1", "fusion"], []], "group 1 of placement.groups is empty"),
    ],
)
def test_groups_that_do_not_fit_the_network_are_refused_in_one_line(groups, message):
    with pytest.raises(InvalidInput) as caught:
        check_groups(groups, BRANCHES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_branches_on_two_groups_compute_at_the_same_time():
    after, homes = [2, 2, None], [0, 1, 0]
    orders = order_of_tree(after, homes, microbatches=1)
    found = {interval.work: interval for interval in trace(orders, chunks=3, after=after)}
    for kind in ("forward", "backward"):
        one, other = (found[Work(kind, part, 0)] for part in (0, 1))
        assert one.group != other.group
        assert (one.start, one.end) == (other.start, other.end)


@pytest.mark.parametrize(
    ("after", "homes"),
    [([2, 2, None], [0, 1, 0]), ([2, 2, None], [0, 1, 2]), ([1, 4, 3, 4, None], [0, 1, 0, 1, 1]),
     ([1, 3, 3, 4, None], [0, 1, 0, 1, 2])],
)  # fmt: skip
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_the_order_of_a_tree_does_everything_once_and_waits_for_what_it_needs(after, homes, microbatches):
    orders = order_of_tree(after, homes, microbatches=microbatches)
    done = [interval.work for interval in trace(orders, chunks=len(after), after=after)]
    kinds: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    every = itertools.product(kinds, range(len(after)), range(microbatches))
    assert sorted(done) == sorted(Work(*one) for one in every)
    place = {work: number for number, work in enumerate(done)}
    for work in done:
        taker = after[work.chunk]
        if taker is not None:
            pair = [place[Work(work.kind, part, work.microbatch)] for part in (work.chunk, taker)]
            assert pair == sorted(pair, reverse=work.kind == "backward")
    # a part never keeps more than the parts on its way to the end
    for part, home in enumerate(homes):
        way, at = 1, after[part]
        while at is not None:
            way, at = way + 1, after[at]
        assert in_flight([work for work in orders[home] if work.chunk == part]) <= way
