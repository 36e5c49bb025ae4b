"""The training index equals counting the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zarr_store import CubeSpec, open_cube
from zarr_store.regions import iterate_boxes

from .conftest import NAME


def test_counts_moments_and_classes_equal_brute_force(
    cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]
) -> None:
    index = open_cube(cube_path).index(NAME)
    assert index.present.all()
    assert index.observed.shape == (2, 3, 4)
    for at, box in iterate_boxes(spec.shape, spec.layout.chunk):
        status = pixels["status"][box.slices]
        assert index.pixels[at] == status.size
        assert [index.observed[at], index.masked[at], index.missing[at]] == [(status == s).sum() for s in (1, 2, 3)]
        seen = (status == 1) | (status == 2)
        np.testing.assert_array_equal(
            index.class_counts["scl"][at], np.bincount(pixels["scl"][box.slices][seen], minlength=256)
        )


def test_statistics_of_a_part_equal_numpy(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    index = open_cube(cube_path).index(NAME)
    select = np.zeros(index.present.shape, bool)
    select[1, :2] = True
    mean, std = index.statistics(select)
    clear = pixels["status"] == 1
    clear[0] = False
    clear[1, 32:] = False
    values = np.moveaxis(pixels["reflectance"], 1, 0)[:, clear].astype("float64")
    np.testing.assert_allclose(mean, values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=1), rtol=1e-12)
    assert not np.allclose(mean, index.statistics()[0])


def test_statistics_of_nothing_are_neutral(cube_path: Path) -> None:
    index = open_cube(cube_path).index(NAME)
    mean, std = index.statistics(np.zeros(index.present.shape, bool))
    assert (mean == 0).all()
    assert (std == 1).all()
