from __future__ import annotations

import ast
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pystac_client
import pytest
import rasterio
import rasterio.errors

from ingest.simulate import ServerHandle, SimulatedWorld, serve
from ingest.simulate.faults import MODES, Fault, flip_bits
from ingest.simulate.files import _parse_range
from zarr_store.errors import AccessError, InvalidInput, UnknownName

# what the project sets for reading: no directory listings, and none of GDAL's own retries
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_HTTP_MAX_RETRY": "0", "CPL_VSIL_CURL_USE_HEAD": "YES"}


def ask(url: str, method: str = "GET", body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        text = None if body is None else json.dumps(body)
        if text is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, f"{parts.path}?{parts.query}", text, headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_landing_page_and_collections(server: ServerHandle) -> None:
    client = pystac_client.Client.open(server.stac_url)
    assert client.id == "terrashard-simulator"
    assert client.conforms_to("ITEM_SEARCH")
    assert client.conforms_to("QUERY")
    assert [c.id for c in client.get_collections()] == ["sentinel-2-l2a", "sentinel-1-rtc"]
    status, _, body = ask(f"{server.url}/conformance")
    assert status == 200
    assert any("item-search" in c for c in json.loads(body)["conformsTo"])
    assert ask(f"{server.url}/collections/sentinel-3")[0] == 404
    assert ask(f"{server.url}/collections/sentinel-2-l2a/items/none")[0] == 404


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_search_pages_through_everything_once(server: ServerHandle, small_world: SimulatedWorld, method: str) -> None:
    client = pystac_client.Client.open(server.stac_url)
    search = client.search(limit=3, method=method)
    pages = [[item.id for item in page] for page in search.pages()]
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    found = [name for page in pages for name in page]
    on_disk = {path.stem for path in small_world.path.glob("sentinel-*/*/*.json")}
    assert set(found) == on_disk
    assert len(found) == len(on_disk)
    assert search.matched() == len(on_disk)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("question", "count"),
    [
        ({"collections": ["sentinel-1-rtc"]}, 2),
        ({"collections": ["sentinel-2-l2a"], "datetime": "2022-04-01/2022-06-30"}, 4),
        ({"collections": ["sentinel-2-l2a"], "datetime": "../2021-12-31T00:00:00Z"}, 2),
        ({"ids": ["S2A_33TWL_20220724_0_L2A"]}, 1),
        ({"bbox": [10.0, 50.0, 11.0, 51.0]}, 0),
        ({"bbox": [16.2, 45.1, 16.3, 45.2]}, 10),
        ({"intersects": {"type": "Point", "coordinates": [16.2545, 45.1505]}, "collections": ["sentinel-2-l2a"]}, 4),
        ({"query": {"s2:processing_baseline": {"eq": "03.01"}}}, 2),
        ({"collections": ["sentinel-2-l2a"], "query": {"eo:cloud_cover": {"gte": 0, "lte": 100}}}, 8),
        ({"query": {"eo:cloud_cover": {"lt": 0}}}, 0),
    ],
)
def test_search_selects(server: ServerHandle, method: str, question: dict, count: int) -> None:
    client = pystac_client.Client.open(server.stac_url)
    assert len(list(client.search(method=method, **question).items())) == count


def test_items_of_a_collection_page_too(server: ServerHandle) -> None:
    found: list[str] = []
    url: str | None = f"{server.url}/collections/sentinel-2-l2a/items?limit=3"
    while url:
        page = json.loads(ask(url)[2])
        found += [item["id"] for item in page["features"]]
        url = next((link["href"] for link in page["links"] if link["rel"] == "next"), None)
    assert len(found) == len(set(found)) == 8


def test_nonsense_is_answered_with_400(server: ServerHandle) -> None:
    assert ask(f"{server.url}/search?token=nonsense")[0] == 400
    assert ask(f"{server.url}/search?bbox=1,2")[0] == 400
    assert ask(f"{server.url}/search?datetime=yesterday")[0] == 400
    assert ask(f"{server.url}/search?query=nonsense")[0] == 400
    assert ask(f"{server.url}/search", "POST", {"query": {"x": {"like": 1}, "eo:cloud_cover": {"like": 1}}})[0] in (
        200,
        400,
    )
    assert ask(f"{server.url}/search", "POST", {"query": {"eo:cloud_cover": {"like": 1}}})[0] == 400


def gdal(url: str, use: str, *, listing: bool = False) -> Any:
    """What GDAL's own client prints of a file, in a process of its own: ours opens no address with it."""
    options = {} if listing else GDAL
    code = (
        "import rasterio, sys\n"
        f"with rasterio.Env(**{options!r}), rasterio.open('/vsicurl/' + sys.argv[1]) as file:\n"
        f"    {use}"
    )
    told = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    return ast.literal_eval(told.stdout)


