"""Open one asset: its first bytes choose one GDAL driver; the read is bounded in size and time, and retried.

GDAL on its own guesses a driver (a VRT named .tif reads other files and hosts), remembers a failed open so that a retry
sends no request, waits without end for a stalled server, and with `GDAL_NUM_THREADS` set turns failed reads of
uncompressed TIFFs over HTTP into zeros. Every open goes through this module, so none of that reaches a cube.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import rasterio
import tenacity
from rasterio.enums import ColorInterp

from ingest.raster.asset_file import AssetFile, find_asset_file, open_asset_file, read_local_sidecar
from ingest.raster.codestream import check_tiles
from ingest.raster.download import read_remote_sidecar
from ingest.raster.drivers import DRIVERS_BY_MAGIC, OTHER_MAGIC
from ingest.raster.faults import (
    PermanentError,
    TransientError,
    UnsupportedError,
    cause_of,
    describe_fault,
    is_file_fault,
)
from ingest.raster.header import RasterHeader
from ingest.raster.limits import Access
from ingest.raster.lru import LruCache
from ingest.raster.opening import open_raster
from ingest.raster.overview import Overviews, find_overviews, overview_cache
from ingest.raster.ranges import HEAD_BYTES, RangeFile, find_range_file, link_range_file
from ingest.raster.sidecar import MAX_SIDECAR_BYTES, georeference_only
from ingest.trust.redact import redact_url
from ingest.trust.waits import pause
from zarr_store.crs import parse_crs
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid

__all__ = [
    "Raster",
    "forbid_gdal_threads",
    "header_cache",
    "open_asset",
    "remember_header",
    "remember_overviews",
    "with_asset",
    "with_raster",
]

S = TypeVar("S")
T = TypeVar("T")
log = logging.getLogger(__name__)

_CODESTREAM = DRIVERS_BY_MAGIC[-1][0]
"""First bytes of a raw JPEG 2000 codestream."""
_HEADERS = 1024
"""Number of headers that one process keeps; they take at most 32 MB."""


def with_asset(
    href: str,
    use: Callable[[rasterio.io.DatasetReader], T],
    *,
    scene: str,
    asset: str,
    access: Access | None = None,
    keep: bool = False,
) -> T:
    """Open an asset and return the result of `use` on it; opening and use are repeated on transient faults.

    Args:
        href: Absolute URL (http, https, s3) or absolute local path.
        use: Function that reads from the dataset. It may run several times, so its result must be its only effect.
        scene: Item id, for the error.
        asset: Asset key, for the error.
        access: Limits of reading; None for the defaults.
        keep: Whether to keep what is fetched of a remote file, for a later use of the file.

    Raises:
        AssetUnreadable: The asset is absent, is not a raster, was refused, or failed on every attempt.
        InvalidInput: `GDAL_NUM_THREADS` is set.
    """
    return _with_retries(functools.partial(_opened_dataset, keep=keep), href, use, scene, asset, access or Access())


@dataclass(frozen=True)
class Raster:
    """A raster file that pixels are read from.

    Attributes:
        header: Header of the file.
        file: Bytes of the file, for reading without GDAL.
        dataset: The open file; None where `header` suffices to read it.
        overviews: Its overviews, where they were asked for.
    """

    header: RasterHeader
    file: RangeFile | None
    dataset: rasterio.io.DatasetReader | None
    overviews: Overviews = field(default_factory=Overviews)


def with_raster(
    href: str,
    use: Callable[[Raster], T],
    *,
    scene: str,
    asset: str,
    access: Access | None = None,
    overviews: bool = False,
) -> T:
    """Do what `with_asset` does, without opening a file in GDAL again if this process knows its header.

    Args:
        href: As for `with_asset`, as are the others.
        use: Function that reads from the raster.
        scene: Item id.
        asset: Asset key.
        access: Limits of reading.
        overviews: Whether to find the overviews of the file.

    Raises:
        AssetUnreadable: The asset cannot be read, as for `with_asset`, or its header states no usable grid.
        InvalidInput: `GDAL_NUM_THREADS` is set.
    """
    opened = functools.partial(_opened_raster, overviews=overviews)
    return _with_retries(opened, href, use, scene, asset, access or Access())


def _with_retries(
    open_href: Callable[..., AbstractContextManager[S]],
    href: str,
    use: Callable[[S], T],
    scene: str,
    asset: str,
    limits: Access,
) -> T:
    forbid_gdal_threads()
    attempt = 0

    def once() -> T:
        nonlocal attempt
        attempt += 1
        with open_href(href, limits, fresh=attempt > 1) as opened:
            return use(opened)

    def note(state: tenacity.RetryCallState) -> None:
        cause = cause_of(state.outcome.exception() if state.outcome else None, href)
        log.info("scene %s, asset %s: attempt %d failed (%s); trying again", scene, asset, state.attempt_number, cause)

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(max(1, limits.attempts)) | tenacity.stop_after_delay(limits.deadline_s),
        wait=tenacity.wait_random_exponential(multiplier=limits.backoff_s, max=16 * limits.backoff_s),
        retry=tenacity.retry_if_exception_type(TransientError),
        before_sleep=note,
        sleep=pause,
        reraise=True,
    )
    try:
        return retrying(once)
    except (PermanentError, TransientError) as error:
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        final = isinstance(error, UnsupportedError)
        raise AssetUnreadable.of(scene, asset, cause_of(error, href) + tried, redact_url(href), final=final) from error


@contextmanager
def open_asset(
    href: str, *, scene: str = "", asset: str = "", access: Access | None = None
) -> Iterator[rasterio.io.DatasetReader]:
    """Open an asset once, without retries, to read its header; `with_asset` is the function for pixels.

    Raises:
        AssetUnreadable: The asset could not be opened, or a read inside the block failed.
    """
    forbid_gdal_threads()
    try:
        with _opened_dataset(href, access or Access(), fresh=True) as dataset:
            yield dataset
    except (PermanentError, TransientError) as error:
        final = isinstance(error, UnsupportedError)
        raise AssetUnreadable.of(scene, asset, cause_of(error, href), redact_url(href), final=final) from error


def forbid_gdal_threads() -> None:
    """Refuse to read where GDAL would decode in threads.

    Raises:
        InvalidInput: GDAL_NUM_THREADS is set in the environment or the enclosing rasterio.Env.
    """
    inside = rasterio.env.getenv() if rasterio.env.hasenv() else {}
    if os.environ.get("GDAL_NUM_THREADS") or inside.get("GDAL_NUM_THREADS", 1) != 1:  # `open_raster` sets 1
        raise InvalidInput(
            "GDAL_NUM_THREADS is set: GDAL then returns zeros for failed reads of uncompressed TIFFs over HTTP and no "
            "error; unset it (workers and threads of the run are set with --workers and --threads-per-worker)"
        )


@functools.lru_cache(maxsize=2)
def header_cache(pid: int) -> LruCache[RasterHeader]:
    """Return the cache of headers of files that can be read without GDAL; one cache per process."""
    return LruCache(_HEADERS)


@contextmanager
def _opened_dataset(
    href: str, access: Access, *, fresh: bool, keep: bool = False
) -> Iterator[rasterio.io.DatasetReader]:
    """Open a file with the driver for its first bytes; faults inside the block become permanent or transient."""
    asset_file = _find_file(href, access, fresh, keep=keep)
    with _classified_faults(asset_file), _gdal_dataset(asset_file, href, access) as dataset:
        yield dataset


@contextmanager
def _opened_raster(href: str, access: Access, *, fresh: bool, overviews: bool = False) -> Iterator[Raster]:
    """Open a file as a `Raster`, without GDAL if the header that GDAL read before suffices."""
    asset_file = _find_file(href, access, fresh)
    known = header_cache(os.getpid())
    # the header was checked against these limits when it was read
    version = _header_key(asset_file.content, access)
    header = None if version is None or fresh else known.get(version)
    smaller = overview_cache(os.getpid())
    found = Overviews() if not overviews else None if version is None or fresh else smaller.get(version)
    with _classified_faults(asset_file):
        if header is not None and found is not None:
            yield Raster(header, asset_file.content, None, found)
            return
        with _gdal_dataset(asset_file, href, access) as dataset:
            header = RasterHeader.of(dataset, asset_file.content)
            if version is not None and header.suffices:
                known.put(version, header)
            if found is None:
                found = find_overviews(dataset, asset_file.content, header.grid)
                if version is not None:
                    smaller.put(version, found)
            yield Raster(header, asset_file.content, dataset, found)


def _header_key(file: RangeFile | None, access: Access) -> Hashable:
    """Return the key of a header in the cache; None for a file whose versions cannot be told apart."""
    if file is None or file.identity is None:
        return None
    return (file.identity, access.max_pixels, access.max_block_bytes)


def remember_header(dataset: rasterio.io.DatasetReader, access: Access) -> None:
    """Keep the header of an open file, so that its pixels are read without opening it in GDAL again.

    Args:
        dataset: An open file of `with_asset`.
        access: The limits that it was opened with.
    """
    file = find_range_file(dataset)
    key = _header_key(file, access)
    if key is None:
        return
    try:
        header = RasterHeader.of(dataset, file)
    except Exception as error:
        if not is_file_fault(error):
            raise
        return  # reading its pixels will report the fault
    if header.suffices:
        header_cache(os.getpid()).put(key, header)


def remember_overviews(dataset: rasterio.io.DatasetReader, access: Access, grid: Grid) -> Overviews:
    """Find the overviews of an open file, and keep them for reading its pixels.

    Args:
        dataset: An open file of `with_asset`.
        access: The limits that it was opened with.
        grid: Its grid.
    """
    file = find_range_file(dataset)
    try:
        found = find_overviews(dataset, file, grid)
    except Exception as error:
        if not is_file_fault(error):
            raise
        return Overviews(refusal=describe_fault(error))
    key = _header_key(file, access)
    if key is not None:
        overview_cache(os.getpid()).put(key, found)
    return found


@contextmanager
def _classified_faults(asset_file: AssetFile) -> Iterator[None]:
    """Make faults permanent or transient; an error of fetching bytes replaces the error that GDAL made of it."""
    try:
        yield
        if asset_file.content is not None and asset_file.content.error is not None:
            raise asset_file.content.error
    except (PermanentError, TransientError):
        raise
    except Exception as error:
        if not is_file_fault(error):
            raise
        if asset_file.content is not None and asset_file.content.error is not None:
            raise asset_file.content.error from error
        # a local file does not change between attempts, nor does a header that was read whole; the bytes of a
        # remote file may have been cut off on the way
        retry = asset_file.remote and not isinstance(error, InvalidInput)
        kind = UnsupportedError if isinstance(error, InvalidInput) else TransientError if retry else PermanentError
        raise kind(describe_fault(error)) from error


def _find_file(href: str, access: Access, fresh: bool, *, keep: bool = False) -> AssetFile:
    try:
        return find_asset_file(href, access, fresh=fresh, keep=keep)
    except (PermanentError, TransientError):
        raise
    except Exception as error:
        if not is_file_fault(error):
            raise
        raise PermanentError(describe_fault(error)) from error


@contextmanager
def _gdal_dataset(asset_file: AssetFile, href: str, access: Access) -> Iterator[rasterio.io.DatasetReader]:
    magic, file = asset_file.magic, asset_file.content
    driver = next((name for start, name in DRIVERS_BY_MAGIC if magic.startswith(start)), None)
    if driver is None:
        kind = UnsupportedError if magic.startswith(OTHER_MAGIC) else PermanentError
        raise kind(f"not a TIFF or JPEG 2000 file (it begins with {magic[:24]!r})")
    if driver == "JP2OpenJPEG" and file is not None:
        check_tiles(file.take(0, min(file.size, HEAD_BYTES)), asset_file.size)
    georeference = None
    if magic.startswith(_CODESTREAM):  # its georeference is in NAME.aux.xml beside it
        georeference = _georeference(asset_file, href, access)
    with open_raster(lambda: open_asset_file(asset_file), driver, georeference=georeference) as dataset:
        if file is not None:
            link_range_file(dataset, file)
        _check_header(dataset, asset_file.size, access)
        yield dataset


def _georeference(asset_file: AssetFile, href: str, access: Access) -> bytes | None:
    if asset_file.remote:
        data = read_remote_sidecar(href, access, MAX_SIDECAR_BYTES)
    else:
        data = read_local_sidecar(asset_file.path, MAX_SIDECAR_BYTES)
    try:
        return None if data is None else georeference_only(data)
    except InvalidInput as error:
        raise PermanentError(str(error)) from error


def _check_header(dataset: rasterio.io.DatasetReader, size: int | None, access: Access) -> None:
    """Refuse a file that is not one plain band of sane size, before anything is decoded.

    Raises:
        UnsupportedError: The file has another form, or its pixels or blocks are too many or too large.
    """
    if dataset.count != 1:
        alpha = [str(n) for n, colour in enumerate(dataset.colorinterp, 1) if colour == ColorInterp.alpha]
        what = f", of which band {', '.join(alpha)} is alpha (transparency)" if alpha else ""
        remedy = "; write the data band alone, with a mask or a nodata value" if alpha else ""
        raise UnsupportedError(f"expected one band, the file has {dataset.count}{what}{remedy}")
    if dataset.crs is not None:
        try:
            parse_crs(dataset.crs.to_wkt())
        except InvalidInput as error:
            raise UnsupportedError(str(error)) from error
    dtype = dataset.dtypes[0]
    if dtype.startswith("complex") or dtype not in np.sctypeDict:
        raise UnsupportedError(f"expected an integer or float band, the file has {dtype}")
    if dataset.colorinterp[0] == ColorInterp.alpha:
        raise UnsupportedError("expected a data band, the file has an alpha band")
    pixels = dataset.width * dataset.height
    if pixels > access.max_pixels:
        raise UnsupportedError(f"{dataset.height}×{dataset.width} pixels are more than the {access.max_pixels} allowed")
    height, width = dataset.block_shapes[0]
    block_bytes = height * width * np.dtype(dtype).itemsize
    too_small = size is not None and block_bytes > (16 << 20) and block_bytes > 1000 * size
    if block_bytes > access.max_block_bytes or too_small:
        raise UnsupportedError(
            f"blocks of {height}×{width} pixels decode to {block_bytes >> 20} MiB from a file of {size} bytes: refused"
        )
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    if bits is not None and (not bits.isascii() or not bits.isdigit() or int(bits[:9]) < 8):
        raise UnsupportedError(f"expected a band of 8 bits or more, the file has {bits}")
