"""Shapes, starting values, norms against numpy, and what each network can see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.config import MeshConfig, ModelConfig
from jaxtrain.models import PER_PIXEL, PER_SAMPLE, build_model
from jaxtrain.models.blocks import GroupNorm, RunningNorm, conv, halve, make_norm, repeat_nearest
from jaxtrain.models.precision import run_model
from jaxtrain.models.temporal import series_of
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from jaxtrain.planner.collectives import result_bytes
from zarr_store.errors import InvalidInput, UnknownName


def build(name="unet", *, data_shards=1, **config):
    own = {"blocks": (1, 1)} if name == "resnet" and "blocks" not in config else {}
    return build_model(
        ModelConfig(name=name, **{"width": 8, "depth": 1, **own, **config}),
        channels=3,
        classes=5,
        rngs=nnx.Rngs(params=0, dropout=1),
        data_shards=data_shards,
    )


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["group", "batch", "local"])
@pytest.mark.parametrize("name", sorted(PER_PIXEL.keys() - {"multimodal"}))
def test_logits_have_the_size_of_the_image(name, norm, train):
    # a series comes with its dates, and with three channels of what was observed and when
    x = jax.ShapeDtypeStruct((2, 16, 24, 4, 6) if name == "temporal" else (2, 16, 24, 3), jnp.float32)
    logits = jax.eval_shape(lambda x: build(name, norm=norm, depth=2, data_shards=2)(x, train=train), x)
    assert logits.shape == (2, 16, 24, 3 if name == "autoencoder" else 5)
    assert logits.dtype == jnp.float32


def test_unknown_name_and_sizes_are_refused():
    with pytest.raises(UnknownName, match=r"unknown model 'unett' in model.name: did you mean 'unet'"):
        build("unett")
    with pytest.raises(InvalidInput, match="at least 1 band and 2 classes, got 3 and 1"):
        build_model(ModelConfig(), channels=3, classes=1, rngs=nnx.Rngs(0))
    with pytest.raises(InvalidInput, match=r"9 × 8 pixels cannot be halved.*data.patch or a smaller model.depth"):
        jax.eval_shape(lambda x: build(depth=2)(x, train=False), jax.ShapeDtypeStruct((1, 18, 16, 3), jnp.float32))


def test_kernels_start_as_he_says():
    kernel = conv(32, 64, 3, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.shape == (3, 3, 32, 64)
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.02)


def test_group_norm_equals_numpy_and_keeps_its_digits():
    # a mean of 1000 times the spread: mean(x²) - mean(x)² would be noise in float32
    x = np.asarray(image(2, 6, 6, 8)) + 1000
    norm = GroupNorm(8, groups=2)
    norm.scale[...] = jnp.arange(8, dtype=jnp.float32)
    norm.bias[...] = jnp.ones(8)
    groups = x.astype(np.float64).reshape(2, 36, 2, 4)
    mean, var = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * np.arange(8) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x), train=True), expected, atol=5e-3)


@pytest.mark.parametrize("kind", ["group", "batch", "local"])
def test_gradients_of_a_norm_are_those_of_its_formula(kind):
    """That of the moments is written out; this is what JAX derives of the plain formula in float64."""
    x, wanted = (np.asarray(image(4, 6, 6, 8, seed=seed)) * 3 + 5 for seed in (0, 1))

    def formula(x):
        parts = {"group": (4, 36, 2, 4), "batch": (1, 144, 8, 1), "local": (2, 72, 8, 1)}[kind]
        y = x.reshape(parts)
        y = (y - y.mean(axis=(1, 3), keepdims=True)) / jnp.sqrt(y.var(axis=(1, 3), keepdims=True) + 1e-5)
        return (y.reshape(x.shape) * wanted.astype(x.dtype)).sum()

    with jax.enable_x64(True):
        expected = jax.grad(formula)(jnp.asarray(x, jnp.float64))

    def of_layer(x):
        norm = make_norm(kind, 8, data_shards=2)
        return (norm(x, train=True).astype(jnp.float32) * wanted).sum()

    np.testing.assert_allclose(jax.grad(of_layer)(jnp.asarray(x)), expected, atol=2e-5)
    coarse = jax.grad(of_layer)(jnp.asarray(x, jnp.bfloat16))
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_allclose(coarse.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.parametrize("shards", [1, 4])
def test_batch_statistics_are_of_the_batch_or_of_its_parts(shards):
    x = np.asarray(image(8, 4, 4, 3)) * np.arange(1, 9).reshape(8, 1, 1, 1)
    norm = make_norm("batch" if shards == 1 else "local", 3, data_shards=4)
    assert isinstance(norm, RunningNorm)
    got = norm(jnp.asarray(x), train=True)
    parts = x.reshape(shards, -1, 3)
    mean, var = parts.mean(axis=1, keepdims=True), parts.var(axis=1, keepdims=True)
    np.testing.assert_allclose(got, ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean.mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var.mean(axis=(0, 1)), rtol=1e-5)
    remembered = np.asarray(norm.mean[...])
    evaluated = norm(jnp.asarray(x), train=False)
    np.testing.assert_allclose(evaluated, (x - remembered) / np.sqrt(np.asarray(norm.var[...]) + 1e-5), atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], remembered)  # evaluation remembers nothing


def test_local_statistics_need_equal_parts():
    with pytest.raises(InvalidInput, match="batch of 6 cannot be split into 4 equal parts"):
        make_norm("local", 3, data_shards=4)(image(6, 4, 4, 3), train=True)


@pytest.mark.parametrize("kind", ["batch", "local"])
def test_split_batches_have_the_statistics_that_the_name_says(kind):
    """`batch` on eight devices is `batch` on one; `local` asks no other device for anything."""
    mesh = make_mesh(MeshConfig(data=8))
    x = image(16, 4, 4, 3) * jnp.arange(1, 17, dtype=jnp.float32).reshape(16, 1, 1, 1)

    def normalised(x):
        return make_norm(kind, 3, data_shards=8)(x, train=True)

    split = jax.jit(normalised, in_shardings=batch_sharding(mesh), out_shardings=batch_sharding(mesh))
    np.testing.assert_allclose(split(x), normalised(x), atol=1e-5)
    travelled = result_bytes(split.lower(x).compile())
    assert travelled == ({} if kind == "local" else {"all-reduce": 2 * 3 * 4})


def test_no_group_is_a_single_channel():
    for channels in (4, 8, 12, 16, 64, 512):
        groups = make_norm("group", channels, data_shards=1).groups
        assert channels % groups == 0
        assert channels // groups >= 4
        assert groups <= 8


@pytest.mark.parametrize("name", sorted(PER_PIXEL.keys() - {"multimodal"}))
def test_level_of_an_image_reaches_the_logits(name):
    """Water and bare soil can both be flat: only their level tells them apart, so no norm may remove it."""
    model = build(name)
    dark = image(1, 8, 8, 3)
    images = jnp.concatenate([dark, 3 * dark])  # convolutions are linear, so norms alone would see the same image twice
    if name == "temporal":
        series = jnp.repeat(images[:, :, :, None], 4, axis=3)
        images = series_of(series, jnp.ones(series.shape[:4], bool), jnp.full((2, 4), 100, jnp.int32))
    first, second = jax.jit(lambda x: model(x, train=False))(images)
    assert float(jnp.abs(first - second).mean()) > 0.01


def test_halving_and_repeating_are_what_they_say():
    x = image(2, 4, 6, 3)
    blocks = np.asarray(x).reshape(2, 2, 2, 3, 2, 3)
    np.testing.assert_array_equal(halve(x), blocks.max(axis=(2, 4)))
    np.testing.assert_array_equal(repeat_nearest(x), np.asarray(x).repeat(2, axis=1).repeat(2, axis=2))


def test_dropout_only_drops_in_training():
    model, x = build("cnn", dropout=0.5), image(1, 8, 8, 3)
    np.testing.assert_array_equal(model(x, train=False), model(x, train=False))
    assert (np.asarray(model(x, train=True)) != np.asarray(model(x, train=True))).any()


def test_field_of_view():
    """Gradient of one output pixel: a block of the CNN sees 2 pixels around, a U-Net of one halving sees further."""
    reach = {}
    for name in ("cnn", "unet"):
        model = build(name, norm="batch")  # statistics of the group norm would join all pixels
        seen = jax.jit(jax.grad(lambda x, model=model: model(x, train=False)[0, 8, 8].sum()))(image(1, 16, 16, 3))
        rows = np.flatnonzero(np.abs(np.asarray(seen)).sum(axis=(0, 2, 3)))
        assert 8 in rows
        reach[name] = (8 - rows.min(), rows.max() - 8)
    assert reach["cnn"] == (2, 2)
    assert min(reach["unet"]) > 2


@pytest.mark.parametrize("name", sorted(PER_SAMPLE.keys() - {"multimodal"}))
@pytest.mark.parametrize("train", [False, True])
def test_one_answer_per_image(name, train):
    own = {"blocks": (1, 1)} if name == "resnet" else {"depth": 2}
    x = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32)

    def logits(x):
        config = ModelConfig(name=name, width=8, dropout=0.2, **own)
        rngs = nnx.Rngs(params=0, dropout=1)
        return build_model(config, channels=3, classes=5, rngs=rngs, per_image=True)(x, train=train)

    assert jax.eval_shape(logits, x).shape == (2, 5)


def test_names_are_checked_against_what_is_asked():
    with pytest.raises(InvalidInput, match=r"'unet' predicts for each pixel, the data need one prediction per image"):
        build_model(ModelConfig(), channels=3, classes=5, rngs=nnx.Rngs(0), per_image=True)
    with pytest.raises(InvalidInput, match=r"'resnet' predicts for each image.*autoencoder, cnn, mlp, temporal, unet"):
        build_model(ModelConfig(name="resnet"), channels=3, classes=5, rngs=nnx.Rngs(0), per_image=False)


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_bfloat16_is_near_float32_and_remat_is_equal(name):
    """Parameters stay float32; in bfloat16 answers keep two digits; computing activations again changes no gradient."""
    model = build(name, norm="batch")
    x = image(2, 16, 16, 3)
    config = ModelConfig(precision="bfloat16")
    exact = np.asarray(run_model(model, x, train=False, config=ModelConfig()))
    rough = run_model(build(name, norm="batch"), x, train=False, config=config)
    assert rough.dtype == jnp.float32
    assert (np.asarray(rough) != exact).any()
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())

    def slope(remat):
        graph, params, *rest = nnx.split(build(name, norm="batch", remat=remat), nnx.Param, ...)

        def loss(params):
            return (nnx.merge(graph, params, *rest, copy=True)(x, train=True) ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(jax.tree.leaves(slope(False)), jax.tree.leaves(slope(True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
