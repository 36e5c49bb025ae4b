"""`name_disagreement` names in what way stored pixels differ from what their sources give: an offset, a scale, a mask.

The number of wrong pixels explains little. The kind of difference shows which step was left out when the cube was made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["name_disagreement"]

_SHARE = 0.95
"""Smallest share of the differing pixels that one cause must explain."""
_LEAST = 8
"""Smallest number of pixels, with different values, that show a relation."""

Pixels = npt.NDArray[Any]


def name_disagreement(stored: Pixels, expected: Pixels) -> str:
    """Describe how a main array of a shard differs from its sources.

    Args:
        stored: (time, band, y, x) as the cube has it; 0, or NaN for floats, is no data.
        expected: The same, as the sources give it now.

    >>> right = np.arange(2000, 2100, dtype=np.uint16).reshape(1, 1, 10, 10)
    >>> name_disagreement(right + 1000, right)
    'stored values are 1000 too high: an offset was not subtracted'
    """
    has, should = _there(stored), _there(expected)
    invented, wiped = int((has & ~should).sum()), int((should & ~has).sum())
    both = has & should & (stored != expected)
    found, right = (array[both].astype(np.float64) for array in (stored, expected))
    parts = []
    if found.size:
        parts.append(_relation(found, right, floats=expected.dtype.kind == "f"))
    if invented:
        parts.append(f"{invented} values are stored where the sources have no data: a mask or nodata value was ignored")
    if wiped:
        parts.append(f"{wiped} values are absent where the sources have data: they were taken for no data")
    return "; ".join(parts)


def _there(pixels: Pixels) -> npt.NDArray[np.bool_]:
    return np.isfinite(pixels) if pixels.dtype.kind == "f" else pixels > 0


def _relation(found: npt.NDArray[np.float64], right: npt.NDArray[np.float64], *, floats: bool) -> str:
    """Return the relation between the pixels that have another value than they should."""
    other = f"{found.size} values are others: they are of other pixels, or of another file"
    if np.unique(right).size < _LEAST:
        return other
    apart = found - right
    shift = float(np.median(apart))
    # values of 1 were clipped there
    if shift and np.mean((np.abs(apart - shift) < 1.0) | (np.minimum(found, right) <= 1)) > _SHARE and not floats:
        done = "an offset was not subtracted" if shift > 0 else "an offset was subtracted that is not in the files"
        return f"stored values are {abs(shift):g} too {'high' if shift > 0 else 'low'}: {done}"
    if floats and np.mean(np.isclose(10 ** (np.clip(found, -300, 300) / 10), right, rtol=1e-3)) > _SHARE:
        return "stored values are decibels in place of linear power: the unit was ignored"
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = float(np.median(found / right))
    near = np.abs(found - factor * right) <= (1e-4 * np.abs(found) if floats else 0.5 + 0.5 * factor)
    if np.isfinite(factor) and abs(factor - 1.0) > 0.01 and np.mean(near) > _SHARE:
        return f"stored values are {factor:.4g} times as large: a scale was ignored or applied twice"
    return other
