"""`import_patches` makes a sample store of labelled images in a folder (`terrashard samples DIR STORE`).

    DIR/Forest/Forest_1.jpg …     one folder per class: each image has that class (the layout of EuroSAT)
    DIR/labels.csv                or a table, where images have several classes: columns file, labels ("Forest;River")
    DIR/coordinates.csv           columns file, latitude, longitude; not needed for GeoTIFFs with a georeference

Images are JPEG or PNG in RGB or grey, or GeoTIFF with any bands; all have one size, type and number of bands. Every
image is decoded before anything is written, and the error names those that cannot be decoded.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rasterio.warp import transform as warp_points

from ingest.raster.faults import describe_fault, is_file_fault
from ingest.raster.opening import open_geotiff
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.regular import open_regular
from zarr_store.samples import Sample, SampleSpec, write_samples

__all__ = ["EUROSAT_BANDS", "ImportReport", "Listed", "import_patches", "list_patches", "read_patch"]

EUROSAT_BANDS = ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir09", "cirrus",
                 "swir16", "swir22", "nir08")  # fmt: skip
"""Names of the 13 bands of EuroSAT's GeoTIFFs, whose last band is B8A (Helber et al. 2019, arXiv:1709.00029)."""

_PICTURES, _RASTERS = (".jpg", ".jpeg", ".png"), (".tif", ".tiff")
_MOST_PIXELS = 1 << 24
"""Largest number of pixels of an image."""
_MOST_BANDS = 512
"""Largest number of bands of a GeoTIFF."""
_MOST_DECODED = 256 << 20
"""Largest number of bytes of a decoded GeoTIFF."""
_MOST_TABLE = 64 << 20
"""Largest size of labels.csv or coordinates.csv in bytes; a million files take about 40 MB."""
_AT_ONCE = 256
"""Number of images that are decoded ahead and held in memory."""
_NAMED = 8
"""Largest number of bad images that an error names."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Listed:
    """One image file, the indices of its classes, and its place in degrees where a table has it (else nan)."""

    path: Path
    name: str
    classes: tuple[int, ...]
    longitude: float = math.nan
    latitude: float = math.nan


@dataclass(frozen=True)
class ImportReport:
    """The result of an import: samples by class, samples without a place, files left out, and the form of the store."""

    store: str
    samples: int
    classes: dict[str, int]
    bands: tuple[str, ...]
    size: tuple[int, int]
    without_place: int
    left_out: tuple[str, ...]
    digest: str


def list_patches(folder: Path) -> tuple[tuple[str, ...], list[Listed], bool]:
    """List class names, image files in a fixed order, and whether an image may have several classes; open no image.

    Raises:
        InvalidInput: The path is not a folder, or a table is malformed; the message names file and line.
        NothingFound: The folder holds no image.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder: expected one folder per class with images in it")
    places = _read_places(folder / "coordinates.csv")
    table = folder / "labels.csv"
    classes, found = _from_table(table) if table.is_file() else _from_folders(folder)
    if not found:
        raise NothingFound(
            f"{folder} holds no image: expected folders named as classes with "
            f"{', '.join((*_PICTURES, *_RASTERS))} files, or a labels.csv with columns file, labels"
        )
    listed = [
        Listed(path, name, codes, *places.get(name, places.get(path.name, (math.nan, math.nan))))
        for path, name, codes in found
    ]
    return classes, listed, table.is_file()


def _from_folders(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, str, tuple[int, ...]]]]:
    found: list[tuple[Path, str, tuple[int, ...]]] = []
    names: list[str] = []
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))):
        files = sorted(p for p in inner.iterdir() if p.is_file() and p.suffix.lower() in (*_PICTURES, *_RASTERS))
        if files:
            names.append(inner.name)
            found += [(path, f"{inner.name}/{path.name}", (len(names) - 1,)) for path in files]
    return tuple(names), found


