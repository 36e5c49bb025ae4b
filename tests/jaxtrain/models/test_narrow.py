"""Convolutions with few filters: pairs of columns give what the plain convolution gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxtrain.config import MeshConfig
from jaxtrain.models.blocks import conv
from jaxtrain.models.narrow import FEW, convolve_pairs, is_narrow
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.spatial import over_space

PLAIN: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
AROUND = ((1, 1), (1, 1))


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y: jax.Array = lax.conv_general_dilated(x, kernel, (1, 1), AROUND, **PLAIN)
    return y


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 16), (16, 16), (FEW + 8, 5), (1, 1)])
def test_value_and_gradients_are_those_of_the_plain_convolution(inputs: int, outputs: int) -> None:
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 7, 10, inputs))
    kernel = jax.random.normal(keys[1], (3, 3, inputs, outputs))
    weight = jax.random.normal(keys[2], (2, 7, 10, outputs))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda x, k, f=f: (f(x, k) * weight).sum(), argnums=(0, 1)))(x, kernel)
        for f in (convolve_pairs, plain)
    )
    np.testing.assert_allclose(convolve_pairs(x, kernel), plain(x, kernel), atol=2e-5 * inputs**0.5)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(
    ("change", "narrow"),
    [
        ({}, True),
        ({"kernel": (3, 3, 8, FEW + 1)}, False),
        ({"kernel": (1, 1, 8, 8)}, False),
        ({"image": (2, 6, 7, 8)}, False),
        ({"strides": (2, 2)}, False),
        ({"padding": "SAME"}, False),
        ({"padding": ((0, 1), (1, 1))}, False),
        ({"rhs_dilation": (2, 2)}, False),
        ({"feature_group_count": 2}, False),
        ({"precision": lax.Precision.HIGHEST}, False),
        ({"preferred_element_type": jnp.float32}, False),
    ],
)
def test_only_plain_convolutions_of_few_filters_are_taken_in_pairs(change: dict[str, Any], narrow: bool) -> None:
    settings = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None, **PLAIN}
    given = {"image": (2, 6, 8, 8), "kernel": (3, 3, 8, 8), "strides": (1, 1), "padding": AROUND, **settings, **change}
    x, kernel = jnp.zeros(given.pop("image")), jnp.zeros(given.pop("kernel"))
    assert is_narrow(x, kernel, given.pop("strides"), given.pop("padding"), **given) is narrow


@pytest.mark.parametrize(
    ("mesh", "pairs"),
    [({}, True), ({"data": 2}, True), ({"model": 2}, False), ({"space": 2}, False)],
)
def test_layers_take_pairs_where_filters_and_image_lie_whole(mesh: dict[str, int], pairs: bool) -> None:
    layer = conv(4, 16, 3, rngs=nnx.Rngs(0))
    with over_space(make_mesh(MeshConfig(**mesh))):
        program = str(jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((2, 8, 8, 4))))
    assert ("window_strides=(1, 2)" in program) is pairs
