"""`import_scene` makes a sample store of one scene: an image as .npy or GeoTIFF, and a file of its pixels' classes.

Hyperspectral benchmarks have this form: an array (y, x, band) without a georeference, and a raster of labels in which 0
means not labelled. Where both files state where they lie, labels of another grid are placed by their transform. Pixels
of the image without data, by nodata value, mask or alpha channel or because a number is not finite, stay marked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.labels.layer import place_classes
from ingest.labels.patch import Patch, read_patch
from ingest.labels.patches import ImportReport
from ingest.raster.header import grid_of
from ingest.raster.opening import open_geotiff
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.labels import NOT_LABELLED
from zarr_store.regular import check_regular
from zarr_store.samples import Sample, SampleSpec, write_samples

__all__ = ["import_scene"]

_MOST_BYTES = 4 << 30
"""Largest size of an .npy array in bytes."""
_MOST_EXACT = 1 << 24
"""Largest whole number up to which float32 holds every one."""


def import_scene(
    image: Path, labels: Path, store: str | Path, *, bands: Sequence[str] = (), names: Sequence[str] = ()
) -> ImportReport:
    """Import a scene whose pixels are labelled.

    Args:
        image: The image, as .npy of (y, x, band) or a GeoTIFF.
        labels: The labels, as .npy or GeoTIFF of (y, x) whole numbers; 0 means not labelled.
        store: Path of the store; nothing may be there.
        bands: Names of the bands in order; none for band1, band2, ….
        names: Names of the labels 1, 2, …; none for "class 1", "class 2", ….

    Raises:
        InvalidInput: A file cannot be read, or image, labels and names do not fit together.
    """
    read = _read(image)
    pixels, valid = read.image, read.valid
    truth, warnings = _read_labels(labels, image, (int(pixels.shape[1]), int(pixels.shape[2])))
    highest = int(truth.max())
    if not highest:
        raise InvalidInput(f"{labels} labels no pixel of {image}: all its values are 0, which means 'not labelled'")
    if names and len(names) < highest:
        raise InvalidInput(
            f"{len(names)} names of classes, but {labels} has labels up to {highest}; give as many names"
        )
    classes = tuple(names) or tuple(f"class {i + 1}" for i in range(highest))
    pixels = _storable(pixels, image)
    named = tuple(bands) or tuple(f"band{i + 1}" for i in range(pixels.shape[0]))
    if len(named) != pixels.shape[0]:
        raise InvalidInput(
            f"{len(named)} names in --bands, but {image} has {pixels.shape[0]} bands; give one name per band"
        )
    height, width = (int(v) for v in pixels.shape[1:])
    spec = SampleSpec(
        1, named, (height, width), str(pixels.dtype), classes, "pixels", masked=valid is not None,
        scales=read.scales if any(one != (1.0, 0.0, "") for one in read.scales) else (),
    )  # fmt: skip
    if valid is not None:
        truth = np.where(valid, truth, 0)
    sample = Sample(pixels, truth.astype(np.uint8), read.longitude, read.latitude, image.name, valid)
    digest = write_samples(store, spec, [sample])
    counts = np.bincount(truth.ravel(), minlength=len(classes) + 1)[1:]
    return ImportReport(
        str(store), int(counts.sum()), dict(zip(classes, counts.tolist(), strict=True)), named, (height, width),
        int(not math.isfinite(read.longitude)), (), digest,
        invalid_pixels=0 if valid is None else int((~valid).sum()), warnings=tuple(warnings),
    )  # fmt: skip


def _storable(pixels: npt.NDArray[Any], image: Path) -> npt.NDArray[Any]:
    """Return pixels in a type that a store holds, without a change of any whole number.

    Raises:
        InvalidInput: The numbers do not fit one.
    """
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low >= 0 and high <= 65535:
            return pixels.astype(np.uint16)
        if max(-low, high) > _MOST_EXACT:
            raise InvalidInput(
                f"{image}: whole numbers {low} … {high} do not fit uint16 or, without rounding, float32; scale them"
            )
    with np.errstate(over="ignore"):
        stored = pixels.astype(np.float32)
    if not np.isfinite(stored).all():
        raise InvalidInput(
            f"{image}: expected numbers that fit float32, got up to {np.abs(pixels).max():g}; scale them"
        )
    return stored


def _read_labels(labels: Path, image: Path, shape: tuple[int, int]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Read labels (y, x) on the pixels of the image, 0 where there are none: by transform, or else by row and column.

    Raises:
        InvalidInput: They do not fit, or only one of both files says where it lies.
    """
    ours, theirs = _place_of(image), _place_of(labels)
    if ours is not None and theirs is not None and not _same_place(ours, theirs):
        if ours.grid is None:
            raise InvalidInput(
                f"{labels} lies elsewhere than {image}, whose transform is turned, mirrored or without a CRS, so "
                "labels cannot be placed on it; warp the image to a north-up grid"
            )
        placed, warnings = place_classes(labels, ours.grid, onto=image.name)
        if (placed == 0).any() and (placed == NOT_LABELLED).any():
            _check_nothing(_read(labels, codes=True), labels)
        if not (placed != NOT_LABELLED).any():
            raise InvalidInput(f"{labels} has no pixel on {image}; choose labels of the same area")
        moved = f"{labels.name} has another grid than {image.name}: its labels were placed by its transform"
        return np.where(placed == NOT_LABELLED, 0, placed).astype(np.int64), [moved, *warnings]
    if (ours is None) != (theirs is None) and ".npy" not in (image.suffix.lower(), labels.suffix.lower()):
        here, absent = (image, labels) if theirs is None else (labels, image)
        raise InvalidInput(
            f"{here} states where it lies, {absent} does not, so it is not known whether they fit; give both a "
            "georeference, or save one as .npy to say that rows and columns are the same"
        )
    read = _read(labels, codes=True)
    truth = read.image
    if truth.shape[0] != 1 or truth.shape[1:] != shape:
        raise InvalidInput(
            f"{labels}: expected one band of shape {shape}, as {image} has, got {truth.shape[0]} bands of "
            f"shape {truth.shape[1:]}"
        )
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() > 254:
        raise InvalidInput(f"{labels}: expected whole numbers 0 … 254, got {truth.dtype} {truth.min()} … {truth.max()}")
    if read.scales[0][:2] != (1.0, 0.0):
        raise InvalidInput(f"{labels}: states scale and offset {read.scales[0][:2]}, which classes cannot have")
    _check_nothing(read, labels)
    return truth[0].astype(np.int64), []


