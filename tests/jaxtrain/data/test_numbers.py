"""Stored numbers keep their meaning: other scales, offsets and units are converted to the model's, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain import predict
from jaxtrain.data.mismatch import check_pixels
from jaxtrain.data.numbers import BandNumbers, convert_to, unlike_training
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.splits import Split
from jaxtrain.data.task import Task
from jaxtrain.evaluation.scores import select_data
from jaxtrain.inference.maps import open_map
from jaxtrain.runs.rundir import CARD, load_card
from tests.jaxtrain.cube_factory import COLLECTION, labelled_cube, make_cube, shared_cube, shared_run
from zarr_store.grid import Grid
from zarr_store.labels import LabelSpec, label_boxes, write_label
from zarr_store.read import open_cube

STORED: dict[str, dict[str, Any]] = {"plain": {}, "both": {"scale": 0.5, "offset": -300.0}}


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ground of the shared cube, stored in several ways; clouds that were clipped are left out."""
    folder = tmp_path_factory.mktemp("numbers")
    for name, how in STORED.items():
        make_cube(folder / f"{name}.zarr", masked=False, **how)
    return {name: folder / f"{name}.zarr" for name in STORED}


def test_a_map_of_the_same_ground_does_not_depend_on_scale_and_offset(alike: dict[str, Path]) -> None:
    maps = {}
    for name in STORED:
        made = predict(shared_run(), alike[name], alike[name].with_suffix(".map"))
        maps[name] = open_map(made.map).read()
        assert any("are converted" in line for line in made.warnings) == (name == "both")
        assert not any("unlike" in line for line in made.warnings)
    assert (maps["plain"] == maps["both"]).mean() > 0.999


def test_windows_of_several_cubes_do_not_depend_on_their_scales(alike: dict[str, Path]) -> None:
    card = load_card(shared_run())
    both = select_data(card, open_training_data([str(alike["plain"]), str(alike["both"])]), part=None)
    rows = both.windows.rows
    half = len(rows) // 2
    got = both.reader.read(rows[[0, half, 3, half + 3]])
    assert got["image"].dtype == np.float32
    plain, converted = got["image"][[0, 2]], got["image"][[1, 3]]
    np.testing.assert_allclose(np.maximum(converted, 1), plain, atol=0.51)  # the plain cube stores nothing below 1
    np.testing.assert_array_equal(got["label"][[0, 2]], got["label"][[1, 3]])
    assert len(both.warnings) == len(set(both.warnings))


def test_the_card_keeps_the_numbers_and_an_older_card_has_none() -> None:
    card = load_card(shared_run())
    assert card.numbers[0] == BandNumbers("blue", "reflectance", "uint16", "1", 1.0, 0.0)
    assert type(card).from_dict(card.to_dict()).to_dict() == card.to_dict()
    written = json.loads((shared_run() / CARD).read_text())
    assert len(written.pop("numbers")) == len(card.bands)
    older = type(card).from_dict(written)
    assert older.numbers == ()
    assert older.to_dict() == written
    there = [replace(band, scale=7.0) for band in card.numbers]
    assert convert_to(older.numbers, there, "x") == (None, [])


BAND = BandNumbers("vv", "backscatter", "float32", "1")
PATCH = BandNumbers("red", "image", "uint16")


@pytest.mark.parametrize(
    ("trained", "there", "message"),
    [
        (BAND, replace(BAND, unit="dB"), "the units are dB and 1"),
        (BAND, replace(BAND, kind="reflectance"), "different quantities"),
        (PATCH, replace(PATCH, dtype="uint8"), "states no scale"),
        (PATCH, replace(PATCH, scale=1e-4), "states no scale"),
        (replace(PATCH, scale=1e-4, unit="sr"), replace(PATCH, dtype="float32", unit="K"), "the units are K and sr"),
    ],
)
def test_numbers_that_cannot_be_converted_are_refused(trained: BandNumbers, there: BandNumbers, message: str) -> None:
    with pytest.raises(ValueError, match=f"OTHER: band {there.band} holds .*{message}.*train on these"):
        convert_to([trained], [there], "OTHER")
    scaled = replace(PATCH, band="nir", scale=1e-4)
    conversion, notes = convert_to([trained, scaled], [there, replace(scaled, scale=2e-4)], "OTHER", insist=True)
    assert conversion is not None
    assert (conversion.gain, conversion.shift) == ((1.0, 2.0), (0.0, 0.0)), "as they are, and the other band converted"
    assert "used as they are (--allow-mismatch)" in notes[0]


