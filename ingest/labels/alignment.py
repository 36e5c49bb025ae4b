"""`compare_mirrored` checks by the pixels whether labels lie mirrored against the image, as a transform can be wrong.

Land cover classes differ in their spectra, so labels explain part of the image's variance: the share eta² between
classes (the correlation ratio; Pearson 1905). Mirrored labels explain less of it than correct ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zarr_store.errors import IntegrityError
from zarr_store.labels import NOT_LABELLED, LabelLayer
from zarr_store.read import Cube
from zarr_store.regions import Region
from zarr_store.spec import STATUS_OBSERVED

__all__ = ["Fit", "compare_mirrored", "compute_share"]

_SIDE = 1024
"""Largest number of rows and of columns that are compared; a larger image is thinned."""
_LEAST_PX = 2000
"""Smallest number of pixels, both labelled and observed, for an answer."""
_CLEARLY = 1.25
"""Factor by which mirrored labels must explain more, as neighbouring pixels have similar spectra, mirrored or not."""

_MIRRORS = {"as it is": (1, 1), "upside down": (-1, 1), "left to right": (1, -1), "turned by half": (-1, -1)}


@dataclass(frozen=True)
class Fit:
    """Shares of the image's variance that labels explain as they are and mirrored, and which is clearly best."""

    shares: Mapping[str, float]
    best: str


def compare_mirrored(cube: Cube, layer: LabelLayer) -> Fit | None:
    """Compare a class layer with the image of the clearest date, over the whole grid, thinned to a million pixels.

    None where too few pixels are both labelled and observed.
    """
    collection = cube.collections[0]
    spec, index = cube.spec(collection), cube.index(collection)
    date = int(np.argmax(index.observed.sum(axis=(1, 2)))) * spec.layout.chunk[0]
    height, width = spec.grid.shape
    step = max(1, -(-max(height, width) // _SIDE))
    label = layer.read()[::step, ::step]
    chosen = np.unique(np.linspace(0, len(spec.bands) - 1, 4).astype(int))
    image, seen = [], []
    rows = max(step, spec.layout.chunk[1] // step * step)
    try:
        for y in range(0, height, rows):
            box = Region(date, date + 1, y, min(y + rows, height), 0, width)
            image.append(cube.read(collection, spec.kind, box, bands=chosen.tolist())[0, :, ::step, ::step])
            seen.append(cube.read(collection, "status", box)[0, ::step, ::step])
    except IntegrityError:  # some shards do not exist yet
        return None
    bands = np.concatenate(image, axis=1).astype(np.float64)
    clear = np.concatenate(seen) == STATUS_OBSERVED
    shares = {}
    for name, (y, x) in _MIRRORS.items():
        turned = label[::y, ::x]
        used = clear & (turned != NOT_LABELLED) & np.isfinite(bands).all(axis=0)
        if used.sum() < _LEAST_PX or len(np.unique(turned[used])) < 2:
            return None
        shares[name] = compute_share(bands[:, used], turned[used])
    best = max(shares, key=lambda name: shares[name])
    return Fit(shares, best if shares[best] > _CLEARLY * shares["as it is"] else "as it is")


def compute_share(bands: npt.NDArray[np.float64], label: npt.NDArray[np.uint8]) -> float:
    """Compute eta²: variance between classes over the whole variance, as the mean over the bands (bands, pixels).

    >>> round(compute_share(np.array([[1.0, 1.0, 3.0, 3.0]]), np.array([0, 0, 1, 1], np.uint8)), 3)
    1.0
    """
    number = np.bincount(label, minlength=256).astype(np.float64)
    shares = []
    for values in bands:
        mean = np.bincount(label, values, minlength=256) / np.maximum(number, 1)
        whole = values.var()
        between = (number * np.square(mean - values.mean())).sum() / len(values)
        shares.append(between / whole if whole > 0 else 0.0)
    return float(np.mean(shares))
