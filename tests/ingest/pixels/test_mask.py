"""Masks against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.pixels.mask import disc, halo_pixels, mask_classes, observed
from zarr_store.grid import Grid

METRES = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -20.0, 0.0), (1, 1))


def brute_force(classes: np.ndarray, masked: set[int], grid: Grid, dilate_m: float) -> np.ndarray:
    """Every pixel looks at every other one."""
    rows, cols = halo_pixels(grid, dilate_m)
    rx, ry = grid.resolution
    height, width = classes.shape
    out = np.zeros((height - 2 * rows, width - 2 * cols), bool)
    clouds = [(y, x) for y in range(height) for x in range(width) if classes[y, x] in masked - {0}]
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            here = (y + rows, x + cols)
            near = any(
                ((here[0] - cy) * ry) ** 2 + ((here[1] - cx) * rx) ** 2 <= dilate_m**2 + 1e-6 for cy, cx in clouds
            )
            out[y, x] = classes[here] in masked or near
    return out


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 5, 10, 20, 22.4, 30, 45]), st.integers(0, 2**31), st.floats(0, 0.2))
def test_mask_equals_brute_force(dilate_m: float, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = halo_pixels(METRES, dilate_m)
    classes = rng.choice(
        [0, 4, 9, 3], p=[share / 2, 1 - share, share / 4, share / 4], size=(9 + 2 * rows, 11 + 2 * cols)
    )
    classes = classes.astype(np.uint8)
    got = mask_classes(classes, [0, 3, 9], grid=METRES, dilate_m=dilate_m)
    np.testing.assert_array_equal(got, brute_force(classes, {0, 3, 9}, METRES, dilate_m))


def test_mask_is_seamless_when_cut_anywhere() -> None:
    rng = np.random.default_rng(1)
    rows, cols = halo_pixels(METRES, 60)
    classes = rng.choice(np.array([4, 9], np.uint8), p=[0.98, 0.02], size=(80 + 2 * rows, 70 + 2 * cols))
    whole = mask_classes(classes, [9], grid=METRES, dilate_m=60)
    assert whole.any()
    assert not whole.all()
    for y0, y1, x0, x1 in [(0, 37, 0, 70), (37, 80, 0, 31), (37, 80, 31, 70)]:
        part = classes[y0 : y1 + 2 * rows, x0 : x1 + 2 * cols]
        np.testing.assert_array_equal(mask_classes(part, [9], grid=METRES, dilate_m=60), whole[y0:y1, x0:x1])


def test_no_data_is_masked_but_does_not_grow() -> None:
    classes = np.full((7, 13), 4, np.uint8)
    classes[:, 0] = 0
    assert mask_classes(classes, [0, 9], grid=METRES, dilate_m=20)[:, 0].sum() == 0
    assert mask_classes(classes, [0, 9], grid=METRES)[:, 0].all()


def test_disc_is_measured_in_metres_on_both_axes() -> None:
    assert disc(METRES, 40).shape == (5, 9)
    assert disc(METRES, 40)[2].all()
    assert disc(METRES, 40)[0].sum() == 1
    degrees = Grid("EPSG:4326", (1e-4, 0.0, 0.0, 0.0, -1e-4, 0.0), (1, 1))
    assert halo_pixels(degrees, 60) == (5, 5)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_observed_needs_every_band_and_a_class(dtype: str) -> None:
    empty = 0 if dtype == "uint16" else np.nan
    bands = [np.array([[5, empty, 5, 5]], dtype), np.array([[5, 5, empty, 5]], dtype)]
    classes = np.array([[4, 4, 4, 0]], np.uint8)
    assert observed(bands, classes).tolist() == [[True, False, False, False]]
    assert observed(bands, None).tolist() == [[True, False, False, True]]
