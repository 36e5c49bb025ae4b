"""Parity with rasterio around every overview of a file: coarser grids are made from all pixels, never from overviews.

Overviews are made by whoever made the file, by subsampling or averaging, of classes too. GDAL takes one as soon as a
read is coarser than it, so pixels would change with the target's resolution in steps that nobody asked for. Here the
overviews hold nonsense, and what comes out is what rasterio makes of a file without any.
"""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from ingest.raster.read import read_on_grid
from ingest.raster.resample import pick_resampling
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from zarr_store.grid import Grid

SIDE = 512
SOURCE = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (SIDE, SIDE))
FACTORS = (2, 4, 8, 16)
NEAR = tuple(round(factor * share, 3) for factor in FACTORS for share in (0.975, 1.0, 1.025))
NONSENSE = {"data": 60_000, "class": 99}


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    data = rng.integers(1, 12_000, (SIDE, SIDE)).astype(np.uint16)
    data[100:160, 200:333] = 0
    classes = np.repeat(np.repeat(rng.choice([3, 4, 5, 9], (SIDE // 4, SIDE // 4)), 4, 0), 4, 1).astype(np.uint8)
    return {"data": data, "class": classes}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory, pixels: dict[str, np.ndarray]) -> dict[str, AssetRef]:
    """Files whose overviews at 1/2, 1/4, 1/8 and 1/16 are all of one wrong value."""
    found = {}
    for kind, values in pixels.items():
        path = tmp_path_factory.mktemp("overviews") / f"{kind}.tif"
        write_raster(path, SOURCE, np.full_like(values, NONSENSE[kind]))
        with rasterio.open(path, "r+") as dataset:
            dataset.build_overviews(FACTORS, Resampling.nearest)
        with rasterio.open(path, "r+") as dataset:
            dataset.write(values, 1)
        found[kind] = AssetRef(
            kind, kind, str(path), grid=SOURCE, nodata=0, kind="class" if kind == "class" else "data"
        )
    return found


def coarser(factor: float) -> Grid:
    """A grid of larger pixels over the middle of the file, on no lattice in particular."""
    size = int((SIDE - 64) // factor)
    corner = (SOURCE.bounds[0] + 130.0, SOURCE.bounds[3] - 170.0)
    return Grid(SOURCE.crs, (10 * factor, 0.0, corner[0], 0.0, -10 * factor, corner[1]), (size, size))


def test_the_overviews_hold_nonsense_and_rasterio_reads_them(assets: dict[str, AssetRef]) -> None:
    for kind, asset in assets.items():
        with rasterio.open(asset.href) as dataset:
            assert tuple(dataset.overviews(1)) == FACTORS
            for factor in FACTORS:
                assert (dataset.read(1, out_shape=(SIDE // factor, SIDE // factor)) == NONSENSE[kind]).all()


@pytest.mark.parametrize("factor", NEAR)
@pytest.mark.parametrize("kind", ["data", "class"])
def test_around_every_overview_the_pixels_are_those_of_a_file_without(
    assets: dict[str, AssetRef], pixels: dict[str, np.ndarray], kind: str, factor: float
) -> None:
    target, asset = coarser(factor), assets[kind]
    got = read_on_grid(asset, SOURCE, target, "bilinear", stored="uint8" if kind == "class" else "uint16")
    kernel = pick_resampling(asset.kind, SOURCE, target, "bilinear")
    assert kernel == ("mode" if kind == "class" else "average" if factor >= 1.99 else "bilinear")
    expected = np.zeros(target.shape, pixels[kind].dtype)
    reproject(
        pixels[kind], expected, src_transform=SOURCE.affine, src_crs=SOURCE.crs, src_nodata=0,
        dst_transform=target.affine, dst_crs=target.crs, dst_nodata=0, resampling=Resampling[kernel],
        XSCALE=min(1.0, 1 / factor), YSCALE=min(1.0, 1 / factor),
    )  # fmt: skip
    if kind == "class":
        # GDAL counts the pixels that a target pixel touches, whole or not; where two classes are near a tie, it depends
        # on where a block begins which of them wins
        score = areas(pixels[kind], target, factor)
        most = np.max(list(score.values()), axis=0)
        for values in (got, expected):
            covers = np.select([values == c for c in score], list(score.values()), -np.inf)
            assert (most - covers).max() <= 2 * factor, "no class that covers less by more than two rows of pixels"
        assert (got != expected).mean() <= (0.0 if factor in FACTORS else 0.04)
    else:
        assert np.abs(got.astype(int) - expected).max() <= 1, "no more than the rounding of a half"
        np.testing.assert_array_equal(got == 0, expected == 0)


def areas(classes: np.ndarray, target: Grid, factor: float) -> dict[int, np.ndarray]:
    """Class → how much of each target pixel it covers, in source pixels."""
    weights = []
    for start, count in (
        ((SOURCE.bounds[3] - target.bounds[3]) / 10, target.height),
        ((target.bounds[0] - SOURCE.bounds[0]) / 10, target.width),
    ):
        low = start + factor * np.arange(count)[:, None]
        at = np.arange(SIDE)[None, :]
        weights.append((np.minimum(low + factor, at + 1) - np.maximum(low, at)).clip(0))
    return {int(c): weights[0] @ (classes == c) @ weights[1].T for c in np.unique(classes)}


@pytest.mark.parametrize("factor", FACTORS)
def test_on_the_lattice_of_an_overview_it_is_the_mean_of_the_pixels_in_it(
    assets: dict[str, AssetRef], pixels: dict[str, np.ndarray], factor: int
) -> None:
    target = SOURCE.coarsen(factor)
    got: np.ndarray = read_on_grid(assets["data"], SOURCE, target, "bilinear")
    blocks = pixels["data"].reshape(SIDE // factor, factor, SIDE // factor, factor).astype(float)
    count = (blocks > 0).sum(axis=(1, 3))
    mean = np.divide(blocks.sum(axis=(1, 3)), count, out=np.zeros(count.shape), where=count > 0)
    seen = got > 0
    np.testing.assert_array_equal(np.abs(got[seen] - mean[seen]) <= 0.5 + 1e-6, True)
    # a pixel is there where the source pixel under its centre is
    centre = pixels["data"][factor // 2 :: factor, factor // 2 :: factor] > 0
    np.testing.assert_array_equal(seen[centre], True)
