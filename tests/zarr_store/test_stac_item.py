"""STAC items of cubes: place over the antimeridian and the poles, what they list, and pystac's own schemas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pystac.validation
import pytest
from pystac.extensions.projection import ProjectionExtension

from zarr_store import CubeSpec, Grid, open_cube
from zarr_store.errors import IntegrityError
from zarr_store.folder import FolderStore
from zarr_store.grow import grow_cube
from zarr_store.labels import LabelSpec, label_boxes, write_cube_item, write_label
from zarr_store.outline import outline_of
from zarr_store.stac_item import classes_of, item_of, write_item

from .conftest import ITEMS, NAME


def check_core(document: dict[str, Any]) -> pystac.Item:
    """Validate against the schemas of STAC itself, which pystac brings; those of extensions are on the network."""
    item = pystac.Item.from_dict(document)
    assert pystac.validation.validate_dict({**document, "stac_extensions": []}, extensions=[])
    return item


@pytest.mark.parametrize(
    ("grid", "kind", "box"),
    [
        (Grid("EPSG:4326", (0.5, 0, 15, 0, -0.5, 46), (2, 4)), "Polygon", [15, 45, 17, 46]),
        (Grid("EPSG:4326", (1.0, 0, 179, 0, -1.0, -16), (2, 2)), "MultiPolygon", [179, -18, -179, -16]),
        (Grid("EPSG:4326", (1.0, 0, -181, 0, -1.0, -16), (2, 2)), "MultiPolygon", [179, -18, -179, -16]),
        (Grid("EPSG:4326", (1.0, 0, 180, 0, -1.0, -16), (2, 2)), "Polygon", [-180, -18, -178, -16]),
        (Grid("EPSG:4326", (1.0, 0, -180, 0, -1.0, 90), (180, 360)), "Polygon", [-180, -90, 180, 90]),
    ],
)
def test_outlines_in_degrees(grid: Grid, kind: str, box: list[float]) -> None:
    found = outline_of(grid)
    assert found is not None
    assert (found[0]["type"], found[1]) == (kind, box)


def test_outlines_of_projections() -> None:
    utm = outline_of(Grid("EPSG:32601", (10_000, 0, 200_000, 0, -10_000, 5_100_000), (50, 90)))
    assert utm is not None
    west, _, east, _ = utm[1]
    assert utm[0]["type"] == "MultiPolygon"
    assert 178 < west < 180
    assert -180 < east < -160
    for code, pole in (("EPSG:3031", -90.0), ("EPSG:3413", 90.0)):
        polar = outline_of(Grid(code, (10_000, 0, -1_000_000, 0, -10_000, 1_000_000), (200, 200)))
        assert polar is not None
        assert pole in polar[1]
        assert (polar[1][0], polar[1][2]) == (-180.0, 180.0)
    curved = outline_of(Grid("EPSG:3035", (1000, 0, 2_500_000, 0, -1000, 5_500_000), (2000, 3000)))
    assert curved is not None
    corners = [curved[0]["coordinates"][0][i] for i in (0, 24, 48, 72)]
    assert curved[1][3] > max(y for _, y in corners) + 0.1, "the upper edge bulges beyond its corners"


def test_the_item_of_a_cube_lists_what_is_in_it(cube_path: Path, spec: CubeSpec) -> None:
    write_cube_item(cube_path)
    text = (cube_path / "item.json").read_text()
    item = check_core(json.loads(text))
    assert str(cube_path) not in text
    assert (item.properties["start_datetime"], item.properties["end_datetime"]) == (
        "2023-08-10T09:57:57Z", "2023-08-13T10:07:53Z")  # fmt: skip
    projection = ProjectionExtension.ext(item)
    assert projection.epsg == 32633
    assert projection.shape == [40, 57]
    assert tuple(projection.transform or ()) == spec.grid.transform
    bands = item.assets[NAME].extra_fields["bands"]
    assert [(band["name"], band["raster:scale"], band["nodata"]) for band in bands] == [
        ("blue", 1e-4, 0), ("nir", 1e-4, 0)]  # fmt: skip
    status = item.assets[f"{NAME}-status"].extra_fields["classification:classes"]
    assert [one["name"] for one in status] == ["nodata", "observed", "masked", "missing"]
    for asset in item.assets.values():
        assert (cube_path / asset.href / "zarr.json").is_file(), asset.href
    assert [url.split("/")[3] for url in item.stac_extensions] == ["projection", "raster", "classification"]


def test_labels_and_new_dates_come_into_the_item_and_its_id_stays(cube_path: Path, spec: CubeSpec) -> None:
    write_cube_item(cube_path)
    before = json.loads((cube_path / "item.json").read_text())
    classes = LabelSpec("cover", "classes", ((1, "tree cover"), (2, "tree-cover")), {"made": "here"})
    write_label(cube_path, classes, lambda: ((box, np.ones((box.y1 - box.y0, box.x1 - box.x0), np.uint8))
                                             for box in label_boxes(open_cube(cube_path))))  # fmt: skip
    listed = json.loads((cube_path / "item.json").read_text())["assets"]["label-cover"]
    assert [(one["value"], one["name"]) for one in listed["classification:classes"]] == [
        (1, "tree_cover"), (2, "tree-cover")]  # fmt: skip
    longer = replace(spec, times=(*spec.times, "2023-09-01T10:00:00"))
    rows = [*ITEMS[NAME], {"id": "C", "datetime": "2023-09-01T10:00:00Z"}]
    grow_cube(cube_path, [longer], items={NAME: rows}, provenance={"made": "by a test"})
    write_cube_item(cube_path)
    after = json.loads((cube_path / "item.json").read_text())
    check_core(after)
    assert after["id"] == before["id"]
    assert after["properties"]["end_datetime"] == "2023-09-01T10:00:00Z"
    assert (after["properties"]["terrashard:dates"], after["properties"]["terrashard:scenes"]) == ({NAME: 3}, {NAME: 3})
    assert "label-cover" in after["assets"]


def test_an_item_is_strict_json_and_is_written_only_when_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid("EPSG:32633", (10.0, 0, 500_000, 0, -10.0, 5_000_000), (8, 8))
    store = FolderStore(tmp_path)
    write_item(store, item_of("a", grid, ["2023-08-10T00:00:00"], {}, {}))
    written: list[str] = []
    monkeypatch.setattr(FolderStore, "write", lambda self, key, data: written.append(key))
    write_item(store, item_of("a", grid, ["2023-08-10T00:00:00"], {}, {}))
    assert not written
    with pytest.raises(IntegrityError, match="not finite"):
        write_item(store, item_of("a", grid, ["2023-08-10T00:00:00"], {"gsd": float("nan")}, {}))
    many = {"classification:classes": classes_of((i, "x" * 300, "") for i in range(50_000))}
    with pytest.raises(IntegrityError, match="expected at most"):
        write_item(store, item_of("a", grid, ["2023-08-10T00:00:00"], many, {}))
    assert not written
