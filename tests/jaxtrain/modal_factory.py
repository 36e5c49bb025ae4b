"""A tiny cube of several modalities over one ground: Sentinel-2 on two grids, Sentinel-1, elevation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config import TrainConfig
from zarr_store.create import create_cube
from zarr_store.grid import Grid
from zarr_store.labels import LabelSpec, label_boxes, write_label
from zarr_store.layers import write_layer
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.write import ShardWriter

from .cube_factory import ground

SIDE, TIMES = 96, 3
FINE = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (SIDE, SIDE))
S2_DATES = tuple(f"2023-08-{day}T10:00:00" for day in (10, 15, 20))
S1_DATES = ("2023-08-11T05:00:00", "2023-08-16T05:00:00", "2023-09-20T05:00:00")
"""The last one has no partner within three days of it."""
NAMES = {1: "field", 2: "forest", 3: "water"}
CLOUD = (slice(0, 48), slice(0, 96))
"""Where the first date of Sentinel-2 is masked."""
OPTICAL = np.array([[900, 1200, 2000], [400, 300, 3000], [300, 200, 150]], float)
RADAR_DB = np.array([[-12.0, -19.0], [-8.0, -13.0], [-19.0, -26.0]])


def make_modal_cube(url: Path, *, only: tuple[str, ...] = ("s2", "s2_20", "s1"), layers: bool = True,
                    decibels: str | None = None) -> Cube:  # fmt: skip
    """Write the cube, with collections of these names, a label layer `truth` and a static layer `dem`.

    With `decibels` the radar is stored in decibels, with this unit.
    """
    rng = np.random.default_rng(3)
    truth = ground(SIDE, SIDE) - 4
    coarse = truth[::2, ::2]
    specs, arrays = [], {}
    status = np.ones((TIMES, SIDE, SIDE), np.uint8)
    status[0][CLOUD] = 2
    optical = OPTICAL[truth].transpose(2, 0, 1) + rng.normal(0, 40, (TIMES, 3, SIDE, SIDE))
    optical[0, :, *CLOUD] = 7000
    swir = np.array([2500, 1500, 80.0])[coarse] + rng.normal(0, 40, (TIMES, 1, SIDE // 2, SIDE // 2))
    decibel = RADAR_DB[truth].transpose(2, 0, 1) + rng.normal(0, 0.8, (TIMES, 2, SIDE, SIDE))
    radar = 10 ** (decibel / 10) if decibels is None else decibel
    known: dict[str, tuple[Any, ...]] = {
        "s2": ("reflectance", ("green", "red", "nir"), FINE, S2_DATES, optical, status, 32),
        "s2_20": ("reflectance", ("swir",), FINE.coarsen(2), S2_DATES, swir, status[:, ::2, ::2], 16),
        "s1": ("backscatter", ("vv", "vh"), FINE, S1_DATES, radar, np.ones_like(status), 32),
    }
    for name in only:
        kind, bands, grid, dates, main, seen, chunk = known[name]
        fill: dict[str, Any] = {"nodata": None, "unit": decibels or "1"} if kind == "backscatter" else {}
        specs.append(CubeSpec(name, kind, tuple(BandSpec(band, **fill) for band in bands), grid, dates, (),
                              Layout("tiny", (1, chunk, chunk), (1, 3 * chunk, 3 * chunk))))  # fmt: skip
        stored = np.rint(main).clip(1, 65535).astype(np.uint16) if kind == "reflectance" else main.astype(np.float32)
        arrays[name] = {kind: stored, "status": seen, "source_item": np.zeros(seen.shape, np.int16)}
    items = {spec.collection: [{"id": f"i{t}", "datetime": f"{time}Z"} for t, time in enumerate(spec.times)]
             for spec in specs}  # fmt: skip
    create_cube(url, specs, items=items, provenance={"made_by": "modal_factory"})
    for spec in specs:
        writer = ShardWriter(url, spec.collection)
        for region in spec.shards().values():
            t, y, x = region.slices
            cut = {n: a[t, :, y, x] if a.ndim == 4 else a[t, y, x] for n, a in arrays[spec.collection].items()}
            writer.write(Region(*region.to_list()), cut, key="k", sources=())
    if layers:
        height = (100 + 50 * truth + rng.normal(0, 5, truth.shape)).astype(np.float32)
        boxes = label_boxes(open_cube(url))
        classes = [(box, (truth + 1).astype(np.uint8)[box.y0 : box.y1, box.x0 : box.x1]) for box in boxes]
        write_label(str(url), LabelSpec("truth", "classes", tuple(NAMES.items()), {"made": "here"}), lambda: classes)
        heights = [(box, height[box.y0 : box.y1, box.x0 : box.x1]) for box in boxes]
        write_layer(str(url), "dem", "values", lambda: heights, origin={"made": "here", "unit": "m"})
    return open_cube(url)


MODALITIES: dict[str, dict[str, Any]] = {
    "s2": {"collection": "s2"},
    "s2_20": {"collection": "s2_20"},
    "s1": {"collection": "s1", "decibel": True, "most_days": 3},
    "dem": {"layer": "dem"},
}


def modal_config(cube: Path | str, **sections: dict[str, Any]) -> TrainConfig:
    """A run of seconds on such a cube."""
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": str(cube), "collection": "s2", "label": "truth", "patch": 16, "modalities": MODALITIES,
                 "split": {"block_m": 160, "test": 0.25, "validation": 0.15}},
        "model": {"name": "multimodal", "width": 4, "depth": 1},
        "optim": {"warmup_steps": 2, "learning_rate": 1e-2},
        "run": {"steps": 60, "batch_size": 8, "evaluate_every": 60, "checkpoint_every": 60, "log_every": 10},
    }  # fmt: skip
    return TrainConfig.model_validate({name: {**base.get(name, {}), **sections.get(name, {})} for name in
                                       {**base, **sections}})  # fmt: skip
