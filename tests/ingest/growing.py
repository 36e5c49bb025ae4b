"""Cubes that grow: scenes of one's choice, the plan of a cube, and the plan with what is new in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def tree(path: Path, *, under: str = "") -> dict[str, str]:
    """Every file but the lock → its hash."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((path / under).rglob("*"))
        if file.is_file() and file.name != "lock.json"
    }
