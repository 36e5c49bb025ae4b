"""A small region of remote files: no byte is fetched twice, and the effort that the plan states is what is fetched."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.io import MemoryFile

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.raster.access import header_cache
from ingest.raster.download import head_cache
from ingest.raster.kept import kept_bytes
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.shard import FilledShard, fill_shard
from ingest.scenes.scene import Scene
from ingest.testing import make_scene
from zarr_store.grid import Grid

TILE = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (1536, 1536))
BLOCK = 256
WINDOW = (BLOCK - 60, BLOCK - 60, 120, 120)
"""Rows and columns of the region: the corner of four blocks."""
COG: dict[str, Any] = {
    "driver": "COG", "height": TILE.height, "width": TILE.width, "count": 1, "dtype": "uint16", "nodata": 0,
    "crs": TILE.crs, "transform": TILE.affine, "blocksize": BLOCK, "compress": "DEFLATE", "predictor": 2,
}  # fmt: skip


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder in ranges, with an ETag each, and counts what it sends."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def sent(self) -> int:
        return sum(stop - start for _, start, stop in self.asked)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = self.server.root / self.path.lstrip("/")
        data, written = file.read_bytes(), file.stat().st_mtime_ns
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        with self.server.lock:
            self.server.asked.append((self.path, start, stop))
        self.send_response(206)
        self.send_header("ETag", f'"{written}"')
        self.send_header("Content-Type", "image/tiff")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    running = RangeServer(tmp_path / "files")
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    forget()
    yield running
    forget()
    running.shutdown()
    running.server_close()
    thread.join(5)


def forget() -> None:
    for cache in (header_cache(os.getpid()), head_cache(os.getpid()), kept_bytes(os.getpid())):
        cache.clear()


def ground(*, raised: int = 0, seed: int = 1) -> npt.NDArray[np.uint16]:
    """Blue reflectance of dark land, which does not pack."""
    rng = np.random.default_rng(seed)
    return (rng.integers(200, 800, TILE.shape) + raised).astype(np.uint16)


@functools.cache
def _cog(pixels: bytes, **options: str) -> bytes:
    with MemoryFile() as memory:
        with memory.open(**{**COG, **options}) as file:
            file.write(np.frombuffer(pixels, options.get("dtype", COG["dtype"])).reshape(TILE.shape), 1)
        return bytes(memory.getbuffer())


def write_cog(path: Path, pixels: npt.NDArray[Any], **options: str) -> None:
    """Write a file as `COG` describes it; the same pixels are packed once, which takes as long as a test."""
    path.write_bytes(_cog(pixels.tobytes(), dtype=str(pixels.dtype), **options))


def scene_at(server: RangeServer, bands: dict[str, npt.NDArray[Any]], **fields: Any) -> Scene:
    """A scene whose files the server has, with overviews."""
    corner = TILE.window(0, 0, 64, 64)
    grids, ones = dict.fromkeys(bands, corner), dict.fromkeys(bands, np.ones(corner.shape, np.uint16))
    scene = make_scene(server.root, "S", TILE, ones, grids=grids, **fields)
    for band, pixels in bands.items():
        write_cog(Path(scene.assets[band].href), pixels)
    return replace(
        scene,
        assets={
            band: replace(asset, href=f"{server.url}/S/{band}.tif", dtype="uint16", grid=TILE)
            for band, asset in scene.assets.items()
        },
    )


def config_for(bands: tuple[str, ...]) -> IngestConfig:
    inner = TILE.window(WINDOW[0] + 1, WINDOW[1] + 1, WINDOW[2] - 2, WINDOW[3] - 2)
    return IngestConfig(bands=bands, mask="none", bbox=inner.lonlat_bounds(), allow_private_hosts=True, retries=0)


def planned(scene: Scene, config: IngestConfig) -> Plan:
    return plan_scenes([scene], probe_scenes([scene], config), config)


def filled(plan: Plan, config: IngestConfig) -> FilledShard:
    (task,) = plan.tasks
    return fill_shard(task, plan.recipes[0], access=Access.of(config))


def needed(server: RangeServer, bands: tuple[str, ...]) -> int:
    """Stored bytes of the four blocks of each file, and of its header."""
    total = 0
    for band in bands:
        with rasterio.open(server.root / "S" / f"{band}.tif") as file:
            total += sum(int(file.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)) for x in (0, 1) for y in (0, 1))
    return total + 16384 * len(bands)


def test_planning_and_ingest_together_fetch_every_byte_once(server: RangeServer) -> None:
    bands = ("blue", "red", "nir")
    truth = {band: ground(seed=seed) for seed, band in enumerate(bands)}
    config = config_for(bands)
    plan = planned(scene_at(server, truth), config)
    facts = plan.statistics["sentinel-2-l2a"]
    assert facts["offset_verdicts"]["S"]["verdict"] == "confirmed"
    before = list(server.asked)
    assert {path for path, start, _ in before if start} == {"/S/blue.tif"}, "only the bluest band is looked at"
    shard = filled(plan, config)
    assert server.sent <= 1.01 * needed(server, bands)
    assert abs(facts["bytes_to_read"] / server.sent - 1) < 0.02, "the effort that the plan states"
    assert facts["requests"] == len(server.asked)
    assert not {path for path, _, _ in server.asked[len(before) :]} & {"/S/blue.tif"}, "it is here already"
    grid = plan.grid
    col, row = round((grid.bounds[0] - TILE.bounds[0]) / 10), round((TILE.bounds[3] - grid.bounds[3]) / 10)
    for number, band in enumerate(bands):
        stored = shard.arrays["reflectance"][0, number]
        np.testing.assert_array_equal(stored, truth[band][row : row + grid.height, col : col + grid.width])


def test_a_file_that_was_replaced_meanwhile_is_read_anew(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.raster.ranges._HEAD_LIFE_S", 0.0)  # as after five minutes
    config = config_for(("blue",))
    plan = planned(scene_at(server, {"blue": ground(seed=1)}), config)
    asked = len(server.asked)
    scene_at(server, {"blue": ground(seed=2)})
    path = server.root / "S" / "blue.tif"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000_000))
    shard = filled(plan, config)
    assert len(server.asked) > asked
    grid = plan.grid
    col, row = round((grid.bounds[0] - TILE.bounds[0]) / 10), round((TILE.bounds[3] - grid.bounds[3]) / 10)
    now = ground(seed=2)[row : row + grid.height, col : col + grid.width]
    np.testing.assert_array_equal(shard.arrays["reflectance"][0, 0], now)


def test_clouds_over_the_region_hide_no_wrong_offset(server: RangeServer) -> None:
    """What the blocks of the region do not tell, the rest of the scene does, as for a large region."""
    blue = ground(raised=1000)
    blue[: 2 * BLOCK, : 2 * BLOCK] += 5000
    bands = {"blue": blue, "red": ground(raised=1000, seed=2)}
    plan = planned(scene_at(server, bands, dn_offset=0), config_for(("blue", "red")))
    told = plan.statistics["sentinel-2-l2a"]["offset_verdicts"]["S"]
    assert (told["verdict"], told["dn_offset"]) == ("repaired", -1000)
    assert plan.tasks[0].sources[0].assets[0].dn_offset == -1000


def test_ground_of_the_region_that_contradicts_its_scene_settles_nothing(server: RangeServer) -> None:
    """Bright ground without the offset looks as if it had it; the whole scene shows that it has none."""
    blue = ground()
    blue[: 2 * BLOCK, : 2 * BLOCK] += 1000
    plan = planned(scene_at(server, {"blue": blue}, dn_offset=0), config_for(("blue",)))
    told = plan.statistics["sentinel-2-l2a"]["offset_verdicts"]["S"]
    assert (told["verdict"], told["dn_offset"]) == ("confirmed", 0)


def test_bright_ground_of_the_region_does_not_confirm_a_stated_offset(server: RangeServer) -> None:
    """A provider that has subtracted the 1000 and still states it: only dark pixels of the scene show that."""
    blue = ground()
    blue[: 2 * BLOCK, : 2 * BLOCK] += 1000
    plan = planned(scene_at(server, {"blue": blue}, dn_offset=-1000), config_for(("blue",)))
    told = plan.statistics["sentinel-2-l2a"]["offset_verdicts"]["S"]
    assert (told["verdict"], told["dn_offset"]) == ("repaired", 0)
