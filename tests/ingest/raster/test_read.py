"""Reading one asset: pixels against plain rasterio, windows against wholes, faults against a server that makes them."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from ingest.pixels.mosaic import harmonise_dn
from ingest.raster.access import open_asset
from ingest.raster.header import grid_of
from ingest.raster.limits import Access
from ingest.raster.read import read_on_grid
from ingest.raster.resample import pick_resampling
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid

UTM = "EPSG:32633"
SOURCE = Grid(UTM, (60.0, 0.0, 600_000.0, 0.0, -60.0, 5_000_040.0), (150, 170))
QUICK = Access(attempts=3, deadline_s=20, backoff_s=0.02, low_speed_s=1)


def ref(path: Path | str, kind: Any = "data") -> AssetRef:
    return AssetRef(band="blue", key="B02", href=str(path), nodata=0, kind=kind)


@pytest.fixture(scope="module")
def rasters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A noisy data band and a class band with holes and a swath edge."""
    folder = tmp_path_factory.mktemp("rasters")
    rng = np.random.default_rng(7)
    dn = rng.integers(1, 12_000, SOURCE.shape).astype(np.uint16)
    scl = rng.integers(1, 12, SOURCE.shape).astype(np.uint8)
    rows, cols = np.indices(SOURCE.shape)
    for pixels in (dn, scl):
        pixels[cols < rows // 5] = 0
        pixels[rng.random(SOURCE.shape) < 0.02] = 0
    return {
        "data": write_raster(folder / "B02.tif", SOURCE, dn),
        "class": write_raster(folder / "SCL.tif", SOURCE, scl),
    }


TARGETS = {
    "aligned": Grid(UTM, (60.0, 0.0, 598_800.0, 0.0, -60.0, 5_000_640.0), (190, 200)),
    "half pixel": Grid(UTM, (60.0, 0.0, 599_970.0, 0.0, -60.0, 5_000_070.0), (160, 180)),
    # holds y = 4 992 000 m, where an edge of the warp's blocks is also an edge of source pixels
    "finer, nested": Grid(UTM, (20.0, 0.0, 600_020.0, 0.0, -20.0, 5_000_000.0), (420, 333)),
    "coarser": Grid(UTM, (150.0, 0.0, 599_900.0, 0.0, -150.0, 5_000_100.0), (64, 70)),
    "next zone": Grid("EPSG:32634", (60.0, 0.0, 125_000.0, 0.0, -60.0, 5_016_000.0), (280, 300)),
    "degrees": Grid("EPSG:4326", (0.0007, 0.0, 16.26, 0.0, -0.0006, 45.16), (150, 190)),
}
STORED: dict[str, Any] = {"data": "uint16", "class": "uint8"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("data", "bilinear"), ("data", "nearest"), ("data", "average"), ("data", "cubic"), ("class", "x")],
)
def test_windows_equal_the_whole(rasters: dict[str, Path], target: Grid, kind: str, kernel: str) -> None:
    whole: np.ndarray = read_on_grid(ref(rasters[kind], kind), SOURCE, target, kernel, stored=STORED[kind])
    assert (whole > 0).mean() > 0.1, "the grids must overlap, or nothing is compared"
    rng = np.random.default_rng(3)
    for _ in range(6):
        height, width = (int(v) for v in rng.integers(1, 90, 2))
        row = int(rng.integers(0, max(1, target.height - height)))
        col = int(rng.integers(0, max(1, target.width - width)))
        height, width = min(height, target.height - row), min(width, target.width - col)
        part = read_on_grid(
            ref(rasters[kind], kind), SOURCE, target.window(row, col, height, width), kernel, stored=STORED[kind]
        )
        np.testing.assert_array_equal(part, whole[row : row + height, col : col + width])


@pytest.mark.parametrize("kind", ["data", "class"])
def test_aligned_pixels_are_copied_bit_exact(rasters: dict[str, Path], kind: str) -> None:
    target = TARGETS["aligned"]
    got = read_on_grid(ref(rasters[kind], kind), None, target, "cubic", stored=STORED[kind])
    with rasterio.open(rasters[kind]) as dataset:
        source = dataset.read(1)
    row, col = 10, 20  # 600 m and 1 200 m beyond the source's corner
    assert SOURCE.offset_of(target) == (-row, -col)
    np.testing.assert_array_equal(got[row : row + 150, col : col + 170], source)
    got[row : row + 150, col : col + 170] = 0
    assert not got.any()


