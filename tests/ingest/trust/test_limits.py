"""Servers and files that send or claim without end: what is read of them is bounded in bytes, memory and time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.raster.download import fetch, fetch_head, fetch_whole, stream_whole
from ingest.raster.faults import PermanentError, TransientError
from ingest.raster.limits import Access
from ingest.raster.ranges import Head
from ingest.request.config import IngestConfig
from ingest.request.geometry import load_geometry
from ingest.scenes.documents import Documents
from ingest.trust import waits
from ingest.trust.answers import MIN_BYTES_PER_S
from ingest.trust.sign import SignRule, signed
from ingest.worker.rates import Crowd, wait_for_turn
from zarr_store.bounded import check_weight, load_json, read_file, weight_of
from zarr_store.errors import AccessError, InvalidInput, Preempted

QUICK = Access(attempts=1, deadline_s=20, backoff_s=0.02, connect_timeout_s=3, low_speed_s=1)
ENDLESS = 3 << 30
"""Bytes that a hostile server is willing to send."""


class Bad:
    """A server that answers every request by one script; `sent` counts bytes of bodies, `asked` requests."""

    def __init__(self, script: Callable[[socket.socket, str], Iterator[bytes]]) -> None:
        self.sent = self.asked = 0
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(65536) or b"\r\n\r\n"
            self.asked += 1
            for piece in self._script(sock, head.decode("latin-1")):
                if self._ended.is_set():
                    return
                sock.sendall(piece)
                self.sent += len(piece)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()


@pytest.fixture
def bad() -> Iterator[Callable[..., Bad]]:
    running: list[Bad] = []

    def start(script: Callable[[socket.socket, str], Iterator[bytes]]) -> Bad:
        running.append(Bad(script))
        return running[-1]

    yield start
    for one in running:
        one.close()


def answer(head: str, body: Callable[[], Iterator[bytes]]) -> Callable[[socket.socket, str], Iterator[bytes]]:
    def script(_: socket.socket, __: str) -> Iterator[bytes]:
        yield head.replace("\n", "\r\n").encode() + b"\r\n\r\n"
        yield from body()

    return script


def flood(total: int = ENDLESS, piece: bytes = bytes(1 << 20)) -> Iterator[bytes]:
    for _ in range(total // len(piece)):
        yield piece


def trickle(text: bytes = b" ", pause_s: float = 0.2) -> Iterator[bytes]:
    while True:
        yield text
        time.sleep(pause_s)


def little_sent(server: Bad) -> None:
    """What a kernel takes in advance is some megabytes; the rest was never asked for."""
    time.sleep(0.2)
    assert server.asked >= 1
    assert server.sent < 64 << 20


# ---- bytes


def test_a_range_is_read_to_its_end_and_no_further(bad: Callable[..., Bad]) -> None:
    """The right Content-Range, and 3 GiB behind it."""
    server = bad(answer("HTTP/1.1 206 OK\nContent-Range: bytes 0-99/5000\nConnection: close", flood))
    head = Head(f"{server.url}/a.tif", b"", 5000, None, True, 0.0)
    with pytest.raises(TransientError, match="more than the 100 bytes"):
        fetch(head.url, head, QUICK, (0, 100))
    little_sent(server)


def test_a_range_whose_length_is_a_lie_is_refused_too(bad: Callable[..., Bad]) -> None:
    reply = f"HTTP/1.1 206 OK\nContent-Range: bytes 0-99/5000\nContent-Length: {ENDLESS}\nConnection: close"
    server = bad(answer(reply, flood))
    head = Head(f"{server.url}/a.tif", b"", 5000, None, True, 0.0)
    with pytest.raises(TransientError, match="more than the 100 bytes"):
        fetch(head.url, head, QUICK, (0, 100))
    little_sent(server)


def test_no_span_is_longer_than_a_window_can_need() -> None:
    head = Head("http://127.0.0.1:1/a.tif", b"", 1 << 50, None, True, 0.0)
    with pytest.raises(PermanentError, match="needed at once"):
        fetch(head.url, head, QUICK, (0, 1 << 40))


def test_an_error_is_not_read_to_its_end(bad: Callable[..., Bad]) -> None:
    for status in ("404 Not Found", "503 Busy"):
        server = bad(answer(f"HTTP/1.1 {status}\nConnection: close", flood))
        head = Head(f"{server.url}/a.tif", b"", 5000, None, True, 0.0)
        with pytest.raises((PermanentError, TransientError), match=status[:3]):
            fetch(head.url, head, Access(attempts=3, backoff_s=0.01, low_speed_s=1), (0, 100))
        little_sent(server)
        server = bad(answer(f"HTTP/1.1 {status}\nConnection: close", flood))
        with pytest.raises(AccessError, match=status[:3]), documents(server, retries=2) as reader:
            reader.read(server.url)
        little_sent(server)


def test_a_whole_file_is_read_to_its_size_and_no_further(bad: Callable[..., Bad]) -> None:
    def script(_: socket.socket, head: str) -> Iterator[bytes]:
        if "Range:" in head:
            yield b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n"
            yield b"Connection: close\r\n\r\n"
            yield b"II*\0" + bytes(96)
            return
        yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        yield from flood()

    server, taken = bad(script), [0]
    with pytest.raises(TransientError, match="more than the 100 bytes"):
        stream_whole(f"{server.url}/a.tif", QUICK, lambda piece: taken.__setitem__(0, taken[0] + len(piece)))
    little_sent(server)
    assert taken[0] <= 100
    with pytest.raises(PermanentError, match="MiB"):
        fetch_whole(f"{server.url}/a.tif", QUICK)
    assert server.sent < 600 << 20


def test_a_token_document_has_an_end(bad: Callable[..., Bad]) -> None:
    import urllib3

    server = bad(answer("HTTP/1.1 200 OK\nConnection: close", lambda: flood(piece=b" " * (1 << 20))))
    rule = SignRule(f"{server.url}/token", ("127.0.0.1",))
    with pytest.raises(AccessError, match="no token"):
        signed("http://127.0.0.1/box/a.tif", "none", urllib3.PoolManager(retries=False), rules=(rule,))
    little_sent(server)


@cache
def packed_blanks(wbits: int, mebibytes: int = 1024) -> bytes:
    """1 GiB of blanks in one megabyte: packed once as a mebibyte that stands for itself, and repeated."""
    blank = b" " * (1 << 20)
    engine, end = (zlib.compressobj(9, wbits=-15) for _ in range(2))
    body = (engine.compress(blank) + engine.flush(zlib.Z_FULL_FLUSH)) * mebibytes + end.flush()
    if wbits == -15:
        return body
    count, check = (zlib.crc32, 0) if wbits == 31 else (zlib.adler32, 1)
    for _ in range(mebibytes):
        check = count(blank, check)
    if wbits == 31:
        return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + body + struct.pack("<II", check, mebibytes << 20)
    return b"\x78\x9c" + body + struct.pack(">I", check)


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_the_packed_blanks_are_what_they_say(wbits: int) -> None:
    engine = zlib.decompressobj(wbits)
    assert engine.decompress(packed_blanks(wbits, 3)) == b" " * (3 << 20)
    assert (engine.eof, engine.unused_data) == (True, b"")


@pytest.mark.parametrize("packing", ["gzip", "deflate", "bare", "br", "zstd", "gzip, gzip"])
def test_a_packed_answer_is_unpacked_within_bounds(bad: Callable[..., Bad], packing: str) -> None:
    """1 GiB of blanks from one megabyte."""
    body = packed_blanks({"gzip": 31, "gzip, gzip": 31, "bare": -15}.get(packing, 15))
    body = gzip.compress(body) if packing == "gzip, gzip" else body
    encoding = "deflate" if packing == "bare" else packing
    start = f"HTTP/1.1 200 OK\nContent-Encoding: {encoding}\nContent-Length: {len(body)}"
    server = bad(answer(start, lambda: iter([body])))
    with pytest.raises(InvalidInput, match=r"decompressed|not asked for"), documents(server) as reader:
        reader.read(server.url)


@pytest.mark.parametrize("packing", ["gzip", "deflate", "bare"])
def test_packed_answers_that_are_what_they_say_are_read(bad: Callable[..., Bad], packing: str) -> None:
    engine = zlib.compressobj(9, wbits={"gzip": 31, "bare": -15}.get(packing, 15))
    body = engine.compress(b'{"a": [1, 2]}') + engine.flush()
    encoding = "deflate" if packing == "bare" else packing
    start = f"HTTP/1.1 200 OK\nContent-Encoding: {encoding}\nContent-Length: {len(body)}"
    server = bad(answer(start, lambda: iter([body])))
    with documents(server) as reader:
        assert reader.read(server.url) == {"a": [1, 2]}


# ---- time


def documents(server: Bad, timeout_s: float = 1.0, retries: int = 0) -> Documents:
    return Documents(server.url, IngestConfig(timeout_s=timeout_s, retries=retries))


def test_a_document_that_trickles_is_cut(bad: Callable[..., Bad]) -> None:
    server = bad(answer("HTTP/1.1 200 OK\nConnection: close", trickle))
    began = time.monotonic()
    with pytest.raises(AccessError, match="no answer in time"), documents(server) as reader:
        reader.read(server.url)
    assert time.monotonic() - began < 8
    assert server.sent > 3, "bytes came all the while"


def test_a_burst_buys_no_time(bad: Callable[..., Bad]) -> None:
    def body() -> Iterator[bytes]:
        yield b"[" + b" " * (4 << 20)
        yield from trickle()

    server = bad(answer("HTTP/1.1 200 OK\nConnection: close", body))
    began = time.monotonic()
    with pytest.raises(AccessError, match="no answer in time"), documents(server) as reader:
        reader.read(server.url)
    assert time.monotonic() - began < 8


def test_headers_that_trickle_are_cut(bad: Callable[..., Bad]) -> None:
    server = bad(lambda *_: trickle(b"H"))
    began = time.monotonic()
    with pytest.raises(AccessError, match="no answer in time"), documents(server) as reader:
        reader.read(server.url)
    assert time.monotonic() - began < 8
    assert server.sent > 3


@pytest.mark.parametrize("where", ["head", "headers", "span", "whole"])
def test_an_asset_that_trickles_is_cut(bad: Callable[..., Bad], where: str) -> None:
    start = "HTTP/1.1 206 OK\nContent-Range: bytes 0-16383/50000\nConnection: close"
    server = bad(answer(start, trickle) if where != "headers" else lambda *_: trickle(b"H"))
    if where == "whole":
        server = bad(answer("HTTP/1.1 200 OK\nConnection: close", trickle))
    url, began = f"{server.url}/a.tif", time.monotonic()
    head = Head(url, b"", 50000, None, True, 0.0)
    reads = {"span": lambda: fetch(url, head, QUICK, (0, 16384)), "whole": lambda: fetch_whole(url, QUICK)}
    with pytest.raises(TransientError):
        reads.get(where, lambda: fetch_head(url, QUICK))()
    assert time.monotonic() - began < 8
    assert server.sent > 3


def test_a_large_answer_that_flows_is_not_cut(bad: Callable[..., Bad]) -> None:
    """Four times longer than the timeout, at twice the least speed."""

    def body() -> Iterator[bytes]:
        yield b"["
        for _ in range(40):
            yield b" " * (MIN_BYTES_PER_S // 5)
            time.sleep(0.1)
        yield b"]"

    server = bad(answer("HTTP/1.1 200 OK\nConnection: close", body))
    began = time.monotonic()
    with documents(server) as reader:
        assert reader.read(server.url) == []
    assert time.monotonic() - began > 3.5


# ---- waits that a stop ends


@pytest.fixture
def stopping() -> Iterator[None]:
    threading.Timer(0.5, waits.end_waits).start()
    yield
    waits.allow_waits()


def test_pauses_end_with_the_process(stopping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    wait_for_turn("http://x.example/a", [("x.example", 0.001)])
    with pytest.raises(Preempted):
        wait_for_turn("http://x.example/a", [("x.example", 0.001)])
    crowd = Crowd(1)
    with crowd.place("http://y.example/a"), pytest.raises(Preempted), crowd.place("http://y.example/b"):
        pass
    assert time.monotonic() - began < 10


def test_a_pause_that_a_server_asks_for_ends_with_the_process(bad: Callable[..., Bad], stopping: None) -> None:
    server = bad(answer("HTTP/1.1 503 Busy\nRetry-After: 100\nContent-Length: 0", lambda: iter([])))
    began = time.monotonic()
    with pytest.raises(Preempted), documents(server, retries=3) as reader:
        reader.read(server.url)
    assert server.asked == 1
    assert time.monotonic() - began < 10


def test_reads_of_threads_end_with_the_process(bad: Callable[..., Bad], stopping: None) -> None:
    server = bad(answer("HTTP/1.1 200 OK\nConnection: close", lambda: trickle(pause_s=60)))
    caught: list[BaseException] = []

    def read() -> None:
        try:
            with documents(server, timeout_s=100) as reader:
                reader.read(server.url)
        except BaseException as error:  # noqa: BLE001  # whatever ends the thread
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(caught[0], Preempted)


def items(url: str, count: int = 12) -> dict[str, Any]:
    """Items whose files lie at a server, as an item file."""
    found = []
    for number in range(count):
        assets = {
            key: {"href": f"{url}/{number}/{key}.tif", "type": "image/tiff", "eo:bands": [{"name": key}]}
            for key in ("B02", "B03", "B04", "SCL")
        }
        found.append(
            {
                "type": "Feature", "stac_version": "1.0.0", "id": f"S2A_{number}", "collection": "sentinel-2-l2a",
                "geometry": {"type": "Polygon", "coordinates": [[[15, 45], [16, 45], [16, 46], [15, 46], [15, 45]]]},
                "bbox": [15, 45, 16, 46], "links": [], "assets": assets,
                "properties": {"datetime": f"2023-08-{number + 1:02d}T10:00:00Z", "proj:epsg": 32633},
            }
        )  # fmt: skip
    return {"type": "FeatureCollection", "features": found}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stalls", ["document", "headers of assets", "asset", "busy"])
def test_a_signal_ends_a_command_whose_server_stalls(
    bad: Callable[..., Bad], tmp_path: Path, repository: Path, stalls: str, number: int, code: int
) -> None:
    """The server says nothing more, and no timeout is near: the command ends at once, with its exit code."""
    if stalls == "busy":
        server = bad(answer("HTTP/1.1 503 Busy\nRetry-After: 100\nContent-Length: 0", lambda: iter([])))
    elif stalls == "headers of assets":
        server = bad(lambda *_: trickle(b"H", 60))
    else:
        server = bad(answer("HTTP/1.1 200 OK\nConnection: close", lambda: trickle(b"II*\0", pause_s=60)))
    source = server.url
    if stalls != "document":
        (tmp_path / "items.json").write_text(json.dumps(items(server.url)))
        source = str(tmp_path / "items.json")
    script = tmp_path / "command.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from cli.main import main\n"
        "sys.exit(main())\n"
    )
    options = ["--bbox", "15.2,45.2,15.4,45.4", "--allow-private-hosts", "--timeout", "100"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(script), "plan", source, "-o", str(tmp_path / "plan.json"), *options],
            env={**os.environ, "PYTHONPATH": str(repository)}, stdout=said, stderr=said,
        )  # fmt: skip
        try:
            until = time.monotonic() + 60
            while not server.asked:
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.5)
            assert process.poll() is None, (tmp_path / "said").read_text()
            process.send_signal(number)
            began = time.monotonic()
            assert process.wait(20) == code, (tmp_path / "said").read_text()
            assert time.monotonic() - began < 5
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (tmp_path / "said").read_text()


# ---- memory


PEAK = textwrap.dedent(
    """
    import resource, sys
    {setup}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        {attack}
        raised = ""
    except Exception as error:
        raised = f"{{type(error).__name__}}: {{error}}"
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, raised)
    """
)
HEAVIEST_MB = 400
"""A refused document: its text at most twice, which is 64 MiB each, and what counting takes."""


def peak_of(setup: str, attack: str, repository: Path) -> tuple[float, str]:
    """(MB that the peak of memory grew by, the error) of a few lines in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(setup=setup, attack=attack)],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    kilobytes, _, raised = done.stdout.strip().partition(" ")
    return int(kilobytes) / 1024, raised


