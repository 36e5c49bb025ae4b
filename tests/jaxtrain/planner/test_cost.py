"""Seconds of programs and exchanges, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxtrain.planner.collectives import Collective
from jaxtrain.planner.cost import collective_seconds, path_of, peak_bytes, predict
from jaxtrain.planner.facts import Compiled, Facts, HandOver
from jaxtrain.planner.profile import Device, Link, Profile
from zarr_store.errors import InvalidInput

MACHINE = Profile(
    name="m",
    title="two nodes of four",
    device=Device(kind="gpu", memory=1e9, bandwidth=1e9, peak={"float32": 1e12}, elementwise=1e11, reached=0.5,
                  reached_bandwidth=1.0, launch=0.0),
    links=(Link(name="inside", devices=4, bandwidth=1e9, latency=0.0),
           Link(name="outside", devices=8, bandwidth=1e8, latency=0.0)),
)  # fmt: skip


def program(name: str = "step", stage: int = 0, runs: int = 1, **values: object) -> Compiled:
    made = Compiled(
        name=name, stage=stage, part=stage, runs=runs, work=((5e11, 0.0, 1e6, 1), (0.0, 0.0, 5e8, 2)), collectives=(),
        result_bytes={}, argument_bytes=100, output_bytes=100, alias_bytes=100, temporary_bytes=50, gathers=(),
    )  # fmt: skip
    return replace(made, **values)  # type: ignore[arg-type]  # whatever is given


def exchange(axes: tuple[str, ...], size: float, group: int, kind: str = "all-reduce") -> Collective:
    return Collective(kind, ((1,),), ("f32",), int(size), 1, axes, group, size, size * group, "")


def facts(mesh: dict[str, int], *programs: Compiled, **values: object) -> Facts:
    made = Facts(mesh=mesh, programs=programs, handovers=(), parameter_bytes=40, optimizer_bytes=60, parameters=40,
                 batch=8, microbatches=1, parts=1, schedule="")  # fmt: skip
    return replace(made, **values)  # type: ignore[arg-type]  # whatever is given


def test_each_instruction_takes_the_longer_of_arithmetic_and_memory():
    found = predict(facts({"data": 1}, program()), MACHINE, "float32")
    assert found.compute_s == pytest.approx(1.0)  # 5e11 operations at half of 1e12
    assert found.memory_s == pytest.approx(1.0)  # twice 5e8 bytes
    assert found.step_s == pytest.approx(2.0)
    slower = MACHINE.model_copy(update={"device": MACHINE.device.model_copy(update={"launch": 0.25})})
    late = predict(facts({"data": 1}, program()), slower, "float32")
    assert (late.step_s, late.compute_s, late.launch_s) == pytest.approx((2.75, 1.75, 0.75))


def test_the_narrowest_link_that_a_group_crosses_counts():
    mesh = {"data": 2, "model": 4}
    assert path_of(("model",), mesh, MACHINE)[0] == 1e9
    assert path_of(("data",), mesh, MACHINE)[0] == 1e8  # each node holds one of its two devices
    assert path_of(("data", "model"), mesh, MACHINE)[0] == 4e8  # four devices of a node leave it side by side
    assert path_of(("data",), {"data": 8}, MACHINE)[0] == 4e8
    one = exchange(("data",), 1e8, 2)
    assert collective_seconds(one, mesh, MACHINE) == pytest.approx(1.0)
    assert collective_seconds(replace(one, wire_bytes=0.0), mesh, MACHINE) == 0


def test_gradients_travel_while_devices_compute_as_far_as_the_machine_can():
    moving = program(collectives=(exchange(("data",), 1e8, 2), exchange(("model",), 1e9, 4)))
    plain = predict(facts({"data": 2, "model": 4}, moving), MACHINE, "float32")
    assert [plain.collective_s, plain.hidden_s] == pytest.approx([2.0, 0.0])
    hiding = predict(facts({"data": 2, "model": 4}, moving), MACHINE.model_copy(update={"overlap": 0.5}), "float32")
    assert [hiding.collective_s, hiding.hidden_s] == pytest.approx([1.5, 0.5])
    assert hiding.step_s == pytest.approx(hiding.compute_s + hiding.memory_s + hiding.collective_s)


def test_stages_wait_for_each_other_as_their_schedule_says():
    """Equal stages, two of them, four microbatches: (S - 1) / (M + S - 1) of the time is idle."""
    work = ((0.5e12, 0.0, 0.0, 1),)
    programs = [
        program(name, stage, 4, work=work if name == "forward" else ((1e12, 0.0, 0.0, 1),))
        for stage in range(2) for name in ("forward", "backward")
    ]  # fmt: skip
    mesh = {"pipe": 2, "data": 1}
    piped = facts(mesh, *programs, microbatches=4, parts=2, schedule="1f1b")
    found = predict(piped, MACHINE, "float32")
    assert found.bubble == pytest.approx(1 / 5)
    assert found.step_s == pytest.approx(5 * 3.0)
    assert found.idle_s == pytest.approx(3.0)
    slow = predict(replace(piped, handovers=(HandOver(0, 1, int(1e8)),)), MACHINE, "float32")
    assert slow.step_s > found.step_s


def test_a_stage_keeps_what_is_under_way():
    forward = [program("forward", stage, 4, argument_bytes=0, output_bytes=1000, alias_bytes=0) for stage in range(2)]
    update = [program("update", stage, argument_bytes=500, output_bytes=0, alias_bytes=0) for stage in range(2)]
    backward = [program("backward", stage, 4, output_bytes=0, alias_bytes=0) for stage in range(2)]
    mesh = {"pipe": 2, "data": 1}
    sizes = {
        name: peak_bytes(facts(mesh, *forward, *backward, *update, microbatches=4, parts=2, schedule=name))
        for name in ("1f1b", "gpipe")
    }
    assert sizes == {"1f1b": 500 + 2 * 1000 + 1050, "gpipe": 500 + 4 * 1000 + 1050}


def test_a_stage_keeps_the_batch_and_what_arrived_before_its_turn():
    forward = [program("forward", stage, 4, argument_bytes=0, output_bytes=1000, alias_bytes=0) for stage in range(2)]
    update = [program("update", stage, argument_bytes=500, output_bytes=0, alias_bytes=0) for stage in range(2)]
    backward = [program("backward", stage, 4, output_bytes=0, alias_bytes=0) for stage in range(2)]
    sizes = {}
    for name in ("1f1b", "gpipe"):
        known = facts({"pipe": 2, "data": 1}, *forward, *backward, *update, microbatches=4, parts=2, schedule=name)
        handed = replace(known, handovers=(HandOver(0, 1, 10_000),), batch_bytes=7)
        sizes[name] = peak_bytes(handed) - peak_bytes(known) - 7
    # the second stage uses each activation as it comes, and holds the next one that came meanwhile; the first holds a
    # gradient while it uses it. Where all forward passes come first, gradients come one by one too
    assert sizes == {"1f1b": 10_000, "gpipe": 10_000}


def test_a_machine_that_is_too_small_is_named():
    with pytest.raises(InvalidInput, match="profile m joins at most 8 devices, the mesh needs 16"):
        predict(facts({"data": 16}, program()), MACHINE, "float32")
