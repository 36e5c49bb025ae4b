"""Short forms of the recipes in `examples/` on real data, by the commands that a user types.

The floors lie above what a trainer reaches that does not learn from pixels and their surroundings, and well below what
these short runs reach. The whole recipes are measured by `benchmarks/accuracy.py`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main

ROOT = Path(__file__).resolve().parents[3]
EACH = 240
"""Patches of each class."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def settings(store: Path, **values: object) -> list[str]:
    given = {"data.cube": store, **{name.replace("__", "."): value for name, value in values.items()}}
    return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def halves(shared_data: Path, tmp_path: Path) -> list[Path]:
    """Two folders of patches that share no half-degree cell: every other cell of a chessboard."""
    source = shared_data / "patches" / "eurosat_rgb"
    with (source / "coordinates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folders = [tmp_path / "here", tmp_path / "elsewhere"]
    kept: list[list[dict[str, str]]] = [[], []]
    for row in rows:
        cell = np.floor(2 * float(row["longitude"])) + np.floor(2 * float(row["latitude"]))
        side, name = int(cell) % 2, row["label"]
        if sum(other["label"] == name for other in kept[side]) < (EACH, EACH // 4)[side]:
            kept[side].append(row)
            target = folders[side] / name / row["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source / name / row["file"])
    for folder, mine in zip(folders, kept, strict=True):
        with (folder / "coordinates.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(mine)
    return folders


def test_patches_of_unseen_cells_are_told_apart(
    halves: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = [tmp_path / f"{folder.name}.zarr" for folder in halves]
    for folder, store in zip(halves, stores, strict=True):
        report = run(capsys, "samples", str(folder), str(store))
        assert len(report["classes"]) == 5
    short = settings(
        stores[0], data__jitter=0.05, data__zoom=0, model__width=12, model__blocks="[1, 1, 1]", model__turns="false",
        optim__warmup_steps=30, optim__ema=0.95, run__steps=120, run__batch_size=32, run__evaluate_every=120,
        run__checkpoint_every=120,
    )  # fmt: skip
    run(capsys, "train", str(ROOT / "examples/eurosat.toml"), "--out", str(tmp_path / "run"), *short)
    own = run(capsys, "evaluate", str(tmp_path / "run"))
    assert own["leakage"]["kind"] == "cells"
    assert own["accuracy"] > 0.75  # one in five by chance
    # another store with the same classes, in cells that hold none of the training's
    other = run(capsys, "evaluate", str(tmp_path / "run"), "--data", str(stores[1]))
    assert other["samples"] == 5 * (EACH // 4)
    assert other["accuracy"] > 0.75
    assert min(row["recall"] for row in other["per_class"].values()) > 0.3


def test_crops_of_unseen_squares_are_told_apart(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, store = shared_data / "hyperspectral" / "Indian_pines_corrected.npy", tmp_path / "pines.zarr"
    labels = str(scene.with_name("Indian_pines_gt.npy"))
    assert run(capsys, "samples", str(scene), str(store), "--labels", labels)["samples"] == 10_249
    short = settings(
        store, data__patch=7, model__width=24, model__blocks="[1]", model__turns="false", optim__warmup_steps=20,
        optim__learning_rate=0.01, run__steps=250, run__evaluate_every=250, run__checkpoint_every=250,
    )  # fmt: skip
    run(capsys, "train", str(ROOT / "examples/indian_pines.toml"), "--out", str(tmp_path / "run"), *short)
    scores = run(capsys, "evaluate", str(tmp_path / "run"))
    assert scores["leakage"]["kind"] == "checkerboard"
    # the nearest neighbour among 30 principal components is right for 64 % (../shared/data/README.md)
    assert scores["accuracy"] > 0.70
    assert scores["average_accuracy"] > 0.5
