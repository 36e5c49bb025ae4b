"""What is no number is not observed: in cubes, from the writer to the map, and in sample stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cli.main import main
from jaxtrain import predict, train
from jaxtrain.config import DataConfig, TrainConfig
from jaxtrain.data.classes import Classes
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.samples import SampleReader, plan_samples, sample_classes, sample_statistics, scene_rows
from jaxtrain.data.statistics import training_statistics
from jaxtrain.data.targets import resolve_target
from jaxtrain.data.windows import plan_windows
from jaxtrain.inference.blend import Strips
from jaxtrain.inference.maps import NODATA, open_map
from jaxtrain.learn.step import make_predict_step
from zarr_store.create import create_cube
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.labels import LabelSpec, label_boxes, write_label
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.samples import Labelled, Sample, SampleSpec, open_samples, write_samples
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.verify import verify_cube
from zarr_store.write import ShardWriter

SIDE, NAME = 96, "sentinel-1-rtc"
LOST = [(0, 10, 12, np.nan), (1, 40, 41, -np.inf), (0, 70, 80, np.inf)]
"""(band, y, x, number) of the pixels without a number in one of two bands."""


def radar(url: Path, *, lost: bool = True) -> Cube:
    """Write a float cube of two classes; all pixels are said to be observed, one of them masked."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    water = (x // 12 + y // 12) % 2 == 0
    image = (np.where(water, -18.0, -9.0)[None, None] + rng.normal(0, 1, (1, 2, SIDE, SIDE))).astype(np.float32)
    for band, row, column, number in LOST if lost else ():
        image[0, band, row, column] = number
    spec = CubeSpec(
        NAME, "backscatter", tuple(BandSpec(name, nodata=float("nan")) for name in ("vv", "vh")),
        Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (SIDE, SIDE)), ("2023-08-10T10:00:00",),
        ("lc",), Layout("tiny", (1, 32, 32), (1, 96, 96)),
    )  # fmt: skip
    create_cube(url, [spec], items={NAME: [{"id": "i", "datetime": "2023-08-10T10:00:00Z"}]}, provenance={})
    status = np.ones((1, SIDE, SIDE), np.uint8)
    status[0, 70, 80] = 2
    arrays: dict[str, np.ndarray] = {
        "backscatter": image, "lc": np.where(water, 6, 4).astype(np.uint8)[None], "status": status,
        "source_item": np.zeros((1, SIDE, SIDE), np.int16),
    }  # fmt: skip
    ShardWriter(url, NAME).write(Region(0, 1, 0, SIDE, 0, SIDE), arrays, key="k", sources=())
    return open_cube(url)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cube:
    """A cube of an earlier release, whose status says observed where a number is not finite."""
    with monkeypatch.context() as patch:
        patch.setattr("zarr_store.write._finite", lambda spec, arrays: arrays)
        cube = radar(tmp_path / "said.zarr")
    return cube


def config_of(cube: Cube, **more: object) -> DataConfig:
    data = {"cube": cube.url, "collection": NAME, "label": "lc", "patch": 32, "classes": {"4": "land", "6": "water"},
            "split": {"block_m": 320}}  # fmt: skip
    return DataConfig.model_validate(data | more)


def test_the_writer_gives_what_is_no_number_the_status_of_no_data(tmp_path: Path) -> None:
    cube = radar(tmp_path / "c.zarr")
    status = cube.read(NAME, "status", Region(0, 1, 0, SIDE, 0, SIDE))[0]
    assert sorted(zip(*(axis.tolist() for axis in np.nonzero(status != 1)), strict=True)) == [
        (row, column) for _, row, column, _ in LOST
    ]
    assert not status[status != 1].any()
    index = cube.index(NAME)
    assert index.observed.sum() == SIDE * SIDE - len(LOST)
    assert np.isfinite(index.band_mean).all()
    assert (index.pixels - index.observed).ravel().tolist() == (~index.whole).astype(int).ravel().tolist()


