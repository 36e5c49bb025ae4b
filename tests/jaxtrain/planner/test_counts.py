"""Bytes on the wire, operations and memory of compiled steps beside what theory says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.planner.collectives import Dialect, activation_gathers, find_collectives, wire_bytes
from jaxtrain.planner.cost import peak_bytes
from jaxtrain.planner.facts import Facts, batch_shapes, compile_facts
from jaxtrain.planner.hlo import read_module
from jaxtrain.planner.layers import layer_of
from jaxtrain.planner.operations import find_operations
from jaxtrain.planner.scale import State, extend

GPU = Dialect(scatters=True, half=True, pairs=False)
SMALL = {"width": 8, "depth": 1}


@pytest.fixture(scope="module")
def facts_of(program_of: Any) -> Any:
    known: dict[str, Facts] = {}

    def facts(dialect: Dialect = GPU, /, batch: int = 8, **mesh: Any) -> Facts:
        name = repr((dialect, batch, sorted(mesh.items())))
        if name not in known:
            program = program_of(model=SMALL, data={"augment": False}, mesh=mesh, run={"batch_size": batch})
            known[name] = compile_facts(program, {"image": "uint16"}, dialect)
        return known[name]

    return facts


def sent(facts: Facts) -> dict[str, dict[str, float]]:
    (program,) = facts.programs
    return wire_bytes(program.collectives)


def test_a_ring_sends_what_the_textbook_says(device_mesh):
    """Each kind alone, for eight devices and a result of known size."""
    mesh, split, whole = device_mesh
    x = jax.ShapeDtypeStruct((64, 128), np.float32, sharding=split)
    size = 64 * 128 * 4

    def wire(function: Any, out: NamedSharding, argument: Any = x) -> dict[str, dict[str, float]]:
        compiled = jax.jit(function, out_shardings=out).lower(argument).compile()
        return wire_bytes(find_collectives(compiled, dict(mesh.shape)))

    assert wire(lambda x: x * 2, whole) == {"data": {"all-gather": size * 7 / 8}}
    assert wire(lambda x: x.sum(axis=0), whole) == {"data": {"all-reduce": 128 * 4 * 2 * 7 / 8}}
    turned = NamedSharding(mesh, PartitionSpec(None, "data"))
    assert wire(lambda x: x * 2, turned) == {"data": {"all-to-all": size / 8 * 7 / 8}}


def test_data_parallel_sends_the_gradient_and_zero_sends_it_in_parts(facts_of):
    """Of R bytes of parameters 2 (n-1)/n R, summed at once or scattered and gathered; ZeRO-3 half as much more."""
    data, first, third = (facts_of(data=4, zero=zero) for zero in (0, 1, 3))
    gradient, share = data.parameters, 3 / 4
    scalars = 64  # of loss and metrics
    assert sent(data)["data"].keys() == {"all-reduce"}
    assert 2 * share * gradient <= sent(data)["data"]["all-reduce"] <= 2 * share * (gradient + scalars)
    split = sum(
        4 * np.prod(shape)
        for one in first.programs[0].collectives
        if one.kind == "reduce-scatter"
        for shape in one.shapes
    )
    assert split > 0.95 * gradient  # all but what four does not divide
    assert sent(first)["data"]["reduce-scatter"] == share * split
    assert sent(first)["data"]["all-gather"] == share * split
    assert sent(third)["data"]["reduce-scatter"] == share * split
    assert 1.9 * share * split < sent(third)["data"]["all-gather"] <= 2 * share * split
    assert {one.corrected for one in first.programs[0].collectives} == {"", "all-reduce whose parts are kept"}


def test_what_a_processor_prints_is_kept_beside(facts_of):
    raw = facts_of(Dialect(), data=4, zero=1)
    assert "reduce-scatter" not in sent(raw)["data"]
    assert raw.programs[0].result_bytes == facts_of(data=4, zero=1).programs[0].result_bytes


def test_memory_of_the_state_is_that_of_its_shards(facts_of):
    whole, first, third = facts_of(data=4), facts_of(data=4, zero=1), facts_of(data=4, zero=3)
    assert whole.parameter_bytes == whole.parameters
    assert first.parameter_bytes == whole.parameter_bytes
    assert whole.parameters / 4 <= third.parameter_bytes < 0.3 * whole.parameters
    assert first.optimizer_bytes == third.optimizer_bytes < 0.3 * whole.optimizer_bytes


def test_arguments_of_the_compiled_program_are_state_and_batch(facts_of, program_of):
    facts = facts_of(data=4)
    program = program_of(model=SMALL, data={"augment": False}, mesh={"data": 4}, run={"batch_size": 8})
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in batch_shapes(program, {"image": "uint16"}).values()) / 4
    state = facts.parameter_bytes + facts.optimizer_bytes
    assert facts.programs[0].argument_bytes == pytest.approx(state + batch, rel=0.01)


def test_more_replicas_need_no_other_program(facts_of, program_of):
    """Four replicas stand for eight, with as many windows each: what is counted for eight is the same."""
    for zero in (0, 1, 3):
        few, many = facts_of(batch=8, data=4, zero=zero), facts_of(batch=16, data=8, zero=zero)
        got = extend(few, 8, State(many.parameter_bytes, many.optimizer_bytes))
        assert got.mesh == many.mesh
        assert got.batch == many.batch
        for kind, size in sent(many)["data"].items():
            assert sent(got)["data"][kind] == pytest.approx(size, rel=0.01, abs=64), (zero, kind)
        assert got.programs[0].flops == pytest.approx(many.programs[0].flops, rel=0.01)
        assert got.programs[0].peak_bytes == pytest.approx(many.programs[0].peak_bytes, rel=0.05)


def test_a_pipeline_hands_over_the_activations_at_its_cut(facts_of):
    facts = facts_of(pipe=2, microbatches=4)
    assert [(one.name, one.stage) for one in facts.programs] == [
        ("images", 0), ("forward", 0), ("backward", 0), ("update", 0), ("forward", 1), ("backward", 1), ("update", 1),
    ]  # fmt: skip
    (handed,) = facts.handovers
    assert (handed.source, handed.target) == (0, 1)
    # two windows of 32 × 32, and whatever levels of eight channels at that size the cut goes through
    assert handed.bytes % (2 * 32 * 32 * 4) == 0
    assert handed.bytes > 0
    assert handed.arrays == 3, "what goes on, and what levels above the cut keep for the way up"
    # of each pixel two bytes for each of three bands, one for its label, and one that says whether it was observed
    assert facts.batch_bytes == 8 * 32 * 32 * (2 * 3 + 2)
    alone = facts_of()
    assert alone.batch_bytes == 0, "the program of a step has it among its arguments"
    work = sum(one.flops * one.runs for one in facts.programs)
    assert work == pytest.approx(alone.programs[0].flops, rel=0.02)


@pytest.mark.parametrize("zero", [0, 1])
def test_the_gradient_of_a_pipeline_travels_once_a_step(facts_of, zero):
    """Replicas sum it apart over the microbatches, so their number plays no part."""
    facts = facts_of(Dialect(), pipe=2, data=2, zero=zero, microbatches=4)
    sent: dict[str, float] = {}
    for one in facts.programs:
        for collective in one.collectives:
            if collective.kind == "all-reduce":
                sent[one.name] = sent.get(one.name, 0.0) + one.runs * collective.wire_bytes
    assert sent.pop("total") == pytest.approx(facts.parameters, rel=0.01)  # 2 (n - 1) / n is 1
    assert sum(sent.values()) < 0.01 * facts.parameters, sent


def test_the_memory_of_a_stage_does_not_grow_with_its_replicas(facts_of):
    """Nothing of a microbatch lies whole on a device, and no parameter is copied for it."""
    one, four = facts_of(batch=8, pipe=2, microbatches=2), facts_of(batch=32, pipe=2, data=4, microbatches=2)
    kept = [{one.part: one.kept_bytes for one in facts.programs if one.name == "forward"} for facts in (one, four)]
    assert kept[0] == kept[1]
    assert peak_bytes(four) <= 1.02 * peak_bytes(one)


def test_facts_survive_a_file(facts_of):
    facts = facts_of(data=4, zero=1)
    assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_operations_are_the_compilers_own_where_it_counts_right():
    def convolution(stride: int = 1, *, spread: int = 1, stretch: int = 1, groups: int = 1) -> Any:
        def run(x: Any, k: Any) -> Any:
            return jax.lax.conv_general_dilated(
                x, k, (stride, stride), ((1, 1), (1, 1)), lhs_dilation=(stretch,) * 2, rhs_dilation=(spread,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
            )  # fmt: skip

        return run

    x = jax.ShapeDtypeStruct((2, 12, 12, 8), np.float32)
    for groups, more in ((1, {}), (1, {"stride": 2}), (1, {"spread": 2}), (1, {"stretch": 2}), (2, {})):
        k = jax.ShapeDtypeStruct((3, 3, 8 // groups, 16), np.float32)
        compiled = jax.jit(convolution(groups=groups, **more)).lower(x, k).compile()
        (one,) = [operation for operation in find_operations(compiled) if operation.flops]
        assert one.flops == (compiled.cost_analysis() or {})["flops"], more
    a, b = jax.ShapeDtypeStruct((64, 32), np.float32), jax.ShapeDtypeStruct((32, 16), np.float32)
    (one,) = [
        operation for operation in find_operations(jax.jit(lambda a, b: a @ b).lower(a, b).compile()) if operation.flops
    ]
    assert one.flops == 2 * 64 * 32 * 16


class Layer(NamedTuple):
    """A convolution or a product as a textbook has it."""

    name: str
    places: int
    """Pairs of a result's pixel and a pixel of its window that is in the image, over the whole batch."""
    inputs: int
    outputs: int
    of_data: bool = False
    """Its input is the data, which has no gradient."""

    @property
    def flops(self) -> float:
        return 2.0 * self.places * self.inputs * self.outputs


