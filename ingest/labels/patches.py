"""`import_patches` makes a sample store of labelled images in a folder (`terrashard samples DIR STORE`).

    DIR/Forest/Forest_1.jpg …     one folder per class: each image has that class (the layout of EuroSAT)
    DIR/labels.csv                or a table, where images have several classes: columns file, labels ("Forest;River")
    DIR/coordinates.csv           columns file, latitude, longitude; not needed for GeoTIFFs with a georeference

Images are JPEG or PNG in RGB or grey, or GeoTIFF with any bands; all have one size, type, number of bands and scale.
Every image is decoded before anything is written, and the error names those that cannot be decoded. Pixels that a file
marks as invalid stay marked in the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingest.labels.checked import EUROSAT_BANDS, band_names, check_images, decode
from ingest.labels.patch import read_patch
from ingest.labels.patch_files import list_patches
from zarr_store.errors import InvalidInput
from zarr_store.samples import Sample, SampleSpec, write_samples

__all__ = ["EUROSAT_BANDS", "ImportReport", "import_patches", "read_patch"]

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportReport:
    """The result of an import: samples by class, samples without a place, files left out, and the form of the store.

    `left_out` names images that could not be used, `passed_over` what was no image of a class in the first place;
    `invalid_pixels` counts the pixels that the files mark as without data; `warnings` is what a person should look at.
    """

    store: str
    samples: int
    classes: dict[str, int]
    bands: tuple[str, ...]
    size: tuple[int, int]
    without_place: int
    left_out: tuple[str, ...]
    digest: str
    passed_over: tuple[str, ...] = ()
    invalid_pixels: int = 0
    warnings: tuple[str, ...] = ()


def import_patches(
    folder: Path,
    store: str | Path,
    *,
    bands: Sequence[str] = (),
    skip_bad: bool = False,
    threads: int = 2,
    on_progress: OnProgress | None = None,
) -> ImportReport:
    """Import a folder of labelled images.

    Args:
        folder: Folder of the form that the module describes.
        store: Path of the store; nothing may be there.
        bands: Names of the bands in order; none for red, green, blue (3 bands), EuroSAT's names (13), else band1, ….
        skip_bad: Leave out files that cannot be used, in place of refusing all.
        threads: Number of images that are decoded at the same time.
        on_progress: Called with (images done, all images), where each image counts twice: once checked, once written.

    Raises:
        InvalidInput: A file cannot be decoded, or differs in form from the others; nothing was written.
        NothingFound: The folder holds no image.
    """
    listing = list_patches(folder)
    classes, listed = listing.classes, listing.images
    # a table of single names is one class each
    several = listing.several and any(len(item.classes) != 1 for item in listed)
    total = 2 * len(listed)
    checked = check_images(
        folder, listed, skip_bad=skip_bad, threads=threads,
        on_image=None if on_progress is None else lambda number: None if number % 64 else on_progress(number, total),
    )  # fmt: skip
    good, common = checked.images, checked.form
    count, height, width = common.shape
    spec = SampleSpec(
        len(good), band_names(bands, count), (height, width), common.dtype, classes, "several" if several else "one",
        masked=checked.invalid > 0, scales=common.stated_scales,
    )  # fmt: skip
    by_class = np.zeros(len(classes), int)
    unplaced = 0

    def samples() -> Iterator[Sample]:
        nonlocal unplaced
        for number, (item, found) in enumerate(decode(good, threads)):
            if isinstance(found, InvalidInput):
                raise InvalidInput(f"{found} (the file changed during the import; nothing was written)")
            known = math.isfinite(item.longitude)
            place = (item.longitude, item.latitude) if known else (found.longitude, found.latitude)
            unplaced += not math.isfinite(place[0])
            by_class[list(item.classes)] += 1
            label = np.uint8(item.classes[0]) if not several else np.isin(np.arange(len(classes)), item.classes)
            yield Sample(found.image, np.asarray(label, np.uint8), *place, item.name, found.valid)
            if on_progress and number % 64 == 0:
                on_progress(len(listed) + number, total)

    digest = write_samples(store, spec, samples())
    if on_progress:
        on_progress(total, total)
    return ImportReport(
        str(store), len(good), dict(zip(classes, by_class.tolist(), strict=True)), spec.bands, spec.size, unplaced,
        checked.bad, digest, listing.passed_over, checked.invalid, checked.warnings,
    )  # fmt: skip
