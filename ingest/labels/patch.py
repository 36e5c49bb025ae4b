"""`read_patch` decodes one image of a folder of samples into a `Patch`: pixels, validity, place and scales.

Nothing of the file is lost on the way. PNG of 16 bits keeps its depth. A pixel without data, by the nodata value, the
mask or the alpha channel of the file or because a number is not finite, is marked as invalid and holds 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.warp import transform as warp_points

from ingest.raster.faults import describe_fault, is_file_fault
from ingest.raster.opening import open_geotiff
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

__all__ = ["PICTURES", "RASTERS", "Patch", "read_patch"]

PICTURES, RASTERS = (".jpg", ".jpeg", ".png"), (".tif", ".tiff")
"""Suffixes of the files that are decoded."""
_MOST_PIXELS = 1 << 24
"""Largest number of pixels of an image."""
_MOST_BANDS = 512
"""Largest number of bands of a GeoTIFF."""
_MOST_DECODED = 256 << 20
"""Largest number of bytes of a decoded GeoTIFF."""
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""First bytes of a PNG, and the position of its bit depth."""

Pixels = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]


class Patch(NamedTuple):
    """One decoded image.

    Attributes:
        image: (band, y, x); 0 where a pixel is not valid.
        longitude, latitude: Degrees of its centre; nan without a georeference.
        valid: (y, x); None where every pixel is valid.
        scales: (scale, offset, unit) of each band: physical = stored · scale + offset.
        partly: Number of pixels that an alpha channel makes neither opaque nor transparent; they count as valid.
    """

    image: Pixels
    longitude: float
    latitude: float
    valid: Valid | None
    scales: tuple[tuple[float, float, str], ...]
    partly: int = 0


def read_patch(path: Path, *, codes: bool = False) -> Patch:
    """Decode one image, with its centre in degrees (nan without a georeference).

    Args:
        path: The file.
        codes: Whether its numbers are codes of classes, which may have a colour table.

    Raises:
        InvalidInput: The file cannot be decoded, or is not of a supported kind; the message names it.
    """
    try:
        return _read_raster(path, codes=codes) if path.suffix.lower() in RASTERS else _read_picture(path)
    except InvalidInput:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError | SyntaxError) and not is_file_fault(error):
            raise
        raise InvalidInput(f"{path}: {describe_fault(error)[:160]}") from error


def _read_picture(path: Path) -> Patch:
    with open_regular(path) as file, Image.open(file, formats=("JPEG", "PNG")) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_PIXELS} pixels, got {picture.width} × {picture.height}; cut it "
                "into patches"
            )
        file.seek(0)
        start = file.read(_PNG_DEPTH + 1)
        if start.startswith(_PNG) and start[_PNG_DEPTH] == 16:
            if picture.mode == "P" or "transparency" in picture.info:
                raise InvalidInput(f"{path}: a PNG of 16 bits with one transparent colour; give it an alpha channel")
            return _of_channels(imagecodecs.png_decode(read_file(path, _MOST_DECODED)))
        if picture.mode not in ("RGB", "L", "RGBA", "LA"):
            raise InvalidInput(
                f"{path}: expected RGB or grey, with or without alpha, got colours of mode {picture.mode}; convert it"
            )
        clear = picture.info.get("transparency")
        file.seek(0)
        values = np.asarray(picture)
    return _of_channels(values, clear)


def _of_channels(values: Pixels, clear: Any = None) -> Patch:
    """Make a patch of (y, x) or (y, x, channel); a second or fourth channel is alpha, `clear` a transparent colour."""
    channels = values.reshape(*values.shape[:2], -1)
    valid: Valid | None = None
    partly: Valid | None = None
    if channels.shape[-1] in (2, 4):
        alpha = channels[..., -1]
        channels, valid, partly = channels[..., :-1], alpha != 0, ~np.isin(alpha, (0, np.iinfo(alpha.dtype).max))
    elif clear is not None:
        valid = (channels != np.atleast_1d(np.asarray(clear))).any(axis=-1)
    image = np.ascontiguousarray(np.moveaxis(channels, -1, 0))
    return _checked(image, math.nan, math.nan, valid, ((1.0, 0.0, ""),) * len(image), partly)


def _read_raster(path: Path, *, codes: bool) -> Patch:
    with open_geotiff(path) as source:
        if source.width * source.height > _MOST_PIXELS or source.count > _MOST_BANDS:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_BANDS} bands of {_MOST_PIXELS} pixels, got {source.count} bands of "
                f"{source.width} × {source.height}; cut it into patches"
            )
        size = source.width * source.height * sum(np.dtype(kind).itemsize for kind in source.dtypes)
        if size > _MOST_DECODED:
            raise InvalidInput(
                f"{path}: expected at most {_MOST_DECODED >> 20} MiB once decoded, got {size >> 20} MiB; cut it into "
                "patches"
            )
        alpha = [number for number, kind in enumerate(source.colorinterp) if kind == ColorInterp.alpha]
        bands = [number for number in range(source.count) if number not in alpha]
        if not codes and ColorInterp.palette in source.colorinterp and not _is_grey_ramp(source):
            raise InvalidInput(
                f"{path}: its numbers are codes of a colour table and not brightness; convert it, e.g. with "
                "gdal_translate -expand rgb"
            )
        if not bands:
            raise InvalidInput(f"{path}: expected bands with pixels, got an alpha channel alone")
        every = source.read()
        valid, partly = np.ones(every.shape[1:], bool), np.zeros(every.shape[1:], bool)
        for number in alpha:
            valid &= every[number] != 0
            partly |= ~np.isin(every[number], (0, every[number].max()))
        for number in bands:
            # GDAL takes the alpha channel for the mask of each band, unless the file states a nodata value
            flags, nodata = source.mask_flag_enums[number], source.nodatavals[number]
            if MaskFlags.all_valid not in flags:
                valid &= source.read_masks(number + 1) != 0
            if nodata is not None and MaskFlags.nodata not in flags:  # beside a mask, GDAL leaves it to the reader
                valid &= every[number] != nodata
        scales = tuple(
            (float(source.scales[number]), float(source.offsets[number]), str(source.units[number] or ""))
            for number in bands
        )
        longitude = latitude = math.nan
        if source.crs is not None:
            x, y = source.transform @ (source.width / 2, source.height / 2)
            (longitude,), (latitude,) = warp_points(source.crs, "EPSG:4326", [x], [y])
    image = every[bands] if alpha else every
    return _checked(image, float(longitude), float(latitude), valid, scales, partly)


def _is_grey_ramp(source: Any) -> bool:
    """Return whether the colour table of a file only says that larger numbers are brighter, as that of one bit does."""
    colours = [colour for _, colour in sorted(source.colormap(1).items())]
    greys = [red for red, *_ in colours]
    return greys == sorted(greys) and all(len(set(colour[:3])) == 1 for colour in colours)


def _checked(
    image: Pixels, longitude: float, latitude: float, valid: Valid | None,
    scales: tuple[tuple[float, float, str], ...], partly: Valid | None = None,
) -> Patch:  # fmt: skip
    """Mark pixels with a number that is not finite as invalid, too, and set all invalid ones to 0."""
    valid = np.ones(image.shape[1:], bool) if valid is None else valid
    if image.dtype.kind in "fc":
        valid = valid & np.isfinite(image).all(axis=0)
    half = 0 if partly is None else int(partly.sum())
    if valid.all():
        return Patch(image, longitude, latitude, None, scales, half)
    return Patch(np.where(valid, image, image.dtype.type(0)), longitude, latitude, valid, scales, half)