@pytest.mark.parametrize("learn_masked", [False, True])
def test_the_reader_sees_and_labels_nothing_there(said: Cube, learn_masked: bool) -> None:
    config = config_of(said, learn_masked=learn_masked)
    reader = WindowReader.of(said, config, Classes.of(config))
    assert said.read(NAME, "status", Region(0, 1, 10, 11, 12, 13)) == 1
    rows = np.array([[0, 0, 0], [0, 32, 32], [0, 64, 64], [0, 64, 0]], np.int32)
    batch = reader.read(rows)
    lost = {(n, row - y, column - x) for n, (_, y, x) in enumerate(rows) for _, row, column, _ in LOST
            if 0 <= row - y < 32 and 0 <= column - x < 32}  # fmt: skip
    assert len(lost) == 3
    for name, nothing in (("observed", 0), ("label", 255)):
        assert set(map(tuple, np.argwhere(batch[name] == nothing).tolist())) == lost
    shown = said.dataset(NAME, masked=True).backscatter.values
    assert not np.isinf(shown).any()
    assert np.isnan(shown).any(axis=1).sum() == len(LOST)
    unlabelled = replace(reader, target=None).read(rows)
    assert set(map(tuple, np.argwhere(unlabelled["clear"] == 0).tolist())) == lost


def test_statistics_of_an_earlier_cube_leave_such_pixels_out(said: Cube, tmp_path: Path) -> None:
    config = config_of(said, min_labelled=0.01)
    classes, index = Classes.of(config), said.index(NAME)
    target = resolve_target(said, config)
    plan = plan_windows(config, said.spec(NAME), index, classes, target=target)
    reader = WindowReader.of(said, config, classes, target, index)
    good = training_statistics(index, plan, reader, classes)
    lost = replace(index, band_mean=np.full_like(index.band_mean, np.nan))
    found = training_statistics(lost, plan, reader, classes)
    assert found.source == "windows"
    np.testing.assert_allclose(found.mean, good.mean, atol=0.5)
    assert np.isfinite(found.std).all()


def test_a_map_has_no_data_there_and_its_neighbours_keep_their_class(said: Cube, tmp_path: Path) -> None:
    clean = radar(tmp_path / "clean.zarr", lost=False)
    run = train(TrainConfig.model_validate({
        "data": config_of(clean).model_dump(), "model": {"name": "unet", "width": 4, "depth": 1}, "mesh": {"data": 1},
        "run": {"steps": 1, "batch_size": 4, "evaluate_every": 1, "checkpoint_every": 1},
    }), tmp_path / "run")  # fmt: skip
    assert run is not None
    maps = {}
    for name, cube in (("clean", clean), ("said", said)):
        made = open_map(predict(tmp_path / "run", cube.url, tmp_path / f"{name}.map").map)
        maps[name] = {layer: made.read(layer) for layer in ("class", "confidence")}
    lost = np.zeros((SIDE, SIDE), bool)
    for _, row, column, _ in LOST:
        lost[row, column] = True
    assert lost[70, 80]
    seen = maps["clean"]["class"] != NODATA
    np.testing.assert_array_equal(maps["said"]["class"] == NODATA, lost | ~seen)
    assert maps["said"]["confidence"][seen & ~lost].min() >= 50


