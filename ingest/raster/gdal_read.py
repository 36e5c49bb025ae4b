"""`read_window`: reads pixels that only GDAL can decode, and treats its warnings as errors.

GDAL decodes some damaged blocks and only warns: it invents the rest of a JPEG that is cut short. Invented
pixels must not reach a cube.
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
from rasterio.enums import MaskFlags
from rasterio.errors import RasterioError

__all__ = ["WarnedError", "has_mask", "hide_masked", "read_window"]


class WarnedError(RasterioError):  # type: ignore[misc]  # rasterio is untyped
    """GDAL gave pixels, but warned that they are not those of the file."""


def read_window(dataset: rasterio.io.DatasetReader, band: int = 1, **options: Any) -> npt.NDArray[np.generic]:
    """Read pixels of one band of an open file; those that its mask hides are 0, or NaN in a file of floats.

    Args:
        dataset: The open file.
        band: Number of the band, from 1.
        **options: Options of rasterio's `read`.

    Raises:
        WarnedError: GDAL warned while it decoded a TIFF.
    """
    if dataset.driver != "GTiff":  # OpenJPEG is strict itself, and warns of boxes that do not matter
        return dataset.read(band, **options)  # type: ignore[no-any-return]
    with _caught_warnings() as messages:
        pixels: npt.NDArray[np.generic] = dataset.read(band, **options)
    if messages:
        raise WarnedError(f"GDAL warned while it decoded: {messages[0]}")
    hide_masked(dataset, pixels, **options)
    return pixels


def has_mask(dataset: rasterio.io.DatasetReader) -> bool:
    """Return whether a file holds a mask of its own, beside any nodata value."""
    return dataset.driver == "GTiff" and MaskFlags.per_dataset in dataset.mask_flag_enums[0]


def hide_masked(dataset: rasterio.io.DatasetReader, pixels: npt.NDArray[np.generic], **options: Any) -> None:
    """Overwrite pixels that the mask of an open file hides with 0, or with NaN in an array of floats.

    Args:
        dataset: The open file.
        pixels: Pixels of one band, which are changed in place.
        **options: Options of rasterio's `read` that `pixels` were read with.

    Raises:
        WarnedError: GDAL warned while it decoded the mask.
    """
    if not has_mask(dataset):
        return
    with _caught_warnings() as messages:
        mask = dataset.read_masks(1, **options)
    if messages:
        raise WarnedError(f"GDAL warned while it decoded the mask: {messages[0]}")
    pixels[mask == 0] = np.nan if pixels.dtype.kind == "f" else 0


@contextmanager
def _caught_warnings() -> Iterator[list[str]]:
    """Collect the warnings of GDAL in this thread while the block lasts."""
    messages: list[str] = []
    _listener().of_thread.messages = messages
    try:
        yield messages
    finally:
        _listener().of_thread.messages = None


class _Listener(logging.Filter):
    """Collector of what rasterio logs for GDAL; rasterio passes warnings on in no other way."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self.of_thread = threading.local()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        messages = getattr(self.of_thread, "messages", None)
        if messages is not None and record.levelno >= logging.WARNING:
            messages.append(record.getMessage())
        return not self._quiet


@functools.cache
def _listener() -> _Listener:
    """Return the listener of this process, added to rasterio's logger at the first call."""
    log = logging.getLogger("rasterio._err")
    quiet = not log.isEnabledFor(logging.WARNING)
    if quiet:  # the user has silenced these warnings, but they must be collected
        log.setLevel(logging.WARNING)
    listener = _Listener(quiet)
    log.addFilter(listener)
    return listener
