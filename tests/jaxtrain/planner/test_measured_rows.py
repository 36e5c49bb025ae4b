"""What was measured of placements is kept for a day, and nothing of it stays longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jaxtrain.planner.measured_rows import MeasuredRows
from jaxtrain.runs.programs import private_folder

PLACEMENT = {"name": "all on one device"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = private_folder("survey")
    assert place is not None
    assert place.is_relative_to(tmp_path)
    return place


def test_an_interrupted_measurement_is_taken_up_and_one_that_ends_leaves_nothing(folder: Path) -> None:
    MeasuredRows({"epochs": 1}).keep(PLACEMENT, {"seconds": 2.0})
    again = MeasuredRows({"epochs": 1})
    assert again.take(PLACEMENT) == {"seconds": 2.0}
    assert again.take({"name": "another"}) is None
    assert MeasuredRows({"epochs": 2}).take(PLACEMENT) is None
    again.forget()
    assert list(folder.iterdir()) == []


def test_rows_that_nothing_takes_up_any_more_are_removed(folder: Path) -> None:
    MeasuredRows({"epochs": 1}).keep(PLACEMENT, {"seconds": 2.0})
    (row,) = folder.iterdir()
    half = folder / f".{row.name}.abc.partial"
    half.write_bytes(b"{")
    other = folder / "notes.txt"
    other.write_bytes(b"")
    fresh = folder / f".{row.name}.def.partial"
    fresh.write_bytes(b"{")
    old = time.time() - 25 * 3600
    for path in (row, half, other):
        os.utime(path, (old, old))
    assert MeasuredRows({"epochs": 1}).take(PLACEMENT) is None
    assert sorted(folder.iterdir()) == sorted([fresh, other])
