"""A cube that somebody else made: no command reads, writes or deletes outside its folder (FAULTS X01, X02)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

CONFIG = """
[data]
cube = "{cube}"
collection = "sentinel-2-l2a"
bands = ["red"]
label = "scl"
patch = 16
[data.classes]
4 = "vegetation"
5 = "bare"
[run]
steps = 1
"""

COMMANDS: dict[str, tuple[Any, ...]] = {
    "status": ("status", "CUBE"),
    "info": ("info", "CUBE"),
    "verify": ("verify", "CUBE"),
    "verify sources": ("verify", "CUBE", "--sources"),
    "repair": ("repair", "CUBE"),
    "retry-failed": ("retry-failed", "CUBE"),
    "audit": ("audit", "CUBE"),
    "append": ("ingest", "nothing.json", "CUBE", "--append"),
    "gc": ("gc", "CUBE", "--delete", "--older-than", "0"),
    "labels": ("labels", "CUBE", "LABELS", "--attribute", "class"),
    "train": ("train", "CONFIG", "--out", "RUN"),
    "quicklook": ("quicklook", "CUBE", "PICTURE"),
}

_watched: list[str] = []
_seen: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watched and event in ("open", "os.scandir", "os.listdir", "os.remove", "os.rename", "os.mkdir", "os.rmdir"):
        text = str(args[0])
        if "victim" in text:
            _seen.append(f"{event} {text}")


sys.addaudithook(_hook)


@pytest.fixture
def victim(cube: Path, tmp_path: Path) -> Path:
    """A folder beside the cube that has whatever would be looked for there."""
    folder = tmp_path / "victim"
    shutil.copytree(cube, folder / "deep")
    shutil.copytree(cube / "_terrashard", folder / "deep" / "ledger", dirs_exist_ok=True)
    for path in list((folder / "deep" / "ledger").rglob("*.json")):
        path.write_text("somebody's file")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def typed(command: tuple[Any, ...], cube: Path, tmp_path: Path) -> list[Any]:
    config, labels = tmp_path / "train.toml", tmp_path / "labels.geojson"
    config.write_text(CONFIG.format(cube=cube))
    labels.write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    places = {"CUBE": cube, "CONFIG": config, "RUN": tmp_path / "run", "LABELS": labels, "PICTURE": tmp_path / "a.png"}
    return [places.get(word, word) for word in command]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("how", ["../../../victim/deep", "link"])
def test_no_command_leaves_the_folder_of_a_cube(
    run: Run, cube: Path, victim: Path, tmp_path: Path, name: str, how: str
) -> None:
    if how == "link":
        shutil.move(cube / "_terrashard", victim / "kept")
        (cube / "_terrashard").symlink_to(victim / "kept")
        shutil.move(cube / "sentinel-2-l2a", victim / "group")
        (cube / "sentinel-2-l2a").symlink_to(victim / "group")
    else:
        root = json.loads((cube / "zarr.json").read_text())
        root["attributes"]["terrashard"]["collections"] = [how]
        (cube / "zarr.json").write_text(json.dumps(root))
    before = contents(victim)
    words = typed(COMMANDS[name], cube, tmp_path)
    _seen.clear()
    _watched.append(name)
    try:
        outcome = run(*words)
    finally:
        _watched.clear()
    if name == "gc" and how != "link":  # it looks for leftovers by their names alone, and opens no collection
        assert outcome.code == 0
    else:
        assert outcome.code == 6, outcome.err
        assert ("is a link" if how == "link" else "names a collection") in outcome.error_line()
    assert contents(victim) == before
    assert [one for one in _seen if "cube" not in one] == []
    assert "Traceback" not in outcome.err
