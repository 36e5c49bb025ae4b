"""The page beside Dask's: what it says while a run goes on, and what a browser shows of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import ingest.run.task as making
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.dashboard import PAGE, ShardPage, page_url
from ingest.run.loop import IngestEvent, run
from ingest.run.map_page import publish_map
from ingest.run.shard import fill_shard
from ingest.testing import make_scene, probe_headers
from zarr_store.grid import Grid
from zarr_store.spec import Layout

from ..clusters import worker_here

NAME = "sentinel-2-l2a"
HOSTILE = "<img src=x onerror=document.title='owned'>"
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (70, 90))


@pytest.fixture
def client() -> Iterator[Client]:
    """A cluster in this process, with a page of its own."""
    with worker_here(2) as found:
        yield found


def make_plan(folder: Path, *, days: int = 2) -> Plan:
    rng = np.random.default_rng(1)
    scenes = []
    for day in range(days):
        name = f"D{day}" if day else HOSTILE.replace("/", "")
        grid = Grid(GRID.crs, (20.0, 0.0, 500_000.0 + 300 * day, 0.0, -20.0, 5_000_000.0), (70, 75))
        pixels: dict[str, Any] = {"red": rng.integers(1, 9000, grid.shape).astype(np.uint16)}
        pixels["scl"] = np.full(grid.shape, 4, np.uint8)
        scenes.append(make_scene(folder, name, grid, pixels, datetime=f"2023-08-{10 + day:02d}T10:00:00Z"))
    return plan_scenes(
        scenes,
        probe_headers(scenes),
        IngestConfig(bands=("red", "scl")),
        layout=Layout("t", (1, 16, 16), (1, 16, 16)),
    )


def fetch(url: str) -> tuple[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode(), reply.headers


def run_with_faults(plan: Plan, cube: Path, client: Client, folder: Path, patch: pytest.MonkeyPatch) -> list[Any]:
    """A run in which the first scene's red is broken and one shard cannot be made; what the page said meanwhile."""
    (folder / HOSTILE / "red.tif").write_text("<html>log in</html>")
    poison, real = plan.tasks[-1].index, fill_shard

    def fill(task: Any, *args: Any, **more: Any) -> Any:
        time.sleep(0.02)
        if task.index == poison:
            raise MemoryError("poison </script>")
        return real(task, *args, **more)

    patch.setattr(making, "fill_shard", fill)
    seen = []

    def look(event: IngestEvent) -> None:
        if event.kind == "dashboard":
            assert event.url is not None
            seen.append(event.url)
        if event.kind == "shard":
            seen.append(json.loads(fetch(f"{seen[0]}/data.json")[0]))

    run(plan, cube, client=client, on_event=look)
    return seen


def test_the_page_follows_a_run(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "scenes")
    url, *seen = run_with_faults(plan, tmp_path / "cube.zarr", client, tmp_path / "scenes", monkeypatch)
    assert url == page_url(client.dashboard_link)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/terrashard", url)
    assert any("r" in document["collections"][0]["states"] for document in seen), "shards at a worker are running"
    assert [d["ended"] for d in seen] == sorted(d["ended"] for d in seen)
    last = json.loads(fetch(f"{url}/data.json")[0])
    found = last["collections"][0]
    assert found["shards"] == [2, 5, 6]
    letters = np.array(list(found["states"])).reshape(found["shards"])
    assert letters[1, -1, -1] == "f"
    assert set(letters[0].ravel()) <= {"m", "d"}
    assert (letters[1].ravel()[:-1] == "d").all()
    assert found["counts"]["partial"] == (letters == "m").sum() > 0
    assert found["counts"]["pending"] == found["counts"]["running"] == 0
    assert last["finished"] >= last["started"]
    assert {f["item"] for f in last["failures"] if f["state"] == "partial"} == {HOSTILE}
    poison = next(f for f in last["failures"] if f["state"] == "failed")
    assert (poison["index"], "poison" in poison["reason"]) == ([1, 4, 5], True)
    assert len(found["outlines"]) == 2
    deadline = time.monotonic() + 10
    while not json.loads(fetch(f"{url}/data.json")[0])["rates"]["stages"]["write"]["bytes"]:
        assert time.monotonic() < deadline, "heartbeats bring what the stages counted"
        time.sleep(0.2)
    # a second run on the same scheduler starts a page of its own: done shards are done from the beginning
    monkeypatch.undo()
    events: list[Any] = []
    run(plan, tmp_path / "cube.zarr", client=client, on_event=events.append)
    again = json.loads(fetch(f"{url}/data.json")[0])
    assert again["collections"][0]["states"][-1] == "d"
    assert again["ended"] < last["ended"]
    assert {f["state"] for f in again["failures"]} == {"partial"}


