"""What xarray and zarr-python would decode is checked first: copies of metadata, axes, samples, labels (FAULTS Z21)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs.pickles
import numpy as np
import pytest

from zarr_store import open_cube
from zarr_store.errors import IntegrityError
from zarr_store.labels import open_label
from zarr_store.samples import Sample, SampleSpec, open_samples, write_samples

from .test_keys import write_layer

NAME = "sentinel-2-l2a"
LONG = 10**11


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


class Mark:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def older_format(array: Any) -> dict[str, Any]:
    """The metadata of the same array in Zarr 2, packed by a codec that runs code."""
    return {
        "zarr_format": 2, "shape": array["shape"], "chunks": array["shape"], "dtype": "|O", "compressor": None,
        "fill_value": "", "order": "C", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "dimension_separator": ".",
        "attributes": {"_ARRAY_DIMENSIONS": array["dimension_names"]},
    }  # fmt: skip


@pytest.fixture
def unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As releases of numcodecs do it that this package may be installed with."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)


@pytest.mark.parametrize(("group", "array"), [(NAME, "x"), (NAME, "time"), (f"overview/{NAME}", "y")])
def test_the_copy_of_metadata_in_the_root_runs_no_code(
    cube_path: Path, tmp_path: Path, unpickling: None, group: str, array: str
) -> None:
    def change(root: Any) -> None:
        copies = root["consolidated_metadata"]["metadata"]
        copies[f"{group}/{array}"] = older_format(copies[f"{group}/{array}"])

    edit(cube_path / "zarr.json", change)
    (cube_path / group / array / "0").write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    cube = open_cube(cube_path)
    with pytest.raises(IntegrityError, match=f"{array}: unreadable array metadata"):
        cube.overview(NAME) if group.startswith("overview") else cube.dataset(NAME)
    assert not (tmp_path / "ran").exists()


def longer(document: Any) -> None:
    document["shape"][-1] = LONG
    document["chunk_grid"]["configuration"]["chunk_shape"][-1] = LONG


@pytest.mark.parametrize("where", ["copy", "own"])
@pytest.mark.parametrize(("group", "array"), [(NAME, "x"), (NAME, "reflectance"), (f"overview/{NAME}", "y")])
def test_axes_and_arrays_that_promise_too_much_are_not_opened(
    cube_path: Path, where: str, group: str, array: str
) -> None:
    if where == "copy":
        edit(
            cube_path / "zarr.json", lambda root: longer(root["consolidated_metadata"]["metadata"][f"{group}/{array}"])
        )
    else:
        edit(cube_path / "zarr.json", lambda root: root.pop("consolidated_metadata"))
        edit(cube_path / group / array / "zarr.json", longer)
    cube = open_cube(cube_path)
    with pytest.raises(IntegrityError, match=f"shape .*{LONG}"):
        cube.overview(NAME) if group.startswith("overview") else cube.dataset(NAME)


def test_arrays_that_a_collection_does_not_have_are_left_out(cube_path: Path) -> None:
    def change(root: Any) -> None:
        copies = root["consolidated_metadata"]["metadata"]
        copies[f"{NAME}/other"] = json.loads(json.dumps(copies[f"{NAME}/x"])) | {"dimension_names": ["other"]}
        longer(copies[f"{NAME}/other"])

    edit(cube_path / "zarr.json", change)
    dataset = open_cube(cube_path).dataset(NAME)
    assert "other" not in dataset.variables
    assert "reflectance" in dataset.variables


def test_a_cube_without_the_copy_is_read(cube_path: Path) -> None:
    expected = open_cube(cube_path).dataset(NAME).reflectance.to_numpy()
    edit(cube_path / "zarr.json", lambda root: root.pop("consolidated_metadata"))
    found = open_cube(cube_path).dataset(NAME)
    np.testing.assert_array_equal(found.reflectance.to_numpy(), expected)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    spec = SampleSpec(3, ("red",), (4, 4), "uint8", ("a", "b"))
    image = np.zeros((1, 4, 4), np.uint8)
    store = tmp_path / "samples.zarr"
    write_samples(store, spec, [Sample(image, np.array(n % 2, np.uint8), 15.0, 45.0, f"n{n}") for n in range(3)])
    assert open_samples(store).names() == ["n0", "n1", "n2"]
    return store


@pytest.mark.parametrize("array", ["label", "longitude", "image"])
def test_samples_that_promise_too_much_are_not_opened(samples: Path, array: str) -> None:
    edit(samples / array / "zarr.json", longer)
    with pytest.raises(IntegrityError, match=f"{array}/zarr.json promises what it must not: shape .*{LONG}"):
        open_samples(samples)


def test_names_of_samples_run_no_code(samples: Path, tmp_path: Path, unpickling: None) -> None:
    array = json.loads((samples / "name" / "zarr.json").read_text())

    def change(root: Any) -> None:
        metadata = {"name": older_format(array)}
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}

    edit(samples / "zarr.json", change)
    (samples / "name" / "0").write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    assert open_samples(samples).names() == ["n0", "n1", "n2"], "the array itself is read"
    edit(samples / "name" / "zarr.json", longer)
    with pytest.raises(IntegrityError, match="promises what it must not"):
        open_samples(samples).names()
    assert not (tmp_path / "ran").exists()


def test_a_label_layer_that_promises_too_much_is_not_opened(cube_path: Path) -> None:
    write_layer(cube_path)
    assert open_label(open_cube(cube_path), "landuse").array().shape
    edit(cube_path / "labels/landuse/label/zarr.json", longer)
    layer = open_label(open_cube(cube_path), "landuse")
    with pytest.raises(IntegrityError, match=f"promises what it must not: shape .*{LONG}"):
        layer.array()
