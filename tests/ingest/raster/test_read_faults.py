"""Reading from a server that misbehaves: the right pixels or an error that names the cause, and never zeros."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from ingest.raster import download as download_module
from ingest.raster.access import with_asset
from ingest.raster.blocks import BlockReader
from ingest.raster.limits import Access
from ingest.raster.opening import GDAL_OPTIONS
from ingest.raster.ranges import blocks_of, find_range_file
from ingest.raster.read import read_on_grid
from ingest.request.config import SETTINGS, IngestConfig
from ingest.scenes.documents import Documents
from ingest.scenes.scene import AssetRef
from ingest.simulate import ServerHandle, serve
from ingest.testing import write_raster
from ingest.trust.hrefs import HrefPolicy, refuse_private_address
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid

UTM = "EPSG:32633"
GRID = Grid(UTM, (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (512, 512))
QUICK = Access(attempts=3, deadline_s=20, backoff_s=0.02, connect_timeout_s=3, low_speed_s=1, max_pixels=1 << 24)


def pixels(seed: int) -> np.ndarray:
    """Not compressible to less than half, and nowhere 0."""
    return np.random.default_rng(seed).integers(1, 4000, GRID.shape).astype(np.uint16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the simulator's server takes, with one file per kind."""
    root = tmp_path_factory.mktemp("faulty")
    (root / "catalog.json").write_text('{"type": "Catalog", "id": "c", "links": []}')
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    write_raster(root / "zip.tif", GRID, pixels(1), compress="deflate", **tiles)
    write_raster(root / "plain.tif", GRID, pixels(1), compress="none", **tiles)
    write_raster(root / "zip.tif.swap", GRID, pixels(2), compress="deflate", **tiles)
    holes = pixels(1)
    holes[:128, :128] = 0
    write_raster(root / "sparse.tif", GRID, holes, compress="deflate", sparse_ok=True, **tiles)
    return root


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[ServerHandle]:
    with serve(world) as handle:
        yield handle


def ref(href: str, **changes: object) -> AssetRef:
    return AssetRef(**({"band": "blue", "key": "B02", "href": href, "nodata": 0} | changes))  # type: ignore[arg-type]


def read(href: str, access: Access = QUICK, **changes: object) -> np.ndarray:
    return read_on_grid(ref(href, **changes), None, GRID, "nearest", scene="S", access=access)


def ranged(request: Any, data: bytes, **headers: str) -> Any:
    """What a scripted server answers to a request for a range."""
    start, stop = (int(part) for part in request.headers["Range"].removeprefix("bytes=").split("-"))
    body = data[start : stop + 1]
    return 206, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}", **headers}, body


# Faults that pass


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("503first:2", "zip.tif"),
        ("503first:2", "plain.tif"),
        ("429first:2", "zip.tif"),
        ("429first:2", "plain.tif"),
        ("swap:1", "zip.tif"),
    ],
)
def test_faults_that_pass_leave_no_trace(server: ServerHandle, name: str, mode: str) -> None:
    """R03 (bursts), R14 (replaced between header and tiles: all of one version)."""
    server.reset_counters()
    got = read(server.file_url(name, fault=mode))
    assert server.faults[mode.partition(":")[0]] > 0
    versions = [pixels(1), pixels(2)]
    assert any((got == version).all() for version in (versions[1:] if mode.startswith("swap") else versions[:1]))


# Faults that stay: (mode, file, what the error may say)

LASTING = [
    ("403", "zip.tif", "403"),  # R01
    ("404", "zip.tif", "404"),  # R11
    ("503", "plain.tif", "503"),  # R01, R04
    ("trunc", "zip.tif", ""),  # R06
    ("trunc", "plain.tif", ""),  # R01, R06
    ("short206", "plain.tif", ""),  # R06
    ("short206", "zip.tif", ""),
    ("reset", "zip.tif", ""),  # R06
    ("reset", "plain.tif", ""),
    ("stall:2", "plain.tif", ""),  # R07
    ("wrongrange", "zip.tif", ""),  # R09: noticed by decoding
    ("html200", "zip.tif", "got text/html"),  # R10
    ("partialfile", "zip.tif", ""),  # R15
    ("flip", "zip.tif", ""),  # R16
    ("redirect", "zip.tif", "another host"),  # R20
    ("redirectloop", "zip.tif", "redirect"),  # R20
    ("expiring", "zip.tif", "403"),
]


