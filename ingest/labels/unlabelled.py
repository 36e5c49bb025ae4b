"""`open_folder` opens a folder of images without labels, which a network is to classify.

Images are found in all folders below, and read as `terrashard samples` reads them. A coordinates.csv gives their places
where the files have no georeference; folders that are named as classes mean nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingest.labels.checked import Checked, band_names, check_images, decode
from ingest.labels.patch_files import list_images
from zarr_store.errors import InvalidInput
from zarr_store.samples import Sample, SampleSpec

__all__ = ["FolderImages", "open_folder"]

_NO_LABEL = np.uint8(0)


@dataclass(frozen=True)
class FolderImages:
    """Images of a folder that have all been decoded once.

    Attributes:
        spec: Their description; its one class means nothing.
        left_out: A line for each image that cannot be used.
        passed_over: Rows of coordinates.csv that match no image.
    """

    spec: SampleSpec
    left_out: tuple[str, ...]
    passed_over: tuple[str, ...]
    _checked: Checked
    _threads: int

    def samples(self) -> Iterator[Sample]:
        """Yield the images in a fixed order; some hundreds are in memory at a time.

        Raises:
            InvalidInput: A file has changed since it was checked.
        """
        for item, found in decode(self._checked.images, self._threads):
            if isinstance(found, InvalidInput) or found.image.shape != self._checked.form.shape:
                raise InvalidInput(f"{item.path} changed while the folder was read; nothing was written, repeat it")
            known = math.isfinite(item.longitude)
            place = (item.longitude, item.latitude) if known else (found.longitude, found.latitude)
            yield Sample(found.image, _NO_LABEL, *place, item.name, found.valid)  # type: ignore[arg-type]


def open_folder(
    folder: Path,
    *,
    bands: Sequence[str] = (),
    skip_bad: bool = False,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> FolderImages:
    """Find and check the images of a folder.

    Args:
        folder: The folder.
        bands: Names of the bands in order; none for red, green, blue (3 bands), EuroSAT's names (13), else band1, ….
        skip_bad: Leave out files that cannot be used, in place of refusing all.
        threads: Number of images that are decoded at the same time.
        on_progress: Called with (images checked, all images).

    Raises:
        InvalidInput: A file cannot be decoded, or differs in form from the others.
        NothingFound: The folder holds no image.
    """
    listed, passed_over = list_images(folder)
    checked = check_images(
        folder, listed, skip_bad=skip_bad, threads=threads,
        on_image=None if on_progress is None else lambda number: on_progress(number + 1, len(listed)),
    )  # fmt: skip
    count, height, width = checked.form.shape
    spec = SampleSpec(
        len(checked.images), band_names(bands, count), (height, width), checked.form.dtype, ("unlabelled",),
        masked=checked.invalid > 0, scales=checked.form.stated_scales,
    )  # fmt: skip
    return FolderImages(spec, checked.bad, passed_over, checked, threads)
