"""Classification of crops by their course over a year: a real series of 118 dates, half of its pixels cloudy.

The labelled patch of Flanders in the shared data (64 × 64 pixels at 10 m, netCDF) becomes a cube by `zarr_store`, its
crops with more than 150 pixels a label layer; `temporal` learns whole series and is scored on held-out blocks
of 160 m. Without the data it reports that and passes. It trains with three seeds with `--full`, else with one.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import SHARED, call
from harness import OUT, Row, arguments, publish

COLLECTION = "sentinel-2-l2a"
BANDS = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08"}
MASKED = (3, 8, 9, 10, 11)
"""Classes of the scene classification that hide the ground: cloud shadow, clouds, cirrus, snow."""
LEAST_PIXELS = 150
CLEAR, HIDDEN = 1, 2
CONFIG = """
[data]
cube = "{cube}"
collection = "sentinel-2-l2a"
label = "crop"
dates = "all"
patch = 8
[data.split]
block_m = 160
[model]
name = "temporal"
width = 32
depth = 2
[optim]
learning_rate = 3e-3
[run]
steps = 60
batch_size = 4
evaluate_every = 60
checkpoint_every = 60
"""


def read(file: Path, variable: str) -> tuple[np.ndarray, dict[str, str]]:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(f"netcdf:{file}:{variable}") as opened:
            return opened.read(), opened.tags()


def dates_of(tags: dict[str, str]) -> tuple[str, ...]:
    start = dt.datetime.fromisoformat(tags["timestamp#units"].removeprefix("seconds since "))
    after = [int(text) for text in re.findall(r"\d+", tags["NETCDF_DIM_timestamp_VALUES"])]
    return tuple((start + dt.timedelta(seconds=seconds)).isoformat() for seconds in after)


def write_series(folder: Path, url: Path) -> dict[str, int]:
    """The cube and its label layer; pixels of each crop that is learned."""
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.labels import LabelSpec, label_boxes, write_label
    from zarr_store.read import open_cube
    from zarr_store.spec import BandSpec, CubeSpec, Layout
    from zarr_store.write import ShardWriter

    near, far, truth = (next(folder.glob(f"{name}*.nc")) for name in ("S2_L2A_10m", "S2_L2A_20m", "OUTPUT"))
    layers = [read(near, name) for name in BANDS.values()]
    times = dates_of(layers[0][1])
    image = np.stack([pixels for pixels, _ in layers], axis=1).astype(np.uint16)
    scl = read(far, "SCL")[0].astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    seen = (image != 0).all(axis=1)
    status = np.where(seen, np.where(np.isin(scl, MASKED), HIDDEN, CLEAR), 0).astype(np.uint8)
    image[np.repeat(~seen[:, None], len(BANDS), axis=1)] = 0
    grid = Grid("EPSG:32631", (10.0, 0.0, 501_360.0, 0.0, -10.0, 5_629_680.0), image.shape[2:])
    layout = Layout("series", (1, 32, 32), (1, 64, 64))
    spec = CubeSpec(COLLECTION, "reflectance", tuple(BandSpec(name) for name in BANDS), grid, times, (), layout)
    items = [{"id": f"date-{number}", "datetime": f"{time}Z"} for number, time in enumerate(times)]
    create_cube(url, [spec], items={COLLECTION: items}, provenance={"made": "by a benchmark"})
    writer = ShardWriter(url, COLLECTION)
    arrays: dict[str, np.ndarray] = {
        "reflectance": image,
        "status": status,
        "source_item": np.zeros(status.shape, np.int16),
    }
    for index, region in spec.shards().items():
        day = slice(index[0], index[0] + 1)
        writer.write(region, {name: array[day] for name, array in arrays.items()}, key="k", sources=())
    crops = read(truth, "CT")[0][0]
    values, counts = np.unique(crops[crops != 0], return_counts=True)
    kept = {int(value): int(count) for value, count in zip(values, counts, strict=True) if count > LEAST_PIXELS}
    classes = tuple((number, f"crop {value}") for number, value in enumerate(kept, 1))
    labels = np.zeros(crops.shape, np.uint8)
    for number, value in enumerate(kept, 1):
        labels[crops == value] = number
    made = LabelSpec("crop", "classes", classes, {"file": truth.name})
    cube = open_cube(url)
    write_label(url, made, lambda: ((box, labels[box.slices[1:]]) for box in label_boxes(cube)))
    return {f"crop {value}": count for value, count in kept.items()}


def learn(config: Path, run: Path, seed: int) -> dict[str, Any]:
    shutil.rmtree(run, ignore_errors=True)
    _, _, processor = call("train", str(config), "--out", str(run), "--set", f"run.seed={seed}")
    scores: dict[str, Any] = json.loads(call("evaluate", str(run), "--json")[0])
    return {**scores, "processor_s": processor}


def main() -> int:
    args = arguments(__doc__ or "")
    folder = next(iter(sorted((SHARED / "series" / "labelled").glob("*"))), None)
    if folder is None:
        print(f"  skipped, no real data at {SHARED}; set TERRASHARD_SHARED_DATA")
        return 0
    work = OUT / "series"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.perf_counter()
    crops = write_series(folder, work / "cube.zarr")
    print(f"  {crops} in {time.perf_counter() - began:.1f} s")
    (work / "run.toml").write_text(CONFIG.format(cube=work / "cube.zarr"))
    runs = [learn(work / "run.toml", work / "run", seed) for seed in range(3 if args.full else 1)]
    rows = []
    for name in ("accuracy", "macro_f1"):
        values = [100 * run[name] for run in runs]
        note = f"seeds {', '.join(f'{value:.1f}' for value in values)}; {runs[0]['pixels']} pixels of blocks of 160 m"
        rows.append(Row(f"two crops of Flanders: {name.replace('_', ' ')}, %", statistics.mean(values), note=note))
    rows.append(Row("training, s of the processor", statistics.mean(run["processor_s"] for run in runs)))
    return 0 if publish("series", rows, full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
