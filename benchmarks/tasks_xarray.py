"""How many tasks xarray makes of a composite over a tile of 100 dates, by plain `open_zarr` and by blocks of shards.

    python benchmarks/tasks_xarray.py

Prints one JSON document. The cube is laid out and holds no pixel, so nothing is read and the counts are exact.
"""

from __future__ import annotations

import datetime as dt
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import xarray as xr
from dask.base import optimize

from zarr_store import BandSpec, CubeSpec, Grid, create_cube, open_cube

NAME = "sentinel-2-l2a"
SIDE, DATES = 10_980, 100


def main() -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (SIDE, SIDE))
    first = dt.datetime(2023, 1, 1, 10, 0)
    times = tuple((first + dt.timedelta(days=n)).isoformat() for n in range(DATES))
    bands = tuple(BandSpec(name, 0, 1e-4) for name in ("blue", "green", "red", "nir"))
    spec = CubeSpec(NAME, "reflectance", bands, grid, times)
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder, "cube.zarr"))
        items = [{"id": f"S{n}", "datetime": f"{moment}Z"} for n, moment in enumerate(times)]
        create_cube(url, [spec], items={NAME: items}, provenance={})
        plain = xr.open_zarr(url, group=NAME, mask_and_scale=False, chunks={})
        shards = open_cube(url).dataset(NAME, chunks="shards", scaled=True, masked=True)
        found = {"open_zarr": count(_masked_by_hand(plain)), "shards": count(shards.reflectance)}
    print(json.dumps({"side": SIDE, "dates": DATES, **found}, indent=2))


def _masked_by_hand(plain: xr.Dataset) -> xr.DataArray:
    masked: xr.DataArray = (plain.reflectance * 1e-4).where(plain.status == 1)
    return masked


def count(reflectance: xr.DataArray) -> dict[str, Any]:
    """Blocks of the bands, tasks of the mean NDVI over time as they are sent, and the seconds to make that graph."""
    began = time.perf_counter()
    red, nir = reflectance.sel(band="red"), reflectance.sel(band="nir")
    (composite,) = optimize(  # type: ignore[no-untyped-call]
        ((nir - red) / (nir + red)).mean("time")
    )
    tasks = len(composite.__dask_graph__())
    return {"blocks": reflectance.data.npartitions, "tasks": tasks, "seconds": round(time.perf_counter() - began, 2)}


if __name__ == "__main__":
    main()
