"""Check the metadata of an array before one of its chunks is decoded.

A reader allocates what metadata promise: a chunk of 32 kB can claim to be a gigabyte. So an array must be laid out as
its collection says, the collection may not ask for chunks or indices beyond bounds that no real cube comes near, and
only the codecs that cubes are written with are used. A stored chunk that claims to hold more than its array's chunks
is an error of the decoder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError
from zarr_store.spec import OVERVIEW_FACTOR, CubeSpec

__all__ = ["MOST_CHUNK_BYTES", "check_overview", "check_promises"]

MOST_CHUNK_BYTES = 256 << 20
"""Largest decoded chunk, bytes; the largest layout has chunks of 13 bands × 512² of 2 bytes, 7 MB."""
_MOST_BYTES = 1 << 20
"""Largest metadata of one array, bytes."""
_MOST_CHUNKS = 1 << 20
"""Largest number of chunks in a shard, as its index is read as a whole, 16 bytes for each."""
_CODECS = frozenset({"bytes", "blosc", "zstd", "crc32c", "sharding_indexed"})
_OVERVIEW_CODECS = frozenset({"bytes", "zstd"})


def check_promises(data: bytes | None, spec: CubeSpec, array: str, where: str) -> None:
    """Refuse metadata of an array that differ from the spec of its collection, or exceed the bounds.

    Args:
        data: Its zarr.json.
        spec: Spec of its collection.
        array: Its name.
        where: The place of the metadata, for people.

    Raises:
        IntegrityError: It is absent or unreadable, contradicts the collection, or promises more than any cube needs.
    """
    try:
        document = load_json(data, where, most=_MOST_BYTES)
        outer = document["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = document["codecs"]
        inner = sharding["configuration"]["chunk_shape"]
        codecs = {str(codec["name"]) for codec in _all_codecs(document["codecs"])}
        found = {
            "shape": tuple(document["shape"]),
            "data_type": document["data_type"],
            "shard": tuple(outer),
            "chunk": tuple(inner),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: unreadable array metadata ({type(error).__name__}: {error}); restore the file, or make the cube "
            "again"
        ) from error
    banded = "band" in spec.array(array).dims

    def box(tyx: tuple[int, int, int]) -> tuple[int, ...]:
        return (tyx[0], len(spec.bands), *tyx[1:]) if banded else tyx

    expected: dict[str, Any] = {
        "shape": spec.array_shape(array),
        "data_type": spec.array(array).dtype,
        "shard": box(spec.layout.shard),
        "chunk": box(spec.layout.chunk),
    }
    # while a cube grows its arrays are already longer than its collection states
    steps, expected_steps = found["shape"][:1], expected["shape"][:1]
    if len(steps) == 1 and isinstance(steps[0], int) and steps[0] >= expected_steps[0]:
        found["shape"] = (*expected_steps, *found["shape"][1:])
    wrong = [f"{name} {found[name]}, not {expected[name]}" for name in expected if found[name] != expected[name]]
    if wrong:
        raise IntegrityError(
            f"{where} differs from the spec of its collection: {'; '.join(wrong)}. Nothing of it was read: it was "
            "changed after the cube was made"
        )
    size = math.prod(box(spec.layout.chunk)) * np.dtype(spec.array(array).dtype).itemsize
    count = math.prod(s // c for s, c in zip(spec.layout.shard, spec.layout.chunk, strict=True))
    if size > MOST_CHUNK_BYTES or count > _MOST_CHUNKS:
        raise IntegrityError(
            f"{where} promises chunks of {size} bytes, {count} in a shard; no more than {MOST_CHUNK_BYTES} bytes and "
            f"{_MOST_CHUNKS} chunks are read"
        )
    if codecs - _CODECS:
        raise IntegrityError(
            f"{where} is packed with {', '.join(sorted(codecs - _CODECS))}; cubes use {', '.join(sorted(_CODECS))} only"
        )


def check_overview(data: bytes | None, spec: CubeSpec, where: str) -> None:
    """Refuse metadata of an overview as `check_promises` does those of an array.

    Args:
        data: zarr.json of the overview's array.
        spec: Spec of its collection.
        where: The place of the metadata, for people.

    Raises:
        IntegrityError: As `check_promises`.
    """
    main = spec.array(spec.kind)
    coarse = spec.grid.coarsen(OVERVIEW_FACTOR)
    t, y, x = spec.layout.shard
    chunk = (t, len(spec.bands), y // OVERVIEW_FACTOR, x // OVERVIEW_FACTOR)
    expected = {
        "shape": (len(spec.times), len(spec.bands), *coarse.shape),
        "data_type": main.dtype,
        "chunk": chunk,
    }
    try:
        document = load_json(data, where, most=_MOST_BYTES)
        codecs = {str(codec["name"]) for codec in _all_codecs(document["codecs"])}
        found = {
            "shape": tuple(document["shape"]),
            "data_type": document["data_type"],
            "chunk": tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{where}: unreadable array metadata ({type(error).__name__}: {error}); restore the file, or make the cube "
            "again"
        ) from error
    if found["shape"][:1] >= expected["shape"][:1]:  # as the arrays, it may be longer while the cube grows
        found["shape"] = (*expected["shape"][:1], *found["shape"][1:])
    wrong = [f"{name} {found[name]}, not {expected[name]}" for name in expected if found[name] != expected[name]]
    size = math.prod(chunk) * np.dtype(main.dtype).itemsize
    if size > MOST_CHUNK_BYTES:
        wrong.append(f"chunks of {size} bytes, more than the {MOST_CHUNK_BYTES} that are read")
    if codecs - _OVERVIEW_CODECS:
        wrong.append(f"packed with {', '.join(sorted(codecs - _OVERVIEW_CODECS))}")
    if wrong:
        raise IntegrityError(
            f"{where} differs from the spec of its collection: {'; '.join(wrong)}. Nothing of it was read: it was "
            "changed after the cube was made"
        )


def _all_codecs(codecs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for codec in codecs:
        found.append(codec)
        inside = codec.get("configuration") or {}
        for name in ("codecs", "index_codecs"):
            found += _all_codecs(inside.get(name, []))
    return found
