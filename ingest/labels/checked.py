"""`check_images` decodes all images of a folder once, before anything is made of them: all must have one form.

The import of samples and the classification of a folder read images alike, so what one refuses, the other does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ingest.labels.patch import Patch, read_patch
from ingest.labels.patch_files import Listed
from zarr_store.errors import InvalidInput
from zarr_store.samples import SAMPLE_DTYPES

__all__ = ["EUROSAT_BANDS", "Checked", "Form", "band_names", "check_images", "decode"]

EUROSAT_BANDS = ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir09", "cirrus",
                 "swir16", "swir22", "nir08")  # fmt: skip
"""Names of the 13 bands of EuroSAT's GeoTIFFs, whose last band is B8A (Helber et al. 2019, arXiv:1709.00029)."""

_AT_ONCE = 256
"""Number of images that are decoded ahead and held in memory."""
_NAMED = 8
"""Largest number of bad images that an error names."""


@dataclass(frozen=True)
class Form:
    """The form that all images of a store share: (band, y, x), type, and (scale, offset, unit) of each band."""

    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[float, float, str], ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    @property
    def stated_scales(self) -> tuple[tuple[float, float, str], ...]:
        """Scales of the bands; none where no file states any."""
        return self.scales if any(one != (1.0, 0.0, "") for one in self.scales) else ()

    def unlike(self, other: Form) -> str:
        """Describe what makes this form differ from another one."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return f"{self.dtype} of {self.shape}"
        return f"scale, offset and unit {self.scales[:4]} in place of {other.scales[:4]}"


@dataclass(frozen=True)
class Checked:
    """Images that can be used.

    Attributes:
        images: Images that have the common form.
        form: The form that most images have.
        bad: A line for each image that cannot be used.
        invalid: Number of pixels that the files mark as without data.
        partly: Number of pixels that are partly transparent; they count as valid.
    """

    images: tuple[Listed, ...]
    form: Form
    bad: tuple[str, ...]
    invalid: int
    partly: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line where an alpha channel may be a band."""
        if not self.partly:
            return ()
        return (
            f"{self.partly:,} pixels are partly transparent and count as valid; if the last channel of the images is a "
            "band and no alpha channel, say so in the files, e.g. with gdal_edit -colorinterp_4 undefined",
        )


def check_images(
    where: object,
    listed: Sequence[Listed],
    *,
    skip_bad: bool,
    threads: int,
    on_image: Callable[[int], None] | None = None,
) -> Checked:
    """Decode all images and find those of the form that most of them have.

    Args:
        where: The folder, for messages.
        listed: Its images.
        skip_bad: Leave out images that cannot be used, in place of refusing all.
        threads: Number of images that are decoded at the same time.
        on_image: Called with the number of images before each one.

    Raises:
        InvalidInput: An image cannot be decoded, has no valid pixel or differs in form, or no store holds its type.
    """
    forms: dict[Form, int] = {}
    bad: list[str] = []
    checked: list[tuple[Listed, Form]] = []
    invalid = partly = 0
    for number, (item, found) in enumerate(decode(listed, threads)):
        if isinstance(found, InvalidInput):
            bad.append(str(found))
        elif found.valid is not None and not found.valid.any():
            bad.append(f"{item.path}: none of its pixels is valid, by nodata value, mask or alpha channel")
        else:
            form = Form(found.image.shape, str(found.image.dtype), found.scales)
            forms[form] = forms.get(form, 0) + 1
            checked.append((item, form))
            invalid += 0 if found.valid is None else int((~found.valid).sum())
            partly += found.partly
        if on_image:
            on_image(number)
    common = max(forms, key=lambda form: forms[form]) if forms else Form((0, 0, 0), "none", ())
    bad += [f"{item.path}: expected {common}, as most images have, got {form.unlike(common)}"
            for item, form in checked if form != common]  # fmt: skip
    good = tuple(item for item, form in checked if form == common)
    if bad and (not skip_bad or not good):
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise InvalidInput(
            f"{len(bad)} of {len(listed)} images cannot be used: {'; '.join(bad[:_NAMED])}{more}. Nothing was written; "
            "repair or remove them, or leave them out with --skip-bad"
        )
    if common.dtype not in SAMPLE_DTYPES:
        raise InvalidInput(
            f"{where}: its images hold {common.dtype}, and a sample store holds {', '.join(SAMPLE_DTYPES)}: convert "
            "them to the one that keeps all numbers, e.g. with gdal_translate -ot Float32. Nothing was written"
        )
    return Checked(good, common, tuple(bad), invalid, partly)


def decode(listed: Sequence[Listed], threads: int) -> Iterator[tuple[Listed, Patch | InvalidInput]]:
    """Yield images with their pixels, or with the error of one that cannot be decoded, in order."""

    def attempt(item: Listed) -> Patch | InvalidInput:
        try:
            return read_patch(item.path)
        except InvalidInput as error:
            return error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, len(listed), _AT_ONCE):
            part = listed[start : start + _AT_ONCE]
            yield from zip(part, pool.map(attempt, part), strict=True)


def band_names(bands: Sequence[str], count: int) -> tuple[str, ...]:
    """Return the names of the bands of images: those that were given, or the usual ones of their number.

    Raises:
        InvalidInput: There are more or fewer names than bands.
    """
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
