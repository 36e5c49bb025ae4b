"""Items and a scripted loopback server for the ingest tests."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Reply = tuple[int, dict[str, str], Any]


@dataclass
class Request:
    """One request that the server got."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class ScriptedServer:
    """Answers by path; `answer` maps a path (without query) to a function of the request."""

    answer: dict[str, Callable[[Request], Reply]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def paths(self) -> list[str]:
        return [request.path.partition("?")[0] for request in self.requests]

    def json(self, path: str, document: Any, status: int = 200) -> None:
        self.answer[path] = lambda _: (status, {"Content-Type": "application/json"}, document)


def _serve(server: ScriptedServer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            server.requests.append(request)
            handler = server.answer.get(self.path.partition("?")[0])
            status, headers, content = handler(request) if handler else (404, {}, {"detail": "not found"})
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (self.send_response_only if "Date" in headers else self.send_response)(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                self.wfile.write(b"" if self.command == "HEAD" else data)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return httpd


@pytest.fixture(autouse=True, scope="session")
def _memory_that_served_before() -> Iterator[None]:
    """The arrays of a shard begin with the pixels of an earlier one: the system alone would give zeros at first."""
    from ingest.run import shard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "_undefined", lambda shape, dtype: np.full(shape, 4_321, dtype))
        yield


@pytest.fixture
def make_server() -> Iterator[Callable[[], ScriptedServer]]:
    """Start scripted servers, each on its own port of 127.0.0.1."""
    running: list[ThreadingHTTPServer] = []

    def start() -> ScriptedServer:
        server = ScriptedServer()
        running.append(_serve(server))
        return server

    yield start
    for httpd in running:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def server(make_server: Callable[[], ScriptedServer]) -> ScriptedServer:
    return make_server()


ITEM: dict[str, Any] = {
    "type": "Feature",
    "stac_version": "1.0.0",
    "id": "S2A_33TWM_20230815_0_L2A",
    "collection": "sentinel-2-l2a",
    "bbox": [15.0, 46.0, 16.0, 47.0],
    "geometry": {"type": "Polygon", "coordinates": [[[15, 46], [16, 46], [16, 47], [15, 47], [15, 46]]]},
    "properties": {
        "datetime": "2023-08-15T09:57:57.246Z",
        "created": "2023-08-15T21:00:00Z",
        "platform": "sentinel-2a",
        "proj:epsg": 32633,
        "eo:cloud_cover": 12.5,
        "s2:processing_baseline": "05.09",
        "s2:product_uri": "S2A_MSIL2A_20230815T095031_N0509_R079_T33TWM_20230815T155057.SAFE",
        "s2:datatake_id": "GS2A_20230815T095031_042547_N05.09",
        "grid:code": "MGRS-33TWM",
    },
    "links": [],
    "assets": {
        key: {
            "href": f"{name}.tif",
            "proj:shape": [10980, 10980],
            "proj:transform": [10, 0, 499980, 0, -10, 5200020],
            "raster:bands": [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}],
        }
        for key, name in (("blue", "B02"), ("green", "B03"), ("red", "B04"), ("nir", "B08"))
    }
    | {"scl": {"href": "SCL.tif", "raster:bands": [{"nodata": 0, "data_type": "uint8"}]}},
}


@pytest.fixture
def make_item() -> Callable[..., dict[str, Any]]:
    """A Sentinel-2 L2A item; keyword arguments replace properties ("__" stands for ":"), None removes them."""

    def make(item_id: str | None = None, **properties: Any) -> dict[str, Any]:
        item = copy.deepcopy(ITEM)
        item["id"] = item_id or item["id"]
        for name, value in properties.items():
            key = name.replace("__", ":")
            item["properties"].pop(key, None)
            if value is not None:
                item["properties"][key] = value
        return item

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write items as an ItemCollection and give its path."""

    def write(*items: dict[str, Any], name: str = "items.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items)}))
        return path

    return write


@pytest.fixture(scope="session")
def local_client() -> Iterator[Any]:
    """A Dask cluster inside this process: quick to start, and pixels come out the same."""
    from .clusters import worker_here

    with worker_here(2, set_as_default=False, name="of all tests of ingest") as client:
        yield client


@pytest.fixture(scope="session")
def zagreb_plan(zagreb: Path) -> Any:
    """The plan of the real scenes, in shards that are cut inside the scenes."""
    from ingest.plan.making import plan_scenes
    from ingest.plan.probe import probe_scenes
    from ingest.request.config import IngestConfig
    from ingest.scenes.search import find_scenes
    from zarr_store.spec import Layout

    config = IngestConfig(collections=("sentinel-2-l2a",), bands=("blue", "green", "red", "nir", "scl"))
    scenes = find_scenes(str(zagreb), config).scenes
    return plan_scenes(
        scenes, probe_scenes(scenes, config), config, layout=Layout("test", (1, 256, 256), (1, 1024, 1024))
    )


@pytest.fixture(scope="session")
def zagreb_cube(zagreb_plan: Any, local_client: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The cube of `zagreb_plan`: (path, report)."""
    from ingest.run.loop import run

    path = tmp_path_factory.mktemp("zagreb") / "zagreb.zarr"
    return path, run(zagreb_plan, path, client=local_client)
