"""Read files and JSON documents from strangers within bounds of bytes and memory.

64 kB of packed `{},` are 64 MB of text and two gigabytes of Python objects. So what a document would become is
estimated from its bytes before an object is made of them. And a path may be a pipe that never ends, or a device.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

__all__ = ["MOST_JSON_BYTES", "MOST_METADATA", "check_weight", "load_json", "read_file", "weight_of"]

MOST_JSON_BYTES = 64 << 20
"""Largest JSON document of a cube, store, map or run, bytes; the item table of 4,000 scenes has 3 MB."""
MOST_METADATA = 256 << 20
"""Largest JSON document in a store, bytes; the plan that a cube keeps is one."""
_PER_BYTE = 12
"""Bytes of Python objects allowed for each byte of the largest document of a kind; STAC items take 7."""

_COSTS = {b"[": 108, b"{": 108, b",": 36, b":": 100, b'"': 14}
"""Bytes that each character costs in CPython: the value that it begins, its place in a container, a text's head."""
_STRUCTURE = b'[{,:"'
_OTHERS = bytes(set(range(256)) - set(_STRUCTURE))
_AT_ONCE = 1 << 20


def weight_of(data: bytes) -> int:
    """Return the bytes of memory that the objects of a JSON document may take, from its text alone.

    >>> weight_of(b'[{},{},{}]') > 20 * len(b'[{},{},{}]')
    True
    """
    return sum(data.count(mark) * cost for mark, cost in _COSTS.items()) + len(data) + 64


def check_weight(data: bytes, where: str, most: int) -> None:
    """Refuse a JSON document whose objects would take more than `most` bytes, before one is made.

    Raises:
        InvalidInput: It would.
    """
    if weight_of(data) <= most or _weight_outside_texts(data) <= most:
        return
    raise InvalidInput(
        f"{where}: {len(data)} bytes of JSON would take more than the {most >> 20} MiB of memory that such a "
        "document may; nothing of it was read"
    )


def _weight_outside_texts(data: bytes) -> int:
    """Return the weight with the contents of strings counted as text only; needs one more copy of the text."""
    # escaped quotes end no text; pairs of backslashes are taken out first, as they escape nothing behind them
    marks = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS), np.uint8)
    weight, within = len(data) + 64, 0
    costs = np.zeros(256, np.int64)
    for mark, cost in _COSTS.items():
        costs[mark[0]] = cost
    for start in range(0, len(marks), _AT_ONCE):
        piece = marks[start : start + _AT_ONCE]
        quotes = piece == ord('"')
        inside = (np.cumsum(quotes, dtype=np.int32) + within) % 2 == 1
        weight += int(costs[piece[quotes | ~inside]].sum())
        within = (within + int(quotes.sum())) % 2
    return weight


def load_json(data: bytes | None, where: str, *, most: int = MOST_JSON_BYTES) -> Any:
    """Return the value of a JSON document, which is parsed only if it fits into the bounds.

    Args:
        data: The document; none is an empty one, which is not JSON.
        where: Its place, for the error.
        most: Bytes that a document of its kind may have; objects may take twelve times that.

    Raises:
        InvalidInput: It is too large, or nested too deeply.
        ValueError: It is not JSON, or not UTF-8.
    """
    data = data or b""
    if len(data) > most:
        raise InvalidInput(f"{where}: {len(data)} bytes; at most {most} bytes of JSON are read")
    check_weight(data, where, most * _PER_BYTE)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise InvalidInput(f"{where}: JSON that is nested too deeply; nothing of it was read") from error


def read_file(path: str | os.PathLike[str], most: int, where: str = "") -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: Path of the file; a link is followed.
        most: Bytes that it may have.
        where: Name of the file in messages; its path if not given.

    Raises:
        InvalidInput: It is larger.
        OSError: It cannot be read, or is a pipe, a device or a folder.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise InvalidInput(f"{where or Path(path)} has {max(size, len(data))} bytes; at most {most} bytes are read")
    return data