def test_hrefs_lead_to_the_pixels_on_disk(server: ServerHandle, small_world: SimulatedWorld) -> None:
    client = pystac_client.Client.open(server.stac_url)
    item = next(client.search(ids=["S2B_33TXL_20220616_0_L2A"]).items())
    href = item.assets["nir"].href
    assert href.startswith(f"{server.url}/files/")
    server.reset_counters()
    window = np.array(gdal(href, "print(file.read(1, window=((130, 150), (10, 40))).tolist())"))
    local = small_world.path / "sentinel-2-l2a" / item.id / "B08.tif"
    with rasterio.open(local) as file:
        assert np.array_equal(window, file.read(1)[130:150, 10:40])
    assert server.requests[urlsplit(href).path] >= 2
    assert 0 < server.bytes_sent < local.stat().st_size + 1


def test_without_listing_switched_off_gdal_still_opens(server: ServerHandle, blue: str) -> None:
    # GDAL then asks for sidecar files while rasterio holds the interpreter's lock
    assert gdal(server.file_url(blue), "print(file.count)", listing=True) == 1


def test_ranges(server: ServerHandle, small_world: SimulatedWorld, blue: str) -> None:
    whole = (small_world.path / blue).read_bytes()
    url = server.file_url(blue)
    status, headers, body = ask(url)
    assert (status, body) == (200, whole)
    assert headers["accept-ranges"] == "bytes"
    tag = headers["etag"]
    status, headers, body = ask(url, "HEAD")
    assert (status, body, int(headers["content-length"]), headers["etag"]) == (200, b"", len(whole), tag)
    status, headers, body = ask(url, Range="bytes=100-199")
    assert (status, body) == (206, whole[100:200])
    assert headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert ask(url, Range="bytes=-10")[2] == whole[-10:]
    assert ask(url, Range=f"bytes={len(whole) - 5}-")[2] == whole[-5:]
    assert ask(url, Range=f"bytes={len(whole)}-")[0] == 416
    assert ask(url, Range="bytes=0-1,4-5")[0] == 200  # several ranges may be ignored


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, (0, 50)),
        ("bytes=0-0", (0, 1)),
        ("bytes=10-999", (10, 50)),
        ("bytes=-99", (0, 50)),
        ("bytes=-0", None),
        ("bytes=50-", None),
        ("bytes=9-3", None),
        ("bytes=-", (0, 50)),
        ("lines=1-2", (0, 50)),
    ],
)
def test_range_headers(header: str | None, span: tuple[int, int] | None) -> None:
    assert _parse_range(header, 50) == span


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "a/%2e%2e/%2e%2e/secret.txt",
        "link.txt",
        "%2fetc/passwd",
        "nowhere.tif",
        "sentinel-2-l2a",
        "a%00b",
    ],
)
def test_only_files_of_the_world_are_served(server: ServerHandle, small_world: SimulatedWorld, path: str) -> None:
    secret = small_world.path.parent / "secret.txt"
    secret.write_text("not part of the world")
    link = small_world.path / "link.txt"
    link.symlink_to(secret)
    try:
        assert ask(f"{server.url}/files/{path}")[0] == 404
    finally:
        link.unlink()