def _from_table(table: Path) -> tuple[tuple[str, ...], list[tuple[Path, str, tuple[int, ...]]]]:
    rows = _read_table(table, ("file", "labels"))
    labels = [[text.strip() for text in row["labels"].split(";") if text.strip()] for _, row in rows]
    names = tuple(sorted({name for row in labels for name in row}))
    found = []
    for (line, row), own in zip(rows, labels, strict=True):
        path = table.parent / row["file"]
        if not path.resolve().is_relative_to(table.parent.resolve()):
            raise InvalidInput(f"{table} line {line}: {row['file']!r} lies outside {table.parent}")
        found.append((path, row["file"], tuple(names.index(name) for name in own)))
    return names, found


def _read_places(table: Path) -> dict[str, tuple[float, float]]:
    if not table.is_file():
        return {}
    places = {}
    for line, row in _read_table(table, ("file", "latitude", "longitude")):
        try:
            longitude, latitude = float(row["longitude"]), float(row["latitude"])
        except ValueError as error:
            raise InvalidInput(f"{table} line {line}: latitude and longitude must be numbers ({error})") from error
        if not (-180 <= longitude <= 180 and -90 <= latitude <= 90):
            raise InvalidInput(
                f"{table} line {line}: expected degrees, got latitude {latitude}, longitude {longitude} (swapped?)"
            )
        places[row["file"]] = (longitude, latitude)
    return places


def _read_table(table: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    try:
        with io.StringIO(read_file(table, _MOST_TABLE).decode("utf-8-sig"), newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in columns if name not in (reader.fieldnames or ())]
            if lacking:
                raise InvalidInput(
                    f"{table}: expected columns {', '.join(columns)}, got {', '.join(reader.fieldnames or ['nothing'])}"
                )
            rows = [(number, {key: value or "" for key, value in row.items() if isinstance(value, str | None)})
                    for number, row in enumerate(reader, 2)]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{table} cannot be read as CSV: {error}") from error
    return rows


def read_patch(path: Path) -> tuple[npt.NDArray[Any], float, float]:
    """Decode one image into an array (band, y, x) and its centre in degrees (nan without a georeference).

    Raises:
        InvalidInput: The file cannot be decoded, or is not of a supported kind; the message names it.
    """
    try:
        return _read_raster(path) if path.suffix.lower() in _RASTERS else (_read_picture(path), math.nan, math.nan)
    except InvalidInput:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError | SyntaxError) and not is_file_fault(error):
            raise
        raise InvalidInput(f"{path}: {describe_fault(error)[:160]}") from error


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    with open_regular(path) as file, Image.open(file, formats=("JPEG", "PNG")) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_PIXELS} pixels, got {picture.width} × {picture.height}; cut it "
                "into patches"
            )
        if picture.mode not in ("RGB", "L"):
            raise InvalidInput(f"{path}: expected RGB or grey, got colours of mode {picture.mode}; convert it")
        values = np.asarray(picture)
    return np.ascontiguousarray(np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0))


def _read_raster(path: Path) -> tuple[npt.NDArray[Any], float, float]:
    with open_geotiff(path) as source:
        if source.width * source.height > _MOST_PIXELS or source.count > _MOST_BANDS:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_BANDS} bands of {_MOST_PIXELS} pixels, got {source.count} bands of "
                f"{source.width} × {source.height}; cut it into patches"
            )
        size = source.width * source.height * sum(np.dtype(kind).itemsize for kind in source.dtypes)
        if size > _MOST_DECODED:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_DECODED >> 20} MiB once decoded, got {size >> 20} MiB; cut it into "
                "patches"
            )
        values = source.read()
        if source.crs is None:
            return values, math.nan, math.nan
        x, y = source.transform @ (source.width / 2, source.height / 2)
        (longitude,), (latitude,) = warp_points(source.crs, "EPSG:4326", [x], [y])
    return values, float(longitude), float(latitude)