def test_verify_counts_them_in_a_cube_of_before(said: Cube, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_cube(said.url).not_finite == {}
    ledger = said.ledger(NAME)
    row = ledger.get((0, 0, 0))
    assert row is not None
    # earlier releases took them into the mean
    ledger.put(replace(row, stats=(replace(row.stats[0], mean=(float("nan"), -13.0)), *row.stats[1:])))
    report = verify_cube(said.url)
    assert (report.damage, report.not_finite) == ((), {NAME: len(LOST)})
    assert report.to_dict()["not_finite"] == {NAME: len(LOST)}
    assert main(["verify", said.url]) == 0
    assert f"3 pixels of {NAME} are marked as observed without a finite number" in capsys.readouterr().err


def test_an_answer_that_is_no_number_is_no_class() -> None:
    strips = Strips(8, 0, 8, 8, 0, 2)
    answer = np.full((8, 8, 2), 0.5, np.float32)
    answer[3, 4, 1] = np.nan
    strips.add(0, 0, answer, np.ones((8, 8), np.float32))
    ((_, mean, seen),) = list(strips.advance(None))
    assert np.argwhere(seen == 0).tolist() == [[3, 4]]
    assert np.isfinite(mean).all()


def test_a_prediction_without_a_mask_takes_what_is_no_number_for_no_data(program_of) -> None:
    program = program_of()
    step, state = make_predict_step(program), program.init(jax.random.key(0))
    image = np.full((8, 3, 32, 32), 2000, np.float32)
    hole = image.copy()
    hole[0, 1, 5, 5] = np.nan
    image[0, :, 5, 5] = 0
    np.testing.assert_array_equal(step(state, hole), step(state, image))


def test_no_label_is_no_class(tmp_path: Path) -> None:
    cube = radar(tmp_path / "c.zarr", lost=False)
    spec = LabelSpec("lcz", "classes", ((0, "land"), (1, "water")), {})
    write_label(cube.url, spec, lambda: ((box, np.ones(box.shape[1:], np.uint8)) for box in label_boxes(cube)))
    with pytest.raises(InvalidInput, match="255 stands for 'no label' in label layers such as 'lcz'"):
        resolve_target(cube, config_of(cube, label="lcz", classes={"0": "land", "255": "water"}))


def test_values_that_are_not_finite_are_no_labels(tmp_path: Path) -> None:
    cube = radar(tmp_path / "c.zarr", lost=False)
    values = np.array([np.inf, 2.0, -np.inf, np.nan] * (SIDE * SIDE // 4), np.float32).reshape(SIDE, SIDE)
    spec = LabelSpec("height", "values", (), {})
    write_label(cube.url, spec, lambda: ((box, values[box.slices[1:]]) for box in label_boxes(cube)))
    target = resolve_target(cube, config_of(cube, label="height", classes={}))
    assert np.isfinite(target.decode(values, None)).sum() == SIDE * SIDE // 4


def marked(url: Path, dtype: str, *, labelled: Labelled = "one") -> tuple[Path, np.ndarray]:
    """Write a store in which some pixels hold no data; of floats they are nan, and no array says so."""
    rng = np.random.default_rng(0)
    count, side = (24, 8) if labelled == "one" else (1, 24)
    valid = rng.random((count, side, side)) > 0.2
    valid[3 if labelled == "one" else 0, :4] = False
    image = rng.integers(500, 900, (count, 2, side, side)).astype(dtype)
    masked = dtype != "float32"
    image = np.where(valid[:, None], image, 0 if masked else np.nan).astype(dtype)
    image[:, 1] = np.where(valid, image[:, 1], 0)  # one band alone suffices
    spec = SampleSpec(count, ("a", "b"), (side, side), dtype, ("x", "y"), labelled, masked=masked)
    label = np.arange(count) % 2 if labelled == "one" else rng.integers(1, 3, (1, side, side))
    write_samples(url, spec, [
        Sample(image[i], label[i].astype(np.uint8), 10.0 + i, 45.0, f"s{i}", valid[i] if masked else None)
        for i in range(count)
    ])  # fmt: skip
    return url, valid


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("held", [True, False])
def test_samples_are_seen_and_counted_only_where_they_hold_data(
    tmp_path: Path, dtype: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:
        monkeypatch.setattr("jaxtrain.data.samples._HELD_BYTES", 0)
    url, valid = marked(tmp_path / "s.zarr", dtype)
    store = open_samples(url)
    config = DataConfig.model_validate({"cube": str(url)})
    classes = sample_classes(config, store)
    reader = SampleReader.of(store, config, classes)
    rows = np.array([[3, 0, 0], [0, 0, 0], [23, 0, 0]], np.int32)
    np.testing.assert_array_equal(reader.read(rows)["observed"], valid[rows[:, 0]])
    plan, _ = plan_samples(config, store, classes)
    statistics = sample_statistics(plan, reader, classes)
    chosen = plan.parts["train"].rows[:, 0]
    values = np.moveaxis(store.images(chosen), 1, -1)[valid[chosen]].astype(float)
    np.testing.assert_allclose(statistics.mean, values.mean(axis=0))
    np.testing.assert_allclose(statistics.std, values.std(axis=0))
    assert statistics.pixels == valid[chosen].sum()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_labelled_pixel_without_data_is_no_sample(tmp_path: Path, dtype: str) -> None:
    url, valid = marked(tmp_path / "s.zarr", dtype, labelled="pixels")
    store = open_samples(url)
    config = DataConfig.model_validate({"cube": str(url), "patch": 5, "split": {"block_px": 6}})
    classes = sample_classes(config, store)
    plan, _ = plan_samples(config, store, classes)
    rows = np.concatenate([windows.rows for windows in plan.parts.values()])
    assert valid[tuple(rows.T)].all()
    assert len(rows) == valid.sum() == len(scene_rows(store, None))
    reader = SampleReader.of(store, config, classes)
    batch = reader.read(np.array([[0, 12, 12], [0, 2, 7]], np.int32))
    np.testing.assert_array_equal(batch["observed"][0], valid[0, 10:15, 10:15])
    assert batch["label"][1] == 255
    assert np.isfinite(sample_statistics(plan, reader, classes).mean).all()
