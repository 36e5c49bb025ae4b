"""Finding scenes and keeping what was found; a simulated world that serves itself."""

from __future__ import annotations

import datetime as dt
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingest.simulate import SimulateConfig, simulate

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dates = (dt.date(2021, 8, 8), dt.date(2022, 4, 20))
    config = SimulateConfig(tiles=1, tile_px=64, overlap_px=0, dates=dates, radar_dates=(dt.date(2022, 4, 18),))
    return simulate(tmp_path_factory.mktemp("w") / "world", config).path


@pytest.mark.parametrize("name", ["items.json", "items.parquet"])
def test_what_was_found_is_a_source_again(run: Run, world: Path, tmp_path: Path, name: str) -> None:
    collection = ("--collection", "sentinel-2-l2a")
    found = run("search", world / "catalog.json", *collection, "-o", tmp_path / name, "--json")
    assert found.code == 0, found.err
    assert found.json["count"] == 2
    assert [path.name for path in tmp_path.iterdir()] == [name], "no half-written file is left"
    again = run("search", tmp_path / name, *collection, "--allow-local", world, "--json")
    assert again.code == 0, again.err
    assert again.json["scenes"] == found.json["scenes"]


def test_search_says_one_line_a_scene(run: Run, world: Path) -> None:
    outcome = run("search", world / "catalog.json", "--collection", "sentinel-2-l2a", "--datetime", "2022")
    assert outcome.code == 0
    scene, count = outcome.out.splitlines()
    assert scene.startswith("2022-04-20")
    assert "33TWL" in scene
    assert "offset -1000" in scene
    assert count == "1 scenes"


def test_items_are_written_as_json_or_parquet_only(run: Run, world: Path, tmp_path: Path) -> None:
    outcome = run("search", world / "catalog.json", "-o", tmp_path / "items.csv")
    assert outcome.code == 2
    assert ".json or .parquet" in outcome.error_line()
    assert list(tmp_path.iterdir()) == []


def test_simulating_twice_writes_once(run: Run, tmp_path: Path, snapshot: Callable[[Path], Any]) -> None:
    command = ("simulate", tmp_path / "w", "--set", "tiles=1", "--set", "tile_px=64", "--set", "overlap_px=0")
    first = run(*command, "--json")
    assert first.code == 0, first.err
    assert first.json["created"] is True
    before = snapshot(tmp_path)
    assert run(*command, "--json").json["created"] is False
    assert snapshot(tmp_path) == before


def test_serving_until_interrupted(world: Path) -> None:
    settings = ["--set", "tiles=1", "--set", "tile_px=64", "--set", "overlap_px=0"]
    settings += ["--set", 'dates=["2021-08-08", "2022-04-20"]', "--set", 'radar_dates=["2022-04-18"]']
    command = [sys.executable, "-m", "cli.main", "simulate", str(world), "--serve", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            if line.startswith("STAC API"):
                address = re.findall(r"http://127\.0\.0\.1:\d+/", line)[0]
            if line.startswith("stop with"):
                break
        assert address, process.stderr.read() if process.stderr else ""
        with urllib.request.urlopen(f"{address}search?collections=sentinel-2-l2a") as reply:
            assert len(json.load(reply)["features"]) == 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