def import_patches(
    folder: Path,
    store: str | Path,
    *,
    bands: Sequence[str] = (),
    skip_bad: bool = False,
    threads: int = 2,
    on_progress: OnProgress | None = None,
) -> ImportReport:
    """Import a folder of labelled images.

    Args:
        folder: Folder of the form that the module describes.
        store: Path of the store; nothing may be there.
        bands: Names of the bands in order; none for red, green, blue (3 bands), EuroSAT's names (13), else band1, ….
        skip_bad: Leave out files that cannot be used, in place of refusing all.
        threads: Number of images that are decoded at the same time.
        on_progress: Called with (images done, all images), where each image counts twice: once checked, once written.

    Raises:
        InvalidInput: A file cannot be decoded, or differs in form from the others; nothing was written.
        NothingFound: The folder holds no image.
    """
    classes, listed, several = list_patches(folder)
    several = several and any(len(item.classes) != 1 for item in listed)  # a table of single names is one class each
    total = 2 * len(listed)
    forms: dict[tuple[tuple[int, ...], str], int] = {}
    bad: list[str] = []
    checked: list[tuple[Listed, tuple[tuple[int, ...], str]]] = []
    for number, (item, found) in enumerate(_decode(listed, threads)):
        if isinstance(found, InvalidInput):
            bad.append(str(found))
        else:
            form = (found[0].shape, str(found[0].dtype))
            forms[form] = forms.get(form, 0) + 1
            checked.append((item, form))
        if on_progress and number % 64 == 0:
            on_progress(number, total)
    common = max(forms, key=lambda form: forms[form]) if forms else ((0, 0, 0), "none")
    expected = f"expected {common[1]} of shape {common[0]}, as most images have"
    bad += [f"{item.path}: {expected}, got {form[1]} of {form[0]}" for item, form in checked if form != common]
    good = [item for item, form in checked if form == common]
    if bad and (not skip_bad or not good):
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InvalidInput(
            f"{len(bad)} of {len(listed)} images cannot be used: {'; '.join(bad[:_NAMED])}{more}. Nothing was written; "
            "repair or remove them, or leave them out with --skip-bad"
        )
    (count, height, width), dtype = common
    spec = SampleSpec(
        len(good), _band_names(bands, count), (height, width), dtype, classes, "several" if several else "one"
    )
    by_class = np.zeros(len(classes), int)
    unplaced = 0

    def samples() -> Iterator[Sample]:
        nonlocal unplaced
        for number, (item, found) in enumerate(_decode(good, threads)):
            if isinstance(found, InvalidInput):
                raise InvalidInput(f"{found} (the file changed during the import; nothing was written)")
            image, longitude, latitude = found
            place = (item.longitude, item.latitude) if math.isfinite(item.longitude) else (longitude, latitude)
            unplaced += not math.isfinite(place[0])
            by_class[list(item.classes)] += 1
            label = np.uint8(item.classes[0]) if not several else np.isin(np.arange(len(classes)), item.classes)
            yield Sample(image, np.asarray(label, np.uint8), *place, item.name)
            if on_progress and number % 64 == 0:
                on_progress(len(listed) + number, total)

    digest = write_samples(store, spec, samples())
    if on_progress:
        on_progress(total, total)
    return ImportReport(
        str(store), len(good), dict(zip(classes, by_class.tolist(), strict=True)), spec.bands, spec.size, unplaced,
        tuple(bad), digest,
    )  # fmt: skip


def _band_names(bands: Sequence[str], count: int) -> tuple[str, ...]:
    if bands:
        if len(bands) != count:
            raise InvalidInput(
                f"{len(bands)} names in --bands, but the images have {count} bands; give one name per band"
            )
        return tuple(bands)
    if count == 3:
        return ("red", "green", "blue")
    return EUROSAT_BANDS if count == len(EUROSAT_BANDS) else tuple(f"band{i + 1}" for i in range(count))


def _decode(
    listed: Sequence[Listed], threads: int
) -> Iterator[tuple[Listed, tuple[npt.NDArray[Any], float, float] | InvalidInput]]:
    def attempt(item: Listed) -> tuple[npt.NDArray[Any], float, float] | InvalidInput:
        try:
            return read_patch(item.path)
        except InvalidInput as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, len(listed), _AT_ONCE):
            part = listed[start : start + _AT_ONCE]
            yield from zip(part, pool.map(attempt, part), strict=True)
