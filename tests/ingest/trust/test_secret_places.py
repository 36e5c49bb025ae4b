"""Every shape of a secret in every place of an ingest that prints, logs or stores: none of it comes out.

`tests/zarr_store/test_redact.py` tests the redactor alone; here texts that hold a canary come from where texts of
strangers come from (a catalogue, a refusal, a library's exception, its log), and all that leaves is searched.
"""

from __future__ import annotations

import itertools
import logging
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.errors import RasterioIOError

import ingest.run.task as making
from cli.main import main
from ingest.raster.blocks import BlockReader
from ingest.run.dashboard import page_url
from ingest.run.shard import fill_shard
from ingest.testing import write_raster
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.read import open_cube

from ...zarr_store.secret_shapes import CANARY, TEXTS, assert_nowhere

GRID = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (32, 32))
SHAPES = list(TEXTS.values())
ASK = ("--collection", "sentinel-2-l2a", "--bands", "red", "--mask", "none", "--retries", "0", "--timeout", "5")
Make = Callable[..., dict[str, Any]]
Command = Callable[..., int]


class Everything:
    """All that commands print and all that this process logs, client and worker alike."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capfd, self._caplog = capfd, caplog
        self._parts: list[str] = []

    def run(self, *words: object) -> int:
        """Run one command in this process."""
        code = main([str(word) for word in words])
        self._parts += self._capfd.readouterr()
        return code

    @property
    def text(self) -> str:
        return "\n".join([*self._parts, self._caplog.text])


@pytest.fixture
def everything(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Everything:
    caplog.set_level(logging.DEBUG)
    return Everything(capfd, caplog)


@pytest.fixture
def catalogue(server: Any, make_item: Make, tmp_path: Path) -> Any:
    """An API with one date for each shape, which its items quote; `server.refusal` is what it answers instead."""
    data = write_raster(tmp_path / "red.tif", GRID, np.full(GRID.shape, 2000, np.uint16)).read_bytes()
    (tmp_path / "red.tif").unlink()
    west, south, east, north = GRID.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    items = []
    for number, text in enumerate(SHAPES):
        when = datetime(2023, 6, 1, 10, tzinfo=UTC) + timedelta(days=number)
        item = make_item(f"date-{number}", datetime=f"{when:%Y-%m-%dT%H:%M:%SZ}", s2__datatake_id=f"take-{number}")
        item |= {"bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]}}
        href = f"{server.url}/files/{number}.tif?layer=1&sig={CANARY}"
        title = text if "://" in text else f"date {number}"
        bands = [{"nodata": 0, "data_type": "uint16", "description": title}]
        other = {"https": {"href": f"https://me:{CANARY}@a.example/{number}.tif?sig={CANARY}"}}
        item["assets"] = {"red": {"href": href, "title": title, "raster:bands": bands, "alternate": other}}
        item["links"] = [{"rel": "self", "href": f"{server.url}/items/{number}?token={CANARY}", "title": title}]
        server.answer[f"/files/{number}.tif"] = ranged(data)
        items.append(item)
    core = "https://api.stacspec.org/v1.0.0/"
    link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json", "method": "POST"}
    server.json("/", {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": SHAPES[0],
                      "conformsTo": [core + "core", core + "item-search"], "links": [link]})  # fmt: skip
    server.json("/collections/sentinel-2-l2a", {"type": "Collection", "id": "sentinel-2-l2a", "links": []})
    server.refusal = None

    def search(_: Any) -> Any:
        if server.refusal is not None:
            return 403, {"Content-Type": "text/plain"}, server.refusal
        return 200, {"Content-Type": "application/json"}, {"type": "FeatureCollection", "features": items, "links": []}

    server.answer["/search"] = search
    return server


def ranged(data: bytes) -> Callable[[Any], Any]:
    def answer(request: Any) -> Any:
        start, _, stop = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = data[int(start) : int(stop or len(data)) + 1]
        where = f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}"
        return (206 if "Range" in request.headers else 200), {"Content-Range": where}, body

    return answer


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Each shard logs its shape; with "read" its pixels cannot be decoded, with "shard" it cannot be made at all."""
    state: dict[str, Any] = {"fault": "read", "read": set(), "shard": set()}
    fill, texts = fill_shard, itertools.cycle(SHAPES)

    def fill_and_log(task: Any, *args: Any, **more: Any) -> Any:
        text = SHAPES[task.index[0]]
        for name in ("urllib3.connectionpool", "rasterio._env", "ingest.raster.access", "distributed.worker"):
            logging.getLogger(name).warning("%s", text)
        try:
            raise OSError(text)
        except OSError:
            logging.getLogger("ingest.run.task").exception("a shard")
        if state["fault"] == "shard":
            state["shard"].add(text)
            raise MemoryError(text)
        return fill(task, *args, **more)

    def read(*_: Any, **__: Any) -> Any:
        text = next(texts)
        state["read"].add(text)
        raise RasterioIOError(text)

    monkeypatch.setattr(making, "fill_shard", fill_and_log)
    monkeypatch.setattr(BlockReader, "read", read)
    yield state
    assert state["read"] == state["shard"] == set(SHAPES), "a fault did not happen"


