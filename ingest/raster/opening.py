"""Open one file with GDAL: under a random name, with one driver, and with no other file in reach.

GDAL never gets the path or the address of a file, but an opener that answers to exactly one name. So GDAL finds nothing
beside the file: no overviews, masks, world files or metadata of other programs. And no name inside the file leads to
another file. Metadata that point to overviews in another file are refused before GDAL follows them.
"""

from __future__ import annotations

import io
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import rasterio
from rasterio.errors import NotGeoreferencedWarning

from ingest.raster.drivers import TIFF_MAGIC, limit_raster_drivers
from ingest.raster.faults import describe_fault, is_file_fault
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

__all__ = ["GDAL_OPTIONS", "ForeignOverviewsError", "open_geotiff", "open_raster"]

GDAL_OPTIONS: Mapping[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no guessing of sidecar files
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_CACHEMAX": 128,  # MB per process; blocks of one window, not more
    "GTIFF_IGNORE_READ_ERRORS": "NO",
}
"""Options of every open and read. None is about networks: GDAL gets files and bytes, never an address."""
_MOST_SIDECAR = 16 << 20
"""Largest size of a file of metadata beside a raster, in bytes."""
Handle = io.RawIOBase | BinaryIO


class ForeignOverviewsError(InvalidInput):
    """A raster whose metadata say that its overviews are in another file."""


@contextmanager
def open_raster(
    open_file: Callable[[], Handle], driver: str, *, georeference: bytes | None = None
) -> Iterator[rasterio.io.DatasetReader]:
    """Open a raster file with one driver.

    Args:
        open_file: Opens a fresh handle of the file; GDAL opens it several times.
        driver: GDAL's name of the only driver that may read it.
        georeference: Sidecar that GDAL finds beside the file; `ingest.raster.sidecar` makes it.

    Raises:
        RasterioError: GDAL cannot read the file.
        ForeignOverviewsError: The file names another one as its overviews.
    """
    limit_raster_drivers()
    name = f"{uuid.uuid4().hex}/raster"
    options = dict(GDAL_OPTIONS)
    if driver == "JP2OpenJPEG":  # by default it decodes in threads, whose errors are lost: their tiles become zeros
        options["GDAL_NUM_THREADS"] = 1
    if georeference is not None:
        options |= {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE", "GDAL_PAM_ENABLED": "YES"}

    def opener(path: str, mode: str = "rb") -> Any:
        if path == name and mode.startswith("r") and "+" not in mode:
            return open_file()
        if path == f"{name}.aux.xml" and georeference is not None and mode.startswith("r") and "+" not in mode:
            return io.BytesIO(georeference)
        raise FileNotFoundError(path)

    with rasterio.Env(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # callers that need a georeference raise an error
            dataset = rasterio.open(name, driver=driver, sharing=False, opener=opener)
        with dataset:
            _refuse_foreign_overviews(dataset)
            yield dataset


@contextmanager
def open_geotiff(path: Path) -> Iterator[rasterio.io.DatasetReader]:
    """Open a local GeoTIFF that a user named.

    Raises:
        InvalidInput: The file is absent, no regular file or no GeoTIFF, or cannot be read, also inside the block.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) not in TIFF_MAGIC:
                raise InvalidInput(f"{path} is not a GeoTIFF; convert it with gdal_translate")
        with open_raster(lambda: open_regular(path), "GTiff") as dataset:
            _refuse_sidecars(path, dataset)
            yield dataset
    except Exception as error:
        if is_file_fault(error):
            text = describe_fault(error)
            raise InvalidInput(text if str(path) in text else f"{path} cannot be read as a GeoTIFF: {text}") from error
        if isinstance(error, OSError):
            raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
        raise


def _refuse_sidecars(path: Path, dataset: rasterio.io.DatasetReader) -> None:
    """Refuse a file whose meaning is partly in files beside it, which are not read.

    Raises:
        InvalidInput: Its mask, or its nodata value, scale or unit, is beside it and not in it.
    """
    mask, about = (path.with_name(path.name + suffix) for suffix in (".msk", ".aux.xml"))
    if mask.is_file():
        raise InvalidInput(
            f"{path} has its mask in {mask.name}, and only masks inside a file are read: write it into the file with "
            "gdal_translate --config GDAL_TIFF_INTERNAL_MASK YES, or remove it if it says nothing"
        )
    if not about.is_file():
        return
    text = read_file(about, _MOST_SIDECAR)
    lacking = {
        b"<NoDataValue": all(value is None for value in dataset.nodatavals),
        b"<Scale>": all(scale == 1 for scale in dataset.scales),
        b"<Offset>": all(offset == 0 for offset in dataset.offsets),
        b"<UnitType>": not any(dataset.units),
    }
    stated = [tag.decode().strip("<>") for tag, absent in lacking.items() if absent and tag in text]
    if stated:
        raise InvalidInput(
            f"{about} states {', '.join(stated)}, which {path.name} does not, and only what is inside a file is read: "
            f"write it into the file with gdal_translate {path.name} OUT.tif, and remove {about.name}"
        )


def _refuse_foreign_overviews(dataset: rasterio.io.DatasetReader) -> None:
    """Refuse a file that names another one as its overviews; GDAL would open that, in any format and at any place.

    Raises:
        ForeignOverviewsError: The file has such metadata.
    """
    if dataset.tags(ns="OVERVIEWS"):
        raise ForeignOverviewsError(
            "the file states that its overviews are in another file (GDAL metadata, domain OVERVIEWS), which is never "
            "followed; convert it to a COG, which holds its overviews"
        )
