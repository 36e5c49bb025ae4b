"""The report is one file, and shows what the run holds."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from jaxtrain.data.windows import Window
from jaxtrain.evaluation.report import write_report
from jaxtrain.evaluation.tiles import Tile
from jaxtrain.runs.rundir import load_card

from ..cube_factory import shared_run


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


def test_the_report_loads_nothing_from_elsewhere() -> None:
    html = (shared_run() / "report.html").read_text()
    tags = read(html)
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)


def test_it_shows_curves_confusion_tiles_split_and_statistics() -> None:
    html = (shared_run() / "report.html").read_text()
    images = {a["alt"]: a["src"] for tag, a in read(html).seen if tag == "img"}
    assert set(images) == {
        "Loss and accuracy over steps",
        "Confusion matrix",
        "Image, label and prediction of the worst windows",
        "Map of the spatial split",
    }
    for source in images.values():
        assert source is not None
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    card = load_card(shared_run())
    assert all(f"{mean:.1f}" in html for mean in card.mean)
    assert re.search(r"Training waited for its input for \d+\.\d %", html)
    for heading in ("Training", "Scores", "Worst tiles", "Ground and split", "Data", "Throughput", "Configuration"):
        assert f"<h2>{heading}</h2>" in html
    assert "vegetation" in html
    assert card.classes.colours[0] in html


def test_names_from_the_configuration_are_text_not_markup(tmp_path: Path) -> None:
    run = Path(shutil.copytree(shared_run(), tmp_path / "run"))
    text = (run / "model.json").read_text().replace('"vegetation"', '"<script>alert(1)</script>"')
    (run / "model.json").write_text(text)
    write_report(run, load_card(run), examples=[])
    html = (run / "report.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_run_without_history_and_a_tile_without_pixels_are_shown_too(tmp_path: Path) -> None:
    run = Path(shutil.copytree(shared_run(), tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    card = load_card(run)
    nothing = np.zeros((32, 32), np.uint8)
    empty = Tile(Window(0, 0, 0), np.zeros((32, 32, 4), np.uint16), nothing, nothing + 255, nothing, "none right")
    write_report(run, card, examples=[empty])
    tags = read((run / "report.html").read_text())
    assert "Loss and accuracy over steps" not in [a.get("alt") for _, a in tags.seen]
