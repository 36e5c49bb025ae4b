"""`pack_shard`: the pixels of one shard as the bytes of its file, one chunk after the other.

A chunk is copied, counted, encoded and yielded while it is in the processor's cache. Code that writes the parts to a
file as they come never holds the packed shard in memory.

Spec: Zarr v3 codecs "sharding_indexed", "blosc", "zstd" and "crc32c" (zarr-specs.readthedocs.io).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import google_crc32c
import imagecodecs
import numpy as np
from numcodecs import Zstd

from zarr_store.spec import Layout

__all__ = ["BLOSC_BLOCK_BYTES", "OVERVIEW_LEVEL", "pack_chunk", "pack_shard"]

BLOSC_BLOCK_BYTES = 1 << 19
"""Block size of Blosc, bytes: its own choice is 32 to 64 KiB; on real 10 m texture 512 KiB is 3 % smaller and decodes
half again as fast."""

OVERVIEW_LEVEL = 3
"""Level of zstd for the overview, which is small and read by programs without Blosc."""

_ABSENT = np.uint64(2**64 - 1)
"""Offset and size of a chunk beyond the array, in the index of a shard."""


def pack_shard(
    pixels: np.ndarray,
    chunk: Sequence[int],
    shard: Sequence[int],
    layout: Layout,
    fill: float,
    look: Callable[[np.ndarray], None] | None = None,
) -> Iterator[bytes]:
    """Yield the parts of a shard's file: each chunk and its checksum, then the index with their places.

    Args:
        pixels: Pixels of the part of the shard inside the array; as many axes as `chunk`.
        chunk: Shape of a chunk.
        shard: Shape of a whole shard, in whole chunks.
        layout: Its Blosc codec and level.
        fill: Value of pixels beyond the edge of the array.
        look: Called with the pixels of each chunk inside the array, in the order of the chunks.
    """
    slots = tuple(s // c for s, c in zip(shard, chunk, strict=True))
    index = np.full((*slots, 2), _ABSENT, "<u8")
    plain: dict[bytes, tuple[bytes, bytes]] = {}
    end = 0
    for slot in np.ndindex(slots):
        corner = [i * c for i, c in zip(slot, chunk, strict=True)]
        if any(start >= size for start, size in zip(corner, pixels.shape, strict=True)):
            continue
        part = np.ascontiguousarray(pixels[tuple(slice(s, s + c) for s, c in zip(corner, chunk, strict=True))])
        if look is not None:
            look(part)
        data, checksum = _pack(_whole(part, chunk, fill), layout, plain)
        index[slot] = end, len(data) + len(checksum)
        end += len(data) + len(checksum)
        yield data
        yield checksum  # apart, as joining them would copy the chunk
    places = index.tobytes()
    yield places + _checksum(places)


def pack_chunk(pixels: np.ndarray, chunk: Sequence[int], fill: float) -> bytes:
    """Pack one chunk of an array without shards, as zstd with its own checksum."""
    # not imagecodecs, whose zstd frames have no checksum
    packed: bytes = Zstd(level=OVERVIEW_LEVEL, checksum=True).encode(_whole(pixels, chunk, fill))
    return packed


def _whole(part: np.ndarray, chunk: Sequence[int], fill: float) -> np.ndarray:
    if part.shape == tuple(chunk):
        return np.ascontiguousarray(part)
    whole = np.full(chunk, fill, part.dtype)
    whole[tuple(slice(0, size) for size in part.shape)] = part
    return whole


def _pack(chunk: np.ndarray, layout: Layout, plain: dict[bytes, tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Encode a chunk, and return it with its checksum; one of a single value is encoded once per shard."""
    flat = chunk.reshape(-1)
    value = flat[:1].tobytes()
    constant = bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())
    if constant and value in plain:
        return plain[value]
    data = imagecodecs.blosc_encode(
        chunk.data,  # type: ignore[arg-type]  # it takes any buffer, and the size of a number from it
        level=layout.clevel,
        compressor=layout.cname,
        shuffle="bitshuffle",
        blocksize=BLOSC_BLOCK_BYTES,
        numthreads=1,
    )
    packed = bytes(data), _checksum(data)  # bytes already, so this is no copy
    if constant:
        plain[value] = packed
    return packed


def _checksum(data: bytes | bytearray) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")
