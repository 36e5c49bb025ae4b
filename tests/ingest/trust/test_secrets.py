"""C04: a secret put in wherever one can be given comes out nowhere: not printed, not logged, not stored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from ingest.testing import write_raster
from zarr_store.grid import Grid

CANARY = "canary-7f3a"
GRID = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (64, 64))
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def api(server: Any, make_item: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An API that wants a password, hands out signed hrefs, and files that want a token; one file is refused."""
    data = write_raster(tmp_path / "a.tif", GRID, np.full(GRID.shape, 2000, np.uint16)).read_bytes()
    (tmp_path / "a.tif").unlink()
    seen = {"password": 0, "token": 0}
    west, south, east, north = GRID.lonlat_bounds()
    items = []
    for day in (10, 15):
        item = make_item(f"day-{day}", datetime=f"2023-08-{day}T10:00:00Z")
        item["properties"]["s2:datatake_id"] = f"GS2A_202308{day}T095031_0{day}_N05.09"
        item["bbox"] = [west, south, east, north]
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item["geometry"] = {"type": "Polygon", "coordinates": [ring]}
        href = f"{server.url}/box/{day}.tif?sv=1&sig={CANARY}-old"
        item["assets"] = {"red": {"href": href, "raster:bands": [{"nodata": 0, "data_type": "uint16"}]}}
        item["links"] = [{"rel": "self", "href": f"{server.url}/items/{day}?token={CANARY}"}]
        items.append(item)

    def private(document: Any) -> Callable[[Any], Any]:
        def answer(request: Any) -> Any:
            if not request.headers.get("Authorization"):
                return 401, {}, {"detail": "who?"}
            seen["password"] += 1
            return 200, {}, document

        return answer

    def token(_: Any) -> Any:
        until = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()
        return 200, {}, {"token": f"sig={CANARY}-new", "msft:expiry": until}

    def file(request: Any) -> Any:
        if f"sig={CANARY}-new" not in request.path or "/15" in request.path:
            return 403, {}, f"no: {request.path}".encode()
        seen["token"] += 1
        start, _, stop = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = data[int(start) : int(stop or len(data)) + 1]
        where = f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}"
        return (206 if "Range" in request.headers else 200), {"Content-Range": where}, body

    core = "https://api.stacspec.org/v1.0.0/"
    link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json", "method": "POST"}
    root = {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "",
            "conformsTo": [core + "core", core + "item-search"], "links": [link]}  # fmt: skip
    server.answer["/"] = private(root)
    server.answer["/collections/sentinel-2-l2a"] = private({"type": "Collection", "id": "sentinel-2-l2a", "links": []})
    server.answer["/search"] = private({"type": "FeatureCollection", "features": items, "links": []})
    server.answer["/token/127/box"] = token
    server.answer["/box/10.tif"] = server.answer["/box/15.tif"] = file
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "CDSE_S3_SECRET_ACCESS_KEY", "PC_SDK_SUBSCRIPTION_KEY"):
        monkeypatch.setenv(name, CANARY)
    server.seen = seen
    return server


def test_c04_no_secret_comes_out_anywhere(api: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    provider = tmp_path / "mine.toml"
    provider.write_text(f'name = "mine"\nhosts = ["127.0.0.1"]\ntoken_url = "{api.url}/token"\n')
    source = f"{api.url.replace('://', f'://me:{CANARY}@')}/"
    ask = ("--collection", "sentinel-2-l2a", "--bands", "red", "--provider-file", str(provider))
    quick = ("--retries", "1", "--timeout", "2", "--workers", "1", "--mask", "none")
    few = ("--set", "retries=1", "--set", "timeout_s=2")
    printed = []

    def run(*words: object) -> int:
        capfd.readouterr()
        code = main([str(word) for word in words])
        printed.append("".join(capfd.readouterr()))
        return code

    out = tmp_path / "out"
    out.mkdir()
    cube = out / "cube.zarr"
    for name in ("items.json", "items.parquet"):
        assert run("search", source, *ask, "-o", out / name, "--json") == 0, printed[-1]
    assert run("plan", source, *ask, *quick, "-o", out / "plan.json", "--json") == 0, printed[-1]
    assert run("ingest", source, cube, *ask, *quick, "--report", out / "report.json", "--json", "-v") == 3, printed[-1]
    assert "HTTP 403" in (out / "report.json").read_text()
    # the second time tries the refused scene again
    assert run("ingest", source, cube, *ask, *quick, "--report", out / "report.html", "-v") == 3, printed[-1]
    assert "HTTP 403" in (page := (out / "report.html").read_text())
    assert "Dask Performance Report" in page
    for command in (("status", cube, "--json"), ("info", cube, "--json"), ("verify", cube, "--json")):
        run(*command)
    # failures of every kind, with the traceback of --debug
    assert run("search", f"http://me:{CANARY}@127.0.0.1:9/?token={CANARY}", *ask, *few, "--debug") != 0
    assert run("search", f"{api.url}/nothing?token={CANARY}", *ask, *few, "--debug") != 0
    assert run("search", f"{api.url}/search?token={CANARY}", *ask, *few, "--debug") != 0
    assert run("ingest", f"{api.url}/box/10.tif?sig={CANARY}", cube, *ask, *quick, "--debug") != 0
    # the secrets were really in use
    assert api.seen["password"] >= 6
    assert api.seen["token"] >= 2
    leaks = [text[max(0, text.index(CANARY) - 300) :][:600] for text in printed if CANARY in text]
    assert not leaks, leaks[0]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    # parquet is compressed: look inside as well
    from ingest.scenes.geoparquet import read_items

    assert CANARY not in json.dumps(read_items(out / "items.parquet"))