def pairs(side: int, kernel: int, stride: int = 1) -> int:
    """Pixels of windows centred on each `stride`-th pixel that lie in the image, along one side."""
    reach = kernel // 2
    return sum(0 <= at + step < side for at in range(0, side, stride) for step in range(-reach, reach + 1))


def unet_layers(batch: int, side: int, bands: int, classes: int, *, width: int, depth: int) -> Iterator[Layer]:
    def block(name: str, side: int, inputs: int, outputs: int, *, of_data: bool = False) -> Iterator[Layer]:
        yield Layer(f"{name}/conv1", batch * pairs(side, 3) ** 2, inputs, outputs, of_data)
        yield Layer(f"{name}/conv2", batch * pairs(side, 3) ** 2, outputs, outputs)
        if inputs != outputs:
            yield Layer(f"{name}/skip", batch * side**2, inputs, outputs, of_data)

    for level in range(depth + 1):
        inputs = width << (level - 1) if level else bands
        yield from block(f"encoder/level{level}", side >> level, inputs, width << level, of_data=not level)
    for level in range(depth):
        coarse = side >> (level + 1)
        yield Layer(f"up/level{level}", batch * coarse**2, width << (level + 1), width << level)
        yield from block(f"decoder/level{level}", side >> level, width << level, width << level)
    yield Layer("head", batch * side**2, width, classes)


