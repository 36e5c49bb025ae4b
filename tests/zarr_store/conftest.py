"""A small two-shard-wide cube and the pixels that go into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zarr_store import BandSpec, CubeSpec, Grid, Layout, Region, ShardWriter, SourceOutcome, create_cube

NAME = "sentinel-2-l2a"
ITEMS = {NAME: [{"id": "A", "datetime": "2023-08-10T09:57:57Z"}, {"id": "B", "datetime": "2023-08-13T10:07:53Z"}]}


@pytest.fixture
def spec() -> CubeSpec:
    """40 × 57 pixels in 16² chunks and 32² shards, two times, two bands: every edge is ragged."""
    grid = Grid.from_bounds("EPSG:32633", (600_000, 5_000_000, 600_570, 5_000_400), resolution=10)
    return CubeSpec(
        NAME,
        "reflectance",
        (BandSpec("blue", 0, 1e-4), BandSpec("nir", 0, 1e-4)),
        grid,
        ("2023-08-10T09:57:57", "2023-08-13T10:07:53"),
        ("scl",),
        Layout("test", (1, 16, 16), (1, 32, 32)),
    )


@pytest.fixture
def pixels(spec: CubeSpec) -> dict[str, np.ndarray]:
    """Whole-cube arrays with all four states, from a seed."""
    rng = np.random.default_rng(7)
    times, height, width = spec.shape
    status = rng.integers(0, 4, (times, height, width)).astype("uint8")
    main = rng.integers(1, 10_000, (times, 2, height, width)).astype("uint16")
    main *= ((status == 1) | (status == 2))[:, None]
    return {
        "reflectance": main,
        "scl": rng.integers(0, 12, status.shape).astype("uint8"),
        "status": status,
        "source_item": rng.integers(-1, 2, status.shape).astype("int16"),
    }


def cut(pixels: dict[str, np.ndarray], region: Region) -> dict[str, np.ndarray]:
    t, y, x = region.slices
    return {k: v[t, :, y, x] if v.ndim == 4 else v[t, y, x] for k, v in pixels.items()}


@pytest.fixture
def cube_path(tmp_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> Path:
    """A complete cube."""
    path = tmp_path / "cube.zarr"
    create_cube(path, [spec], items=ITEMS, provenance={"made": "by a test"})
    writer = ShardWriter(path, NAME)
    for region in spec.shards().values():
        writer.write(region, cut(pixels, region), key="k1", sources=[SourceOutcome(0, "A", "read")])
    return path
