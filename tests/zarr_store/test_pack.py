"""What `pack_shard` makes is a shard to programs that know Zarr and not us."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from zarr_store.pack import BLOSC_BLOCK_BYTES, OVERVIEW_LEVEL, pack_chunk, pack_shard
from zarr_store.spec import LAYOUTS, Layout

CHUNK, SHARD = (1, 3, 16, 8), (2, 3, 64, 32)


def create(folder: Path, shape: tuple[int, ...], dtype: str, fill: float, layout: Layout) -> zarr.Array:
    shuffle = BloscCodec(
        cname=layout.cname,  # type: ignore[arg-type]
        clevel=layout.clevel,
        shuffle="bitshuffle",
        blocksize=BLOSC_BLOCK_BYTES,
    )
    return zarr.create_array(
        str(folder), shape=shape, chunks=CHUNK, shards=SHARD, dtype=dtype, fill_value=fill,
        compressors=[shuffle, Crc32cCodec()],
    )  # fmt: skip


def made_up(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(3).integers(0, 250, shape).astype(dtype)
    values[..., :16, :8] = 7  # a chunk of one value, in both steps
    values[..., 16:17, :1] = 7  # and one that only begins with it
    if dtype == "float32":
        values[..., 20:30, :] = np.nan
    return values


@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in ("train", "archive", "fast")], ids=lambda one: one.name)
@pytest.mark.parametrize(("dtype", "fill"), [("uint16", 0), ("int16", -1), ("uint8", 0), ("float32", float("nan"))])
@pytest.mark.parametrize("shape", [(2, 3, 64, 32), (1, 3, 37, 19)], ids=["whole", "cut"])
def test_others_read_what_was_packed(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, fill: float, layout: Layout
) -> None:
    array = create(tmp_path / "a", shape, dtype, fill, layout)
    pixels = made_up(shape, dtype)
    seen: list[np.ndarray] = []
    shard = b"".join(pack_shard(pixels, CHUNK, SHARD, layout, fill, look=lambda part: seen.append(part.copy())))
    path = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    path.write_bytes(shard)
    np.testing.assert_array_equal(array[...], pixels)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 'a'}/"}}
    read = ts.open(spec, open=True, read=True).result().read().result()
    np.testing.assert_array_equal(read, pixels)
    # where the array ends within a chunk, what lies beyond is as if it had never been written
    larger = create(tmp_path / "b", SHARD, dtype, fill, layout)
    shutil.copytree(tmp_path / "a" / "c", tmp_path / "b" / "c")
    beyond = np.full(SHARD, fill, dtype)
    beyond[tuple(slice(0, size) for size in shape)] = pixels
    np.testing.assert_array_equal(larger[...], beyond)
    boxes = [
        pixels[t : t + 1, :, y : y + 16, x : x + 8]
        for t in range(shape[0])
        for y in range(0, shape[2], 16)
        for x in range(0, shape[3], 8)
    ]
    assert len(seen) == len(boxes)
    for part, box in zip(seen, boxes, strict=True):
        np.testing.assert_array_equal(part, box)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_chunk_is_packed_by_its_type_in_blocks_of_the_measured_size(dtype: str) -> None:
    """By the header of Blosc: (version, version, flags, size of a number), bytes, bytes of a block, bytes packed."""
    chunk = (1, 4, 512, 512)
    first, *_ = pack_shard(made_up(chunk, dtype), chunk, chunk, LAYOUTS["train"], 0)
    (block,) = np.frombuffer(first[8:12], "<u4")
    assert (first[3], int(block)) == (np.dtype(dtype).itemsize, BLOSC_BLOCK_BYTES)


def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    array = create(tmp_path / "a", (1, 3, 16, 8), "uint16", 0, LAYOUTS["train"])
    shard = bytearray(b"".join(pack_shard(made_up((1, 3, 16, 8), "uint16"), CHUNK, SHARD, LAYOUTS["train"], 0)))
    path = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    for place in range(0, len(shard), 13):
        shard[place] ^= 4
        path.write_bytes(shard)
        with pytest.raises(ValueError, match=r"(?i)checksum|crc32c"):
            array[...]
        shard[place] ^= 4


def test_an_overview_is_one_chunk_that_others_read(tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path / "o"), shape=(1, 3, 10, 5), chunks=CHUNK, dtype="uint16", fill_value=0,
        compressors=[ZstdCodec(level=OVERVIEW_LEVEL, checksum=True)],
    )  # fmt: skip
    pixels = made_up((1, 3, 10, 5), "uint16")
    path = tmp_path / "o" / "c" / "0" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    packed = pack_chunk(pixels, CHUNK, 0)
    assert packed[4] & 4, "RFC 8878, 3.1.1.1.1: the frame ends with a checksum of what it holds"
    path.write_bytes(packed)
    np.testing.assert_array_equal(array[...], pixels)
