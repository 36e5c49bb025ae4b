"""Sample stores: split by place, leakage, what a reader gives, and a run from store to report on them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from jaxtrain import evaluate, predict, train
from jaxtrain.config import DataConfig, SplitConfig, TrainConfig
from jaxtrain.data.places import SampleSplit, leakage, nearest_m, split_samples
from jaxtrain.data.samples import SampleReader, plan_samples, sample_classes, sample_statistics
from zarr_store.errors import CorruptShard, InvalidInput
from zarr_store.samples import open_samples

from ..sample_factory import CLASSES, make_samples, make_scene


def places(count=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(5, 15, count), rng.uniform(45, 55, count)


def plan_of(store, **data):
    config = DataConfig(cube=str(store), **data)
    opened = open_samples(store)
    classes = sample_classes(config, opened)
    plan, leak = plan_samples(config, opened, classes)
    return plan, leak, SampleReader.of(opened, config, classes), classes


def test_no_cell_is_in_two_parts():
    longitude, latitude = places()
    split = split_samples(SplitConfig(cell_deg=1.0, validation=0.1, test=0.2), longitude, latitude)
    cells = np.floor(longitude) * 1000 + np.floor(latitude)
    assert len(np.unique(cells)) == sum(split.cells)
    for cell in np.unique(cells):
        assert len(np.unique(split.parts[cells == cell])) == 1
    assert split.cells[2] == round(0.2 * sum(split.cells))
    again = SampleSplit.from_dict(json.loads(json.dumps(split.to_dict())))
    np.testing.assert_array_equal(again.parts, split.parts)
    other = split_samples(SplitConfig(cell_deg=1.0, validation=0.1, test=0.2, seed=1), longitude, latitude)
    assert (other.parts != split.parts).any()


def test_a_buffer_takes_neighbours_out_of_training():
    longitude, latitude = places(3000)
    config = SplitConfig(cell_deg=1.0, validation=0.1, test=0.2, buffer_m=10_000)
    split = split_samples(config, longitude, latitude)
    train, test = split.parts == 0, split.parts == 2
    assert nearest_m(longitude[test], latitude[test], longitude[train], latitude[train]).min() >= 10_000
    without = split_samples(config.model_copy(update={"buffer_m": 0.0}), longitude, latitude)
    assert (
        nearest_m(longitude[test], latitude[test], longitude[without.parts == 0], latitude[without.parts == 0]).min()
        < 10_000
    )
    np.testing.assert_array_equal(without.parts == 2, test)


def test_leakage_counts_test_samples_with_a_near_training_sample():
    longitude, latitude = np.array([0.0, 0.001, 1.0, 2.0]), np.zeros(4)
    parts = np.array([0, 2, 2, 0], np.int8)
    assert leakage(parts, longitude, latitude, 200.0)["share"] == 0.5  # 0.001 degrees are 111 m
    assert leakage(parts, longitude, latitude, 100.0)["share"] == 0.0
    assert leakage(parts, np.array([0.0, 1.0, np.nan, 2.0]), latitude, 200.0)["share"] is None


def test_a_random_split_leaks_and_says_so(tmp_path):
    store = make_samples(tmp_path / "s.zarr")
    _, near, _, _ = plan_of(store, split={"validation": 0.1, "test": 0.25})
    _, random, _, _ = plan_of(store, split={"kind": "random", "validation": 0.1, "test": 0.25})
    assert (near["leaky"], near["share"]) == (False, 0.0)
    assert random["leaky"]
    assert random["share"] > 0.5
    lost = tmp_path / "lost.zarr"
    make_samples(lost)
    opened = open_samples(lost)
    opened.longitude[3] = np.nan
    config = DataConfig(cube=str(lost))
    with pytest.raises(InvalidInput, match="1 of 96 samples have no coordinates"):
        plan_samples(config, opened, sample_classes(config, opened))


def test_statistics_are_of_the_training_part(tmp_path):
    plan, _, reader, classes = plan_of(make_samples(tmp_path / "s.zarr"))
    statistics = sample_statistics(plan, reader, classes)
    train = plan.parts["train"].rows[:, 0]
    images = reader.store.images(train).astype(float)
    np.testing.assert_allclose(statistics.mean, images.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(statistics.std, images.std(axis=(0, 2, 3)))
    np.testing.assert_array_equal(statistics.class_pixels, np.bincount(reader.store.label[train], minlength=3))


def test_bands_and_classes_may_be_chosen(tmp_path):
    store = make_samples(tmp_path / "s.zarr")
    plan, _, reader, classes = plan_of(store, bands=("blue", "red"), classes={"2": "town", "1": "lake"})
    assert classes.names == ("town", "lake")
    rows = np.concatenate([windows.rows for windows in plan.parts.values()])
    assert set(reader.store.label[rows[:, 0]].tolist()) == {1, 2}
    batch = reader.read(rows[:5])
    np.testing.assert_array_equal(batch["label"], 2 - reader.store.label[rows[:5, 0]])
    np.testing.assert_array_equal(batch["image"], reader.store.images(rows[:5, 0])[:, [2, 0]])
    with pytest.raises(InvalidInput, match="has no label 7; it has 0 = field"):
        plan_of(store, classes={"7": "sea"})


def test_samples_of_a_store_too_large_to_hold_are_the_same(tmp_path, monkeypatch):
    store = make_samples(tmp_path / "s.zarr")
    held = [plan_of(store, bands=bands)[2] for bands in ((), ("blue", "red"))]
    rows = np.array([[50, 0, 0], [3, 0, 0], [95, 0, 0], [3, 0, 0]], np.int32)
    expected = [reader.read(rows) for reader in held]
    monkeypatch.setattr("jaxtrain.data.samples._HELD_BYTES", 0)
    for reader, batch in zip((plan_of(store, bands=r)[2] for r in ((), ("blue", "red"))), expected, strict=True):
        wait = reader.begin(rows)
        assert reader._held is None
        got = wait()
        for name in batch:
            np.testing.assert_array_equal(got[name], batch[name])
            assert got[name].dtype == batch[name].dtype


def test_a_damaged_sample_of_a_large_store_is_named(tmp_path, monkeypatch):
    store = make_samples(tmp_path / "s.zarr")
    (shard,) = [p for p in (store / "image/c").rglob("*") if p.is_file()]
    data = bytearray(shard.read_bytes())
    data[30] ^= 0xFF  # in the first sample
    shard.write_bytes(data)
    monkeypatch.setattr("jaxtrain.data.samples._HELD_BYTES", 0)
    opened = open_samples(store)
    config = DataConfig.model_validate({"cube": str(store)})
    reader = SampleReader.of(opened, config, sample_classes(config, opened))
    reader.read(np.array([[5, 0, 0], [7, 0, 0]], np.int32))
    with pytest.raises(CorruptShard, match="sample 0 "):
        reader.read(np.array([[5, 0, 0], [0, 0, 0]], np.int32))


def test_a_patch_of_a_scene_is_centred_and_mirrored_at_the_edge(tmp_path):
    plan, _, reader, _ = plan_of(make_scene(tmp_path / "s.zarr"), patch=5, split={"block_px": 5})
    scene = reader.store.images([0])[0]
    batch = reader.read(np.array([[0, 7, 9], [0, 3, 0]], np.int32))
    np.testing.assert_array_equal(batch["image"][0], scene[:, 5:10, 7:12])
    np.testing.assert_array_equal(batch["image"][1], scene[:, 1:6, [2, 1, 0, 1, 2]])
    np.testing.assert_array_equal(batch["label"], reader.store.label[0, [7, 3], [9, 0]] - 1)
    assert all((windows.rows[:, 1] >= 2).all() for windows in plan.parts.values())  # the margin has no label
    with pytest.raises(InvalidInput, match="patch 6 has no middle pixel"):
        plan_of(tmp_path / "s.zarr", patch=6)


def test_checkerboard_and_buffer_of_a_scene(tmp_path):
    store = make_scene(tmp_path / "s.zarr")
    board = {"kind": "checkerboard", "block_px": 5, "validation": 0.0}
    plan, leak, _, _ = plan_of(store, patch=5, split=board)
    rows = plan.parts["test"].rows
    assert ((rows[:, 1] // 5 + rows[:, 2] // 5) % 2 == 1).all()
    assert len(rows) + len(plan.parts["train"]) == 38 * 40
    assert leak["touching"] > 0.5  # of blocks of five, only the middle pixel lies two away from its neighbours
    buffered, apart, _, _ = plan_of(store, patch=5, split={**board, "buffer_px": 2})
    assert apart["touching"] == 0
    np.testing.assert_array_equal(buffered.parts["test"].rows, rows)
    assert 0 < len(buffered.parts["train"]) < len(plan.parts["train"])


def run_config(store, **sections):
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": str(store), "split": {"validation": 0.1, "test": 0.25}},
        "model": {"name": "cnn", "width": 8, "depth": 2},
        "optim": {"learning_rate": 2e-2, "warmup_steps": 2},
        "run": {"steps": 30, "batch_size": 16, "evaluate_every": 30, "checkpoint_every": 15, "log_every": 10},
    }
    return TrainConfig.model_validate({name: {**base[name], **sections.get(name, {})} for name in base})


def test_a_run_from_store_to_report(tmp_path):
    store = make_samples(tmp_path / "s.zarr")
    result = train(run_config(store, model={"name": "cnn", "width": 8, "depth": 2, "turns": True}), tmp_path / "run")
    assert result.windows["test"] == 24
    scores = evaluate(tmp_path / "run").to_dict()
    assert scores["accuracy"] > 0.9
    assert scores["samples"] == scores["pixels"] == 24
    assert 0 <= scores["calibration_error"] <= 1
    assert scores["warnings"] == []
    assert scores["leakage"]["share"] == 0
    report = (tmp_path / "run/report.html").read_text()
    assert "Samples kept aside" in report
    assert "from a sample of training images" in report
    # another store, with the classes in another order
    other = make_samples(tmp_path / "o.zarr", seed=5, classes=CLASSES[::-1])
    scores = evaluate(tmp_path / "run", data=other).to_dict()
    assert scores["samples"] == 96
    assert scores["accuracy"] > 0.9
    assert "have a training sample nearer than" in scores["warnings"][0]
    with pytest.raises(InvalidInput, match="predicts for whole images, so it makes no map"):
        predict(tmp_path / "run", store, tmp_path / "map.zarr")
    with pytest.raises(InvalidInput, match="none is the same, so it cannot be evaluated there"):
        evaluate(tmp_path / "run", data=make_samples_named(tmp_path / "x.zarr"))


def make_samples_named(url):
    from zarr_store.samples import Sample, SampleSpec, write_samples

    spec = SampleSpec(2, ("red", "green", "blue"), (16, 16), "uint8", ("snow", "sand"), "one")
    image = np.zeros((3, 16, 16), np.uint8)
    write_samples(url, spec, [Sample(image, np.array(i, np.uint8), 0.0, 0.0, str(i)) for i in range(2)])
    return url


def test_a_run_on_several_classes_at_once(tmp_path):
    store = make_samples(tmp_path / "s.zarr", several=True)
    train(run_config(store), tmp_path / "run")
    scores = evaluate(tmp_path / "run").to_dict()
    assert scores["macro_f1"] > 0.85
    assert scores["micro_f1"] > 0.85
    assert scores["confusion_matrix"] is None


def test_a_run_on_the_pixels_of_a_scene(tmp_path):
    store = make_scene(tmp_path / "s.zarr")
    config = run_config(
        store,
        data={"cube": str(store), "patch": 5, "split": {"kind": "checkerboard", "block_px": 5, "validation": 0.1}},
        model={"name": "mlp", "width": 16, "depth": 1},
    )
    train(config, tmp_path / "run")
    scores = evaluate(tmp_path / "run").to_dict()
    assert scores["accuracy"] > 0.5
    assert scores["leakage"]["touching"] > 0.5


def test_a_network_for_pixels_is_refused_for_samples(tmp_path):
    with pytest.raises(InvalidInput, match=r"'unet' predicts for each pixel.*one of cnn, mlp, resnet"):
        train(run_config(make_samples(tmp_path / "s.zarr"), data={"cube": str(tmp_path / "s.zarr"), "patch": 16},
                         model={"name": "unet", "width": 4, "depth": 1}), tmp_path / "run")  # fmt: skip