def resnet_layers(batch: int, side: int, bands: int, classes: int, *, width: int, stages: int) -> Iterator[Layer]:
    yield Layer("stem", batch * pairs(side, 3) ** 2, bands, width, of_data=True)
    inputs = width
    for stage in range(stages):
        outputs, stride = width << stage, 2 if stage else 1
        yield Layer(f"stage{stage}/conv1", batch * pairs(side, 3, stride) ** 2, inputs, outputs)
        side //= stride
        yield Layer(f"stage{stage}/conv2", batch * pairs(side, 3) ** 2, outputs, outputs)
        if inputs != outputs:
            yield Layer(f"stage{stage}/skip", batch * side**2, inputs, outputs)
        inputs = outputs
    yield Layer("head", batch, inputs, classes)


def temporal_layers(
    batch: int, side: int, bands: int, classes: int, *, width: int, depth: int, dates: int, taps: int
) -> Iterator[Layer]:
    pixels = batch * side**2
    for number in range(depth):
        inputs = width if number else bands + 3
        yield Layer(f"dates/linear{number + 1}", pixels * dates, taps * inputs, width, of_data=not number)
    yield Layer("score", pixels * dates, width, width // 8)
    yield Layer("mix", pixels, width, width)
    yield Layer("block0/conv1", batch * pairs(side, 3) ** 2, width, width)
    yield Layer("block0/conv2", batch * pairs(side, 3) ** 2, width, width)
    yield Layer("head", pixels, width, classes)


@pytest.mark.parametrize("name", ["unet", "resnet", "temporal"])
def test_operations_of_each_layer_and_its_gradients_are_those_of_theory(facts_of, program_of, name):
    """Forward, gradient of the kernel, and of the input where that is no data: each as many as theory says.

    Filters are few here: a processor would take two columns at once, at a third more operations, and these programs
    are compiled on one for a machine that does not.
    """
    batch, side, bands, classes = 8, 32, 3, 4
    if name == "unet":
        layers, facts = unet_layers(batch, side, bands, classes, **SMALL), facts_of()
    elif name == "resnet":
        model = {"name": "resnet", "width": 8, "blocks": [1, 1], "stem": "small"}
        layers = resnet_layers(batch, side, bands, classes, width=8, stages=2)
        facts = compile_facts(program_of(model=model, data={"augment": False}), {"image": "uint16"}, GPU)
    else:
        model = {"name": "temporal", "width": 16, "depth": 2, "taps": 3, "context": 1}
        layers = temporal_layers(batch, side, bands, classes, width=16, depth=2, dates=5, taps=3)
        data = {"augment": False, "dates": 5}
        facts = compile_facts(program_of(model=model, data=data), {"image": "uint16"}, GPU)
    wanted = Counter(layer.flops for layer in layers for _ in range(2 if layer.of_data else 3))
    (program,) = facts.programs
    found: Counter[float] = Counter()
    for flops, _, _, count in program.work:
        if flops:
            found[flops] += count
    assert found == wanted


def test_operations_of_a_loop_count_each_turn():
    def program(x: Any, k: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x @ k, None), x, None, length=9)[0]

    square = jax.ShapeDtypeStruct((16, 16), np.float32)
    found = find_operations(jax.jit(program).lower(square, square).compile())
    assert sum(one.flops * one.count for one in found) == 9 * 2 * 16**3


