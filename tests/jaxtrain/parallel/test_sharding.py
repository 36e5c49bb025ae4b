"""Rules: the defaults, the user's before them, and those that cannot apply; and what XLA made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig
from jaxtrain.parallel.mesh import batch_sharding, make_mesh, replicated
from jaxtrain.parallel.sharding import partition_specs
from jaxtrain.planner.collectives import activation_gathers, result_bytes
from zarr_store.errors import InvalidInput

TREE = {
    "level0": {
        "conv1": {"kernel": np.zeros((3, 3, 4, 16))},
        "norm1": {"scale": np.zeros(16), "bias": np.zeros(16)},
        "conv2": {"kernel": np.zeros((3, 3, 16, 16))},
        "norm2": {"scale": np.zeros(16)},
        "skip": {"kernel": np.zeros((1, 1, 4, 16)), "bias": np.zeros(16)},
    }
}


def specs(rules=(), *, data=1, model=8, tree=TREE, **more):
    return partition_specs(tree, make_mesh(MeshConfig(data=data, model=model)), rules, **more)["level0"]


def test_filters_are_split_in_pairs():
    got = specs()
    assert got["conv1"]["kernel"] == P(None, None, None, "model")
    assert got["norm1"] == {"scale": P("model"), "bias": P("model")}
    assert got["conv2"]["kernel"] == P(None, None, "model", None)
    assert got["norm2"]["scale"] == P()
    assert got["skip"] == {"kernel": P(), "bias": P()}


def test_defaults_that_do_not_fit_leave_parameters_whole():
    assert all(spec == P() for spec in jax.tree.leaves(specs(model=3), is_leaf=lambda x: isinstance(x, P)))


def test_the_users_rules_come_first_and_in_order():
    rules = ((r"conv1/kernel", (None, None, "data", None)), (r"conv./kernel", (None, None, None, "model")))
    got = specs(rules, data=4, model=2)
    assert got["conv1"]["kernel"] == P(None, None, "data", None)
    assert got["conv2"]["kernel"] == P(None, None, None, "model")
    assert got["norm1"]["scale"] == P("model")


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (
            ("conv1/kernel", (None, None, "model", None)),
            ["level0/conv1/kernel", "(3, 3, 4, 16)", "dimension 2 of size 4", "axis 'model' of size 8"],
        ),
        (("conv1/kernel", ("model",)), ["level0/conv1/kernel", "4 dimensions, the rule names 1"]),
        (("norm1/scale", ("space",)), ["level0/norm1/scale", "(16,)", "no axis 'space', only 'data', 'model'"]),
        (("conv2/kernel", (None, None, "model", "model")), ["axis 'model' is named twice"]),
        (("covn1/kernel", (None,)), ["'covn1/kernel' matches no parameter", "level0/conv1/kernel"]),
        (("conv1/(", (None,)), ["is not a regular expression"]),
    ],
)
def test_rules_that_cannot_apply_are_refused(rule, parts):
    with pytest.raises(InvalidInput) as caught:
        specs((rule,))
    for part in parts:
        assert part in str(caught.value)


def test_a_rule_may_be_meant_for_another_tree():
    assert specs((("norm1/mean", ("model",)),), known=["level0/norm1/mean"])["norm2"]["scale"] == P()


def test_a_rule_from_toml_writes_an_empty_axis_for_none(program_of):
    rule = ["encoder/level1/conv1/kernel", ["", "", "data", ""]]
    program = program_of(4, 2, mesh={"data": 4, "model": 2, "rules": [rule]})
    assert program.config.mesh.rules == (("encoder/level1/conv1/kernel", (None, None, "data", None)),)
    assert program.shardings.params["encoder"]["level1"]["conv1"]["kernel"].spec == P(None, None, "data", None)


def test_state_lies_where_the_rules_say(run_of):
    state = run_of(2, 4).state
    kernel = state.params["encoder"]["level1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 8, 16)
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 3, 8, 4)}
    row = state.params["decoder"]["level0"]["conv2"]["kernel"]
    assert {s.data.shape for s in row.addressable_shards} == {(3, 3, 2, 8)}
    # the optimiser's moments lie as their parameters do
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['encoder']['level1']['conv1']['kernel']")
    ]
    assert len(moments) == 2
    assert all(m.sharding == kernel.sharding for m in moments)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    first = jax.devices()[0]
    held = sum(
        s.data.nbytes for leaf in jax.tree.leaves(state.params) for s in leaf.addressable_shards if s.device == first
    )
    assert held < 0.4 * total


def test_batch_statistics_lie_with_their_filters(program_of):
    program = program_of(4, 2, model={"width": 8, "depth": 1, "norm": "batch"})
    assert program.shardings.model_state["encoder"]["level1"]["norm1"]["mean"].spec == P("model")
    assert program.shardings.model_state["encoder"]["level1"]["norm2"]["mean"].spec == P()


def compiled_step(run, batch):
    return run.step.jitted.lower(run.state, batch, jax.random.key(0)).compile()  # from the cache of the run


def test_data_parallel_step_gathers_no_activation_and_sums_each_gradient_once(run_of, batch):
    run = run_of(8, 1)
    compiled = compiled_step(run, batch)
    assert activation_gathers(compiled) == ()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state.params))
    moved = result_bytes(compiled)
    assert set(moved) == {"all-reduce"}
    assert parameters <= moved["all-reduce"] <= parameters + 256  # and the scalars of loss and metrics


@pytest.mark.parametrize(("data", "model"), [(4, 2), (2, 4), (1, 8)])
def test_filter_parallel_step_gathers_nothing(run_of, batch, data, model):
    compiled = compiled_step(run_of(data, model), batch)
    assert activation_gathers(compiled) == ()
    assert set(result_bytes(compiled)) == {"all-reduce"}


def test_an_activation_all_gather_is_found():
    """Any layout that needs a whole activation on one device, as a grouped convolution does (xla#47945)."""
    mesh = make_mesh(MeshConfig(data=8))
    x = jax.device_put(jnp.ones((8, 16, 16, 4)), batch_sharding(mesh))

    def program(x):
        return jax.lax.with_sharding_constraint(jnp.sin(x), replicated(mesh)) * 2

    compiled = jax.jit(program, in_shardings=batch_sharding(mesh), out_shardings=replicated(mesh)).lower(x).compile()
    (found,) = activation_gathers(compiled)
    assert found.bytes == 8 * 16 * 16 * 4 * 4
    assert activation_gathers(compiled, parameters=[(16, 16, 32)]) == ()  # as many elements as a parameter has
