"""A pipeline gives the answer of one device, does what its schedule says, compiles each part once, and is balanced."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from jaxtrain.config import ModelConfig, TrainConfig
from jaxtrain.learn.state import build_program
from jaxtrain.learn.step import make_eval_step, make_predict_step
from jaxtrain.models import build_model
from jaxtrain.models.units import is_owned
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from jaxtrain.parallel.schedule import bubble, trace
from jaxtrain.parallel.stages import measure
from jaxtrain.runs.checkpoint import CheckpointStore, target_of
from zarr_store.errors import InvalidInput

from .parity import (
    BATCH,
    SIDE,
    UNET,
    Outcome,
    assert_same,
    make_batch,
    make_program,
    mesh_of,
    model_of,
    of_one_device,
    train,
)

PIPE = {"pipe": 2, "data": 2, "schedule": "interleaved", "zero": 3}
"""Four unequal parts on two groups of two devices, parameters shared out."""


@cache
def piped() -> Outcome:
    return train(make_program(PIPE, UNET))


def test_a_pipeline_trains_as_one_device_does():
    assert_same(piped(), of_one_device("unet"))


def test_filters_may_be_split_within_the_stages_of_gpipe():
    got = train(make_program({"pipe": 2, "model": 2, "schedule": "gpipe", "microbatches": 2}, UNET))
    assert_same(got, of_one_device("unet"))
    assert all(unit.endswith(("second half", "head")) for unit in ends_of(got)), "a cut lies where filters are split"


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        ("pipe=2 data=2 zero=1", "resnet"),
        ("pipe=2 data=2 space=2", "resnet"),
        ("pipe=3 schedule=gpipe microbatches=1", "resnet batch"),
    ],
)
def test_a_resnet_is_cut_as_well(mesh, model):
    """Also with a batch norm, which one microbatch, the whole batch, allows."""
    assert_same(train(make_program(mesh_of(mesh), model_of(model))), of_one_device(model))


def ends_of(run: Outcome) -> list[str]:
    layout = run.program.layout
    return [layout.units[layout.span(chunk)[1] - 1] for chunk in range(layout.chunks)]


def test_each_part_is_compiled_once():
    pipeline = piped().step.jitted.__self__
    assert pipeline.compilations() == {name: [1] * 4 for name in ("forward", "backward", "update")}


def test_the_work_that_was_done_is_that_of_the_schedule():
    pipeline = piped().step.jitted.__self__
    assert pipeline.log == pipeline.walk
    assert bubble(trace(pipeline.orders, chunks=4)) <= 1.1 * (2 - 1) / (4 + 2 - 1)


def test_each_group_holds_its_own_part():
    run = piped()
    for name, leaf in jax.tree_util.tree_leaves_with_path(run.state.params):
        group = run.program.layout.mesh(
            run.program.layout.owner[jax.tree_util.keystr(name, simple=True, separator="/")]
        )
        assert leaf.sharding.device_set == set(group.devices.flat)
    assert jax.tree.map(lambda leaf: leaf.sharding, run.state) == run.program.shardings


def test_it_scores_and_predicts_as_one_device_does():
    batch = make_batch()
    sums = [make_eval_step(run.program)(run.state, batch) for run in (piped(), of_one_device("unet"))]
    np.testing.assert_allclose(sums[0]["loss_sum"], sums[1]["loss_sum"], rtol=1e-4)
    assert int(sums[0]["labelled"]) == int(sums[1]["labelled"])
    answers = [
        np.asarray(make_predict_step(run.program)(run.state, batch["image"]))
        for run in (piped(), of_one_device("unet"))
    ]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)


def test_a_checkpoint_of_a_pipeline_continues_on_one_device_and_back(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(10, piped().state, {})
    for program in of_one_device("unet").program, piped().program:
        restored = store.restore(target_of(program))
        for got, saved in zip(jax.tree.leaves(restored.state), jax.tree.leaves(piped().state), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(saved))


@pytest.mark.parametrize("config", [{"name": "unet", "depth": 2}, {"name": "cnn"}, {"name": "resnet", "depth": 10}])
def test_the_units_of_a_network_are_the_network(config):
    model: Any = build_model(ModelConfig(width=4, **config), channels=3, classes=4, rngs=nnx.Rngs(0))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    ]
    units = model.units()
    assert all(sum(is_owned(name, unit) for unit in units) == 1 for name in names)
    x = jnp.ones((2, 16, 16, 3))
    carry: Any = (x,)
    for unit in units:
        carry = unit.run(carry, True)
    np.testing.assert_array_equal(carry[0], model(x, train=True))


@pytest.mark.slow
def test_the_stages_of_a_real_unet_take_equally_long():
    """The cuts are made from an estimate; here the stages are timed, by the processor's own clock."""
    config = TrainConfig.model_validate(
        {"data": {"cube": "none.zarr", "patch": 64}, "mesh": {"pipe": 2}, "run": {"batch_size": 16}}
    )
    assert (config.model.name, config.model.width, config.model.depth) == ("unet", 16, 3)
    program = build_program(
        config, channels=4, classes=6, mesh=make_mesh(config.mesh), mean=np.zeros(4), std=np.ones(4)
    )
    layout, seconds = program.layout, []
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.shapes.params)
    }
    carry: Any = (jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32),)
    for chunk in range(layout.chunks):
        mine = {name: leaf for name, leaf in named.items() if layout.owner[name] == chunk}

        def run(params: Any, carry: Any, chunk: int = chunk) -> Any:
            span = layout.span(chunk)
            return program.apply_units(params, {}, carry, span=span, train=True, key=jax.random.key(0))[0]

        seconds.append(measure(run, mine, carry, repeats=9))
        carry = jax.eval_shape(run, mine, carry)
    assert max(seconds) / np.mean(seconds) <= 1.2, seconds


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"pipe": 2, "microbatches": 3}}, "batch_size 8 cannot be cut into mesh.microbatches 3"),
        ({"mesh": {"pipe": 2, "data": 4}}, "must be a multiple of 16"),
        ({"mesh": {"pipe": 4, "schedule": "interleaved", "microbatches": 2}}, "microbatches 2 must be a multiple"),
        ({"mesh": {"pipe": 2}, "model": UNET | {"norm": "batch"}}, "needs the whole batch at once"),
        ({"mesh": {"pipe": 2}, "model": UNET | {"turns": True}}, "model.turns is the mean over eight passes"),
        ({"mesh": {"pipe": 2}, "model": UNET | {"remat": True}}, "model.remat saves"),
        ({"mesh": {"pipe": 2}, "model": UNET, "optim": {"accumulate": 2}}, "optim.accumulate > 1"),
        ({"mesh": {"pipe": 2}, "model": UNET, "optim": {"loss": "dice"}}, "optim.loss = 'dice'"),
    ],
)
def test_pipelines_that_make_no_sense_are_refused(sections, message):
    base = {"data": {"cube": "none.zarr", "patch": SIDE}, "model": UNET, "run": {"batch_size": BATCH}}
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({**base, **sections})


def test_more_stages_than_units_are_refused_before_anything_is_compiled():
    with pytest.raises(InvalidInput, match="needs 8 stages, this network can be cut into 7 at most"):
        make_program({"pipe": 8}, UNET)


def test_batches_of_a_pipeline_are_the_same_on_all_groups():
    mesh = piped().program.mesh
    assert dict(mesh.shape) == {"pipe": 2, "data": 2, "model": 1}
    assert batch_sharding(mesh).shard_shape((8, 16, 16)) == (4, 16, 16)
