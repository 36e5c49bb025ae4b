"""Every labelled pixel of held-out ground is judged, and every class is counted where it is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain import TrainEvent, evaluate, train
from jaxtrain.data import statistics
from jaxtrain.data.counting import count_classes
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.data.windows import Windows
from jaxtrain.evaluation.scores import select_data
from jaxtrain.prepare import absent_classes, prepare
from jaxtrain.runs.rundir import CARD, load_card
from zarr_store.errors import InvalidInput, NothingFound

from ..cube_factory import labelled_cube, tiny_config
from ..sample_factory import make_samples

NAMES = {"4": "land", "5": "rim", "6": "water"}


def config_of(cube: Any, classes: dict[str, str] | None = None, **data: Any) -> Any:
    split = {"block_m": 320, "validation": 0.25, "test": 0.25, **data.pop("split", {})}
    data = {"cube": cube, "classes": NAMES if classes is None else classes, "split": split, "augment": False, **data}
    return tiny_config("", data=data, model={"name": "mlp", "width": 4, "depth": 1, "dropout": 0.0},
                       run={"steps": 2, "evaluate_every": 2, "checkpoint_every": 2})  # fmt: skip


def ground(height: int = 100, width: int = 90) -> np.ndarray:
    """Land and water, and a rim in the last four rows alone, which no whole window of 32 pixels reaches."""
    y, x = np.mgrid[:height, :width]
    scl = np.where((x // 12 + y // 12) % 2 == 0, 4, 6).astype(np.uint8)
    scl[96:] = 5
    return scl[None]


def judged_pixels(reader: Any, windows: Windows) -> np.ndarray:
    """Count the labels of some windows, one by one."""
    counted = np.zeros(256, np.int64)
    for row in windows.rows:
        counted += np.bincount(reader.read(row[None])["label"].ravel(), minlength=256)
    return counted[:3]


@pytest.fixture(scope="module")
def rimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube that windows do not divide, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("rimmed")
    labelled_cube(folder / "cube.zarr", ground())
    heard: list[TrainEvent] = []
    train(config_of(str(folder / "cube.zarr"), {**NAMES, "60": "crop"}), folder / "run", on_event=heard.append)
    (folder / "heard.json").write_text(json.dumps([e.message for e in heard if e.kind == "warning"]))
    return folder


def test_the_parts_hold_every_labelled_pixel_once(rimmed: Path) -> None:
    config = config_of(str(rimmed / "cube.zarr"))
    card, ready = prepare(config, open_training_data(config.data.cube), None)
    scl = ground()[0]
    seen = sum(judged_pixels(ready.reader, ready.plan.parts[part]) for part in PARTS)
    assert seen.tolist() == [int((scl == value).sum()) for value in (4, 5, 6)]
    blocks = ready.plan.blocks
    of_block = blocks.parts.repeat(blocks.block[0], axis=0).repeat(blocks.block[1], axis=1)[:100, :90]
    for code, part in enumerate(PARTS):
        expected = [int(((scl == value) & (of_block == code)).sum()) for value in (4, 5, 6)]
        assert judged_pixels(ready.reader, ready.plan.parts[part]).tolist() == expected
        known = card.statistics["class_pixels"] if part == "train" else card.statistics["held_out"][part]
        assert list(known.values()) == expected
    # beyond the edge of the grid there is no ground
    last = ready.plan.parts["train"].rows[ready.plan.parts["train"].rows[:, 1] == 96][:1]
    batch = ready.reader.read(last)
    assert batch["observed"][0, 4:].sum() == 0
    assert (batch["label"][0, 4:] == 255).all()
    assert (batch["image"][0, :, 4:] == 0).all()


def test_an_evaluation_says_what_it_covers(rimmed: Path) -> None:
    card = load_card(rimmed / "run")
    scl, split = ground()[0], card.split
    assert isinstance(split, Split)
    of_block = split.parts.repeat(split.block[0], axis=0).repeat(split.block[1], axis=1)[:100, :90]
    report = evaluate(rimmed / "run").to_dict()
    expected = {name: int(((scl == int(v)) & (of_block == 2)).sum()) for v, name in NAMES.items()}
    assert report["pixels"] == sum(expected.values()) == int((of_block == 2).sum())
    for name, pixels in expected.items():
        training = int(((scl == int({n: v for v, n in NAMES.items()}[name])) & (of_block == 0)).sum())
        assert report["coverage"][name] == {"judged": pixels, "labelled": pixels, "training": training}
    assert any("labelled crop" in line or "crop" in line for line in report["warnings"])
    # all of a cube that is smaller than a window can be judged, too
    labelled_cube(rimmed / "small.zarr", ground()[:, :20, :30], top=4_000_000.0)
    other = evaluate(rimmed / "run", data=rimmed / "small.zarr").to_dict()
    assert other["pixels"] == 600


def test_classes_that_nobody_has_are_named_when_a_run_begins(rimmed: Path) -> None:
    heard = json.loads((rimmed / "heard.json").read_text())
    assert "class 'crop' (value 60) occurs nowhere in the data: check data.classes, or leave them out" in heard


def test_thresholds_are_for_training_alone(tmp_path: Path) -> None:
    """Spots that label 14 % of their windows are judged, in blocks of their own as well."""
    scl = np.zeros((1, 256, 256), np.uint8)
    y, x = np.mgrid[:256, :256]
    even = (y // 32 + x // 32) % 2 == 0
    scl[0][even] = 4
    scl[0][~even & (y % 32 < 12) & (x % 32 < 12)] = 6
    labelled_cube(tmp_path / "c.zarr", scl)
    config = config_of(str(tmp_path / "c.zarr"), {"4": "land", "6": "spots"})
    card, ready = prepare(config, open_training_data(config.data.cube), None)
    assert card.statistics["class_pixels"]["spots"] == 0
    held_out = card.statistics["held_out"]
    assert held_out["test"]["spots"] > 0
    assert held_out["validation"]["spots"] > 0
    counts = ready.plan.split.counts()
    assert sum(counts.values()) == 64, "a block of labels that are too few to be learned has a part, too"
    assert any(line.startswith("class 'spots' has no pixel in training (") for line in absent_classes(card))
    chosen = select_data(card, open_training_data(config.data.cube), part="test")
    assert len(chosen.windows) == counts["test"]
    # and the blocks that can be learned have the parts that they have without the spots
    scl[scl == 6] = 0
    labelled_cube(tmp_path / "plain.zarr", scl)
    config = config_of(str(tmp_path / "plain.zarr"), {"4": "land", "6": "spots"})
    _, plain = prepare(config, open_training_data(config.data.cube), None)
    there = plain.plan.blocks.parts >= 0
    assert (plain.plan.blocks.parts[there] == ready.plan.blocks.parts[there]).all()


def test_ground_beside_chunks_that_were_never_written_is_judged(tmp_path: Path) -> None:
    scl = np.full((1, 192, 192), 4, np.uint8)
    labelled_cube(tmp_path / "c.zarr", scl, chunk=16, shard=16, skip_shards=[(0, i, 0) for i in range(12)])
    config = config_of(str(tmp_path / "c.zarr"), {"4": "land"})
    _, ready = prepare(config, open_training_data(config.data.cube), None)
    assert (ready.plan.parts["train"].rows[:, 2] > 0).all(), "a window with a hole is not learned"
    held_out = sum(judged_pixels(ready.reader, ready.plan.parts[part])[0] for part in PARTS[1:])
    parts = ready.plan.blocks.parts
    of_block = parts.repeat(32, axis=0).repeat(32, axis=1)
    assert (parts[:, 0] >= 1).any(), "a hole lies in held-out ground"
    assert held_out == (of_block[:, 16:] >= 1).sum()


def test_a_run_of_before_keeps_its_windows(rimmed: Path) -> None:
    """A card of release 0.1.0 knows no windows over the edge, so the order of its samples stays."""
    config = config_of(str(rimmed / "cube.zarr"), {**NAMES, "60": "crop"})
    document = json.loads((rimmed / "run" / CARD).read_text())
    assert document.pop("edges") is True
    old = type(load_card(rimmed / "run")).from_dict(document)
    _, ready = prepare(config, open_training_data(config.data.cube), old)
    for windows in ready.plan.parts.values():
        assert (windows.rows[:, 1] + 32 <= 100).all()
        assert (windows.rows[:, 2] + 32 <= 90).all()
    assert "edges" not in old.to_dict()
    # but all of its test ground is judged
    chosen = select_data(old, open_training_data(config.data.cube), part="test")
    assert len(chosen.windows) >= len(ready.plan.parts["test"])


@pytest.mark.parametrize("learn_masked", [False, True])
@pytest.mark.parametrize(("patch", "chunk"), [(32, 16), (32, 32), (16, 32), (24, 16)])
@pytest.mark.parametrize("label", ["scl", "cover"])
def test_classes_are_counted_pixel_by_pixel(
    tmp_path: Path, label: str, patch: int, chunk: int, learn_masked: bool
) -> None:
    rng = np.random.default_rng(patch + chunk)
    scl = rng.choice([4, 5, 6, 9], (2, 100, 90)).astype(np.uint8)
    status = np.ones(scl.shape, np.uint8)
    status[0, 10:40, 20:70] = 2
    status[1, 60:80, 5:30] = 0
    scl[status == 0] = 0
    cube = labelled_cube(tmp_path / "c.zarr", scl, status=status, chunk=chunk, shard=2 * chunk,
                         layer=(scl[0], {4: "land", 5: "rim", 6: "water"}))  # fmt: skip
    config = config_of(cube.url, {} if label == "cover" else NAMES, label=label, patch=patch,
                       learn_masked=learn_masked, split={"block_m": 10 * patch})  # fmt: skip
    _, ready = prepare(config, open_training_data(config.data.cube), None)
    assert isinstance(ready.reader, WindowReader)
    for part in PARTS:
        windows = ready.plan.parts[part]
        assert count_classes(ready.reader, windows, ready.classes).tolist() == (
            judged_pixels(ready.reader, windows).tolist()
        )


def test_weights_count_all_training_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that lies in none of the sampled windows is rare, not common."""
    monkeypatch.setattr(statistics, "_SAMPLED_WINDOWS", 4)
    scl = np.full((1, 256, 256), 4, np.uint8)
    scl[:, :, ::4] = 5
    scl[:, 3::16, 3::16] = 6
    labelled_cube(tmp_path / "c.zarr", scl, chunk=64, shard=256)
    config = config_of(str(tmp_path / "c.zarr"), patch=16, split={"block_m": 160})
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"class_weights": "balanced"})})
    card, ready = prepare(config, open_training_data(config.data.cube), None)
    assert card.statistics["source"] == "windows"
    assert card.statistics["pixels"] == 4 * 256
    learned = np.zeros((256, 256), bool)
    for _, y, x in ready.plan.parts["train"].rows:
        learned[y : y + 16, x : x + 16] = True
    counted = np.array([(scl[0][learned] == value).sum() for value in (4, 5, 6)])
    assert list(card.statistics["class_pixels"].values()) == counted.tolist()
    share = counted / counted.sum()
    assert card.class_weights is not None
    np.testing.assert_allclose(card.class_weights, (1 / np.sqrt(share)) / np.sqrt(share).sum(), rtol=1e-6)
    assert int(np.argmax(card.class_weights)) == 2