def test_a_kernel_that_zero_gathers_is_no_activation_where_filters_are_split_too(facts_of):
    """Each device gathers its part of the filters, which has fewer elements than the kernel."""
    program = facts_of(data=2, model=2, zero=3).programs[0]
    assert any(one.kind == "all-gather" and one.axes == ("data",) for one in program.collectives)
    assert program.gathers == ()


def test_an_activation_that_is_gathered_is_named(device_mesh):
    _, split, whole = device_mesh

    def program(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(jax.numpy.sin(x), whole) * 2

    compiled = (
        jax.jit(program, in_shardings=split, out_shardings=whole).lower(np.ones((8, 16, 16, 4), np.float32)).compile()
    )
    (found,) = activation_gathers(compiled)
    assert "sharding_constraint" in found.source or "sin" in found.source
    assert layer_of(read_module(compiled), found) == "", "there is no layer"


class Held(NamedTuple):
    params: Any


def test_the_layer_is_named_that_an_activation_is_gathered_for(device_mesh):
    mesh, split, whole = device_mesh
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))

    def convolve(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def program(state: Held, x: Any) -> Any:
        x = convolve(x, state.params["encoder"]["conv1"]["kernel"]) + state.params["encoder"]["conv1"]["bias"]
        x = convolve(jax.numpy.tanh(x), state.params["encoder"]["conv2"]["kernel"])
        x = jax.lax.with_sharding_constraint(jax.numpy.sin(x), whole)  # no sound network does this
        return convolve(x, state.params["decoder"]["conv1"]["kernel"]) + state.params["decoder"]["conv1"]["bias"]

    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), np.float32, sharding=whole)
    layer = {"kernel": kernel, "bias": jax.ShapeDtypeStruct((16,), np.float32, sharding=whole)}
    state = Held({"encoder": {"conv1": layer, "conv2": layer}, "decoder": {"conv1": layer}})
    x = jax.ShapeDtypeStruct((8, 16, 16, 16), np.float32, sharding=split)
    module = read_module(jax.jit(program, out_shardings=rows).lower(state, x).compile())
    found = [layer_of(module, one) for one in activation_gathers(module)]
    assert found
    assert set(found) == {"decoder/conv1"}
