"""The cube of the real scenes against an oracle that shares no code with the ingest: plain numpy and rasterio.

The oracle reads whole files with GDAL's defaults, warps whole rasters, and applies the documented rules scene by scene.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import reproject

from zarr_store.read import open_cube
from zarr_store.verify import verify_cube

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

FILES = {"blue": "B02.tif", "green": "B03.tif", "red": "B04.tif", "nir": "B08.tif"}
MASKED = (0, 1, 3, 8, 9, 10)
# 33TWL begins at 5 100 000 m and 33TWM at 5 200 020 m, half a pixel of 120 m apart; both have as many pixels, and the
# lattice through the origin is taken. The union of both in y is 4 990 200 … 5 200 020, snapped up to 5 200 080.
TRANSFORM = from_origin(499_980, 5_200_080, 120, 120)
HEIGHT, WIDTH = 1749, 915


def on_grid(path: Path, kernel: Resampling) -> np.ndarray:
    with rasterio.open(path) as dataset:
        source, transform, crs = dataset.read(1), dataset.transform, dataset.crs
    out = np.zeros((HEIGHT, WIDTH), source.dtype)
    shift = (TRANSFORM.f - transform.f) / 120
    if shift == int(shift):
        out[int(shift) : int(shift) + source.shape[0]] = source
        return out
    reproject(
        source, out, src_transform=transform, src_crs=crs, src_nodata=0, dst_transform=TRANSFORM, dst_crs=crs,
        dst_nodata=0, resampling=kernel,
    )  # fmt: skip
    return out


def scenes_by_day(catalogue: Path) -> dict[str, list[dict[str, Any]]]:
    days: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((catalogue.parent / "sentinel-2-l2a").glob("*/*_L2A.json")):
        item = json.loads(path.read_text())
        # boa_offset_applied is true on all items, so nothing is added although raster:bands says offset -0.1
        assert item["properties"]["earthsearch:boa_offset_applied"] is True
        days[item["properties"]["datetime"][:10]].append({"folder": path.parent, **item})
    return days


def oracle_day(scenes: list[dict[str, Any]], row_of: dict[str, int]) -> dict[str, np.ndarray]:
    """Copied tiles win over resampled ones; clear pixels over masked ones; the first over the second."""
    scenes = sorted(scenes, key=lambda s: (s["properties"]["mgrs:grid_square"] != "WL", s["id"]))
    result: dict[str, np.ndarray] = {
        "reflectance": np.zeros((4, HEIGHT, WIDTH), np.uint16),
        "scl": np.zeros((HEIGHT, WIDTH), np.uint8),
        "status": np.zeros((HEIGHT, WIDTH), np.uint8),
        "source_item": np.full((HEIGHT, WIDTH), -1, np.int16),
    }
    read = []
    for scene in scenes:
        bands = np.stack([on_grid(scene["folder"] / name, Resampling.bilinear) for name in FILES.values()])
        scl = on_grid(scene["folder"] / "SCL.tif", Resampling.nearest)
        # the files have no mask and nodata 0, and all bands pixels of one size: a 0 beside a band with a value, where
        # the class layer has seen the ground, is a number that the provider clipped, and is stored as 1
        seen = (bands.max(axis=0) > 0) & (scl > 0)
        read.append((row_of[scene["id"]], np.maximum(bands, 1), scl, seen))
    for wanted_status in (1, 2):  # first all clear pixels of all scenes, then what is left among masked ones
        for row, bands, scl, seen in read:
            state = np.where(np.isin(scl, MASKED), 2, 1)
            take = seen & (state == wanted_status) & (result["status"] == 0)
            result["reflectance"][:, take] = bands[:, take]
            result["scl"][take] = scl[take]
            result["status"][take] = wanted_status
            result["source_item"][take] = row
    return result


def test_every_voxel_equals_the_oracle(zagreb: Path, zagreb_cube: Any) -> None:
    path, report = zagreb_cube
    assert (report.exit_code, len(report.written), report.partial) == (0, 10, ())
    cube = open_cube(path)
    spec = cube.spec("sentinel-2-l2a")
    assert spec.grid.transform == (120.0, 0.0, 499_980.0, 0.0, -120.0, 5_200_080.0)
    assert (spec.grid.crs, spec.shape, spec.band_names) == ("EPSG:32633", (5, HEIGHT, WIDTH), tuple(FILES))
    assert spec.layout.shard == (1, 1024, 1024), "borders of shards must lie inside the scenes"
    dataset = cube.dataset("sentinel-2-l2a")
    row_of = {item["id"]: row for row, item in enumerate(cube.items("sentinel-2-l2a"))}
    days = scenes_by_day(zagreb)
    assert [str(t)[:10] for t in dataset.time.values] == sorted(days)
    for step, day in enumerate(sorted(days)):
        for name, expected in oracle_day(days[day], row_of).items():
            np.testing.assert_array_equal(dataset[name][step].values, expected, err_msg=f"{name} on {day}")
        both = set(np.unique(dataset.source_item[step].values)) - {-1}
        assert len(both) == 2, "both tiles give pixels on every date"


def test_the_cube_verifies_and_knows_its_facts(zagreb_cube: Any, zagreb_plan: Any) -> None:
    path, _ = zagreb_cube
    report = verify_cube(path)
    assert (report.damage, report.checked_shards) == ((), 10)
    cube = open_cube(path)
    facts = cube.provenance["collections"]["sentinel-2-l2a"]
    assert facts["resampled_share"] == pytest.approx(0.5, abs=1e-3)
    assert {entry["verdict"] for entry in facts["offset_verdicts"].values()} == {"confirmed"}
    assert cube.provenance["plan"] == zagreb_plan.digest


def test_the_summary_says_what_is_odd(zagreb_plan: Any) -> None:
    text = zagreb_plan.summary()
    for part in (
        "10980×10980 px at 10",
        "915×915 px at 120",
        "resampled pixels 50.0%",
        "2023-08-18",
        "EPSG:32633",
        "10 confirmed",
    ):
        assert part in text
