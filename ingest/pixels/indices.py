"""Spectral indices: arrays of the cube that are computed from the stored bands while a shard is written.

Every index here is a normalised difference of two bands,

    index = (a - b) / (a + b),

stored as int16: value = stored · 0.0001, rounded to the nearest (halves to even), -32768 where there is no value. Bands
are harmonised digital numbers of 1…65534, so the result lies in -1…1 and the sum is never 0. There is no value where a
band has no data or is saturated (65535), whatever the status. With `--reduce` the index is computed from the composite
of the bands; it is not a composite of indices.

ndvi   (nir - red) / (nir + red)          vegetation: Rouse et al. 1974, NASA SP-351
ndwi   (green - nir) / (green + nir)      open water: McFeeters 1996, doi:10.1080/01431169608948714
mndwi  (green - swir16) / (green + swir16)  water beside buildings: Xu 2006, doi:10.1080/01431160600589179
ndmi   (nir08 - swir16) / (nir08 + swir16)  moisture of leaves: Gao 1996, doi:10.1016/S0034-4257(96)00067-3
nbr    (nir08 - swir22) / (nir08 + swir22)  burnt ground: Key and Benson 2006, USDA RMRS-GTR-164-CD
ndsi   (green - swir16) / (green + swir16)  snow: Hall et al. 1995, doi:10.1016/0034-4257(95)00137-P
ndre   (nir - rededge1) / (nir + rededge1)  chlorophyll: Gitelson and Merzlyak 1994, doi:10.1016/S0176-1617(11)81633-0
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.spec import CubeSpec, DerivedSpec

__all__ = [
    "INDICES",
    "add_indices",
    "choose_indices",
    "normalised_difference",
    "refuse_indices_without_reflectance",
]

_SATURATED = 65535
_BLOCK_ROWS = 256
"""Rows that are computed at once."""


def _difference(name: str, a: str, b: str, source: str) -> DerivedSpec:
    return DerivedSpec(name, (a, b), f"({a} - {b}) / ({a} + {b})", source)


INDICES: dict[str, DerivedSpec] = {
    index.name: index
    for index in (
        _difference("ndvi", "nir", "red", "Rouse et al. 1974, NASA SP-351"),
        _difference("ndwi", "green", "nir", "McFeeters 1996, doi:10.1080/01431169608948714"),
        _difference("mndwi", "green", "swir16", "Xu 2006, doi:10.1080/01431160600589179"),
        _difference("ndmi", "nir08", "swir16", "Gao 1996, doi:10.1016/S0034-4257(96)00067-3"),
        _difference("nbr", "nir08", "swir22", "Key and Benson 2006, USDA RMRS-GTR-164-CD"),
        _difference("ndsi", "green", "swir16", "Hall et al. 1995, doi:10.1016/0034-4257(95)00137-P"),
        _difference("ndre", "nir", "rededge1", "Gitelson and Merzlyak 1994, doi:10.1016/S0176-1617(11)81633-0"),
    )
}


def choose_indices(names: Iterable[str], kind: str, collection: str) -> tuple[DerivedSpec, ...]:
    """Look up the indices for one collection; backscatter has no spectrum and gets none.

    Raises:
        UnknownName: There is no such index; the nearest one is named.
    """
    for name in names:
        if name not in INDICES:
            raise UnknownName.of("index", name, INDICES, collection)
    return tuple(INDICES[name] for name in names) if kind == "reflectance" else ()


def refuse_indices_without_reflectance(names: Iterable[str], kinds: Iterable[str]) -> None:
    """Refuse indices where no collection has a spectrum.

    Raises:
        InvalidInput: Indices are wanted, and all collections are radar.
    """
    if tuple(names) and "reflectance" not in kinds:
        raise InvalidInput(
            f"--index {','.join(names)} needs reflectance, but only backscatter was found; leave the indices out, or "
            "add a Sentinel-2 --collection"
        )


def normalised_difference(
    a: npt.NDArray[np.uint16], b: npt.NDArray[np.uint16], index: DerivedSpec
) -> npt.NDArray[np.int16]:
    """Compute (a - b) / (a + b) in units of `index.scale`; `index.nodata` where a or b is 0 or saturated.

    >>> normalised_difference(np.array([3000, 0], np.uint16), np.array([1000, 9], np.uint16), INDICES["ndvi"]).tolist()
    [5000, -32768]
    """
    valid = (a != 0) & (b != 0) & (a != _SATURATED) & (b != _SATURATED)
    left, right = a.astype(np.float64), b.astype(np.float64)
    value = np.zeros(a.shape)
    # whole numbers on both sides of the division, so that halves are exact
    np.divide((left - right) * round(1 / index.scale), left + right, out=value, where=valid)
    return np.where(valid, np.rint(value), index.nodata).astype(np.int16)


def add_indices(arrays: dict[str, npt.NDArray[np.generic]], spec: CubeSpec) -> None:
    """Put the derived arrays of `spec` beside the main array of one shard."""
    for index in spec.derived:
        main = arrays[spec.kind]
        times, _, height, width = main.shape
        out = np.full((times, height, width), index.nodata, np.int16)
        a, b = (spec.band_names.index(band) for band in index.bands)
        for step in range(times):
            for top in range(
                0, height, _BLOCK_ROWS
            ):  # the floats of a whole shard at once would take more memory than its pixels
                rows = slice(top, top + _BLOCK_ROWS)
                left, right = (main[step, band, rows].astype(np.uint16, copy=False) for band in (a, b))
                out[step, rows] = normalised_difference(left, right, index)
        arrays[index.name] = out
