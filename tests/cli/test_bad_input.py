"""Every bad input of a user: one clear line, the right exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from ingest.simulate import SimulateConfig, simulate

Run = Callable[..., Any]
BANDS = ("--collection", "sentinel-2-l2a", "--bands", "red,nir,scl", "--workers", "1")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tile of 96 × 96 pixels on four dates."""
    dates = (dt.date(2021, 8, 8), dt.date(2022, 4, 20), dt.date(2022, 6, 16), dt.date(2022, 7, 24))
    config = SimulateConfig(tiles=1, tile_px=96, overlap_px=0, dates=dates, radar_dates=(), clouds=0.0)
    return simulate(tmp_path_factory.mktemp("world") / "world", config).path


@pytest.fixture
def world(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(pristine, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def catalogue(world: Path) -> Path:
    return world / "catalog.json"


def nothing_new(folder: Path) -> bool:
    """Whether the folder holds what the fixtures put there, and no half-written file."""
    return sorted(path.name for path in folder.iterdir()) == ["world"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--collection", "sentinel-2-l2b"], 2, ["'sentinel-2-l2b'", "did you mean 'sentinel-2-l2a'?"]),
        (["--bands", "blue,rad"], 2, ["unknown band 'rad'", "did you mean 'red'?"]),
        (["--bands", "scl"], 2, ["at least one data band"]),
        (["--datetime", "2010"], 4, ["no item", "2010"]),
        (["--bbox", "1,2,3,4"], 4, ["bbox 1,2,3,4", "the items lie in"]),
        (["--bbox", "1,2,3"], 2, ["bbox"]),
        (["--bbox", "10,50,9.9,40"], 2, ["south must be below north"]),
        (["--query", "eo:cloud_cover<-1"], 4, ["no item"]),
        (["--datetime", "2022-09/2022-01"], 2, ["reversed"]),
        (["--crs", "EPSG:99999"], 2, ["EPSG:99999"]),
        (["--resolution", "0"], 2, ["resolution", "greater than 0"]),
        (["--mask", "sclx"], 2, ["mask", "'scl'"]),
        (["--set", "resolutoin=10"], 2, ["did you mean 'resolution'?"]),
        (["--collection", "sentinel-1-grd"], 2, ["terrain correct", "RTC"]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "ingest"])
def test_selection_that_cannot_be(
    run: Run, catalogue: Path, tmp_path: Path, command: str, arguments: list[str], code: int, words: list[str]
) -> None:
    target = [tmp_path / "cube.zarr"] if command == "ingest" else []
    outcome = run(command, catalogue, *target, *arguments)
    assert outcome.code == code, outcome.err
    line = outcome.error_line()
    for word in words:
        assert word in line
    assert nothing_new(tmp_path)


def test_all_problems_of_the_settings_in_one_line(run: Run, catalogue: Path, tmp_path: Path) -> None:
    settings = tmp_path / "world" / "bad.toml"
    settings.write_text('resolution = -1\ngrup = "item"\nbbox = [1, 2, 3, 95]\n')
    outcome = run("ingest", catalogue, tmp_path / "cube.zarr", "--config", settings)
    assert outcome.code == 2
    line = outcome.error_line()
    for word in ("bad.toml", "resolution", "did you mean 'group'?", "latitude"):
        assert word in line
    assert nothing_new(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["catalog.json", "no such file"]),
        (b'{"type": "Catalog", "id": "x", "li', ["catalog.json"]),
        (b"<html>Log in</html>", ["catalog.json"]),
        (b'{"hello": "world"}', ["catalog.json"]),
        (b"", ["catalog.json"]),
    ],
)
def test_catalogue_that_cannot_be_read(
    run: Run, catalogue: Path, tmp_path: Path, content: bytes | None, words: list[str]
) -> None:
    if content is None:
        catalogue.unlink()
    else:
        catalogue.write_bytes(content)
    outcome = run("ingest", catalogue, tmp_path / "cube.zarr", *BANDS)
    assert outcome.code == 2, outcome.err
    for word in words:
        assert word in outcome.error_line()
    assert nothing_new(tmp_path)


