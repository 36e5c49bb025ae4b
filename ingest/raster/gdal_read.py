"""`read_window`: pixels that only GDAL can decode, with its warnings taken as errors.

GDAL reads some damaged blocks and only warns: of a JPEG that is cut short it makes up the rest. What it makes up must
not reach a cube.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError

__all__ = ["WarnedError", "read_window"]


class WarnedError(RasterioError):  # type: ignore[misc]  # rasterio is untyped
    """GDAL gave pixels, and warned that they are not those of the file."""


def read_window(dataset: rasterio.io.DatasetReader, band: int = 1, **how: Any) -> npt.NDArray[np.generic]:
    """Pixels of one band of an open file.

    Args:
        dataset: The open file.
        band: Its number, from 1.
        **how: As rasterio's `read` takes it.

    Raises:
        WarnedError: GDAL warned while it decoded a TIFF.
    """
    if dataset.driver != "GTiff":  # OpenJPEG is strict on its own, and warns of boxes that it need not know
        return dataset.read(band, **how)  # type: ignore[no-any-return]
    with _warnings() as told:
        pixels: npt.NDArray[np.generic] = dataset.read(band, **how)
    if told:
        raise WarnedError(f"GDAL warned while it decoded: {told[0]}")
    return pixels


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What GDAL warns of meanwhile, in this thread."""
    told: list[str] = []
    _listener().of_thread.told = told
    try:
        yield told
    finally:
        _listener().of_thread.told = None


class _Listener(logging.Filter):
    """Hears what rasterio logs of GDAL, which is the only way that it hands on a warning."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self.of_thread = threading.local()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        told = getattr(self.of_thread, "told", None)
        if told is not None and record.levelno >= logging.WARNING:
            told.append(record.getMessage())
        return not self._quiet


@functools.cache
def _listener() -> _Listener:
    """One per process, put where rasterio logs when it is first needed."""
    log = logging.getLogger("rasterio._err")
    quiet = not log.isEnabledFor(logging.WARNING)
    if quiet:  # the user wants to read none of these, but they must be heard
        log.setLevel(logging.WARNING)
    listener = _Listener(quiet)
    log.addFilter(listener)
    return listener