@pytest.mark.parametrize("text", ["{},", "[],", '{"a":1},', '"ab",', '{"a":{"b":[]}},', '["",{"":0}],'])
def test_packed_documents_of_very_many_values_are_refused_before_they_are_made(text: str, repository: Path) -> None:
    unpacked = f"b'[' + {text.encode()!r} * ({(63 << 20) // len(text)}) + b'0]'"
    # what is made before counts towards the peak, so the text is packed in a process of its own
    setup = (
        "import subprocess\nfrom ingest.scenes.documents import parse_json\n"
        f"code = {'import gzip, sys; sys.stdout.buffer.write(gzip.compress(' + unpacked + ', 6))'!r}\n"
        "data = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout"
    )
    grown, raised = peak_of(setup, "parse_json(data, 'x')", repository)
    assert raised.startswith("InvalidInput"), raised
    assert "memory" in raised
    assert grown < HEAVIEST_MB, f"{grown:.0f} MB"


def test_what_is_not_refused_takes_no_more_than_its_weight(repository: Path) -> None:
    """The estimate is above what Python takes, for each kind of value."""
    for text in (
        "{},",
        "[],",
        '{"a":1},',
        '"ab",',
        "1.5,",
        '{"a":{"b":[]}},',
        "123456,",
        '{"k%07d":2.5},',
        "[15.5,45.5],",
    ):
        many = [text % n if "%" in text else text for n in range(300_000)]
        body = ("[" + "".join(many)).rstrip(",") + "]"
        setup = "import json\ntext = sys.stdin.read()"
        done = subprocess.run(
            [sys.executable, "-c", PEAK.format(setup=setup, attack="kept = json.loads(text)")],
            input=body, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        grown = int(done.stdout.split()[0]) * 1024
        assert grown < weight_of(body.encode()) + (8 << 20), text


def test_texts_full_of_commas_are_no_values() -> None:
    """A description may hold what it likes; only a document that is too heavy by any count is refused."""
    text = json.dumps({"description": "a,b:[{" * 10_000}).encode()
    check_weight(text, "x", len(text) * 2)
    with pytest.raises(InvalidInput, match="memory"):
        check_weight(b"[" + b"{}," * 10_000 + b"0]", "x", 60_000)


def test_a_cut_text_takes_no_time_to_be_counted() -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput):
        check_weight(b'["' + b'\\"' * (4 << 20) + b"," * (8 << 20), "x", 1000)
    with pytest.raises(InvalidInput):
        check_weight(b"[" + b'"\\\\\\"' * (4 << 20), "x", 1000)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("text", ["1.5,", r'"\\\",:[{",', '"words, commas, brackets [[[ and such",'])
