"""Schedules and update rules against their formulas."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import OptimConfig
from jaxtrain.learn.optim import build_optimizer, build_schedule, decays, evaluation_params

PARAMS = {"conv1": {"kernel": jnp.full((1, 1, 2, 2), 3.0)}, "norm1": {"scale": jnp.full((2,), 3.0)}}


def gradients(kernel: float = 0.0, scale: float = 0.0):
    return {"conv1": {"kernel": jnp.full((1, 1, 2, 2), kernel)}, "norm1": {"scale": jnp.full((2,), scale)}}


def one_step(config: OptimConfig, gradient):
    optimizer = build_optimizer(config, 100)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    return float(new["conv1"]["kernel"][0, 0, 0, 0]), float(new["norm1"]["scale"][0])


def test_cosine_with_warm_up():
    schedule = build_schedule(OptimConfig(learning_rate=0.8, warmup_steps=4), 20)
    for step in range(4):
        assert float(schedule(step)) == pytest.approx(0.8 * (step + 1) / 4)
    for step in range(4, 21):
        assert float(schedule(step)) == pytest.approx(0.4 * (1 + math.cos(math.pi * (step - 4) / 16)), abs=1e-7)


def test_short_run_keeps_half_of_its_steps_after_the_warm_up():
    schedule = build_schedule(OptimConfig(learning_rate=1.0, warmup_steps=20, schedule="constant"), 10)
    assert [round(float(schedule(s)), 3) for s in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert float(build_schedule(OptimConfig(warmup_steps=20), 1)(0)) == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lamb", "muon"])
def test_weight_decay_acts_on_kernels_only(name):
    config = OptimConfig(name=name, learning_rate=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    kernel, scale = one_step(config, gradients())
    assert kernel < 3
    assert scale == 3
    kernel, _ = one_step(config.model_copy(update={"weight_decay": 0.0}), gradients())
    assert kernel == 3
    assert decays(PARAMS) == {"conv1": {"kernel": True}, "norm1": {"scale": False}}


def test_adamw_and_sgd_follow_their_formulas():
    base = {"learning_rate": 0.1, "weight_decay": 0.5, "warmup_steps": 0, "schedule": "constant", "clip_norm": None}
    # the first Adam step has the size of the rate; decay is beside it: 3 - 0.1 * (1 + 0.5 * 3)
    assert one_step(OptimConfig(name="adamw", **base), gradients(2.0))[0] == pytest.approx(3 - 0.1 * 2.5, rel=1e-5)
    # L2 and Nesterov: g = 2 + 0.5 * 3; step = g + 0.9 g
    assert one_step(OptimConfig(name="sgd", **base), gradients(2.0))[0] == pytest.approx(3 - 0.1 * 1.9 * 3.5, rel=1e-5)
    plain = OptimConfig(name="sgd", **{**base, "weight_decay": 0.0}, momentum=0.0)
    assert one_step(plain, gradients(2.0))[0] == pytest.approx(2.8)


def test_muon_makes_steps_of_kernels_orthogonal_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    shapes = {"conv1": {"kernel": (3, 3, 4, 16), "bias": (16,)}, "head": {"kernel": (16, 5)}}
    params = {layer: {name: jnp.ones(shape) for name, shape in of.items()} for layer, of in shapes.items()}
    gradient = {
        layer: {name: jnp.asarray(rng.normal(0, 3, leaf.shape), jnp.float32) for name, leaf in of.items()}
        for layer, of in params.items()
    }
    base = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant", "clip_norm": None}
    optimizer = build_optimizer(OptimConfig(name="muon", **base), 100)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    step, of = (np.asarray(tree["conv1"]["kernel"]).reshape(36, 16) for tree in (updates, gradient))
    # 36 numbers go into each of 16 filters; five Newton-Schulz steps bring singular values between 0.6 and 1.3
    values = np.linalg.svd(step, compute_uv=False) / (0.1 * 0.2 * math.sqrt(36))
    assert 0.6 < values.min() < values.max() < 1.3
    assert np.ptp(np.linalg.svd(of, compute_uv=False)) > 3
    left, _, right = np.linalg.svd(of, full_matrices=False)
    along = np.sum(-step * (left @ right)) / np.linalg.norm(step) / np.linalg.norm(left @ right)
    assert along > 0.95
    # a stage of a pipeline holds its parameters by path
    flat, flat_gradient = (
        {f"{a}/{b}": leaf for a, of in tree.items() for b, leaf in of.items()} for tree in (params, gradient)
    )
    flat_updates, _ = optimizer.update(flat_gradient, optimizer.init(flat), flat)
    for layer, name in (("conv1", "bias"), ("conv1", "kernel"), ("head", "kernel")):
        np.testing.assert_array_equal(flat_updates[f"{layer}/{name}"], updates[layer][name])
    for layer, name in (("conv1", "bias"), ("head", "kernel")):
        # the first step of Adam with Nesterov's momentum: 0.9 · 0.1 / (1 - 0.9²) + 1
        sign = np.sign(np.asarray(gradient[layer][name]))
        np.testing.assert_allclose(updates[layer][name], -0.1 * (0.09 / 0.19 + 1) * sign, rtol=1e-4)


def test_clipping_is_by_the_global_norm():
    config = OptimConfig(
        name="sgd",
        learning_rate=0.5,  # not 1: a step that is clipped after it was scaled would be the same
        momentum=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        clip_norm=1.0,
    )
    kernel, scale = one_step(config, gradients(3.0, 4.0))
    norm = math.sqrt(4 * 9 + 2 * 16)
    np.testing.assert_allclose([kernel, scale], [3 - 0.5 * 3 / norm, 3 - 0.5 * 4 / norm], rtol=1e-5)


def test_a_line_goes_down_to_zero():
    schedule = build_schedule(OptimConfig(learning_rate=1.0, warmup_steps=0, schedule="linear"), 10)
    assert [round(float(schedule(s)), 3) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_the_moving_average_is_judged():
    config = OptimConfig(name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, warmup_steps=0,
                         schedule="constant", clip_norm=None, ema=0.5)  # fmt: skip
    optimizer = build_optimizer(config, 100)
    params, state, expected = PARAMS, optimizer.init(PARAMS), 3.0
    assert evaluation_params(PARAMS, build_optimizer(OptimConfig(), 100).init(PARAMS)) is PARAMS
    for update in range(3):
        updates, state = optimizer.update(gradients(1.0), state, params)
        params = optax.apply_updates(params, updates)
        share = min(0.5, (1 + update) / (10 + update))
        expected = share * expected + (1 - share) * (3.0 - (update + 1))
        average = evaluation_params(params, state)["conv1"]["kernel"]
        np.testing.assert_allclose(average, expected, rtol=1e-6)


def test_accumulated_batches_make_one_update_of_their_mean():
    config = OptimConfig(name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, warmup_steps=0,
                         schedule="linear", clip_norm=None, accumulate=2)  # fmt: skip
    optimizer = build_optimizer(config, 10)
    state = optimizer.init(PARAMS)
    seen = []
    for kernel in (1.0, 3.0, 2.0, 2.0):
        updates, state = optimizer.update(gradients(kernel), state, PARAMS)
        seen.append(float(updates["conv1"]["kernel"][0, 0, 0, 0]))
    # rates are those of the second and of the fourth batch: 0.9 and 0.7
    np.testing.assert_allclose(seen, [0, -0.9 * 2, 0, -0.7 * 2], rtol=1e-6)


def test_momentum_without_nesterov():
    config = OptimConfig(name="sgd", learning_rate=0.1, weight_decay=0.0, warmup_steps=0, schedule="constant",
                         clip_norm=None, nesterov=False)  # fmt: skip
    assert one_step(config, gradients(2.0))[0] == pytest.approx(2.8)
