"""Tiny cubes and runs for the tests of training: smooth ground of three classes, each with its own spectrum."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain import loop, train
from jaxtrain.config import TrainConfig
from jaxtrain.evaluation import report
from jaxtrain.runs.rundir import ModelCard
from zarr_store.create import create_cube
from zarr_store.grid import Grid
from zarr_store.labels import LabelSpec, label_boxes, write_label
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.write import ShardWriter

COLLECTION = "sentinel-2-l2a"
CLASSES = {"4": "vegetation", "5": "not vegetated", "6": "water"}
PAINTERS = {name: getattr(report, name) for name in
            ("_png", "_curves", "_confusion", "_split_map", "draw_tiles", "draw_shown")}  # fmt: skip
SPECTRA = np.array([[400, 700, 500, 3200], [1100, 1400, 1800, 2500], [300, 350, 200, 120]], float)


def ground(height: int, width: int, seed: int = 0) -> np.ndarray:
    """SCL-like values 4, 5, 6 in smooth shapes, uint8 (height, width)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    field = sum(
        np.sin(x * fx + px) * np.cos(y * fy + py) for fx, fy, px, py in rng.uniform(0.02, 0.16, (6, 4)) * [1, 1, 60, 60]
    )
    return np.digitize(field, np.quantile(field, [0.4, 0.75])).astype(np.uint8) + 4


def make_cube(
    url: Path,
    *,
    shape: tuple[int, int, int] = (2, 192, 160),
    chunk: int = 32,
    shard: int = 64,
    resolution: float = 10.0,
    seed: int = 0,
    bands: Sequence[str] = ("blue", "green", "red", "nir"),
    masked: bool = True,
    hole: bool = False,
    skip_shards: Sequence[tuple[int, int, int]] = (),
    noise: float = 60.0,
    odd: tuple[slice, slice] | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Cube:
    """Write a cube: `masked` puts a cloud (scl 9) on date 0, `hole` leaves a corner of it without data, `odd`
    is a box of a spectrum that occurs nowhere else. The ground does not depend on `scale` and `offset`, in which it is
    stored.
    """
    times, height, width = shape
    rng = np.random.default_rng(seed + 1)
    truth = ground(height, width, seed)
    scl = np.repeat(truth[None], times, axis=0)
    status = np.ones(shape, np.uint8)
    main = SPECTRA[scl - 4].transpose(0, 3, 1, 2) + rng.normal(0, noise, (times, 4, height, width))
    if odd is not None:
        main[(slice(None), slice(None), *odd)] = np.array([2500, 300, 2500, 300])[None, :, None, None]
    if masked:
        scl[0, 40:70, 90:130] = 9
        status[0, 40:70, 90:130] = 2
        main[0, :, 40:70, 90:130] = 7000
    if hole:
        scl[0, -30:, -30:] = 0
        status[0, -30:, -30:] = 0
        main[0, :, -30:, -30:] = 0
    main = (np.rint(main) - offset) / scale
    reflectance = np.clip(main, 1, 65535).astype(np.uint16)[:, : len(bands)]
    reflectance[np.repeat((status == 0)[:, None], len(bands), axis=1)] = 0
    spec = CubeSpec(
        COLLECTION,
        "reflectance",
        tuple(BandSpec(name, scale=scale, offset=offset) for name in bands),
        Grid("EPSG:32633", (resolution, 0.0, 500_000.0, 0.0, -resolution, 5_000_000.0), (height, width)),
        tuple(f"2023-08-{10 + t:02d}T10:00:00" for t in range(times)),
        ("scl",),
        Layout("tiny", (1, chunk, chunk), (1, shard, shard)),
    )
    items = [{"id": f"item-{t}", "datetime": f"2023-08-{10 + t:02d}T10:00:00Z"} for t in range(times)]
    create_cube(url, [spec], items={COLLECTION: items}, provenance={"made_by": "cube_factory"})
    writer = ShardWriter(url, COLLECTION)
    arrays = {"reflectance": reflectance, "scl": scl, "status": status, "source_item": np.zeros(shape, np.int16)}
    for index, region in spec.shards().items():
        if index in set(skip_shards):
            continue
        t, y, x = region.slices
        cut = {name: a[t, :, y, x] if a.ndim == 4 else a[t, y, x] for name, a in arrays.items()}
        writer.write(Region(*region.to_list()), cut, key="k", sources=())
    return open_cube(url)


def labelled_cube(
    url: Path,
    scl: np.ndarray,
    *,
    status: np.ndarray | None = None,
    layer: tuple[np.ndarray, dict[int, str]] | None = None,
    chunk: int = 32,
    shard: int = 64,
    resolution: float = 10.0,
    top: float = 5_000_000.0,
    skip_shards: Sequence[tuple[int, int, int]] = (),
) -> Cube:
    """Write a cube whose class layer is `scl` (time, y, x); one band shows it. `layer` adds a label layer `cover`."""
    times, height, width = scl.shape
    status = np.ones(scl.shape, np.uint8) if status is None else status
    image = np.where(status[:, None] == 0, 0, 100 + 300 * scl[:, None].astype(np.uint16)).astype(np.uint16)
    spec = CubeSpec(
        COLLECTION,
        "reflectance",
        (BandSpec("red"),),
        Grid("EPSG:32633", (resolution, 0.0, 500_000.0, 0.0, -resolution, top), (height, width)),
        tuple(f"2023-08-{10 + t:02d}T10:00:00" for t in range(times)),
        ("scl",),
        Layout("tiny", (1, chunk, chunk), (1, shard, shard)),
    )
    items = [{"id": f"item-{t}", "datetime": f"2023-08-{10 + t:02d}T10:00:00Z"} for t in range(times)]
    create_cube(url, [spec], items={COLLECTION: items}, provenance={"made_by": "cube_factory"})
    writer = ShardWriter(url, COLLECTION)
    arrays = {"reflectance": image, "scl": scl, "status": status, "source_item": np.zeros(scl.shape, np.int16)}
    for index, region in spec.shards().items():
        if index not in set(skip_shards):
            t, y, x = region.slices
            cut = {name: a[t, :, y, x] if a.ndim == 4 else a[t, y, x] for name, a in arrays.items()}
            writer.write(Region(*region.to_list()), cut, key="k", sources=())
    if layer is not None:
        pixels, names = layer
        boxes = [(box, pixels[box.y0 : box.y1, box.x0 : box.x1]) for box in label_boxes(open_cube(url))]
        write_label(str(url), LabelSpec("cover", "classes", tuple(names.items()), {"made": "here"}), lambda: boxes)
    return open_cube(url)


def tiny_config(cube: Path | str, **sections: dict[str, Any]) -> TrainConfig:
    """A run of seconds: twelve steps of a network with some hundred parameters."""
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": str(cube), "classes": CLASSES, "patch": 32, "split": {"block_m": 320}},
        "model": {"width": 4, "depth": 1, "dropout": 0.1},
        "optim": {"warmup_steps": 2, "learning_rate": 1e-2},
        "run": {"steps": 12, "batch_size": 8, "evaluate_every": 6, "checkpoint_every": 5, "log_every": 1},
    }
    return TrainConfig.model_validate({name: {**base.get(name, {}), **sections.get(name, {})} for name in
                                       {**base, **sections}})  # fmt: skip


