"""`Values`: how the numbers of a file become those that a cube stores, from what the file and its item state.

A GeoTIFF can state a scale, an offset and a unit. A cube of reflectance stores digital numbers of 1e-4, and one of
backscatter linear power. What is stated is applied, or refused with its name; it is never passed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import rasterio

from zarr_store.errors import InvalidInput

__all__ = ["DECIBEL", "PLAIN", "Stated", "Values"]

Pixels = npt.NDArray[Any]

DN_SCALE = 1e-4
"""Reflectance of one digital number in a cube."""
_OFFSET_DN = -1000
"""The one offset that products of Sentinel-2 have; the plan decides whether it is still in the pixels."""
_DARKEST_DN = -1000
"""Lowest reflectance that is measured, in digital numbers: the offset is that of the instrument's deepest negative."""
_SAME = 1e-5
"""Largest relative difference of two scales that are the same."""
DECIBEL = frozenset({"db", "decibel", "decibels"})
"""Spellings of the unit, in lower case."""
_AMPLITUDE = frozenset({"amplitude", "dn", "percent", "%"})
"""Units of backscatter that are no power."""
_MOST_NEGATIVE = 0.5
"""Largest share of negative pixels of linear power: noise that was subtracted leaves few, decibel nearly all."""


@dataclass(frozen=True)
class Stated:
    """The statement of a file about its numbers: number · scale + offset is the physical value.

    Attributes:
        scale: Scale; 1.0 where the file states none.
        offset: Offset; 0.0 where the file states none.
        unit: Unit in lower case; empty where the file states none.
    """

    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""

    @classmethod
    def of(cls, dataset: rasterio.io.DatasetReader) -> Self:
        """Read the tags of the first band of an open file."""
        unit = dataset.units[0] if dataset.units else None
        return cls(float(dataset.scales[0]), float(dataset.offsets[0]), str(unit or "").strip().lower())

    @property
    def offset_dn(self) -> float:
        """The offset in digital numbers of a cube; 0.0 where the file states none."""
        if self.scale == 1.0 and abs(self.offset) >= 1.0:  # it is stated in digital numbers
            return self.offset
        return round(self.offset / DN_SCALE, 3)


