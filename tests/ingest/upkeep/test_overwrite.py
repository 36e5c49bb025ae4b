"""Z12 and Z16: `--overwrite` swaps in a cube that is whole and touches nothing else; `gc` cleans what kills left."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import ingest.run.task as making
import ingest.upkeep.overwrite as overwriting
from cli.main import main
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.shard import fill_shard
from ingest.upkeep.overwrite import overwrite
from zarr_store.errors import InvalidInput, Locked
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube

from .. import growing

NAME = growing.NAME


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Plan, Plan]:
    """Of the cube that is there, and of the one that is to be."""
    scenes = [growing.scene(tmp_path / "scenes", day) for day in (10, 12)]
    return growing.plan_of(scenes[:1]), growing.plan_of(scenes)


@pytest.fixture
def cube(tmp_path: Path, plans: tuple[Plan, Plan], local_client: Any) -> Path:
    path = tmp_path / "out" / "cube.zarr"
    run(plans[0], path, client=local_client)
    return path


def names(cube: Path) -> list[str]:
    return sorted(entry.name for entry in cube.parent.iterdir())


def test_the_command_swaps_when_the_new_cube_is_whole(
    cube: Path, plans: tuple[Plan, Plan], tmp_path: Path, local_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(plans[1].to_json())
    ask = ["ingest", str(tmp_path / "plan.json"), str(cube), "--allow-local", str(tmp_path)]
    ask += ["--scheduler", local_client.scheduler.address]
    assert main(ask) == 2, "another cube is not overwritten unasked"
    assert main([*ask, "--overwrite", "--append"]) == 2
    # stopped before it is whole: the old cube stays, and is what readers find
    old = growing.tree(cube)
    assert main([*ask, "--overwrite", "--limit", "1"]) == 0
    assert growing.tree(cube) == old
    assert len(names(cube)) == 2
    capsys.readouterr()
    assert main([*ask, "--overwrite", "--report", str(tmp_path / "r.html")]) == 0, capsys.readouterr().err
    assert names(cube) == ["cube.zarr"]
    run(plans[1], tmp_path / "fresh.zarr", client=local_client)
    assert growing.tree(cube) == growing.tree(tmp_path / "fresh.zarr")
    assert not (cube / "_terrashard" / "lock.json").exists()
    assert f"{cube}: " in capsys.readouterr().out


def test_a_scene_that_is_lost_leaves_the_old_cube(
    cube: Path, plans: tuple[Plan, Plan], tmp_path: Path, local_client: Any
) -> None:
    old = growing.tree(cube)
    lost = next((tmp_path / "scenes").glob("S2_D12*")) / "red.tif"
    kept = lost.read_bytes()
    lost.write_text("<html>log in</html>")
    report = overwrite(plans[1], cube, client=local_client)
    assert report.partial, "the fault did not happen"
    assert growing.tree(cube) == old
    lost.write_bytes(kept)
    assert overwrite(plans[1], cube, client=local_client).exit_code == 0
    assert len(open_cube(cube).spec(NAME).times) == 2


@pytest.mark.parametrize(
    ("at", "atomic"),
    [
        ("before the swap", True),
        ("after the swap", True),
        ("half removed", True),
        ("between", False),
        ("after the swap", False),
    ],
)
def test_dying_around_the_swap_loses_no_cube(
    cube: Path, plans: tuple[Plan, Plan], local_client: Any, monkeypatch: pytest.MonkeyPatch, at: str, atomic: bool
) -> None:
    died: list[str] = []

    class Died(BaseException):
        pass

    def die(name: str) -> None:
        if name == at:
            died.append(name)
            raise Died

    real = os.rename

    def rename(source: Any, target: Any) -> None:
        real(source, target)
        if at == "between" and str(target).endswith(".old.overwrite"):
            die("between")

    def remove(folder: Path) -> None:
        (folder / "zarr.json").unlink()
        die("half removed")

    monkeypatch.setattr(overwriting, "crashpoint", die)
    if at == "half removed":
        monkeypatch.setattr(shutil, "rmtree", remove)
    if not atomic:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Died):
        overwrite(plans[1], cube, client=local_client)
    assert died == [at]
    # as a killed process leaves it: with the lock of somebody who is dead in the cube that was old
    found = [path for path in cube.parent.iterdir() if (path / "zarr.json").exists()]
    assert {open_cube(path).provenance["plan"] for path in found} >= {plans[1].digest}, "the new cube is there"
    monkeypatch.undo()
    seen: list[Any] = []

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        seen.append(task.index)
        return fill_shard(task, *args, **more)

    monkeypatch.setattr(making, "fill_shard", fill)
    report = overwrite(plans[1], cube, client=local_client)
    assert report.exit_code == 0
    assert not seen, "nothing is read again"
    assert names(cube) == ["cube.zarr"]
    assert open_cube(cube).provenance["plan"] == plans[1].digest


def test_z12_what_is_not_our_cube_is_refused_but_an_empty_folder(
    cube: Path, plans: tuple[Plan, Plan], tmp_path: Path, local_client: Any
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "link").symlink_to(cube)
    broken = tmp_path / "broken"
    shutil.copytree(cube, broken)
    (broken / "zarr.json").write_text("{")
    for name, words in (
        ("file", "a file"),
        ("folder", "not a terrashard cube"),
        ("link", "a link"),
        ("broken", "not a terra"),
    ):
        before = growing.tree(tmp_path)
        with pytest.raises(InvalidInput, match=words):
            overwrite(plans[1], tmp_path / name, client=local_client)
        assert growing.tree(tmp_path) == before
    with pytest.raises(InvalidInput, match="in a bucket"):
        overwrite(plans[1], "s3://bucket/cube", client=local_client)
    with CubeLock(cube, "somebody"), pytest.raises(Locked, match="somebody"):
        overwrite(plans[1], cube, client=local_client)
    (tmp_path / "empty").mkdir()
    assert overwrite(plans[1], tmp_path / "empty", client=local_client).exit_code == 0
    assert open_cube(tmp_path / "empty").provenance["plan"] == plans[1].digest


def test_an_icechunk_cube_can_take_the_place_of_a_folder(
    cube: Path, plans: tuple[Plan, Plan], local_client: Any
) -> None:
    pytest.importorskip("icechunk")
    overwrite(plans[1], cube, client=local_client, config=IngestConfig(store="icechunk"))
    assert (cube / "_terrashard" / "store.json").exists()
    assert names(cube) == ["cube.zarr"]
    assert len(open_cube(cube).ledger(NAME).rows()) == len(plans[1].tasks)


def test_z16_gc_shows_and_removes_what_is_old_and_nobodys(cube: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = growing.tree(cube)
    ago = time.time() - 30 * 3600
    old = [cube.parent / ".cube.zarr.ab12.partial" / "x", cube / NAME / "reflectance" / ".0.zz.partial"]
    young = [cube.parent / ".cube.zarr.cd34.partial" / "x", cube / NAME / ".young.partial"]
    foreign = [cube.parent / ".other.zarr.ab12.partial" / "x"]
    held = cube.parent / ".cube.zarr.ef56.overwrite"
    shutil.copytree(cube, held)
    for path in (*old, *young, *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    with CubeLock(held, "a run"):
        for path in (*old, old[0].parent, *foreign, foreign[0].parent, held, *held.rglob("*")):
            os.utime(path, (ago, ago))
        assert main(["gc", str(cube)]) == 0
        out = capsys.readouterr().out
        assert "3 leftovers" in out
        assert "would be removed" in out
        assert str(old[1]) in out
        assert all(path.exists() for path in (*old, *young, held)), "it only shows"
        assert main(["gc", str(cube), "--delete"]) == 0
        assert "2 leftovers, 10 bytes, removed" in capsys.readouterr().out
        assert held.exists(), "a run holds it"
    assert not old[0].parent.exists()
    assert all(path.exists() for path in (*young, *foreign))
    assert main(["gc", str(cube), "--delete", "--older-than", "0"]) == 0
    assert sorted(names(cube)) == [".other.zarr.ab12.partial", "cube.zarr"]
    assert growing.tree(cube) == whole, "nothing of the cube itself"
    capsys.readouterr()
    with CubeLock(cube, "a run"):
        assert main(["gc", str(cube), "--delete"]) == 5
    assert main(["gc", "s3://bucket/cube"]) == 2
    assert "whole or absent" in capsys.readouterr().err
