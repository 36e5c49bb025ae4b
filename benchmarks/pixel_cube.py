"""Cubes of simulated pixels of any size, for benchmarks of tasks that stream over them; made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from harness import BANDS, OUT

from zarr_store import BandSpec, CubeSpec, Grid, ShardWriter, create_cube

COLLECTION = "sentinel-2-l2a"
SPECTRA = np.array(
    [
        [300, 350, 200, 120],
        [400, 700, 500, 3200],
        [250, 450, 300, 2400],
        [600, 900, 700, 2800],
        [1100, 1400, 1800, 2500],
        [900, 1200, 1500, 2000],
        [1500, 1700, 1900, 2300],
        [2200, 2400, 2600, 2900],
        [500, 800, 900, 2200],
        [700, 1000, 1300, 3000],
        [450, 600, 450, 1600],
        [1300, 1300, 1300, 1500],
    ],
    np.float32,
)
"""Twelve covers in blue, green, red and near infrared, in units of 1e-4."""


def pixel_cube(height: int, width: int, *, dates: int = 1) -> Path:
    """Return a cube of smooth covers with mixed borders, brightness that varies by 8 %, and noise of 0.006."""
    url = OUT / f"pixels-{height}x{width}x{dates}.zarr"
    if url.exists():
        return url
    making = url.with_name(f"{url.name}.making")
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_200_000.0), (height, width))
    times = tuple(f"2023-08-{1 + at:02}T10:00:00" for at in range(dates))
    spec = CubeSpec(COLLECTION, "reflectance", tuple(BandSpec(name, 0, 1e-4) for name in BANDS), grid, times)
    items = [{"id": f"i{at}", "datetime": f"{time}Z"} for at, time in enumerate(times)]
    create_cube(making, [spec], items={COLLECTION: items}, provenance={})
    writer = ShardWriter(making, COLLECTION)
    for number, region in enumerate(spec.shards().values()):
        rng = np.random.default_rng(number)
        shape = (min(region.y1, height) - region.y0, min(region.x1, width) - region.x0)
        image = _pixels(region.y0, region.x0, shape, rng)
        writer.write(
            region,
            {
                "reflectance": image[None],
                "status": np.ones((1, *shape), np.uint8),
                "source_item": np.full((1, *shape), region.t0, np.int16),
            },
            key="k",
            sources=(),
        )
    making.rename(url)
    return url


def _pixels(y0: int, x0: int, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    y, x = (np.arange(start, start + size, dtype=np.float32) for start, size in zip((y0, x0), shape, strict=True))
    field = np.zeros(shape, np.float32)
    for a, b, p, q in np.random.default_rng(7).uniform([0.005, 0.005, 0, 0], [0.06, 0.06, 6, 6], (6, 4)):
        field += np.sin(x * np.float32(a) + np.float32(p)) * np.cos(y * np.float32(b) + np.float32(q))[:, None]
    cover = np.clip((field + 3) * 2, 0, 11.99)
    low = cover.astype(int)
    mixed = (cover - low)[..., None] ** 4
    image = SPECTRA[low] * (1 - mixed) + SPECTRA[np.minimum(low + 1, 11)] * mixed
    image *= 1 + 0.08 * rng.standard_normal((*shape, 1), dtype=np.float32)
    image += 60 * rng.standard_normal((*shape, 4), dtype=np.float32)
    pixels: npt.NDArray[np.uint16] = np.clip(np.rint(image), 1, 65535).astype(np.uint16).transpose(2, 0, 1)
    return pixels
