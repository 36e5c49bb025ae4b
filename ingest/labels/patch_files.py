"""`list_patches` lists the images of a folder with their classes and places, and what it passes over.

Nothing is left out in silence: files of other kinds, folders without images, images that a table does not name, and
rows of coordinates.csv that match no image are counted and named. A row that could mean two images is an error.
"""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingest.labels.patch import PICTURES, RASTERS
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput, NothingFound

__all__ = ["Listed", "Listing", "list_images", "list_patches", "read_csv"]

_MOST_TABLE = 64 << 20
"""Largest size of labels.csv or coordinates.csv in bytes; a million files take about 40 MB."""
_NAMED = 8
"""Largest number of things that a line names."""
_WITHOUT_COLUMN = "values without a column"
_LABELS, _PLACES = "labels.csv", "coordinates.csv"


@dataclass(frozen=True)
class Listed:
    """One image file, the indices of its classes, and its place in degrees where a table has it (else nan)."""

    path: Path
    name: str
    classes: tuple[int, ...]
    longitude: float = math.nan
    latitude: float = math.nan


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        classes: Names, by class index.
        images: The images, in a fixed order.
        several: Whether an image may have several classes.
        passed_over: One line for each kind of input that is not used, with its number and names.
    """

    classes: tuple[str, ...]
    images: tuple[Listed, ...]
    several: bool
    passed_over: tuple[str, ...]


def list_patches(folder: Path) -> Listing:
    """List class names and image files in a fixed order; open no image.

    Raises:
        InvalidInput: The path is not a folder, or a table is malformed or ambiguous; the message names file and line.
        NothingFound: The folder holds no image.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder: expected one folder per class with images in it")
    table = folder / _LABELS
    several = table.is_file()
    classes, found, passed_over = _from_table(table) if several else _from_folders(folder)
    if not found:
        unused = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise NothingFound(
            f"{folder} holds no image: expected folders named as classes with "
            f"{', '.join((*PICTURES, *RASTERS))} files, or a labels.csv with columns file, labels{unused}"
        )
    placed, unmatched = _place(folder / _PLACES, found)
    return Listing(classes, tuple(placed), several, (*passed_over, *unmatched))


