"""The loss against a loop over pixels, at its edges, and split over devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.learn.losses import cross_entropy, cross_entropy_terms
from jaxtrain.parallel.mesh import batch_sharding, make_mesh


def brute_force(logits, label, weights, smoothing):
    classes = logits.shape[-1]
    total = weight_sum = 0.0
    for place in np.ndindex(label.shape):
        truth = int(label[place])
        if truth >= classes:
            continue
        scores = logits[place].astype(np.float64)
        log_p = scores - math.log(sum(math.exp(s) for s in scores))
        target = [(1 - smoothing) * (k == truth) + smoothing / classes for k in range(classes)]
        total += weights[truth] * -sum(t * p for t, p in zip(target, log_p, strict=True))
        weight_sum += weights[truth]
    return total / weight_sum


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (8, 3, 5, 4)).astype(np.float32)
    label = rng.choice(np.array([0, 1, 2, 3, 4, 200, 255], np.uint8), (8, 3, 5))
    return logits, label


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0, 0.0]])
def test_equals_a_loop_over_pixels(pixels, smoothing, weights):
    logits, label = pixels
    expected = brute_force(logits, label, weights or [1.0] * 4, smoothing)
    class_weights = None if weights is None else np.asarray(weights, np.float32)
    got = cross_entropy(logits, jnp.asarray(label), class_weights=class_weights, label_smoothing=smoothing)
    assert got.dtype == jnp.float32
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_unlabelled_pixels_have_no_gradient(pixels):
    logits, label = pixels
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray(label)))(jnp.asarray(logits))
    assert not np.asarray(gradient)[label > 3].any()
    assert np.asarray(gradient)[label <= 3].any(axis=-1).all()


def test_no_labelled_pixel_is_zero_loss_and_zero_gradient(pixels):
    logits = jnp.asarray(pixels[0])
    label = jnp.full(pixels[1].shape, 255, jnp.uint8)
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, label))(logits)
    assert float(loss) == 0
    assert not np.asarray(gradient).any()


def test_huge_scores_stay_finite():
    logits = jnp.asarray([[[[1e30, -1e30]]]], jnp.float32)
    for truth in (0, 255):
        loss, gradient = jax.value_and_grad(lambda x, t=truth: cross_entropy(x, jnp.full((1, 1, 1), t)))(logits)
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_mean_is_over_the_global_batch_however_labels_are_spread(pixels):
    logits, label = pixels
    label = label.copy()
    label[1:] = np.where(np.arange(5) < 4, 255, label[1:])  # one device has most of the labels
    mesh = make_mesh(MeshConfig(data=8))
    split = jax.device_put((logits, label), batch_sharding(mesh))
    one = jax.value_and_grad(cross_entropy)(jnp.asarray(logits), jnp.asarray(label))
    many = jax.jit(jax.value_and_grad(cross_entropy))(*split)
    assert len(many[1].sharding.device_set) == 8
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(many[1], one[1], atol=1e-7)


def test_terms_add_over_batches(pixels):
    logits, label = jnp.asarray(pixels[0]), jnp.asarray(pixels[1])
    weights = np.asarray([1, 2, 3, 4], np.float32)
    whole = cross_entropy_terms(logits, label, class_weights=weights)
    parts = [cross_entropy_terms(logits[i : i + 2], label[i : i + 2], class_weights=weights) for i in range(0, 8, 2)]
    assert int(whole.labelled) == sum(int(p.labelled) for p in parts) == int((pixels[1] < 4).sum())
    np.testing.assert_allclose(whole.loss, sum(float(p.loss) for p in parts), rtol=1e-6)
    np.testing.assert_allclose(whole.weight, sum(float(p.weight) for p in parts), rtol=1e-6)