@pytest.mark.parametrize(("mode", "name", "says"), LASTING)
def test_faults_that_stay_are_errors_and_never_zeros(server: ServerHandle, mode: str, name: str, says: str) -> None:
    server.reset_counters()
    access = Access(attempts=2, deadline_s=6, backoff_s=0.02, connect_timeout_s=2, low_speed_s=1)
    began = time.monotonic()
    with pytest.raises(AssetUnreadable) as caught:
        read(f"{server.file_url(name, fault=mode)}?token=canary", access)
    assert time.monotonic() - began < 20  # R04, R07: within the deadline and one last attempt
    assert server.faults[mode.partition(":")[0]] > 0
    assert says in caught.value.reason
    assert "canary" not in str(caught.value)


def test_r05_a_retry_really_asks_the_server(server: ServerHandle) -> None:
    href = server.file_url("zip.tif", fault="503first:3")
    server.reset_counters()
    with pytest.raises(AssetUnreadable):
        read(href, Access(attempts=1, backoff_s=0.01, low_speed_s=1))
    before = server.requests.total()
    for _ in range(3):  # the same process and the same URL: GDAL would answer from its memory of the failed open
        try:
            got = read(href, Access(attempts=1, backoff_s=0.01, low_speed_s=1))
            break
        except AssetUnreadable:
            continue
    assert server.requests.total() > before
    assert (got == pixels(1)).all()


def test_r08_a_server_without_ranges_is_read_whole_or_refused(server: ServerHandle) -> None:
    server.reset_counters()
    with contextlib.suppress(AssetUnreadable):
        assert (read(server.file_url("zip.tif", fault="norange")) == pixels(1)).all()
    assert 0 < server.faults["norange"] <= 2 * QUICK.attempts  # not once per tile: the file has 16


