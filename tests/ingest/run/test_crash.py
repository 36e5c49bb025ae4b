"""Dying at every durable step: the same command again ends in the bytes of a run that did not die (FAULTS Z04)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zarr_store import crash
from zarr_store.crash import crashpoint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "icechunk"])
def test_dying_at_every_step_of_making_and_growing_a_cube(tmp_path: Path, repository: Path, kind: str) -> None:
    if kind == "icechunk":
        pytest.importorskip("icechunk")
    script = Path(__file__).parents[1] / "die_everywhere.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind],
        # Arrow's allocator would start a thread of its own, and a process with threads must not fork
        env={**os.environ, "PYTHONPATH": str(repository), "JE_ARROW_MALLOC_CONF": "background_thread:false"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, least in (("make", 12), ("grow", 20)) if kind == "folder" else (("make", 8), ("grow", 10)):
        assert found[name]["deaths"] >= least, f"{name} has fewer durable steps than it had: is a crash point gone?"
        assert found[name]["unlike"] == []


def test_crash_points_cost_nothing_and_do_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[int] = []
    monkeypatch.setattr(os, "_exit", died.append)
    crashpoint("a")
    assert (crash.reached(), died) == ((), [])
    try:
        crash.arm(2)
        crashpoint("a")
        assert died == []
        crashpoint("b")
        assert (crash.reached(), died) == (("a", "b"), [crash.EXIT_CODE])
    finally:
        crash.arm(0)
