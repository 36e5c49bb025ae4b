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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingest.labels.patch import Patch, read_patch
from ingest.labels.patch_files import Listed, list_patches
from zarr_store.errors import InvalidInput
from zarr_store.samples import SAMPLE_DTYPES, Sample, SampleSpec, write_samples

__all__ = ["EUROSAT_BANDS", "ImportReport", "import_patches", "read_patch"]

EUROSAT_BANDS = ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir09", "cirrus",
                 "swir16", "swir22", "nir08")  # fmt: skip
"""Names of the 13 bands of EuroSAT's GeoTIFFs, whose last band is B8A (Helber et al. 2019, arXiv:1709.00029)."""

_AT_ONCE = 256
"""Number of images that are decoded ahead and held in memory."""
_NAMED = 8
"""Largest number of bad images that an error names."""

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
    forms: dict[_Form, int] = {}
    bad: list[str] = []
    checked: list[tuple[Listed, _Form]] = []
    invalid = partly = 0
    for number, (item, found) in enumerate(_decode(listed, threads)):
        if isinstance(found, InvalidInput):
            bad.append(str(found))
        elif found.valid is not None and not found.valid.any():
            bad.append(f"{item.path}: none of its pixels is valid, by nodata value, mask or alpha channel")
        else:
            form = _Form(found.image.shape, str(found.image.dtype), found.scales)
            forms[form] = forms.get(form, 0) + 1
            checked.append((item, form))
            invalid += 0 if found.valid is None else int((~found.valid).sum())
            partly += found.partly
        if on_progress and number % 64 == 0:
            on_progress(number, total)
    common = max(forms, key=lambda form: forms[form]) if forms else _Form((0, 0, 0), "none", ())
    bad += [f"{item.path}: expected {common}, as most images have, got {form.unlike(common)}"
            for item, form in checked if form != common]  # fmt: skip
    good = [item for item, form in checked if form == common]
    if bad and (not skip_bad or not good):
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InvalidInput(
            f"{len(bad)} of {len(listed)} images cannot be used: {'; '.join(bad[:_NAMED])}{more}. Nothing was written; "
            "repair or remove them, or leave them out with --skip-bad"
        )
    if common.dtype not in SAMPLE_DTYPES:
        raise InvalidInput(
            f"{folder}: its images hold {common.dtype}, and a sample store holds {', '.join(SAMPLE_DTYPES)}: convert "
            "them to the one that keeps all numbers, e.g. with gdal_translate -ot Float32. Nothing was written"
        )
    count, height, width = common.shape
    spec = SampleSpec(
        len(good), _band_names(bands, count), (height, width), common.dtype, classes, "several" if several else "one",
        masked=invalid > 0, scales=common.scales if any(one != (1.0, 0.0, "") for one in common.scales) else (),
    )  # fmt: skip
    by_class = np.zeros(len(classes), int)
    unplaced = 0

    def samples() -> Iterator[Sample]:
        nonlocal unplaced
        for number, (item, found) in enumerate(_decode(good, threads)):
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
        tuple(bad), digest, listing.passed_over, invalid, _about_alpha(partly),
    )  # fmt: skip


def _about_alpha(partly: int) -> tuple[str, ...]:
    if not partly:
        return ()
    return (
        f"{partly:,} pixels are partly transparent and count as valid; if the last channel of the images is a band and "
        "no alpha channel, say so in the files, e.g. with gdal_edit -colorinterp_4 undefined",
    )


@dataclass(frozen=True)
class _Form:
    """The form that all images of a store share: (band, y, x), type, and (scale, offset, unit) of each band."""

    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[float, float, str], ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    def unlike(self, other: _Form) -> str:
        """Describe what makes this form differ from another one."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return f"{self.dtype} of {self.shape}"
        return f"scale, offset and unit {self.scales[:4]} in place of {other.scales[:4]}"


def _band_names(bands: Sequence[str], count: int) -> tuple[str, ...]:
    if bands:
        if len(bands) != count:
            raise InvalidInput(
                f"{len(bands)} names in --bands, but the images have {count} bands, without alpha channels; give one "
                "name per band"
            )
        return tuple(bands)
    if count == 3:
        return ("red", "green", "blue")
    return EUROSAT_BANDS if count == len(EUROSAT_BANDS) else tuple(f"band{i + 1}" for i in range(count))


def _decode(listed: Sequence[Listed], threads: int) -> Iterator[tuple[Listed, Patch | InvalidInput]]:
    def attempt(item: Listed) -> Patch | InvalidInput:
        try:
            return read_patch(item.path)
        except InvalidInput as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, len(listed), _AT_ONCE):
            part = listed[start : start + _AT_ONCE]
            yield from zip(part, pool.map(attempt, part), strict=True)
