"""`bounded_codecs` makes zarr-python decode chunks only into what their array can hold.

A chunk of a few bytes may say of itself that it holds gigabytes: in the count of its texts (vlen-utf8), or in the head
of its frame (zstd, blosc). The decoders allocate that before they find out. So these numbers are compared with the
chunk's shape and type first.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import zarr
from zarr import codecs
from zarr.registry import register_codec

from zarr_store.promises import MOST_CHUNK_BYTES

__all__ = ["bounded_codecs"]

_SPARE_BYTES = 64
"""Bytes that inner codecs may add to the numbers of a chunk, such as a checksum."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOSC_HEAD, _BLOSC_FORMAT = 16, 2
_lock = threading.RLock()


@contextlib.contextmanager
def bounded_codecs() -> Iterator[None]:
    """Bound the decoding of chunks of arrays that are opened within this block, also after it.

    Chunks that claim more raise ValueError when they are decoded, as a codec raises it about damaged bytes.
    """
    names = {}
    for codec, bounded in (("vlen-utf8", VLenUTF8Codec), ("zstd", ZstdCodec), ("blosc", BloscCodec)):
        names[f"codecs.{codec}"] = f"{bounded.__module__}.{bounded.__qualname__}"
        register_codec(codec, bounded)
    with _lock, zarr.config.set(names):
        yield


# zarr-python knows the codec of texts by the name of its class
class VLenUTF8Codec(codecs.VLenUTF8Codec):
    """vlen-utf8 whose count of texts must be that of the chunk."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_count(_head(chunk_bytes), chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_count(_head(chunk_bytes), chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


class ZstdCodec(codecs.ZstdCodec):
    """zstd whose frame must state a size that the chunk can have."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_zstd(_head(chunk_bytes), chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_zstd(_head(chunk_bytes), chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


class BloscCodec(codecs.BloscCodec):
    """Blosc whose header must state a size that the chunk can have."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_blosc(_head(chunk_bytes), chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check_blosc(_head(chunk_bytes), chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


def _check_count(head: bytes, chunk_spec: Any) -> None:
    expected, count = math.prod(chunk_spec.shape), int.from_bytes(head[:4], "little")
    if count != expected:
        raise ValueError(f"a chunk of {expected} texts says that it holds {count}")


def _check_zstd(head: bytes, chunk_spec: Any) -> None:
    if head.startswith(_ZSTD_MAGIC):  # the decoder refuses anything else by itself
        _check_size("zstd", _zstd_size(head), chunk_spec)


def _check_blosc(head: bytes, chunk_spec: Any) -> None:
    if len(head) >= _BLOSC_HEAD and head[0] == _BLOSC_FORMAT:  # as above
        _check_size("blosc", int.from_bytes(head[4:8], "little"), chunk_spec)


def _head(chunk_bytes: Any) -> bytes:
    return bytes(memoryview(chunk_bytes.as_numpy_array()).cast("B")[:32])


def _zstd_size(head: bytes) -> int | None:
    """Return the size of its content that a frame states (RFC 8878, 3.1.1.1); None where it states none.

    >>> _zstd_size(bytes.fromhex("28b52ffd2005"))
    5
    """
    descriptor = head[4] if len(head) > 4 else 0
    flag, single = descriptor >> 6, bool(descriptor & 0x20)
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if single else 0, 2, 4, 8)[flag]
    if not length or len(head) < start + length:
        return None
    return int.from_bytes(head[start : start + length], "little") + (256 if length == 2 else 0)


def _check_size(codec: str, size: int | None, chunk_spec: Any) -> None:
    dtype = chunk_spec.dtype.to_native_dtype()
    texts = dtype.kind in {"O", "T", "U"}
    most = MOST_CHUNK_BYTES if texts else math.prod(chunk_spec.shape) * dtype.itemsize + _SPARE_BYTES
    if size is None or size > most:
        claim = "does not say how much it holds" if size is None else f"says that it holds {size} bytes"
        raise ValueError(f"a {codec} chunk {claim}; at most {most} bytes belong into it")