def test_cubes_weigh_by_their_ground_and_not_by_what_was_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_SAMPLED_WINDOWS", 4)
    urls = []
    for value, side, top in ((4, 256, 5e6), (6, 128, 4e6)):
        scl = np.full((1, side, side), value, np.uint8)
        urls.append(labelled_cube(tmp_path / f"{value}.zarr", scl, chunk=128, shard=256, top=top).url)
    config = config_of(urls, patch=16, split={"block_m": 160})
    card, ready = prepare(config, open_training_data(urls), None)
    assert card.statistics["source"] == "windows"
    number = np.bincount(ready.plan.parts["train"].rows[:, 0])
    assert number[0] > 3 * number[1] > 12
    # the band shows 100 + 300 · class
    share = number[0] / number.sum()
    np.testing.assert_allclose(card.mean, share * 1300 + (1 - share) * 1900, rtol=1e-6)
    np.testing.assert_allclose(
        card.std, 600 * np.sqrt(share * (1 - share)), rtol=1e-4
    )  # a constant band counts as spread 1


def test_classes_of_samples_that_nobody_has_are_named(tmp_path: Path) -> None:
    url = str(make_samples(tmp_path / "s.zarr", count=40, classes=("field", "lake")))
    document = json.loads((Path(url) / "zarr.json").read_text())
    assert document
    config = tiny_config("", data={"cube": url, "classes": {}, "split": {"kind": "random"}},
                         model={"name": "resnet", "depth": 10})  # fmt: skip
    card, ready = prepare(config, open_training_data(url), None)
    assert absent_classes(card) == []
    for part in PARTS:
        counts = card.statistics["class_pixels"] if part == "train" else card.statistics["held_out"][part]
        assert sum(counts.values()) == len(ready.plan.parts[part])
    lost = {**card.statistics["held_out"], "test": {"field": 8, "lake": 0}}
    without = type(card)(**{**vars(card), "statistics": {**card.statistics, "held_out": lost}})
    (line,) = absent_classes(without)
    assert line.startswith("class 'lake' has no sample in test, so nothing is known")


