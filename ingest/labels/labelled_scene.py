"""`import_scene` makes a sample store of one scene: an image as .npy or GeoTIFF, and a file of its pixels' classes.

Hyperspectral benchmarks have this form: an array (y, x, band) without a georeference, and a raster of labels in which 0
means not labelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.labels.patches import ImportReport, read_patch
from zarr_store.errors import InvalidInput
from zarr_store.regular import check_regular
from zarr_store.samples import Sample, SampleSpec, write_samples

__all__ = ["import_scene"]

_MOST_BYTES = 4 << 30
"""Largest size of an .npy array in bytes."""


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
    pixels, longitude, latitude = _read(image)
    truth, _, _ = _read(labels)
    if truth.shape[0] != 1 or truth.shape[1:] != pixels.shape[1:]:
        raise InvalidInput(
            f"{labels}: expected one band of shape {pixels.shape[1:]}, as {image} has, got {truth.shape[0]} bands of "
            f"shape {truth.shape[1:]}"
        )
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() > 254:
        raise InvalidInput(f"{labels}: expected whole numbers 0 … 254, got {truth.dtype} {truth.min()} … {truth.max()}")
    highest = int(truth.max())
    if names and len(names) < highest:
        raise InvalidInput(
            f"{len(names)} names of classes, but {labels} has labels up to {highest}; give as many names"
        )
    classes = tuple(names) or tuple(f"class {i + 1}" for i in range(highest))
    if pixels.dtype not in (np.uint8, np.uint16):
        if not np.isfinite(pixels).all():
            raise InvalidInput(f"{image}: expected a number in every pixel, got nan or infinity; replace them")
        small = np.issubdtype(pixels.dtype, np.integer) and pixels.min() >= 0 and pixels.max() <= 65535
        pixels = pixels.astype(np.uint16 if small else np.float32)
    named = tuple(bands) or tuple(f"band{i + 1}" for i in range(pixels.shape[0]))
    if len(named) != pixels.shape[0]:
        raise InvalidInput(
            f"{len(named)} names in --bands, but {image} has {pixels.shape[0]} bands; give one name per band"
        )
    height, width = (int(v) for v in pixels.shape[1:])
    spec = SampleSpec(1, named, (height, width), str(pixels.dtype), classes, "pixels")
    digest = write_samples(store, spec, [Sample(pixels, truth[0].astype(np.uint8), longitude, latitude, image.name)])
    counts = np.bincount(truth.ravel(), minlength=len(classes) + 1)[1:]
    return ImportReport(
        str(store), int(counts.sum()), dict(zip(classes, counts.tolist(), strict=True)), named, (height, width),
        int(not math.isfinite(longitude)), (), digest,
    )  # fmt: skip


def _read(path: Path) -> tuple[npt.NDArray[Any], float, float]:
    if path.suffix.lower() != ".npy":
        return read_patch(path)
    try:
        check_regular(path)
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as an array: {error}") from error
    if values.ndim not in (2, 3) or values.nbytes > _MOST_BYTES or not np.issubdtype(values.dtype, np.number):
        raise InvalidInput(f"{path}: expected numbers (y, x) or (y, x, band), got {values.dtype} {values.shape}")
    return np.ascontiguousarray(np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)), math.nan, math.nan
