"""A plan as a file: JSON that is written and read piece by piece, as a plan of a large region has millions of lines.

The file is one JSON document with sorted keys. Its three long parts, item tables, scenes and tasks, have one line for
each entry. So a writer never holds the text, and a reader holds one line. Documents that are laid out in another way
(by earlier releases, or by other programs) are read as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from zarr_store.bounded import load_json, weight_of
from zarr_store.errors import InvalidInput

__all__ = ["PlanFile", "is_plan_file", "pieces", "stated_digest"]

_TABLES, _TASKS = ("items", "scenes"), "tasks"
_MOST_BYTES = 256 << 20
"""Largest document, in bytes, that is read as a whole; of one that is read by lines, all but the three long parts."""
_MOST_STREAMED = 2 << 30
"""Largest plan file, in bytes. The plan of a million shards has about 180 MB."""
_MOST_LINE = 16 << 20
"""Largest line, in bytes: a scene of a hundred assets has about 50 kB."""
_FREE_WEIGHT = 256 << 20
"""Bytes of memory that the entries of a table may take, whatever their text has; beyond it they are bounded by it."""
_MOST_GROWTH = 16
"""Bytes of memory for each byte of a table; the scenes and items of real plans take up to 11."""
_TABLE_WEIGHT = 300
"""Bytes of memory that an empty table takes: its name, its list and their place."""
_PIECE = 1 << 20
_DIGEST = re.compile(rb'^ "digest": "([0-9a-f]*)",?$')

Opener = Callable[[], BinaryIO]


def pieces(document: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the file of a plan in pieces of about a megabyte.

    Args:
        document: The plan; the values of "items" and "scenes" are name → iterable of entries, that of "tasks" is an
            iterable of entries, and all other values are JSON.
    """
    buffer, size = [], 0
    for line in _lines(document):
        data = line.encode()
        buffer.append(data)
        size += len(data)
        if size >= _PIECE:
            yield b"".join(buffer)
            buffer, size = [], 0
    yield b"".join(buffer)


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    before = "{"
    for key in sorted(document):
        yield f'{before}\n "{key}": '
        before = ","
        if key in _TABLES:
            opening = "{"
            for name in sorted(document[key]):
                yield f"{opening}\n  {json.dumps(name)}: ["
                yield from _entries(document[key][name], "   ")
                yield "\n  ]"
                opening = ","
            yield "\n }" if opening == "," else "{}"
        elif key == _TASKS:
            yield "["
            yield from _entries(document[key], "  ")
            yield "\n ]"
        else:
            yield _text(document[key], indent=1).replace("\n", "\n ")
    yield "\n}"


def _entries(entries: Iterable[Any], indent: str) -> Iterator[str]:
    before = ""
    for entry in entries:
        yield f"{before}\n{indent}{_text(entry, separators=(',', ':'))}"
        before = ","


def _text(value: Any, **how: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, **how)


class _OtherLayout(Exception):
    """The document is not laid out as `pieces` does it."""


