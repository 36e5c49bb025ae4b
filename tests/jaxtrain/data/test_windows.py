"""Windows are chosen from chunk counts: the right ones, and no pixel is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import DataConfig, SplitConfig
from jaxtrain.data.classes import UNLABELLED, Classes
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.splits import PARTS, Part
from jaxtrain.data.statistics import training_statistics
from jaxtrain.data.windows import Window, _series, plan_windows, window_leakage, window_shares
from zarr_store.errors import InvalidInput, NothingFound, UnknownName
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region

from ..cube_factory import CLASSES, COLLECTION, make_cube, shared_cube

NO_TEST = SplitConfig(block_m=320, validation=0, test=0)


def data_config(**values: object) -> DataConfig:
    base = {"cube": "c", "classes": CLASSES, "patch": 32, "split": SplitConfig(block_m=320)}
    return DataConfig.model_validate({**base, **values})


def rows_of(cube: Cube, config: DataConfig, parts: tuple[Part, ...] = PARTS) -> list[Window]:
    plan = plan_windows(config, cube.spec(COLLECTION), cube.index(COLLECTION), Classes.of(config))
    return sorted(plan.parts[part][i] for part in parts for i in range(len(plan.parts[part])))


def brute_force(cube: Cube, config: DataConfig, parts: tuple[Part, ...]) -> list[Window]:
    """Windows by reading every pixel; the same as from chunks where patches are chunks."""
    blocks = plan_windows(config, cube.spec(COLLECTION), cube.index(COLLECTION), Classes.of(config)).blocks
    times, height, width = cube.spec(COLLECTION).shape
    learnable = [int(v) for v in config.classes]
    found = []
    for t in range(times):
        for y in range(0, height - config.patch + 1, config.patch):
            for x in range(0, width - config.patch + 1, config.patch):
                box = Region(t, t + 1, y, y + config.patch, x, x + config.patch)
                status = cube.read(COLLECTION, "status", box)
                allowed = (1, 2) if config.learn_masked else (1,)
                good = np.isin(cube.read(COLLECTION, "scl", box), learnable) & np.isin(status, allowed)
                part = PARTS[blocks.parts[y // blocks.block[0], x // blocks.block[1]]]
                # a threshold is for training; any label is judged
                if part in parts and (good.mean() >= config.min_labelled if part == "train" else good.any()):
                    found.append(Window(t, y, x))
    return found


@pytest.mark.parametrize("values", [{"min_labelled": 0.5}, {"min_labelled": 1.0}, {"min_labelled": 0.01}])
def test_the_same_windows_as_from_every_pixel(values: dict[str, float]) -> None:
    cube, config = open_cube(shared_cube()), data_config(**values)
    for parts in (("train",), ("validation", "test")):
        assert rows_of(cube, config, parts) == brute_force(cube, config, parts)


def test_masked_pixels_count_only_where_they_are_trained_on(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr", shape=(1, 128, 160))
    clouds = {**CLASSES, "9": "cloud"}
    assert rows_of(cube, data_config(min_labelled=1.0, classes=clouds, learn_masked=True)) == [
        Window(0, y, x) for y in range(0, 128, 32) for x in range(0, 160, 32)
    ]
    learned = rows_of(cube, data_config(min_labelled=1.0, classes=clouds, split=NO_TEST))
    assert Window(0, 32, 96) not in learned
    assert Window(0, 0, 0) in learned


def test_absent_shards_and_empty_ground_give_no_window(tmp_path: Path) -> None:
    cube = make_cube(tmp_path / "c.zarr", shape=(1, 192, 160), skip_shards=[(0, 0, 0)], hole=True, masked=False)
    found = rows_of(cube, data_config())
    assert found
    assert all(not (w.y < 64 and w.x < 64) for w in found)
    assert Window(0, 160, 128) not in found  # the corner without data


def test_no_pixel_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cube = open_cube(shared_cube())
    monkeypatch.setattr(cube, "tensorstore", None)
    assert rows_of(cube, data_config())


def test_shares_are_weighted_by_area() -> None:
    """Chunks of 24 under windows of 16: against a mean over pixels."""
    cube = open_cube(shared_cube())
    index = cube.index(COLLECTION)
    object.__setattr__(index, "chunk", (1, 24, 24))
    quantity = np.random.default_rng(0).random((2, 8, 7))
    shape = (2, 192, 160)
    pixels = quantity.repeat(24, axis=1).repeat(24, axis=2)[:, :192, :160]
    expected = pixels.reshape(2, 12, 16, 10, 16).mean(axis=(2, 4))
    np.testing.assert_allclose(window_shares(index, shape, 16, quantity), expected, rtol=1e-12)


def test_errors_say_what_to_do() -> None:
    cube = open_cube(shared_cube())
    with pytest.raises(UnknownName, match=r"unknown class layer 'slc'.*data\.label.*did you mean 'scl'"):
        rows_of(cube, data_config(label="slc"))
    with pytest.raises(InvalidInput, match=r"patch 512 does not fit the grid of 192×160"):
        rows_of(cube, data_config(patch=512))
    with pytest.raises(NothingFound, match=r"no window of 32×32.*its values and pixels: \{4: \d+, 5:.*learn_masked"):
        rows_of(cube, data_config(classes={"11": "snow"}))


def test_classes_merge_values_and_refuse_nonsense() -> None:
    classes = Classes.of(data_config(classes={"4": "green", "8": "cloud", "9": "cloud"}, colours={"green": "#00ff00"}))
    table = classes.table()
    assert classes.names == ("green", "cloud")
    assert table[[4, 8, 9]].tolist() == [0, 1, 1]
    assert (np.delete(table, [4, 8, 9]) == UNLABELLED).all()
    assert classes.colours == ("#00ff00", "#d9d9d9")
    assert Classes.from_list(classes.to_list()) == classes
    many = Classes.of(data_config(classes={str(i): f"class {i}" for i in range(60)}))
    assert len(set(many.colours)) == 60
    for bad, message in (
        ({"classes": {}}, "data.classes is empty"),
        ({"classes": {"256": "x"}}, "whole number 0…255"),
        ({"classes": {"four": "x"}}, "whole number 0…255"),
        ({"classes": {"4": "x", "04": "y"}}, "data.classes names 4 twice, as 'x' and 'y'"),
        ({"colours": {"watre": "#000000"}}, "did you mean 'water'"),
        ({"colours": {"water": "blue"}}, "expected e.g. '#2ca02c'"),
        ({"colours": {"water": "#0000FF", "vegetation": "#0000ff"}}, "both have #0000"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Classes.of(data_config(**bad))


@pytest.mark.parametrize(
    ("names", "colours"),
    [
        (("grassland", "pasture", "bare", "bare soil", "urban", "town"), {}),
        (("Water", "water", "WATER"), {}),
        (("river", "lake", "x"), {"x": "#4FA8E0"}),
        (("x", "water"), {"x": "#1f5fbf"}),
        (tuple(f"k{i}" for i in range(254)), {"k7": "#e69f00", "k8": "#F25555"}),
    ],
)
def test_two_classes_never_get_one_colour(names: tuple[str, ...], colours: dict[str, str]) -> None:
    classes = Classes.of(data_config(classes={str(i): name for i, name in enumerate(names)}, colours=colours))
    assert len({colour.lower() for colour in classes.colours}) == len(names)
    assert {name: dict(zip(names, classes.colours, strict=True))[name] for name in colours} == colours


@pytest.mark.parametrize(("block_m", "chunk", "source"), [(640.0, 32, "index"), (160.0, 64, "windows")])
def test_statistics_see_training_ground_only(tmp_path: Path, block_m: float, chunk: int, source: str) -> None:
    """Against the mean of every training pixel and no other."""
    config = data_config(split=SplitConfig(block_m=block_m), patch=16, min_labelled=0.01)
    plain = make_cube(tmp_path / "a.zarr", shape=(1, 256, 256), masked=False, chunk=chunk)
    classes = Classes.of(config)
    plan = plan_windows(config, plain.spec(COLLECTION), plain.index(COLLECTION), classes)
    reader = WindowReader.of(plain, config, classes)
    statistics = training_statistics(plain.index(COLLECTION), plan, reader, classes)
    assert statistics.source == source
    whole = Region(0, 1, 0, 256, 0, 256)
    pixels = plain.read(COLLECTION, "reflectance", whole)[0].astype(float)
    scl = plain.read(COLLECTION, "scl", whole)[0]
    trained = np.zeros((256, 256), bool)
    for _, y, x in plan.parts["train"].rows:
        trained[y : y + 16, x : x + 16] = True
    assert not trained.all()
    if source == "index":
        np.testing.assert_allclose(statistics.mean, pixels[:, trained].mean(axis=1), rtol=1e-9)
        np.testing.assert_allclose(statistics.std, pixels[:, trained].std(axis=1), rtol=1e-9)
        assert statistics.class_pixels.tolist() == [int((scl[trained] == v).sum()) for v in (4, 5, 6)]
    else:
        count = min(256, len(plan.parts["train"]))
        assert statistics.pixels == count * 16 * 16
        assert count < 256
        np.testing.assert_allclose(statistics.mean, pixels[:, trained].mean(axis=1), rtol=1e-9)
        np.testing.assert_allclose(statistics.std, pixels[:, trained].std(axis=1), rtol=1e-9)


def test_dates_may_be_kept_aside(tmp_path):
    """All windows of such a date are evaluated, none is trained on; test blocks are trained on at the other dates."""
    cube = make_cube(tmp_path / "c.zarr", masked=False)
    spec, index = cube.spec(COLLECTION), cube.index(COLLECTION)
    config = DataConfig(
        cube="c", classes=CLASSES, patch=32, split={"block_m": 320, "test_dates": ["2023-08-11"], "test": 0.4}
    )
    classes = Classes.of(config)
    plan = plan_windows(config, spec, index, classes, dates=config.split.test_dates)
    assert set(plan.parts["test"].rows[:, 0].tolist()) == {1}
    assert len(plan.parts["test"]) == 6 * 5
    for again in (["1"], ["2023-08-11T10:00:00Z"], ["2023-08-11/.."]):
        same = plan_windows(config, spec, index, classes, dates=again)
        assert same.parts["test"].rows.tolist() == plan.parts["test"].rows.tolist()
    for part in ("train", "validation"):
        assert set(plan.parts[part].rows[:, 0].tolist()) == {0}
    assert len(plan.parts["train"]) + len(plan.parts["validation"]) == 6 * 5
    leak = window_leakage(config, plan)
    assert leak is not None
    assert (leak["leaky"], leak["dates"]) == (False, ["2023-08-11"])
    assert leak["beside"] == 1.0
    with pytest.raises(UnknownName, match=r"unknown times '2024', '7' in .*data\.split\.test_dates"):
        plan_windows(config, spec, index, classes, dates=["2024", "2023-08-10", "7"])
    with pytest.raises(InvalidInput, match="names all 2 dates"):
        plan_windows(config, spec, index, classes, dates=["2023"])


def test_a_buffer_keeps_training_windows_away_from_held_out_ones(tmp_path):
    cube = make_cube(tmp_path / "c.zarr", masked=False)
    spec, index = cube.spec(COLLECTION), cube.index(COLLECTION)

    def plan_of(**split):
        config = DataConfig(cube="c", classes=CLASSES, patch=32, split={"block_m": 320, **split})
        return config, plan_windows(config, spec, index, Classes.of(config))

    def nearest(plan):
        train, held_out = plan.parts["train"].rows[:, 1:], [plan.parts[p].rows[:, 1:] for p in ("validation", "test")]
        apart = np.abs(train[:, None] - np.concatenate(held_out)[None]).max(axis=-1) - 32
        return int(apart.min())

    _, plain = plan_of(test=0.05, validation=0.05)
    _, buffered = plan_of(test=0.05, validation=0.05, buffer_m=300)  # 30 pixels, less than a window
    assert nearest(plain) == 0
    assert nearest(buffered) >= 30
    assert 0 < len(buffered.parts["train"]) < len(plain.parts["train"])
    config, random = plan_of(kind="random", block_m=9600)
    leak = window_leakage(config, random)
    assert leak is not None
    assert leak["leaky"]
    assert leak["beside"] > 0.5
    assert window_leakage(*plan_of()) is None
    _, board = plan_of(kind="checkerboard")
    assert ((board.parts["test"].rows[:, 1] // 32 + board.parts["test"].rows[:, 2] // 32) % 2 == 1).all()


def test_a_series_is_usable_where_one_of_its_dates_is() -> None:
    usable = np.zeros((5, 1, 3), bool)
    usable[1, 0, 0] = usable[2, 0, 1] = usable[4, 0, 2] = True
    assert np.argwhere(_series(usable, 2)).tolist() == [[0, 0, 0], [2, 0, 1]], "of five dates the last makes no pair"
