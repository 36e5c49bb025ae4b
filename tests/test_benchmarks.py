"""What benchmarks make of their measurements: a figure that cannot be right is never a pass."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "ratio": "2:1", "begun": "now", "load": 1.0, "alone": [[400.0, 200.0], [404.0, 198.0], [440.0, 220.0]],
    "together": [570.0, 600.0], "apart": [580.0, 610.0], "equal": [390.0, 400.0], "shares": [32, 16], "moves": 1,
    "least_waiting_s": 0.002,
}  # fmt: skip


@pytest.fixture
def efficiency(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which keeps its files in a folder of the test."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    script = importlib.import_module("hetero_efficiency")
    monkeypatch.setattr(script, "OUT", tmp_path)
    monkeypatch.setattr(importlib.import_module("harness"), "RESULTS", tmp_path)
    return script


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"together": [620.0, 650.0]}, "together at 1.03 of what is possible"),
        ({"apart": [640.0, 640.0]}, "all at once at 1.04 of what is possible"),
        ({"equal": [410.0, 420.0]}, "the equal split at 1.02 of what is possible"),
        ({"together": [500.0, 600.0]}, "turns differ: 0.83, 0.95"),
    ],
)
def test_a_measurement_that_cannot_be_right_is_invalid(efficiency: Any, changes: dict[str, Any], why: str) -> None:
    assert efficiency.faults(GOOD) == ""
    found = GOOD | changes
    assert efficiency.faults(found) == why
    rows = efficiency.make_rows("resnet", found, "")
    assert {row.passed for row in rows} == {False}
    assert {row.invalid for row in rows} == {why}


def test_a_turn_is_compared_with_the_rates_just_before_and_after_it(efficiency: Any) -> None:
    """A machine that becomes a tenth faster between two turns changes no ratio."""
    faster = GOOD | {"alone": [[400.0, 200.0]] * 2 + [[440.0, 220.0]], "together": [570.0, 598.5]}
    assert efficiency.by_turn(faster)["efficiency"] == pytest.approx([0.95, 0.95])
    assert efficiency.faults(faster) == ""


def test_the_table_has_the_median_of_what_is_valid_and_says_what_is_not(efficiency: Any, tmp_path: Path) -> None:
    for part in (0.93, 1.1, 0.98, 0.95):
        efficiency._keep("resnet", GOOD | {"together": [601 * part, 631 * part]}, full=False)
    efficiency._keep("resnet", GOOD | {"ratio": "3:1", "together": [700.0, 720.0]}, full=False)
    rows = efficiency.collect("resnet", full=False)
    shown = next(row for row in rows if row.name == "resnet 2:1: efficiency")
    assert shown.value == pytest.approx(0.95)
    assert "valid measurements: 0.930, 0.950, 0.980; invalid: 1" in shown.note
    assert not importlib.import_module("harness").publish("hetero-resnet", rows, full=False)
    kept = {row["name"]: row for row in json.loads((tmp_path / "hetero-resnet-quick.json").read_text())["rows"]}
    assert kept["resnet 2:1: efficiency"]["passed"] is True
    assert "invalid" not in kept["resnet 2:1: efficiency"]
    assert kept["resnet 3:1: efficiency"]["passed"] is False
    assert kept["resnet 3:1: efficiency"]["invalid"].startswith("together at 1.15")
