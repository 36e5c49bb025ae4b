"""Every strategy gives the answer of one device, moves what theory says, compiles once, and says what it cannot do."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.learn.step import make_predict_step
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.zero import share_out
from jaxtrain.planner.collectives import activation_gathers, find_collectives, result_bytes
from zarr_store.errors import InvalidInput

from .parity import (
    BATCH,
    CHANNELS,
    SIDE,
    UNET,
    Outcome,
    assert_same,
    make_program,
    mesh_of,
    model_of,
    of_one_device,
    put,
    train,
    whole,
)


@cache
def run_of(mesh: str, model: str = "unet") -> Outcome:
    """Ten steps, compiled once for all tests; `mesh` as in "data=2 space=2,2", `model` as in "resnet batch"."""
    return train(make_program(mesh_of(mesh), model_of(model)))


STRATEGIES = [
    "data=4 zero=1",
    "data=4 zero=3",
    "data=2 model=2 zero=1",
    "space=4",
    "space=2,2 data=2",
    "data=2 space=2 model=2 zero=3",
]


RUNS = [
    *((mesh, "unet") for mesh in STRATEGIES),
    ("data=8", "resnet"),
    ("data=4 zero=1", "resnet batch"),
    ("model=4", "resnet"),
    ("space=4 data=2", "resnet batch"),
    ("data=2 space=2 model=2 zero=3", "resnet"),
]
"""Mesh and network; of the ResNet each kind of split once, and all at once."""


@pytest.mark.parametrize(("mesh", "model"), RUNS)
def test_every_strategy_trains_as_one_device_does(mesh, model):
    assert_same(run_of(mesh, model), of_one_device(model))


@pytest.mark.parametrize(("mesh", "model"), RUNS)
def test_one_compilation_and_no_activation_is_gathered(mesh, model):
    run = run_of(mesh, model)
    assert run.step.jitted._cache_size() == 1
    compiled = compile_again(run)
    shapes = [leaf.shape for leaf in jax.tree.leaves(run.program.shapes.params)]
    local = [where.shard_shape(shape) for shape, where in zip(shapes, jax.tree.leaves(run.program.whole), strict=True)]
    assert activation_gathers(compiled, local) == ()


def compile_again(run: Outcome) -> Any:
    return run.step.jitted.lower(run.state, put(run.program), jax.random.key(0)).compile()  # from the cache of the run


def test_the_batch_norm_counts_all_pixels_of_a_split_image():
    assert_same(run_of("data=2 space=2", "unet batch"), of_one_device("unet batch"))


def test_the_local_norm_is_that_of_equal_parts_of_the_batch(monkeypatch):
    from jaxtrain.models import build_model

    got = run_of("data=2 space=2", "unet local")
    monkeypatch.setattr(
        "jaxtrain.learn.state.build_model", lambda config, **more: build_model(config, **{**more, "data_shards": 2})
    )
    assert_same(got, train(make_program({}, UNET | {"norm": "local"})))


@pytest.mark.parametrize("mesh", ["data=2 space=2 model=2 zero=3", "data=4 zero=1"])
def test_steps_that_need_whole_kernels_are_those_of_one_device(mesh):
    """Muon looks at all of a kernel at once, of which devices hold parts."""
    split, one = (updates_of(text, name="muon", learning_rate=0.1, weight_decay=0.1) for text in (mesh, ""))
    assert one.keys() == split.keys()
    for name, expected in one.items():
        assert np.linalg.norm(expected) > 0
        np.testing.assert_allclose(split[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


@cache
def updates_of(mesh: str, **optim: Any) -> dict[str, np.ndarray]:
    """What the optimiser makes of one and the same gradient, where a step has it."""
    program = make_program(mesh_of(mesh), UNET, **optim)
    state, rng = program.init(jax.random.key(0)), np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(np.float32), program.shapes.params)

    @jax.jit
    def update(state: Any, gradient: Any) -> Any:
        return program.optimizer.update(program.share(gradient), state.opt_state, state.params)[0]

    return whole(update(state, gradient))


# ---- ZeRO


def test_moments_lie_in_parts_with_zero_1_and_parameters_too_with_zero_3():
    for mesh, parameters in ("data=4 zero=1", 1.0), ("data=4 zero=3", 0.25):
        state = run_of(mesh).state
        assert held(state.params) == pytest.approx(parameters, abs=0.01)
        assert held(state.opt_state) == pytest.approx(0.25, abs=0.01)


def held(tree: Any) -> float:
    """Share of the bytes that the first device holds."""
    leaves = jax.tree.leaves(tree)
    first = jax.devices()[0]
    mine = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == first)
    return mine / sum(leaf.nbytes for leaf in leaves)


def test_zero_moves_each_parameter_once_and_fully_sharded_kernels_twice():
    parameters = {tuple(leaf.shape): leaf for leaf in jax.tree.leaves(run_of("data=4 zero=1").program.shapes.params)}
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(run_of("data=4 zero=1").program.shapes.params))
    undivided = 4 * sum(math.prod(shape) for shape in parameters if not any(extent % 4 == 0 for extent in shape))
    once = result_bytes(compile_again(run_of("data=4 zero=1")))["all-gather"]
    assert once == size - undivided
    twice = result_bytes(compile_again(run_of("data=4 zero=3")))["all-gather"]
    assert 1.9 * size < twice <= 2 * size


def test_parts_are_cut_along_the_longest_free_dimension():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    shapes = {
        "a": np.zeros((3, 3, 8, 16)),
        "b": np.zeros((3, 3, 16, 16)),
        "c": np.zeros(5),
        "d": np.zeros((3, 3, 8, 4)),
    }
    specs = {"a": P(None, None, None, "model"), "b": P(), "c": P(), "d": P(None, None, "data", None)}
    assert share_out(shapes, specs, mesh) == {
        "a": P(None, None, "data", "model"),
        "b": P(None, None, None, "data"),
        "c": P(),
        "d": P(None, None, "data", None),
    }


# ---- Space


# (side of the level, channels in, rows borrowed from before and after) of each 3 × 3 convolution
UNET_CONVOLUTIONS = [
    (SIDE, CHANNELS, 2),
    (SIDE, 8, 2),
    (SIDE // 2, 8, 2),
    (SIDE // 2, 16, 2),
    (SIDE, 8, 2),
    (SIDE, 8, 2),
]
# one that halves borrows only from before
RESNET_CONVOLUTIONS = [(SIDE, CHANNELS, 2), (SIDE, 8, 2), (SIDE, 8, 2), (SIDE, 8, 1), (SIDE // 2, 16, 2)]


@pytest.mark.parametrize(
    ("mesh", "model", "convolutions"),
    [
        ("space=4", "unet", UNET_CONVOLUTIONS),
        ("space=2,2 data=2", "unet", UNET_CONVOLUTIONS),
        ("space=4 data=2", "resnet batch", RESNET_CONVOLUTIONS),
    ],
)
def test_halo_bytes_are_what_theory_says(mesh, model, convolutions):
    """Each convolution borrows rows from either side, forward and, but for the image itself, backward."""
    run = run_of(mesh, model)
    compiled = compile_again(run)
    rows, columns = run.program.config.mesh.spaces
    samples = BATCH // run.program.config.mesh.data
    expected = 0
    for number, (side, channels, lines) in enumerate(convolutions):
        borrowed = lines * (side // columns) if rows > 1 else 0
        if columns > 1:  # the corners travel with the columns
            borrowed += lines * (side // rows + lines)
        expected += 4 * samples * channels * borrowed * (2 if number else 1)
    found = find_collectives(compiled, run.program.config.mesh.axes)
    moves = [c for c in found if c.kind in ("collective-permute", "all-to-all")]
    halos = [c for c in moves if c.kind == "collective-permute" and "shard_map" in c.source]
    assert sum(c.result_bytes for c in halos) == expected
    assert sum(c.wire_bytes for c in halos) == expected
    assert {axis for c in halos for axis in c.axes} == {"space", "space_w"} & set(run.program.config.mesh.axes)
    # beside them only the turns of the stored image move pixels, and those are of two bytes or one
    assert all("f32" not in c.types for c in moves if c not in halos)


def test_a_device_holds_its_part_of_a_scene():
    """A scene for which one device would need four times the memory."""
    needed = {}
    for space in (1, 4):
        program = make_program({"space": space}, UNET)
        predict = make_predict_step(program)
        image = jax.ShapeDtypeStruct((1, CHANNELS, 256, 256), np.uint16)
        seen = jax.ShapeDtypeStruct((1, 256, 256), np.bool_)
        memory = predict.jitted.lower(program.shapes.params, program.shapes.model_state, image, seen).compile()
        needed[space] = memory.memory_analysis().temp_size_in_bytes
    assert needed[4] < 0.3 * needed[1]


# ---- What makes no sense is refused before anything is compiled


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"zero": 1, "data": 1}}, "zero = 1 splits over the axis data, whose size is 1"),
        ({"mesh": {"space": 3}}, "mesh.space 3 cannot split data.patch 16.*has 8 rows.*multiple of 6"),
        ({"mesh": {"space": [1, 16]}}, "mesh.space 16 cannot split data.patch 16"),
        ({"mesh": {"zero": 2, "data": 2}}, "Input should be 0, 1 or 3"),
        ({"mesh": {"space": 2}, "model": {"name": "mlp"}}, "not those of mlp"),
        ({"mesh": {"space": [2, 2, 2]}}, "mesh.space"),
        ({"mesh": {"space": 0}}, "greater than 0"),
    ],
)
def test_meshes_that_make_no_sense_are_refused(sections, message):
    base = {"data": {"cube": "none.zarr", "patch": SIDE}, "model": UNET, "run": {"batch_size": BATCH}}
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({**base, **sections})


def test_a_mesh_that_is_too_large_names_all_its_axes():
    with pytest.raises(InvalidInput, match=r"data=2 × space=4 × space_w=2 × model=1 needs 16 devices, JAX sees 8"):
        make_mesh(MeshConfig(data=2, space=(4, 2)))


def test_zero_without_anybody_to_share_with_is_refused():
    with pytest.raises(InvalidInput, match=r"mesh.zero = 3 splits over the axis data, which has one device"):
        make_program({"zero": 3}, UNET)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name": "cnn", "width": 4},
            r"conv1/kernel of shape \(3, 3, 3, 4\): dimension 3 of size 4 .* axis 'model' of size 8",
        ),
        (
            {"name": "mlp", "width": 8},
            r"mesh.model = 8 splits no parameter of this network: none is named in mesh.rules",
        ),
    ],
)
def test_devices_that_would_split_no_filter_are_refused(model, message):
    with pytest.raises(InvalidInput, match=message):
        make_program({"model": 8}, model | {"depth": 1})