def test_r08_a_large_file_without_ranges_is_refused(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_MAX_WHOLE_BYTES", 1 << 16)
    server.reset_counters()
    with pytest.raises(AssetUnreadable, match="answers no range requests"):
        read(server.file_url("zip.tif", fault="norange"))
    assert 0 < server.faults["norange"] <= 2


@pytest.mark.parametrize("told", ["Last-Modified", "size"])
def test_r14_a_replacement_that_only_its_date_or_size_shows_is_noticed(
    make_server: Callable[[], Any], world: Path, told: str
) -> None:
    other = write_raster(
        world / "other.tif", GRID, pixels(2), compress="none", tiled=True, blockxsize=128, blockysize=128
    )
    versions = [(world / "plain.tif").read_bytes(), other.read_bytes()]  # of one layout: no decoder can tell them apart
    assert len(versions[0]) == len(versions[1])
    if told == "size":
        versions[1] += b"\0"
    asked = [0]

    def answer(request: Any) -> Any:
        asked[0] += 1
        now = min(asked[0] - 1, 1)  # the second request meets the other file
        headers = {"Last-Modified": f"Thu, 0{now + 1} Jan 2026 00:00:00 GMT"} if told == "Last-Modified" else {}
        return ranged(request, versions[now], **headers)

    scripted = make_server()
    scripted.answer["/a.tif"] = answer
    assert (read(f"{scripted.url}/a.tif") == pixels(2)).all()
    assert asked[0] >= 4, "the header was asked for anew, not only the blocks"


def test_r14_a_local_file_that_is_replaced_is_read_anew(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    shutil.copy(world / "zip.tif", path)
    replaced: list[bool] = []

    def use(dataset: Any) -> np.ndarray:
        file = find_range_file(dataset)
        assert file is not None
        file.fetch(blocks_of(dataset, (0, 0, 128, 512)))
        if not replaced:
            shutil.copy(world / "zip.tif.swap", tmp_path / "new")
            (tmp_path / "new").replace(path)
            replaced.append(True)
        blocks = BlockReader.of(dataset, file)
        assert blocks is not None
        return blocks.read(0, 0, 512, 512, None)

    assert (with_asset(str(path), use, scene="S", asset="a", access=QUICK) == pixels(2)).all()
    assert replaced


def test_r20_jpeg_2000_follows_no_redirect_either(make_server: Callable[[], Any], tmp_path: Path) -> None:
    path = write_raster(tmp_path / "a.jp2", GRID, pixels(1), driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    data, here, other = path.read_bytes(), make_server(), make_server()

    asked = [0]

    def turning(request: Any) -> Any:
        asked[0] += 1
        return ranged(request, data) if asked[0] == 1 else (302, {"Location": f"{other.url}/a.jp2"}, b"")

    other.answer["/a.jp2"] = here.answer["/plain.jp2"] = lambda request: ranged(request, data)
    here.answer["/a.jp2"] = turning
    with pytest.raises(AssetUnreadable):
        read(f"{here.url}/a.jp2", Access(attempts=1, deadline_s=5, low_speed_s=1))
    assert asked[0] >= 2, "the redirect was met after the open"
    assert other.requests == []
    assert (read(f"{here.url}/plain.jp2") == pixels(1)).all()


def test_a_raw_codestream_over_http_has_its_georeference_beside_it(world: Path, server: ServerHandle) -> None:
    write_raster(world / "raw.j2k", GRID, pixels(1), driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES", CODEC="J2K")
    (world / "raw.j2k").rename(world / "raw.tif")
    (world / "raw.j2k.aux.xml").rename(world / "raw.tif.aux.xml")
    assert (read(server.file_url("raw.tif")) == pixels(1)).all()
    (world / "raw.tif.aux.xml").unlink()
    with pytest.raises(AssetUnreadable, match="coordinate reference system"):
        read(server.file_url("raw.tif"))


def test_s14_a_name_that_turns_private_after_the_check_gets_no_request(
    make_server: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = make_server()
    port = int(inside.url.rpartition(":")[2])
    inside.json("/catalog.json", {})
    real = socket.getaddrinfo
    answers = ["93.184.216.34"]  # when the name is checked; afterwards it leads to this machine
    resolved = []

    def lookup(host: Any, *arguments: Any, **named: Any) -> Any:
        if host != "rebind.example":
            return real(host, *arguments, **named)
        resolved.append(answers.pop() if answers else "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolved[-1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    source = f"http://rebind.example:{port}/catalog.json"
    policy = HrefPolicy(hosts=frozenset({"rebind.example"}))
    refuse_private_address(source, policy)
    assert resolved == ["93.184.216.34"]
    with pytest.raises(AssetUnreadable, match=r"rebind.example resolves to the private address 127.0.0.1"):
        read(f"http://rebind.example:{port}/a.tif")
    documents = Documents("https://api.example/", IngestConfig(allow_hosts=("rebind.example",)))
    with documents, pytest.raises(InvalidInput, match=r"refused: .* resolves to the private address 127.0.0.1"):
        documents.read(source)
    assert resolved[1:].count("127.0.0.1") >= 2
    assert inside.requests == []
    inside.answer["/a.tif"] = lambda _: (404, {}, b"")
    with pytest.raises(AssetUnreadable, match="404"):
        read(f"http://rebind.example:{port}/a.tif", replace(QUICK, private_names=None))
    assert inside.paths() == ["/a.tif"]


def test_r17_a_hole_that_is_meant_is_nodata_and_a_lost_tile_is_an_error(server: ServerHandle, world: Path) -> None:
    got = read(server.file_url("sparse.tif"))
    assert (got[:128, :128] == 0).all()
    assert (got[128:] == pixels(1)[128:]).all()
    data = bytearray((world / "zip.tif").read_bytes())
    at = bytes(data).rindex(b"\x78\x9c")  # the last tile's stream: its bytes are gone
    lost = world / "lost.tif"
    lost.write_bytes(bytes(data[: at + 10]))
    with pytest.raises(AssetUnreadable):
        read(server.file_url("lost.tif"))


def test_r18_no_network_is_known_at_once() -> None:
    for href in ("http://127.0.0.1:9/a.tif", "http://nohost.invalid/a.tif"):
        began = time.monotonic()
        with pytest.raises(AssetUnreadable) as caught:
            read(href)
        assert time.monotonic() - began < 10
        assert "\n" not in str(caught.value)


def test_r19_a_certificate_of_nobody_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("GDAL_HTTP_UNSAFESSL", "YES")  # what people set to make it go away
    try:
        with pytest.raises(AssetUnreadable, match=r"(?i)certificate"):
            read(f"https://127.0.0.1:{httpd.server_port}/a.tif")
    finally:
        httpd.shutdown()
        httpd.server_close()
    assert not asked


# Files that are not what they should be


def test_r21_bombs_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    wide = tmp_path / "wide.tif"
    profile = {"driver": "GTiff", "width": 100_000, "height": 90_000, "count": 1, "dtype": "uint8", "crs": UTM}
    with rasterio.open(wide, "w", transform=GRID.affine, sparse_ok=True, tiled=True, compress="deflate", **profile):
        pass
    with pytest.raises(AssetUnreadable, match="pixels are more than"):
        read(str(wide))
    coarse = tmp_path / "coarse.tif"
    profile |= {"width": 4096, "height": 4096, "dtype": "uint16", "blockxsize": 4096, "blockysize": 4096}
    with rasterio.open(coarse, "w", transform=GRID.affine, sparse_ok=True, tiled=True, compress="deflate", **profile):
        pass
    assert coarse.stat().st_size < 10_000
    with pytest.raises(AssetUnreadable, match=r"blocks of 4096×4096 pixels decode to 32 MiB from a file of \d+ bytes"):
        read(str(coarse))  # 32 MiB would be no harm, but not of so small a file
    with pytest.raises(AssetUnreadable, match="decode to 32 MiB"):
        read(str(coarse), replace(QUICK, max_block_bytes=1 << 20))


def test_r22_other_formats_named_tif_are_refused(tmp_path: Path) -> None:
    starts = {"pdf": b"%PDF-1.7", "hdf4": b"\x0e\x03\x13\x01", "netcdf": b"CDF\x01", "hdf5": b"\x89HDF\r\n\x1a\n",
              "vrt": b"<VRTDataset>", "gti": b"<GDALTileIndexDataset>", "stacit": b'{"type": "FeatureCollection"}',
              "zip": b"PK\x03\x04"}  # fmt: skip
    for name, start in starts.items():
        path = tmp_path / f"{name}.tif"
        path.write_bytes(start + b"\0" * 200)
        with pytest.raises(AssetUnreadable, match="not a TIFF"):
            read(str(path))


def test_r23_palettes_single_bits_and_complex_numbers_are_no_data_bands(tmp_path: Path) -> None:
    small = Grid(UTM, GRID.transform, (64, 64))
    ones = np.ones(small.shape, np.uint8)
    bit = write_raster(tmp_path / "bit.tif", small, ones, nbits=1)
    palette = tmp_path / "palette.tif"
    with rasterio.open(
        palette, "w", driver="GTiff", height=64, width=64, count=1, dtype="uint8", crs=UTM, transform=small.affine,
        photometric="palette",
    ) as dataset:  # fmt: skip
        dataset.write(ones, 1)
        dataset.write_colormap(1, {0: (0, 0, 0), 1: (255, 0, 0)})
    complex_ = write_raster(tmp_path / "complex.tif", small, ones.astype(np.complex64), nodata=None)
    alpha = write_raster(tmp_path / "alpha.tif", small, ones)
    with rasterio.open(alpha, "r+") as dataset:
        dataset.colorinterp = [ColorInterp.alpha]
    for path, says in ((bit, "8 bits"), (palette, "palette"), (complex_, "complex"), (alpha, "alpha band")):
        with pytest.raises(AssetUnreadable, match=says):
            read_on_grid(ref(str(path)), None, small, "nearest", scene="S", access=QUICK)
    # a palette only colours the classes of a class layer
    layer = ref(str(palette), band="scl", key="SCL", kind="class")
    assert (read_on_grid(layer, None, small, "nearest", stored="uint8", scene="S", access=QUICK) == 1).all()


def test_r25_georeferences_that_lie_are_errors(tmp_path: Path) -> None:
    rows = pixels(1)
    for name, changes in {
        "rotated": {"transform": rasterio.Affine(10, 1, 500_000, 1, -10, 5_000_000)},
        "flipped": {"transform": rasterio.Affine(-10, 0, 500_000, 0, -10, 5_000_000)},
        "south-up": {"transform": rasterio.Affine(10, 0, 500_000, 0, 10, 5_000_000)},
        "none": {"crs": None},
    }.items():
        path = write_raster(tmp_path / f"{name}.tif", GRID, rows, **changes)
        with pytest.raises(AssetUnreadable):
            read(str(path))
    half = write_raster(tmp_path / "half.tif", GRID, rows, transform=rasterio.Affine(10, 0, 500_005, 0, -10, 4_999_995))
    with pytest.raises(AssetUnreadable, match="not the one that was planned"):
        read_on_grid(ref(str(half)), GRID, GRID, "nearest", scene="S", access=QUICK)


def test_r02_no_option_maps_errors_to_nodata() -> None:
    assert GDAL_OPTIONS["GTIFF_IGNORE_READ_ERRORS"] == "NO"
    assert "GDAL_NUM_THREADS" not in GDAL_OPTIONS
    assert not {"errors_as_nodata", "fail_on_error"} & set(SETTINGS)
