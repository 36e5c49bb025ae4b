"""Image and label turn together, samples turn each for itself, and all eight symmetries occur."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.data.augment import _zoom, augment, disturb, mix, turns
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from zarr_store.errors import InvalidInput

N = 4


def symmetries(window: np.ndarray) -> list[bytes]:
    return [np.rot90(m, k).tobytes() for m in (window, window.T) for k in range(4)]


@pytest.fixture
def windows():
    label = np.arange(64 * N * N, dtype=np.uint16).reshape(64, N, N)
    return jnp.asarray(np.stack([label, label + 1], axis=-1)), jnp.asarray(label)


def test_each_sample_is_one_of_its_eight_symmetries_and_all_occur(windows):
    image, label = augment(windows, key=jax.random.key(0))
    assert label.dtype == jnp.uint16
    np.testing.assert_array_equal(image[..., 0], label)  # turned together
    np.testing.assert_array_equal(image[..., 1], np.asarray(label) + 1)
    seen = [
        symmetries(np.asarray(before)).index(np.asarray(after).tobytes())
        for before, after in zip(windows[1], label, strict=True)
    ]
    assert set(seen) == set(range(8))


def test_the_key_decides(windows):
    first, again, other = (augment(windows, key=jax.random.key(k))[1] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_every_mesh_turns_the_same_samples_the_same_way(windows):
    split = jax.device_put(windows, batch_sharding(make_mesh(MeshConfig(data=8))))
    turn = jax.jit(lambda arrays, key: augment(arrays, key=key))
    many = turn(split, jax.random.key(3))
    assert len(many[0].sharding.device_set) == 8
    for one, shared in zip(augment(windows, key=jax.random.key(3)), many, strict=True):
        np.testing.assert_array_equal(one, shared)


def test_windows_that_are_not_square_are_refused():
    with pytest.raises(InvalidInput, match=r"square windows.*data.augment = false"):
        augment((jnp.zeros((2, 4, 6)),), key=jax.random.key(0))
    with pytest.raises(InvalidInput, match="square windows of one size"):
        augment((jnp.zeros((2, 4, 4)), jnp.zeros((2, 8, 8))), key=jax.random.key(0))


def test_turns_come_back():
    x = jnp.arange(2 * 4 * 4 * 1, dtype=jnp.float32).reshape(2, 4, 4, 1)
    seen = set()
    for there, back in turns():
        seen.add(np.asarray(there(x)).tobytes())
        np.testing.assert_array_equal(back(there(x)), x)
    assert len(seen) == 8


def test_a_label_of_an_image_does_not_turn():
    image = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    label = jnp.arange(8)
    turned, kept = augment((image, label), key=jax.random.key(1))
    np.testing.assert_array_equal(kept, label)
    assert (np.asarray(turned) != np.asarray(image)).any()


def test_zoom_moves_image_and_label_alike_and_invents_nothing():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 200, (32, 16, 16)).astype(np.uint8)
    image = (label.astype(np.uint16) * 300)[..., None]
    big, seen = augment((jnp.asarray(image), jnp.asarray(label)), key=jax.random.key(3), zoom=0.5)
    assert big.dtype == jnp.uint16
    np.testing.assert_array_equal(np.asarray(big)[..., 0], np.asarray(seen).astype(np.uint16) * 300)
    plain, _ = augment((jnp.asarray(image), jnp.asarray(label)), key=jax.random.key(3))
    assert (np.asarray(big) != np.asarray(plain)).any()
    # about the middle: the four inner pixels stay inner pixels under any zoom of a half
    inner = np.asarray(plain)[:, 6:10, 6:10, 0]
    assert all(np.isin(np.asarray(big)[i, 7:9, 7:9, 0], inner[i]).all() for i in range(32))


def test_light_and_hidden_bands_are_drawn_for_each_sample():
    x = jnp.ones((4000, 1, 1, 2))
    lit = np.asarray(disturb(x, key=jax.random.key(0), jitter=0.1))
    assert lit.std() == pytest.approx(np.sqrt(2) * 0.1, rel=0.05)
    hidden = np.asarray(disturb(x, key=jax.random.key(0), band_dropout=0.25))
    assert set(np.unique(hidden).tolist()) == {0.0, 1.0}
    assert hidden.mean() == pytest.approx(0.75, abs=0.02)


def test_mixup_blends_with_the_next_and_tells_its_share():
    x = jnp.arange(4, dtype=jnp.float32).reshape(4, 1, 1, 1)
    blended, label, mixed = mix(x, jnp.arange(4), key=jax.random.key(0), kind="mixup", alpha=1.0)
    assert mixed is not None
    assert 0 < float(mixed.share) <= 0.5
    np.testing.assert_array_equal(label, np.arange(4))
    np.testing.assert_array_equal(mixed.label, [3, 0, 1, 2])
    share = float(mixed.share)
    expected = (1 - share) * np.arange(4) + share * np.array([3, 0, 1, 2])
    np.testing.assert_allclose(np.asarray(blended).ravel(), expected, rtol=1e-6)


def test_cutmix_pastes_a_box_with_its_labels_or_its_share():
    x = jnp.broadcast_to(jnp.arange(4, dtype=jnp.float32).reshape(4, 1, 1, 1), (4, 32, 32, 1))
    for seed in range(5):
        pasted, _, mixed = mix(x, jnp.arange(4), key=jax.random.key(seed), kind="cutmix", alpha=1.0)
        assert mixed is not None
        assert float((np.asarray(pasted)[1] == 0).mean()) == pytest.approx(float(mixed.share))
    # drawn from a narrow Beta about a half, the share of the other is nearly that, within a row and a column of pixels
    pasted, _, mixed = mix(x, jnp.arange(4), key=jax.random.key(0), kind="cutmix", alpha=1e4)
    assert mixed is not None
    assert float(mixed.share) == pytest.approx(0.5, abs=0.04)
    truth = x[..., 0].astype(jnp.uint8)
    pasted, label, mixed = mix(x, truth, key=jax.random.key(0), kind="cutmix", alpha=1.0)
    assert mixed is None
    np.testing.assert_array_equal(np.asarray(pasted)[..., 0], label)
    assert (np.asarray(label) != np.asarray(truth)).any()


def test_zoom_does_not_spread_a_pixel_without_a_value() -> None:
    """Values are nan where nothing is known, and a product with nan would take their row and column along."""
    value = np.arange(2 * 16 * 16, dtype=np.float32).reshape(2, 16, 16)
    value[:, 5, 9] = np.nan
    image = np.nan_to_num(value, nan=-1.0).astype(np.float32)[..., None]
    zoomed, label = augment((jnp.asarray(image), jnp.asarray(value)), key=jax.random.key(3), zoom=0.5)
    hidden = np.isnan(np.asarray(label))
    np.testing.assert_array_equal(hidden, np.asarray(zoomed)[..., 0] == -1)
    np.testing.assert_array_equal(np.asarray(label)[~hidden], np.asarray(zoomed)[..., 0][~hidden])
    assert 0 < hidden.sum() <= 2 * 9


@pytest.mark.parametrize("scale", [0.55, 0.8, 1.3])
def test_a_zoom_takes_the_nearest_pixel_and_mirrors_at_every_edge(scale: float) -> None:
    side = 7
    image = np.random.default_rng(0).integers(0, 9999, (1, side, side, 2)).astype(np.uint16)
    centre = (side - 1) / 2
    at = np.round((np.arange(side) - centre) / scale + centre).astype(int)
    assert scale > 1 or (at.min() < 0 and at.max() >= side), "it looks beyond both edges"
    mirrored = np.pad(image[0], ((side, side), (side, side), (0, 0)), mode="symmetric")
    expected = mirrored[np.ix_(at + side, at + side)]
    np.testing.assert_array_equal(_zoom(jnp.asarray(image), jnp.float32([scale]))[0], expected)
