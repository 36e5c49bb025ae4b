"""Machines that were measured: curves, kinds of instructions, several processes, and what a probe corrects."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from typing import Any

import pytest

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.planner import machine, measure, measurer
from jaxtrain.planner.candidates import Candidate
from jaxtrain.planner.cost import Prediction, collective_seconds, predict
from jaxtrain.planner.facts import Facts, HandOver
from jaxtrain.planner.machine import run_here, this_machine
from jaxtrain.planner.measure import Probe, compute_ratios, corrected
from jaxtrain.planner.operations import KINDS, find_operations
from jaxtrain.planner.profile import Curve, Device, Link, Profile
from jaxtrain.planner.survey import Network, Row, Survey
from jaxtrain.planner.words import sensitivity, sensitivity_line
from zarr_store.errors import InvalidInput, TerrashardError

from .test_cost import exchange, facts, program

ALONE = {kind: Curve(sizes=(1e3, 1e6), seconds=(1e-6, 1e-3)) for kind in KINDS}
MEASURED = Profile(
    name="this-machine", title="two devices that share two cores",
    device=Device(kind="cpu", memory=1e9, bandwidth=1e9, peak={"float32": 1e12, "bfloat16": 5e11}, elementwise=1e11,
                  together=1.5, measured=ALONE, busy={kind: curve.times(2.0) for kind, curve in ALONE.items()},
                  sharing=2),
    links=(Link(name="between devices", devices=None, bandwidth=1e9, latency=0.0),),
    exchanges={"all-reduce": Curve(sizes=(64.0, 64e3), seconds=(1e-4, 1e-2))},
)  # fmt: skip
ONE = program(work=((1e6, 0.0, 5e3, 3), (0.0, 0.0, 1e6, 2)), kinds=("convolution", "elementwise"))


def test_a_curve_holds_at_its_points_and_between_them():
    curve = Curve(sizes=(1e3, 1e5, 1e6), seconds=(1e-5, 1e-4, 1e-2))
    assert [curve.at(size) for size in (1.0, 1e3, 1e5, 1e6, 2e6)] == pytest.approx([1e-5, 1e-5, 1e-4, 1e-2, 2e-2])
    assert curve.at(1e4) == pytest.approx(math.sqrt(1e-5 * 1e-4))
    assert curve.times(3.0).at(1e5) == pytest.approx(3e-4)
    for sizes, seconds in (((1e5, 1e3), (1.0, 1.0)), ((1e3,), (1.0, 2.0)), ((1e3,), (0.0,))):
        with pytest.raises(ValueError, match="ascending sizes, and seconds above 0"):
            Curve(sizes=sizes, seconds=seconds)


def test_a_measured_machine_takes_what_was_measured_alone_or_while_all_work():
    alone = predict(facts({"data": 1}, ONE), MEASURED, "float32")
    assert (alone.compute_s, alone.memory_s) == pytest.approx((3e-3, 2e-3))
    busy = predict(facts({"data": 2}, ONE), MEASURED, "float32")
    assert (busy.compute_s, busy.memory_s) == pytest.approx((6e-3, 4e-3))
    half = predict(facts({"data": 1}, ONE), MEASURED, "bfloat16")
    assert (half.compute_s, half.memory_s) == pytest.approx((6e-3, 2e-3)), "bfloat16 is half as quick here"
    unknown = predict(facts({"data": 1}, replace(ONE, kinds=())), MEASURED, "float32")
    assert unknown.compute_s != pytest.approx(3e-3), "without kinds the roofline counts"


def test_a_measured_exchange_costs_what_was_measured_of_its_kind():
    one = replace(exchange(("data",), 64e3, 2), shapes=((16000,),))
    assert collective_seconds(one, {"data": 2}, MEASURED) == pytest.approx(1e-2)
    several = replace(one, shapes=((4,), (16000,), (2, 8)), types=("f32", "f32", "bf16"))
    assert collective_seconds(several, {"data": 2}, MEASURED) == pytest.approx(1e-2 + 2e-4), "one after the other"
    other = replace(one, kind="all-to-all")
    assert collective_seconds(other, {"data": 2}, MEASURED) == pytest.approx(64e3 / 1e9), "links, where none was"


HLO = """
HloModule m
%turned (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{1,0} transpose(f32[4,8]{1,0} %p), dimensions={1,0}
}
%joined (q: f32[4,8]) -> f32[8,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} concatenate(f32[4,8]{1,0} %q, f32[4,8]{1,0} %q), dimensions={0}
}
ENTRY %main (x: f32[2,4,4,3], k: f32[3,3,3,5], y: f32[4,8]) -> f32[8,4] {
  %x = f32[2,4,4,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  %y = f32[4,8]{1,0} parameter(2)
  %a = f32[2,4,4,5]{3,2,1,0} convolution(f32[2,4,4,3]{3,2,1,0} %x, f32[3,3,3,5]{3,2,1,0} %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %b = f32[2,4,4,5]{3,2,1,0} convolution(f32[2,4,4,3]{3,2,1,0} %x, f32[3,3,3,5]{3,2,1,0} %k), window={size=3x3 pad=1_1x1_1 rhs_reversal=1x1}, dim_labels=b01f_01io->b01f
  %c = f32[2,4,4,5]{3,2,1,0} convolution(f32[2,4,4,3]{3,2,1,0} %x, f32[3,3,3,5]{3,2,1,0} %k), window={size=16x16 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %d = f32[4,4]{1,0} dot(f32[4,8]{1,0} %y, f32[4,8]{1,0} %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %e = f32[2,4,4,3]{3,2,1,0} transpose(f32[2,4,4,3]{3,2,1,0} %x), dimensions={0,2,1,3}
  %f = f32[4,8]{1,0} add(f32[4,8]{1,0} %y, f32[4,8]{1,0} %y)
  %h = f32[8,8]{1,0} fusion(f32[4,8]{1,0} %y), kind=kLoop, calls=%joined
  ROOT %g = f32[8,4]{1,0} fusion(f32[4,8]{1,0} %y), kind=kLoop, calls=%turned
}
"""  # noqa: E501  # as the compiler prints it


def test_instructions_are_of_the_kinds_that_machines_run_at_rates_of_their_own():
    found = {one.name: one.kind for one in find_operations(HLO)}
    assert found == {"a": "convolution", "b": "swapped", "c": "gradient", "d": "product", "e": "elementwise",
                     "f": "elementwise", "g": "transpose", "h": "transpose"}  # fmt: skip


def test_copies_of_one_device_correct_the_computing_of_all_strategies():
    request = {"config": {"model": {"precision": "float32"}}}
    alone, two = (Probe(request, facts({"data": 1}, ONE), copies, devices) for copies, devices in ((1, 1), (2, 8)))
    assert astuple(compute_ratios([alone], [0.01], MEASURED)) == pytest.approx((2.0, 2.0, 1.0))
    # two copies that take 5 ms on two cores stand for eight devices that take 20 ms; 10 ms were predicted
    ratios = compute_ratios([alone, two], [5e-3, 5e-3], MEASURED)
    assert astuple(ratios) == pytest.approx((1.0, 2.0, 1.0))
    assert ratios.of(MeshConfig(data=8, zero=3)) == pytest.approx(2.0)
    for mesh in (MeshConfig(model=2), MeshConfig(data=4, space=2), MeshConfig(data=2, pipe=2)):
        assert ratios.of(mesh) == pytest.approx(math.sqrt(2.0))
    assert ratios.of(MeshConfig(data=1, pipe=2)) == pytest.approx(1.0), "its stages are predicted one by one"
    assert ratios.of(MeshConfig(data=1, pipe=2), processes=2) == pytest.approx(2.0), "they run at once, as copies do"
    before = Prediction(1.0, 0.5, 0.2, 0.2, 0.1, 0.0, 0.0)
    after = corrected(before, 2.0)
    assert after.step_s == pytest.approx(0.2 + 2 * 0.8)
    assert after.step_s == pytest.approx(after.compute_s + after.memory_s + after.collective_s + after.idle_s)


def test_few_filters_are_as_slow_as_they_were_measured():
    few = Curve(sizes=(1e6,), seconds=(8e-3,), intensity=10.0)
    many = Curve(sizes=(1e6,), seconds=(1e-3,), intensity=40.0)
    curves = {**ALONE, "convolution": many, "convolution-8": few}
    device = MEASURED.device.model_copy(
        update={"measured": curves, "busy": {name: curve.times(2.0) for name, curve in curves.items()}}
    )
    machine_of_both = MEASURED.model_copy(update={"device": device})

    def seconds(size: float, devices: int = 1) -> float:
        one = program(work=((1e6, 0.0, size, 1),), kinds=("convolution",))
        return predict(facts({"data": devices}, one), machine_of_both, "float32").compute_s

    assert [seconds(size) for size in (1e6, 1e5, 5e4, 2.5e4, 1e3)] == pytest.approx([8e-3, 8e-3, 8e-3**0.5 * 1e-3**0.5,
                                                                                  1e-3, 1e-3])  # fmt: skip
    assert seconds(1e5, devices=2) == pytest.approx(16e-3)
    half = {name: curve.times(2.0) if name.startswith("convolution") else curve for name, curve in curves.items()}
    known = facts({"data": 1}, program(work=((1e6, 0.0, 5e4, 1),), kinds=("convolution",)))
    slower = machine_of_both.model_copy(update={"device": device.model_copy(update={"measured": half})})
    assert predict(known, slower, "float32").step_s == pytest.approx(
        2 * predict(known, machine_of_both, "float32").step_s
    )


def test_the_exchange_of_the_gradient_corrects_exchanges_and_nothing_else():
    arrays = replace(exchange(("data",), 64e3, 2), shapes=((16000,), (4,)), types=("f32", "s32"))
    other = replace(exchange(("model",), 64e3, 2), shapes=((7,),))
    known = facts({"data": 2}, replace(ONE, collectives=(arrays, other)))
    assert measure._summed(known) == [((16000,), "float32"), ((4,), "int32")]
    alone = replace(known, mesh={"data": 1}, programs=(ONE,))
    request = {"config": {"model": {"precision": "float32"}}}
    summed = replace(known, programs=(replace(ONE, collectives=(arrays,)),))
    probes = [Probe(request, alone, 1, 1), Probe(request, alone, 2, 2),
              Probe({**request, "exchange": []}, summed, 2, 2)]  # fmt: skip
    ratios = compute_ratios(probes, [5e-3, 2e-2, 3 * 1.01e-2], MEASURED)
    assert astuple(ratios) == pytest.approx((1.0, 2.0, 3 * 1.01e-2 / (1e-2 + 1e-4)))
    before = Prediction(1.0, 0.5, 0.2, 0.2, 0.1, 0.0, 0.0, 0.3)
    after = corrected(before, 2.0, 3.0)
    assert after == Prediction(2 * 0.8 + 3 * 0.2, 1.0, 0.4, pytest.approx(0.6), 0.2, 0.0, 0.0, 0.6)  # type: ignore[arg-type]


def test_an_exchange_is_timed_after_copies_and_on_arrays_of_its_shapes() -> None:
    runs = []

    class Copies:
        runners: tuple[Any, ...] = ()
        steps = 2

        def __init__(self, request: Any) -> None:
            runs.append(request["copies"])

        def prepare(self) -> None:
            runs.append("prepared")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtrain.planner.measurer._Together", Copies)
        one = measurer._Exchange({"copies": 2, "exchange": [((3, 5), "float32"), ((), "int32")]})
        one.prepare()
    assert runs == [2, "prepared"]
    assert one.run(2) > 0
    assert [array.shape for array in one._sum(*one._arrays)] == [(3, 5), ()]


def test_sensitivity_of_a_measured_machine_names_its_kinds() -> None:
    config = TrainConfig.model_validate({"data": {"cube": "none"}})
    known = facts({"data": 2}, replace(ONE, collectives=(replace(exchange(("data",), 64e3, 2), shapes=((16000,),)),)))
    row = Row(Candidate("data", 2, config), known, predict(known, MEASURED, "float32"), True)
    survey = Survey(Network(config, {}, {}, 10), 2, MEASURED, (row,))
    moved = sensitivity(survey)
    assert set(moved) == {*KINDS, "all-reduce"}
    assert moved["convolution"] == pytest.approx(6e-3 / 2e-2 / 4)  # 20 % slower takes a quarter longer
    assert moved["all-reduce"] == pytest.approx(1e-2 / 2e-2 / 4)
    assert moved["gradient"] == 0
    line = sensitivity_line(survey)
    assert line.startswith("with one number of the machine 20 % lower, the step changes by: all-reduce +12.5%")
    assert line.endswith("; the others nothing")
    assert not sensitivity_line(replace(survey, rows=()))


def test_a_process_that_fails_is_reported_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TerrashardError, match="No module named zarr_store_that_is_not_there"):
        run_here("zarr_store_that_is_not_there", 2, 2)
    with pytest.raises(InvalidInput, match="3 devices cannot be divided among 2 processes"):
        run_here("json.tool", 3, 2)
    monkeypatch.setattr(machine, "run_here", lambda *_: "no profile")
    with pytest.raises(TerrashardError, match=r"this machine could not be measured: .*; name a profile with --profile"):
        this_machine(61, again=True)


def test_processes_share_this_machine_and_end_with_the_slowest(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process gets its number and its part of the devices; what is asked comes on its standard input."""
    (tmp_path / "told.py").write_text(
        "import os, sys\n"
        "e = os.environ\n"
        "print(e.get('TERRASHARD_PROCESS'), e.get('TERRASHARD_PROCESSES'), e['XLA_FLAGS'].split('=')[-1], "
        "sys.stdin.read())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TERRASHARD_PROCESS", "7")  # of the run that asks; no matter of those that are started
    assert run_here("told", 4, 2, given="asked").split() == ["0", "2", "2", "asked"]
    assert run_here("told", 4, 1).split() == ["None", "None", "4"]
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)\n")
    with pytest.raises(TerrashardError, match="was not done after 0 s"):
        run_here("slow", 1, 1, seconds=0.1)


def test_a_survey_of_another_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "run_here", lambda *_a, **_k: (_ for _ in ()).throw(TerrashardError("it fell over")))
    with pytest.raises(TerrashardError, match="the strategies could not be measured: it fell over"):
        measure.run_measurer([], 2)


def test_stages_in_several_processes_share_the_cores_and_wait_for_each_other_at_each_copy() -> None:
    stages = tuple(replace(ONE, name=name, stage=k, part=k, runs=2) for k in (0, 1) for name in ("forward", "backward"))
    known = facts({"pipe": 2, "data": 1}, *stages, handovers=(HandOver(0, 1, 128_000, arrays=2),), microbatches=2,
                  parts=2, schedule="1f1b", homes=(0, 1))  # fmt: skip
    one = predict(known, MEASURED, "float32")
    curve = Curve(sizes=(64.0, 64e3), seconds=(1e-3, 7e-3))
    apart = MEASURED.model_copy(update={"processes": 2, "exchanges": {"collective-permute": curve}})
    several = predict(known, apart, "float32")
    assert several.compute_s == pytest.approx(2 * one.compute_s), "at the rates of all devices at once"
    # a pass takes 10 ms, a copy 2 × 7 ms: two forward passes of the first stage, each with its copy; the four passes
    # of the last stage, with two copies back; and the last pass of the first stage
    assert several.step_s == pytest.approx(7 * 10e-3 + 4 * 14e-3)
    assert several.collective_s == pytest.approx(2 * 14e-3), "each stage sends one way for each microbatch"
    assert several.step_s == pytest.approx(several.compute_s + several.memory_s + several.collective_s + several.idle_s)
    (chain,) = {predict(replace(known, homes=()), apart, "float32").step_s}
    assert chain == several.step_s
    assert Facts.from_dict(json.loads(json.dumps(known.to_dict()))).handovers[0].arrays == 2
