"""What benchmarks make of their measurements: a figure that cannot be right is never a pass."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "ratio": "2:1", "begun": "now", "load": 1.0, "before": [400.0, 200.0], "after": [404.0, 198.0],
    "alone": [402.0, 199.0], "together": 570.0, "apart": 580.0, "equal": 390.0, "shares": [32, 16], "moves": 1,
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
        ({"together": 602.0}, "together 602 windows/s of at most 601"),
        ({"apart": 640.0}, "all at once 640 windows/s of at most 601"),
        ({"equal": 399.0}, "equal split 399 windows/s of at most 398"),
        ({"after": [404.0, 170.0]}, "replica 1 alone 200 windows/s before and 170 after"),
    ],
)
def test_a_measurement_that_cannot_be_right_is_invalid(efficiency: Any, changes: dict[str, Any], why: str) -> None:
    assert efficiency.faults(GOOD) == ""
    found = GOOD | changes
    assert efficiency.faults(found) == why
    rows = efficiency.make_rows("resnet", found, "")
    assert {row.passed for row in rows} == {False}
    assert {row.invalid for row in rows} == {why}


def test_the_table_has_the_median_of_what_is_valid_and_says_what_is_not(efficiency: Any, tmp_path: Path) -> None:
    for together in (560.0, 700.0, 590.0, 575.0):
        efficiency._keep("resnet", GOOD | {"together": together}, full=False)
    efficiency._keep("resnet", GOOD | {"ratio": "3:1", "together": 700.0}, full=False)
    rows = efficiency.collect("resnet", full=False)
    shown = next(row for row in rows if row.name == "resnet 2:1: efficiency")
    assert shown.value == 575 / 601
    assert "valid measurements: 0.932, 0.957, 0.982; invalid: 1" in shown.note
    assert not importlib.import_module("harness").publish("hetero-resnet", rows, full=False)
    kept = {row["name"]: row for row in json.loads((tmp_path / "hetero-resnet-quick.json").read_text())["rows"]}
    assert kept["resnet 2:1: efficiency"]["passed"] is True
    assert "invalid" not in kept["resnet 2:1: efficiency"]
    assert kept["resnet 3:1: efficiency"]["passed"] is False
    assert kept["resnet 3:1: efficiency"]["invalid"].startswith("together 700")
