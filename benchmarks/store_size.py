"""Size and number of files of a cube on real 10 m texture, compared with plain Zarr; speed of codecs on one core.

Needs the Sentinel-2 cells of the shared data (Major TOM, 12 bands each); says so and passes where they are absent.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import BANDS, HERE, OUT, Row, arguments, publish

FILES = ("B02.tif", "B03.tif", "B04.tif", "B08.tif")
SIDE = 2048


def texture() -> np.ndarray | None:
    """(1, 4, 2048, 2048): the two cells and their mirror images."""
    import rasterio

    scenes = HERE.parent.parent / "shared" / "data" / "scenes" / "major_tom"
    cells = []
    for first in sorted(scenes.rglob(FILES[0])):
        bands = []
        for name in FILES:
            with rasterio.open(first.with_name(name)) as source:
                bands.append(source.read(1)[:1024, :1024].astype(np.uint16))
        cells.append(np.stack(bands))
    if len(cells) < 2:
        return None
    a, b = cells[:2]
    top, bottom = np.concatenate([a, b], axis=2), np.concatenate([b[:, ::-1, ::-1], a[:, ::-1, ::-1]], axis=2)
    return np.ascontiguousarray(np.concatenate([top, bottom], axis=1)[np.newaxis])


def write_cube(target: Path, main: np.ndarray, layout: str = "train") -> float:
    """Write the texture as a cube of one shard; returns the processor seconds of packing and writing it."""
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.regions import Region
    from zarr_store.spec import LAYOUTS, BandSpec, CubeSpec
    from zarr_store.write import ShardWriter

    grid = Grid("EPSG:32633", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_040.0), (SIDE, SIDE))
    bands = tuple(BandSpec(name) for name in BANDS)
    times = ("2023-01-01T00:00:00",)
    spec = CubeSpec("sentinel-2-l2a", "reflectance", bands, grid, times, layout=LAYOUTS[layout])
    items = {spec.collection: [{"id": "a", "datetime": "2023-01-01T00:00:00Z"}]}
    create_cube(target, [spec], items=items, provenance={"plan": "benchmark"})
    arrays = {
        "reflectance": main,
        "status": np.ones((1, SIDE, SIDE), np.uint8),
        "source_item": np.zeros((1, SIDE, SIDE), np.int16),
    }
    writer, region = ShardWriter(target, spec.collection, spec=spec), Region(0, 1, 0, SIDE, 0, SIDE)
    began = time.process_time()
    writer.write(region, arrays, key="k", sources=())
    return time.process_time() - began


def read_cube(cube: Path) -> float:
    """Processor seconds of reading the pixels of a cube of one shard with tensorstore, decoded."""
    from zarr_store.read import open_cube
    from zarr_store.regions import Region

    opened = open_cube(cube)
    began = time.process_time()
    opened.read("sentinel-2-l2a", "reflectance", Region(0, 1, 0, SIDE, 0, SIDE))
    return time.process_time() - began


def layouts(main: np.ndarray, plain_bytes: int, repeats: int) -> list[Row]:
    """The layout `fast` beside `train`: size beside plain zstd-3, and processor time of writing and reading a shard."""
    spent: dict[str, tuple[list[float], list[float]]] = {"train": ([], []), "fast": ([], [])}
    sizes = {}
    for _ in range(repeats + 1):
        for name, (writing, reading) in spent.items():
            cube = OUT / f"size-{name}.zarr"
            shutil.rmtree(cube, ignore_errors=True)
            writing.append(write_cube(cube, main, name))
            reading.append(read_cube(cube))
            sizes[name] = stored(cube / "sentinel-2-l2a")[0]
    write, read = ({name: min(both[n][1:]) for name, both in spent.items()} for n in (0, 1))
    return [
        Row("layout fast: size ÷ size of plain zstd-3 chunks", sizes["fast"] / plain_bytes, 0.96, at_most=True),
        Row("layout fast: size ÷ size of train", sizes["fast"] / sizes["train"]),
        Row("layout fast: a shard is written, times as fast as train", write["train"] / write["fast"],
            note=f"{write['train'] * 1e3:.0f} and {write['fast'] * 1e3:.0f} ms of a processor, counts and hashes too"),
        Row("layout fast: a shard is read, times as fast as train", read["train"] / read["fast"],
            note=f"{read['train'] * 1e3:.0f} and {read['fast'] * 1e3:.0f} ms of a processor"),
    ]  # fmt: skip


def write_plain(target: Path, main: np.ndarray) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.create_group(str(target))
    options: dict[str, Any] = {"compressors": [ZstdCodec(level=3)]}
    array = group.create_array(
        "reflectance", shape=main.shape, chunks=(1, len(BANDS), 256, 256), dtype=main.dtype, **options
    )
    array[...] = main
    for name, dtype in (("status", "uint8"), ("source_item", "int16")):
        layer = group.create_array(
            name, shape=(1, SIDE, SIDE), chunks=(1, 256, 256), dtype=dtype, fill_value=9, **options
        )
        layer[...] = 1


def stored(folder: Path) -> tuple[int, int]:
    """(bytes, number) of the chunk and shard files below a folder."""
    files = [path for path in folder.rglob("c/**/*") if path.is_file()]
    return sum(path.stat().st_size for path in files), len(files)


def codecs(main: np.ndarray, repeats: int) -> list[Row]:
    """Ratio, and MB/s of one core, of encoding and decoding chunks of four bands of 256²."""
    from numcodecs import Zstd, blosc

    blosc.set_nthreads(1)
    cuts = range(0, SIDE, 256)
    chunks = [np.ascontiguousarray(main[:, :, y : y + 256, x : x + 256]) for y in cuts for x in cuts]
    size = sum(chunk.nbytes for chunk in chunks)
    tried = {"zstd-3": Zstd(level=3)}
    bits, whole = blosc.Blosc.BITSHUFFLE, blosc.Blosc.SHUFFLE
    for codec, level in (("zstd", 1), ("zstd", 3), ("lz4", 5)):
        for block in (0, 1 << 18, 1 << 19):
            name = f"blosc {codec}-{level} bitshuffle, blocks of {block >> 10 or 'its own choice of'} KiB"
            tried[name] = blosc.Blosc(codec, level, bits, block)
    for codec, level, shuffle in (
        ("lz4", 1, bits), ("lz4", 9, bits), ("lz4", 5, whole), ("lz4hc", 1, bits), ("lz4hc", 9, bits),
    ):  # fmt: skip
        name = f"blosc {codec}-{level} {'bitshuffle' if shuffle == bits else 'shuffle'}, blocks of 512 KiB"
        tried[name] = blosc.Blosc(codec, level, shuffle, 1 << 19)
    speeds: dict[str, tuple[float, float]] = {}
    rows = []
    for name, codec in tried.items():
        best = [np.inf, np.inf]
        for _ in range(repeats):
            began = time.process_time()
            encoded = [codec.encode(chunk) for chunk in chunks]
            middle = time.process_time()
            for data in encoded:
                codec.decode(data)
            best = [min(best[0], middle - began), min(best[1], time.process_time() - middle)]
        ratio = size / sum(len(data) for data in encoded)
        speeds[name] = (best[0], best[1])
        note = f"encode {size / 1e6 / best[0]:.0f}, decode {size / 1e6 / best[1]:.0f} MB/s of one core"
        rows.append(Row(f"{name}: ratio", ratio, note=note))
    train, fast = (speeds[f"blosc {name} bitshuffle, blocks of 512 KiB"] for name in ("zstd-1", "lz4-5"))
    return [
        Row("layout fast: a chunk is encoded, times as fast as train", train[0] / fast[0], 1.3),
        Row("layout fast: a chunk is decoded, times as fast as train", train[1] / fast[1], 1.3),
        *rows,
    ]


def main() -> int:
    asked = arguments(__doc__ or "")
    pixels = texture()
    if pixels is None:
        print("store-size: the real scenes are not here; nothing was measured")
        return 0
    ours, plain = OUT / "size.zarr", OUT / "plain.zarr"
    for folder in (ours, plain):
        shutil.rmtree(folder, ignore_errors=True)
    write_cube(ours, pixels)
    write_plain(plain, pixels)
    tried = codecs(pixels, asked.repeats)
    (our_bytes, our_files), (plain_bytes, plain_files) = stored(ours / "sentinel-2-l2a"), stored(plain)
    arrays = 3 + 4  # the coordinates time, y, x and band have a file each beside the three arrays of pixels
    rows = [
        Row("size ÷ size of plain zstd-3 chunks", our_bytes / plain_bytes, 0.9, at_most=True),
        Row("files of plain 256² chunks ÷ files of shards", plain_files / (our_files - arrays + 3), 50),
        *layouts(pixels, plain_bytes, asked.repeats),
        *tried,
    ]
    return 0 if publish("store-size", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
