"""What other programs make of a cube: xarray, rioxarray and netCDF, without a word of ours."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rioxarray  # noqa: F401  # registers the accessor `rio`
import xarray as xr

from zarr_store import CubeSpec, create_cube, open_cube
from zarr_store.grow import grow_cube
from zarr_store.labels import LabelSpec, find_labels, label_boxes, open_label, write_label
from zarr_store.lock import CubeLock
from zarr_store.spec import BandSpec, DerivedSpec

from .conftest import ITEMS, NAME

CLASSES = LabelSpec("mine", "classes", ((1, "field"),), {"made": "here"})


def label(path: Path, name: str = "mine", value: int = 1) -> bool:
    boxes = label_boxes(open_cube(path))
    spec = replace(CLASSES, name=name)
    pixels = [(box, np.full(box.shape[1:], value, np.uint8)) for box in boxes]
    return write_label(str(path), spec, lambda: pixels)[1]


def seen(path: Path, name: str = "mine") -> list[float]:
    """The values of a layer as xarray finds them, by its name and in the tree."""
    direct = xr.open_zarr(path, group=f"labels/{name}", chunks=None)["label"]
    tree = xr.open_datatree(path, engine="zarr", chunks=None)[f"labels/{name}"]["label"]
    return [float(direct.mean()), float(tree.mean())]


def test_means_leave_out_what_has_no_data(cube_path: Path, pixels: dict[str, np.ndarray]) -> None:
    plain = xr.open_zarr(cube_path, group=NAME, chunks=None)
    stored = pixels["reflectance"].astype(float)
    assert float(plain.reflectance.astype(float).mean()) == pytest.approx(stored[stored > 0].mean())
    assert float(plain.reflectance.max()) == stored.max(), "numbers stay those of the file: no scale is applied"
    first = plain.reflectance.isel(time=0, band=0)
    assert first.rio.encoded_nodata == 0
    assert xr.open_zarr(cube_path, group=NAME, mask_and_scale=False).reflectance.isel(time=0, band=0).rio.nodata == 0
    assert float(xr.open_zarr(cube_path, group=f"overview/{NAME}", chunks=None).reflectance.min()) > 0
    assert plain.scl.dtype == plain.status.dtype == np.uint8, "classes stay classes"
    scaled = open_cube(cube_path).dataset(NAME, scaled=True)
    assert float(scaled.reflectance.max()) == pytest.approx(stored.max() * 1e-4)
    assert "_FillValue" not in scaled.reflectance.attrs
    assert "reflectance = stored * 0.0001" in plain.reflectance.attrs["comment"]


def test_indices_and_backscatter_name_their_nodata(tmp_path: Path, spec: CubeSpec) -> None:
    index = DerivedSpec("ndvi", ("nir", "blue"), "(nir - blue) / (nir + blue)", "a book")
    radar = replace(spec, collection="s1", kind="backscatter", bands=(BandSpec("vv", None),), class_layers=())
    items: dict[str, Any] = ITEMS | {"s1": [{**row, "step": step} for step, row in enumerate(ITEMS[NAME])]}
    create_cube(tmp_path / "c.zarr", [replace(spec, derived=(index,)), radar], items=items, provenance={})
    assert xr.open_zarr(tmp_path / "c.zarr", group=NAME, chunks=None).ndvi.encoding["_FillValue"] == -32768
    assert np.isnan(xr.open_zarr(tmp_path / "c.zarr", group="s1", chunks=None).backscatter.encoding["_FillValue"])
    written = json.loads((tmp_path / "c.zarr" / "s1" / "backscatter" / "zarr.json").read_text())["attributes"]
    assert np.isnan(struct.unpack("<d", base64.b64decode(written["_FillValue"]))[0])


@pytest.mark.parametrize("how", [{}, {"scaled": True, "masked": True}])
def test_a_dataset_goes_into_netcdf_and_back(cube_path: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    dataset = open_cube(cube_path).dataset(NAME, **how)
    dataset.to_netcdf(tmp_path / "copy.nc")
    with xr.open_dataset(tmp_path / "copy.nc") as copy:
        expected = xr.decode_cf(dataset) if not how else dataset
        np.testing.assert_allclose(copy.reflectance.values, expected.reflectance.values)
        assert json.loads(copy.attrs["terrashard"])["items"] == ITEMS[NAME]
    # of plain xarray, nothing nested is left either
    plain = xr.open_zarr(cube_path, group=NAME, chunks=None)
    for attributes in (plain.attrs, *(v.attrs for v in plain.variables.values())):
        assert not [name for name, value in attributes.items() if isinstance(value, dict)]


def test_a_cube_with_nested_attributes_is_read_as_before(cube_path: Path) -> None:
    path = cube_path / NAME / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["terrashard"] = json.loads(document["attributes"]["terrashard"])
    spec, items = open_cube(cube_path).spec(NAME), open_cube(cube_path).items(NAME)
    path.write_text(json.dumps(document))
    assert (open_cube(cube_path).spec(NAME), open_cube(cube_path).items(NAME)) == (spec, items)


def test_xarray_finds_label_layers_also_after_the_cube_has_grown(cube_path: Path, spec: CubeSpec) -> None:
    assert label(cube_path)
    assert seen(cube_path) == [1.0, 1.0]
    assert label(cube_path, "other", 2)
    assert (seen(cube_path), seen(cube_path, "other")) == ([1.0, 1.0], [2.0, 2.0])
    later = replace(spec, times=(*spec.times, "2023-08-15T09:57:57"))
    items = {NAME: [*ITEMS[NAME], {"id": "C", "datetime": "2023-08-15T09:57:57Z"}]}
    with CubeLock(cube_path, "test"):
        assert grow_cube(cube_path, [later], items=items, provenance={"grown": True})
        assert grow_cube(cube_path, [later], items=items, provenance={"grown": True}) == 0
    assert (seen(cube_path), seen(cube_path, "other")) == ([1.0, 1.0], [2.0, 2.0])
    assert xr.open_zarr(cube_path, group=NAME, chunks=None).sizes["time"] == 3
    assert find_labels(open_cube(cube_path)) == ("mine", "other")


def test_a_layer_that_only_our_index_lists_is_made_known_by_the_same_command(cube_path: Path) -> None:
    root = (cube_path / "zarr.json").read_bytes()
    label(cube_path)
    (cube_path / "zarr.json").write_bytes(root)  # as a killed run, or an earlier release, left it
    with pytest.raises((KeyError, FileNotFoundError)):
        seen(cube_path)
    assert not label(cube_path), "the layer is there"
    assert seen(cube_path) == [1.0, 1.0]
    assert open_label(open_cube(cube_path), "mine").labelled > 0
