"""Image and label turn together, samples turn each for itself, and all eight symmetries occur."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.data.augment import augment
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
