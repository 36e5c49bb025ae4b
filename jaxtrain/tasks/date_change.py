"""The change of the last date from those before it: a difference, or of radar a ratio in terms of speckle.

The intensity of a pixel whose ground has not changed is gamma distributed with shape L, the number of looks (Oliver &
Quegan 2004, "Understanding Synthetic Aperture Radar Images", ch. 4). So the ratio of an intensity to the mean of n
others follows an F distribution with 2 L and 2 L n degrees of freedom.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["LOOKS", "change_from_before", "normal_ratio"]

LOOKS = 4.4
"""Equivalent number of looks of IW GRD in high resolution (Sentinel-1 product definition)."""


def change_from_before(values: npt.NDArray[np.float32], *, radar: bool = False) -> npt.NDArray[np.float32]:
    """Return how far the last date of (time, band, y, x) is from the mean of the clear dates before it.

    Decibels are averaged as intensities, so that of radar it is the ratio of an intensity to the mean of those before.
    """
    before = np.power(10.0, 0.1 * values[:-1].astype(np.float64)) if radar else values[:-1].astype(np.float64)
    seen = np.isfinite(before)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(seen, before, 0.0).sum(axis=0) / seen.sum(axis=0)
        change: npt.NDArray[np.float32] = (values[-1] - (10.0 * np.log10(mean) if radar else mean)).astype(np.float32)
    return change


def normal_ratio(decibels: npt.NDArray[np.float32], looks: float = LOOKS) -> npt.NDArray[np.float32]:
    """Return the ratio of the last date to the mean of those before it as a standard normal number.

    A standard normal number exceeds it as often as speckle alone gives a larger ratio. So bands are comparable,
    whatever the number of clear dates of a pixel, and the sum of their squares follows χ².

    Args:
        decibels: Backscatter (time, band, y, x), NaN where a pixel was not clear.
        looks: Equivalent number of looks.

    Returns:
        float32 (band, y, x), NaN where the last date, or all others, are not clear.

    >>> decibels = np.full((4, 1, 1, 1), -10.0, np.float32)
    >>> decibels[-1] = -5.0
    >>> normal_ratio(decibels).round(1).tolist()
    [[[2.0]]]
    """
    from scipy.special import fdtr, fdtrc, ndtri

    ratio = np.power(10.0, 0.1 * change_from_before(decibels, radar=True).astype(np.float64))
    known = np.isfinite(ratio)
    others = 2.0 * looks * np.isfinite(decibels[:-1]).sum(axis=0)[known]
    above = ratio[known] > 1.0
    # the smaller tail keeps its digits where the other is 1
    tail = np.where(above, fdtrc(2.0 * looks, others, ratio[known]), fdtr(2.0 * looks, others, ratio[known]))
    found = np.full(ratio.shape, np.nan, np.float32)
    found[known] = ndtri(np.maximum(tail, np.finfo(np.float64).tiny)) * np.where(above, -1.0, 1.0)
    return found
