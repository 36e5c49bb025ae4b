"""The order of samples: a permutation an epoch, the same for ever, each sample once for any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.arrays import local_rows
from jaxtrain.data.order import SampleOrder, _permute_block
from zarr_store.errors import InvalidInput


@given(st.integers(-5, 2**40), st.integers(1, 400), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(seed: int, count: int, epoch: int) -> None:
    numbers = SampleOrder(seed, count).indices(epoch * count, count)
    assert sorted(numbers.tolist()) == list(range(count))


@given(st.integers(1, 90), st.integers(0, 300), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_part_can_be_asked_for_alone(count: int, first: int, size: int) -> None:
    order = SampleOrder(3, count)
    np.testing.assert_array_equal(order.indices(first, size), order.indices(0, first + size)[first:])


def test_a_block_of_positions_is_worked_out_once_for_all_its_batches() -> None:
    order, size = SampleOrder(11, 5000), 64
    _permute_block.cache_clear()
    batches = [order.indices(step * size, size) for step in range(200)]  # two epochs and a half
    # 12,800 samples: 4096 + 904 of each whole epoch, and 2800 of the third
    assert _permute_block.cache_info().misses == 5
    np.testing.assert_array_equal(np.concatenate(batches), order.indices(0, 200 * size))
    assert sorted(np.concatenate(batches)[:5000].tolist()) == list(range(5000))
    batches[0][:] = 0
    assert order.indices(0, size).any(), "what a caller does to its numbers is its own affair"


def test_epochs_and_seeds_differ_and_neighbours_are_torn_apart() -> None:
    order = SampleOrder(0, 1000)
    first, second = order.indices(0, 1000), order.indices(1000, 1000)
    assert (first != second).mean() > 0.98
    assert (first != SampleOrder(1, 1000).indices(0, 1000)).mean() > 0.98
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.12


def test_order_is_spread_evenly() -> None:
    """Over many epochs every window comes first about equally often."""
    firsts = [int(SampleOrder(7, 10).indices(10 * epoch, 1)[0]) for epoch in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_order_never_changes_between_releases() -> None:
    """A run that was begun with an earlier release must see the same samples: these numbers are for ever."""
    assert SampleOrder(0, 10).indices(0, 10).tolist() == [0, 7, 4, 2, 5, 9, 8, 3, 1, 6]
    assert SampleOrder(42, 100_000).indices(250_000, 4).tolist() == [38859, 25463, 90334, 99628]


class _Devices:
    """The part of a sharding that `local_rows` asks for, of process `process` of `processes`."""

    def __init__(self, process: int, processes: int, devices: int) -> None:
        self.mine = range(process * devices // processes, (process + 1) * devices // processes)
        self.devices = devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, Any]:
        share = shape[0] // self.devices
        return {d: (slice(d * share, (d + 1) * share),) for d in self.mine}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_see_each_sample_once(processes: int) -> None:
    count, size, devices = 37, 8, 4
    order = SampleOrder(5, count)
    seen: list[int] = []
    for step in range(count):  # 8 epochs, so that batches cross the borders of epochs
        batch = order.indices(step * size, size)
        parts = [batch[local_rows(_Devices(p, processes, devices), size)] for p in range(processes)]  # type: ignore[arg-type]
        assert [len(part) for part in parts] == [size // processes] * processes
        seen += np.concatenate(parts).tolist()
    assert seen == order.indices(0, count * size).tolist()
    assert np.bincount(seen).tolist() == [size] * count


def test_rows_with_a_gap_are_refused() -> None:
    class Gap:
        def addressable_devices_indices_map(self, _: tuple[int, ...]) -> dict[int, Any]:
            return {0: (slice(0, 2),), 1: (slice(4, 6),)}

    with pytest.raises(InvalidInput, match="expected one run of rows"):
        local_rows(Gap(), 8)  # type: ignore[arg-type]


def test_no_window_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="at least one window"):
        SampleOrder(0, 0)
