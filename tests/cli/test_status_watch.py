"""`terrashard status --watch` beside a run, and `ingest --dry-run`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zarr_store import open_cube

Run = Callable[..., Any]
NAME = "sentinel-2-l2a"


def test_another_terminal_follows_until_the_last_shard(tmp_path: Path, make_cube: Callable[..., Any], run: Run) -> None:
    path = tmp_path / "cube.zarr"
    make_cube(path, partial=(1,))
    row = open_cube(path).ledger(NAME).get((2, 0, 0))
    assert row is not None
    open_cube(path).ledger(NAME).drop(row.index)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "status", str(path), "--watch"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.strip() == f"{NAME}: 2/3 shards, 1 partial"
    time.sleep(0.3)
    assert process.poll() is None, "a shard is pending: it goes on looking"
    open_cube(path).ledger(NAME).put(row)
    out, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert rest.strip() == f"{NAME}: 3/3 shards, 1 partial"
    assert "2 done, 1 partial, 0 failed, 0 pending of 3 shards" in out


def test_a_shard_that_its_cube_outgrew_is_pending(tmp_path: Path, make_cube: Callable[..., Any], run: Run) -> None:
    """The last shard of the time axis grows when dates are appended: its old row speaks of fewer pixels."""
    path = tmp_path / "cube.zarr"
    make_cube(path)
    ledger = open_cube(path).ledger(NAME)
    row = ledger.get((2, 0, 0))
    assert row is not None
    ledger.put(replace(row, region=replace(row.region, y1=row.region.y1 - 1)))
    counts = run("status", path, "--json").json["collections"][NAME]
    assert (counts["done"], counts["pending"], counts["complete"]) == (2, 1, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "status", str(path), "--watch"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert process.stderr.readline().strip() == f"{NAME}: 2/3 shards"
        time.sleep(0.3)
        assert process.poll() is None, "a shard is pending: it goes on looking"
        ledger.put(row)
        out, rest = process.communicate(timeout=30)
    finally:
        process.kill()
    assert rest.strip() == f"{NAME}: 3/3 shards"
    assert "3 done, 0 partial, 0 failed, 0 pending of 3 shards" in out


def test_a_dry_run_shows_the_script_and_starts_nothing(run: Run, tmp_path: Path) -> None:
    options = ("--cluster", "slurm", "--memory", "8GB", "--cluster-option", "queue=short", "--workers", "1..4")
    outcome = run("ingest", "nowhere.json", tmp_path / "c.zarr", *options, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "1..4 workers" in outcome.out
    assert "#SBATCH -p short" in outcome.out
    assert not (tmp_path / "c.zarr").exists()
    refused = run("ingest", "nowhere.json", tmp_path / "c.zarr", "--cluster", "ssh", "--dry-run")
    assert (refused.code, "--hosts" in refused.error_line()) == (2, True)