@pytest.mark.parametrize(
    ("trained", "there", "stored", "expected"),
    [
        (replace(PATCH, scale=1e-4), replace(PATCH, dtype="float32"), 0.25, 2500.0),
        (replace(PATCH, scale=1e-4), replace(PATCH, scale=1e-4, offset=-0.1), 3500, 2500.0),
        (replace(PATCH, scale=1e-4, unit="sr"), replace(PATCH, scale=2e-5), 12500, 2500.0),
        (replace(BAND, scale=2.0, offset=1.0), BAND, 5.0, 2.0),
        (replace(BAND, unit="K"), replace(BAND, unit="degC"), 20.0, 293.15),
        (replace(BAND, unit="celsius", scale=0.5), replace(BAND, unit="K"), 293.15, 40.0),
        (replace(BAND, unit="m"), replace(BAND, unit="cm"), 250.0, 2.5),
        (replace(BAND, unit="1"), replace(BAND, unit="%"), 25.0, 0.25),
    ],
)
def test_a_conversion_keeps_the_physical_number(
    trained: BandNumbers, there: BandNumbers, stored: float, expected: float
) -> None:
    conversion, notes = convert_to([trained], [there], "OTHER")
    assert conversion is not None
    assert "numbers of OTHER are converted" in notes[0]
    np.testing.assert_allclose(conversion.apply(np.full((2, 1, 3, 3), stored, there.dtype)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("resolution", "crs", "equal"),
    [(10.0, "EPSG:32633", True), (10.2, "EPSG:32633", True), (20.0, "EPSG:32633", False), (5.0, "EPSG:32633", False),
     (14.1, "EPSG:3857", True), (10.0, "EPSG:3857", False)],
)  # fmt: skip
def test_pixels_of_another_size_on_the_ground_are_refused_or_insisted_on(
    resolution: float, crs: str, equal: bool
) -> None:
    trained = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (64, 64))
    left, top = (500_000.0, 5_000_000.0) if crs == "EPSG:32633" else (1_669_792.0, 5_635_549.0)  # 15° E, 45° N
    there = Grid(crs, (resolution, 0.0, left, 0.0, -resolution, top), (64, 64))
    if equal:
        assert check_pixels(there, trained, "OTHER", insist=False) == []
        return
    with pytest.raises(ValueError, match=r"pixels of OTHER are .* m on the ground, and the model was trained on pixels "
                                         r"of 10 m: ingest .* --resolution 10 .*--allow-mismatch"):  # fmt: skip
        check_pixels(there, trained, "OTHER", insist=False)
    assert "used as they are" in check_pixels(there, trained, "OTHER", insist=True)[0]


def test_power_in_place_of_decibels_is_warned_of() -> None:
    index = open_cube(shared_cube()).index(COLLECTION)
    mean, std = index.statistics()
    assert unlike_training(mean, std, index, range(4), None, "c") == []
    for other in (mean / 1000, std / 100):
        assert "unlike those of training" in unlike_training(other, std / 100, index, range(4), None, "c")[0]


def test_values_in_another_unit_are_refused(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr", shape=(1, 64, 64))
    spec = LabelSpec("height", "values", (), {"unit": "cm"})
    write_label(cube.url, spec, lambda: ((box, np.ones(box.shape[1:], np.float32)) for box in label_boxes(cube)))
    card = load_card(shared_run())
    data = card.config.data.model_copy(update={"label": "height", "classes": {}})
    task = Task(value=(1.0, 1.0), unit="m")
    assert Task.from_dict(task.to_dict()) == task
    learned = replace(card, task=task, config=card.config.model_copy(update={"data": data}))
    with pytest.raises(ValueError, match="holds values in cm, the model learned values in m"):
        select_data(learned, open_training_data(cube.url), part=None)


def test_a_number_of_a_class_means_the_same_class_in_another_cube(tmp_path: Path) -> None:
    """`data.classes` names numbers; a label layer elsewhere may give a number another name."""
    lc = np.full((1, 64, 64), 4, np.uint8)
    cover = np.full((64, 64), 5, np.uint8)
    card = load_card(shared_run())
    named = {"4": "vegetation", "5": "not vegetated", "6": "water"}
    data = card.config.data.model_copy(update={"label": "cover", "classes": named, "bands": ()})
    learned = replace(card, config=card.config.model_copy(update={"data": data}), bands=("red",), numbers=())
    found = {}
    for name, names in {
        "same": {5: "not vegetated", 6: "water"},
        "other": {5: "rock", 6: "water"},
        "swapped": {5: "water", 6: "not vegetated"},
    }.items():
        cube = labelled_cube(tmp_path / f"{name}.zarr", lc, layer=(cover, names), top=4_000_000.0)
        opened = open_training_data(cube.url)
        if name == "swapped":
            with pytest.raises(
                ValueError, match=r"value 5 of label layer 'cover' means water in .*, and not vegetated"
            ):
                select_data(learned, opened, part=None)
            continue
        found[name] = [line for line in select_data(learned, opened, part=None).warnings if "other names" in line]
    assert found["same"] == []
    assert len(found["other"]) == 1
    assert "5 is rock there and counts as not vegetated" in found["other"][0]


def test_labels_that_were_made_again_mean_the_classes_of_the_run_or_are_refused(tmp_path: Path) -> None:
    """The run's own cube, whose label layer was replaced by one that numbers its classes in another way."""
    cover = np.full((64, 64), 5, np.uint8)
    cube = labelled_cube(tmp_path / "c.zarr", np.full((1, 64, 64), 4, np.uint8), layer=(cover, {5: "rock", 6: "water"}))
    card = load_card(shared_run())
    named = {"5": "not vegetated", "6": "water"}
    data = card.config.data.model_copy(update={"label": "cover", "classes": named, "bands": (), "cube": cube.url})
    assert isinstance(card.split, Split)
    mine = replace(card, config=card.config.model_copy(update={"data": data}), bands=("red",), numbers=(),
                   grid=cube.spec(COLLECTION).grid, split=Split.whole(card.split.block, (64, 64)))  # fmt: skip
    mine = replace(mine, cube_digest=str(open_training_data(cube.url).digest(mine)))
    assert not select_data(mine, open_training_data(cube.url), part="test").warnings  # named so from the beginning
    for names, refused in (({5: "stone", 6: "water"}, False), ({5: "water", 6: "not vegetated"}, True)):
        boxes = [(box, cover[box.y0 : box.y1, box.x0 : box.x1]) for box in label_boxes(cube)]
        spec = LabelSpec("cover", "classes", tuple(names.items()), {"made": str(names)})
        write_label(cube.url, spec, partial(iter, boxes), replace=True)
        again = open_training_data(cube.url)
        if refused:
            with pytest.raises(
                ValueError, match=r"value 5 of label layer 'cover' means water in .*, and not vegetated"
            ):
                select_data(mine, again, part="test")
        else:
            assert any("5 is stone there" in line for line in select_data(mine, again, part="test").warnings)
