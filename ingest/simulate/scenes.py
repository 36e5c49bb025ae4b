"""`simulate` writes the world of a `SimulateConfig` into a folder: COGs, STAC documents and the truth.

It works tile by tile in strips, and makes the ground of each strip once for all dates; memory depends on the width of a
tile, not on its area. Everything is written into a folder beside the target, which takes its place at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
import shapely.geometry

from ingest.raster.cog import CogWriter
from ingest.request.parquet import write_geoparquet
from ingest.simulate.anomalies import Planting, plant
from ingest.simulate.config import Acquisition, SimulateConfig, Tile
from ingest.simulate.ground import CLASSES, Landscape
from ingest.simulate.items import (
    S1_COLLECTION,
    S2_COLLECTION,
    Extent,
    catalog_documents,
    radar_item,
    radar_item_id,
    scene_id,
    scene_item,
    to_json,
)
from ingest.simulate.radar import NODATA, POLARISATIONS, RadarPass, radar_passes
from ingest.simulate.spectra import BANDS
from ingest.simulate.strips import radar_strip, scene_strip
from ingest.simulate.swath import radar_swath, scene_swath
from zarr_store.crs import transformer_between
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["MANIFEST", "SimulatedWorld", "simulate"]

MANIFEST = "world.json"
"""Name of the file that is written last, with the configuration, and size and SHA-256 of every file."""

# Rows per strip: tall enough to keep numpy busy, small enough that a full 10 980 px tile needs about 1 GB.
_STRIP_PX = 256


@dataclass(frozen=True)
class SimulatedWorld:
    """A simulated world on disk.

    Attributes:
        path: The folder.
        catalog: The static STAC catalogue.
        truth: Land cover as COG.
        legend: Classes, names and colours of the truth as JSON.
        collections: Names of the STAC collections.
        items: Number of STAC items.
        bytes: Size of all files together.
        created: False if the folder already held this world.
        anomalies: Table of what was planted, as GeoParquet, with GeoJSON and COG beside; None if nothing was.
    """

    path: Path
    catalog: Path
    truth: Path
    legend: Path
    collections: tuple[str, ...]
    items: int
    bytes: int
    created: bool
    anomalies: Path | None = None


def simulate(
    out: str | Path,
    config: SimulateConfig | None = None,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> SimulatedWorld:
    """Write a simulated world.

    Args:
        out: Folder to make. If it already holds the world of this configuration, nothing is written.
        config: The world; the default is two tiles, four Sentinel-2 dates and two Sentinel-1 passes.
        on_progress: Called with the share done, 0 … 1.

    Raises:
        InvalidInput: `out` exists and holds something else.
        NoSpace: The disk is full.
    """
    config = config or SimulateConfig()
    target = Path(out)
    known = _existing(target, config)
    if known is not None:
        return known
    part = target.with_name(f".{target.name}.simulate-part")
    if part.exists():
        shutil.rmtree(part)  # left by a run that was killed; nothing else uses this name
    part.mkdir(parents=True)
    try:
        with rasterio.Env(GDAL_CACHEMAX=128 * 1024 * 1024):
            _write_world(part, config, on_progress or (lambda share: None))
        if target.is_dir():
            target.rmdir()  # empty, as checked
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return dataclasses.replace(_describe(target), created=True)


def _existing(target: Path, config: SimulateConfig) -> SimulatedWorld | None:
    """Find the wanted world in `target`; None if the place is free."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    manifest = target / MANIFEST
    if manifest.is_file():
        held = json.loads(manifest.read_text(encoding="utf-8"))
        if held.get("config") == config.to_dict() and all(
            (target / name).is_file() and (target / name).stat().st_size == about["bytes"]
            for name, about in held["files"].items()
        ):
            return _describe(target)
        raise InvalidInput(
            f"{target} holds another simulated world, or part of one; give another folder or remove this one"
        )
    raise InvalidInput(f"{target} exists and is not a simulated world; give a folder that does not exist yet")


