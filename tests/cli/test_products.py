"""Files of a finished map by `terrashard export`, with the areas of its classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from jaxtrain.config import DataConfig
from jaxtrain.data.classes import Classes
from jaxtrain.inference.maps import create_map
from jaxtrain.runs.rundir import load_card
from zarr_store import Grid

from ..jaxtrain.cube_factory import shared_run

Run = Callable[..., Any]
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (100, 100))


@pytest.fixture
def map_(tmp_path: Path) -> Path:
    """Half water, half forest, with a pixel of water in the forest and a strip without data."""
    values = np.repeat(np.array([0] * 50 + [1] * 50, np.uint8)[None], 100, axis=0)
    values[50, 80], values[:10] = 0, 255
    classes = Classes.of(DataConfig(cube="none", classes={"0": "water", "1": "forest"}))
    origin = {"run": str(tmp_path / "run"), "step": 5, "dates": ["2023-08-15"]}
    with create_map(tmp_path / "map.zarr", GRID, classes, attributes=origin) as writer:
        writer.write(0, 0, values, np.where(values == 255, 255, 90).astype(np.uint8))
    return tmp_path / "map.zarr"


def score(run: Path, matrix: list[list[int]]) -> None:
    run.mkdir()
    scores = {"split": "test", "own_data": True, "classes": ["water", "forest"], "confusion_matrix": matrix}
    (run / "evaluation.json").write_text(json.dumps(scores))


def test_a_map_becomes_files_and_areas(run: Run, map_: Path, tmp_path: Path) -> None:
    score(tmp_path / "run", [[90, 0], [10, 100]])
    done = run("export", map_, tmp_path / "m.tif", "--polygons", tmp_path / "m.parquet", "--min-area", 500, "--json")
    assert done.code == 0, done.err
    with rasterio.open(tmp_path / "m.tif") as made:
        assert made.tags(1)["class_1"] == "forest"
    table = pq.read_table(tmp_path / "m.parquet").sort_by("class")
    assert table["name"].to_pylist() == ["water", "forest"]
    assert table["area_m2"].to_pylist() == [450_000.0, 450_000.0]  # the pixel went into the forest
    assert done.json["polygons"]["merged"] == 1
    water = done.json["areas"]["classes"]["water"]
    assert water["mapped_ha"] == pytest.approx(45.01)
    assert water["area_ha"] == pytest.approx(0.9 * 45.01)  # a tenth of what is mapped as water is forest
    assert water["ci95"][0] < water["area_ha"] < water["ci95"][1]
    assert (water["users_accuracy"], water["producers_accuracy"]) == (0.9, 1.0)


def test_areas_by_samples_of_other_ground_are_warned_of(run: Run, tmp_path: Path) -> None:
    card = load_card(shared_run())
    names = list(card.classes.names)
    (tmp_path / "run").mkdir()
    shutil.copyfile(shared_run() / "model.json", tmp_path / "run/model.json")
    scores = {
        "split": "test",
        "own_data": True,
        "classes": names,
        "confusion_matrix": [[9, 1, 0], [0, 9, 0], [0, 0, 9]],
    }
    (tmp_path / "run/evaluation.json").write_text(json.dumps(scores))
    assert card.grid is not None
    for grid, other in ((card.grid, False), (GRID, True)):
        url = tmp_path / f"{other}.zarr"
        with create_map(url, grid, card.classes, attributes={"run": str(tmp_path / "run")}) as writer:
            writer.write(0, 0, np.zeros(grid.shape, np.uint8), np.full(grid.shape, 90, np.uint8))
        done = run("export", url, "--json")
        assert (done.code, done.json["areas"]["other_ground"]) == (0, other)
        assert ("test samples on other ground" in done.err) is other
        assert ("errs there as it does where the samples lie" in done.json["areas"]["assumes"]) is other


def test_without_scores_areas_are_those_of_the_map(run: Run, map_: Path) -> None:
    done = run("export", map_, "--json")
    assert done.code == 0, done.err
    assert done.json["areas"]["classes"]["forest"]["mapped_ha"] == pytest.approx(44.99)
    assert done.json["areas"]["classes"]["forest"]["area_ha"] is None
    assert "run is not known" in done.json["areas"]["why_not"]


def test_what_is_refused(run: Run, map_: Path, cube: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, words in (
        ((map_, "m.png"), ".tif file"),
        ((map_, "--polygons", "m.shp"), "*.geojson"),
        ((map_, "--min-area", "5"), "add --polygons"),
        ((map_, "--pmtiles", "m.tiles"), ".pmtiles file"),
        ((map_, "m.tif", "--bands", "red"), "is a map"),
        ((map_, "m.tif", "--time", "2023-08-15"), "one map of 1 dates"),
        ((cube, "m.tif", "--time", "0", "--polygons", "m.gpkg"), "is not a map"),
        ((cube,), "name the GeoTIFF"),
    ):
        outcome = run("export", arguments[0], *arguments[1:])
        assert (outcome.code, words in outcome.error_line()) == (2, True), outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