def test_truncated_item_is_named(run: Run, catalogue: Path, world: Path, tmp_path: Path) -> None:
    item = min((world / "sentinel-2-l2a").glob("*/*.json"))
    item.write_bytes(item.read_bytes()[:500])
    outcome = run("ingest", catalogue, tmp_path / "cube.zarr", *BANDS)
    assert outcome.code == 2, outcome.err
    assert item.name in outcome.error_line()
    assert nothing_new(tmp_path)


def test_server_that_does_not_answer(run: Run, tmp_path: Path, world: Path) -> None:
    outcome = run(
        "plan", "http://127.0.0.1:9/", "--collection", "sentinel-2-l2a", "--allow-private-hosts", "--retries", 0
    )
    assert outcome.code == 8, outcome.err
    assert "127.0.0.1:9" in outcome.error_line()
    assert nothing_new(tmp_path)


def test_unreadable_assets_are_missing_and_named_and_can_be_tried_again(
    run: Run, catalogue: Path, world: Path, pristine: Path, tmp_path: Path
) -> None:
    scenes = sorted(path.name for path in (world / "sentinel-2-l2a").iterdir() if path.is_dir())
    absent, cut, alien, sound = scenes
    folder = world / "sentinel-2-l2a"
    (folder / absent / "B04.tif").unlink()
    whole = (folder / cut / "B08.tif").read_bytes()
    (folder / cut / "B08.tif").write_bytes(whole[: len(whole) // 2])
    (folder / alien / "B04.tif").write_text("<html>403 Forbidden</html>")

    command = (
        "ingest",
        catalogue,
        tmp_path / "cube.zarr",
        *BANDS,
        "--report",
        tmp_path / "report.json",
        "--retries",
        0,
    )
    outcome = run(*command)
    assert outcome.code == 3, outcome.err
    assert "Traceback" not in outcome.err
    for scene in (absent, cut, alien):
        assert scene in outcome.out
    assert sound not in outcome.out
    missing = json.loads((tmp_path / "report.json").read_text())["missing"]
    assert sorted(name.split(",")[0] for name in missing) == sorted((absent, cut, alien))

    # never zeros that look like data: the status says missing, and no band of such a scene is used
    cube = xr.open_zarr(tmp_path / "cube.zarr", group="sentinel-2-l2a", mask_and_scale=False).load()
    items = run("info", tmp_path / "cube.zarr", "--json").json["collections"]["sentinel-2-l2a"]["items"]
    order = [items.index(scene) for scene in (absent, cut, alien, sound)]
    for lost in order[:3]:
        assert (cube.status[lost] == 3).all()
        assert (cube.reflectance[lost] == 0).all()
        assert (cube.source_item[lost] == -1).all()
    assert (cube.status[order[3]] != 3).all()
    assert (cube.reflectance[order[3]] > 0).mean() > 0.9

    status = run("status", tmp_path / "cube.zarr", "--json").json["collections"]["sentinel-2-l2a"]
    assert (status["partial"], status["done"]) == (3, 1)
    assert {m["item"] for shard in status["unfinished"] for m in shard["missing"]} == {absent, cut, alien}

    # the files come back: the same command makes just those shards again, and ends as if nothing had been
    for scene, name in ((absent, "B04.tif"), (cut, "B08.tif"), (alien, "B04.tif")):
        shutil.copy(pristine / "sentinel-2-l2a" / scene / name, folder / scene / name)
    again = run(*command)
    assert again.code == 0, again.err
    cube = xr.open_zarr(tmp_path / "cube.zarr", group="sentinel-2-l2a", mask_and_scale=False).load()
    assert 3 not in np.unique(cube.status)
    assert ((cube.reflectance > 0) == (cube.status > 0)).all()
    facts = run("info", tmp_path / "cube.zarr", "--json").json["collections"]["sentinel-2-l2a"]
    assert facts["complete"] is True
    assert "unchecked" not in [verdict["verdict"] for verdict in facts["offset_verdicts"].values()]


def _file(path: Path) -> None:
    path.write_text("my notes")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_bytes(b"\xff\xd8")


def _foreign(path: Path) -> None:
    zarr.create_group(str(path)).create_array("a", shape=(2,), dtype="u1")


@pytest.mark.parametrize("make", [_file, _folder, _foreign])
def test_target_that_is_no_cube_is_left_alone(
    run: Run, catalogue: Path, tmp_path: Path, make: Callable[[Path], None], snapshot: Callable[[Path], Any]
) -> None:
    make(tmp_path / "cube.zarr")
    before = snapshot(tmp_path)
    outcome = run("ingest", catalogue, tmp_path / "cube.zarr", *BANDS)
    assert outcome.code == 2, outcome.err
    assert "cube.zarr" in outcome.error_line()
    assert snapshot(tmp_path) == before
    for command in ("info", "status", "verify"):
        assert run(command, tmp_path / "cube.zarr").code == 2
    assert run("quicklook", tmp_path / "cube.zarr", tmp_path / "q.png").code == 2
    assert snapshot(tmp_path) == before


def _training(tmp_path: Path, cube: Path, **more: str) -> Path:
    path = tmp_path / "t.toml"
    path.write_text(
        f'[data]\ncube = "{cube}"\npatch = 32\nclasses = {{4 = "vegetation", 5 = "bare"}}\nsplit.block_m = 320\n'
        "[model]\ndepth = 2\nwidth = 4\n[run]\nbatch_size = 4\nsteps = 2\n" + "".join(more.values())
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "run.stepz=3"], ["'run.stepz'", "did you mean 'run.steps'?"]),
        (["--set", "optm.name=sgd"], ["'optm'", "did you mean 'optim'?"]),
        (["--set", "run.batch_size=0", "--set", "model.width=-2"], ["run.batch_size", "model.width"]),
        (["--set", "data.bands=['blue', 'rad']"], ["'rad'", "did you mean 'red'?"]),
        (["--set", "data.label=slc"], ["'slc'", "did you mean 'scl'?"]),
        (["--set", "data.collection=sentinel-2"], ["did you mean 'sentinel-2-l2a'?"]),
        (["--set", "model.name=unett"], ["did you mean 'unet'?"]),
        (["--set", "data.cube=nowhere.zarr"], ["nowhere.zarr does not exist"]),
        (["--set", "mesh.data=16", "--set", "run.batch_size=16"], ["16", "8"]),
        (["--set", "mesh.data=3"], ["batch_size", "mesh.data 3"]),
    ],
)
def test_training_that_cannot_be(run: Run, cube: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    outcome = run("train", _training(tmp_path, cube), "--out", tmp_path / "run", *arguments)
    assert outcome.code == 2, outcome.err
    for word in words:
        assert word in outcome.error_line()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cube.zarr", "t.toml"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train", "absent.toml", "--out", "run"), "absent.toml does not exist"),
        (("evaluate", "absent"), "absent is not a training run"),
        (("predict", "absent", "cube.zarr", "map.zarr"), "absent is not a training run"),
        (("predict", "absent", "cube.zarr", "map.zarr", "--cog", "map.png"), "--cog needs a .tif"),
        (("quicklook", "absent", "x.png"), "does not exist"),
        (("simulate", "cube.zarr"), "cube.zarr"),
        (("simulate", "new", "--set", "tiels=1"), "did you mean 'tiles'?"),
        (("demo", "--out", "cube.zarr"), "other files than those of a demo"),
        (("demo", "--out", "new", "--set", "trian.run.steps=1"), "did you mean 'train'?"),
        (("demo", "--out", "new", "--set", "simulate.tiels=1"), "did you mean 'tiles'?"),
    ],
)
def test_other_commands_on_what_is_not_theirs(
    run: Run, cube: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(cube.parent)
    outcome = run(*command)
    assert outcome.code == 2, outcome.err
    assert words in outcome.error_line()
    assert [path.name for path in cube.parent.iterdir()] == ["cube.zarr"]


def test_a_cube_is_not_mixed_with_another_selection(
    run: Run, catalogue: Path, tmp_path: Path, snapshot: Callable[[Path], Any]
) -> None:
    target = tmp_path / "cube.zarr"
    assert run("plan", catalogue, *BANDS, "-o", tmp_path / "plan.json").code == 0
    assert run("ingest", tmp_path / "plan.json", target).code == 0
    before = snapshot(target)
    other = run("ingest", catalogue, target, "--collection", "sentinel-2-l2a", "--bands", "blue,nir", "--mask", "none")
    assert other.code == 2
    assert "bands" in other.error_line()
    assert snapshot(target) == before
    fixed = run("ingest", tmp_path / "plan.json", target, "--bands", "blue")
    assert fixed.code == 2
    assert "is a plan, which fixes bands" in fixed.error_line()
    assert "nothing to do" in run("ingest", tmp_path / "plan.json", target).out
