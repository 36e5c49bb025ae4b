"""Windows of shards are put into batches: each is predicted once, and batches hold the same whoever makes a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import predict
from jaxtrain.inference.lattice import Lattice
from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.scene import _part_of, help_making
from jaxtrain.inference.window_order import Rows, WindowOrder
from jaxtrain.learn.step import PredictStep
from zarr_store.ledger import ShardIndex

from ..cube_factory import shared_cube, shared_run
from .test_shards import small_shards, tree

__all__ = ["small_shards"]

SIZE = 5


def windows_of(side: tuple[int, int], shard: int, dates: Sequence[int], maps: int = 1) -> dict[ShardIndex, Rows]:
    """Windows of 16 pixels of every shard of some maps, each of the same number of dates."""
    lattice = Lattice(side, (16, 16), shard, SIZE, overlap=4)
    found = {}
    for index, region in lattice.shards(maps).items():
        places = [(y, x) for y, x, _ in lattice.windows(region, None)]
        rows = [(index[0] * len(dates) + date, *place) for place in places for date in dates]
        found[index] = np.array(rows, np.int32).reshape(-1, 3)
    return found


def deal(order: WindowOrder, shards: Iterable[ShardIndex]) -> tuple[dict[ShardIndex, Rows], list[Rows]]:
    """Give shards their windows for answers; returns them, and the windows of each batch that was predicted."""
    chosen = list(shards)
    numbers = order.batches(chosen)
    coming = iter(order.rows_of(numbers).reshape(-1, order.size, 3))
    made: list[Rows] = []

    def answers() -> Rows:
        made.append(next(coming))
        return made[-1]

    of = order.dealt(chosen, numbers, answers)
    given = {index: np.array(list(of(index)), np.int32).reshape(-1, 3) for index in chosen}
    assert len(made) == len(numbers)
    assert not list(coming)
    return given, made


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("side", "shard", "dates", "maps"), [
    ((100, 90), 32, (0,), 1), ((100, 90), 32, (0, 1, 2), 1), ((64, 200), 8, (0,), 1), ((50, 70), 24, (0, 1), 3),
    ((40, 40), 64, (0,), 2),
])  # fmt: skip
def test_each_shard_gets_its_windows_whichever_are_missing(
    side: tuple[int, int], shard: int, dates: tuple[int, ...], maps: int, shared: bool
) -> None:
    windows = windows_of(side, shard, dates, maps)
    windows[next(iter(windows))] = windows[next(iter(windows))][:0]  # nothing was seen there
    order = WindowOrder.of(windows, SIZE, shared=shared)
    whole, batches = deal(order, windows)
    rng = np.random.default_rng(0)
    parts = [[index for index in windows if rng.random() < share] for share in (0.2, 0.5, 0.8)]
    for chosen in [list(windows), *parts, *([index] for index in windows)]:
        given, made = deal(order, chosen)
        for index in chosen:
            np.testing.assert_array_equal(given[index], windows[index])
        known = {batch.tobytes() for batch in batches}
        assert {batch.tobytes() for batch in made} <= known, "a batch holds what it holds in a whole map"
    for index, rows in whole.items():
        np.testing.assert_array_equal(rows, windows[index])


def test_a_window_across_the_edge_of_two_shards_of_a_row_is_predicted_once() -> None:
    windows = windows_of((32, 200), 40, (0, 1))
    order = WindowOrder.of(windows, SIZE, shared=True)
    distinct = len(np.unique(np.concatenate(list(windows.values())), axis=0))
    assert sum(map(len, windows.values())) > distinct == order.count(windows)
    assert len(order.batches(windows)) == -(-distinct // SIZE)
    alone = len(WindowOrder.of(windows, SIZE, shared=False).batches(windows))
    assert alone == -(-sum(map(len, windows.values())) // SIZE) > len(order.batches(windows))


def test_a_map_of_dates_has_batches_of_its_own() -> None:
    """So a date that is added later changes no batch of another."""
    two, three = (WindowOrder.of(windows_of((50, 70), 24, (0,), maps), SIZE, shared=True) for maps in (2, 3))
    np.testing.assert_array_equal(three.rows[: len(two.rows)], two.rows)
    assert all(len(set(batch[:, 0].tolist())) == 1 for batch in three.rows.reshape(-1, SIZE, 3))


def test_many_answers_are_not_held() -> None:
    few, many = (MapLayers(classes) for classes in (3, 60))
    lattice = Lattice.blended((10_980, 10_980), 128, 32, 16, few, votes=False)
    assert lattice.shares_edges(few.channels, dates=1)
    assert not lattice.shares_edges(few.channels, dates=50)
    assert not lattice.shares_edges(many.channels, dates=1)


@pytest.mark.usefixtures("small_shards")
def test_the_bytes_of_a_map_do_not_depend_on_the_neighbours_in_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a network whose answers depend on the other windows of the batch, and differ more than by rounding."""
    real, means = PredictStep.of_batch, []

    def of_batch(self: PredictStep, state: Any, batch: Any) -> Any:
        mean = jnp.mean(batch["image"].astype(jnp.float32)) % 1
        means.append(float(mean))
        return real(self, state, batch) * mean

    monkeypatch.setattr(PredictStep, "of_batch", of_batch)
    predict(shared_run(), shared_cube(), tmp_path / "one.zarr", time="2023-08-11")
    assert len(set(means)) > 3, "the answers differ from batch to batch"
    alone = len(means)

    def fill(folder: Path) -> None:
        for number in range(3):
            help_making(folder, (number, 3))

    predict(shared_run(), shared_cube(), tmp_path / "three.zarr", time="2023-08-11", elsewhere=fill)
    assert tree(tmp_path / "three.zarr") == tree(tmp_path / "one.zarr")
    assert len(means) - alone > alone, "some batches are predicted by two processes"


@pytest.mark.parametrize(
    ("shape", "dates", "count"), [((1, 3), 10, 2), ((1, 3), 12, 4), ((2, 4), 8, 4), ((3, 3), 10, 2)]
)
def test_the_shards_of_each_date_are_dealt_to_all_processes(shape: tuple[int, int], dates: int, count: int) -> None:
    """Often the shards of one date are all that is missing."""
    keys = {(t, y, x): "" for t in range(dates) for y in range(shape[0]) for x in range(shape[1])}
    opened: Any = SimpleNamespace(keys=keys)
    parts = [_part_of(opened, (number, count)) for number in range(count)]
    assert sorted(index for part in parts for index in part) == sorted(keys)
    for date in range(dates):
        each = [sum(index[0] == date for index in part) for part in parts]
        assert max(each) - min(each) <= 1
    totals = [len(part) for part in parts]
    assert max(totals) - min(totals) <= 1 + len(keys) // dates // count