def test_what_is_read_of_a_document_stays_within_the_bound(text: str, repository: Path) -> None:
    """The heaviest documents that are not refused."""
    body = f"b'[' + {text.encode()!r} * ({(63 << 20) // len(text)}) + b'0]'"
    setup = f"from ingest.scenes.documents import parse_json\ndata = {body}"
    grown, raised = peak_of(setup, "kept = parse_json(data, 'x')", repository)
    assert raised == ""
    assert grown < 1100, f"{grown:.0f} MB"


def test_lines_without_anything_in_them_are_no_list(repository: Path) -> None:
    feature = json.dumps({"type": "Feature"})
    setup = f"from ingest.scenes.documents import parse_json\ndata = {feature.encode()!r} + b'\\n' * (60 << 20)"
    grown, raised = peak_of(setup, "parse_json(data, 'x')", repository)
    assert raised == ""
    assert grown < HEAVIEST_MB


def test_documents_of_stores_are_bounded() -> None:
    with pytest.raises(InvalidInput, match="at most"):
        load_json(b" " * 1000, "x", most=999)
    with pytest.raises(InvalidInput, match="memory"):
        load_json(b"[" + b"[]," * 100_000 + b"0]", "x", most=400_000)
    with pytest.raises(InvalidInput, match="nested too deeply"):
        load_json(b"[" * 100_000, "x")
    assert load_json(b'{"a": [1]}', "x") == {"a": [1]}


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    """They would be waited for, or read without end."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"a pipe|a device"):
            read_file(path, 1000)
        with pytest.raises(InvalidInput, match=r"a pipe|a device"):
            load_geometry(path)
        with pytest.raises(InvalidInput, match=r"a pipe|a device"):
            Documents(str(path), IngestConfig()).read(str(path))


@pytest.mark.parametrize("kind", ["dictionary", "packed"])
def test_a_parquet_file_of_much_more_than_its_size_is_refused(tmp_path: Path, kind: str, repository: Path) -> None:
    """One text in all rows; it is stored once, and would be made for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "items.parquet"
    # in groups of few rows where each row is written: the writer first makes a group as a whole
    rows, text, group = (20_000, "x" * (1 << 17), 20_000) if kind == "dictionary" else (3_000, "x" * (1 << 19), 100)
    table = pa.table(
        {
            "id": pa.array([""] * group),
            "assets": pa.DictionaryArray.from_arrays(pa.array(np.zeros(group, np.int32)), pa.array([text])),
            "geometry": pa.array([b""] * group, pa.binary()),
        }
    )
    options: dict[str, Any] = {"use_dictionary": kind == "dictionary", "store_schema": False}
    with pq.ParquetWriter(path, table.schema, compression="zstd", **options) as writer:
        for _ in range(rows // group):
            writer.write_table(table, row_group_size=group)
    del table
    assert path.stat().st_size < 4 << 20
    setup = "from ingest.scenes.geoparquet import read_items"
    grown, raised = peak_of(setup, f"read_items({str(path)!r})", repository)
    assert "once decoded" in raised
    assert grown < 1700, f"{grown:.0f} MB"
