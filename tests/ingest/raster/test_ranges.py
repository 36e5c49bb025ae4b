"""`RangeFile` by itself: which bytes are asked for, that each is asked for once, and what a fault leaves behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.raster import download as download_module
from ingest.raster.access import open_asset
from ingest.raster.limits import Access
from ingest.raster.ranges import HEAD_BYTES, Head, HeadCache, RangeFile, blocks_of, find_range_file, merge
from ingest.simulate import ServerHandle, serve
from ingest.testing import write_raster
from ingest.trust.connections import PatientRetry
from ingest.worker.rates import Crowd
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (512, 512))
PIXELS = np.random.default_rng(5).integers(1, 60_000, GRID.shape).astype(np.uint16)
WINDOW = (0, 0, 512, 512)
DATA = np.random.default_rng(6).bytes(200_000)


def a_file(asked: list[tuple[int, int]], *, remote: bool = True, head: int = 1000) -> RangeFile:
    def get(span: tuple[int, int]) -> bytes:
        asked.append(span)
        return DATA[span[0] : span[1]]

    known = Head("http://x/a.tif", DATA[:head], len(DATA), None, True, HeadCache.deadline())
    return RangeFile(known, get, remote=remote)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, 9000)), min_size=1, max_size=12), st.booleans())
def test_every_byte_is_right_and_asked_for_once(wanted: list[tuple[int, int]], remote: bool) -> None:
    asked: list[tuple[int, int]] = []
    file = a_file(asked, remote=remote)
    spans = [(start, min(len(DATA), start + size)) for start, size in wanted]
    file.fetch(spans)
    fetched = len(asked)
    for start, stop in spans:
        assert bytes(file.view(start, stop)) == DATA[start:stop]
        assert file.take(start, stop) == DATA[start:stop]
    assert len(asked) == fetched, "what is here is not asked for again"
    ordered = sorted(asked)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ordered)), "no byte twice"
    assert all(0 <= start < stop <= len(DATA) for start, stop in asked)


def test_near_blocks_are_one_request_and_far_ones_are_not() -> None:
    assert merge([(1000, 2000), (2008, 3000)], 10_000) == [(996, 3004)]
    assert len(merge([(1000, 2000), (4000, 5000)], 10_000)) == 2
    assert merge([(0, 10), (9990, 10_000)], 10_000) == [(0, 14), (9986, 10_000)]


def test_a_handle_reads_like_a_file_and_forgets_blocks_but_not_the_head() -> None:
    asked: list[tuple[int, int]] = []
    file = a_file(asked)
    with file.open("any") as handle:
        assert handle.read(500) == DATA[:500]
        assert not asked, "the head is here"
        handle.seek(-300, 2)
        assert handle.read() == DATA[-300:]
        handle.seek(50_000)
        assert handle.read(100) == DATA[50_000:50_100]
        assert (handle.tell(), handle.read(0)) == (50_100, b"")
    assert asked == [(len(DATA) - 300, len(DATA)), (50_000, 50_000 + HEAD_BYTES)]
    file.forget()
    assert file.take(0, 1000) == DATA[:1000]
    assert len(asked) == 2
    file.take(50_000, 50_001)
    assert len(asked) == 3


def test_a_fault_is_kept_for_the_reader_as_gdal_only_says_that_reading_failed() -> None:
    def broken(span: tuple[int, int]) -> bytes:
        raise OSError("the cable is cut")

    file = RangeFile(Head("http://x/a.tif", b"head", 100, None, True, 0.0), broken)
    assert file.take(50, 60) == b""
    assert str(file.error) == "the cable is cut"
    with pytest.raises(OSError, match="cable"):
        file.fetch([(50, 60), (70, 80)])
    with pytest.raises(ValueError, match="unknown size"):
        RangeFile(Head("http://x/a.tif", b"", None, None, True, 0.0), broken)


def test_heads_live_for_a_while_and_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = HeadCache()
    head = Head("u", b"12", 100, None, True, HeadCache.deadline())
    heads.put("a", head)
    assert heads.get("a") is head
    later = time.monotonic() + 3600
    with monkeypatch.context() as patch:
        patch.setattr("ingest.raster.ranges.time.monotonic", lambda: later)
        assert heads.get("a") is None, "too old"
    heads.drop("a")
    assert heads.get("a") is None
    heads.put("b", Head("u", b"12", 2, None, True, HeadCache.deadline()))
    assert heads.get("b") is None, "with the whole file in it nobody would ask whether it is still there"


# Against the server that misbehaves


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerHandle]:
    root = tmp_path_factory.mktemp("ranges")
    (root / "catalog.json").write_text('{"type": "Catalog", "id": "c", "links": []}')
    write_raster(root / "a.tif", GRID, PIXELS, tiled=True, blockxsize=64, blockysize=64, compress="none")
    with serve(root) as handle:
        yield handle


QUICK = Access(attempts=1, deadline_s=5, backoff_s=0.01, connect_timeout_s=2, low_speed_s=1)


def test_a_window_costs_its_blocks_and_the_head(server: ServerHandle) -> None:
    server.reset_counters()
    with open_asset(server.file_url("a.tif"), access=QUICK) as dataset:
        file = find_range_file(dataset)
        assert file is not None
        spans = blocks_of(dataset, (100, 100, 40, 40))
        assert len(spans) == 4
        file.fetch(spans)
    needed = sum(stop - start for start, stop in spans)
    assert server.bytes_sent <= HEAD_BYTES + 1.05 * needed
    # the head; two blocks lie side by side in each of two rows; two of the four blocks may be in the head
    assert server.requests.total() <= 3


@pytest.mark.parametrize("mode", ["trunc", "short206", "reset", "503"])
def test_no_fault_gives_other_bytes(server: ServerHandle, mode: str) -> None:
    server.reset_counters()
    href = server.file_url("a.tif", fault=mode)

    def read() -> None:
        with open_asset(href, access=QUICK) as dataset:
            file = find_range_file(dataset)
            assert file is not None
            file.fetch(blocks_of(dataset, WINDOW))

    with pytest.raises(AssetUnreadable):
        read()
    assert server.faults[mode] > 0


def test_r03_a_host_that_is_busy_gets_fewer_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_raster(tmp_path / "a.tif", GRID, PIXELS, tiled=True, blockxsize=64, blockysize=64, compress="none")
    data = path.read_bytes()
    inside, most, refused = [0], [], [0]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with lock:
                inside[0] += 1
                most.append(inside[0])
                busy = inside[0] > 3
                refused[0] += busy
            time.sleep(0.03)
            start, stop = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            body = b"" if busy else data[start : stop + 1]
            with lock:
                inside[0] -= 1
            self.send_response(503 if busy else 206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
            if busy:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    crowd = Crowd()
    monkeypatch.setattr(download_module, "_crowd", crowd)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    host = f"127.0.0.1:{httpd.server_port}"
    patient = Access(attempts=12, deadline_s=20, backoff_s=0.02, connect_timeout_s=2, low_speed_s=2)
    try:
        with open_asset(f"http://{host}/a.tif", access=patient) as dataset:
            file = find_range_file(dataset)
            assert file is not None
            spans = blocks_of(dataset, WINDOW)[4::2]  # every other one, so that none are merged
            for begin in range(0, len(spans), 10):
                file.fetch(spans[begin : begin + 10])
                if begin == 0:
                    early = refused[0]
            assert all(bytes(file.view(*span)) == data[slice(*span)] for span in spans)
    finally:
        httpd.shutdown()
        httpd.server_close()
    assert max(most) > 3, "it was asked for too much at first"
    assert early > 0, "and said so"
    assert crowd.places(host) < 10
    assert refused[0] - early <= early, "later it was hardly ever too much"


@pytest.mark.parametrize(("told", "longest", "least"), [("1", 120.0, 1.0), ("3600", 1.0, 1.0)])
def test_a_file_server_is_given_the_time_that_it_asks_for(
    tmp_path: Path, make_server: Any, monkeypatch: pytest.MonkeyPatch, told: str, longest: float, least: float
) -> None:
    """Retry-After is waited for by whoever reads pixels too, and no longer than two minutes."""
    assert PatientRetry.longest_s == 120
    monkeypatch.setattr(PatientRetry, "longest_s", longest)
    data = write_raster(tmp_path / "a.tif", GRID, PIXELS).read_bytes()
    server = make_server()
    asked: list[float] = []

    def answer(request: Any) -> Any:
        asked.append(time.monotonic())
        if len(asked) == 1:
            return 429, {"Retry-After": told}, b""
        start, stop = (int(part) for part in request.headers["Range"].removeprefix("bytes=").split("-"))
        body = data[start : stop + 1]
        return 206, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"}, body

    server.answer["/a.tif"] = answer
    patient = Access(attempts=3, deadline_s=30, backoff_s=0.02, connect_timeout_s=2, low_speed_s=2)
    with open_asset(f"{server.url}/a.tif", access=patient) as dataset:
        assert dataset.read(1, window=((0, 1), (0, 1))).shape == (1, 1)
    assert least <= asked[1] - asked[0] < 10


def test_places_shrink_at_once_and_grow_slowly() -> None:
    crowd = Crowd(8)

    def one(busy: bool) -> None:
        with crowd.place("http://h/x") as told:
            told(busy)

    one(True)
    assert crowd.places("h") == 1
    one(False)
    assert crowd.places("h") == 2
    for _ in range(2):
        one(False)
    assert crowd.places("h") == 3
    assert crowd.places("other") == 8
    begun = threading.Event()
    with crowd.place("http://h/x") as told, crowd.place("http://h/y"), crowd.place("http://h/z"):
        told(True)

        def wait_for_a_place() -> None:
            one(False)
            begun.set()

        waiting = threading.Thread(target=wait_for_a_place, daemon=True)
        waiting.start()
        assert not begun.wait(0.2), "there is no place"
    assert begun.wait(5)
    waiting.join(5)
