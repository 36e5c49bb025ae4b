"""Exact maps are what one pass over the whole scene gives, whatever the windows; where that cannot be, it is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rasterio.features import geometry_mask
from shapely.geometry import Polygon

from jaxtrain import predict, train
from jaxtrain.inference.area import Area
from jaxtrain.inference.field import image_stride, receptive_radius
from jaxtrain.inference.filling import Scene
from jaxtrain.inference.opening import open_scene
from jaxtrain.inference.options import MapOptions
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.regions import Region

from ..cube_factory import COLLECTION, make_cube, shared_cube, shared_run, tiny_config

SHAPE = (2, 181, 131)
"""Neither side is a multiple of what a network halves, and both are larger than a window."""


def run_of(folder: Path, cube: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A run of one step whose norms are those of the whole training."""
    run = {"steps": 1, "evaluate_every": 1, "checkpoint_every": 1}
    train(tiny_config(cube, model={"norm": "batch", "dropout": 0.0, **model}, run=run, **sections), folder)
    return folder


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("exact") / "c.zarr"
    make_cube(url, shape=SHAPE, masked=False)
    return url


@pytest.fixture(scope="module")
def unet(cube: Path) -> Path:
    return run_of(cube.parent / "unet", cube, {"name": "unet", "depth": 2})


@pytest.fixture(scope="module")
def temporal(cube: Path) -> Path:
    model = {"name": "temporal", "depth": 1, "context": 2, "width": 8}
    return run_of(cube.parent / "temporal", cube, model, data={"dates": 2})