def list_images(folder: Path) -> tuple[tuple[Listed, ...], tuple[str, ...]]:
    """List all images below a folder without classes, by path, and the rows of coordinates.csv that match none.

    Raises:
        InvalidInput: The path is not a folder, or coordinates.csv is malformed or ambiguous.
        NothingFound: The folder holds no image.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder: expected a folder with images in it")
    found = [Listed(path, path.relative_to(folder).as_posix(), ()) for path in _images_below(folder)]
    if not found:
        raise NothingFound(f"{folder} holds no image: expected {', '.join((*PICTURES, *RASTERS))} files")
    placed, unmatched = _place(folder / _PLACES, found)
    return tuple(placed), tuple(unmatched)


def _from_folders(folder: Path) -> tuple[tuple[str, ...], list[Listed], list[str]]:
    found: list[Listed] = []
    names: dict[str, str] = {}
    empty: list[str] = []
    others: list[str] = []
    inner: list[str] = []
    for entry in _entries(folder):
        if not entry.is_dir():
            others += [entry.name] if entry.name != _PLACES else []
            continue
        if entry.name.startswith("_"):
            empty.append(entry.name)
            continue
        within = list(_entries(entry))
        files = [path for path in within if _is_image(path)]
        inner += [f"{entry.name}/{path.name}" for path in within if path.is_dir()]
        others += [f"{entry.name}/{path.name}" for path in within if not path.is_dir() and not _is_image(path)]
        if not files:
            empty.append(entry.name)
            continue
        name = _class_name(entry.name)
        if name in names:
            raise InvalidInput(
                f"{folder}: the folders {names[name]!r} and {entry.name!r} are both of class {name!r}; join or rename "
                "them"
            )
        names[name] = entry.name
        found += [Listed(path, f"{entry.name}/{path.name}", (len(names) - 1,)) for path in files]
    lines = [
        _line(others, "file that is no image in the folder of a class", "files that are no images in a class folder"),
        _line(empty, "folder without images, which makes no class", "folders without images, which make no classes"),
        _line(inner, "folder inside the folder of a class", "folders inside folders of classes"),
    ]
    return tuple(names), found, [line for line in lines if line]


def _from_table(table: Path) -> tuple[tuple[str, ...], list[Listed], list[str]]:
    rows = read_csv(table, ("file", "labels"))
    labels = [[_class_name(text) for text in row["labels"].split(";") if text.strip()] for _, row in rows]
    names = tuple(sorted({name for row in labels for name in row}))
    if not names:
        raise InvalidInput(f"{table} names no class: expected rows such as a.jpg,Forest or a.jpg,Forest;River")
    found: list[Listed] = []
    lines: dict[Path, int] = {}
    for (line, row), own in zip(rows, labels, strict=True):
        path = table.parent / row["file"]
        if not path.resolve().is_relative_to(table.parent.resolve()):
            raise InvalidInput(f"{table} line {line}: {row['file']!r} lies outside {table.parent}")
        plain = Path(os.path.normpath(path))
        if plain in lines:
            raise InvalidInput(
                f"{table} line {line}: {row['file']!r} was already named in line {lines[plain]}; name each image once, "
                "with all its labels"
            )
        lines[plain] = line
        found.append(Listed(path, row["file"], tuple(names.index(name) for name in own)))
    absent = sorted(
        str(path.relative_to(table.parent))
        for path in _images_below(table.parent)
        if Path(os.path.normpath(path)) not in lines
    )
    line_of = _line(absent, f"image that {_LABELS} does not name", f"images that {_LABELS} does not name")
    return names, found, [line_of] if line_of else []


def _place(table: Path, found: Sequence[Listed]) -> tuple[list[Listed], list[str]]:
    """Give the images their coordinates from a table, by path, or by a base name that only one image has."""
    if not table.is_file():
        return list(found), []
    by_name = {_plain(image.name): number for number, image in enumerate(found)}
    by_base: dict[str, list[int]] = {}
    for name, number in by_name.items():
        by_base.setdefault(name.rpartition("/")[2], []).append(number)
    placed, lines, unmatched = list(found), dict[int, int](), list[str]()
    for line, row in read_csv(table, ("file", "latitude", "longitude")):
        longitude, latitude = _degrees(table, line, row)
        numbers = _matching(_plain(row["file"]), by_name, by_base)
        if not numbers:
            unmatched.append(row["file"] or f"line {line}")
            continue
        if len(numbers) > 1:
            raise InvalidInput(
                f"{table} line {line}: {row['file']!r} could be {' or '.join(found[n].name for n in numbers[:4])}; "
                "write the folder before the name"
            )
        number = numbers[0]
        before = placed[number]
        if number in lines and (before.longitude, before.latitude) != (longitude, latitude):
            raise InvalidInput(
                f"{table}: lines {lines[number]} and {line} give {before.name} two places; remove one of them"
            )
        lines[number] = line
        placed[number] = replace(before, longitude=longitude, latitude=latitude)
    more = _line(unmatched, f"row of {_PLACES} that matches no image", f"rows of {_PLACES} that match no image")
    return placed, [more] if more else []


def _matching(name: str, by_name: dict[str, int], by_base: dict[str, list[int]]) -> list[int]:
    """Return the images that a row may mean: that of its path, of an inner part of its path, or of its base name."""
    parts = name.split("/")
    for start in range(len(parts)):
        exact = by_name.get("/".join(parts[start:]))
        if exact is not None:
            return [exact]
    return by_base.get(name, [])


def _degrees(table: Path, line: int, row: dict[str, str]) -> tuple[float, float]:
    try:
        longitude, latitude = float(row["longitude"]), float(row["latitude"])
    except ValueError as error:
        raise InvalidInput(f"{table} line {line}: latitude and longitude must be numbers ({error})") from error
    if not (-180 <= longitude <= 180 and -90 <= latitude <= 90):
        raise InvalidInput(
            f"{table} line {line}: expected degrees, got latitude {latitude}, longitude {longitude} (swapped?)"
        )
    return longitude, latitude


def read_csv(table: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a table with a header as (number of the line, values by column).

    Raises:
        InvalidInput: It cannot be read, or lacks one of the columns.
    """
    try:
        with io.StringIO(read_file(table, _MOST_TABLE).decode("utf-8-sig"), newline="") as file:
            reader = csv.DictReader(file, restkey=_WITHOUT_COLUMN)
            header = reader.fieldnames or []
            if [name for name in columns if header.count(name) != 1]:
                raise InvalidInput(
                    f"{table}: expected columns {', '.join(columns)}, got {', '.join(header or ['nothing'])}"
                )
            rows: list[tuple[int, dict[str, str]]] = []
            for row in reader:
                more = row.pop(_WITHOUT_COLUMN, None) or []
                if any(value.strip() for value in more):
                    raise InvalidInput(
                        f"{table} line {reader.line_num}: expected {len(header)} values, as the header has columns, "
                        f"got {len(header) + len(more)}; write numbers with a point, and quote a value with commas"
                    )
                rows.append((reader.line_num, {key: value or "" for key, value in row.items()}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{table} cannot be read as CSV: {error}") from error
    return rows


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the entries of a folder in order of name, without hidden ones (whose names begin with a dot)."""
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _images_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if _is_image(Path(name)) and not name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (*PICTURES, *RASTERS) and not path.is_dir()


def _class_name(name: str) -> str:
    """Return the name of a class as it is compared: without spaces around it, and with composed letters."""
    return unicodedata.normalize("NFC", name.strip())


def _plain(name: str) -> str:
    """Write a path of a table with slashes, without ./ in front, and with composed letters."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").removeprefix("./"))


def _line(names: Sequence[str], one: str, many: str) -> str:
    """Return one line that counts and names what was passed over; empty if there is nothing."""
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {one if len(names) == 1 else many}: {', '.join(names[:_NAMED])}{more}"
