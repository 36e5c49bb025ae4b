"""Which exceptions are the fault of a file, and which are defects of ours.

GDAL, PROJ and the decoders raise what they like for a damaged file: errors of rasterio, errors of GDAL that rasterio
hands on as they are (`CPLE_AppDefinedError`, which is no `RasterioError`), plain ValueErrors and OverflowErrors. All of
them mean that this one file cannot be used. The same ValueError raised by a line of this package is a defect, and must
be seen as one.
"""

from __future__ import annotations

import struct
import zlib

from pyproj.exceptions import ProjError
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, RasterioError
from shapely.errors import ShapelyError

from ingest.trust.redact import redact_text
from zarr_store.errors import AccessError, InvalidInput, TerrashardError

__all__ = [
    "DRIVERS",
    "TIFF",
    "PermanentError",
    "TransientError",
    "cause_of",
    "describe_fault",
    "innermost",
    "is_file_fault",
]

DRIVERS = (
    (b"II*\x00", "GTiff"),
    (b"MM\x00*", "GTiff"),
    (b"II+\x00", "GTiff"),
    (b"MM\x00+", "GTiff"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JP2OpenJPEG"),
    (b"\xff\x4f\xff\x51", "JP2OpenJPEG"),  # raw codestream: files named .tif in the wild hold one
)
"""What a file begins with, and the one GDAL driver that may read it."""
TIFF = tuple(start for start, name in DRIVERS if name == "GTiff")


_KINDS = (
    RasterioError, CPLE_BaseError, CRSError, ProjError, ShapelyError, InvalidInput, UnicodeError, EOFError,
    zlib.error, struct.error,
)  # fmt: skip
"""Raised for what a file holds, whoever raises it."""
_LIBRARIES = ("PIL", "affine", "imagecodecs", "odc", "pyogrio", "pyproj", "rasterio", "shapely", "tifffile", "urllib3")
"""Whatever is raised inside of these was raised over a file."""


class PermanentError(Exception):
    """A fault that the next attempt would meet again."""


class TransientError(Exception):
    """A fault that may be gone at the next attempt."""


def is_file_fault(error: BaseException) -> bool:
    """Whether an exception says that a file cannot be used, rather than that this package is wrong.

    Args:
        error: As it was caught, with its traceback.
    """
    if isinstance(error, _KINDS):
        return True
    if not isinstance(error, Exception) or isinstance(error, TerrashardError | AccessError):
        return False
    return _package(type(error).__module__) in _LIBRARIES or _raised_in(error) in _LIBRARIES


def describe_fault(error: BaseException) -> str:
    """What went wrong, for a message: the deepest cause, with its kind where its text alone says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = getattr(error, "reason", None)
    text = str(reason if isinstance(reason, Exception) else error)
    if isinstance(error, RasterioError | CPLE_BaseError | TerrashardError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _raised_in(error: BaseException) -> str:
    """The package whose line raised an exception; empty where that is not known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    named = _package(str(trace.tb_frame.f_globals.get("__name__", "")))
    return named or _package(trace.tb_frame.f_code.co_filename.replace("/", "."))


def _package(name: str) -> str:
    return name.partition(".")[0]


def cause_of(error: BaseException | None, href: str) -> str:
    """A cause without secrets and without the folder the file lies in."""
    text = str(error).replace(href, href.rpartition("/")[2]) if error else "unknown"
    return " ".join(redact_text(text).split())[:300]


def innermost(error: BaseException) -> str:
    """The text of the deepest cause: rasterio says "Read failed. See previous exception for details."."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = getattr(error, "reason", None)
    return str(reason if isinstance(reason, Exception) else error) or type(error).__name__
