"""Names and reasons of strangers reach a terminal, a log or a page as text, never as commands; people's names stay."""

from __future__ import annotations

import io
import json
import logging
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from cli.progress import Reporter
from cli.session import Session, speak, write_document
from ingest.testing import write_raster
from zarr_store.grid import Grid
from zarr_store.printable import SafeRecord, one_line, printable, printable_json, safe_output

HOSTILE = {
    "escape": "\x1b[2J\x1b[31mred",
    "title and link": "\x1b]0;owned\x07\x1b]8;;http://evil/\x1b\\here\x1b]8;;\x1b\\",
    "csi of C1": "\x9b31m\x9d0;title\x9c",
    "bell, backspace, return": "good\r\x08\x08bad\x07",
    "new line": "good\nerror: forged",
    "right to left": "S2A\u202egnp.\u2067exe\u2069\u202c",
    "marks": "a\u200b\u200d\u200e\u200f\u061cb\ufeff",
    "separators": "a\u2028error: b\u2029c\x85d",
    "markup": "[red]a[/red] [link=http://evil]b[/link] :warning:",
    "tags": "a\U000e0041\U000e007fb",
    "half a pair": "a\udc9bb",
}
PLAIN = "Žuži-Straße-é-中文-ひ-한글-עברית-عربي-🛰"
GRID = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (64, 64))


def unsafe(text: str) -> list[str]:
    """Characters that a terminal obeys or that are not seen."""
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@given(st.text())
def test_nothing_unsafe_passes_and_json_stays_the_same_document(text: str) -> None:
    made = printable(text)
    visible = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
    assert not [c for c in unsafe(made) if c not in visible and not 0x13430 <= ord(c) <= 0x1345F
                and not 0x1BCA0 <= ord(c) <= 0x1BCA3]  # fmt: skip
    assert printable(made) == made
    assert "\n" not in one_line(text)
    document = {text: [text, 1]}
    dumped = printable_json(json.dumps(document, ensure_ascii=False))
    assert json.loads(dumped) == document
    assert not [c for c in unsafe(dumped) if c not in visible and c < "\U00010000"]
    assert printable(PLAIN) == PLAIN


def hostile_source(folder: Path, names: Sequence[str]) -> str:
    """Write an item file with one good scene and, for each name, a hostile one, whose file is no raster."""
    write_raster(folder / "red.tif", GRID, np.full(GRID.shape, 900, np.uint16))
    west, south, east, north = GRID.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    items: list[dict[str, Any]] = []
    for item_id, day, href, name in [
        (PLAIN, 10, "red.tif", PLAIN),
        *((f"odd {name}", 15, f"bad{i}.tif", name) for i, name in enumerate(names)),
    ]:
        if href != "red.tif":
            (folder / href).write_bytes(name.encode("utf-8", "surrogatepass") * 9)
        items.append({
            "type": "Feature", "stac_version": "1.0.0", "id": item_id, "collection": "sentinel-2-l2a", "links": [],
            "bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "datetime": f"2023-08-{day}T10:00:00Z", "platform": "sentinel-2a", "s2:processing_baseline": "05.09",
                "s2:datatake_id": f"GS2A_{day}_0_N05.09", "grid:code": "MGRS-33TWM", "title": name,
            },
            "assets": {"red": {"href": href, "raster:bands": [{"nodata": 0, "data_type": "uint16"}]}},
        })  # fmt: skip
    for name in names:
        items.append({**items[0], "id": f"unusable {name}", "properties": {"datetime": name}})
    path = folder / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(path)


