"""Distinguish exceptions that are faults of a file from those that are defects of this package.

GDAL, PROJ and the decoders raise many types for a damaged file: errors of rasterio, errors of GDAL that rasterio passes
on unchanged (`CPLE_AppDefinedError`, which is no `RasterioError`), plain ValueErrors and OverflowErrors. All of them
mean that this one file cannot be used. The same ValueError raised by a line of this package is a defect, and must be
visible as one.
"""

from __future__ import annotations

import http.client
import re
import struct
import zlib

from pyproj.exceptions import ProjError
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, RasterioError
from shapely.errors import ShapelyError
from urllib3.exceptions import HTTPError

from ingest.trust.redact import redact_text
from zarr_store.errors import AccessError, InvalidInput, TerrashardError

__all__ = ["PermanentError", "TransientError", "UnsupportedError", "cause_of", "describe_fault", "is_file_fault"]

_KINDS = (
    RasterioError, CPLE_BaseError, CRSError, ProjError, ShapelyError, InvalidInput, UnicodeError, EOFError,
    zlib.error, struct.error,
)  # fmt: skip
"""Types that mean a fault of the file, wherever they are raised."""
_LIBRARIES = ("PIL", "affine", "imagecodecs", "odc", "pyogrio", "pyproj", "rasterio", "shapely", "tifffile", "urllib3")
"""Packages that are only used on files, so whatever they raise means a fault of the file."""
_PLAIN = (RasterioError, CPLE_BaseError, TerrashardError, HTTPError, http.client.HTTPException, OSError)
"""Types whose text alone explains the fault, without the name of the type."""
_OPENER_NAME = re.compile(r"/vsiriopener_[0-9a-f]+/[0-9a-f]+/raster(?:\.aux\.xml)?(:\s*)?")
"""The name under which GDAL gets a file (`ingest.raster.opening`), which means nothing to anybody."""


class PermanentError(Exception):
    """A fault that every further attempt would meet again."""


class UnsupportedError(PermanentError):
    """A fault of a file that is whole, but of a form that is never read; to try again changes nothing."""


class TransientError(Exception):
    """A fault that may be gone at the next attempt."""


def is_file_fault(error: BaseException) -> bool:
    """Return whether an exception means that a file cannot be used, rather than that this package has a defect.

    Args:
        error: The exception as it was caught, with its traceback.
    """
    if isinstance(error, _KINDS):
        return True
    if not isinstance(error, Exception) or isinstance(error, TerrashardError | AccessError):
        return False
    return _package(type(error).__module__) in _LIBRARIES or _raised_in(error) in _LIBRARIES


def describe_fault(error: BaseException) -> str:
    """Describe a fault for a message: the text of its deepest cause, with the type where the text needs it.

    The outer errors say less: rasterio's reads "Read failed. See previous exception for details.".
    """
    while error.__cause__ is not None:
        error = error.__cause__
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    text = _OPENER_NAME.sub(lambda name: "" if name[1] else "the file", str(cause))
    if isinstance(cause, _PLAIN) and text:
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _raised_in(error: BaseException) -> str:
    """Return the package whose line raised an exception; empty where it is unknown."""
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
    """Return the text of an error without secrets and without the folder that the file lies in."""
    text = str(error).replace(href, href.rpartition("/")[2]) if error else "unknown"
    return " ".join(redact_text(text).split())[:300]
