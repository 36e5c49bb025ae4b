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

from zarr_store.errors import AccessError, InvalidInput, TerrashardError

__all__ = ["describe_fault", "is_file_fault"]

_KINDS = (
    RasterioError, CPLE_BaseError, CRSError, ProjError, ShapelyError, InvalidInput, UnicodeError, EOFError,
    zlib.error, struct.error,
)  # fmt: skip
"""Raised for what a file holds, whoever raises it."""
_LIBRARIES = ("PIL", "affine", "imagecodecs", "odc", "pyogrio", "pyproj", "rasterio", "shapely", "tifffile", "urllib3")
"""Whatever is raised inside of these was raised over a file."""


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
