"""The residual networks: sizes as published, one answer per image, convolutions as other libraries pad them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models import build_model
from jaxtrain.models.blocks import conv
from jaxtrain.models.resnet import fold
from zarr_store.errors import InvalidInput


def build(channels=3, classes=5, **config):
    return build_model(
        ModelConfig(name="resnet", **{"width": 8, **config}),
        channels=channels,
        classes=classes,
        rngs=nnx.Rngs(params=0, dropout=1),
        data_shards=2,
    )


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["group", "batch", "local"])
@pytest.mark.parametrize("sizes", [{"depth": 18}, {"depth": 50}, {"depth": 18, "stem": "patch"}])
def test_one_answer_per_image(sizes, norm, train):
    x = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
    logits = jax.eval_shape(lambda x: build(norm=norm, dropout=0.1, **sizes)(x, train=train), x)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("depth", "convolutions", "millions"),
    # of torchvision's resnet18/34/50 with 1000 classes, whose norms and stem differ by a few thousand parameters
    [(18, 17, 11.69), (34, 33, 21.80), (50, 49, 25.56)],
)
def test_sizes_are_the_published_ones(depth, convolutions, millions):
    model = nnx.eval_shape(lambda: build(classes=1000, width=64, depth=depth, stem="large", norm="batch"))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in
             jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip
    kernels = [name for name, leaf in named.items() if leaf.ndim == 4 and "/skip/" not in name]
    assert len(kernels) == convolutions
    assert sum(leaf.size for leaf in named.values()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_stride_pads_both_sides():
    """Output 0 of a stride of 2 sees rows -1, 0, 1, of which -1 is padding; with `SAME` it would see 0, 1, 2."""
    layer = conv(1, 1, 3, stride=2, bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((3, 3, 1, 1))
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    assert float(layer(x)[0, 0, 0, 0]) == 0 + 1 + 4 + 5


def test_folding_keeps_each_pixel():
    x = image(2, 4, 6, 3)
    folded = np.asarray(fold(x))
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[0, 1, 2], np.asarray(x)[0, 2:4, 4:6].ravel())


def test_a_pixel_stem_sees_one_pixel():
    model = build(channels=20, stem="pixel", blocks=(1,), norm="batch")
    x = image(1, 5, 5, 20)
    changed = x.at[0, 2, 2].add(1.0)
    differs = np.asarray((model.enter(x) != model.enter(changed)).any(axis=-1))[0]
    assert differs[2, 2]
    assert differs.sum() == 1


def test_stages_halve_and_the_mean_joins_the_image():
    model = build(blocks=(1, 1, 1), norm="batch")
    x = image(1, 32, 32, 3)
    y = model.enter(x)
    assert y.shape == (1, 32, 32, 8)
    for name in ("stage0_block0", "stage1_block0", "stage2_block0"):
        y = model.body[name](y, train=False)
    assert y.shape == (1, 8, 8, 32)
    np.testing.assert_allclose(model.leave(y), model.head(y.mean(axis=(1, 2))), rtol=1e-6)
    np.testing.assert_allclose(model(x, train=False), model.leave(y), rtol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match=r"one of 10, 18, 34, 50, got 3; or name the blocks of each stage"):
        build(depth=3)
    shape = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
    with pytest.raises(InvalidInput, match=r"3 × 3 pixels cannot be halved"):
        jax.eval_shape(lambda x: build(depth=18)(x, train=False), shape)
    odd = jax.ShapeDtypeStruct((1, 9, 8, 3), jnp.float32)
    with pytest.raises(InvalidInput, match=r"9 × 8 pixels cannot be folded"):
        jax.eval_shape(lambda x: build(depth=18, stem="patch")(x, train=False), odd)
