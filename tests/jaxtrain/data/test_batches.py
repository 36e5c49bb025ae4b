"""Batches hold what the cube holds, in the order of the run, and damage never becomes data."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import DataConfig, MeshConfig
from jaxtrain.data.arrays import local_rows, put_batch
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.classes import Classes
from jaxtrain.data.memory import empty_array
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.targets import Target
from jaxtrain.data.windows import Windows
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from zarr_store.errors import CorruptShard, MissingShard, UnknownName
from zarr_store.read import open_cube
from zarr_store.regions import Region

from ..cube_factory import CLASSES, COLLECTION, make_cube, shared_cube

SIDE = 32
ROWS = np.array([(0, 16, 80), (1, 160, 128), (0, 0, 0), (1, 33, 7), (0, 40, 90)], np.int32)


def reader_of(url: Path, **values: object) -> WindowReader:
    config = DataConfig.model_validate({"cube": str(url), "classes": CLASSES, "patch": SIDE, **values})
    return WindowReader.of(open_cube(url), config, Classes.of(config))


@pytest.mark.parametrize("bands", [(), ("nir", "blue"), ("red",)])
@pytest.mark.parametrize("learn_masked", [False, True])
def test_a_batch_is_what_plain_zarr_reads(bands: tuple[str, ...], learn_masked: bool) -> None:
    cube = open_cube(shared_cube())
    batch = reader_of(shared_cube(), bands=bands, learn_masked=learn_masked, classes={**CLASSES, "9": "cloud"}).read(
        ROWS
    )
    opened = cube.dataset(COLLECTION)
    wanted = list(bands or cube.spec(COLLECTION).band_names)
    for i, (t, y, x) in enumerate(ROWS.tolist()):
        box = opened.isel(time=t, y=slice(y, y + SIDE), x=slice(x, x + SIDE))
        image = box["reflectance"].sel(band=wanted).transpose("band", "y", "x").values
        status, scl = box["status"].values, box["scl"].values
        observed = np.isin(status, (1, 2) if learn_masked else (1,))
        index = {4: 0, 5: 1, 6: 2, 9: 3}
        label = np.array([[index.get(v, 255) for v in line] for line in scl.tolist()], np.uint8)
        np.testing.assert_array_equal(batch["image"][i], image)
        np.testing.assert_array_equal(batch["observed"][i], observed)
        np.testing.assert_array_equal(batch["label"][i], np.where(observed, label, 255))
    kinds = [str(batch[name].dtype) for name in ("image", "label", "observed")]
    assert kinds == ["uint16", "uint8", "uint8"]
    assert (batch["label"] == 3).any() == learn_masked


def test_stream_follows_the_order_and_fills_the_last_batch() -> None:
    reader = reader_of(shared_cube())
    windows = Windows(SIDE, np.array([(t, y, x) for t in (0, 1) for y in range(0, 160, 32) for x in (0, 32)], np.int32))
    sharding = batch_sharding(make_mesh(MeshConfig(data=1, model=1)))
    order = SampleOrder(4, len(windows))
    with BatchStream(reader, windows, size=6, sharding=sharding, order=order, first=2, last=7, threads=3) as stream:
        got = list(stream)
    assert [number for number, _, _ in got] == [2, 3, 4, 5, 6]
    for number, rows, batch in got:
        np.testing.assert_array_equal(rows, windows.rows[order.indices(number * 6, 6)])
        np.testing.assert_array_equal(batch["image"], reader.read(rows)["image"])
    with BatchStream(reader, windows, size=6, sharding=sharding) as stream:
        once = list(stream)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows, _ in once]), windows.rows)
    _, rows, batch = once[-1]
    assert len(rows) == 2
    assert len(batch["image"]) == 6
    assert (batch["label"][2:] == 255).all()
    assert not batch["observed"][2:].any()
    assert batch["observed"][:2].any()


@pytest.mark.parametrize(("data", "model"), [(4, 2), (8, 1), (1, 1)])
def test_batches_lie_on_the_mesh(data: int, model: int) -> None:
    sharding = batch_sharding(make_mesh(MeshConfig(data=data, model=model)))
    assert local_rows(sharding, 8) == slice(0, 8)
    host: dict[str, np.ndarray] = {
        "image": np.arange(8 * 4, dtype=np.uint16).reshape(8, 1, 2, 2), "label": np.zeros((8, 2, 2), np.uint8)
    }  # fmt: skip
    there = put_batch(host, sharding, 8)
    np.testing.assert_array_equal(jax.device_get(there["image"]), host["image"])
    assert there["image"].sharding.is_equivalent_to(NamedSharding(sharding.mesh, PartitionSpec("data")), 4)
    assert {s.data.shape[0] for s in there["label"].addressable_shards} == {8 // data}


def test_absent_shards_raise_unless_holes_are_allowed(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr", shape=(1, 192, 160), skip_shards=[(0, 0, 1)], masked=False)
    rows = np.array([(0, 48, 40), (0, 0, 64)], np.int32)
    with pytest.raises(MissingShard, match="never written"):
        replace(reader_of(tmp_path / "c.zarr"), lenient=False).read(rows)
    lenient = WindowReader(cube, COLLECTION, (0, 1, 2, 3), SIDE, False, index=cube.index(COLLECTION), lenient=True)
    batch = lenient.read(rows)
    absent = np.zeros((SIDE, SIDE), bool)
    absent[: 64 - 48, 64 - 40 :] = True
    np.testing.assert_array_equal(batch["observed"][0] == 0, absent)
    assert not batch["observed"][1].any()
    assert not batch["image"][0][:, absent].any()
    whole = cube.read(COLLECTION, "reflectance", Region(0, 1, 64, 80, 40, 72))
    np.testing.assert_array_equal(batch["image"][0][:, 16:], whole[0])


def test_status_is_read_only_where_a_chunk_is_not_observed_throughout(tmp_path: Path) -> None:
    """What the index says of a chunk is not asked of its pixels: its status may even be gone."""
    for masked, rows in ((False, [(0, 0, 0), (0, 48, 40)]), (True, [(0, 48, 90)])):
        cube = make_cube(tmp_path / f"{masked}.zarr", shape=(1, 128, 128), masked=masked)
        reader = reader_of(tmp_path / f"{masked}.zarr")
        before = reader.read(np.array(rows, np.int32))
        assert bool(before["observed"].all()) != masked, "the masked cube has something to hide"
        shutil.rmtree(tmp_path / f"{masked}.zarr" / COLLECTION / "status" / "c")
        again = replace(reader, cube=open_cube(cube.url))
        if masked:
            with pytest.raises(MissingShard, match="/status "):
                again.read(np.array(rows, np.int32))
        else:
            after = again.read(np.array(rows, np.int32))
            assert all(np.array_equal(before[name], after[name]) for name in before)


def test_damage_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    shutil.copytree(shared_cube(), tmp_path / "c.zarr")
    path = tmp_path / "c.zarr" / COLLECTION / "reflectance" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - 200, 97):
        data[at] ^= 1
    path.write_bytes(data)
    reader, windows = reader_of(tmp_path / "c.zarr"), Windows(SIDE, ROWS)
    sharding = batch_sharding(make_mesh(MeshConfig(data=1, model=1)))
    with (
        pytest.raises(CorruptShard, match=r"sentinel-2-l2a/reflectance Region\(t0=0"),
        BatchStream(reader, windows, size=5, sharding=sharding) as stream,
    ):
        list(stream)


def test_of_many_windows_the_damaged_one_is_named(tmp_path: Path) -> None:
    """They are read as one, and the error is of one."""
    shutil.copytree(shared_cube(), tmp_path / "c.zarr")
    shards = open_cube(tmp_path / "c.zarr").spec(COLLECTION).shards()
    damaged = next(index for index, region in shards.items() if region.y0 > 0)
    path = tmp_path / "c.zarr" / COLLECTION / "reflectance" / "c" / "/".join(map(str, (damaged[0], 0, *damaged[1:])))
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - 200, 97):
        data[at] ^= 1
    path.write_bytes(data)
    bad, first = shards[damaged], next(iter(shards.values()))
    rows = [(0, first.y0 + 1, first.x0), (bad.t0, bad.y0 + 3, bad.x0 + 2), (0, first.y0 + 2, first.x0)]
    with pytest.raises(
        CorruptShard, match=rf"reflectance Region\(t0={bad.t0}, t1=\d+, y0={bad.y0 + 3},.*x0={bad.x0 + 2},"
    ):
        reader_of(tmp_path / "c.zarr").read(np.array(rows, np.int32))


def test_where_nothing_is_seen_neither_class_nor_value_is_trained_on() -> None:
    seen = np.array([[True, False], [False, True]])
    classes, values = np.array([[3, 3], [0, 255]], np.uint8), np.array([[0.5, 0.5], [0, 7]], np.float32)
    Target("cover").hide(classes, seen)
    Target("height", "label", values=True).hide(values, seen)
    np.testing.assert_array_equal(classes, [[3, 255], [255, 255]])
    np.testing.assert_array_equal(values, [[0.5, np.nan], [np.nan, 7]])


def test_unknown_bands_are_all_listed_with_the_nearest() -> None:
    words = r"unknown bands 'gren', 'nirr' in .*data\.bands.*did you mean 'green', 'nir'"
    with pytest.raises(UnknownName, match=words):
        reader_of(shared_cube(), bands=["gren", "red", "nirr"])


def test_bands_of_a_run_may_be_codes_in_any_case() -> None:
    assert reader_of(shared_cube(), bands=["B08", "b2", "RED"]).bands == (3, 0, 2)


def test_a_processor_takes_over_what_was_decoded_without_a_copy() -> None:
    made = empty_array((4, 3, 64, 64), np.uint16)
    there = put_batch({"image": made}, batch_sharding(make_mesh(MeshConfig(data=1))), 4)["image"]
    assert there.addressable_data(0).unsafe_buffer_pointer() == made.ctypes.data


def test_all_batches_ahead_are_being_read_before_the_first_is_there() -> None:
    class Slow:
        begun = 0
        enough = threading.Event()
        shows: Literal["windows", "images"] = "windows"

        def begin(self, rows: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
            self.begun += 1
            if self.begun == 4:
                self.enough.set()

            def finish() -> dict[str, np.ndarray]:
                assert self.enough.wait(20), f"{self.begun} batches are being read while the first is waited for"
                return {"observed": np.ones((len(rows), 2, 2), np.uint8)}

            return finish

        def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
            return self.begin(rows)()

    windows = Windows(2, np.zeros((12, 3), np.int32))
    sharding = batch_sharding(make_mesh(MeshConfig(data=1)))
    with BatchStream(Slow(), windows, size=2, sharding=sharding, threads=1, prefetch=3) as stream:
        assert [number for number, _, _ in stream] == list(range(6))