def test_nested_classes_are_repeated(rasters: dict[str, Path]) -> None:
    target = TARGETS["finer, nested"]
    got = read_on_grid(ref(rasters["class"], "class"), SOURCE, target, "bilinear", stored="uint8")
    with rasterio.open(rasters["class"]) as dataset:
        source = dataset.read(1)
    for row in range(0, target.height, 7):
        for col in range(0, target.width, 5):
            x, y = target.x()[col], target.y()[row]
            assert got[row, col] == source[int((5_000_040 - y) // 60), int((x - 600_000) // 60)]


@pytest.mark.parametrize("kernel", ["bilinear", "average"])
@pytest.mark.parametrize("name", ["half pixel", "finer, nested"])
def test_warp_equals_gdal_over_the_whole_raster(rasters: dict[str, Path], name: str, kernel: str) -> None:
    target = TARGETS[name]
    with rasterio.open(rasters["data"]) as dataset:
        source = dataset.read(1)
    expected = np.zeros(target.shape, np.uint16)
    reproject(
        source, expected, src_transform=SOURCE.affine, src_crs=UTM, src_nodata=0, dst_transform=target.affine,
        dst_crs=UTM, dst_nodata=0, resampling=Resampling[kernel],
    )  # fmt: skip
    got: np.ndarray = read_on_grid(ref(rasters["data"]), SOURCE, target, kernel)
    # one unit where a mean ends in exactly one half: GDAL's last bit then depends on the window's origin
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got != expected).mean() < 0.002
    assert ((got > 0) == (expected > 0)).all()


def test_kernels_follow_kind_and_scale() -> None:
    fine, same, coarse = (Grid(UTM, (r, 0, 0, 0, -r, 0), (9, 9)) for r in (10.0, 20.0, 60.0))
    assert pick_resampling("data", coarse, fine, "bilinear") == "bilinear"
    assert pick_resampling("data", fine, same, "bilinear") == "average"
    assert pick_resampling("class", fine, coarse, "bilinear") == "mode"
    assert pick_resampling("class", coarse, fine, "bilinear") == "nearest"
    other_zone = Grid("EPSG:32634", (20.0, 0, 0, 0, -20.0, 0), (9, 9))
    assert pick_resampling("class", same, other_zone, "bilinear") == "nearest"


def test_offset_keeps_nodata_and_saturation() -> None:
    dn = np.array([0, 1, 999, 1000, 1001, 11_000, 65_535], np.uint16)
    assert harmonise_dn(dn, -1000).tolist() == [0, 1, 1, 1, 1, 10_000, 65_535]
    assert harmonise_dn(dn, 0) is dn


def test_another_nodata_value_becomes_zero_and_infinities_nan(tmp_path: Path) -> None:
    dn = np.array([[5, 65535], [7, 0]], np.uint16)
    small = Grid(UTM, (10.0, 0, 0, 0, -10.0, 0), (2, 2))
    path = write_raster(tmp_path / "a.tif", small, dn, nodata=65535)
    assert read_on_grid(ref(path), small, small, "bilinear").tolist() == [[5, 0], [7, 0]]
    power = np.array([[0.25, -32768.0], [0.0, np.inf]], np.float32)
    path = write_raster(tmp_path / "vv.tif", small, power, nodata=-32768)
    radar = AssetRef(band="vv", key="vv", href=str(path), nodata=-32768)
    got = read_on_grid(radar, small, small, "bilinear", stored="float32")
    np.testing.assert_array_equal(got, [[0.25, np.nan], [np.nan, np.nan]])


def test_raw_codestream_named_tif_is_read(zagreb: Path) -> None:
    path = zagreb.parent / "sentinel-2-l2a" / "S2A_33TWL_20230815_0_L2A" / "B02.tif"
    assert path.read_bytes()[:4] == b"\xff\x4f\xff\x51"
    with open_asset(str(path), scene="s", asset="B02") as dataset:
        assert dataset.driver == "JP2OpenJPEG"
        header = grid_of(dataset)
        expected = dataset.read(1)
    assert (header.crs, header.shape, header.resolution) == (UTM, (915, 915), (120.0, 120.0))
    np.testing.assert_array_equal(read_on_grid(ref(path), header, header, "bilinear"), expected)


# Faults of files


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name → (file, what the error must say)."""
    small = Grid(UTM, (10.0, 0, 0, 0, -10.0, 0), (64, 64))
    noise = np.random.default_rng(0).integers(1, 9999, (64, 64)).astype(np.uint16)
    good = write_raster(folder / "good.tif", small, noise)
    truncated = folder / "truncated.tif"
    truncated.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    html = folder / "login.tif"
    html.write_text("<!DOCTYPE html><html>Please log in</html>")
    vrt = folder / "vrt.tif"
    vrt.write_text(f"<VRTDataset rasterXSize='1' rasterYSize='1'><SourceFilename>{good}</SourceFilename></VRTDataset>")
    complex_ = write_raster(folder / "complex.tif", small, noise.astype(np.complex64), nodata=None)
    float_ = write_raster(folder / "float.tif", small, noise.astype(np.float32))
    two = folder / "two.tif"
    with rasterio.open(
        two, "w", driver="GTiff", height=64, width=64, count=2, dtype="uint16", crs=UTM, transform=small.affine
    ) as dataset:
        dataset.write(np.stack([noise, noise]))
    bare = write_raster(folder / "bare.tif", small, noise, crs=None)
    south_up = write_raster(folder / "south.tif", small, noise, transform=rasterio.Affine(10, 0, 0, 0, 10, 0))
    giant = write_raster(
        folder / "giant.tif", Grid(UTM, (10.0, 0, 0, 0, -10.0, 0), (8192, 8192)), np.zeros((8192, 8192), np.uint8),
        blockxsize=8192, blockysize=8192, sparse_ok=True,
    )  # fmt: skip
    return {
        "absent": (folder / "absent.tif", "No such file"),
        "truncated": (truncated, ""),
        "html": (html, "not a TIFF"),
        "vrt": (vrt, "not a TIFF"),
        "complex": (complex_, "complex"),
        "float": (float_, "whole numbers"),
        "two bands": (two, "expected one band"),
        "no crs": (bare, "no coordinate reference system"),
        "south up": (south_up, "north-up"),
        "bomb": (giant, "decode to 64 MiB"),
        "folder": (folder, "directory"),
    }


def test_broken_files_are_errors_and_never_zeros(tmp_path: Path) -> None:
    target = Grid(UTM, (10.0, 0, 0, 0, -10.0, 0), (64, 64))
    for name, (path, text) in broken_files(tmp_path).items():
        with pytest.raises(AssetUnreadable, match="scene S2X, asset B02") as caught:
            read_on_grid(ref(path), None, target, "bilinear", scene="S2X", access=QUICK)
        assert text in caught.value.reason, name
        assert str(tmp_path) not in caught.value.reason, "causes go into cubes, folders do not"


@pytest.mark.parametrize(
    "href",
    ["/vsicurl/http://127.0.0.1/a.tif", "vrt:///etc/passwd", "file:///etc/passwd", "relative.tif", "GTIFF_DIR:1:a"],
)
def test_other_kinds_of_paths_are_refused(href: str) -> None:
    with pytest.raises(AssetUnreadable, match=r"expected an http\(s\) or s3 URL or an absolute local path"):
        read_on_grid(ref(href), None, SOURCE, "bilinear", access=QUICK)


def test_a_file_that_changed_since_the_plan_is_refused(rasters: dict[str, Path]) -> None:
    planned = Grid(UTM, SOURCE.transform, (151, 170))
    with pytest.raises(AssetUnreadable, match="not the one that was planned"):
        read_on_grid(ref(rasters["data"]), planned, SOURCE, "bilinear")


def test_gdal_threads_are_refused(rasters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with rasterio.Env(GDAL_NUM_THREADS="2"), pytest.raises(InvalidInput, match="GDAL_NUM_THREADS"):
        read_on_grid(ref(rasters["data"]), SOURCE, SOURCE, "bilinear")
    monkeypatch.setenv("GDAL_NUM_THREADS", "ALL_CPUS")
    with pytest.raises(InvalidInput, match="GDAL_NUM_THREADS"):
        read_on_grid(ref(rasters["data"]), SOURCE, SOURCE, "bilinear")


# Faults of servers


class FaultServer(http.server.ThreadingHTTPServer):
    """Serves one file with ranges, and misbehaves for the first `faulty` requests of each path's fault."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data = data
        self.faulty: dict[str, int] = {}
        self.requests: dict[str, int] = {}

    def href(self, fault: str, times: int) -> str:
        self.faulty[f"/{fault}/B02.tif"] = times
        return f"http://127.0.0.1:{self.server_address[1]}/{fault}/B02.tif?sig=secret"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] = self.server.requests.get(path, 0) + 1
        start, _, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        data = self.server.data
        body = data[int(start) : int(stop or len(data)) + 1]
        peek = body == data[:64]
        fault = path.split("/")[1]
        # bodies are broken after the peek, so that GDAL is the one that meets the fault
        hit = self.server.faulty.get(path, 0) > 0 and not (peek and fault in ("truncated", "reset"))
        if hit:
            self.server.faulty[path] -= 1
        status = {"gone": 404, "forbidden": 403, "busy": 503, "limited": 429}.get(fault) if hit else None
        status = status or (206 if "Range" in self.headers else 200)
        if fault == "html":
            status, body = 200, b"<html>log in</html>"
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if fault == "html" else "image/tiff")
        self.send_header("Retry-After", "0")
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body) if status in (200, 206) else 0))
        self.end_headers()
        if status in (200, 206) and self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if hit and fault in ("truncated", "reset") else body)
        if hit and fault == "reset":
            self.close_connection = True
            self.connection.close()

    do_HEAD = do_GET