def _check_nothing(read: Patch, labels: Path) -> None:
    """Refuse labels in which 0 would be a class, as the file marks other pixels as being without one."""
    if read.valid is not None and ((read.image[0] == 0) & read.valid).any():
        raise InvalidInput(
            f"{labels} has the value 0 and marks other pixels as no data, so 0 would be a class; but 0 means 'not "
            "labelled' here: number the classes from 1"
        )


@dataclass(frozen=True)
class _Place:
    """The place of a GeoTIFF; `grid` is None if the file is rotated, mirrored or without a CRS."""

    crs: str
    transform: tuple[float, ...]
    shape: tuple[int, int]
    grid: Grid | None


def _place_of(path: Path) -> _Place | None:
    """Return where a file lies; None where it does not say."""
    if path.suffix.lower() == ".npy":
        return None
    with open_geotiff(path) as dataset:
        if dataset.crs is None and dataset.transform.is_identity:
            return None
        try:
            grid = grid_of(dataset)
        except InvalidInput:
            grid = None
        crs = "" if dataset.crs is None else dataset.crs.to_wkt()
        transform = tuple(float(v) for v in dataset.transform[:6])
        return _Place(grid.crs if grid else crs, transform, (int(dataset.height), int(dataset.width)), grid)


def _same_place(one: _Place, other: _Place) -> bool:
    pixel = max(abs(one.transform[0]), abs(one.transform[1]), abs(one.transform[4]))
    near = all(abs(a - b) < 1e-3 * pixel for a, b in zip(one.transform, other.transform, strict=True))
    return near and (one.crs, one.shape) == (other.crs, other.shape)


def _read(path: Path, *, codes: bool = False) -> Patch:
    if path.suffix.lower() != ".npy":
        return read_patch(path, codes=codes)
    try:
        check_regular(path)
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as an array: {error}") from error
    plain = np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)
    if values.ndim not in (2, 3) or values.nbytes > _MOST_BYTES or not plain:
        raise InvalidInput(f"{path}: expected real numbers (y, x) or (y, x, band), got {values.dtype} {values.shape}")
    bands = np.ascontiguousarray(np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0))
    scales = ((1.0, 0.0, ""),) * len(bands)
    valid = np.isfinite(bands).all(axis=0) if bands.dtype.kind == "f" else np.ones(bands.shape[1:], bool)
    if valid.all():
        return Patch(bands, math.nan, math.nan, None, scales)
    return Patch(np.where(valid, bands, bands.dtype.type(0)), math.nan, math.nan, valid, scales)
