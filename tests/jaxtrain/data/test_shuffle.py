"""The chunk-aware order: each window once an epoch, each chunk decoded once, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.config import DataConfig, MeshConfig
from jaxtrain.data.arrays import local_rows
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.classes import Classes
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
from jaxtrain.data.windows import Windows
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from zarr_store.errors import InvalidInput

from ..cube_factory import CLASSES, COLLECTION, make_cube
from .test_order import _Devices


@given(
    st.integers(0, 2**40),
    st.lists(st.integers(0, 30), min_size=1, max_size=300),
    st.integers(1, 24),
    st.integers(1, 5),
    st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_each_epoch_holds_each_window_once(seed: int, chunks: list[int], size: int, mixed: int, epoch: int) -> None:
    order = ChunkOrder(seed, np.unique(chunks, return_inverse=True)[1].astype(np.int64), size, mixed)
    count = len(chunks)
    numbers = order.indices(epoch * count, count)
    assert sorted(numbers.tolist()) == list(range(count))
    np.testing.assert_array_equal(order.indices(3, count + 5)[5:], order.indices(8, count))


def grid_of(side: int, per_chunk: int) -> np.ndarray:
    """(time, y, x) of windows of 1 pixel on side × side chunks of per_chunk × per_chunk windows."""
    y, x = np.divmod(np.arange((side * per_chunk) ** 2), side * per_chunk)
    return np.stack([np.zeros_like(y), y, x], axis=1).astype(np.int32)


def test_a_batch_has_many_chunks_and_a_lane_few_at_a_time() -> None:
    rows = grid_of(16, 4)
    order = ChunkOrder(0, chunk_numbers(rows, 1, (1, 4, 4)), 16, 4)
    chunks = order.chunks[order.indices(0, order.count)].reshape(-1, 16)
    different = [len(set(batch)) for batch in chunks.tolist()]
    assert min(different) >= 12
    assert np.mean(different) > 15
    # a chunk of 16 windows, mixed with three others, is needed for at most 64 batches (and a lane's last few)
    for chunk in range(256):
        steps = np.flatnonzero((chunks == chunk).any(axis=1))
        assert steps[-1] - steps[0] < 64
    assert (np.diff(chunks[:, 0]) == 0).mean() < 0.5  # mixed, not one chunk after the other
    other = ChunkOrder(1, order.chunks, 16, 4)
    assert (order.indices(0, 4096) != other.indices(0, 4096)).mean() > 0.98
    assert (order.indices(0, 4096) != order.indices(4096, 4096)).mean() > 0.98


@pytest.mark.parametrize("counts", [(1,), (2, 4), (8, 2, 1), (4, 8)])
def test_processes_that_come_and_go_see_each_sample_once(counts: tuple[int, ...]) -> None:
    """The batches of one run, read by 8, then 2, then 1 processes, are those of any other number."""
    rows, size = grid_of(3, 3), 8
    order = ChunkOrder(5, chunk_numbers(rows, 1, (1, 3, 3)), size)
    seen: list[int] = []
    steps = order.count  # eight epochs
    for step in range(steps):
        processes = counts[step * len(counts) // steps]
        batch = order.indices(step * size, size)
        for process in range(processes):
            seen += batch[local_rows(_Devices(process, processes, 8), size)].tolist()  # type: ignore[arg-type]
    assert seen == order.indices(0, order.count * size).tolist()
    assert np.bincount(seen).tolist() == [size] * order.count


def test_the_order_never_changes_between_releases() -> None:
    order = ChunkOrder(7, np.repeat(np.arange(5), 3), 4, 2)
    assert order.indices(0, 15).tolist() == [8, 2, 5, 12, 10, 1, 4, 13, 6, 0, 3, 14, 9, 7, 11]


def test_windows_are_told_apart_by_chunk() -> None:
    rows = np.array([(0, 0, 0), (0, 128, 128), (0, 0, 256), (1, 0, 0)], np.int32)
    assert chunk_numbers(rows, 128, (1, 256, 256)).tolist() == [0, 0, 1, 2]
    assert chunk_numbers(rows, 128, (8, 256, 256)).tolist() == [0, 0, 1, 0]
    assert chunk_numbers(rows, 512, (1, 256, 256)).tolist() == [0, 0, 0, 1]
    with pytest.raises(InvalidInput, match="at least one window"):
        ChunkOrder(0, np.zeros(0, np.int64), 4)


def decoded() -> int:
    """Chunks (and indices of shards) that this process has fetched and decoded so far, as tensorstore counts them."""
    found = ts.experimental_collect_matching_metrics("/tensorstore/cache/kvs_cache_read")
    return sum(int(value["value"]) for metric in found for value in metric["values"])


@pytest.mark.parametrize(("chunk_aware", "least", "most"), [(True, 1.0, 1.0), (False, 1.5, 16.0)])
def test_each_chunk_is_decoded_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_aware: bool, least: float, most: float
) -> None:
    """Counted by tensorstore, with a cache that holds a part of the cube: 1.00, and more with a plain shuffle."""
    import zarr_store.read

    context = ts.Context({"cache_pool": {"total_bytes_limit": 1_500_000}})
    monkeypatch.setattr(zarr_store.read, "_CONTEXT", context)
    cube = make_cube(tmp_path / "c.zarr", shape=(2, 512, 512), chunk=64, shard=512, masked=False)
    config = DataConfig.model_validate({"cube": cube.url, "classes": CLASSES, "patch": 16})
    reader = WindowReader.of(cube, config, Classes.of(config))
    y, x = (v.ravel() * 16 for v in np.mgrid[:32, :32])
    rows = np.concatenate([np.stack([np.full_like(y, t), y, x], axis=1) for t in (0, 1)]).astype(np.int32)
    windows = Windows(16, rows)
    chunked = ChunkOrder(0, chunk_numbers(rows, 16, cube.spec(COLLECTION).layout.chunk), 4, 2)
    order = chunked if chunk_aware else SampleOrder(0, len(rows))
    for name in ("reflectance", "status", "scl"):
        cube.tensorstore(COLLECTION, name)  # reads metadata
    before = decoded()
    with BatchStream(
        reader, windows, size=4, sharding=batch_sharding(make_mesh(MeshConfig())), order=order, last=len(rows) // 4
    ) as batches:
        read = np.concatenate([rows for _, rows, _ in batches])
    assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, rows.tolist()))
    arrays, shards, chunks = 2, 2, 2 * 64  # the status of chunks that are observed throughout is not read
    share = (decoded() - before - arrays * shards) / (arrays * chunks)
    assert least <= share <= most
