"""The drivers and file systems that GDAL may use in this process: those that terrashard needs, and no others.

While GDAL reads a file it opens others on its own: the overviews that metadata name, a mask, a sidecar. It tries every
driver on each of them, and some drivers send requests, read further files, or write a cache where the file says so.
Naming the driver of the outer file does not affect those inner opens, so the other drivers are removed from the
process. The same holds for GDAL's virtual file systems: `/vsicurl/…` sends a request before any driver is tried.

rasterio and pyogrio each bring their own GDAL, and both are limited. Importing this module does nothing: every
function that opens a file first calls `limit_raster_drivers` or `limit_vector_drivers`, which costs a microsecond once
it is done. From then on the process cannot open other formats through rasterio or pyogrio.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "DRIVERS_BY_MAGIC",
    "OTHER_MAGIC",
    "RASTER_DRIVERS",
    "TIFF_MAGIC",
    "VECTOR_DRIVERS",
    "limit_raster_drivers",
    "limit_vector_drivers",
    "open_drivers",
]

DRIVERS_BY_MAGIC = (
    (b"II*\x00", "GTiff"),
    (b"MM\x00*", "GTiff"),
    (b"II+\x00", "GTiff"),
    (b"MM\x00+", "GTiff"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JP2OpenJPEG"),
    (b"\xff\x4f\xff\x51", "JP2OpenJPEG"),  # raw codestream: files named .tif in the wild hold one
)
"""(first bytes of a file, the one GDAL driver that may read it)."""
OTHER_MAGIC = (
    b"\x89HDF",
    b"CDF\x01",
    b"CDF\x02",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"PK\x03\x04",
    b"GRIB",
    b"RIFF",
    b"SIMPLE  =",
)
"""First bytes of other formats of pixels: such a file is whole, and is never read."""
TIFF_MAGIC = tuple(start for start, name in DRIVERS_BY_MAGIC if name == "GTiff")
"""First bytes of a TIFF: classic or BigTIFF, of either byte order."""

RASTER_DRIVERS = frozenset({"GTiff", "JP2OpenJPEG"})
"""Drivers of the raster formats that are opened."""
VECTOR_DRIVERS = frozenset({"GeoJSON", "GPKG", "FlatGeobuf", "ESRI Shapefile"})
"""Drivers of the polygon formats. GPKG only writes, as `ingest.request.geopackage` reads without OGR."""
_BLIND = frozenset({"COG", "VRT"})
"""Drivers that only create datasets here. They stay registered, but cannot open anything.

GDAL's warper registers VRT again if it is absent, so it must stay, without the right to open."""
_MEMORY = "MEM"
"""Driver that opens arrays of this process by their address; rasterio needs it to open its own arrays. From GDAL 3.10
on it opens no others unless GDAL_MEM_ENABLE_OPEN allows it, which is NO here. rasterio sets it for its own call."""
_FILE_SYSTEMS = ("/vsimem/",)
"""Virtual file systems that stay usable, beside plain paths and `_PYTHON_FILE_SYSTEMS`."""
_PYTHON_FILE_SYSTEMS = ("/vsipy", "/vsirio", "/vsipyogrio")
"""Prefixes of the file systems that rasterio and pyogrio create for Python objects."""
_OPENING = (b"DCAP_RASTER", b"DCAP_VECTOR", b"DCAP_MULTIDIM_RASTER", b"DCAP_GNM")
"""Capabilities of which GDAL requires one before a driver may look at a file."""

_lock = threading.Lock()
_Open = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)


class _Callbacks(ctypes.Structure):
    """The head of `VSIFilesystemPluginCallbacksStruct` of GDAL's C interface, up to the one callback that is set."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("user", "stat", "unlink", "rename", "mkdir", "rmdir", "read_dir")),
        ("open", _Open),
    )


def _find_nothing(user: int | None, name: bytes | None, mode: bytes | None) -> None:
    """Answer that no file has this name, whatever the name."""


_refuse = _Open(_find_nothing)
"""The function in C's form. It lives as long as the process, as GDAL keeps its address."""

_Fetch = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * 7)
"""`CPLHTTPFetchCallbackFunc` of GDAL's C interface."""
_RESULT_BYTES = 256
"""More than GDAL's `CPLHTTPResult` has; it begins with a status, and all else of it may be zero."""


