"""The placements that are compared, and what the planner says of each, by hand and beside compiled programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.planner import placements
from jaxtrain.planner.collectives import Dialect
from jaxtrain.planner.facts import Facts, HandOver, compile_facts
from jaxtrain.planner.framing import header_bytes
from jaxtrain.planner.placements import (
    branches_of,
    busy_shares,
    list_placements,
    place_run,
    sent_by_all,
    survey_placements,
)
from jaxtrain.planner.survey import Network
from zarr_store.errors import InvalidInput

from ..parallel.parity import make_program, mesh_of, model_of
from .test_cost import MACHINE, exchange, facts, program


def config_of(names: Sequence[str] = ("s2", "s1"), **sections: Any) -> TrainConfig:
    modalities = {name: {"collection": name} for name in names}
    base: dict[str, Any] = {"data": {"cube": "none.zarr", "patch": 16, "modalities": modalities},
                            "model": {"name": "multimodal", "depth": 1}, "run": {"batch_size": 8}}  # fmt: skip
    return TrainConfig.model_validate(base | sections)


@pytest.mark.parametrize(
    ("names", "apart"),
    [(("s2", "s1"), [["s2"], ["s1"], ["fusion"]]), (("a", "b", "c"), [["a"], ["b", "c"], ["fusion"]])],
)
def test_the_list_has_data_parallel_and_seven_ways_to_split_the_network(names, apart):
    found = {one.name: one for one in list_placements(config_of(names))}
    assert list(found)[:4] == ["one device", "data parallel", "layers in stages", "filters split"]
    assert len(found) == 9
    assert all(one.candidate.config is not None for one in found.values())
    assert [one.devices for one in found.values()] == [1, 2, 2, 2, 2, 2, 3, 4, 4]
    made = found["branches, fusion apart"].candidate.config
    assert [list(group) for group in made.placement.groups] == apart
    assert [list(group) for group in found[f"branches, fusion with {names[-1]}"].candidate.config.placement.groups] == [
        list(names[:-1]), [names[-1], "fusion"]
    ]  # fmt: skip


def test_the_runs_own_placement_is_listed_unless_it_is_there_already():
    own = {"kind": "branches", "groups": [["s2.1"], ["s2.2", "s1", "fusion"]]}
    *_, last = list_placements(config_of(placement=own, mesh={"data": 2}))
    assert (last.name, last.devices) == ("as configured", 4)
    known = list_placements(config_of(placement={"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}))
    assert "as configured" not in [one.name for one in known]
    # replicas of each part that divide the optimiser are another placement of the same groups
    groups = {"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]}
    *_, divided = list_placements(config_of(placement=groups, mesh={"data": 2, "zero": 1}))
    assert (divided.name, divided.devices, divided.candidate.mesh.zero) == ("as configured", 4, 1)
    *_, many = list_placements(config_of(placement={"kind": "replicated", "parts": 4}))
    assert (many.name, many.devices) == ("as configured", 4)
    *_, last = list_placements(config_of(placement={"kind": "replicated", "parts": 2}))
    assert last.name != "as configured"


def test_a_placement_that_cannot_be_keeps_its_reason():
    found = {one.name: one for one in list_placements(config_of(run={"batch_size": 7}))}
    split = found["data parallel"]
    assert split.candidate.config is None
    assert "batch_size" in split.candidate.why_not
    assert found["one device"].candidate.config is not None
    assert "leave the groups out" in str(place_run(config_of(), {"kind": "stages", "groups": [["s2"]]}, {}))


@pytest.mark.parametrize(("model", "modalities"), [("unet", {}), ("multimodal", {"s2": {"collection": "s2"}})])
def test_a_network_without_two_branches_has_no_placements(model, modalities):
    data = {"cube": "none.zarr", "patch": 16, "modalities": modalities}
    config = config_of(model={"name": model, "depth": 1}, data=data)
    assert len(branches_of(config)) < 2
    with pytest.raises(InvalidInput, match="has no branches to place"):
        list_placements(config)


def test_bytes_are_those_of_collectives_and_of_what_groups_hand_over_both_ways():
    summed = program(runs=2, collectives=(exchange(("data",), 100.0, 4),))
    handed = (HandOver(0, 1, 1000), HandOver(1, 2, 10))
    known = facts({"pipe": 3, "data": 4}, summed, handovers=handed, microbatches=2)
    assert sent_by_all(known) == {"all-reduce": 2 * 400.0, "copy": 2.0 * 4 * 2 * 1010}
    assert sent_by_all(facts({"data": 1}, program())) == {}


def test_each_group_is_busy_for_its_own_programs():
    known = facts({"pipe": 2, "data": 1}, program(stage=0), program(stage=1, runs=3))
    assert busy_shares(known, MACHINE, "float32", 8.0) == pytest.approx((0.25, 0.75))
    assert busy_shares(known, MACHINE, "float32", 1.0) == (1.0, 1.0)


@cache
def compiled(mesh: str, batch: int) -> Facts:
    made = make_program(mesh_of(mesh), model_of("multimodal"))
    run = made.config.run.model_copy(update={"batch_size": batch})
    return compile_facts(replace(made, config=made.config.model_copy(update={"run": run})), {}, Dialect())


@pytest.fixture
def surveyed(monkeypatch: pytest.MonkeyPatch) -> dict[str, placements.PlacementRow]:
    """A survey whose programs are compiled here; the placements of four devices are left out."""
    meshes = {"data parallel": "data=2", "branches, fusion with s2": "groups=s2,fusion/s1"}

    def compile_here(_network: Network, wanted: Sequence[Any], *_: object) -> dict[int, Facts | str]:
        return {id(one): compiled(meshes[one.strategy], one.config.run.batch_size) if one.strategy in meshes
                else "left out" for one in wanted}  # fmt: skip

    monkeypatch.setattr(placements, "compile_candidates", compile_here)
    rows = survey_placements(Network(config_of(), {}, {}, 64), MACHINE)
    return {row.placed.name: row for row in rows}


def test_what_grows_with_the_batch_is_told_from_what_does_not(surveyed):
    gradient, branches = surveyed["data parallel"], surveyed["branches, fusion with s2"]
    assert gradient.window_bytes == 0
    # the sum of the gradient goes to the other device and back, with a few numbers beside
    assert gradient.fixed_bytes == pytest.approx(2 * gradient.facts.parameters, rel=0.01)
    assert branches.fixed_bytes == 0
    # the features of a window and what was observed, 16 × 16 pixels, there and back
    assert branches.window_bytes == 2 * 16 * 16 * (8 + 1) * 4
    assert sum(sent_by_all(compiled("groups=s2,fusion/s1", 16)).values()) == 16 * branches.window_bytes
    assert surveyed["filters split"].to_dict()["why_not"] == "left out"


def test_a_row_is_json_with_headers_apart(surveyed):
    row = json.loads(json.dumps(surveyed["data parallel"].to_dict()))
    assert row["header_bytes"] == header_bytes(surveyed["data parallel"].facts) > 0
    assert row["bytes_step"] == row["bytes_fixed"] == sum(row["bytes_by_kind"].values())
    assert row["settings"] == {"placement": {"kind": "replicated", "parts": 2}, "mesh": {"data": 2}}
    assert len(row["busy_devices"]) == len(row["flops_devices"]) == 1