def _describe(path: Path) -> SimulatedWorld:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return SimulatedWorld(
        path=path,
        catalog=path / "catalog.json",
        truth=path / "truth.tif",
        legend=path / "truth.json",
        collections=tuple(manifest["items"]),
        items=sum(manifest["items"].values()),
        bytes=sum(about["bytes"] for about in manifest["files"].values()),
        created=False,
        anomalies=path / "anomalies.parquet" if "anomalies.parquet" in manifest["files"] else None,
    )


def _write_world(out: Path, config: SimulateConfig, progress: Callable[[float], None]) -> None:
    landscape = Landscape(config)
    world = landscape.world
    planting = plant(landscape)
    passes = radar_passes(config)
    members: dict[str, list[dict[str, Any]]] = {S2_COLLECTION: []}
    colours = {c.value: c.colour for c in CLASSES}
    names = {0: "no data"} | {c.value: c.name for c in CLASSES}
    with ExitStack() as stack:
        truth = stack.enter_context(
            CogWriter(
                out / "truth.tif",
                world,
                dtype="uint8",
                nodata=0,
                colours=colours,
                class_names=names,
                block_px=config.block_px,
            )
        )
        numbers: CogWriter | None = None
        if planting:
            numbers = stack.enter_context(
                CogWriter(
                    out / "anomalies.tif",
                    world,
                    dtype="uint16",
                    nodata=None,
                    overviews="mode",
                    block_px=config.block_px,
                )
            )
        radar: list[tuple[RadarPass, dict[str, CogWriter]]] = []
        for overpass in passes:
            folder = out / S1_COLLECTION / radar_item_id(overpass)
            radar.append(
                (
                    overpass,
                    {
                        name: stack.enter_context(
                            CogWriter(
                                folder / f"{name}.tif", world, dtype="float32", nodata=NODATA, block_px=config.block_px
                            )
                        )
                        for name in POLARISATIONS
                    },
                )
            )
        tiles = config.tile_list()
        for index, tile in enumerate(tiles):

            def tile_progress(share: float, done: int = index) -> None:
                progress((done + share) / len(tiles))

            members[S2_COLLECTION] += _write_tile(
                out, landscape, planting, index, tile, (truth, numbers), radar, tile_progress
            )
    if passes:
        members[S1_COLLECTION] = [
            radar_item(overpass, world, Extent(radar_swath(overpass, world).polygon(world))) for overpass in passes
        ]
    if planting:
        _write_anomalies(out, planting)
    _write_documents(out, config, world, members)
    progress(1.0)


