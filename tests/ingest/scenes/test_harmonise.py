"""Every real item becomes the right scene."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS
from ingest.scenes.harmonise import harmonise
from ingest.scenes.offsets import decide_offset
from ingest.scenes.scene import Scene
from ingest.trust.providers import GENERIC, PROVIDERS
from zarr_store.errors import InvalidInput

Make = Callable[..., dict[str, Any]]
ANYWHERE = IngestConfig(allow_local=("/",))


def real_items(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted((folder / "stac").rglob("*")) + sorted((folder / "scenes" / "zagreb").rglob("S2*.json")):
        if not path.is_file() or path.suffix in (".xml", ".yaml", ".yml"):
            continue
        try:
            document = json.loads(path.read_text())
        except ValueError:
            continue
        features = document.get("features", [document]) if isinstance(document, dict) else []
        yield from ((path, item) for item in features if item.get("assets") and item.get("type") == "Feature")


def harmonised(item: dict[str, Any], base: str = "/catalogue/item.json", **config: Any) -> Scene:
    return harmonise(item, base=base, config=IngestConfig(allow_local=("/",), **config))


@pytest.mark.real_data
def test_every_real_sentinel_2_item_is_understood(shared_data: Path) -> None:
    count = 0
    for path, item in real_items(shared_data):
        name = json.dumps(item["properties"]) + item["id"]
        tile = re.search(r"(?:MGRS-|_T|mgrs_tile\": \"|S2[AB]_)(\d{1,2}[C-X][A-Z]{2})", name)
        if tile is None or not re.search(r"L1C|L2A", name):
            continue
        count += 1
        scene = harmonise(item, base=str(path), config=ANYWHERE)
        label = f"{path.name}: {item['id']}"
        assert scene.tile == tile[1].zfill(5), label
        grid = scene.assets["blue"].grid
        assert grid is not None, label
        assert scene.tile is not None, label
        assert grid.crs == f"EPSG:{'326' if scene.tile[2] >= 'N' else '327'}{scene.tile[:2]}", label
        assert (grid.shape, grid.resolution) == ((10980, 10980), (10, 10)), label
        assert grid.transform[2] % 20 == 0 or grid.transform[2] % 60 == 0, label
        assert re.fullmatch(r"\d\d\.\d\d", scene.baseline or ""), label
        assert scene.platform in ("sentinel-2a", "sentinel-2b"), label
        flag = item["properties"].get("earthsearch:boa_offset_applied") or item["properties"].get(
            "sentinel:boa_offset_applied"
        )
        expected = -1000 if (scene.baseline or "") >= "04.00" and not flag else 0
        assert scene.dn_offset == expected, f"{label}: {scene.offset_evidence}"
        assert scene.assets["blue"].scale == 0.0001, label
        west, south, east, north = scene.bbox
        assert (east - west) % 360 < 20, label
        assert -90 <= south < north <= 90, label
        assert not scene.lacking or scene.product == "sentinel-2-l1c", label
        if "scl" in scene.assets:
            layer = scene.assets["scl"]
            assert (layer.kind, layer.scale, layer.offset) == ("class", 1.0, 0.0), label
            assert layer.grid is not None, label
            assert layer.grid.resolution == (20, 20), label
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene, label
    assert count > 120


@pytest.mark.real_data
def test_zagreb_is_not_subtracted_twice(shared_data: Path) -> None:
    folder = shared_data / "scenes" / "zagreb" / "sentinel-2-l2a" / "S2A_33TWM_20230815_0_L2A"
    path = folder / f"{folder.name}.json"
    scene = harmonise(json.loads(path.read_text()), base=str(path), config=ANYWHERE)
    assert scene.assets["blue"].offset == -0.1
    assert scene.dn_offset == 0
    assert "subtracted already" in scene.offset_evidence
    assert scene.assets["blue"].href == str(folder / "B02.tif")
    assert (scene.relative_orbit, scene.datatake) == (79, "GS2A_20230815T095031_042547_N05.09")
    assert (scene.provider, scene.datetime, scene.product) == ("earth-search", "2023-08-15T09:57:57Z", "sentinel-2-l2a")


@pytest.mark.real_data
def test_real_radar_items(shared_data: Path) -> None:
    seen = set()
    for path, item in real_items(shared_data / "."):
        if "entinel1" not in str(path) and "sentinel-1" not in str(item.get("collection")):
            continue
        if "rtc" in str(item["collection"]):
            scene = harmonise(item, base=str(path), config=ANYWHERE)
            assert set(scene.assets) == {"vv", "vh"}
            assert (scene.assets["vv"].dtype, scene.assets["vv"].nodata) == ("float32", 0.0)
            assert scene.orbit_direction == "ascending"
            assert scene.relative_orbit
            assert scene.dn_offset == 0
            seen.add("rtc")
        else:
            with pytest.raises(InvalidInput, match="RTC"):
                harmonise(item, base=str(path), config=ANYWHERE)
            seen.add("refused")
    assert seen == {"rtc", "refused"}


@pytest.mark.parametrize(
    ("forms", "crs"),
    [
        ({"proj:code": "EPSG:32633"}, "EPSG:32633"),
        ({"proj:epsg": 32634, "proj:code": None}, "EPSG:32634"),
        ({"proj:wkt2": 'GEOGCRS["WGS 84",DATUM["World Geodetic System 1984",ELLIPSOID["WGS 84",6378137,298.257223563]],'
          'CS[ellipsoidal,2],AXIS["latitude",north],AXIS["longitude",east],ANGLEUNIT["degree",0.0174532925199433],'
          'ID["EPSG",4326]]', "proj:epsg": None}, "EPSG:4326"),
    ],
)  # fmt: skip
def test_every_form_of_a_crs(make_item: Make, forms: dict[str, Any], crs: str) -> None:
    for on_asset in (False, True):
        item = make_item(proj__epsg=None)
        (item["assets"]["blue"] if on_asset else item["properties"]).update(forms)
        grid = harmonised(item).assets["blue"].grid
        assert grid is not None
        assert grid.crs == crs


def test_projjson_is_read(make_item: Make) -> None:
    from pyproj import CRS

    item = make_item(proj__epsg=None, proj__projjson=CRS.from_epsg(32733).to_json_dict())
    grid = harmonised(item).assets["blue"].grid
    assert grid is not None
    assert grid.crs == "EPSG:32733"


def test_grids_are_never_made_up(make_item: Make) -> None:
    item = make_item()
    del item["assets"]["blue"]["proj:shape"]
    item["assets"]["green"]["proj:transform"] = [10, 5, 0, 5, -10, 0]
    del item["assets"]["red"]["proj:transform"]
    item["assets"]["red"]["proj:bbox"] = [499980, 5090220, 609780, 5200020]
    item["assets"]["nir"]["proj:shape"] = [0, 10]
    scene = harmonised(item)
    assert scene.assets["blue"].grid is None
    assert scene.assets["green"].grid is None
    assert scene.assets["nir"].grid is None
    red = scene.assets["red"].grid
    assert red is not None
    assert red.transform == (10.0, 0.0, 499980.0, 0.0, -10.0, 5200020.0)
    assert any("north-up" in note for note in scene.notes)
    unknown = harmonised(make_item(proj__epsg=999999))
    assert unknown.assets["blue"].grid is None
    assert "not a known CRS" in unknown.notes[0]


def test_stac_1_1_bands_come_before_raster_bands(make_item: Make) -> None:
    item = make_item(s2__processing_baseline=None, s2__product_uri=None)
    for key in ("blue", "green", "red", "nir"):
        item["assets"][key]["bands"] = [{"name": "B", "raster:scale": 0.0001, "raster:offset": 0, "nodata": 7}]
    scene = harmonised(item)
    assert scene.dn_offset == 0
    assert scene.assets["blue"].nodata == 7
    for key in ("blue", "green", "red", "nir"):
        item["assets"][key] = {"href": "b.tif", "raster:scale": 0.0001, "raster:offset": -0.1, "data_type": "int16"}
    scene = harmonised(item)
    assert (scene.dn_offset, scene.assets["blue"].dtype) == (-1000, "int16")


@pytest.mark.parametrize(
    ("scale", "offset", "expected"),
    [
        (1e-4, -0.1, -1000),
        (2e-5, -0.1, -1000),
        (None, -0.1, -1000),
        (1, -1000, -1000),
        (None, -1000, -1000),
        (2e-5, 0, 0),
    ],
)
def test_an_offset_that_an_item_states_is_of_reflectance_whatever_the_scale(
    make_item: Make, scale: float | None, offset: float, expected: int
) -> None:
    item = make_item(s2__processing_baseline=None, s2__product_uri=None)
    for key in ("blue", "green", "red", "nir"):
        item["assets"][key] = {"href": "b.tif", "raster:bands": [{"scale": scale, "offset": offset}]}
    scene = harmonised(item)
    assert scene.dn_offset == expected
    assert scene.offset_evidence.startswith(f"raster metadata of the item state {expected} ")


def test_stated_offsets_that_differ_between_bands_are_reported(make_item: Make) -> None:
    item = make_item()
    for key, offset in (("blue", -0.1), ("green", 0), ("red", 0), ("nir", 0)):
        item["assets"][key]["raster:bands"] = [{"scale": 1e-4, "offset": offset}]
    (note,) = [note for note in harmonised(item).notes if "offsets" in note]
    assert "blue -1000" in note
    assert "green 0" in note


@pytest.mark.parametrize(
    ("flag", "baseline", "stated", "promised", "expected", "evidence"),
    [
        (True, "05.09", -1000, None, 0, "subtracted already"),
        (False, "04.00", -1000, None, -1000, "still in the pixels"),
        (False, "03.01", -1000, None, 0, "never was"),
        (None, "05.09", -1000, None, -1000, "item state -1000"),
        (None, "05.09", 0, None, 0, "although that does not fit"),
        (None, "04.00", None, None, -1000, "baseline 04.00"),
        (None, "02.14", None, None, 0, "baseline 02.14"),
        (None, "99.99", None, None, 0, "nothing states"),
        (None, None, None, -1000, -1000, "collection state -1000"),
        (None, "05.00", None, 0, -1000, "baseline 05.00"),  # a collection cannot overrule the item's own baseline
        (None, "05.00", -7000, None, -1000, "neither 0 nor -1000"),
        (None, None, None, None, 0, "nothing states"),
    ],
)
def test_offset_rules_in_their_order(
    flag: bool | None, baseline: str | None, stated: int | None, promised: int | None, expected: int, evidence: str
) -> None:
    properties = {} if flag is None else {"earthsearch:boa_offset_applied": flag}
    offset, why = decide_offset(
        PRODUCTS[0],
        GENERIC,
        "sentinel-2-l2a",
        properties,
        baseline,
        stated={} if stated is None else {"blue": stated, "red": stated},
        promised={} if promised is None else {"blue": promised},
    )
    assert offset == expected
    assert evidence in why


def test_planetary_computer_goes_by_the_baseline_alone() -> None:
    provider = next(p for p in PROVIDERS if p.name == "planetary-computer")
    for baseline, expected in (("05.09", -1000), ("03.00", 0)):
        assert (
            decide_offset(PRODUCTS[0], provider, "sentinel-2-l2a", {}, baseline, stated={}, promised={})[0] == expected
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datetime": None}, "no start_datetime"),
        ({"datetime": "last week"}, "not an RFC 3339 time"),
    ],
)
def test_unusable_times_are_errors(make_item: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        harmonised(make_item(**changes))


def test_times_without_datetime_or_zone(make_item: Make) -> None:
    scene = harmonised(make_item(datetime=None, start_datetime="2023-08-15T11:00:00+02:00"))
    assert scene.datetime == "2023-08-15T09:00:00Z"
    assert any("start_datetime" in note for note in scene.notes)
    assert harmonised(make_item(datetime="2023-08-15T09:00:00.999")).datetime == "2023-08-15T09:00:00Z"


def test_lacking_and_refused_bands_are_named(make_item: Make) -> None:
    item = make_item()
    del item["assets"]["nir"]
    item["assets"]["red"]["href"] = "/vsicurl/https://evil.example/x.tif?sig=canary"
    scene = harmonise(item, base="https://stac.example.org/items/a", config=IngestConfig())
    assert set(scene.lacking) == {"nir", "red"}
    assert any("'red'" in note and "refused" in note for note in scene.notes)
    assert "canary" not in json.dumps(scene.to_dict())


def test_signed_hrefs_are_stored_unsigned(make_item: Make) -> None:
    item = make_item()
    item["assets"]["blue"]["href"] = "https://stac.example.org/a.tif?sv=1&sig=canary"
    scene = harmonise(item, base="https://stac.example.org/items/a", config=IngestConfig())
    assert scene.assets["blue"].href == "https://stac.example.org/a.tif"


def test_hostile_names_stay_data(make_item: Make) -> None:
    for name in ("../../etc/passwd", "/abs", "CON", "a" * 300, "a\u202eb"):
        assert harmonised(make_item(name)).id == name
    hostile: list[Any] = [{}, {"id": 7}, {"id": "x"}, {"id": "x", "properties": {}}, [], None]
    for broken in hostile:
        with pytest.raises(InvalidInput):
            harmonise(broken, base="/x", config=ANYWHERE)


def test_antimeridian_footprints_are_cut(make_item: Make) -> None:
    item = make_item()
    item["geometry"] = {"type": "Polygon", "coordinates": [[[-179, 60], [-179, 59], [179, 59], [179, 60], [-179, 60]]]}
    scene = harmonised(item)
    assert scene.bbox == (179.0, 59.0, -179.0, 60.0)
    assert scene.footprint["type"] == "MultiPolygon"
    del item["geometry"]
    item["bbox"] = [179, 59, -179, 60]
    assert harmonised(item).bbox == (179, 59, -179, 60)


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=NONSENSE,
    name=st.sampled_from(
        ["proj:epsg", "proj:code", "proj:shape", "proj:transform", "raster:bands", "bands", "eo:bands", "href", "type"]
    ),
)
def test_nonsense_in_an_asset_is_a_note_or_a_clear_error(make_item: Make, value: Any, name: str) -> None:
    item = make_item()
    item["assets"]["blue"][name] = value
    del item["assets"]["green"]
    item["assets"]["other"] = {name: value}
    with contextlib.suppress(InvalidInput):
        scene = harmonised(item)
        assert "green" in scene.lacking
