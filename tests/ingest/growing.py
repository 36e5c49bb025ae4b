"""Cubes that grow: scenes of one's choice, the plan of a cube, and the plan with what is new in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.plan.stored import kept_plan
from ingest.request.config import IngestConfig
from ingest.run.loop import IngestReport, Job, run_job
from ingest.scenes.scene import Scene
from ingest.scenes.search import SearchResult
from ingest.testing import make_scene
from ingest.upkeep.extend import plan_extension
from zarr_store.grid import Grid
from zarr_store.lock import CubeLock
from zarr_store.spec import Layout

NAME = "sentinel-2-l2a"
SIZE = (40, 36)
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), SIZE)
CONFIG = IngestConfig(bands=("red", "scl"))
LAYOUT = Layout("t", (1, 16, 16), (1, 32, 32))


def scene(folder: Path, day: int, *, part: int = 0, version: int = 0, rows: int | None = None, **fields: Any) -> Scene:
    """One scene: `part` moves it 12 pixels east, `version` is another processing of it with other pixels."""
    rng = np.random.default_rng(100 * day + 10 * part + version)
    size = (rows or SIZE[0], SIZE[1])
    grid = Grid(GRID.crs, (20.0, 0.0, 500_000.0 + 240.0 * part, 0.0, -20.0, 5_000_000.0), size)
    return make_scene(
        folder,
        f"S2_D{day:02d}_P{part}_V{version}",
        grid,
        {
            "red": rng.integers(1, 9000, size).astype(np.uint16),
            "scl": rng.choice(np.array([0, 4, 5, 9], np.uint8), size=size),
        },
        datetime=f"2023-08-{day:02d}T10:00:{part:02d}Z",
        platform="sentinel-2a",
        tile=f"33TW{'LM'[part]}",
        relative_orbit=79,
        datatake=f"GS2A_202308{day:02d}T100000_{day:06d}_N05.{version:02d}",
        baseline=f"05.{version:02d}",
        created=f"2023-09-{1 + version:02d}T00:00:00Z",
        **fields,
    )


def plan_of(scenes: Sequence[Scene], *, layout: Layout = LAYOUT, config: IngestConfig = CONFIG) -> Plan:
    return plan_scenes(scenes, probe_scenes(scenes, config), config, layout=layout)


def extend_with(
    cube: Path,
    scenes: Sequence[Scene],
    client: Any,
    *,
    append: bool = True,
    refresh: bool = False,
    config: IngestConfig = CONFIG,
) -> IngestReport:
    """As `ingest.upkeep.extend.extend`, with what a search would give."""
    with CubeLock(cube, "test") as lock:
        merged = plan_extension(
            kept_plan(cube),
            "",
            config,
            append=append,
            refresh=refresh,
            found=SearchResult(tuple(scenes)),
            cube_url=str(cube),
        )
        return run_job(Job(merged, str(cube), lock, config, grow=True), client=client)


def native_plan(folder: Path) -> Plan:
    """The plan of one scene with bands of 10 and 60 m, each a group of its own."""
    rng = np.random.default_rng(7)
    grids = {size: Grid(GRID.crs, (size, 0.0, 500_000.0, 0.0, -size, 5_000_040.0), (n, n)) for size, n in
             ((10.0, 48), (60.0, 8))}  # fmt: skip
    pixels = {name: rng.integers(1, 9000, grids[size].shape).astype(np.uint16) for name, size in
              (("red", 10.0), ("coastal", 60.0))}  # fmt: skip
    one = make_scene(folder, "NATIVE", grids[10.0], pixels, grids={"coastal": grids[60.0]})
    return plan_of([one], config=IngestConfig(bands=("red", "coastal"), mask="none", native=True))


def import_two(cube: Path) -> None:
    """Import two collections, the second of twice the pixel size, with a layer."""
    from zarr_store import from_xarray
    from zarr_store.cf import Options
    from zarr_store.imported import layer_from_xarray

    source = {"file": "a.nc", "sha256": "0" * 64}
    for name, size, side in (("fine", 10.0, 8), ("coarse", 20.0, 4)):
        days = np.array(["2023-08-10", "2023-08-12"], "datetime64[ns]")
        numbers = np.arange(2 * side * side, dtype=np.uint16).reshape(2, side, side)
        data = xr.Dataset(
            {"red": (("time", "y", "x"), numbers)},
            {"time": days, "y": 5_000_000.0 - size * (np.arange(side) + 0.5),
             "x": 600_000.0 + size * (np.arange(side) + 0.5)},
        )  # fmt: skip
        from_xarray(data, cube, collection=name, crs="EPSG:32633", nodata=0, source=source)
    layer_from_xarray(data.isel(time=0), cube, name="dem", options=Options(crs="EPSG:32633", nodata=0), source=source)


def tree(path: Path, *, under: str = "") -> dict[str, str]:
    """Every file but the lock → its hash."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((path / under).rglob("*"))
        if file.is_file() and file.name != "lock.json"
    }