_PROGRAMS: dict[Any, Any] = {}


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Let trainings with the same settings and statistics share their program and its compiled steps.

    Only for tests of what happens to a run between its steps; nothing inside a step may be patched.
    """
    names = ("program_of", "make_train_step", "make_eval_step", "make_predict_step")
    make = {name: getattr(loop, name) for name in names}

    def program_of(card: ModelCard, config: TrainConfig) -> Any:
        same = config.model_copy(update={"data": config.data.model_copy(update={"cache": "auto"})})  # not compiled
        key = (same.model_dump_json(), repr((card.mean, card.std, card.class_weights, card.classes, card.task)))
        if key not in _PROGRAMS:
            _PROGRAMS[key] = make["program_of"](card, config)
        return _PROGRAMS[key]

    def step_of(name: str, program: Any) -> Any:
        if (name, id(program)) not in _PROGRAMS:
            _PROGRAMS[name, id(program)] = (make[name](program), program)  # a program that is kept keeps its id
        return _PROGRAMS[name, id(program)][0]

    patch.setattr(loop, "program_of", program_of)
    for name in names[1:]:
        patch.setattr(loop, name, functools.partial(step_of, name))


@functools.cache
def shared_cube() -> Path:
    """One cube for all tests of a process; they only read it."""
    url = Path(tempfile.mkdtemp(prefix="terrashard-test-")) / "cube.zarr"
    make_cube(url)
    return url


@functools.cache
def shared_run() -> Path:
    """One finished run of twelve steps on the shared cube; tests that change it work on a copy."""
    out = shared_cube().parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, painter in PAINTERS.items():  # also where the test that asks first has no use for figures
            patch.setattr(report, name, painter)
        train(tiny_config(shared_cube()), out)
    return out
