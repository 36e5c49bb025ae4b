"""What scenes see of the region, and their clouds there: from pixels, whatever the catalogue says of the whole tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.enums import Resampling

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.request.config import IngestConfig
from ingest.run.loop import run
from ingest.scenes.scene import Scene
from ingest.testing import make_scene
from zarr_store.errors import NothingFound
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.spec import Layout

TILE = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (64, 64))
LAYOUT = Layout("test", (1, 32, 32), (1, 64, 64))
WEST = Grid(TILE.crs, TILE.transform, (64, 32))


def region(grid: Grid) -> tuple[float, float, float, float]:
    """A lon/lat box that lies just inside a grid."""
    inner = Grid(grid.crs, (20.0, 0.0, grid.bounds[0] + 40, 0.0, -20.0, grid.bounds[3] - 40),
                 (grid.height - 4, grid.width - 4))  # fmt: skip
    return inner.lonlat_bounds()


def sky(grid: Grid = TILE, *, west: int, east: int, red: int = 3000) -> dict[str, np.ndarray]:
    """Bands and classes with one class in the western half and another in the eastern."""
    scl = np.full(grid.shape, west, np.uint8)
    scl[:, grid.width // 2 :] = east
    value = np.where(scl == 0, 0, red).astype(np.uint16)
    return {"red": value, "scl": scl}


def made(scenes: list[Scene], **asked: Any) -> tuple[Plan, dict[tuple[str, str], Any]]:
    config = IngestConfig(bands=("red", "scl"), **asked)
    probes = probe_scenes(scenes, config)
    return plan_scenes(scenes, probes, config, layout=LAYOUT), probes


@pytest.fixture
def rivals(tmp_path: Path) -> list[Scene]:
    """The catalogue calls A clear and B cloudy; over the western half it is the other way round."""
    return [
        make_scene(tmp_path, "A", TILE, sky(west=9, east=4), cloud_cover=2.0, datetime="2023-08-10T10:00:00Z"),
        make_scene(tmp_path, "B", TILE, sky(west=4, east=9), cloud_cover=100.0, datetime="2023-08-10T10:00:10Z"),
    ]


def test_overlaps_are_ordered_by_the_clouds_over_the_region(rivals: list[Scene]) -> None:
    plan, probes = made(rivals, bbox=region(WEST))
    assert [s.item_id for s in plan.tasks[0].sources] == ["B", "A"]
    assert [probes[s.key].cloud_share for s in rivals] == [1.0, 0.0]
    assert [row["cloud_share"] for row in plan.items["sentinel-2-l2a"]] == [1.0, 0.0]
    assert [row["cloud_cover"] for row in plan.items["sentinel-2-l2a"]] == [2.0, 100.0], "the catalogue's word is kept"
    everywhere, _ = made(rivals)
    assert {row["cloud_share"] for row in everywhere.items["sentinel-2-l2a"]} == {0.5}


def test_a_polygon_counts_only_what_lies_in_it(rivals: list[Scene]) -> None:
    to_lonlat = Transformer.from_crs(TILE.crs, "EPSG:4326", always_xy=True)
    left, bottom, right, top = TILE.bounds
    middle = (left + right) / 2
    # a triangle whose box is the whole tile and whose area lies mostly in the east
    ring = [to_lonlat.transform(x, y) for x, y in ((left, top), (right, top), (right, bottom), (middle, bottom))]
    polygon = {"type": "Polygon", "coordinates": [[*map(list, ring), list(ring[0])]]}
    plan, probes = made(rivals, geometry=polygon)
    shares = [probes[s.key].cloud_share for s in rivals]
    assert shares[0] == pytest.approx(1 / 3, abs=0.02)
    assert shares[1] == pytest.approx(2 / 3, abs=0.02)
    assert [s.item_id for s in plan.tasks[0].sources] == ["A", "B"]


def test_without_a_class_layer_the_catalogue_is_followed(rivals: list[Scene]) -> None:
    config = IngestConfig(bands=("red",), mask="none", bbox=region(WEST))
    bare = [replace(s, assets={"red": s.assets["red"]}) for s in rivals]
    probes = probe_scenes(bare, config)
    assert {p.cloud_share for p in probes.values()} == {None}
    assert [p.valid_share for p in probes.values()] == [1.0, 1.0]
    plan = plan_scenes(bare, probes, config, layout=LAYOUT)
    assert [s.item_id for s in plan.tasks[0].sources] == ["A", "B"]


def test_a_swath_that_ends_before_the_region_is_a_sliver_whatever_its_footprint_says(tmp_path: Path) -> None:
    whole = make_scene(tmp_path, "whole", TILE, sky(west=4, east=4))
    # its footprint is the tile's square, its pixels end in the east
    ends = make_scene(tmp_path, "ends", TILE, sky(west=0, east=4), datetime="2023-08-11T10:00:00Z")
    plan, probes = made([whole, ends], bbox=region(WEST))
    assert [(d.item_id, "sliver" in d.reason) for d in plan.drops] == [("ends", True)]
    assert probes[ends.key].valid_share == 0.0
    assert len(plan.specs[0].times) == 1
    with pytest.raises(NothingFound, match=r"none of the 1 scenes shows anything of the region .* a sliver"):
        made([ends], bbox=region(WEST))
    plan, probes = made([whole, ends])
    assert plan.drops == ()
    assert probes[ends.key].valid_share == 0.5
    bare = [replace(s, assets={"red": s.assets["red"]}) for s in (whole, ends)]
    config = IngestConfig(bands=("red",), mask="none", bbox=region(WEST))
    plan = plan_scenes(bare, probe_scenes(bare, config), config, layout=LAYOUT)
    assert [d.item_id for d in plan.drops] == ["ends"], "data bands show it where there is no class layer"


def test_a_tile_that_barely_reaches_the_region_is_measured_by_what_it_could_show(tmp_path: Path) -> None:
    beside = Grid(TILE.crs, (20.0, 0.0, TILE.bounds[2] - 100, 0.0, -20.0, 5_000_000.0), (64, 64))
    scenes = [
        make_scene(tmp_path, "A", TILE, sky(west=4, east=4)),
        make_scene(tmp_path, "beside", beside, sky(beside, west=4, east=4)),
    ]
    plan, probes = made(scenes, bbox=TILE.lonlat_bounds())
    assert plan.drops == ()
    valid = probes[scenes[1].key].valid_share
    assert valid is not None
    assert 5 / 64 <= valid <= 6 / 64, "the five columns within, and the box around the region is a column wider"


@pytest.mark.parametrize("overviews", [True, False])
def test_large_regions_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overviews: bool) -> None:
    monkeypatch.setattr("ingest.plan.coverage._WHOLE_PX", 1 << 10)
    monkeypatch.setattr("ingest.plan.coverage._SIDE_PX", 16)
    scene = make_scene(tmp_path, "A", TILE, sky(west=9, east=4))
    if overviews:
        with rasterio.open(scene.assets["scl"].href, "r+") as dataset:
            dataset.build_overviews([2, 4], Resampling.nearest)
    probe = probe_scenes([scene], IngestConfig(bands=("red", "scl")))[scene.key]
    assert probe.cloud_share == pytest.approx(0.5, abs=0.05)
    assert probe.valid_share == (1.0 if overviews else None), "parts of a raster say nothing of where it is empty"


def test_a_damaged_class_layer_leaves_the_header_and_the_catalogue(rivals: list[Scene]) -> None:
    path = Path(rivals[1].assets["scl"].href)
    with rasterio.open(path) as dataset:
        start = int(dataset.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    plan, probes = made(rivals, bbox=region(TILE))
    assert probes[rivals[1].key].cloud_share is None
    assert probes[rivals[1].key].assets["scl"].error is None
    assert [s.item_id for s in plan.tasks[0].sources] == ["A", "B"]


def test_a_scene_that_heals_later_goes_into_the_cube_that_was_begun(
    rivals: list[Scene], tmp_path: Path, local_client: Any
) -> None:
    lost = Path(rivals[1].assets["scl"].href)
    whole = lost.read_bytes()
    lost.write_bytes(b"II*\x00 no more")
    asked = {"bbox": region(WEST)}
    begun, _ = made(rivals, **asked)
    assert [s.item_id for s in begun.tasks[0].sources] == ["A", "B"], "the catalogue's word, as B cannot be looked at"
    cube = tmp_path / "cube.zarr"
    assert run(begun, cube, client=local_client).exit_code == 3
    lost.write_bytes(whole)
    healed, _ = made(rivals, **asked)
    assert [s.item_id for s in healed.tasks[0].sources] == ["B", "A"]
    assert healed.digest != begun.digest
    report = run(healed, cube, client=local_client)
    assert report.exit_code == 0
    assert report.plan == begun.digest
    assert (open_cube(cube).dataset("sentinel-2-l2a").status.values[0, 2:-2, 2:-2] == 1).all()
