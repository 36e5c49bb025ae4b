"""One item that cannot be used does not stop the others, and a geometry that cannot be right loses no scene."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.request.config import IngestConfig
from ingest.scenes.geoparquet import write_items as write_parquet
from ingest.scenes.search import find_scenes
from zarr_store.errors import InvalidInput

from ..small_scenes import cube_of, land, make_scene, plan_of, write_items, write_tif

Item = dict[str, Any]


def _null_geometry(item: Item) -> None:
    item["geometry"] = None
    del item["bbox"]


BAD: dict[str, Callable[[Item], Any]] = {
    "null geometry and no bbox": _null_geometry,
    "leap second": lambda item: item["properties"].update(datetime="2016-12-31T23:59:60Z"),
    "lower-case time": lambda item: item["properties"].update(datetime="2023-08-20t10:06:49z"),
    "no assets": lambda item: item.pop("assets"),
    "no properties": lambda item: item.pop("properties"),
}


def _catalogue(folder: Path, items: list[Item]) -> Path:
    """A static catalogue with one document an item."""
    links = []
    for number, item in enumerate(items):
        (folder / f"{number}.json").write_text(json.dumps(item))
        links.append({"rel": "item", "href": f"{number}.json"})
    path = folder / "catalog.json"
    path.write_text(json.dumps({"type": "Catalog", "id": "c", "stac_version": "1.0.0", "links": links}))
    return path


def _parquet(folder: Path, items: list[Item]) -> Path:
    path = folder / "items.parquet"
    write_parquet(items, path)
    return path


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("settings", [{}, {"bbox": (14.9, 45.9, 15.3, 46.3), "datetime": "2023-08"}])
def test_a_bad_item_is_left_out_and_reported(tmp_path: Path, what: str, settings: dict[str, Any]) -> None:
    path = write_tif(tmp_path / "B02.tif", land())
    good = [make_scene(f"G{day}", {"B02": path}, datetime=f"2023-08-{day}T10:06:49Z") for day in (10, 11)]
    bad = copy.deepcopy(good[0]) | {"id": "BAD"}
    BAD[what](bad)
    config = IngestConfig(bands="blue", mask="none", **settings)
    sources = [write_items(tmp_path, *good, bad), _catalogue(tmp_path, [*good, bad])]
    if what.startswith(("null", "leap", "lower")):
        sources.append(_parquet(tmp_path, [*good, bad]))
    for source in sources:
        found = find_scenes(str(source), config)
        assert [scene.id for scene in found.scenes] == ["G10", "G11"]
        assert [one.item_id for one in found.unusable] == ["BAD"], "the fault fired"
        with pytest.raises(InvalidInput, match="BAD"):
            find_scenes(str(source), config.model_copy(update={"strict": True}))


def test_what_is_left_out_is_in_the_plan_also_by_the_python_way(tmp_path: Path) -> None:
    import ingest

    path = write_tif(tmp_path / "B02.tif", land())
    bad = make_scene("BAD", {"B02": path}, datetime="2016-12-31T23:59:60Z")
    source = write_items(tmp_path, make_scene("OK", {"B02": path}), bad)
    found = ingest.find_scenes(source, bands="blue")
    assert [one.item_id for one in found.unusable] == ["BAD"]
    plan = ingest.make_plan(found, mask="none")
    assert any("item 'BAD' is left out" in text for text in plan.warnings)


def _swap(item: Item, *, bbox: bool = True) -> Item:
    item["geometry"]["coordinates"] = [[[y, x] for x, y in ring] for ring in item["geometry"]["coordinates"]]
    if bbox:
        west, south, east, north = item["bbox"]
        item["bbox"] = [south, west, north, east]
    return item


@pytest.mark.parametrize(
    ("proj", "bbox", "tile", "said"),
    [
        pytest.param(True, True, "33TWM", "swapped", id="the stated grid tells"),
        pytest.param(False, False, None, "swapped", id="the bbox tells"),
        pytest.param(False, True, "33TWM", "swapped", id="the tile tells"),
        pytest.param(False, True, None, "outside the item's footprint", id="only the file tells"),
    ],
)
def test_swapped_latitude_and_longitude_lose_no_scene(
    tmp_path: Path, proj: bool, bbox: bool, tile: str | None, said: str
) -> None:
    """Near 15° E and 46° N, so that the swapped numbers are degrees, too."""
    pixels = land(seed=17)
    good = write_tif(tmp_path / "ok/B02.tif", pixels)
    swapped = write_tif(tmp_path / "x/B02.tif", pixels)
    items = [
        make_scene("OK", {"B02": good}, datetime="2023-08-05T10:06:49Z"),
        _swap(make_scene("SWAPPED", {"B02": swapped}, proj=proj, s2__mgrs_tile=tile), bbox=bbox),
    ]
    for settings in ({}, {"bbox": (14.99, 46.04, 15.02, 46.06)}):
        plan = plan_of(write_items(tmp_path, *items), **settings)
        assert plan.drops == ()
        assert len(plan.recipes[0].spec.times) == 2
    plan = plan_of(write_items(tmp_path, items[1], name="one.json"))
    assert np.array_equal(cube_of(plan)["reflectance"][0, 0], pixels - 1000)
    assert any(said in text for text in plan.warnings)


def test_an_item_that_only_looks_swapped_is_left_out_by_its_file(tmp_path: Path) -> None:
    """It lies at 15° E and 46° N; the region is its mirror image, and no file lies there."""
    path = write_tif(tmp_path / "B02.tif", land())
    mirrored = write_tif(tmp_path / "m/B02.tif", land(), crs="EPSG:32638", corner=(612_650, 1_659_480))
    items = [
        make_scene("REAL", {"B02": path}, proj=False, s2__mgrs_tile=None),
        make_scene("THERE", {"B02": mirrored}, s2__mgrs_tile="38PPB"),
    ]
    west, south, east, north = items[1]["bbox"]
    assert find_scenes(str(write_items(tmp_path, *items)), IngestConfig(bands="blue")).scenes
    plan = plan_of(write_items(tmp_path, *items), bbox=(west, south, east, north))
    assert [row["id"] for row in plan.items["sentinel-2-l2a"]] == ["THERE"]
    (drop,) = [drop for drop in plan.drops if drop.item_id == "REAL"]
    assert "does not reach the region" in drop.reason


def test_a_geometry_beyond_the_poles_is_turned_where_the_files_confirm_it(tmp_path: Path) -> None:
    """At 105° E the swapped geometry has a latitude of 105 degrees."""
    path = write_tif(tmp_path / "B02.tif", land(), crs="EPSG:32648")
    item = _swap(make_scene("SWAPPED", {"B02": path}, s2__mgrs_tile="48TWM"))
    plan = plan_of(write_items(tmp_path, item), bbox=(104.99, 46.0, 105.1, 46.1))
    assert len(plan.items["sentinel-2-l2a"]) == 1


def test_a_footprint_that_is_right_is_kept_as_it_is(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "B02.tif", land())
    item = make_scene("A", {"B02": path})
    scene = find_scenes(str(write_items(tmp_path, item)), IngestConfig(bands="blue")).scenes[0]
    assert scene.footprint == item["geometry"]
    assert not any("swapped" in note or "apart" in note for note in scene.notes)


def test_an_item_that_names_no_collection_is_used_or_reported(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "B02.tif", land())
    good, nameless = make_scene("good", {"B02": path}), make_scene("nameless", {"B02": path}, platform="sentinel-2a")
    nameless["collection"] = None
    source = str(write_items(tmp_path, good, nameless))
    found = find_scenes(source, IngestConfig(bands="blue"))
    assert [scene.id for scene in found.scenes] == ["good"]
    (left_out,) = found.unusable
    assert left_out.item_id == "nameless"
    assert "name another one with --collection" in left_out.reason
    named = find_scenes(source, IngestConfig(bands="blue", collections="sentinel-2-l2a"))
    assert {scene.id for scene in (*named.scenes, *(drop.dropped for drop in named.duplicates))} == {"good", "nameless"}
