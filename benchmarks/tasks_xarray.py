"""Number of tasks that xarray makes of a composite over a tile, by plain `open_zarr` and by blocks of whole shards.

    python benchmarks/tasks_xarray.py --full     # 100 dates; without --full, 10 dates

The cube is laid out and holds no pixel, so nothing is read and the counts are exact.
"""

from __future__ import annotations

import datetime as dt
import sys
import tempfile
import time
from pathlib import Path

import xarray as xr
from dask.base import optimize
from harness import Row, arguments, publish

from zarr_store import BandSpec, CubeSpec, Grid, create_cube, open_cube

NAME = "sentinel-2-l2a"
SIDE = 10_980


def main() -> int:
    asked = arguments(__doc__ or "")
    dates = 100 if asked.full else 10
    grid = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (SIDE, SIDE))
    first = dt.datetime(2023, 1, 1, 10, 0)
    times = tuple((first + dt.timedelta(days=n)).isoformat() for n in range(dates))
    bands = tuple(BandSpec(name, 0, 1e-4) for name in ("blue", "green", "red", "nir"))
    spec = CubeSpec(NAME, "reflectance", bands, grid, times)
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder, "cube.zarr"))
        items = [{"id": f"S{n}", "datetime": f"{moment}Z"} for n, moment in enumerate(times)]
        create_cube(url, [spec], items={NAME: items}, provenance={})
        plain = xr.open_zarr(url, group=NAME, mask_and_scale=False, chunks={})
        shards = open_cube(url).dataset(NAME, chunks="shards", scaled=True, masked=True)
        rows = [*count("open_zarr", _masked_by_hand(plain)), *count("blocks of shards", shards.reflectance)]
    return 0 if publish("tasks-xarray", rows, full=asked.full) else 1


def _masked_by_hand(plain: xr.Dataset) -> xr.DataArray:
    masked: xr.DataArray = (plain.reflectance * 1e-4).where(plain.status == 1)
    return masked


def count(name: str, reflectance: xr.DataArray) -> list[Row]:
    """Count blocks of the bands, tasks of the mean NDVI over time as they are sent, and seconds to make that graph."""
    began = time.perf_counter()
    red, nir = reflectance.sel(band="red"), reflectance.sel(band="nir")
    (composite,) = optimize(  # type: ignore[no-untyped-call]
        ((nir - red) / (nir + red)).mean("time")
    )
    tasks, spent = len(composite.__dask_graph__()), time.perf_counter() - began
    size = f"{reflectance.sizes['time']} dates of {SIDE} × {SIDE} pixels"
    return [
        Row(f"{name}: blocks", reflectance.data.npartitions, note=size),
        Row(f"{name}: tasks of ndvi.mean('time')", tasks, note=size),
        Row(f"{name}: graph, s", round(spent, 2), note=size),
    ]


if __name__ == "__main__":
    sys.exit(main())
