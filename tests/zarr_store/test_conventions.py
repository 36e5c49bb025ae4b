"""Cubes and maps say by Zarr conventions where they lie and which overviews they have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from jaxtrain.data.classes import Classes
from jaxtrain.inference.maps import create_map, open_map
from jaxtrain.inference.overviews import write_overviews
from zarr_store import BandSpec, CubeSpec, Grid, create_cube, open_cube
from zarr_store.folder import FolderStore

from .conftest import ITEMS, NAME

# of the schemas of the conventions, v0.1
PATH = re.compile(r"^(?!/)(?!.*(\.\.))([^/]+(/[^/]+)*)$")
UUIDS = {"proj": "f17cb550-5864-4468-aeb7-f3180cfb622f", "spatial": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
         "multiscales": "d35379db-88df-4056-af3a-620245f8e347"}  # fmt: skip
CLASSES = Classes.from_list([{"name": name, "values": [i], "colour": "#0000ff"} for i, name in enumerate("ab")])
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (70, 50))


def attributes(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]
    return found


def listed(path: Path) -> dict[str, str]:
    """The conventions that a group follows, by name."""
    return {one["name"]: one["uuid"] for one in attributes(path)["zarr_conventions"]}


def check_pyramid(path: Path) -> list[dict[str, Any]]:
    """Check what `multiscales` of a group says against the arrays below it; returns its levels."""
    layout: list[dict[str, Any]] = attributes(path)["multiscales"]["layout"]
    assert listed(path)["multiscales"] == UUIDS["multiscales"]
    shapes = {}
    for level in layout:
        assert PATH.match(level["asset"])
        node = zarr.open(str(path / level["asset"]), mode="r")
        array = (
            node if isinstance(node, zarr.Array) else node["reflectance" if "reflectance" in node else "backscatter"]
        )
        assert list(array.shape[-2:]) == level["spatial:shape"]
        shapes[level["asset"]] = np.array(array.shape[-2:]), np.array(level["spatial:transform"])
        if "derived_from" in level:
            (size, place), scale = shapes[level["derived_from"]], level["transform"]["scale"]
            assert (-(-size // scale) == shapes[level["asset"]][0]).all()
            np.testing.assert_allclose(place[[0, 4]] * scale, shapes[level["asset"]][1][[0, 4]])
            assert (place[[2, 5]] == shapes[level["asset"]][1][[2, 5]]).all()
    return layout


def test_a_cube_names_its_conventions_and_its_overview(cube_path: Path) -> None:
    layout = check_pyramid(cube_path)
    assert [(level["asset"], level.get("derived_from")) for level in layout] == [
        (NAME, None), (f"overview/{NAME}", NAME)]  # fmt: skip
    for group in (NAME, f"overview/{NAME}"):
        assert listed(cube_path / group) == {name: UUIDS[name] for name in ("proj", "spatial")}
    assert set(xr.open_datatree(cube_path, engine="zarr", chunks=None).attrs) >= {"multiscales", "zarr_conventions"}


def test_collections_are_never_overviews_of_each_other(tmp_path: Path, spec: CubeSpec) -> None:
    radar = replace(spec, collection="s1", kind="backscatter", bands=(BandSpec("vv", None),), class_layers=())
    other = replace(spec, collection="other")
    items: dict[str, Any] = {name: [{**row, "step": i} for i, row in enumerate(ITEMS[NAME])] for name in (NAME, "s1")}
    create_cube(tmp_path / "two.zarr", [spec, radar], items=items, provenance={})
    assert [level["asset"] for level in check_pyramid(tmp_path / "two.zarr")] == [
        NAME, f"overview/{NAME}", "s1", "overview/s1"]  # fmt: skip
    # GDAL takes each smaller array of the same name for an overview
    create_cube(tmp_path / "same.zarr", [spec, other], items=ITEMS | {"other": ITEMS[NAME]}, provenance={})
    assert "multiscales" not in attributes(tmp_path / "same.zarr")
    assert open_cube(tmp_path / "same.zarr").collections == (NAME, "other")


@pytest.fixture
def large_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A map of 70 × 50 pixels in chunks of 16."""
    monkeypatch.setattr("jaxtrain.inference.maps.CHUNK", 16)
    rng = np.random.default_rng(0)
    with create_map(tmp_path / "m.zarr", GRID, CLASSES, attributes={}, probabilities=True) as writer:
        writer.write(0, 0, rng.integers(0, 2, GRID.shape).astype(np.uint8), rng.integers(0, 100, GRID.shape, np.uint8),
                     rng.integers(0, 100, (2, *GRID.shape), np.uint8))  # fmt: skip
    return tmp_path / "m.zarr"


def test_a_large_map_has_overviews_of_its_own_pixels(large_map: Path) -> None:
    layout = check_pyramid(large_map)
    assert [level["asset"] for level in layout] == [
        *(name for name in ("class", "confidence", "probability")),
        *(f"overview/{factor}/{name}" for factor in (4, 16) for name in ("class", "confidence", "probability")),
    ]  # fmt: skip
    assert listed(large_map) == UUIDS
    rows, columns = (np.minimum(np.arange(0, size, 4) + 2, size - 1) for size in GRID.shape)
    made = open_map(large_map)
    for name in ("class", "confidence", "probability"):
        level = xr.open_zarr(large_map, group="overview/4", chunks=None, mask_and_scale=False)[name]
        np.testing.assert_array_equal(level, made.read(name)[..., rows[:, None], columns])
        coarser = xr.open_zarr(large_map, group="overview/16", chunks=None, mask_and_scale=False)[name]
        assert coarser.shape[-2:] == (5, 4)
        np.testing.assert_array_equal(coarser, level.values[..., np.minimum(np.arange(0, 18, 4) + 2, 17)[:, None],
                                                            np.minimum(np.arange(0, 13, 4) + 2, 12)])  # fmt: skip
    level = xr.open_zarr(large_map, group="overview/4", chunks=None)
    np.testing.assert_array_equal(level["y_4"], GRID.coarsen(4).y())
    assert listed(large_map / "overview/4") == {name: UUIDS[name] for name in ("proj", "spatial")}
    # a child whose y and x differ from its parent's would be refused here
    assert set(xr.open_datatree(large_map, engine="zarr", chunks=None)["overview"].children) == {"4", "16"}


def test_overviews_that_were_interrupted_are_made_again(large_map: Path) -> None:
    def tree() -> dict[str, bytes]:
        return {str(p.relative_to(large_map)): p.read_bytes() for p in large_map.rglob("*") if p.is_file()}

    whole = tree()
    (large_map / "overview/4/class/c/0/0").write_bytes(b"")
    (large_map / "overview/16/zarr.json").unlink()
    write_overviews(FolderStore.at(large_map), ("class", "confidence", "probability"), 16)
    assert tree() == whole


def test_a_map_of_one_chunk_has_none(tmp_path: Path) -> None:
    with create_map(tmp_path / "m.zarr", GRID, CLASSES, attributes={}) as writer:
        writer.write(0, 0, np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, np.uint8))
    assert not (tmp_path / "m.zarr/overview").exists()
    assert listed(tmp_path / "m.zarr") == {name: UUIDS[name] for name in ("proj", "spatial")}