@pytest.fixture
def server(rasters: dict[str, Path]) -> Iterator[FaultServer]:
    running = FaultServer(rasters["data"].read_bytes())
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(5)


@pytest.mark.parametrize(("fault", "times"), [("busy", 2), ("limited", 1), ("truncated", 2), ("none", 0)])
def test_passing_faults_are_retried_to_the_same_pixels(
    server: FaultServer, rasters: dict[str, Path], fault: str, times: int
) -> None:
    href = server.href(fault, times)
    got = read_on_grid(ref(href), SOURCE, SOURCE, "bilinear", access=QUICK)
    np.testing.assert_array_equal(got, read_on_grid(ref(rasters["data"]), SOURCE, SOURCE, "bilinear"))
    path = f"/{fault}/B02.tif"
    assert server.faulty[path] == 0, "the fault never fired"
    assert server.requests[path] > times


@pytest.mark.parametrize(
    ("fault", "says", "most"),
    [("gone", "HTTP 404", 1), ("forbidden", "HTTP 403", 1), ("html", "got text/html", 1), ("busy", "503", 12)],
)
def test_lasting_faults_are_errors(server: FaultServer, fault: str, says: str, most: int) -> None:
    href = server.href(fault, 10_000)
    with pytest.raises(AssetUnreadable, match=says) as caught:
        read_on_grid(ref(href), SOURCE, SOURCE, "bilinear", scene="S2X", access=QUICK)
    assert "secret" not in str(caught.value)
    assert 1 <= server.requests[f"/{fault}/B02.tif"] <= most


