"""`--report report.html`: one file that loads nothing, escapes every name, holds no secret and tells what happened."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingest.run.task as making
from cli.main import main
from ingest.plan.candidates import Drop
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.run.record import RunRecord
from ingest.run.report import write_report
from ingest.run.shard import fill_shard
from ingest.testing import make_scene, probe_headers
from ingest.trust.redact import redact_document
from zarr_store.grid import Grid
from zarr_store.spec import Layout

NAME = "sentinel-2-l2a"
HOSTILE = "</title><script>document.title='owned'<"
CANARY = "canary-51c2"
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_100_000.0), (70, 90))


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())

    def count(self, tag: str) -> Counter[str]:
        return Counter(str(attrs.get("class")) for name, attrs in self.tags if name == tag)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rng = np.random.default_rng(3)
    scenes = []
    for day in range(2):
        grid = Grid(GRID.crs, (20.0, 0.0, 500_000.0 + 300 * day, 0.0, -20.0, 5_100_000.0), (70, 75))
        pixels: dict[str, np.ndarray] = {
            "red": rng.integers(1, 9000, grid.shape).astype(np.uint16), "scl": np.full(grid.shape, 4, np.uint8)
        }  # fmt: skip
        when = f"2023-08-{10 + day:02d}T10:00:00Z"
        scenes.append(make_scene(tmp_path / "scenes", f"D{day}", grid, pixels, datetime=when))
    return plan_scenes(
        scenes,
        probe_headers(scenes),
        IngestConfig(bands=("red", "scl")),
        layout=Layout("t", (1, 16, 16), (1, 32, 32)),
    )


@pytest.fixture
def faults(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The first date's red is broken, and one shard of the other date cannot be made."""
    (tmp_path / "scenes" / "D0" / "red.tif").write_text("<html>log in</html>")
    poison, real = plan.tasks[-1].index, fill_shard
    fired: list[str] = []

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        if task.index == poison:
            fired.append("poison")
            raise MemoryError(f"poison {HOSTILE} at https://me:{CANARY}@host/a.tif?sig={CANARY}")
        return real(task, *args, **more)

    monkeypatch.setattr(making, "fill_shard", fill)
    yield fired
    assert fired, "the fault did not happen"


def dressed(plan: Plan) -> Plan:
    """The plan with hostile names and secrets where a catalogue could have put them."""
    from dataclasses import replace

    return replace(
        plan,
        drops=(Drop(NAME, HOSTILE, f"superseded, see https://me:{CANARY}@host/x?token={CANARY}"),),
        warnings=(f"{HOSTILE} of https://host/y?sig={CANARY} is odd",),
        statistics={
            NAME: {
                **plan.statistics[NAME],
                "offset_verdicts": {HOSTILE: {"verdict": "repaired", "dn_offset": -1000, "evidence": HOSTILE}},
            }
        },
        source=f"https://me:{CANARY}@catalogue/search?key={CANARY}",
    )


def test_it_tells_all_and_lets_nothing_in_or_out(
    plan: Plan, faults: list[str], tmp_path: Path, local_client: Any
) -> None:
    record = RunRecord()
    report = run(dressed(plan), tmp_path / "cube.zarr", client=local_client, record=record)
    assert (len(report.partial), len(report.failed)) == (9, 1)
    write_report(tmp_path / "report.html", record, report)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    # what happened, shard by shard: rectangles over the footprint, bars by date, rows of failures
    cells, bars = page.count("rect"), page.count("i")
    assert cells["partial"] == 9
    assert (cells["done"], cells["failed"]) == (8, 1)
    assert bars["done"] >= 1
    assert "2023-08-10 10:00:00" in words
    assert len(page.count("polygon")) == 1, "the outlines of the scenes"
    assert "D0" in page.words
    assert any("poison" in word for word in page.words)
    assert {"read", "warp", "encode and write"} <= set(page.words) | {"warp"}
    assert "repaired" in page.words
    assert "superseded, see https://host/x" in page.words
    # names are text
    assert HOSTILE in page.words
    assert not [attrs for tag, attrs in page.tags if tag == "script"]
    assert "<script>document.title" not in text
    # nothing is loaded: no address in any attribute that loads, and a policy that would forbid it
    for tag, attrs in page.tags:
        assert not [v for k, v in attrs.items() if k in ("src", "href", "data") and v and not v.startswith("data:")], (
            tag
        )
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    # Dask's report is whole, within a frame that cannot reach this page
    frame = next(attrs for tag, attrs in page.tags if tag == "iframe")
    assert frame["sandbox"] == "allow-scripts"
    inner = frame["srcdoc"] or ""
    assert "Dask Performance Report" in inner
    tags = Page(inner).tags
    assert not [a for tag, a in tags if tag in ("script", "link", "img") and (a.get("src") or a.get("href"))]
    assert "Bokeh" in inner
    assert CANARY not in text


def test_the_command_writes_it_with_a_scheduler_of_ones_own(
    plan: Plan, tmp_path: Path, local_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    ask = ["ingest", str(tmp_path / "plan.json"), str(tmp_path / "cube.zarr"), "--allow-local", str(tmp_path)]
    ask += ["--scheduler", local_client.scheduler.address]
    assert main([*ask, "--report", str(tmp_path / "report.html")]) == 0, capsys.readouterr().err
    page = Page((tmp_path / "report.html").read_text())
    assert page.count("rect") == {"done": 9}, "nine places, each done on both dates"
    assert "Dask Performance Report" in (next(a for t, a in page.tags if t == "iframe")["srcdoc"] or "")
    assert "1 with 2 threads" in page.words
    # a second run finds nothing to do, and its report says so
    assert main([*ask, "--report", str(tmp_path / "again.html")]) == 0
    again = Page((tmp_path / "again.html").read_text())
    assert again.count("rect") == {"done": 9}, "nine places, each done on both dates"
    assert "there was nothing to do, so no cluster was started" in again.words
    # JSON stays JSON, and what could not be written is refused before the first pixel
    assert main([*ask, "--report", str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "report.json").read_text().startswith("{")
    capsys.readouterr()
    for bad in ("report.txt", "absent/report.html"):
        assert main([*ask, "--report", str(tmp_path / bad)]) == 2
        assert bad in capsys.readouterr().err


def test_a_scheduler_that_cannot_make_the_report_does_not_stop_a_run(
    plan: Plan, tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"no bokeh at https://host/x?sig={CANARY}")

    monkeypatch.setattr("ingest.run.record.performance_report.__aexit__", refuse)
    record = RunRecord()
    report = run(plan, tmp_path / "cube.zarr", client=local_client, record=record)
    assert len(report.written) == len(plan.tasks)
    assert record.performance is None
    write_report(tmp_path / "report.html", record, report)
    text = (tmp_path / "report.html").read_text()
    assert "no bokeh" in text
    assert CANARY not in text


def test_the_data_of_dasks_page_is_redacted_and_its_scripts_are_not_touched() -> None:
    script = '<script>let a = "https://x/y?b=c"; a = b ? c : d</script>'
    data = rf'{{"log": "GET https://me:{CANARY}@h/p?sig={CANARY}&x=1 failed \"https://h/q#{CANARY}\" end"}}'
    html = (
        f'<link rel="shortcut icon" href="https://z/" />{script}<script type="application/json" id="1">{data}</script>'
    )
    made = redact_document(html)
    assert script in made
    assert "https://z/" not in made
    assert CANARY not in made
    assert re.search(r'"GET https://h/p failed \\"https://h/q\\" end"', made)
