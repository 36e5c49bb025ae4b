"""`terrashard preview`: thumbnails of what a search found, from headers and overviews."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ingest.simulate import SimulateConfig, simulate

DATES = (dt.date(2022, 4, 20), dt.date(2022, 6, 16), dt.date(2022, 7, 24))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SimulateConfig(
        tiles=2, tile_px=128, overlap_px=32, dates=DATES, radar_dates=(dt.date(2022, 4, 18),), clouds=0.3
    )
    return simulate(tmp_path_factory.mktemp("preview") / "world", config).catalog


def test_each_date_is_drawn_under_its_share_of_clouds(world: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "found.png"
    told = run("preview", world, out, "--collection", "sentinel-2-l2a", "--json")
    assert told.code == 0, told.err
    assert [step["time"][:10] for step in told.json["steps"]] == [date.isoformat() for date in DATES]
    assert all(len(step["scenes"]) == 2 for step in told.json["steps"])
    assert [scene["collection"] for scene in told.json["scenes"]] == ["sentinel-2-l2a"] * 6
    shares = [scene["cloud_share"] for scene in told.json["scenes"]]
    assert all(0 <= share <= 1 for share in shares)
    assert told.json["steps"][0]["cloud"] == pytest.approx(np.mean(shares[:2]), abs=1e-6)
    with Image.open(out) as picture:
        assert picture.size == (told.json["width"], told.json["height"])
        assert len(picture.getcolors(1 << 24) or ()) > 200, "there must be a landscape in it"
    assert f"{DATES[0]}" in told.err


def test_no_file_of_later_dates_is_opened(
    world: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingest.raster import access

    opened: set[str] = set()
    real = access._find_file

    def noted(href: str, *arguments: Any, **more: Any) -> Any:
        opened.add(href)
        return real(href, *arguments, **more)

    monkeypatch.setattr(access, "_find_file", noted)
    told = run("preview", world, tmp_path / "one.png", "--collection", "sentinel-2-l2a", "--max", "1", "--bands", "nir")
    assert told.code == 0, told.err
    assert "4 scenes of later dates left out" in told.out
    assert opened
    assert all("20220420" in href for href in opened)


def test_radar_and_optical_scenes_lie_side_by_side(world: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    told = run("preview", world, tmp_path / "both.png", "--json", "--max", "2")
    assert told.code == 0, told.err
    assert {step["collection"] for step in told.json["steps"]} == {"sentinel-1-rtc", "sentinel-2-l2a"}


def test_a_scene_that_cannot_be_read_is_named_and_the_others_drawn(tmp_path: Path, run: Callable[..., Any]) -> None:
    config = SimulateConfig(tiles=1, tile_px=96, overlap_px=0, dates=DATES[:2], radar_dates=())
    catalog = simulate(tmp_path / "world", config).catalog
    broken = next(path for path in sorted((tmp_path / "world").rglob("*/B04.tif")) if "20220616" in str(path))
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    told = run("preview", catalog, tmp_path / "found.png", "--json")
    assert told.code == 3
    assert len(told.json["unread"]) == 1
    assert "20220616" in told.json["unread"][0]
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 100


def test_a_wrong_name_is_refused_before_anything_is_asked(tmp_path: Path, run: Callable[..., Any]) -> None:
    told = run("preview", tmp_path / "absent.json", tmp_path / "found.jpg")
    assert told.code == 2
    assert ".png" in told.error_line()


@pytest.mark.real_data
def test_the_real_scenes(zagreb: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    told = run("preview", zagreb, tmp_path / "zagreb.png", "--side", "64", "--json")
    assert told.code == 0, told.err
    shares = [round(step["cloud"], 2) for step in told.json["steps"]]
    assert shares == [0.76, 0.02, 0.01, 0.55, 0.07]
