"""What makes two items one scene, and which of several assets is a band; what is dropped is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.request.asset_choice import choose_asset
from ingest.request.config import IngestConfig
from ingest.request.products import PRODUCTS
from ingest.scenes.search import find_scenes
from ingest.upkeep.audit import compare
from ingest.upkeep.extend import plan_extension

from ..small_scenes import cube_of, land, make_scene, plan_of, write_items, write_tif

L2A = PRODUCTS[0]


def _halves(folder: Path, north: dict[str, Any], south: dict[str, Any]) -> tuple[Path, np.ndarray]:
    """Two items of one tile whose files hold a half each, and whose footprints are the whole square."""
    whole = land(seed=5)
    upper, lower = whole.copy(), whole.copy()
    upper[34:], lower[:30] = 0, 0
    a, b = write_tif(folder / "n/B02.tif", upper), write_tif(folder / "s/B02.tif", lower)
    return write_items(folder, make_scene("N", {"B02": a}, **north), make_scene("S", {"B02": b}, **south)), whole


@pytest.mark.parametrize(
    ("north", "south"),
    [
        pytest.param(
            {"s2__datastrip_id": "S2A_OPER_MSI_L2A_DS_2APS_20230810T141122_S20230810T100559_N05.09"},
            {"s2__datastrip_id": "S2A_OPER_MSI_L2A_DS_MPS__20230810T153344_S20230810T101212_N05.09"},
            id="datastrip",
        ),
        pytest.param(
            {"s2__granule_id": "L2A_T33TWM_A042547_20230810T100559"},
            {"s2__granule_id": "L2A_T33TWM_A042547_20230810T101212"},
            id="granule",
        ),
        pytest.param({"s2__nodata_pixel_percentage": 46.9}, {"s2__nodata_pixel_percentage": 53.1}, id="nodata"),
    ],
)
def test_both_halves_stay_although_both_state_the_whole_square(
    tmp_path: Path, north: dict[str, Any], south: dict[str, Any]
) -> None:
    source, whole = _halves(tmp_path, north, south)
    plan = plan_of(source)
    assert plan.drops == ()
    arrays = cube_of(plan)
    assert np.array_equal(arrays["reflectance"][0, 0], whole - 1000)
    assert (arrays["status"] == 1).all()


def test_a_datastrip_is_also_found_in_the_folders_of_hrefs(tmp_path: Path) -> None:
    paths = [write_tif(tmp_path / f"{time}/B02.tif", land(seed=n)) for n, time in enumerate(("a", "b"))]
    for folder in ("GRANULE/L2A_T33TWM_A042547_{}", "DATASTRIP/DS_2APS_20230810T141122_S{}"):
        items = [make_scene(name, {"B02": path}) for name, path in zip("NS", paths, strict=True)]
        for item, time in zip(items, ("20230810T100559", "20230810T101212"), strict=True):
            item["assets"]["metadata"] = {"href": f"{folder.format(time)}/MTD.xml", "type": "application/xml"}
        found = find_scenes(str(write_items(tmp_path, *items)), IngestConfig(bands="blue"))
        assert [scene.datastrip for scene in found.scenes] == ["20230810T100559", "20230810T101212"]


def test_a_half_that_comes_later_is_added_and_replaces_nothing(tmp_path: Path) -> None:
    source, _ = _halves(
        tmp_path,
        {"s2__datastrip_id": "A_S20230810T100559_N05.09", "created": "2023-08-10T14:00:00Z"},
        {"s2__datastrip_id": "B_S20230810T101212_N05.09", "created": "2023-08-10T15:00:00Z"},
    )
    config = IngestConfig(bands="blue", mask="none")
    first = plan_of(source, query="id = 'N'")
    news = compare(first, find_scenes(str(source), config))
    assert [scene.id for scene in news.missing] == ["S"]
    assert not news.superseded
    both = plan_extension(first, str(source), config, append=True, refresh=True)
    assert [(row["id"], "superseded_by" in row) for row in both.items["sentinel-2-l2a"]] == [("N", False), ("S", False)]


def test_a_copy_of_a_datastrip_is_left_out_and_listed(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "B02.tif", land())
    old = make_scene(
        "old", {"B02": path}, s2__processing_baseline="02.14", s2__datastrip_id="A_S20230810T100559_N02.14"
    )
    new = make_scene("new", {"B02": path}, s2__datastrip_id="B_S20230810T100600_N05.09")
    source = write_items(tmp_path, old, new)
    plan = plan_of(source)
    assert [(drop.item_id, drop.copy_of) for drop in plan.drops] == [("old", "new")]
    assert "left out (1)\n  sentinel-2-l2a old: baseline 02.14 is superseded by 05.09 (new)" in plan.summary()
    assert type(plan).from_json(plan.to_json()).drops == plan.drops


def _namesakes(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    left, right = land(seed=14), land(seed=15)
    a, b = write_tif(folder / "l/B02.tif", left), write_tif(folder / "r/B02.tif", right, corner=(500_640, 5_100_000))
    items = [
        make_scene("20230810", {"B02": a}, s2__mgrs_tile="33TWL"),
        make_scene("20230810", {"B02": b}, s2__mgrs_tile="33TXL"),
    ]
    return write_items(folder, *items), left, right


def test_two_tiles_with_one_id_are_two_scenes(tmp_path: Path) -> None:
    source, left, right = _namesakes(tmp_path)
    plan = plan_of(source)
    arrays = cube_of(plan)
    assert np.array_equal(arrays["reflectance"][0, 0], np.hstack([left, right]) - 1000)
    assert [row["id"] for row in plan.items["sentinel-2-l2a"]] == ["20230810~33TWL", "20230810~33TXL"]
    found = find_scenes(str(source), IngestConfig(bands="blue", mask="none"))
    assert compare(plan, found).missing == ()


def test_dates_that_share_an_id_are_added_one_after_the_other(tmp_path: Path) -> None:
    """A catalogue that names its items by tile: a cube of the first date is not "complete" for that reason."""
    days = ("2023-08-10T10:06:49Z", "2023-08-15T10:06:49Z", "2023-08-20T10:06:49Z")
    paths = [write_tif(tmp_path / f"{n}/B02.tif", land(seed=n)) for n in range(3)]
    items = [
        make_scene("33TWM", {"B02": path}, datetime=day, s2__datatake_id=None)
        for path, day in zip(paths, days, strict=True)
    ]
    source = write_items(tmp_path, *items)
    config = IngestConfig(bands="blue", mask="none")
    plan = plan_of(source, datetime="2023-08-10")
    assert [row["id"] for row in plan.items["sentinel-2-l2a"]] == ["33TWM"]
    plan = plan_extension(plan, str(source), config.model_copy(update={"datetime": "2023-08-15"}), append=True,
                          refresh=False)  # fmt: skip
    assert len(plan.recipes[0].spec.times) == 2
    plan = plan_extension(plan, str(source), config, append=True, refresh=False)
    arrays = cube_of(plan)
    assert [np.array_equal(arrays["reflectance"][n, 0], land(seed=n) - 1000) for n in range(3)] == [True] * 3
    assert plan_extension(plan, str(source), config, append=True, refresh=True) is plan
    ids = [row["id"] for row in plan.items["sentinel-2-l2a"]]
    assert len(set(ids)) == 3


def test_one_item_on_two_pages_is_one_scene(tmp_path: Path) -> None:
    path = write_tif(tmp_path / "B02.tif", land())
    item = make_scene("A", {"B02": path}, updated="2023-08-11T00:00:00Z")
    newer = make_scene("A", {"B02": path}, updated="2023-08-12T00:00:00Z")
    found = find_scenes(str(write_items(tmp_path, item, item, newer)), IngestConfig(bands="blue"))
    assert [(scene.id, scene.updated) for scene in found.scenes] == [("A", "2023-08-12T00:00:00Z")]
    assert [copy.reason for copy in found.duplicates] == ["listed twice"]


CODE, COMMON = {"eo:bands": [{"name": "B02"}]}, {"eo:bands": [{"name": "x", "common_name": "blue"}]}


@pytest.mark.parametrize(
    ("assets", "key"),
    [
        pytest.param({"a": COMMON, "z": CODE}, "z", id="code over common name"),
        pytest.param({"blue": {}, "B02": {}}, "B02", id="code over common name, as keys"),
        pytest.param({"a": CODE | {"roles": ["overview"]}, "z": CODE | {"roles": ["data"]}}, "z", id="role"),
        pytest.param({"B02": {"roles": ["thumbnail"]}, "z": COMMON | {"roles": ["data"]}}, "z", id="role over code"),
        pytest.param({"B02": {"roles": ["thumbnail"]}, "z": COMMON}, "z", id="no role over thumbnail"),
        pytest.param({"B02": {"type": "image/png"}, "z": CODE | {"type": "image/tiff"}}, "z", id="media type"),
        pytest.param({"B02": {"roles": ["data"], "type": "image/png"}, "z": COMMON | {"type": "image/tiff"}}, "z",
                     id="a type that is read over data"),
        pytest.param({"B02": {"roles": ["overview"], "type": "image/tiff"}, "z": {"type": "image/png"} | COMMON}, "z",
                     id="no picture in place of data that are not read"),
        pytest.param({"B02": {"roles": ["data", "overview"]}, "z": COMMON | {"roles": ["data"]}}, "z", id="data alone"),
        pytest.param({"B02": {"roles": "overview"}, "z": COMMON}, "z", id="a role that is no list"),
        pytest.param({"a": CODE | {"gsd": 20}, "z": CODE | {"gsd": 10}}, "z", id="finest"),
        pytest.param({"nir": {}, "blue-jp2": CODE | {"type": "image/jp2"}, "c": CODE | {"type": "image/tiff"}}, "c",
                     id="tiff over jp2"),
    ],
)  # fmt: skip
def test_roles_types_and_codes_choose_the_asset_in_any_order(assets: dict[str, Any], key: str) -> None:
    blue = L2A.band("blue")
    assert blue is not None
    for listed in (assets, dict(reversed(assets.items()))):
        chosen = choose_asset(blue, listed)
        assert chosen is not None
        assert chosen.key == key


def test_an_asset_whose_code_is_another_bands_is_not_taken_for_its_common_name() -> None:
    nir, nir08 = L2A.band("nir"), L2A.band("nir08")
    assert nir is not None
    assert nir08 is not None
    assets = {"a": {"eo:bands": [{"name": "B8A", "common_name": "nir"}]}, "b": {"eo:bands": [{"name": "B08"}]}}
    assert choose_asset(nir, assets) == ("b", ())
    assert choose_asset(nir08, assets) == ("a", ())


def test_the_assets_that_are_not_read_are_listed(tmp_path: Path) -> None:
    item = make_scene("A", {"B02": write_tif(tmp_path / "B02.tif", land())})
    item["assets"]["preview"] = {"href": "p.png", "roles": ["overview"], **CODE}
    plan = plan_of(write_items(tmp_path, item))
    assert any("blue: asset 'B02' is read; 'preview' also name it" in text for text in plan.warnings)