def test_each_fault_fires_and_is_counted(server: ServerHandle, small_world: SimulatedWorld, blue: str) -> None:
    whole = (small_world.path / blue).read_bytes()
    fired = {}

    def through(mode: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        server.reset_counters()
        try:
            return ask(server.file_url(blue, fault=mode), **headers)
        finally:
            fired[mode.partition(":")[0]] = server.faults[mode.partition(":")[0]]

    assert through("404")[0] == 404
    assert through("403")[0] == 403
    assert through("503")[0] == 503
    status, headers, body = through("html200")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/html")
    assert body.startswith(b"<!DOCTYPE html>")
    status, headers, body = through("norange", Range="bytes=0-9")
    assert (status, body) == (200, whole)
    assert "content-range" not in headers
    body = through("flip")[2]
    differing = sum(a != b for a, b in zip(body, whole, strict=True))
    assert differing == sum(1 for p in range(len(whole) // 2, len(whole)) if p % 1024 == 0)
    for mode in ("trunc", "stall:0.3"):
        began = time.monotonic()
        with pytest.raises(http.client.IncompleteRead) as short:
            through(mode)
        assert short.value.partial == whole[: len(whole) // 2]
        assert (time.monotonic() - began > 0.25) is mode.startswith("stall")
    for mode in ("503first:2", "429first:2"):
        url = server.file_url(blue, fault=mode)
        server.reset_counters()
        answers = [ask(url) for _ in range(4)]
        assert [a[0] for a in answers] == [int(mode[:3])] * 2 + [200] * 2
        assert answers[0][1]["retry-after"] == "0"
        fired[mode.partition(":")[0]] = server.faults[mode.partition(":")[0]]
    server.reset_counters()
    others = [ask(server.file_url(path, fault="503every:3"))[0] for path in (blue, blue, "no-such-file", blue)]
    assert others == [200, 200, 503, 200], "requests are counted over all files"
    fired["503every"] = server.faults["503every"]
    with pytest.raises(ConnectionResetError):
        through("reset")
    status, headers, body = through("short206", Range="bytes=1000-2999")
    assert (status, headers["content-range"], body) == (206, f"bytes 1000-1999/{len(whole)}", whole[1000:2000])
    status, headers, body = through("wrongrange:8", Range="bytes=1000-1099")
    assert (headers["content-range"], body) == (f"bytes 1000-1099/{len(whole)}", whole[1008:1108])
    assert through("partialfile")[2] == whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    url = server.file_url(blue, fault="expiring")
    assert ask(f"{url}?until={time.time() + 60}")[0] == 200
    assert ask(f"{url}?until=nonsense")[0] == 403
    assert through("expiring")[0] == 403
    swapped = small_world.path / f"{blue}.swap"
    try:
        swapped.write_bytes(b"another file")
        server.reset_counters()
        answers = [ask(server.file_url(blue, fault="swap:1")) for _ in range(2)]
        fired["swap"] = server.faults["swap"]
    finally:
        swapped.unlink()
    assert [answer[2] for answer in answers] == [whole, b"another file"]
    assert answers[0][1]["etag"] != answers[1][1]["etag"]
    assert ask(server.file_url(blue), **{"If-Match": answers[0][1]["etag"]})[0] == 200
    assert ask(server.file_url(blue), **{"If-Match": answers[1][1]["etag"]})[0] == 412
    for mode, host in (("redirect", "localhost"), ("redirectloop", "127.0.0.1")):
        status, headers, _ = through(mode)
        assert (status, urlsplit(headers["location"]).hostname) == (302, host)
    assert set(fired) == set(MODES)
    assert all(fired.values()), fired


def test_gdal_notices_flipped_bits(server: ServerHandle, blue: str) -> None:
    server.reset_counters()
    read = "try: file.read(1)\n    except rasterio.errors.RasterioIOError: print(True)"
    assert gdal(server.file_url(blue, fault="flip"), read) is True
    assert server.faults["flip"] > 0


def test_faults_on_the_api_s_own_hrefs_latency_and_end(small_world: SimulatedWorld) -> None:
    with serve(small_world.path, faults={"*TWL*/B04.tif": "404"}, latency_s=0.2) as handle:
        client = pystac_client.Client.open(handle.stac_url)
        west, east = client.search(datetime="2021-08-08", sortby=None).items()
        began = time.monotonic()
        assert ask(west.assets["red"].href)[0] == 404
        assert ask(east.assets["red"].href, "HEAD")[0] == 200
        assert ask(west.assets["blue"].href, "HEAD")[0] == 200
        assert time.monotonic() - began > 0.55
        assert handle.faults == {"404": 1}
        # bound to the loopback address alone
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        mine = [
            line.split()[1]
            for line in lines
            if line.split()[1].endswith(f":{handle.port:04X}") and line.split()[3] == "0A"
        ]
        assert mine == [f"0100007F:{handle.port:04X}"]
        pid, url = handle.pid, handle.url
        # a stalled answer does not hold up the end
        slow = socket.create_connection(("127.0.0.1", handle.port))
        slow.sendall(f"GET /fault/stall:60/files/{'truth.tif'} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        slow.recv(100)
        began = time.monotonic()
    assert time.monotonic() - began < 6
    slow.close()
    with pytest.raises(ConnectionRefusedError):
        ask(url)
    with pytest.raises(OSError, match="No such process"):
        os.kill(pid, 0)


def test_the_server_ends_when_its_user_is_killed(small_world: SimulatedWorld) -> None:
    code = (
        "import time; from ingest.simulate import serve\n"
        f"with serve({str(small_world.path)!r}) as h: print(h.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        pid = int(user.stdout.readline())
        user.send_signal(signal.SIGKILL)
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # ended; nobody is left here to collect it
            return
        time.sleep(0.05)
    pytest.fail("the server outlived its user")


def test_bad_orders_are_refused(small_world: SimulatedWorld, server: ServerHandle, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no simulated world"), serve(tmp_path):
        pass
    with pytest.raises(UnknownName, match="did you mean 'stall'"), serve(small_world.path, faults={"*": "stal"}):
        pass
    with pytest.raises(AccessError, match="choose another port"), serve(small_world.path, port=server.port):
        pass
    with pytest.raises(InvalidInput, match="number after the colon"):
        Fault.parse("503first:many")
    assert ask(f"{server.url}/fault/nonsense/files/truth.tif")[0] == 400


def test_flips_do_not_depend_on_how_a_file_is_cut() -> None:
    data = bytes(5000)
    whole = flip_bits(data, 0, 5000)
    parts = b"".join(flip_bits(data[s : s + 700], s, 5000) for s in range(0, 5000, 700))
    assert whole == parts
    assert sum(b != 0 for b in whole) == 2