class Screen:
    """Runs commands, and keeps what each of them printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.printed: dict[tuple[str, bool], str] = {}
        self.documents: dict[str, Any] = {}

    def run(self, *words: str) -> int:
        self.capfd.readouterr()
        code = main(list(words))
        out, err = self.capfd.readouterr()
        self.printed[words[0], "--json" in words] = out + err
        if "--json" in words:
            self.documents[words[0]] = json.loads(out)
        return code


ASK = ("--bands", "red", "--set", "mask=none")
HALF = "half a pair"
"""No scene may have it in its name, so a source with it is a case of its own."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Screen, str]]:
    """`walked(capfd, kind)`: source, what the commands of a whole walk printed, and report; names share one walk."""
    done: dict[bool, tuple[str, Screen, str]] = {}

    def walk(capfd: pytest.CaptureFixture[str], kind: str) -> tuple[str, Screen, str]:
        whole = kind == HALF
        if whole not in done:
            folder = tmp_path_factory.mktemp("hostile")
            path = hostile_source(folder, [name for key, name in HOSTILE.items() if (key == HALF) == whole])
            screen, cube, report = Screen(capfd), str(folder / "cube.zarr"), folder / "report.html"
            run, quick = screen.run, ("--retries", "0", "--workers", "1")
            assert run("search", path, *ASK) == 0
            assert run("search", path, *ASK, "--json") == 0
            assert run("plan", path, *ASK, *quick, "-v") == 0
            assert run("plan", path, *ASK, *quick, "--json") == 0
            assert run("ingest", path, cube, *ASK, *quick, "-vv", "--report", str(report)) == (0 if whole else 3)
            assert run("status", cube) == 0
            assert run("status", cube, "--json") == 0
            assert run("info", cube) == 0
            assert run("info", cube, "--json") == 0
            assert run("verify", cube) == 0
            assert run("audit", cube, "--source", path, "--no-files") in (0, 3), screen.printed["audit", False]
            done[whole] = (path, screen, report.read_text(encoding="utf-8"))
        return done[whole]

    return walk


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_do_not_reach_the_terminal(kind: str, walked: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path, shared, page = walked(capfd, kind)
    name, before = HOSTILE[kind], shared.printed
    texts = walk_strings(shared.documents["search"])
    assert kind == HALF or f"odd {name}" in texts, "the scene of this name was not found, so nothing was shown of it"
    screen = Screen(capfd)
    screen.run("search", f"{path}{name}", *ASK, "--debug")
    screen.run("plan", path, "--bands", f"x{name}", "--json")
    screen.run("info", name)
    for printed in (before, screen.printed):
        for words, text in printed.items():
            assert not unsafe(text), (words, unsafe(text))
            assert "\nerror: forged" not in text, words
    assert PLAIN in before["search", True]
    assert PLAIN in before["plan", False] or PLAIN in before["ingest", False] or PLAIN in before["info", True]
    frame = page.index("srcdoc=")
    body = page[:frame] + page[page.index('"', frame + 8) :]
    assert not unsafe(body), unsafe(body)


def walk_strings(value: Any) -> list[str]:
    """Return all texts in a document."""
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in walk_strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in walk_strings(one)]
    return [value] if isinstance(value, str) else []


def test_markup_of_rich_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    name = HOSTILE["markup"] + HOSTILE["title and link"]
    with Reporter(Session(), "x", unit="y") as progress:
        progress.line(name)
        progress.update(1, 2, name)
    shown = screen.getvalue()
    assert "[red]a[/red] [link=http://evil]b[/link] :warning:" in shown
    assert "\\x1b]0;owned\\x07" in shown
    assert "\x07" not in shown
    assert "\x1b]" not in shown


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_logs_warnings_and_documents_are_safe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)  # one of another library, with a format of its own
    log = logging.getLogger("ingest.some")
    log.addHandler(handler)
    before = logging.getLogRecordFactory()
    try:
        with safe_output():
            assert logging.getLogRecordFactory() is SafeRecord
            log.warning("scene %s and %s", name, "https://me:canary@h/a?sig=canary")
            try:
                raise ValueError(name + " token=canary")
            except ValueError:
                log.exception("it failed")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                text = warnings.formatwarning(UserWarning(f"{name} password=canary"), UserWarning, "f.py", 1)
    finally:
        log.removeHandler(handler)
    assert logging.getLogRecordFactory() is before
    speak(name)
    write_document({name: [name, "token=canary"], "password": "canary", "n": float("nan")})
    out, err = capsys.readouterr()
    for written in (stream.getvalue(), text, out, err):
        assert not unsafe(written), unsafe(written)
        assert "canary" not in written
    assert json.loads(out)[name][0] == name
    assert json.loads(out)["n"] is None
    assert len(err.splitlines()) == 1


def test_the_dashboard_hands_out_what_can_be_shown() -> None:
    from ingest.run.dashboard import ShardPage

    page = ShardPage()
    page.scheduler = type("Scheduler", (), {"workers": {}})()
    name = HOSTILE["right to left"] + HOSTILE["escape"]
    where = {"shards": [1, 1, 1], "times": ["2023"]}
    page._begin({"event": "begin", "cube": "c", "collections": [{"name": name, **where}], "states": {name: "."}})
    failure = {"collection": name, "item": name, "asset": "red", "reason": f"{name} https://u:canary@h/a?sig=canary"}
    page._ended({"collection": name, "index": [0, 0, 0], "state": "partial", "failures": [failure]})
    text = json.dumps(page.document(), ensure_ascii=False) + page.metrics()
    assert not unsafe(text), unsafe(text)
    assert "canary" not in text
    assert page.document()["collections"][0]["counts"]["partial"] == 1
