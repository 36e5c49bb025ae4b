"""Catalogues that change, loop, promise too much or point at this machine (FAULTS.md, section 2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.scenes.geoparquet import write_items
from ingest.scenes.search import find_scenes
from ingest.testing import write_raster
from zarr_store.errors import AccessError, CubeMismatch, InvalidInput
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (64, 64))
CONFIG = IngestConfig(collections=("sentinel-2-l2a",), bands=("red",), mask="none")
Make = Callable[..., dict[str, Any]]


class Api:
    """An API of one collection; what it answers may be changed at any time."""

    def __init__(self, server: Any, items: list[dict[str, Any]], **page: Any) -> None:
        self.items, self.page, self.searches = items, page, 0
        core = "https://api.stacspec.org/v1.0.0/"
        link = {"rel": "search", "href": f"{server.url}/search", "type": "application/geo+json", "method": "POST"}
        server.json("/", {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "",
                          "conformsTo": [core + "core", core + "item-search"], "links": [link]})  # fmt: skip
        server.json("/collections/sentinel-2-l2a", {"type": "Collection", "id": "sentinel-2-l2a", "links": []})
        server.answer["/search"] = self.search

    def search(self, _: Any) -> Any:
        self.searches += 1
        return 200, {}, {"type": "FeatureCollection", "features": self.items, "links": [], **self.page}


@pytest.fixture
def scene(make_item: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """An item with a small real file behind its red band."""
    rows = np.random.default_rng(3).integers(1500, 4000, GRID.shape).astype(np.uint16)

    def make(item_id: str, day: int, **properties: Any) -> dict[str, Any]:
        path = write_raster(tmp_path / "files" / f"{item_id}.tif", GRID, rows)
        item = make_item(item_id, datetime=f"2023-08-{day}T10:00:00Z", eo__cloud_cover=day, **properties)
        item["properties"]["s2:datatake_id"] = f"GS2A_202308{day}T095031_0{day}_N05.09"
        west, south, east, north = GRID.lonlat_bounds()
        item["bbox"] = [west, south, east, north]
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item["geometry"] = {"type": "Polygon", "coordinates": [ring]}
        item["assets"] = {"red": {"href": str(path), "raster:bands": [{"nodata": 0, "data_type": "uint16"}]}}
        return item

    return make


@pytest.mark.parametrize("name", ["items.json", "items.parquet"])
def test_s12_a_plan_of_a_frozen_search_does_not_follow_the_catalogue(
    scene: Make, tmp_path: Path, name: str, local_client: Any
) -> None:
    from ingest.run.loop import run

    frozen = tmp_path / name
    items = [scene("A", 10, updated="2023-09-01T00:00:00Z"), scene("B", 15, updated="2023-09-01T00:00:00Z")]

    def save(kept: list[dict[str, Any]]) -> None:
        if name.endswith(".parquet"):
            write_items(kept, frozen)
        else:
            frozen.write_text(json.dumps({"type": "FeatureCollection", "features": kept}))

    save(items)
    plan = make_plan(str(frozen), CONFIG)
    kept = tmp_path / "plan.json"
    plan.save(kept)
    pinned = [(row["id"], row["updated"]) for row in plan.items["sentinel-2-l2a"]]
    assert pinned == [("A", "2023-09-01T00:00:00Z"), ("B", "2023-09-01T00:00:00Z")]
    # the catalogue goes on: one scene is reprocessed, one vanishes, one is new
    save([scene("A", 10, updated="2024-01-01T00:00:00Z"), scene("C", 18)])
    other = make_plan(str(frozen), CONFIG)
    assert other.digest != plan.digest
    again = Plan.load(kept)
    assert again.digest == plan.digest
    report = run(again, tmp_path / "cube.zarr", client=local_client)
    assert report.exit_code == 0
    assert len(report.written) == len(plan.tasks)
    # a resumed run with the changed answer is refused with the difference, never mixed in
    with pytest.raises(CubeMismatch, match="2023-08-18"):
        run(other, tmp_path / "cube.zarr", client=local_client)


def test_s12_one_search_is_asked_once(server: Any, make_item: Make) -> None:
    api = Api(server, [make_item("A"), make_item("B", s2__datatake_id="GS2A_20230820T095031_0_N05.09")])
    found = find_scenes(f"{server.url}/", CONFIG)
    assert [item.item["id"] for item in found.items] == [scene.id for scene in found.scenes]
    assert api.searches == 1


def test_s01_s02_pages_that_overlap_and_counts_that_lie(
    server: Any, make_item: Make, caplog: pytest.LogCaptureFixture
) -> None:
    Api(server, [make_item("A"), make_item("A"), make_item("A")], numberMatched=7)
    with caplog.at_level("WARNING"):
        assert len(find_scenes(f"{server.url}/", CONFIG).scenes) == 1
    assert "promised 7 items and gave 1" in caplog.text
    with pytest.raises(AccessError, match="promised 7 items and gave 1 different ones; search again"):
        find_scenes(f"{server.url}/", CONFIG.model_copy(update={"strict": True}))
    caplog.clear()
    Api(server, [make_item("A"), make_item("A")], numberMatched=1)
    find_scenes(f"{server.url}/", CONFIG)
    assert "promised" not in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_s14_a_catalogue_cannot_make_us_ask_this_machine(
    make_server: Callable[[], Any], save: Callable[..., Path], make_item: Make, host: str
) -> None:
    inside = make_server()
    inside.json("/a.tif", {})
    item = make_item()
    for asset in item["assets"].values():
        asset["href"] = f"http://{host}:{inside.url.rpartition(':')[2]}/a.tif"
    with pytest.raises(InvalidInput, match="refused"):
        make_plan(str(save(item)), CONFIG)
    assert inside.requests == []


def test_s15_hostile_ids_never_become_paths(
    scene: Make, save: Callable[..., Path], tmp_path: Path, local_client: Any
) -> None:
    from ingest.run.loop import run
    from zarr_store.read import open_cube

    names = ["../../../tmp/evil", "/abs", "CON", "a" * 300, "a\u202eb", "x\x00y", "Case", "case"]
    items = []
    for day, name in enumerate(names, 10):
        item = scene(f"file{day}", day)
        item["id"] = name
        items.append(item)
    path = save(*items)
    before = {p for p in tmp_path.rglob("*") if "cube.zarr" not in p.parts}
    plan = make_plan(str(path), CONFIG)
    report = run(plan, tmp_path / "cube.zarr", client=local_client)
    assert report.exit_code == 0
    assert [row["id"] for row in open_cube(tmp_path / "cube.zarr").items("sentinel-2-l2a")] == names
    assert {p for p in tmp_path.rglob("*") if "cube.zarr" not in p.parts} == before
    inside = [p.name for p in (tmp_path / "cube.zarr").rglob("*")]
    assert not any(word in name for name in inside for word in ("evil", "abs", "CON", "aaa", "Case"))


def test_s06_a_band_that_one_item_lacks_is_missing_in_that_slice_only(
    scene: Make, save: Callable[..., Path], tmp_path: Path, local_client: Any
) -> None:
    from ingest.run.loop import run
    from zarr_store.read import open_cube
    from zarr_store.spec import STATUS_MISSING

    first, second = scene("A", 10), scene("B", 15)
    for item in (first, second):
        item["assets"]["nir"] = dict(item["assets"]["red"])
    del second["assets"]["nir"]
    config = CONFIG.model_copy(update={"bands": ("red", "nir")})
    with pytest.raises(InvalidInput, match=r"1 of 2 items lack bands .* B lacks nir"):
        make_plan(str(save(first, second)), config.model_copy(update={"strict": True}))
    report = run(make_plan(str(save(first, second)), config), tmp_path / "cube.zarr", client=local_client)
    assert report.exit_code == 3
    status = open_cube(tmp_path / "cube.zarr").dataset("sentinel-2-l2a")["status"].values
    assert not (status[0] == STATUS_MISSING).any()
    assert (status[1] == STATUS_MISSING).all()