def test_no_shape_comes_out_of_an_ingest(
    catalogue: Any, broken: dict[str, Any], local_client: Any, everything: Everything, tmp_path: Path
) -> None:
    out, run, source = tmp_path / "out", everything.run, f"{catalogue.url}/"
    out.mkdir()
    plan, cube = out / "plan.json", out / "cube.zarr"
    join = ("--scheduler", local_client.scheduler.address, "--allow-private-hosts", "--retries", "0")
    assert run("search", source, *ASK[:4], "-o", out / "items.json", "--json") == 0, everything.text[-2000:]
    assert run("plan", source, *ASK, "-o", plan, "--json", "-v") == 0, everything.text[-2000:]
    # every scene is unreadable, then every shard fails; a report of each kind, and the page that follows the run
    assert run("ingest", plan, cube, *join, "--report", out / "read.json", "--json", "-v") == 3
    broken["fault"] = "shard"
    assert run("ingest", plan, cube, *join, "--report", out / "shard.html", "-v", "--debug") == 3
    pages = []
    for path in ("", "/data.json"):
        with urllib.request.urlopen(page_url(local_client.dashboard_link) + path, timeout=10) as reply:
            pages.append(reply.read().decode())
    assert "MemoryError" in pages[-1]
    for command in ("status", "info", "verify", "audit"):
        more = ("--source", source) if command == "audit" else ()
        for form in ((), ("--json",)):
            run(command, cube, *more, *form)
    rows = list(open_cube(cube).ledger("sentinel-2-l2a").rows())
    assert len(rows) == len(SHAPES)
    # the words beside the secrets did come out, so these are places that quote
    reports = [(out / name).read_text() for name in ("read.json", "shard.html")]
    for told in (*reports, everything.text):
        assert "cannot read it" in told
    assert assert_nowhere("\n".join([everything.text, *pages, repr(rows)]), out) > len(SHAPES)


def test_no_shape_comes_out_of_an_error(
    catalogue: Any, everything: Everything, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API refuses with it, and an error of ours and one of a library quote it."""
    ask = ("search", f"{catalogue.url}/", *ASK[:4], "--set", "retries=0", "--set", "timeout_s=2")
    form = ("--json", "--debug", "-v")
    for text in SHAPES:
        catalogue.refusal = text.encode()
        assert everything.run(*ask, *form) == 8
    assert everything.text.count("error: ") >= len(SHAPES)
    for text, (kind, code) in itertools.product(SHAPES, ((InvalidInput, 2), (RuntimeError, 1))):

        def fail(*_: Any, kind: type[Exception] = kind, text: str = text, **__: Any) -> None:
            raise kind(text)

        monkeypatch.setattr("ingest.scenes.search.find_scenes", fail)
        assert everything.run(*ask, *form) == code
    # each is a line, a traceback and a document, but for the traceback of a refusal, which has no body
    assert everything.text.count("cannot read it") >= 8 * len(SHAPES)
    assert_nowhere(everything.text)