@dataclass
class _Gdal:
    """One GDAL library of this process, with the number of drivers that were left when it was limited."""

    library: ctypes.CDLL
    register: Callable[[], object]
    drivers: int = -1
    fetch: Any = None
    """What answers in place of GDAL's client, kept as long as the process, as GDAL keeps its address."""

    def names(self) -> dict[str, int]:
        """Return the handles of the registered drivers, by name."""
        count = self.library.GDALGetDriverCount()
        handles = [self.library.GDALGetDriver(number) for number in range(count)]
        return {self.library.GDALGetDriverShortName(one).decode(): one for one in handles}

    def limit(self, allowed: frozenset[str]) -> None:
        """Remove all other drivers and file systems, unless an unchanged number of drivers shows that this is done."""
        if self.drivers == self.library.GDALGetDriverCount():
            return
        with _lock:
            self.register()
            for name, driver in self.names().items():
                if name in _BLIND:
                    for item in _OPENING:
                        self.library.GDALSetMetadataItem(driver, item, None, None)
                elif name not in allowed and name != _MEMORY:
                    self.library.GDALDeregisterDriver(driver)
            if self.drivers < 0:
                self.library.CPLSetConfigOption(b"GDAL_MEM_ENABLE_OPEN", b"NO")
                self._close_client()
                self._close_file_systems()
            self.drivers = self.library.GDALGetDriverCount()

    def _close_client(self) -> None:
        """Answer every request of GDAL's own client with an error, as OGR by itself fetches a CRS that is a link."""

        def refuse(*_: int | None) -> int:
            result: int = self.library.VSICalloc(1, _RESULT_BYTES)  # GDAL frees it
            ctypes.c_int.from_address(result).value = 1
            return result

        self.fetch = _Fetch(refuse)
        self.library.CPLHTTPSetFetchCallback(self.fetch, None)

    def _close_file_systems(self) -> None:
        listed = self.library.VSIGetFileSystemsPrefixes()
        prefixes = []
        number = 0
        while listed and listed[number]:
            prefixes.append(listed[number])
            number += 1
        self.library.CSLDestroy(listed)
        for prefix in prefixes:
            name = prefix.decode()
            if name.startswith("/vsi") and name not in _FILE_SYSTEMS and not name.startswith(_PYTHON_FILE_SYSTEMS):
                callbacks = self.library.VSIAllocFilesystemPluginCallbacksStruct()
                callbacks.contents.open = _refuse
                self.library.VSIInstallPluginHandler(prefix, callbacks)
                self.library.VSIFreeFilesystemPluginCallbacksStruct(callbacks)


def limit_raster_drivers() -> None:
    """Allow rasterio's GDAL only GeoTIFF and JPEG 2000, from plain paths, memory and Python objects."""
    _raster_gdal().limit(_allowed(RASTER_DRIVERS))


def limit_vector_drivers() -> None:
    """Allow pyogrio's GDAL only the formats of polygons that terrashard reads."""
    _vector_gdal().limit(_allowed(VECTOR_DRIVERS))


def open_drivers(kind: str) -> frozenset[str]:
    """Return the drivers that can open a file now, in the GDAL of "raster" (rasterio) or "vector" (pyogrio)."""
    gdal = _raster_gdal() if kind == "raster" else _vector_gdal()
    library = gdal.library
    return frozenset(
        name
        for name, driver in gdal.names().items()
        if any(library.GDALGetMetadataItem(driver, item, None) for item in _OPENING)
    )


def _allowed(drivers: frozenset[str]) -> frozenset[str]:
    """Return the drivers that a library keeps: both kinds where both packages share it, as in conda's builds."""
    if _address(_raster_gdal().library) == _address(_vector_library()):
        return RASTER_DRIVERS | VECTOR_DRIVERS
    return drivers


@functools.cache
def _raster_gdal() -> _Gdal:
    import rasterio
    import rasterio._env

    def register() -> None:
        with rasterio.Env():  # the first one registers all drivers
            pass

    return _Gdal(_library(rasterio._env.__file__), register)


@functools.cache
def _vector_gdal() -> _Gdal:
    import pyogrio  # noqa: F401  registers when it is imported

    return _Gdal(_vector_library(), lambda: None)


@functools.cache
def _vector_library() -> ctypes.CDLL:
    """Load the GDAL of pyogrio without an import of pyogrio, which imports pandas: to read rasters takes neither."""
    package = importlib.util.find_spec("pyogrio")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        for ending in importlib.machinery.EXTENSION_SUFFIXES:
            if (extension := Path(folder) / f"_ogr{ending}").exists():
                return _library(str(extension))
    raise ImportError("pyogrio is incomplete: its module _ogr was not found; install pyogrio again")


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.GDALGetDriverCount, ctypes.c_void_p).value


def _library(extension: str) -> ctypes.CDLL:
    """Return the GDAL that an extension module is linked to: its symbols are found in the module's own libraries."""
    library = ctypes.CDLL(extension)
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "GDALGetDriverCount": (ctypes.c_int, []),
        "GDALGetDriver": (handle, [ctypes.c_int]),
        "GDALGetDriverShortName": (text, [handle]),
        "GDALDeregisterDriver": (None, [handle]),
        "GDALGetMetadataItem": (text, [handle, text, text]),
        "GDALSetMetadataItem": (ctypes.c_int, [handle, text, text, text]),
        "CPLHTTPSetFetchCallback": (ctypes.c_int, [_Fetch, handle]),
        "VSICalloc": (handle, [ctypes.c_size_t, ctypes.c_size_t]),
        "CPLSetConfigOption": (None, [text, text]),
        "VSIGetFileSystemsPrefixes": (ctypes.POINTER(text), []),
        "CSLDestroy": (None, [ctypes.POINTER(text)]),
        "VSIAllocFilesystemPluginCallbacksStruct": (ctypes.POINTER(_Callbacks), []),
        "VSIInstallPluginHandler": (ctypes.c_int, [text, ctypes.POINTER(_Callbacks)]),
        "VSIFreeFilesystemPluginCallbacksStruct": (None, [ctypes.POINTER(_Callbacks)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