def two_cubes(folder: Path, one: dict[int, str], other: dict[int, str], resolution: float = 10.0) -> list[str]:
    y, x = np.mgrid[:128, :128]
    for name, names, top, size in (("a", one, 5e6, 10.0), ("b", other, 4e6, resolution)):
        pixels = np.array(list(names), np.uint8)[(x // 16 + y // 16) % len(names)]
        labelled_cube(folder / f"{name}.zarr", np.full((1, 128, 128), 4, np.uint8), layer=(pixels, names), top=top,
                      resolution=size)  # fmt: skip
    return [str(folder / "a.zarr"), str(folder / "b.zarr")]


def test_cubes_of_a_list_give_all_of_their_classes_in_any_order(tmp_path: Path) -> None:
    urls = two_cubes(tmp_path, {10: "tree", 40: "grass"}, {10: "grass", 40: "tree", 80: "water"})
    found = []
    for order in (urls, urls[::-1]):
        config = config_of(order, {}, label="cover")
        card, ready = prepare(config, open_training_data(order), None)
        counted = {name: count + sum(part[name] for part in card.statistics["held_out"].values())
                   for name, count in card.statistics["class_pixels"].items()}  # fmt: skip
        found.append(counted)
        assert sum(counted.values()) == 2 * 128**2, "no label is dropped"
        # a number means in each cube what its own layer says
        for number, url in enumerate(order):
            row = np.array([[number, 0, 0, 0]], np.int32)
            label = ready.reader.read(row)["label"][0, 0, 0]
            assert ready.classes.names[label] == ("tree" if url.endswith("a.zarr") else "grass")
        # a run that is continued has the same ones
        _, again = prepare(config, open_training_data(order), card)
        assert again.classes.names == card.classes.names
    assert found[0] == found[1]
    assert set(found[0]) == {"tree", "grass", "water"}


def test_cubes_of_a_list_whose_labels_or_pixels_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    urls = two_cubes(tmp_path / "x", {10: "tree", 40: "grass"}, {10: "grass", 40: "tree"})
    with pytest.raises(InvalidInput, match=r"value 10 of label layer 'cover' means tree in one cube and grass in"):
        prepare(config_of(urls, {"10": "tree"}, label="cover"), open_training_data(urls), None)
    urls = two_cubes(tmp_path / "y", {10: "tree", 40: "grass"}, {10: "tree", 40: "grass"}, resolution=60.0)
    for split in ({}, {"block_m": 7680.0}):  # of which one cube has only one block
        with pytest.raises(InvalidInput, match=r"b\.zarr has pixels of 60 × 60 m, .*a\.zarr of 10 × 10 m.*--resolu"):
            prepare(config_of(urls, {}, label="cover", split=split), open_training_data(urls), None)


def test_labels_that_a_model_does_not_know_are_named(tmp_path: Path) -> None:
    urls = two_cubes(tmp_path, {10: "tree", 40: "grass"}, {10: "grass", 40: "tree", 80: "water"})
    config = config_of(urls[0], {}, label="cover")
    card, _ = prepare(config, open_training_data(urls[0]), None)
    chosen = select_data(card, open_training_data(urls[1]), part=None)
    assert any(line.startswith("pixels of water in ") and "not judged" in line for line in chosen.warnings)


def test_a_part_without_a_label_is_told(tmp_path: Path) -> None:
    cube = labelled_cube(tmp_path / "c.zarr", ground()).url
    config = config_of(cube)
    card, _ = prepare(config, open_training_data(cube), None)
    labelled_cube(tmp_path / "none.zarr", np.zeros((1, 64, 64), np.uint8), top=4e6)
    with pytest.raises(NothingFound, match=r"no window of 32×32 pixels .* has any pixels that can be learned"):
        select_data(card, open_training_data(str(tmp_path / "none.zarr")), part=None)
