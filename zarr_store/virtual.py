"""`open_virtual` lets tensorstore read an array of a store that it has no driver for.

Chunks are decoded by zarr-python and kept in tensorstore's cache, so code that reads a cube need not know its store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts
import zarr

from zarr_store.decoding import DECODING_FAULTS

__all__ = ["open_virtual"]


def open_virtual(store: Any, path: str, context: ts.Context, *, exists: Callable[[str], bool]) -> ts.TensorStore:
    """Open an array of a Zarr store, read-only.

    Args:
        store: As zarr-python opens it.
        path: Path of the array.
        context: Context of tensorstore, with its cache.
        exists: Whether a shard's key is there; asked once for each that is, as zarr-python reads a lost one as fill.

    Returns:
        An array whose reads raise ValueError: "NOT_FOUND: key" for a lost shard, "DATA_LOSS: key" for a damaged one.
    """
    array = zarr.open_array(store, path=path, mode="r")
    shards = array.shards or array.chunks
    there: set[str] = set()

    def read(domain: ts.IndexDomain, chunk: np.ndarray, _: Any) -> None:
        index = [int(start) // size for start, size in zip(domain.inclusive_min, shards, strict=True)]
        key = f"{path}/c/{'/'.join(map(str, index))}"
        if key not in there:
            if not exists(key):
                raise ValueError(f"NOT_FOUND: {key}")
            there.add(key)
        try:
            chunk[...] = array[domain.index_exp]
        except DECODING_FAULTS as error:
            raise ValueError(f"DATA_LOSS: {key}: {error}") from error

    return ts.virtual_chunked(
        read,
        dtype=ts.dtype(array.dtype.name),
        shape=array.shape,
        chunk_layout=ts.ChunkLayout(read_chunk_shape=array.chunks),
        context=context,
    )
