"""Windows that are kept are read once, and batches of them have the bits of batches that are read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
import pytest

from jaxtrain import train
from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.data.arrays import HostBatch, Rows
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.keeping import choose_keeping, keep_on_host
from jaxtrain.data.kept import KeptBatches, KeptReader
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.windows import Windows
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from jaxtrain.runs.log import read_metrics
from jaxtrain.shared import SharedParts
from zarr_store.errors import IntegrityError, InvalidInput

from ..cube_factory import shared_cube, shared_run, tiny_config
from ..sample_factory import make_samples
from ..test_train import assert_same_run

SIDE = 8
ROWS = np.array([(c, t, y, x) for c in range(2) for t in range(3) for y in (0, 4) for x in (0, 4, 8)], np.int32)


class Counting:
    """A reader of windows whose pixels follow from their row; it counts the rows that it reads."""

    shows: Literal["windows", "images"] = "windows"

    def __init__(self, damaged: tuple[int, ...] | None = None) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.damaged = damaged

    def read(self, rows: Rows) -> HostBatch:
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        self.seen += [tuple(row) for row in rows.tolist()]
        if self.damaged in self.seen:
            raise IntegrityError("damaged")
        number = rows @ np.array([1000, 100, 10, 1])
        image = np.arange(3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE) + number[:, None, None, None]
        label = (image[:, 0] % 5).astype(np.uint8)
        made = {"image": image.astype(np.uint16), "observed": np.ones_like(label), "label": label}
        return lambda: made


def test_each_row_is_read_once_and_is_what_the_reader_gives() -> None:
    inner, plain = Counting(), Counting()
    kept = KeptReader(inner, ROWS)
    rng = np.random.default_rng(0)
    for _ in range(40):
        rows = rng.permutation(ROWS)[:10]
        for name, array in kept.read(rows).items():
            assert array.dtype == plain.read(rows)[name].dtype
            np.testing.assert_array_equal(array, plain.read(rows)[name])
    assert sorted(inner.seen) == sorted(map(tuple, ROWS.tolist()))
    assert kept.count == len(ROWS)


def test_other_rows_are_read_each_time_and_a_batch_may_be_changed() -> None:
    inner = Counting()
    kept = KeptReader(inner, ROWS[:5])
    for row in (ROWS[5:6], np.array([[0, 0, 0, 5]], np.int32), np.array([[9, 9, 9, 9]], np.int32)):
        kept.read(row)
        kept.read(row)
        assert inner.seen.count(tuple(row[0].tolist())) == 2
    before = kept.read(ROWS[:2])
    before["image"][:] = 0  # as the last batch of a pass is filled up
    assert kept.read(ROWS[:2])["image"].any()


def test_threads_that_read_the_same_rows_at_once_get_whole_rows() -> None:
    kept, plain = KeptReader(Counting(), ROWS), Counting()
    wanted = plain.read(ROWS)["image"]
    with ThreadPoolExecutor(8) as pool:
        begun = [kept.begin(ROWS) for _ in range(8)]
        for batch in pool.map(lambda finish: finish(), begun):
            np.testing.assert_array_equal(batch["image"], wanted)


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 4}, {"data": 2, "space": 2}])
def test_batches_on_devices_have_the_bits_and_the_places_of_those_that_are_read(
    axes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtrain.data.kept._BLOCK_BYTES", 7 * 3 * SIDE * SIDE * 4)  # blocks that do not divide 36 rows
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: axes["data"] * axes.get("space", 1)])
    order, reader = SampleOrder(3, len(ROWS)), Counting()
    held = KeptBatches(reader, ROWS, mesh)
    assert held.nbytes == sum(array.nbytes for array in Counting().read(ROWS).values())
    read = len(reader.seen)
    stream = BatchStream(
        Counting(), Windows(SIDE, ROWS), size=8, sharding=batch_sharding(mesh), order=order, first=2, last=9, place=True
    )
    with stream.iterated() as expected, held.iterated(order, size=8, first=2, last=9) as batches:
        pairs = list(zip(expected, batches, strict=True))
    assert len(reader.seen) == read, "a batch was read again"
    assert [number for _, (number, _, _) in pairs] == list(range(2, 9))
    for (_, rows, right), (_, other_rows, batch) in pairs:
        np.testing.assert_array_equal(rows, other_rows)
        assert right.keys() == batch.keys()
        for name, array in batch.items():
            assert array.dtype == right[name].dtype
            assert array.sharding.is_equivalent_to(right[name].sharding, array.ndim), name
            np.testing.assert_array_equal(array, right[name])


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize("place", ["host", "device", "none"])
def test_a_run_is_the_same_wherever_its_windows_are_kept(place: str, tmp_path: Path) -> None:
    """Parameters, optimiser and history, bit by bit; the shared run keeps nothing, as it reads no window twice."""
    events: list[Any] = []
    done = train(tiny_config(shared_cube(), data={"cache": place}), tmp_path / "run", on_event=events.append)
    assert (done.input_wait == 0) == (place == "device")
    start = next(event for event in events if event.kind == "start")
    assert start.metrics["cache"] == place
    assert ("MB of training data are kept" in start.message) == (place != "none")
    assert_same_run(shared_run(), tmp_path / "run")


@pytest.mark.usefixtures("shared_programs")
def test_samples_are_kept_by_themselves_and_a_run_may_continue_with_another_place(tmp_path: Path) -> None:
    store = make_samples(tmp_path / "samples.zarr")

    def config(place: str, steps: int) -> TrainConfig:
        return TrainConfig.model_validate({
            "data": {"cube": str(store), "split": {"cell_deg": 0.5}, "cache": place},
            "model": {"name": "resnet", "width": 4, "blocks": [1], "norm": "group"},
            "run": {"steps": steps, "batch_size": 8, "log_every": 1, "evaluate_every": 40,
                    "checkpoint_every": 10},
        })  # fmt: skip

    events: list[Any] = []
    train(config("auto", 20), tmp_path / "kept", on_event=events.append)
    assert next(event for event in events if event.kind == "start").metrics["cache"] == "host"  # a processor, 2 epochs

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.kind == "step" and event.step == 13:
            raise Stop

    with pytest.raises(Stop):
        train(config("none", 20), tmp_path / "moved", on_event=stop)
    assert train(config("device", 20), tmp_path / "moved").resumed_from == 10
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / run) if line["kind"] == "train"] for run in ("kept", "moved")
    ]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("asked", "steps", "host", "device", "place"),
    [
        ("auto", 100, 10 * GB, None, "host"),
        ("auto", 100, 4 * 36 * 512 - 1, None, "none"),  # a quarter of it is a byte too little
        ("auto", 100, 4 * 36 * 512, None, "host"),
        ("auto", 4, 10 * GB, 80 * GB, "none"),  # 32 samples of 36: none is read twice
        ("auto", 100, 10 * GB, 80 * GB, "device"),
        ("auto", 100, 10 * GB, 36 * 512, "host"),  # all of the device, where a third is the limit
        ("auto", 100, 0, 36 * 512, "none"),
        ("host", 4, 0, None, "host"),
        ("device", 4, 0, 36 * 512, "device"),
        ("none", 100, 10 * GB, 80 * GB, "none"),
    ],
)
def test_data_are_kept_where_they_fit(asked: str, steps: int, host: int, device: int | None, place: str) -> None:
    found = choose_keeping(
        config_of(asked, steps), Counting(), ROWS, one_device(), host_free=host, device_free=device, environment={}
    )
    assert found.place == place
    if asked != "none":
        assert found.nbytes == 36 * 512  # 384 bytes of image, 64 of observed, 64 of label


def test_processes_of_one_host_share_its_memory() -> None:
    for processes, place in ((1, "host"), (2, "none")):
        found = choose_keeping(
            config_of("auto", 100), Counting(), ROWS, one_device(), host_free=4 * 36 * 512,
            environment={"TERRASHARD_LOCAL_PROCESSES": str(processes)},
        )  # fmt: skip
        assert found.place == place, processes


def test_what_cannot_be_kept_on_a_device_is_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidInput, match=r"need 0\.0 GB on each device.*use 'host' or 'auto'"):
        choose_keeping(config_of("device", 4), Counting(), ROWS, one_device(), device_free=36 * 512 - 1)
    unequal = config_of("device", 4, hetero={"enabled": True})
    with pytest.raises(InvalidInput, match=r"unequal replicas.*use 'host' or 'auto'"):
        choose_keeping(unequal, Counting(), ROWS, one_device(), device_free=GB)


def test_a_damaged_first_window_is_left_to_the_policy_of_the_run() -> None:
    damaged = Counting(damaged=tuple(ROWS[0].tolist()))
    assert choose_keeping(config_of("auto", 100), damaged, ROWS, one_device(), host_free=GB).place == "none"


def test_the_devices_keep_training_windows_and_the_host_those_of_validation() -> None:
    parts: Any = {
        "train": Windows(SIDE, ROWS[:20]),
        "validation": Windows(SIDE, ROWS[20:30]),
        "test": Windows(SIDE, ROWS[30:]),
    }
    for place, kept in (("host", 30), ("device", 10)):
        inner = Counting()
        keeping = choose_keeping(config_of(place, 4), Counting(), ROWS, one_device(), device_free=GB)
        reader = keep_on_host(keeping, inner, parts)
        for _ in range(2):
            reader.read(ROWS[:20])
            reader.read(ROWS[20:30])
            reader.read(ROWS[30:])
        assert len(inner.seen) == kept + 2 * (len(ROWS) - kept), place
    plain = Counting()
    assert keep_on_host(choose_keeping(config_of("none", 4), plain, ROWS, one_device()), plain, parts) is plain


def test_runs_of_one_process_share_what_is_kept_if_they_read_the_same() -> None:
    """Trials of a search that differ in augmentation, and folds of one trial, read the same pixels."""
    shared = SharedParts()
    classes = SimpleNamespace(to_list=lambda: ["water"])

    def kept(train_rows: Rows, validation_rows: Rows, bands: tuple[str, ...] = ("red",), **sections: Any) -> Any:
        parts = {"train": Windows(SIDE, train_rows), "validation": Windows(SIDE, validation_rows)}
        ready: Any = SimpleNamespace(plan=SimpleNamespace(parts=parts), digest="d", bands=bands, classes=classes)
        return shared.kept(ready, config_of("host", 4, **sections), Counting)

    first = kept(ROWS[:20], ROWS[20:30])
    other: Any = {"data": {"cube": "none.zarr", "jitter": 0.2, "split": {"folds": 3, "fold": 1}}}
    assert kept(ROWS[10:30], ROWS[:10], **other) is first
    for different in (
        kept(ROWS[:20], ROWS[20:31]),
        kept(ROWS[:20], ROWS[20:30], bands=("nir",)),
        kept(ROWS[:20], ROWS[20:30], data={"cube": "none.zarr", "learn_masked": True}),
        kept(ROWS[:20], ROWS[20:30], run={"on_corrupt": "quarantine"}),
    ):
        assert different is not first
    assert kept(ROWS[:20], ROWS[20:30]) is not first, "rows of one kind are kept at a time"


def config_of(cache: str, steps: int, **sections: Any) -> TrainConfig:
    values = {"data": {"cube": "none.zarr", "cache": cache}, "run": {"steps": steps, "batch_size": 8}, **sections}
    return TrainConfig.model_validate(values)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])
