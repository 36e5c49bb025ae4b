"""Several cubes as one source: every window once, statistics of all ground, exact resume, each cube's own split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from jaxtrain import TrainEvent, evaluate, train
from jaxtrain.data.cubes import CubesReader, Splits
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
from jaxtrain.evaluation.scores import select_data
from jaxtrain.prepare import prepare
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import load_card
from zarr_store.errors import InvalidInput

from ..cube_factory import CLASSES, COLLECTION, make_cube, tiny_config


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two cubes of other grids, dates and brightness; pixels of a list have one size."""
    folder = tmp_path_factory.mktemp("cubes")
    make_cube(folder / "a.zarr", shape=(2, 192, 160))
    make_cube(folder / "b.zarr", shape=(1, 128, 192), seed=5, masked=False)
    return [str(folder / "a.zarr"), str(folder / "b.zarr")]


def config_of(cubes: list[str], **sections: dict[str, Any]) -> Any:
    split = {"block_m": 640, "validation": 0.2, "test": 0.2}
    return tiny_config("", **{**sections, "data": {"cube": cubes, "split": split, **sections.get("data", {})}})


def test_every_window_of_all_cubes_is_seen_once_an_epoch(cubes: list[str]) -> None:
    config = config_of(cubes)
    card, ready = prepare(config, open_training_data(config.data.cube), None)
    plan, reader = ready.plan, ready.reader
    each = [prepare(config_of([url]), open_training_data(url), None) for url in cubes]
    for part, windows in plan.parts.items():
        expected = [[number, *row] for number, (_, one) in enumerate(each)
                    for row in one.plan.parts[part].rows.tolist()]  # fmt: skip
        assert windows.rows.tolist() == expected
    rows = plan.parts["train"].rows
    assert set(rows[:, 0]) == {0, 1}
    order = ChunkOrder(0, chunk_numbers(rows, 32, (1, 32, 32)), 8, 4)
    assert sorted(order.indices(0, len(rows)).tolist()) == list(range(len(rows)))
    # batches hold what the reader of each cube gives
    chosen = rows[[0, -1, 1]]
    batch = reader.read(chosen)
    assert isinstance(reader, CubesReader)
    for i, row in enumerate(chosen):
        alone = reader.readers[row[0]].read(row[None, 1:])
        for name, array in alone.items():
            np.testing.assert_array_equal(batch[name][i], array[0])
    # statistics are those of all pixels together
    n = [one.statistics["pixels"] for one, _ in each]
    mean = np.average([one.mean for one, _ in each], axis=0, weights=n)
    square = np.average([np.square(one.std) + np.square(one.mean) for one, _ in each], axis=0, weights=n)
    np.testing.assert_allclose(card.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(card.std, np.sqrt(square - np.square(mean)), rtol=1e-6)
    counted = [one.statistics["class_pixels"]["water"] for one, _ in each]
    assert card.statistics["class_pixels"]["water"] == sum(counted)


@pytest.mark.usefixtures("shared_programs")
def test_a_run_on_two_cubes_resumes_exactly_and_is_scored_on_both(cubes: list[str], tmp_path: Path) -> None:
    config = config_of(cubes)
    train(config, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_event=kill)
    assert train(config, tmp_path / "killed").resumed_from == 5
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    card = load_card(tmp_path / "whole")
    assert isinstance(card.split, Splits)
    assert [ground.cube for ground in card.grounds] == cubes
    scores = evaluate(tmp_path / "whole").to_dict()
    each = [evaluate_alone(card, number) for number in (0, 1)]
    assert scores["samples"] == sum(each) > 0
    assert any("overlaps the ground" in line for line in scores["warnings"])
    assert (tmp_path / "whole/report.html").read_text().count("Map of the spatial split") == 2
    with pytest.raises(InvalidInput, match=r"began with 2 cubes, data.cube names 3"):
        train(config_of([*cubes, cubes[0]]), tmp_path / "whole")


def evaluate_alone(card: Any, number: int) -> int:
    one = card.of(number)
    return len(select_data(one, open_training_data(one.cube), part="test").windows)


def test_cubes_that_are_not_alike_are_refused(cubes: list[str], tmp_path: Path) -> None:
    make_cube(tmp_path / "c.zarr", bands=("blue", "green", "red"))
    make_cube(tmp_path / "d.zarr", scale=0.5, offset=-300.0)
    for name, what in (
        ("c", "bands blue, green, red, .* has bands blue, green, red, nir"),
        ("d", "band blue stored as reflectance in uint16 with scale 0.5 and offset -300, .* scale 1 and offset 0"),
    ):
        with pytest.raises(InvalidInput, match=f"{what}: the cubes of a list must be alike; ingest"):
            train(config_of([cubes[0], str(tmp_path / f"{name}.zarr")]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_list_in_a_file_is_relative_to_it(
    cubes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in cubes:
        (tmp_path / Path(url).name).symlink_to(url)
    classes = "\n".join(f'{value} = "{name}"' for value, name in CLASSES.items())
    (tmp_path / "c.toml").write_text(
        f'[data]\ncube = ["a.zarr", "b.zarr"]\ncollection = "{COLLECTION}"\npatch = 33\n[data.classes]\n{classes}\n'
    )
    assert main(["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run"), "--set", "model.depth=1"]) == 2
    assert "data.patch 33 must be a multiple" in capsys.readouterr().err
    command = ["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run"), "--set", "data.patch=32", "--set",
               "data.split.block_m=640", "--set", "model.name=mlp", "--set", "model.width=4",
               "--set", "model.depth=1", "--set", "run.steps=1",
               "--set", "run.batch_size=8", "--json"]  # fmt: skip
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["windows"]["train"] > 0
    assert [Path(g.cube).name for g in load_card(tmp_path / "run").grounds] == ["a.zarr", "b.zarr"]


def test_all_windows_of_several_other_cubes_are_scored_each_at_its_place(cubes: list[str], tmp_path: Path) -> None:
    config = config_of(cubes[:1])
    card, _ = prepare(config, open_training_data(cubes[0]), None)
    every = select_data(card, open_training_data(cubes), part=None)
    alone = [select_data(card, open_training_data(url), part=None) for url in cubes]
    assert every.url == ", ".join(cubes)
    assert every.windows.rows.tolist() == [
        [number, *row] for number, one in enumerate(alone) for row in one.windows.rows.tolist()
    ]
    assert list(every.warnings) == [line for one in alone for line in one.warnings]
    assert any("overlaps the ground" in line for line in every.warnings)
    # where each window is, in the CRS of its own cube
    places = open_training_data(cubes).places(COLLECTION, every.windows)
    apart = [open_training_data(url).places(COLLECTION, one.windows) for url, one in zip(cubes, alone, strict=True)]
    for name in ("time", "y", "x"):
        assert places[name].tolist() == [value for one in apart for value in one[name].tolist()]
    counts = [len(one.windows) for one in alone]
    assert places["cube"].tolist() == [cubes[0]] * counts[0] + [cubes[1]] * counts[1]
    # and the same pixels are read
    last = every.windows.rows[-1:]
    got, expected = every.reader.read(last), alone[1].reader.read(last[:, 1:])
    np.testing.assert_array_equal(got["image"], expected["image"])
