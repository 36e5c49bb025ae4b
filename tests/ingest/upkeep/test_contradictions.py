"""Options that contradict a cube are refused first, also where the catalogue has nothing new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.scenes import search
from ingest.upkeep.extend import plan_extension
from zarr_store.errors import CubeMismatch

from ..small_scenes import land, make_scene, plan_of, write_items, write_tif

GIVEN = {"bands": "red,nir", "mask": "none", "collections": "sentinel-2-l2a"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("made")
    paths = {key: write_tif(folder / f"{key}.tif", land()) for key in ("B04", "B08", "B11")}
    paths["SCL"] = write_tif(folder / "SCL.tif", land().astype("uint8") % 8 + 4)
    source = write_items(folder, make_scene("A", paths))
    return source, plan_of(source, **GIVEN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bands": "swir16"}, "bands: red, nir → swir16"),
        ({"bands": "nir,red"}, "bands"),
        ({"bands": "red,nir,scl"}, "class layers"),
        ({"indices": "ndvi"}, "indices"),
        ({"mask": "scl"}, "mask"),
        ({"reduce": "median"}, "reduce"),
        ({"group": "month"}, "group"),
        ({"resampling": "cubic"}, "resampling"),
        ({"profile": "archive"}, "profile"),
        ({"crs": "EPSG:3857"}, "CRS EPSG:32633 → EPSG:3857"),
        ({"resolution": 20.0}, "resolution 10 × 10 → 20"),
        ({"collections": "sentinel-2-l1c"}, "no collection 'sentinel-2-l1c'"),
        ({"bbox": (20.0, 46.0, 20.1, 46.1)}, "outside the cube"),
    ],
)
def test_a_contradiction_is_refused_before_the_search(
    made: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    source, plan = made
    monkeypatch.setattr("ingest.upkeep.extend.find_scenes", lambda *_, **__: pytest.fail("it searched"))
    config = IngestConfig(**{**GIVEN, **change})
    for append, refresh in ((True, False), (False, True)):
        with pytest.raises(CubeMismatch, match=says):
            plan_extension(plan, str(source), config, append=append, refresh=refresh)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bands": "B04,B08"},
        {"crs": "EPSG:32633", "resolution": 10.0},
        {"datetime": "2023-09"},
        {"bbox": (15.0, 46.04, 15.001, 46.05)},
        {"max_items": 3, "query": "eo:cloud_cover<90"},
        {"offset_policy": "warn"},
    ],
)
def test_what_selects_or_repeats_is_no_contradiction(made: tuple[Path, Plan], change: dict[str, Any]) -> None:
    source, plan = made
    config = IngestConfig(**{**GIVEN, **change})
    assert plan_extension(plan, str(source), config, append=True, refresh=False) is plan


def test_a_collection_that_was_asked_for_and_had_nothing_is_no_contradiction(made: tuple[Path, Plan]) -> None:
    source, _ = made
    both: dict[str, Any] = {**GIVEN, "collections": "sentinel-2-l2a,sentinel-1-rtc"}
    plan = plan_of(source, **both)
    assert plan_extension(plan, str(source), IngestConfig(**both), append=True, refresh=False) is plan
    assert search.find_scenes(str(source), IngestConfig(**both)).scenes