def test_the_page_shows_a_map_in_the_making(client: Client) -> None:
    page, tell = publish_map(client, "/maps/<b>.zarr", "0123456789abcdef", GRID, 32, ("2023-08-10",), [(0, 0, 0)])
    assert page == page_url(client.dashboard_link)
    tell((0, 2, 1))

    def document() -> Any:
        return json.loads(fetch(f"{page}/data.json")[0])

    until = time.monotonic() + 10
    while document()["ended"] < 1:
        assert time.monotonic() < until
        time.sleep(0.02)
    found = document()
    assert found["collections"][0]["shards"] == [1, 3, 3]
    assert found["collections"][0]["states"] == "d......d."
    assert (found["cube"], found["plan"], found["finished"]) == ("/maps/<b>.zarr", "0123456789ab", None)
    tell(None)
    while document()["finished"] is None:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_prometheus_counts_shards_and_bytes(tmp_path: Path, client: Client) -> None:
    plan = make_plan(tmp_path / "scenes")
    report = run(plan, tmp_path / "cube.zarr", client=client)
    assert report.empty > 0, "some shards are without a file, and no task makes them"
    url = page_url(client.dashboard_link)
    text, headers = fetch(f"{url}/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    from prometheus_client.parser import text_string_to_metric_families

    samples = {
        (s.name, *sorted(s.labels.values())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    assert samples["terrashard_shards_total", "done"] == len(plan.tasks) - report.empty
    assert samples["terrashard_shards", "done", NAME] == len(plan.tasks)
    deadline = time.monotonic() + 10
    while "terrashard_stage_bytes_total" not in text or 'stage="write"} 0' in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
        text = fetch(f"{url}/metrics")[0]


def test_names_are_data_to_the_page(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "scenes")
    url, *_ = run_with_faults(plan, tmp_path / "cube.zarr", client, tmp_path / "scenes", monkeypatch)
    text, headers = fetch(url)
    policy = headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)
    assert nonce
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    outside: list[str] = []
    allowed = nonce[1]

    class Look(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            if tag in ("script", "style"):
                assert given.get("nonce") == allowed
            outside.extend(v for k, v in attributes if k in ("src", "href") and v and "//" in v)
            assert not [k for k, _ in attributes if k.startswith("on")]

    Look().feed(text)
    assert not outside, "the page needs nothing from elsewhere"
    assert "innerHTML" not in text
    assert fetch(url)[0] != text, "a nonce is used once"
    assert "</script>" not in fetch(f"{url}/data.json")[0]


def test_a_scheduler_that_cannot_show_the_page_does_not_stop_a_run(
    tmp_path: Path, local_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'ingest'")

    monkeypatch.setattr(ShardPage, "start", refuse)
    if PAGE in local_client.cluster.scheduler.plugins:
        local_client.cluster.scheduler.remove_plugin(name=PAGE)
    events: list[IngestEvent] = []
    plan = make_plan(tmp_path / "scenes", days=1)
    report = run(plan, tmp_path / "cube.zarr", client=local_client, on_event=events.append)
    assert len(report.written) == len(plan.tasks)
    assert next(e for e in events if e.kind == "dashboard").url == local_client.dashboard_link
    assert "no page at /terrashard" in caplog.text


def test_foreign_events_are_left_alone() -> None:
    page = ShardPage()
    page.log_event("other", {"event": "begin"})
    page.log_event(PAGE, "words")
    assert page.run == {}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(folder: Path, url: str, *what: str) -> Path:
    """Run Chromium once, in a session of its own: its children would outlive it and hold its pipes."""
    out = folder / "chromium.out"
    with out.open("wb") as stream:
        process = subprocess.Popen(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1180",
                "--virtual-time-budget=4000", *what, url,
            ],
            stdout=stream,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(40)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)
    return out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "scenes")
    url, *_ = run_with_faults(plan, tmp_path / "cube.zarr", client, tmp_path / "scenes", monkeypatch)
    picture = Path(os.environ.get("TERRASHARD_SCREENSHOT", tmp_path / "page.png"))
    dumped = browse(tmp_path, url, "--dump-dom").read_text()
    assert 'data-ready="yes"' in dumped, dumped[-2000:]
    assert "&lt;img src=x onerror" in dumped
    assert "<img" not in dumped
    assert "<title>terrashard ingest</title>" in dumped, "the hostile name ran"
    assert "missing a scene" in dumped
    assert "poison" in dumped
    browse(tmp_path, url, f"--screenshot={picture}")
    from PIL import Image

    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert (0x2F, 0x9E, 0x62) in colours, "done shards are drawn"
    assert (0xE0, 0xA1, 0x1B) in colours, "so are those with a scene missing"
    assert (0xCF, 0x3F, 0x36) in colours, "and the failed one"
