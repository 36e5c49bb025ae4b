"""`unit_factor` converts between units of one quantity: lengths, temperatures, pressures, speeds, shares.

Only conversions of the form a · x + b are here. Decibels are none of these, so power and decibels are not converted.
"""

from __future__ import annotations

__all__ = ["unit_factor"]

_UNITS: dict[str, tuple[str, float, float]] = {
    "m": ("length", 1.0, 0.0),
    "metre": ("length", 1.0, 0.0),
    "meter": ("length", 1.0, 0.0),
    "metres": ("length", 1.0, 0.0),
    "meters": ("length", 1.0, 0.0),
    "km": ("length", 1e3, 0.0),
    "dm": ("length", 0.1, 0.0),
    "cm": ("length", 0.01, 0.0),
    "mm": ("length", 0.001, 0.0),
    "um": ("length", 1e-6, 0.0),
    "ft": ("length", 0.3048, 0.0),
    "k": ("temperature", 1.0, 0.0),
    "kelvin": ("temperature", 1.0, 0.0),
    "degc": ("temperature", 1.0, 273.15),
    "deg_c": ("temperature", 1.0, 273.15),
    "°c": ("temperature", 1.0, 273.15),
    "celsius": ("temperature", 1.0, 273.15),
    "degree_celsius": ("temperature", 1.0, 273.15),
    "degrees_celsius": ("temperature", 1.0, 273.15),
    "pa": ("pressure", 1.0, 0.0),
    "hpa": ("pressure", 100.0, 0.0),
    "mbar": ("pressure", 100.0, 0.0),
    "kpa": ("pressure", 1000.0, 0.0),
    "m s-1": ("speed", 1.0, 0.0),
    "m/s": ("speed", 1.0, 0.0),
    "km/h": ("speed", 1 / 3.6, 0.0),
    "km h-1": ("speed", 1 / 3.6, 0.0),
    "1": ("share", 1.0, 0.0),
    "%": ("share", 0.01, 0.0),
    "percent": ("share", 0.01, 0.0),
    "t/ha": ("mass per area", 0.1, 0.0),
    "t ha-1": ("mass per area", 0.1, 0.0),
    "kg/m2": ("mass per area", 1.0, 0.0),
    "kg m-2": ("mass per area", 1.0, 0.0),
}
"""Quantity, and factor and offset to its first unit, by the unit in lower case."""


def unit_factor(source: str, target: str) -> tuple[float, float] | None:
    """Return (factor, offset) that turn a number of one unit into one of another; None where none is known.

    >>> unit_factor("degC", "K"), unit_factor("cm", "m"), unit_factor("dB", "1")
    ((1.0, 273.15), (0.01, 0.0), None)
    """
    if source == target:
        return (1.0, 0.0)
    one, other = (_UNITS.get(" ".join(text.strip().lower().split())) for text in (source, target))
    if one is None or other is None or one[0] != other[0]:
        return None
    return (one[1] / other[1], (one[2] - other[2]) / other[1])
