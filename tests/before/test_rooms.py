"""Files of release 0.1.0, made before the code moved into rooms, open and mean the same today.

`rooms.tar.gz` holds a plan, a cube with a label layer, a sample store, a training run of 8 steps, its scores and the
map that it drew. They were made from two simulated scenes of 128² pixels (`/srv/before/world`, which is not kept).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cli.main import main

REFLECTANCE = "afe8b662d55438203d1cbe35c9e0f0fe18ccf9c523e32f43ab811c65135ce46a"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(Path(__file__).parent / "rooms.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A command with `--json`: its exit code and its document."""

    def call(*arguments: object) -> tuple[int, Any]:
        capfd.readouterr()
        code = main([*map(str, arguments), "--json"])
        out = capfd.readouterr()
        assert code == 0, out.err
        return code, json.loads(out.out)

    return call


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array[...]).tobytes()).hexdigest()


def test_a_cube_of_before_is_complete_and_whole(before: Path, run: Callable[..., Any]) -> None:
    _, info = run("info", before / "cube.zarr")
    assert info["collections"]["sentinel-2-l2a"]["complete"] is True
    assert info["collections"]["sentinel-2-l2a"]["bands"] == ["blue", "green", "red", "nir"]
    _, checked = run("verify", before / "cube.zarr")
    assert checked["checked_shards"] == 2
    assert checked["damage"] == []
    assert _digest(zarr.open_array(before / "cube.zarr/sentinel-2-l2a/reflectance", mode="r")) == REFLECTANCE


def test_a_plan_of_before_asks_for_the_same_shards(before: Path) -> None:
    from ingest import Plan

    plan = Plan.load(before / "plan.json")
    kept = json.loads((before / "plan.json").read_text())
    assert len(plan.tasks) == 2
    assert json.loads(plan.to_json()) == kept
    ledger = (before / "cube.zarr/_terrashard").rglob("*.json")
    rows = [json.loads(path.read_text()) for path in ledger if "ledger" in str(path)]
    assert {task.key for task in plan.tasks} == {row["key"] for row in rows if "key" in row}


@pytest.mark.usefixtures("figures_unpainted")
def test_a_run_of_before_has_the_scores_and_the_map_it_had(
    before: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    then = json.loads((before / "evaluation_all.json").read_text())
    # the cube is the run's own, wherever it lies, so it keeps its split: all parts together are what was evaluated then
    total = np.zeros_like(then["confusion_matrix"])
    for part in ("train", "validation", "test"):
        _, now = run("evaluate", before / "run", "--data", before / "cube.zarr", "--split", part)
        assert (now["classes"], now["own_data"], now["split"]) == (then["classes"], True, part)
        total += np.array(now["confusion_matrix"])
    # another release of JAX may round a pixel at the border of two classes otherwise
    assert abs(total - np.array(then["confusion_matrix"])).sum() <= 20
    run("predict", before / "run", before / "cube.zarr", tmp_path / "map.zarr")
    was = zarr.open_array(before / "map.zarr/class", mode="r")
    new = zarr.open_array(tmp_path / "map.zarr/class", mode="r")
    assert len(np.unique(was[...])) > 1
    assert (np.asarray(was[...]) != np.asarray(new[...])).sum() <= 10


@pytest.mark.usefixtures("figures_unpainted")
def test_a_run_of_before_goes_on(before: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(before / "run", folder)
    shutil.rmtree(folder / "checkpoints" / "00000008")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("/srv/before/cube.zarr", str(before / "cube.zarr")))
    (tmp_path / "train.toml").write_text(config.read_text())
    then = _losses(before / "run")
    run("train", tmp_path / "train.toml", "--out", folder, "--resume")
    now = _losses(folder)
    assert sorted(now) == sorted(then) == list(range(1, 9))
    np.testing.assert_allclose([now[step] for step in range(5, 9)], [then[step] for step in range(5, 9)], rtol=1e-4)


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_a_sample_store_of_before_opens(before: Path) -> None:
    from zarr_store.samples import open_samples

    store = open_samples(before / "samples.zarr")
    assert store.spec.classes == ("Forest", "River")
    assert len(store.names()) == 12
