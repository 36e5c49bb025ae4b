"""Check the metadata of an array before one of its chunks is decoded.

A reader allocates what metadata promise: a chunk of 32 kB can claim to be a gigabyte. So an array must be laid out as
its collection says, the collection may not ask for chunks or indices beyond bounds that no real cube comes near, and
only the codecs that cubes are written with are used. A stored chunk that claims to hold more than its array's chunks
is an error of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError
from zarr_store.spec import OVERVIEW_FACTOR, CubeSpec

__all__ = ["MOST_CHUNK_BYTES", "check_array", "check_overview", "check_promises", "read_document"]

MOST_CHUNK_BYTES = 256 << 20
"""Largest decoded chunk, bytes; the largest layout has chunks of 13 bands × 512² of 2 bytes, 7 MB."""
_MOST_BYTES = 1 << 20
"""Largest metadata of one array, bytes."""
_MOST_CHUNKS = 1 << 20
"""Largest number of chunks in a shard, as its index is read as a whole, 16 bytes for each."""
_CODECS = frozenset({"bytes", "blosc", "zstd", "crc32c", "sharding_indexed"})
_OVERVIEW_CODECS = frozenset({"bytes", "zstd"})
_ARRAY_CODECS = _CODECS | {"vlen-utf8"}
_MOST_LENGTH = 1 << 20
"""Largest length of an axis that may grow: the dates of a cube."""


def check_array(
    document: Any, where: str, *, shape: tuple[int | None, ...], dtype: str, most: int | None = None
) -> None:
    """Check the metadata of an array that is not a pixel array of a cube: an axis, a map layer, samples, labels.

    Args:
        document: Its metadata, as JSON has them.
        where: The place of the metadata, for people.
        shape: Shape that it must have; None for any length that a cube could have.
        dtype: As Zarr names it.
        most: Bytes of the whole array, where it is read at once.

    Raises:
        IntegrityError: It is unreadable, is another array, or promises more than is needed.
    """
    try:
        stated = tuple(document["shape"])
        outer = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        sharded = [codec for codec in document["codecs"] if codec["name"] == "sharding_indexed"]
        inner = tuple(sharded[0]["configuration"]["chunk_shape"]) if sharded else outer
        codecs = {str(codec["name"]) for codec in _all_codecs(document["codecs"])}
        itemsize = 64 if dtype == "string" else np.dtype(dtype).itemsize
        size = math.prod(inner) * itemsize
        count = math.prod(-(-a // b) for a, b in zip(outer, inner, strict=True))
        whole = math.prod(stated) * itemsize
        form = (document["zarr_format"], document["node_type"], document["chunk_grid"]["name"])
        kind, transformed = document["data_type"], bool(document.get("storage_transformers"))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: unreadable array metadata ({type(error).__name__}: {error}); restore the file, or make it again"
        ) from error
    lengths = zip(stated, shape, strict=True) if len(stated) == len(shape) else ()
    fits = len(stated) == len(shape) and all(
        isinstance(a, int) and (a == b if b is not None else 0 < a <= _MOST_LENGTH) for a, b in lengths
    )
    wrong = [] if fits else [f"shape {stated}, not {tuple('any' if n is None else n for n in shape)}"]
    wrong += [] if kind == dtype else [f"data_type {str(kind)[:80]}, not {dtype}"]
    wrong += [] if form == (3, "array", "regular") and not transformed else [f"it is {form}, not a plain Zarr 3 array"]
    wrong += [f"packed with {', '.join(sorted(codecs - _ARRAY_CODECS))}"] if codecs - _ARRAY_CODECS else []
    if size > max(MOST_CHUNK_BYTES, most or 0) or count > _MOST_CHUNKS:
        wrong.append(f"chunks of {size} bytes, {count} in a shard")
    if most is not None and whole > most:
        wrong.append(f"{whole} bytes in all, more than the {most} that are read at once")
    if wrong:
        raise IntegrityError(
            f"{where} promises what it must not: {'; '.join(wrong)}. Nothing of it was read: it was not made by "
            "terrashard, or was changed since"
        )


def read_document(data: bytes | None, where: str) -> Any:
    """Return the metadata of an array from its zarr.json.

    Raises:
        IntegrityError: They are absent or no JSON.
    """
    try:
        return load_json(data, where, most=_MOST_BYTES)
    except ValueError as error:
        raise IntegrityError(f"{where}: unreadable array metadata ({error}); restore the file") from error


def check_promises(
    data: bytes | Mapping[str, Any] | None, spec: CubeSpec, array: str, where: str, *, any_length: bool = False
) -> None:
    """Check the metadata of one array.

    Args:
        data: Its zarr.json, or what that says.
        spec: What its collection says.
        array: Its name.
        where: The place of the metadata, for people.
        any_length: Whether it may have fewer dates than the collection says, as a cube that grows has in its root.

    Raises:
        IntegrityError: It is absent or unreadable, contradicts the collection, or promises more than any cube needs.
    """
    try:
        document = data if isinstance(data, Mapping) else load_json(data, where, most=_MOST_BYTES)
        outer = document["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = document["codecs"]
        inner = sharding["configuration"]["chunk_shape"]
        codecs = {str(codec["name"]) for codec in _all_codecs(document["codecs"])}
        found = {
            "shape": tuple(document["shape"]),
            "data_type": document["data_type"],
            "shard": tuple(outer),
            "chunk": tuple(inner),
            "zarr_format": document["zarr_format"],
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
        "zarr_format": 3,
    }
    found["shape"] = _grown(found["shape"], expected["shape"], any_length=any_length)
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
            f"{where} promises chunks of {size} bytes, {count} in a shard; at most {MOST_CHUNK_BYTES} bytes and "
            f"{_MOST_CHUNKS} chunks are read"
        )
    if codecs - _CODECS:
        raise IntegrityError(
            f"{where} is packed with {', '.join(sorted(codecs - _CODECS))}; cubes use {', '.join(sorted(_CODECS))} only"
        )


def _grown(found: tuple[Any, ...], expected: tuple[int, ...], *, any_length: bool) -> tuple[Any, ...]:
    """Return a shape with the dates of the collection, where it may have more: while a cube grows, arrays go first."""
    if found and isinstance(found[0], int) and (any_length or found[0] >= expected[0]):
        return (expected[0], *found[1:])
    return found


def check_overview(
    data: bytes | Mapping[str, Any] | None, spec: CubeSpec, where: str, *, any_length: bool = False
) -> None:
    """Check the metadata of the overview of a collection, as `check_promises` does those of its arrays.

    Args:
        data: zarr.json of the overview's array, or what that says.
        spec: What its collection says.
        where: The place of the metadata, for people.
        any_length: As for `check_promises`.

    Raises:
        IntegrityError: As `check_promises`.
    """
    main = spec.array(spec.kind)
    coarse = spec.grid.coarsen(OVERVIEW_FACTOR)
    t, y, x = spec.layout.shard
    chunk = (t, len(spec.bands), y // OVERVIEW_FACTOR, x // OVERVIEW_FACTOR)
    expected: dict[str, Any] = {
        "shape": (len(spec.times), len(spec.bands), *coarse.shape),
        "data_type": main.dtype,
        "chunk": chunk,
        "zarr_format": 3,
    }
    try:
        document = data if isinstance(data, Mapping) else load_json(data, where, most=_MOST_BYTES)
        codecs = {str(codec["name"]) for codec in _all_codecs(document["codecs"])}
        found: dict[str, Any] = {
            "shape": tuple(document["shape"]),
            "data_type": document["data_type"],
            "chunk": tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
            "zarr_format": document["zarr_format"],
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: unreadable array metadata ({type(error).__name__}: {error}); restore the file, or make the cube "
            "again"
        ) from error
    found["shape"] = _grown(found["shape"], expected["shape"], any_length=any_length)
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
