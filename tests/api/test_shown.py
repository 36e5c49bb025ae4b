"""How objects show themselves: short representations, tables with every text escaped, and progress."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ingest
from ingest.run.outcome import IngestEvent, IngestReport
from ingest.run.progress import show_progress
from jaxtrain import (
    EmbeddingResult,
    EvaluationReport,
    MapResult,
    Run,
    TrainConfig,
    TrainEvent,
    TrainingResult,
    train,
)
from zarr_store import LedgerRow, Region, SourceOutcome, open_cube

from .conftest import SELECTION

EVIL = "<script>alert(1)</script>&\"'"


class Text(HTMLParser):
    """Tags that are opened and closed, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def results(text: str) -> dict[str, Any]:
    """One of each object of `jaxtrain` that shows itself, with `text` wherever text comes from outside."""
    scores = {
        "accuracy": 0.75, "macro_f1": None, "miou": 0.5, "classes": [text], "per_class": {text: {"f1": 0.25}},
        "confusion_matrix": [[4]], "pixels": 4,
    }  # fmt: skip
    validation = {"loss": 0.25, "accuracy": 0.75, "miou": None}
    return {
        "training": TrainingResult(text, 12, 0, {}, validation, {"train": 30, "test": 6}, 4321, 1.0, None, text),
        "evaluation": EvaluationReport(text, "test", 3, "c.zarr", 2, 0.5, None, scores, warnings=(text,)),
        "map": MapResult(text, (192, 160), ("2023-08-10",), {text: 7}, 2, None, 4, 0.5, (text,)),
        "values": MapResult(text, (192, 160), ("2023-08-10",), {}, 2, {"mean": 0.5}, 4, 0.5, (text,)),
        "vectors": EmbeddingResult(text, 6, 2, (text,)),
    }


def row(state: Any, reason: str = "gone") -> LedgerRow:
    missing = SourceOutcome(0, "S2_A", "missing", "B04", reason)
    return LedgerRow((0, 0, 0), Region(0, 1, 0, 4, 0, 4), "k", state, () if state == "done" else (missing,))


def test_representations_are_one_line_and_say_what_matters(workplace: Path) -> None:
    found = ingest.find_scenes("world/catalog.json", **SELECTION)
    plan = ingest.make_plan(found)
    report = IngestReport("c.zarr", "d", written=(row("done"),), partial=(row("partial"),), pending=3)
    cube = open_cube("cube.zarr")
    shown = {
        name: repr(value) for name, value in {"scene": found[0], "plan": plan, "report": report, "cube": cube}.items()
    }
    for text in shown.values():
        assert "\n" not in text
        assert len(text) < 200
    assert shown["scene"].startswith(f"<Scene {found[0].id} of sentinel-2-l2a, 2022-04-20T10:08:08Z, cloud ")
    assert shown["plan"] == "<Plan of 2 scenes: sentinel-2-l2a, 2 dates, red nir; EPSG:32633 64×64 px at 10; 2 shards>"
    assert shown["report"] == "<IngestReport c.zarr: 1 written, 1 partial, 0 done before, 0 failed, 3 left for later>"
    assert shown["cube"].endswith("cube.zarr: sentinel-2-l2a>")
    assert repr(found).splitlines()[1].strip() == shown["scene"]


def test_tables_hold_the_facts_and_escape_what_comes_from_outside(workplace: Path) -> None:
    found = ingest.find_scenes("world/catalog.json", **SELECTION)
    plan = ingest.make_plan(found)
    evil: dict[str, Any] = {
        "scene": replace(found[0], id=EVIL, notes=(EVIL,)),
        "scenes": replace(found, scenes=(replace(found[0], id=EVIL),)),
        "plan": replace(plan, warnings=(EVIL,), source=EVIL),
        "report": IngestReport(EVIL, "d", partial=(row("partial", EVIL),), errors=(EVIL,)),
    }
    for name, value in evil.items():
        html = value._repr_html_()
        seen = Text(html)
        assert "script" not in seen.tags, name
        assert EVIL in seen.text, name
    seen = Text(plan._repr_html_())
    assert "2, 2022-04-20 … 2022-06-16" in seen.text
    assert "red, nir" in seen.text
    assert "details" in seen.tags, "the dry run is folded below"
    cube = Text(open_cube("cube.zarr")._repr_html_()).text
    assert "2 of 2 done" in cube
    assert "EPSG:32633 64×64 px at 10" in cube


