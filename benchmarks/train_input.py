"""Batches to the device, compared with raw tensorstore on the same cube and with other readers of a Dask-written cube.

Patches of 256² and 4 bands in random order on this machine's processors:

- ours: `BatchStream` in the order of a run, three epochs, image, what is observed and label, as arrays of the device
- tensorstore: the same arrays (image, status, class layer) of the same windows, read as they lie in the cube, and
  nothing more; and the image alone
- xarray + torch: `DataLoader` with 2 workers over `isel` of the same pixels in the layout that `to_zarr` of a Dask
  array has, one date, one band and 1024² a chunk
- xbatcher: `BatchGenerator` over that store

These two read the image alone. They are skipped, and say so, where the extra "bench" is not installed. Then the default
U-Net learns from the cube, and how long its steps waited for their input is read from its metrics.

`--part kept` compares batches that are read with batches of data that are kept in memory or on the devices after the
first epoch (`data.cache`), from a store of samples and without a network; and with raw tensorstore.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import BANDS, OUT, Row, arguments, medians, publish

PATCH, BATCH, EPOCHS = 256, 16, 3
COLLECTION = "sentinel-2-l2a"
CLASSES = {"4": "vegetation", "5": "bare", "6": "water"}


def make_stores(full: bool) -> tuple[Path, Path]:
    """A cube of ours, and the same pixels as xarray and Dask would write them."""
    import zarr

    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.regions import Region
    from zarr_store.spec import LAYOUTS, STATUS_MASKED, STATUS_OBSERVED, BandSpec, CubeSpec
    from zarr_store.write import ShardWriter

    times, side = (6, 4096) if full else (2, 2048)
    ours, others = OUT / f"input-{side}.zarr", OUT / f"input-{side}-dask.zarr"
    if ours.exists() and others.exists():
        return ours, others
    for folder in (ours, others):
        shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(300, 3000, (len(BANDS), side // 16, side // 16)), np.ones((16, 16), int))
    cover = np.kron(rng.integers(4, 7, (side // 16, side // 16)), np.ones((16, 16), int)).astype(np.uint8)
    rows, columns = np.ogrid[:side, :side]
    cloudy = np.zeros((side, side), bool)
    for y, x, radius in rng.integers((0, 0, 100), (side, side, 400), (max(2, side // 512), 3)):
        cloudy |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    stamps = tuple(f"2023-0{1 + t}-10T10:00:00" for t in range(times))
    spec = CubeSpec(
        COLLECTION, "reflectance", tuple(BandSpec(name) for name in BANDS),
        Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (side, side)), stamps, ("scl",),
        LAYOUTS["train"],
    )  # fmt: skip
    items = {COLLECTION: [{"id": f"item-{t}", "datetime": f"{stamp}Z"} for t, stamp in enumerate(stamps)]}
    create_cube(ours, [spec], items=items, provenance={"made_by": "benchmark"})
    writer = ShardWriter(ours, COLLECTION)
    plain = zarr.create_group(str(others)).create_array(
        "reflectance", shape=(times, len(BANDS), side, side), chunks=(1, 1, 1024, 1024), dtype="uint16",
        dimension_names=("time", "band", "y", "x"),
    )  # fmt: skip
    for region in spec.shards().values():
        t, y, x = region.slices
        shape = (1, len(BANDS), region.y1 - region.y0, region.x1 - region.x0)
        main = (smooth[None, :, y, x] + rng.normal(0, 60, shape)).clip(1, 65535).astype(np.uint16)
        cloud = cloudy[None, y, x]
        arrays = {
            "reflectance": main,
            "scl": np.where(cloud, np.uint8(9), cover[None, y, x]),
            "status": np.where(cloud, STATUS_MASKED, STATUS_OBSERVED).astype(np.uint8),
            "source_item": np.zeros(cloud.shape, np.int16),
        }
        writer.write(Region(*region.to_list()), arrays, key="k", sources=())
        plain[t, :, y, x] = main
    return ours, others


def small_cache() -> None:
    """Keep few decoded chunks, so that no side lives on what it or another has read before."""
    import tensorstore as ts

    import zarr_store.read

    zarr_store.read._CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 48 << 20}})


def ours_side(url: Path) -> tuple[Callable[[], float], int]:
    import jax

    from jaxtrain.config import DataConfig, MeshConfig
    from jaxtrain.data.batches import BatchStream
    from jaxtrain.data.classes import Classes
    from jaxtrain.data.reader import WindowReader
    from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
    from jaxtrain.data.windows import Windows
    from jaxtrain.parallel.mesh import batch_sharding, make_mesh
    from zarr_store.read import open_cube

    config = DataConfig.model_validate({"cube": str(url), "classes": CLASSES, "patch": PATCH})
    spec = open_cube(url).spec(COLLECTION)
    times, height, width = spec.shape
    t, y, x = (v.ravel() for v in np.mgrid[:times, : height // PATCH, : width // PATCH])
    rows = np.stack([t, y * PATCH, x * PATCH], axis=1).astype(np.int32)
    sharding = batch_sharding(make_mesh(MeshConfig()))
    order = ChunkOrder(0, chunk_numbers(rows, PATCH, spec.layout.chunk), BATCH)

    def epoch() -> float:
        reader = WindowReader.of(open_cube(url), config, Classes.of(config))
        began = time.perf_counter()
        with BatchStream(reader, Windows(PATCH, rows), size=BATCH, sharding=sharding, order=order,
                         last=EPOCHS * len(rows) // BATCH, place=True) as batches:  # fmt: skip
            for _, _, batch in batches:
                jax.block_until_ready(batch)
        return time.perf_counter() - began

    return epoch, EPOCHS * len(rows) // BATCH * BATCH


def raw_side(url: Path, *names: str) -> Callable[[], float]:
    import tensorstore as ts

    from zarr_store.read import open_cube

    def epoch() -> float:
        cube = open_cube(url)
        handles = [cube.tensorstore(COLLECTION, name) for name in names]
        times, height, width = cube.spec(COLLECTION).shape
        rows = np.stack([v.ravel() for v in np.mgrid[:times, : height // PATCH, : width // PATCH]], axis=1)
        np.random.default_rng(0).shuffle(rows)
        rows = np.tile(rows, (EPOCHS, 1))
        began = time.perf_counter()
        ahead: list[Any] = []
        for start in range(0, len(rows), BATCH):
            with ts.Batch() as batch:
                reads = [
                    handle[t, ..., y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].read(batch=batch)
                    for t, y, x in rows[start : start + BATCH].tolist()
                    for handle in handles
                ]
            ahead.append(reads)
            if len(ahead) > 4:  # as far ahead as ours
                for read in ahead.pop(0):
                    read.result()
        for reads in ahead:
            for read in reads:
                read.result()
        return time.perf_counter() - began

    return epoch


class XarrayPatches:
    """A map-style dataset for torch: the i-th of `count` random windows of the Dask-written store."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.count = url, count
        self._array: Any = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        import xarray as xr

        if self._array is None:  # in the worker, not before it is started
            self._array = xr.open_zarr(self.url, chunks=None, consolidated=False)["reflectance"]
        array = self._array
        times, _, height, width = array.shape
        i = number * 7919 % (times * (height // PATCH) * (width // PATCH))  # a walk that tears neighbours apart
        t, rest = divmod(i, (height // PATCH) * (width // PATCH))
        y, x = (v * PATCH for v in divmod(rest, width // PATCH))
        window = array.isel(time=t, y=slice(y, y + PATCH), x=slice(x, x + PATCH))
        return np.asarray(window.values, np.float32)


def torch_rate(url: Path, count: int) -> float:
    from torch.utils.data import DataLoader

    patches = XarrayPatches(str(url), count)
    loader = DataLoader(patches, batch_size=BATCH, num_workers=2, multiprocessing_context="spawn")
    batches = iter(loader)
    next(batches)  # the workers have started
    began, read = time.perf_counter(), 0
    for batch in batches:
        read += len(batch)
    return read / (time.perf_counter() - began)


def xbatcher_rate(url: Path, count: int) -> float:
    import xarray as xr
    import xbatcher

    data = xr.open_zarr(url, consolidated=False)
    generator = xbatcher.BatchGenerator(data, input_dims={"time": 1, "band": len(BANDS), "y": PATCH, "x": PATCH})
    numbers = np.random.default_rng(0).permutation(len(generator))[:count]
    began = time.perf_counter()
    for number in numbers.tolist():
        np.asarray(generator[number]["reflectance"].values, np.float32)
    return len(numbers) / (time.perf_counter() - began)


def input_wait(url: Path, steps: int) -> float:
    """Share of the time of the steps that the default U-Net waited for its input."""
    from jaxtrain import train
    from jaxtrain.config import TrainConfig

    shutil.rmtree(OUT / "input-run", ignore_errors=True)
    config = TrainConfig.model_validate(
        {
            "data": {"cube": str(url), "classes": CLASSES, "patch": PATCH},
            "run": {"steps": steps, "batch_size": 8, "log_every": 1, "checkpoint_every": steps},
        }
    )
    waited = train(config, OUT / "input-run").input_wait
    if waited is None:
        raise RuntimeError("the run measured no input wait: it had too few steps")
    return waited


def kept_sides(full: bool) -> tuple[dict[str, Callable[[], float]], int, float]:
    """Two epochs of a store of 64² samples of 13 bands: read each time, kept by the host, kept by the devices.

    Returns:
        The seconds of two epochs by side, the samples of two epochs, and the megabytes of all samples.
    """
    import jax

    from jaxtrain.config import MeshConfig
    from jaxtrain.data.batches import BatchStream
    from jaxtrain.data.kept import KeptBatches, KeptReader
    from jaxtrain.data.order import SampleOrder
    from jaxtrain.data.samples import SampleReader
    from jaxtrain.data.windows import Windows
    from jaxtrain.parallel.mesh import batch_sharding, make_mesh
    from zarr_store.samples import Sample, SampleSpec, open_samples, write_samples

    count, side, bands, size = 8192 if full else 2048, 64, 13, 64
    url = OUT / f"input-samples-{count}.zarr"
    if not url.exists():
        rng = np.random.default_rng(0)
        smooth = np.kron(rng.integers(300, 3000, (bands, side // 8, side // 8)), np.ones((8, 8), int))
        spec = SampleSpec(count, tuple(f"b{i}" for i in range(bands)), (side, side), "uint16", ("a", "b"), "one")
        write_samples(url, spec, (
            Sample((smooth + rng.normal(0, 60, smooth.shape)).clip(1, 65535).astype(np.uint16),
                   np.asarray(np.uint8(number % 2)), 10.0, 45.0, f"sample-{number}")
            for number in range(count)
        ))  # fmt: skip
    store = open_samples(url)
    rows = np.zeros((count, 3), np.int32)
    rows[:, 0] = np.arange(count)
    mesh, order, last = make_mesh(MeshConfig()), SampleOrder(0, count), 2 * count // size
    reader = SampleReader(store, tuple(range(bands)), side, np.arange(256, dtype=np.uint8))
    on_host, on_devices = KeptReader(reader, rows), KeptBatches(reader, rows, mesh)
    on_host.read(rows)

    def streamed(read: Any) -> Callable[[], float]:
        def epochs() -> float:
            began = time.perf_counter()
            with BatchStream(read, Windows(side, rows), size=size, sharding=batch_sharding(mesh), order=order,
                             last=last, place=True) as batches:  # fmt: skip
                for _, _, batch in batches:
                    jax.block_until_ready(batch)
            return time.perf_counter() - began

        return epochs

    def held() -> float:
        began = time.perf_counter()
        with on_devices.iterated(order, size=size, first=0, last=last) as batches:
            for _, _, batch in batches:
                jax.block_until_ready(batch)
        return time.perf_counter() - began

    sides = {
        "read": streamed(reader),
        "tensorstore": raw_samples(url, [order.indices(n * size, size) for n in range(last)], (bands, side, side)),
        "host": streamed(on_host),
        "device": held,
    }
    return sides, last * size, on_devices.nbytes / 1e6


def raw_samples(url: Path, batches: list[Any], shape: tuple[int, ...]) -> Callable[[], float]:
    """The same images in the same order by tensorstore alone, each batch as one operation into fresh memory."""
    import tensorstore as ts

    def epochs() -> float:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{url}/image/"}}
        images = ts.open(spec, open=True, read=True).result()
        began = time.perf_counter()
        ahead: list[Any] = []
        for numbers in batches:
            into = np.empty((len(numbers), *shape), np.uint16)
            with ts.Batch() as batch:
                ahead.append(ts.array(into).write(ts.stack([images[int(n)] for n in numbers]), batch=batch))
            if len(ahead) > 4:  # as far ahead as ours
                ahead.pop(0).result()
        for pending in ahead:
            pending.result()
        return time.perf_counter() - began

    return epochs


def kept(full: bool, repeats: int) -> list[Row]:
    sides, samples, megabytes = kept_sides(full)
    rates = {name: samples / seconds for name, seconds in medians(sides, repeats).items()}
    note = f"{samples // 2} samples of 64² × 13, {megabytes:.0f} MB, batches of 64"
    return [
        Row("samples/s, read from the store each time", rates["read"], note=note),
        Row("samples/s of raw tensorstore, images alone", rates["tensorstore"]),
        Row("read from the store / raw tensorstore", rates["read"] / rates["tensorstore"], 0.9),
        Row("samples/s, kept on the host", rates["host"]),
        Row("samples/s, kept on the device", rates["device"]),
        Row("kept on the host / read", rates["host"] / rates["read"]),
        Row("kept on the device / read", rates["device"] / rates["read"]),
    ]


def main() -> int:
    args = arguments(__doc__ or "", parts=("read", "kept"))
    if args.part == "kept":
        return 0 if publish("train-input-kept", kept(args.full, args.repeats), full=args.full) else 1
    cube, dask_layout = make_stores(args.full)
    small_cache()
    epoch, patches = ours_side(cube)
    sides = {
        "ours": epoch,
        "tensorstore": raw_side(cube, "reflectance", "status", "scl"),
        "tensorstore, image alone": raw_side(cube, "reflectance"),
    }
    ours, raw, alone = (patches / seconds for seconds in medians(sides, args.repeats).values())
    rows = [
        Row("patches/s to the device, image + observed + label", ours),
        Row("patches/s of raw tensorstore, the same arrays", raw),
        Row("ours / raw tensorstore, the same arrays", ours / raw, 0.85),
        Row("patches/s of raw tensorstore, image alone", alone),
        Row("ours / raw tensorstore, image alone", ours / alone, 0.85),
    ]
    few = 256 if args.full else 96
    for name, module, rate in (
        ("xarray + torch DataLoader", "torch", torch_rate),
        ("xbatcher", "xbatcher", xbatcher_rate),
    ):
        if importlib.util.find_spec(module) is None:
            print(f'  {name}: skipped, {module} is not installed (pip install "terrashard[bench]")')
            continue
        peer = rate(dask_layout, few)
        rows += [Row(f"patches/s of {name}, Dask's layout", peer), Row(f"ours / {name}", ours / peer, 30.0)]
    wait = input_wait(cube, 24 if args.full else 12)
    rows.append(Row("input wait of the default U-Net, share of its steps", wait, 0.05, at_most=True))
    return 0 if publish("train-input", rows, full=args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