class PlanFile:
    """A plan file that is open for reading.

    Args:
        opener: Opens the file from its beginning: to read it as a whole, then each long part from its place.
        where: Name of the file in messages.

    Attributes:
        head: All of the document but its three long parts.

    Raises:
        InvalidInput: The file is too large.
        ValueError: It is not JSON.
    """

    def __init__(self, opener: Opener, where: str) -> None:
        self._opener, self._where = opener, where
        self._begins: dict[str, int] = {}
        self._whole: dict[str, Any] | None = None
        rest = bytearray()
        try:
            for part, line in self._scan():
                if part is None:
                    rest += line
                    if len(rest) > _MOST_BYTES:
                        raise InvalidInput(f"{where} has more than {_MOST_BYTES} bytes beside its tables")
            self.head = load_json(bytes(rest), where, most=_MOST_BYTES)
            if isinstance(self.head, dict) and any(part in self.head for part in (*_TABLES, _TASKS)):
                raise _OtherLayout
        except _OtherLayout:
            with opener() as stream:
                data = stream.read(_MOST_BYTES + 1)
            self.head = self._whole = load_json(data, where, most=_MOST_BYTES)

    def tables(self, part: str, make: Callable[[Any], Any]) -> dict[str, list[Any]]:
        """Read "items" or "scenes": name → what `make` makes of each entry.

        Raises:
            InvalidInput: The objects of its entries would take far more memory than their text.
        """
        if self._whole is not None:
            return {name: [make(entry) for entry in entries] for name, entries in self._whole[part].items()}
        found: dict[str, list[Any]] = {}
        if part not in self._begins:
            raise KeyError(part)
        size = weight = 0
        for at, line in self._scan(part):
            if at is not None and at[0] == part:
                rows = found.setdefault(at[1], [])
                size += len(line) + len(at[1]) * (not line)
                weight += weight_of(line) if line else _TABLE_WEIGHT + len(at[1])
                if weight > max(_FREE_WEIGHT, _MOST_GROWTH * size):
                    raise InvalidInput(
                        f'{self._where}: {size} bytes of "{part}" would take more memory than the tables of a plan '
                        "may; plan again"
                    )
                if line:
                    rows.append(make(self._entry(line)))
        return found

    def tasks(self) -> Iterator[Any]:
        """Yield the entries of "tasks"."""
        if self._whole is not None:
            yield from self._whole[_TASKS]
            return
        if _TASKS not in self._begins:
            raise KeyError(_TASKS)
        for at, line in self._scan(_TASKS):
            if at is not None and at[0] == _TASKS and line:
                yield self._entry(line)

    def _entry(self, line: bytes) -> Any:
        return load_json(line, self._where, most=_MOST_LINE)

    def _scan(self, only: str = "") -> Iterator[tuple[tuple[str, str] | None, bytes]]:
        """Yield each line with the part and table that it belongs to, or None; the beginning of a table is empty.

        Args:
            only: The long part that is wanted, once the whole file was scanned; empty for all.
        """
        part, name, size = "", "", 0
        with self._opener() as stream:
            if only:
                _skip(stream, self._begins[only])
            while line := stream.readline(_MOST_LINE + 1):
                size += len(line)
                if size > _MOST_STREAMED:
                    raise InvalidInput(f"{self._where} has more than the {_MOST_STREAMED} bytes that a plan may have")
                if len(line) > _MOST_LINE:
                    raise _OtherLayout
                bare = line.rstrip(b"\n")
                if only and not part and _begun(bare) != only:
                    if size > len(line):
                        return  # the part has ended
                    raise InvalidInput(f"{self._where} was replaced while it was read; read it again")
                if not part:
                    part = _begun(bare)
                    if part and not only:
                        if part in self._begins:
                            raise _OtherLayout
                        self._begins[part] = size - len(line)
                    if part == _TASKS:
                        yield (part, name), b""
                    elif not part:
                        yield None, line
                elif part in _TABLES and not name:
                    if bare.rstrip(b",") == b" }":
                        part = ""
                    elif bare.startswith(b'  "') and bare.endswith(b": ["):
                        name = str(json.loads(bare[: -len(b": [")]))
                        yield (part, name), b""
                    else:
                        raise _OtherLayout
                elif bare.rstrip(b",") == (b" ]" if part == _TASKS else b"  ]"):
                    part, name = "" if part == _TASKS else part, ""
                elif bare.lstrip(b" ")[:1] == b"{" and bare.rstrip(b",")[-1:] == b"}":
                    yield (part, name), bare.rstrip(b",").strip()
                else:
                    raise _OtherLayout
        if part:
            raise _OtherLayout  # it ends in the middle; reading it as a whole reports that


def _skip(stream: BinaryIO, count: int) -> None:
    """Move a stream that is at its beginning on by some bytes."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (piece := stream.read(min(count, _PIECE))):
        count -= len(piece)


def _begun(line: bytes) -> str:
    """Return the long part that a line begins; empty for none."""
    if line == b' "tasks": [':
        return _TASKS
    return next((part for part in _TABLES if line == f' "{part}": {{'.encode()), "")


def is_plan_file(stream: BinaryIO) -> bool:
    """Return whether a file is a plan that is laid out as `pieces` does it."""
    return any(line == b' "type": "terrashard-plan",\n' for line in iter(lambda: stream.readline(_MOST_LINE), b""))


def stated_digest(stream: BinaryIO) -> str | None:
    """Read the digest that a plan file states, which is in one of its first lines; None where there is none."""
    while line := stream.readline(_MOST_LINE):
        if found := _DIGEST.match(line.rstrip(b"\n")):
            return found[1].decode()
        if _begun(line.rstrip(b"\n")):
            return None
    return None