def test_results_of_training_show_themselves_like_those_of_ingest() -> None:
    shown = {name: repr(value) for name, value in results("runs/a").items()}
    assert shown == {
        "training": "<TrainingResult runs/a: step 12; validation loss 0.2500, accuracy 0.7500>",
        "evaluation": "<EvaluationReport runs/a: test, step 3, 2 samples; accuracy 0.7500, miou 0.5000>",
        "map": "<MapResult runs/a: 1 classes, 192×160 px, 1 dates>",
        "values": "<MapResult runs/a: values, 192×160 px, 1 dates>",
        "vectors": "<EmbeddingResult runs/a: 6 vectors of 2 values>",
    }
    for name, value in results(EVIL).items():
        seen = Text(value._repr_html_())
        assert "script" not in seen.tags, name
        assert EVIL in seen.text, name
    tables = {name: Text(value._repr_html_()).text for name, value in results("runs/a").items()}
    assert "Training runs/asteps12parameters4321windowstrain 30, test 6validation loss0.2500" in tables["training"]
    assert "accuracy0.7500miou0.5000f1 of runs/a0.2500warningsruns/a" in tables["evaluation"]
    assert "shape192×160dates2023-08-10runs/a7nodata2" in tables["map"]
    assert "mean0.5000nodata2" in tables["values"]
    assert "samples6code2" in tables["vectors"]


def test_a_run_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.model_validate({"data": {"cube": "c.zarr"}, "run": {"steps": 12}})
    card: Any = SimpleNamespace(config=config, bands=("red", EVIL), answers=SimpleNamespace(names=(EVIL,)))
    run = Run(tmp_path / "<run>", card)
    lines = [{"kind": "train", "step": 5, "loss": 1.0}, {"kind": "validation", "step": 5, "accuracy": 0.5}]
    monkeypatch.setattr(Run, "metrics", lambda self: lines)
    assert repr(run) == f"<Run {tmp_path}/<run>: unet, step 5 of 12, 2 bands, 1 classes>"
    seen = Text(run._repr_html_())
    assert not {"script", "run"} & set(seen.tags)
    assert seen.text.count(EVIL) == 2
    assert "steps5 of 12" in seen.text
    assert "validation accuracy0.5000" in seen.text


def test_a_report_names_what_is_missing() -> None:
    text = Text(IngestReport("c", "d", partial=(row("partial"),))._repr_html_()).text
    assert "S2_A, asset B04: gone" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_where_somebody_looks(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    heard: list[IngestEvent] = []
    with show_progress("ingest", None, heard.append) as tell:
        assert tell is not None
        tell(IngestEvent("planned", 0, 2))
        tell(IngestEvent("dashboard", url="http://127.0.0.1:1/terrashard"))
        tell(IngestEvent("shard", 1, 2, row=row("partial")))
        tell(IngestEvent("shard", 2, 2, row=row("done")))
    assert len(heard) == 4
    shown = stream.getvalue()
    assert ("2/2" in shown) == ("dashboard: http://127.0.0.1:1" in shown) == terminal
    assert ("shard (0, 0, 0) is partial: S2_A" in shown) == terminal


def test_progress_in_a_notebook_without_widgets_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with show_progress("ingest", None) as tell:
        assert tell is not None
        tell(IngestEvent("shard", 2, 2, row=row("done")))
    assert capsys.readouterr().err == "ingest: 2/2 shards\n"
    with show_progress("ingest", False) as tell:
        assert tell is None


def told(config: Any, out: Any, resume: bool, tell: Any, environment: Any, *_: Any) -> str:
    """Stands for a run of two steps; it returns what it was given to tell."""
    if tell is not None:
        tell(TrainEvent("start", 0, 2, "unet, 4321 parameters", {}))
        tell(TrainEvent("warning", 1, 2, "a date is left out\x1b[2J", {}))
        tell(TrainEvent("step", 1, 2, "step 1/2: loss 0.7500", {"loss": 0.75}))
        tell(TrainEvent("checkpoint", 2, 2, "checkpoint at step 2", {}))
        tell(TrainEvent("step", 2, 2, "step 2/2: loss 0.5000", {"loss": 0.5}))
        tell(TrainEvent("done", 2, 2, "report: report.html", {}))
    return "nobody" if tell is None else "somebody"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_training_shows_its_steps_where_somebody_looks(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("jaxtrain.loop._train", told)
    heard: list[TrainEvent] = []
    config: Any = None
    train(config, "runs/a", on_event=heard.append)
    assert [event.kind for event in heard] == ["start", "warning", "step", "checkpoint", "step", "done"]
    shown = stream.getvalue()
    assert ("2/2" in shown) == ("loss 0.5000" in shown) == ("report: report.html" in shown) == terminal
    assert ("warning: a date is left out" in shown) == terminal
    assert "\x1b[2J" not in shown
    assert "checkpoint" not in shown


def test_a_training_in_a_notebook_without_widgets_shows_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxtrain.loop._train", told)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    config: Any = None
    assert str(train(config, "runs/a")) == "somebody"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "unet, 4321 parameters"
    assert lines[1].startswith("warning: a date is left out")
    assert lines[2:] == ["train: 2/2 steps", "report: report.html"]
    assert str(train(config, "runs/a", progress=False)) == "nobody"
    assert capsys.readouterr().err == ""
