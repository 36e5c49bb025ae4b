"""Memory of batches is used again once nobody has it, and not a moment before."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.data import memory
from jaxtrain.data.arrays import put_batch
from jaxtrain.data.memory import empty_array
from jaxtrain.parallel.mesh import batch_sharding, make_mesh

SHAPE = (2, 4, 256, 256)
SIZE = 2 * 4 * 256 * 256 * 2


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> memory._Shelf:
    fresh = memory._Shelf()
    monkeypatch.setattr(memory, "_shelf", fresh)
    return fresh


def held(shelf: memory._Shelf) -> int:
    return sum(len(kept) for kept in shelf._free.values())


def test_memory_comes_back_when_the_last_view_is_gone(shelf: memory._Shelf) -> None:
    made = empty_array(SHAPE, np.uint16)
    place = made.ctypes.data
    assert place % 64 == 0
    made[...] = 7
    part = made[1:, ::2].reshape(2, -1)
    del made
    assert held(shelf) == 0, "a view of it lives"
    other = empty_array(SHAPE, np.uint16)
    other[...] = 0
    assert (part == 7).all()
    del other
    del part
    again = empty_array(SHAPE, np.uint16)
    other = empty_array(SHAPE, np.uint16)
    assert place in (again.ctypes.data, other.ctypes.data)
    assert again.ctypes.data != other.ctypes.data
    again[...] = 1  # it may be written


def test_memory_of_an_array_on_the_device_is_not_given_to_another(shelf: memory._Shelf) -> None:
    made = empty_array(SHAPE, np.uint16)
    made[...] = 9
    there = put_batch({"image": made}, batch_sharding(make_mesh(MeshConfig(data=1))), 2)["image"]
    assert there.addressable_data(0).unsafe_buffer_pointer() == made.ctypes.data, "it was copied: nothing is tested"
    del made
    others = [empty_array(SHAPE, np.uint16) for _ in range(3)]
    for other in others:
        other[...] = 0
    assert (jax.device_get(there) == 9).all()
    assert held(shelf) == 0
    del there
    gc.collect()
    assert held(shelf) == 1


def test_no_more_is_kept_than_allowed(shelf: memory._Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_BYTES", 2 * SIZE + 1000)
    made = [empty_array(SHAPE, np.uint16) for _ in range(4)]
    del made
    assert held(shelf) == 2
    del shelf._free[SIZE + 64][:]
    small = empty_array((4, 4), np.float32)
    del small
    assert held(shelf) == 0, "small ones are not kept"
