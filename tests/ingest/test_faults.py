"""The table in docs/faults.md is complete and every test that it names is there; and faults of no other file."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

from ingest.request.config import IngestConfig
from ingest.run.cluster import open_cluster
from ingest.run.loop import run
from zarr_store.errors import AccessError

from .growing import plan_of, scene, tree

ROWS = [
    *(f"R{n:02}" for n in range(1, 43)),
    *(f"S{n:02}" for n in range(1, 19)),
    *(f"P{n:02}" for n in range(1, 63)),
    *(f"Z{n:02}" for n in range(1, 36)),
    *(f"D{n:02}" for n in range(1, 17)),
    *(f"X{n:02}" for n in range(1, 9)),
    *(f"C{n:02}" for n in range(1, 16)),
    *(f"Y{n:02}" for n in range(1, 124)),
    *(f"H{n:02}" for n in range(1, 35)),
    *(f"L{n:02}" for n in range(1, 11)),
]
FIRST = {
    "R01", "R05", "R12", "S04", "S13", "Z01", "Z02", "Z04", "Z05", "Z06", "Z07", "D15",
    "R02", "R03", "R06", "S01", "S03", "S15", "Z14", "D03",
}  # fmt: skip
"""Rows that may not be without a test."""


def test_the_table_is_complete_and_its_tests_exist(repository: Path) -> None:
    table: dict[str, str] = {}
    for line in (repository / "docs" / "faults.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| ([RSPZDXCYHL]\d{2,3}) \|", line):
            assert found[1] not in table, f"{found[1]} is there twice"
            table[found[1]] = line
    assert list(table) == ROWS
    there = {
        f"{path.stem}::{node.name}"
        for folder in ("ingest", "zarr_store", "cli", "jaxtrain")
        for path in (repository / "tests" / folder).rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    for row, line in table.items():
        named = re.findall(r"`(test_\w+::test_\w+)`", line)
        assert set(named) <= there, f"{row} names {sorted(set(named) - there)}"
        assert named or (row not in FIRST and "no test" in line), f"{row} has no test and does not say so"


def test_z16_what_a_killed_writer_left_is_swept_away(tmp_path: Path, local_client: Any) -> None:
    plan, cube = plan_of([scene(tmp_path / "s", 1)]), tmp_path / "cube.zarr"
    run(plan, cube, client=local_client)
    before = tree(cube)
    stray = [cube / ".zarr.json.1.partial", cube / "_terrashard" / "ledger" / "x.partial"]
    for path in stray:
        path.write_bytes(b"half")
    assert tree(cube) != before
    assert run(plan, cube, client=local_client).written == ()
    assert not any(path.exists() for path in stray)
    assert tree(cube) == before


def test_z13_a_read_only_disk_is_named_before_a_pixel_is_read(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, disk = plan_of([scene(tmp_path / "s", 1)]), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        run(plan, disk / "begun.zarr", client=local_client, config=IngestConfig(limit=1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (disk / "probe").touch()
        monkeypatch.setattr("ingest.run.task.fill_shard", lambda *_, **__: pytest.fail("a pixel was read"))
        for cube in ("fresh.zarr", "begun.zarr"):
            with pytest.raises(AccessError, match=f"{cube}.*Read-only file system.*permissions"):
                run(plan, disk / cube, client=local_client)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_d10_a_taken_port_gives_another_and_the_link_is_right() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            with open_cluster(IngestConfig(workers=1, dashboard=f":{port}")) as client:
                link = client.dashboard_link
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/status", link)
        assert found, link
        assert int(found[1]) != port


@pytest.mark.parametrize("name", ["with space", "mit Ümläut 山"])
def test_c07_odd_folders_work(tmp_path: Path, local_client: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    plan = plan_of([scene(tmp_path / name / "s", 1)])
    (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / name)
    assert run(plan, "cube.zarr", client=local_client).exit_code == 0
    assert (tmp_path / name / "cube.zarr" / "zarr.json").is_file()