def test_a_body_that_stays_truncated_is_an_error(server: FaultServer) -> None:
    href = server.href("truncated", 10_000)
    with pytest.raises(AssetUnreadable, match="after 3 attempts"):
        read_on_grid(ref(href), SOURCE, SOURCE, "bilinear", access=QUICK)
    assert server.requests["/truncated/B02.tif"] == QUICK.attempts, "each attempt ends at the cut head"


def test_a_closed_port_fails_fast(server: FaultServer) -> None:
    href = server.href("none", 0)
    server.shutdown()
    server.server_close()
    with pytest.raises(AssetUnreadable, match="refused"):
        read_on_grid(ref(href), SOURCE, SOURCE, "bilinear", access=QUICK)


def test_redirects_to_another_host_are_not_followed(tmp_path: Path) -> None:
    class Redirect(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            assert isinstance(self.server, http.server.HTTPServer)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/other.tif")
            self.send_header("Content-Length", "0")
            self.end_headers()

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        with pytest.raises(AssetUnreadable, match="redirect to another host"):
            read_on_grid(
                ref(f"http://127.0.0.1:{running.server_address[1]}/a.tif"), None, SOURCE, "bilinear", access=QUICK
            )
    finally:
        running.shutdown()
        running.server_close()


def test_ingest_reads_without_jax(repository: Path) -> None:
    import subprocess
    import sys

    code = "import ingest.run.loop, ingest.stack, ingest.plan.plan, sys; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=os.environ, timeout=120, check=False)
    assert done.returncode == 0