def _write_tile(
    out: Path,
    landscape: Landscape,
    planting: Planting,
    tile_index: int,
    tile: Tile,
    truths: tuple[CogWriter, CogWriter | None],
    radar: list[tuple[RadarPass, dict[str, CogWriter]]],
    progress: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Write all scenes of one tile, and its part of the truth and of the radar scenes."""
    config, world = landscape.config, landscape.world
    grid = tile.grid
    seen = [(a, scene_swath(a, world).polygon(grid)) for a in config.acquisitions()]
    acquisitions = [(a, polygon) for a, polygon in seen if not polygon.is_empty]
    counts = {a.index: np.zeros(12, np.int64) for a, _ in acquisitions}
    offset = world.offset_of(grid)
    if offset is None:  # tiles are placed on the lattice of the world by construction
        raise InvalidInput(f"tile {tile.name} at {grid} is off the lattice of the world {world}")
    with ExitStack() as stack:
        writers = {a.index: _scene_writers(stack, out, config, a, tile) for a, _ in acquisitions}
        for row in range(0, grid.height, _STRIP_PX):
            height = min(_STRIP_PX, grid.height - row)
            strip = grid.window(row, 0, height, grid.width)
            ground = landscape.ground(strip.window(-1, -1, height + 2, grid.width + 2))
            truths[0].write(offset[0] + row, offset[1], ground.classes[1:-1, 1:-1])
            if truths[1] is not None:
                truths[1].write(offset[0] + row, offset[1], planting.numbers(ground)[1:-1, 1:-1])
            for acquisition, _ in acquisitions:
                layers, scl = scene_strip(landscape, acquisition, ground, strip, planting)
                for key, pixels in layers.items():
                    scale = strip.height // pixels.shape[0]
                    writers[acquisition.index][key].write(row // scale, 0, pixels)
                counts[acquisition.index] += np.bincount(scl.ravel(), minlength=12)
            for overpass, outputs in radar:
                radar_strip(landscape, overpass, outputs, ground, strip, (offset[0] + row, offset[1]), planting)
            progress((row + height) / grid.height * 0.8)
    progress(1.0)
    grids = (grid, grid.coarsen(2))
    return [
        scene_item(a, tile.name, tile_index, grids, Extent(polygon, tuple(int(n) for n in counts[a.index])))
        for a, polygon in acquisitions
    ]


def _scene_writers(
    stack: ExitStack, out: Path, config: SimulateConfig, acquisition: Acquisition, tile: Tile
) -> dict[str, CogWriter]:
    folder = out / S2_COLLECTION / scene_id(acquisition, tile.name)
    block = config.block_px

    def add(name: str, grid: Grid, dtype: str, classes: bool) -> CogWriter:
        return stack.enter_context(
            CogWriter(
                folder / f"{name}.tif",
                grid,
                dtype=dtype,
                nodata=0,
                block_px=block,
                overviews="mode" if classes else "average",
                colours={c.value: c.colour for c in CLASSES} if name == "landcover" else None,
            )
        )

    half = tile.grid.coarsen(2)
    writers = {b.key: add(b.name, tile.grid if b.gsd_m == 10 else half, "uint16", False) for b in BANDS}
    writers["scl"] = add("SCL", half, "uint8", True)
    writers["landcover"] = add("landcover", tile.grid, "uint8", True)
    return writers


def _write_documents(out: Path, config: SimulateConfig, world: Grid, members: dict[str, list[dict[str, Any]]]) -> None:
    for collection, items in members.items():
        for item in items:
            (out / collection / item["id"] / f"{item['id']}.json").write_text(to_json(item), encoding="utf-8")
    for name, document in catalog_documents(config, members).items():
        (out / name).write_text(to_json(document), encoding="utf-8")
    legend = {
        "nodata": 0,
        "classes": [
            {
                "value": c.value,
                "name": c.name,
                "colour": "#{:02x}{:02x}{:02x}".format(*c.colour),
                "description": c.description,
            }
            for c in CLASSES
        ],
        **world.to_dict(),
    }
    (out / "truth.json").write_text(to_json(legend), encoding="utf-8")
    files = {
        path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "made_by": "terrashard simulate",
        "config": config.to_dict(),
        "items": {collection: len(items) for collection, items in members.items()},
        "files": files,
    }
    (out / MANIFEST).write_text(to_json(manifest), encoding="utf-8")


def _write_anomalies(out: Path, planting: Planting) -> None:
    """Write what was planted as a table: GeoParquet in the CRS of the world, GeoJSON in degrees."""
    world, table = planting.landscape.world, planting.table()
    outlines = [planting.outline(one) for one in planting.planted]
    write_geoparquet(out / "anomalies.parquet", outlines, table, crs=world.crs)
    degrees = transformer_between(world.crs, "OGC:CRS84")
    features = []
    for at, outline in enumerate(outlines):
        to_degrees: Any = degrees.transform
        geometry = shapely.transform(outline, to_degrees, interleaved=False)
        features.append({"type": "Feature", "geometry": shapely.geometry.mapping(geometry),
                         "properties": {name: values[at] for name, values in table.items()}})  # fmt: skip
    document = {"type": "FeatureCollection", "features": features}
    (out / "anomalies.geojson").write_text(to_json(document), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
