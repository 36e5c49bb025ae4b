"""Which drivers and file systems GDAL may use in this process: what terrashard reads, and nothing else.

GDAL opens files on its own while it reads one: the overviews that metadata name, a mask, a sidecar. It tries every
driver on each of them, and some drivers send requests, run through other files, or write a cache where the file asks
them to. Naming the driver of the outer file does not reach those inner opens, so the drivers are taken away from the
process. The same holds for GDAL's virtual file systems: `/vsicurl/…` sends a request before any driver is asked.

rasterio and pyogrio each bring a GDAL of their own, and both are treated. Importing does nothing: every door that
opens a file calls `limit_raster_drivers` or `limit_vector_drivers` first, which costs a microsecond once it is done.
A process that does this no longer opens other formats through rasterio or pyogrio.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["RASTER_DRIVERS", "VECTOR_DRIVERS", "limit_raster_drivers", "limit_vector_drivers", "open_drivers"]

RASTER_DRIVERS = frozenset({"GTiff", "JP2OpenJPEG"})
"""Formats of rasters that are opened."""
VECTOR_DRIVERS = frozenset({"GeoJSON", "GPKG", "FlatGeobuf", "ESRI Shapefile"})
"""Formats of polygons that can be opened; GPKG is there for writing, as `ingest.request.geopackage` reads without OGR."""
_BLIND = frozenset({"COG", "VRT"})
"""Drivers that make datasets for us. They stay, and are unable to open anything.

GDAL's warper registers VRT anew where it is absent, so it must be there, and blind."""
_MEMORY = "MEM"
"""Arrays of this process as rasters, by their address: rasterio needs it to open one of its own. From GDAL 3.10 on it
opens no other, unless GDAL_MEM_ENABLE_OPEN says so, which is set to NO here; rasterio sets it for its own call."""
_FILE_SYSTEMS = ("/vsimem/",)
"""Kept, beside plain paths and the ones that rasterio and pyogrio make for Python objects."""
_OWN = ("/vsipy", "/vsirio", "/vsipyogrio")
_OPENING = (b"DCAP_RASTER", b"DCAP_VECTOR", b"DCAP_MULTIDIM_RASTER", b"DCAP_GNM")
"""What GDAL looks for in a driver before it lets it look at a file."""

_lock = threading.Lock()
_Open = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)


class _Callbacks(ctypes.Structure):
    """The head of `VSIFilesystemPluginCallbacksStruct` of GDAL's C interface, up to the one callback that is set."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("user", "stat", "unlink", "rename", "mkdir", "rmdir", "read_dir")),
        ("open", _Open),
    )


def _find_nothing(user: int | None, name: bytes | None, mode: bytes | None) -> None:
    """There is no file of any name."""


_refuse = _Open(_find_nothing)
"""As C calls it; it lives as long as the process, as GDAL keeps its address."""

_Fetch = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * 7)
"""`CPLHTTPFetchCallbackFunc` of GDAL's C interface."""
_RESULT_BYTES = 256
"""More than GDAL's `CPLHTTPResult` has; it begins with a status, and all else of it may be zero."""


@dataclass
class _Gdal:
    """One GDAL library of this process, and how many drivers it had when it was treated."""

    library: ctypes.CDLL
    register: Callable[[], object]
    drivers: int = -1
    fetch: Any = None
    """What answers in place of GDAL's client, kept as long as the process, as GDAL keeps its address."""

    def names(self) -> dict[str, int]:
        """Registered drivers, by name."""
        count = self.library.GDALGetDriverCount()
        handles = [self.library.GDALGetDriver(number) for number in range(count)]
        return {self.library.GDALGetDriverShortName(one).decode(): one for one in handles}

    def limit(self, allowed: frozenset[str]) -> None:
        """Take all else away; a count that is as it was left says that this is done."""
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
        """Answer every request of GDAL's own client with an error; OGR fetches a CRS that is a link without a driver."""

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
            if name.startswith("/vsi") and name not in _FILE_SYSTEMS and not name.startswith(_OWN):
                callbacks = self.library.VSIAllocFilesystemPluginCallbacksStruct()
                callbacks.contents.open = _refuse
                self.library.VSIInstallPluginHandler(prefix, callbacks)
                self.library.VSIFreeFilesystemPluginCallbacksStruct(callbacks)


def limit_raster_drivers() -> None:
    """Let rasterio's GDAL open GeoTIFF and JPEG 2000 only, from plain paths, memory and Python objects only."""
    _raster_gdal().limit(_allowed(RASTER_DRIVERS))


def limit_vector_drivers() -> None:
    """Let pyogrio's GDAL open the formats of polygons that are read, and no other."""
    _vector_gdal().limit(_allowed(VECTOR_DRIVERS))


def open_drivers(kind: str) -> frozenset[str]:
    """Names of the drivers that can open a file now, of "raster" (rasterio) or "vector" (pyogrio)."""
    gdal = _raster_gdal() if kind == "raster" else _vector_gdal()
    library = gdal.library
    return frozenset(
        name
        for name, driver in gdal.names().items()
        if any(library.GDALGetMetadataItem(driver, item, None) for item in _OPENING)
    )


def _allowed(own: frozenset[str]) -> frozenset[str]:
    """Both kinds where the two packages share one library, as in conda's builds."""
    if _address(_raster_gdal()) == _address(_vector_gdal()):
        return RASTER_DRIVERS | VECTOR_DRIVERS
    return own


@functools.cache
def _raster_gdal() -> _Gdal:
    import rasterio
    import rasterio._env

    def register() -> None:
        with rasterio.Env():  # the first one registers all that there is
            pass

    return _Gdal(_library(rasterio._env), register)


@functools.cache
def _vector_gdal() -> _Gdal:
    import pyogrio  # registers when it is imported
    import pyogrio._ogr

    return _Gdal(_library(pyogrio._ogr), lambda: None)


def _address(gdal: _Gdal) -> int | None:
    return ctypes.cast(gdal.library.GDALGetDriverCount, ctypes.c_void_p).value


def _library(extension: ModuleType) -> ctypes.CDLL:
    """The GDAL that an extension module is linked to: a symbol is looked up in a library and those it needs."""
    library = ctypes.CDLL(extension.__file__)
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