@dataclass(frozen=True)
class Values:
    """The conversion of a file's numbers to those of a cube.

    Attributes:
        factor: Factor on the numbers.
        addend: Addend after the factor; only backscatter has one.
        decibel: Whether the result is in decibel and becomes linear power.
    """

    factor: float = 1.0
    addend: float = 0.0
    decibel: bool = False

    @classmethod
    def of(
        cls,
        stated: Stated,
        stored: str,
        kind: Literal["data", "class"],
        *,
        item_scale: float | None = None,
        item_unit: str | None = None,
    ) -> Self:
        """Find the conversion of one file; the file's own words win over those of its item.

        Args:
            stated: What the file states.
            stored: Type of the pixels in the cube.
            kind: Whether it is measured data or a class layer.
            item_scale: Scale that the item states, where it is not that of the product.
            item_unit: Unit that the item states.

        Raises:
            InvalidInput: What is stated can be neither applied nor passed over.
        """
        if not (math.isfinite(stated.scale) and stated.scale > 0 and math.isfinite(stated.offset)):
            raise InvalidInput(
                f"the file states a SCALE of {stated.scale:g} and an OFFSET of {stated.offset:g}, which no number has"
            )
        tagged = stated.scale != 1.0 or stated.offset != 0.0
        if kind == "class":
            if tagged:
                raise InvalidInput(
                    f"expected a class layer, the file states a SCALE of {stated.scale:g} and an OFFSET of "
                    f"{stated.offset:g}: classes are codes and have none; take the tags out of the file"
                )
            return cls()
        unit = stated.unit or (item_unit or "").strip().lower()
        if stored == "float32":
            if unit in _AMPLITUDE:
                raise InvalidInput(f"expected linear power, the unit is stated as {unit!r}; convert the file")
            return cls(stated.scale if tagged else item_scale or 1.0, stated.offset, unit in DECIBEL)
        if unit in DECIBEL or unit in ("%", "percent"):
            raise InvalidInput(f"expected reflectance, the unit is stated as {unit!r}; convert the file")
        if tagged and stated.offset_dn not in (0, _OFFSET_DN):
            raise InvalidInput(
                f"the file states an OFFSET of {stated.offset:g}, {stated.offset_dn:g} in digital numbers; expected 0 "
                f"or {_OFFSET_DN}: convert the file"
            )
        scale = stated.scale if stated.scale != 1.0 else item_scale or DN_SCALE
        factor = scale / DN_SCALE
        return cls(1.0 if abs(factor - 1.0) < _SAME else factor)

    def store(self, raw: Pixels, stored: str, empty: set[float]) -> Pixels:
        """Convert pixels to the stored type, with one value for every pixel without data.

        Args:
            raw: Numbers of the file; masked ones are 0, or NaN in a file of floats.
            stored: "uint16", "uint8" or "float32".
            empty: Numbers of the file that stand for no data.

        Raises:
            InvalidInput: Linear power is expected, and most numbers are negative.
        """
        if stored == "float32":
            return self._power(raw, empty)
        top = int(np.iinfo(stored).max)
        whole: Pixels
        if self.factor != 1.0:
            whole = self._scaled(raw, stored, top)
        elif raw.dtype == stored:
            whole = raw
        else:
            whole = np.clip(raw, 0, top).astype(stored)
            if stored == "uint16" and raw.dtype.kind == "i":
                # a surface darker than black is measured; far below it lie numbers that stand for no data
                whole[(raw < 0) & (raw >= _DARKEST_DN)] = 1
        for value in empty:
            if np.isfinite(value) and value != 0 and (hits := raw == value).any():
                if whole is raw and not raw.flags.writeable:
                    whole = raw.copy()
                whole[hits] = 0
        return whole

    def _scaled(self, raw: Pixels, stored: str, top: int) -> Pixels:
        """Apply the factor: 0 stays without data, a saturated number stays saturated, all others stay in 1…top."""
        if raw.dtype.kind == "u" and raw.dtype.itemsize <= 2:
            numbers: Pixels = np.arange(int(np.iinfo(raw.dtype).max) + 1, dtype=raw.dtype)
            table = self._convert(numbers, stored, top)
            if raw.dtype == np.uint16:
                table[-1] = top
            return np.asarray(table[raw])
        return self._convert(raw, stored, top)

    def _convert(self, raw: Pixels, stored: str, top: int) -> Pixels:
        values = raw.astype(np.float64) * self.factor
        whole = np.clip(np.rint(values), 1, top).astype(stored)
        whole[(raw == 0) | (values < _DARKEST_DN)] = 0
        return whole

    def _power(self, raw: Pixels, empty: set[float]) -> Pixels:
        power = raw.astype(np.float32)
        lost = ~np.isfinite(power)
        for value in empty:
            if abs(value) <= np.finfo(np.float32).max:  # a pixel of this type cannot have a larger value
                lost |= power == np.float32(value)
        if not self.decibel:
            # exact zeros are the borders of scenes before 2018 and never a measured power
            lost |= power == 0
        if self.factor != 1.0 or self.addend != 0.0:
            power = (power.astype(np.float64) * self.factor + self.addend).astype(np.float32)
        if self.decibel:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                power = np.power(np.float32(10), power / np.float32(10), dtype=np.float32)
            lost |= ~np.isfinite(power) | (power == 0)
        elif (negative := (power < 0) & ~lost).any():
            share = int(negative.sum()) / int((~lost).sum())
            if share > _MOST_NEGATIVE:
                raise InvalidInput(
                    f"expected linear power, {share:.0%} of the pixels are negative, such as "
                    f"{float(np.median(power[negative])):.1f}: they seem to be in decibel; state the unit dB in the "
                    "item's raster:bands or in the file, or convert the file"
                )
            lost |= negative  # noise that was subtracted: no measured power
        power[lost] = np.nan
        return power


PLAIN = Values()
"""Numbers that are stored as they are."""
