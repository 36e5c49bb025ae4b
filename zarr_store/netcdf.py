"""`open_netcdf` opens a netCDF file as an undecoded xarray dataset, whose stored numbers are read when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["digest_file", "open_netcdf"]

_HDF5, _CLASSIC = b"\x89HDF\r\n\x1a\n", (b"CDF\x01", b"CDF\x02")


@contextmanager
def open_netcdf(path: Path) -> Iterator[xr.Dataset]:
    """Open a netCDF file (4 through h5netcdf, 3 through scipy) for as long as the block lasts.

    Raises:
        InvalidInput: The file is absent, no regular file, no netCDF, or damaged.
    """
    import xarray as xr

    try:
        with open_regular(path) as file:
            head = file.read(8)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    if head != _HDF5 and head[:4] not in _CLASSIC:
        raise InvalidInput(f"{path} is not a netCDF file (it begins with {head!r}); expected netCDF-3 or netCDF-4")
    engine = "h5netcdf" if head == _HDF5 else "scipy"
    try:
        dataset = xr.open_dataset(path, engine=engine, decode_cf=False, chunks=None, cache=False)
    except Exception as error:  # libraries of formats raise errors of every kind on a damaged file
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InvalidInput(f"{path} cannot be read as netCDF ({why})") from error
    with dataset:
        yield dataset


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