def whole_scene(run: Path, cube: Path) -> np.ndarray:
    """Probabilities of one pass over the scene, which ends at a multiple of what the network halves, (H, W, K)."""
    opened = open_scene(run, cube, MapOptions(method="exact"))
    stride = image_stride(opened.program)
    height, width = (-(-side // stride) * stride for side in SHAPE[1:])
    times = opened.reader.dates
    image = np.zeros((times, 4, height, width), np.uint16)
    image[..., : SHAPE[1], : SHAPE[2]] = opened.cube.read(
        COLLECTION, "reflectance", Region(0, times, 0, SHAPE[1], 0, SHAPE[2])
    )
    more: dict[str, Any] = {}
    if times > 1:
        observed = np.zeros((1, times, height, width), np.uint8)
        observed[..., : SHAPE[1], : SHAPE[2]] = 1
        more = {"observed": observed, "day": np.array([[222, 223]], np.uint16)}
    else:
        image = image[0]
    answer = opened.scene().step(opened.state, jnp.asarray(image[None]), **more)
    return np.asarray(answer)[0, : SHAPE[1], : SHAPE[2]]


def answers_of(run: Path, cube: Path, out: Path, patch: pytest.MonkeyPatch, **options: Any) -> np.ndarray:
    """Probabilities of a map before they are rounded, (H, W, K)."""
    found = np.full((*SHAPE[1:], 3), np.nan, np.float32)
    blocks = Scene._blocks

    def watched(self: Scene, region: Region, windows: Any) -> Iterator[Any]:
        for y, x, mean, seen in blocks(self, region, windows):
            found[y : y + len(mean), x : x + mean.shape[1]] = mean
            yield y, x, mean, seen

    with patch.context() as inner:
        inner.setattr(Scene, "_blocks", watched)
        # as many windows as fit: the smallest middles
        inner.setattr("jaxtrain.inference.lattice._TRAINING_BATCHES", 0)
        predict(run, cube, out, **options)
    return found


@pytest.mark.parametrize("name", ["unet", "temporal"])
def test_an_exact_map_is_one_pass_over_the_whole_scene(
    name: str, cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    one = {"time": "2023-08-10"} if name == "unet" else {}
    whole = whole_scene(run, cube)
    exact = answers_of(run, cube, tmp_path / "exact.zarr", monkeypatch, method="exact", **one)
    assert np.abs(exact - whole).max() < 2e-6
    blend = answers_of(run, cube, tmp_path / "blend.zarr", monkeypatch, **one)
    assert np.abs(blend - whole).max() > 1e-4  # the comparison would show a seam


def test_the_windows_of_an_exact_map_are_smaller_than_the_scene(
    unet: Path, cube: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxtrain.inference.lattice._TRAINING_BATCHES", 0)
    lattice = open_scene(unet, cube, MapOptions(method="exact")).lattice
    assert (lattice.core, lattice.pad % lattice.stride, lattice.stride) == (64, 0, 4)
    assert max(lattice.window) < min(SHAPE[1:])
    ((index, region),) = lattice.shards(1).items()
    windows = lattice.windows(region, None)
    assert (index, len(windows)) == ((0, 0, 0), 9)
    covered = np.zeros(SHAPE[1:], int)
    for y, x, (y0, y1, x0, x1) in windows:
        covered[y0:y1, x0:x1] += 1
        assert y % lattice.stride == x % lattice.stride == 0
        assert y == 0 or y0 - y >= lattice.pad
        assert y + lattice.window[0] >= min(y1 + lattice.pad, SHAPE[1])
        assert x == 0 or x0 - x >= lattice.pad
        assert x + lattice.window[1] >= min(x1 + lattice.pad, SHAPE[2])
    assert (covered == 1).all()


def test_how_far_a_network_looks_is_found_by_running_it(unet: Path, temporal: Path, cube: Path) -> None:
    options = MapOptions()
    found = {}
    for name, run in (("unet", unet), ("temporal", temporal)):
        opened = open_scene(run, cube, options)
        stride = image_stride(opened.program)
        radius = receptive_radius(opened.program, opened.state, stride)
        assert radius is not None
        found[name] = (stride, radius)
    # of the U-Net: two 3 × 3 convolutions on the way down and two on the way up of each level, on pixels of 1, 2 and 4,
    # and the pixels that a block is pooled from
    looks = 2 + 2 * 2 + 2 * 4 + 2 * 2 + 2 + 2
    assert found["unet"][0] == 4
    # a convolution may hand a number that is none on to pixels that it does not matter to: never too few are found
    assert looks <= found["unet"][1] <= 2 * looks
    assert found["temporal"][0] == 1
    assert 4 <= found["temporal"][1] <= 8  # two blocks of two 3 × 3 convolutions
    group = open_scene(shared_run(), shared_cube(), options)
    assert receptive_radius(group.program, group.state, 2) is None


def test_a_model_whose_norms_look_at_the_whole_window_has_no_exact_map(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"norms \(model.norm = 'group'\).*use --blend, or train with model.norm"):
        predict(shared_run(), shared_cube(), tmp_path / "m.zarr", method="exact")
    assert not list(tmp_path.iterdir())


def test_an_area_is_what_rasterio_burns() -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (60, 50))
    rng = np.random.default_rng(0)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        reach = rng.uniform(50, 400, 9)
        points = np.stack([500_250 + reach * np.cos(angle), 4_999_700 + reach * np.sin(angle)], axis=1)
        hole = np.array([500_250.0, 4_999_700.0]) + np.array([[-30, -30], [30, -30], [30, 30], [-30, 30]])
        outline = Polygon(points)
        if not outline.is_valid or not outline.contains(Polygon(hole)):
            continue
        area = Area.on_grid([[points, hole]], grid, "it")
        expected = geometry_mask([Polygon(points, [hole])], grid.shape, grid.affine, invert=True)
        np.testing.assert_array_equal(area.mask(0, 60, 0, 50), expected)
        np.testing.assert_array_equal(area.mask(13, 44, 7, 31), expected[13:44, 7:31])
    with pytest.raises(InvalidInput, match=r"it covers no pixel of the cube.*60×50 pixels of EPSG:32633"):
        Area.on_grid([[np.array([[0.0, 0], [1, 0], [1, 1]])]], grid, "it")
