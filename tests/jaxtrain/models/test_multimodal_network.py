"""The network of several modalities: shapes, what is absent, its units, and hidden modalities."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.learn.modalities import hide_modalities
from jaxtrain.models import build_model
from jaxtrain.models.modality import Modality, views_of
from jaxtrain.models.units import is_owned
from zarr_store.errors import InvalidInput

MODALITIES = (Modality("s2", ("red", "nir")), Modality("s2_60", ("b1",), 6), Modality("s1", ("vv", "vh"), 2, 3))
SIDE, BATCH = 24, 2
KINDS = list(itertools.product(("late", "middle", "early"), (False, True)))


def build(fusion: str, per_image: bool, known: tuple[Modality, ...] = MODALITIES, **settings: object) -> Any:
    config = ModelConfig.model_validate({"name": "multimodal", "width": 4, "depth": 2, "fusion": fusion, **settings})
    rngs = nnx.Rngs(params=0, dropout=1)
    return build_model(config, channels=1, classes=3, rngs=rngs, per_image=per_image, modalities=known)


def array(one: Modality, seen: float = 1.0) -> jax.Array:
    side = SIDE // one.ratio
    dates = (one.dates,) if one.dates else ()
    x = jax.random.normal(jax.random.key(one.ratio), (BATCH, side, side, *dates, one.inputs), jnp.float32)
    at = -3 if one.dates else -1
    x = x.at[..., at].set(seen)
    return x if seen else x.at[..., :at].set(0)


@pytest.mark.parametrize(("fusion", "per_image"), KINDS)
def test_units_are_the_network_and_own_each_parameter_once(fusion: str, per_image: bool) -> None:
    model = build(fusion, per_image)
    x = {one.name: array(one) for one in MODALITIES}

    def by_units(x: dict[str, jax.Array]) -> jax.Array:
        carry: tuple[jax.Array, ...] = ()
        for name, units in model.branches().items():
            own: tuple[jax.Array, ...] = (x[name],)
            for unit in units:
                own = unit.run(own, False)
            carry += own
        for unit in model.joined():
            carry = unit.run(carry, False)
        return carry[0]

    shape = (BATCH, 3) if per_image else (BATCH, SIDE, SIDE, 3)
    assert jax.eval_shape(lambda x: model(x, train=False), x).shape == shape
    assert jax.eval_shape(lambda x: model(x, train=True), x).shape == shape
    assert jax.eval_shape(by_units, x).shape == shape
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    every = [unit for units in model.branches().values() for unit in units] + model.joined()
    assert [sum(is_owned(name, unit) for unit in every) for name in names] == [1] * len(names)
    if fusion == "middle" and not per_image:
        # one program for both, as the walk over the units computes the same numbers
        whole, walked = jax.jit(lambda x: (model(x, train=False), by_units(x)))(x)
        np.testing.assert_allclose(whole, walked, atol=1e-6)


def test_the_merge_is_the_mean_over_what_is_present() -> None:
    """Without a modality its numbers do not matter; with one left, that one alone decides; without any, the biases."""
    two = (Modality("a", ("x",)), Modality("b", ("y",)))
    model = build("late", False, two, width=4, depth=1)
    run = jax.jit(lambda x: model(x, train=False))
    a, b = array(two[0]), array(two[1]) + 1
    alone = run({"a": a, "b": jnp.zeros_like(b)})
    hidden = run({"a": a, "b": b.at[..., -1].set(0)})
    np.testing.assert_allclose(alone, hidden, atol=1e-5)
    assert float(jnp.abs(run({"a": a, "b": b}) - alone).max()) > 1e-4
    nothing = np.asarray(run({"a": jnp.zeros_like(a), "b": jnp.zeros_like(b)}))
    np.testing.assert_allclose(nothing[0], nothing[1], atol=1e-6)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("fusion", ["late", "middle", "early"])
def test_a_training_step_asks_all_modalities_together_and_each_alone(fusion: str) -> None:
    """Each view is what the network answers where the others are missing."""
    two = (Modality("a", ("x",)), Modality("b", ("y",), 2))
    model, silent = build(fusion, False, two, depth=1, alone=0.5), build(fusion, False, two, depth=1)
    x = {one.name: array(one) for one in two}

    def without(name: str) -> dict[str, jax.Array]:
        return {other: jnp.zeros_like(own) if other == name else own for other, own in x.items()}

    @jax.jit
    def answers(x: dict[str, jax.Array]) -> tuple[Any, ...]:
        asked = [model(one, train=False) for one in (x, without("b"), without("a"))]
        return views_of(model(x, train=True), BATCH), asked, silent(x, train=True)

    views, asked, one = answers(x)
    assert [view.shape for view in views] == [(BATCH, SIDE, SIDE, 3)] * 3
    for view, answer in zip(views, asked, strict=True):
        np.testing.assert_allclose(view, answer, atol=1e-5)
    assert float(jnp.abs(views[1] - views[2]).max()) > 1e-4
    np.testing.assert_allclose(one, views[0], atol=1e-5)


def test_a_modality_of_each_sample_always_stays() -> None:
    observed = {"a": jnp.ones((64, 4, 4), jnp.uint8), "b": jnp.ones((64, 2, 2, 3), jnp.uint8).at[:16].set(0)}
    hidden = hide_modalities(observed, jax.random.key(0), 0.9)
    there = np.stack([np.asarray(seen).reshape(64, -1).any(axis=1) for seen in hidden.values()])
    assert there.any(axis=0).all()
    assert there[0, :16].all()  # it was the only one
    assert 0 < there[0, 16:].mean() < 1
    assert 0 < there[1, 16:].mean() < 1
    assert hide_modalities(observed, jax.random.key(0), 0.0) == observed


def test_each_modality_may_have_its_own_chance_to_be_hidden() -> None:
    observed = {name: jnp.ones((512, 2, 2), jnp.uint8) for name in ("a", "b")}
    hidden = hide_modalities(observed, jax.random.key(0), {"a": 0.0, "b": 0.5})
    there = {name: float(np.asarray(seen).any(axis=(1, 2)).mean()) for name, seen in hidden.items()}
    assert there["a"] == 1
    assert 0.4 < there["b"] < 0.7
    same = [hide_modalities(observed, jax.random.key(1), chances) for chances in (0.3, {"a": 0.3, "b": 0.3})]
    assert all((same[0][name] == same[1][name]).all() for name in observed)


def test_a_branch_has_its_own_width_and_a_level_without_a_branch_is_refused() -> None:
    shapes = jax.eval_shape(
        lambda: nnx.state(build("middle", False, MODALITIES, modalities={"s1": {"width": 12}}), nnx.Param)
    )
    assert shapes["encoder_s1"]["down"]["level0"]["conv2"]["kernel"].get_value().shape[-1] == 12
    with pytest.raises(InvalidInput, match="no branch reaches level 2"):
        build("middle", False, MODALITIES[:1], modalities={"s2": {"depth": 1}})
