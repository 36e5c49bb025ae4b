"""Opening one asset: what it is by its first bytes, then one explicit GDAL driver, bounded and retried.

GDAL on its own guesses a driver (a VRT dressed as .tif reads other files and hosts), remembers a failed open so that
a retry sends no request, waits for ever on a stalled server, and with `GDAL_NUM_THREADS` set turns failed reads of
uncompressed TIFFs over HTTP into zeros. Every open goes through here, so none of that reaches a cube.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import rasterio
import tenacity
from rasterio.enums import ColorInterp

from ingest.raster.download import read_beside
from ingest.raster.faults import DRIVERS, PermanentError, TransientError, cause_of, describe_fault, is_file_fault
from ingest.raster.file import FoundFile, find, open_found, read_near
from ingest.raster.header import RasterHeader
from ingest.raster.limits import Access
from ingest.raster.lru import Recent
from ingest.raster.opening import open_raster
from ingest.raster.ranges import RangeFile, tie
from ingest.raster.sidecar import MOST_SIDECAR_BYTES, georeference_only
from ingest.trust.redact import redact_url
from ingest.trust.waits import pause
from zarr_store.crs import parse_crs
from zarr_store.errors import AssetUnreadable, InvalidInput

__all__ = [
    "Raster",
    "forbid_gdal_threads",
    "headers",
    "open_asset",
    "with_asset",
    "with_raster",
]

S = TypeVar("S")
T = TypeVar("T")
log = logging.getLogger(__name__)

_CODESTREAM = DRIVERS[-1][0]
_HEADERS = 512
"""Of files, kept by one process; at most 16 MB."""


def with_asset(
    href: str,
    use: Callable[[rasterio.io.DatasetReader], T],
    *,
    scene: str,
    asset: str,
    access: Access | None = None,
) -> T:
    """Open an asset, hand it to `use`, and return what that returns; the whole is repeated on transient faults.

    Args:
        href: Absolute URL (http, https, s3) or absolute local path.
        use: Reads from the dataset. It may run several times, so it must have no effect but its result.
        scene: Item id, for the error.
        asset: Asset key, for the error.
        access: Limits; None for the defaults.

    Raises:
        AssetUnreadable: The asset is absent, no raster, refused, or failed on every attempt.
        InvalidInput: `GDAL_NUM_THREADS` is set.
    """
    return _repeated(_opened, href, use, scene, asset, access or Access())


@dataclass(frozen=True)
class Raster:
    """A raster file that pixels are read from.

    Attributes:
        header: What its header says.
        file: Its bytes, where they are had without GDAL.
        dataset: The open file; None where `header` suffices to read it.
    """

    header: RasterHeader
    file: RangeFile | None
    dataset: rasterio.io.DatasetReader | None


def with_raster(href: str, use: Callable[[Raster], T], *, scene: str, asset: str, access: Access | None = None) -> T:
    """As `with_asset`; a file whose header is known to this process is not opened with GDAL once more.

    Raises:
        AssetUnreadable: As `with_asset`; or the header states no grid that can be used.
        InvalidInput: `GDAL_NUM_THREADS` is set.
    """
    return _repeated(_raster, href, use, scene, asset, access or Access())


def _repeated(
    opened: Callable[..., AbstractContextManager[S]],
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
        with opened(href, limits, fresh=attempt > 1) as source:
            return use(source)

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
        raise AssetUnreadable.of(scene, asset, cause_of(error, href) + tried, redact_url(href)) from error


@contextmanager
def open_asset(
    href: str, *, scene: str = "", asset: str = "", access: Access | None = None
) -> Iterator[rasterio.io.DatasetReader]:
    """Open an asset once, without retries, for a look at its header; `with_asset` is what reads pixels.

    Raises:
        AssetUnreadable: It could not be opened, or a read inside the block failed.
    """
    forbid_gdal_threads()
    try:
        with _opened(href, access or Access(), fresh=True) as dataset:
            yield dataset
    except (PermanentError, TransientError) as error:
        raise AssetUnreadable.of(scene, asset, cause_of(error, href), redact_url(href)) from error


def forbid_gdal_threads() -> None:
    """Refuse to read while GDAL would decode in threads.

    Raises:
        InvalidInput: GDAL_NUM_THREADS is set in the environment or the enclosing rasterio.Env.
    """
    inside = rasterio.env.getenv() if rasterio.env.hasenv() else {}
    if os.environ.get("GDAL_NUM_THREADS") or inside.get("GDAL_NUM_THREADS", 1) != 1:  # 1 is ours
        raise InvalidInput(
            "GDAL_NUM_THREADS is set: GDAL then returns zeros for failed reads of uncompressed TIFFs over HTTP and no "
            "error; unset it (workers and threads of the run are set with --workers and --threads-per-worker)"
        )


@functools.lru_cache(maxsize=2)
def headers(pid: int) -> Recent[RasterHeader]:
    """Headers of files that can be read by them alone; one set per process, as `ingest.raster.download.heads`."""
    return Recent(_HEADERS)


@contextmanager
def _opened(href: str, access: Access, *, fresh: bool) -> Iterator[rasterio.io.DatasetReader]:
    """Open by magic bytes; faults of opening and of reading inside the block become permanent or transient."""
    found = _find(href, access, fresh)
    with _telling(found), _dataset(found, href, access) as dataset:
        yield dataset


@contextmanager
def _raster(href: str, access: Access, *, fresh: bool) -> Iterator[Raster]:
    """As `_opened`, but without GDAL where it has told before how the file is read."""
    found = _find(href, access, fresh)
    known = headers(os.getpid())
    # the limits were held against the header when it was read
    version = None if found.version is None else (found.version, access.max_pixels, access.max_block_bytes)
    header = None if version is None or fresh else known.get(version)
    with _telling(found):
        if header is not None:
            yield Raster(header, found.file, None)
            return
        with _dataset(found, href, access) as dataset:
            header = RasterHeader.of(dataset, found.file)
            if version is not None and header.suffices:
                known.put(version, header)
            yield Raster(header, found.file, dataset)


@contextmanager
def _telling(found: FoundFile) -> Iterator[None]:
    """Make faults permanent or transient, and say what went wrong with the bytes rather than what GDAL made of it."""
    try:
        yield
        if found.file is not None and found.file.error is not None:
            raise found.file.error
    except (PermanentError, TransientError):
        raise
    except Exception as error:
        if not is_file_fault(error):
            raise
        if found.file is not None and found.file.error is not None:
            raise found.file.error from error
        # a local file does not heal between attempts, and no file a header that was read whole; a remote one may have
        # been cut on the way
        again = found.remote and not isinstance(error, InvalidInput)
        raise (TransientError if again else PermanentError)(describe_fault(error)) from error


def _find(href: str, access: Access, fresh: bool) -> FoundFile:
    try:
        return find(href, access, fresh=fresh)
    except (PermanentError, TransientError):
        raise
    except Exception as error:
        if not is_file_fault(error):
            raise
        raise PermanentError(describe_fault(error)) from error


@contextmanager
def _dataset(found: FoundFile, href: str, access: Access) -> Iterator[rasterio.io.DatasetReader]:
    magic, file = found.magic, found.file
    driver = next((name for start, name in DRIVERS if magic.startswith(start)), None)
    if driver is None:
        raise PermanentError(f"not a TIFF or JPEG 2000 file (it begins with {magic[:24]!r})")
    georeference = None
    if magic.startswith(_CODESTREAM):  # it has no room for a georeference; that is in NAME.aux.xml beside it
        georeference = _georeference(found, href, access)
    with open_raster(lambda: open_found(found), driver, georeference=georeference) as dataset:
        if file is not None:
            tie(dataset, file)
        _check_header(dataset, found.size, access)
        yield dataset


def _georeference(found: FoundFile, href: str, access: Access) -> bytes | None:
    data = read_beside(href, access, MOST_SIDECAR_BYTES) if found.remote else read_near(found.path, MOST_SIDECAR_BYTES)
    try:
        return None if data is None else georeference_only(data)
    except InvalidInput as error:
        raise PermanentError(str(error)) from error


def _check_header(dataset: rasterio.io.DatasetReader, size: int | None, access: Access) -> None:
    """Refuse what is not one plain band of sane size, before anything is decoded."""
    if dataset.count != 1:
        raise PermanentError(f"expected one band, the file has {dataset.count}")
    if dataset.crs is not None:
        try:
            parse_crs(dataset.crs.to_wkt())
        except InvalidInput as error:
            raise PermanentError(str(error)) from error
    dtype = dataset.dtypes[0]
    if dtype.startswith("complex") or dtype not in np.sctypeDict:
        raise PermanentError(f"expected an integer or float band, the file has {dtype}")
    if dataset.colorinterp[0] == ColorInterp.alpha:
        raise PermanentError("expected a data band, the file has an alpha band")
    pixels = dataset.width * dataset.height
    if pixels > access.max_pixels:
        raise PermanentError(f"{dataset.height}×{dataset.width} pixels are more than the {access.max_pixels} allowed")
    height, width = dataset.block_shapes[0]
    block_bytes = height * width * np.dtype(dtype).itemsize
    too_small = size is not None and block_bytes > (16 << 20) and block_bytes > 1000 * size
    if block_bytes > access.max_block_bytes or too_small:
        raise PermanentError(
            f"blocks of {height}×{width} pixels decode to {block_bytes >> 20} MiB from a file of {size} bytes: refused"
        )
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    if bits is not None and (not bits.isascii() or not bits.isdigit() or int(bits[:9]) < 8):
        raise PermanentError(f"expected a band of 8 bits or more, the file has {bits}")
