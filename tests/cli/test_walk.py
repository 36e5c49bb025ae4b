"""Two walks, exactly as typed (training shortened): the README's on simulated scenes, that of a page on real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401  gives datasets .rio
import xarray as xr
from PIL import Image

Run = Callable[..., Any]

pytestmark = pytest.mark.slow

SELECTION = "--collection sentinel-2-l2a --bands blue,green,red,nir,scl --mask scl"
CATALOGUE = "../shared/data/scenes/zagreb/catalog.json"


SMALL_WORLD = ("--set", "tile_px=256", "--set", "overlap_px=32", "--set", "radar_dates=[]")
SHORT = tuple(
    word
    for text in ("run.steps=60", "run.batch_size=4", "model.width=8", "model.depth=1", "optim.warmup_steps=5",
                 "data.split.block_m=640")
    for word in ("--set", text)
)  # fmt: skip
"""A walk on less ground, with a smaller network and for fewer steps; nothing else of a command is changed."""


def commands_of(page: Path, heading: str) -> list[str]:
    """The lines of a page that a reader types, below one of its headings."""
    (section,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [" ".join(line.split()) for line in re.findall(r"^    (terrashard .*)$", section, re.MULTILINE)]


def test_the_walk_of_the_readme_as_typed(
    run: Run, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(repository / "examples", tmp_path / "examples")
    further = {"simulate": SMALL_WORLD, "train": SHORT}
    typed = [shlex.split(line)[1:] for line in commands_of(repository / "README.md", "Walkthrough")]
    said = {}
    for words in typed:
        outcome = run(*words, *further.get(words[0], ()))
        assert outcome.code == 0, f"{' '.join(words)}: {outcome.err}"
        said[words[0]] = outcome.out
    assert [words[0] for words in typed] == [
        "simulate", "plan", "ingest", "info", "train", "evaluate", "predict", "quicklook",
    ]  # fmt: skip
    assert "8 confirmed" in said["plan"]
    assert "4 shards written" in said["ingest"]
    with rasterio.open("cover_map.tif") as raster:
        assert raster.tags(1)["class_0"] == "water"
        assert len(np.unique(raster.read(1))) > 2
    assert _colours("cover.png") > 1000
    # `plan` prints the lines that the README shows, with other numbers in them
    shown = (repository / "README.md").read_text("utf-8").partition("Part of its output:\n\n")[2].partition("\n\n")[0]
    words = [line.split()[0] for line in shown.splitlines()]
    assert len(words) == 8
    assert set(words) <= {line.split()[0] for line in said["plan"].splitlines()}


@pytest.fixture
def checkout(tmp_path: Path, repository: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that looks like a checkout with the shared data beside it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(shared_data, target_is_directory=True)
    folder = tmp_path / "main"
    folder.mkdir()
    shutil.copytree(repository / "examples", folder / "examples")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.real_data
def test_the_walk_with_real_scenes_as_typed(
    run: Run, checkout: Path, repository: Path, snapshot: Callable[[Path], Any]
) -> None:
    page = commands_of(repository / "docs" / "real-scenes.md", "Walkthrough with real scenes")
    seen: list[str] = []
    configuration = tomllib.loads((checkout / "examples" / "zagreb_scl.toml").read_text())
    names = list(dict.fromkeys(configuration["data"]["classes"].values()))

    def type_in(line: str, *extra: str) -> Any:
        seen.append(line)
        return run(*shlex.split(line)[1:], *extra)

    # ---- plan: a dry run that touches nothing and says that headers win
    planned = type_in(f"terrashard plan {CATALOGUE} {SELECTION}")
    assert planned.code == 0, planned.err
    assert "10 scenes" in planned.out
    assert "the file is followed" in planned.out
    assert sorted(path.name for path in checkout.iterdir()) == ["examples"]

    # ---- ingest
    ingest = f"terrashard ingest {CATALOGUE} zagreb.zarr {SELECTION} --workers 2"
    first = type_in(ingest)
    assert first.code == 0, first.err
    assert "5 shards written" in first.out
    assert "dashboard: http://127.0.0.1:" in first.err
    assert first.err.count("file is EPSG:32633 915×915 px at 120") == 2

    # ---- info: the keys of CONTRACT, and two tiles × five dates on one grid
    facts = type_in("terrashard info zagreb.zarr", "--json").json["collections"]["sentinel-2-l2a"]
    assert facts["dims"] == {"time": 5, "band": 4, "y": 1749, "x": 915}
    assert facts["bands"] == ["blue", "green", "red", "nir"]
    assert (facts["dtype"], facts["crs"]) == ("uint16", "EPSG:32633")
    assert facts["transform"] == [120, 0, 499_980, 0, -120, 5_200_080]
    assert [time[:10] for time in facts["times"]] == [f"2023-08-{day}" for day in (10, 13, 15, 18, 20)]
    assert len(set(facts["items"])) == 10
    assert (facts["complete"], facts["shards_done"], facts["shards_total"]) == (True, 5, 5)
    assert facts["resampled_share"] == pytest.approx(0.5, abs=0.01)
    assert len(facts["offset_verdicts"]) == 10
    assert facts["missing_share"] == 0
    assert 0.6 < facts["observed_share"] < 0.75
    assert 0.2 < facts["masked_share"] < 0.3
    cube = xr.open_zarr("zagreb.zarr", group="sentinel-2-l2a")
    assert cube.rio.crs.to_epsg() == 32633
    assert set(np.unique(cube.status)) == {0, 1, 2}
    assert np.array_equal(cube.status == 0, cube.source_item == -1)

    # ---- the same command again changes nothing and says so
    before = snapshot(checkout / "zagreb.zarr")
    again = type_in(ingest)
    assert again.code == 0
    assert "nothing to do" in again.out
    assert snapshot(checkout / "zagreb.zarr") == before
    status = type_in("terrashard status zagreb.zarr", "--json").json
    assert status["complete"] is True
    assert status["collections"]["sentinel-2-l2a"]["unfinished"] == []
    assert type_in("terrashard verify zagreb.zarr").code == 0

    # ---- train, shortened; the same command again has nothing left to do
    train = "terrashard train examples/zagreb_scl.toml --out runs/zagreb"
    small = ("run.steps=40", "run.batch_size=4", "optim.warmup_steps=4", "model.width=8", "model.depth=1")
    short = (*(word for text in small for word in ("--set", text)), "--json")
    trained = type_in(train, *short)
    assert trained.code == 0, trained.err
    assert trained.json["steps"] == 40
    assert (checkout / "runs" / "zagreb" / "report.html").stat().st_size > 10_000
    assert type_in(train, *short).json["resumed_from"] == 40

    # ---- evaluate: on other ground
    scores = type_in("terrashard evaluate runs/zagreb", "--json").json
    promised = {
        "accuracy",
        "macro_f1",
        "miou",
        "per_class",
        "confusion_matrix",
        "classes",
        "samples",
        "seconds",
        "split",
    }
    assert promised <= set(scores)
    assert scores["split"] == "test"
    assert scores["classes"] == names
    assert np.shape(scores["confusion_matrix"]) == (len(names), len(names))
    assert 0.5 < scores["accuracy"] <= 1, "vegetation alone is about two thirds"
    assert scores["accuracy"] == pytest.approx(
        np.trace(scores["confusion_matrix"]) / np.sum(scores["confusion_matrix"])
    )

    # ---- predict: a map on the cube's grid that GDAL opens with colours and class names
    predicted = type_in("terrashard predict runs/zagreb zagreb.zarr zagreb_map.zarr --cog zagreb_map.tif")
    assert predicted.code == 0, predicted.err
    with rasterio.open("zagreb_map.tif") as raster:
        assert (raster.crs.to_epsg(), raster.shape, raster.nodata) == (32633, (1749, 915), 255)
        assert list(raster.transform)[:6] == facts["transform"][:6]
        assert raster.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        assert [raster.tags(1)[f"class_{value}"] for value in range(len(names))] == names
        palette = raster.colormap(1)
        assert len({palette[value] for value in range(len(names))}) == len(names)
        classes = raster.read(1)
    sidecar = [line.strip() for line in Path("zagreb_map.tif.aux.xml").read_text().splitlines() if "<Category>" in line]
    assert sidecar == [f"<Category>{name}</Category>" for name in names]
    stored = xr.open_zarr("zagreb_map.zarr", mask_and_scale=False)["class"].to_numpy()
    np.testing.assert_array_equal(classes, stored)
    in_swath = (cube.status > 0).any("time").to_numpy()
    np.testing.assert_array_equal(classes != 255, in_swath)

    # ---- quicklook: pictures that show something
    assert type_in("terrashard quicklook zagreb.zarr zagreb.png").code == 0
    assert type_in("terrashard quicklook zagreb_map.zarr zagreb_map.png").code == 0
    assert _colours("zagreb.png") > 10_000
    assert _colours("zagreb_map.png") >= len(np.unique(stored))
    assert [line for line in page if line not in seen] == [], "the page has a command that was not typed here"
    assert len(page) == 7


def _colours(path: str) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24) or ())
