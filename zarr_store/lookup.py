"""The one rule by which people name bands and time steps, for commands, settings and Python alike.

A band is named as the cube names it, in any case, or by its code at the instrument ("B04" for red). A time step is
named by a date or any beginning of one ("2023", "2023-08", "2023-08-18T09:57"), by a range of them with a slash between
("2023-08/2023-09-10", "../2023-08"; both ends count), or by its position, a number of at most three digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["BAND_CODES", "find_band", "find_bands", "find_time", "find_times", "picture_bands"]

BAND_CODES: dict[str, tuple[str, ...]] = {
    "coastal": ("b01", "b1"),
    "blue": ("b02", "b2"),
    "green": ("b03", "b3"),
    "red": ("b04", "b4"),
    "rededge1": ("b05", "b5"),
    "rededge2": ("b06", "b6"),
    "rededge3": ("b07", "b7"),
    "nir": ("b08", "b8"),
    "nir08": ("b8a",),
    "nir09": ("b09", "b9"),
    "cirrus": ("b10",),
    "swir16": ("b11",),
    "swir22": ("b12",),
    "vv": ("gamma0_vv",),
    "vh": ("gamma0_vh",),
    "hh": ("gamma0_hh",),
    "hv": ("gamma0_hv",),
}
"""Other names of each band, in lower case. They lead from the code to the name and not back: a store that calls its
bands B1, B2 … may hold another sensor's."""

_COLOURS = (
    ("red", "green", "blue"),
    ("nir", "red", "green"),
    ("nir08", "red", "green"),
    ("swir16", "nir", "red"),
    ("swir16", "nir08", "red"),
    ("swir22", "nir", "red"),
    ("swir22", "nir08", "red"),
)
"""Bands shown as red, green and blue, the best first: true colour, then colour infrared, then shortwave infrared."""
_OPTICAL = ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "nir09", "swir16",
            "swir22")  # fmt: skip
"""Optical bands by wavelength, the shortest first."""
_FEW = 16
"""Number of bands above which bands without a known name are those of a spectrometer."""
_DATE = re.compile(r"\d{4}[-\d]*(T[\d:]*)?")
_SHOWN = 8


def find_band(asked: str, known: Iterable[str]) -> str | None:
    """Return the known name that `asked` means, or None if there is none.

    >>> find_band("B04", ["blue", "red"]), find_band("RED", ["blue", "red"]), find_band("nir", ["blue", "red"])
    ('red', 'red', None)
    """
    names = tuple(known)
    if asked in names:
        return asked
    wanted = asked.casefold()
    same = [name for name in names if name.casefold() == wanted]
    return same[0] if len(same) == 1 else next((n for n in names if wanted in BAND_CODES.get(n.casefold(), ())), None)


def find_bands(asked: str | Iterable[str], known: Sequence[str], where: str = "") -> tuple[int, ...]:
    """Return the positions of the bands that are asked for, in the order asked; of all bands where none is named.

    Args:
        asked: Names, or one text with commas between them.
        known: Names of the bands there are, in order.
        where: What holds the bands, for the message.

    Raises:
        UnknownName: A name means no band; all such names are listed.

    >>> find_bands("nir, B04", ["blue", "red", "nir"])
    (2, 1)
    """
    wanted = _texts(asked)
    found = {text: find_band(text, known) for text in wanted}
    wrong = [text for text, name in found.items() if name is None]
    if wrong:
        raise UnknownName.of("band", wrong, known, where)
    return tuple(known.index(str(found[text])) for text in wanted) or tuple(range(len(known)))


def find_times(asked: str | Iterable[str], times: Sequence[str], where: str = "") -> tuple[int, ...]:
    """Return the positions of all time steps that are asked for, ascending and each once.

    Args:
        asked: Dates, ranges or positions, or one text with commas between them.
        times: Time of each step, ISO 8601 UTC, ascending.
        where: What holds the steps, for the message.

    Raises:
        UnknownName: A date, range or position has no step; all such texts are listed.

    >>> times = ["2023-08-10T09:57:57", "2023-08-18T10:07:51", "2023-09-02T09:57:58"]
    >>> find_times("2023-08", times), find_times(["2023-08-18", "0"], times), find_times("2023-08-15/..", times)
    ((0, 1), (0, 1), (1, 2))
    """
    moments = [_plain(time) for time in times]
    found = {text: _steps(text, moments) for text in _texts(asked)}
    wrong = [text for text, steps in found.items() if not steps]
    if wrong or not found:
        raise UnknownName.of("time", wrong or [""], dict.fromkeys(time[:10] for time in times), where)
    return tuple(sorted({step for steps in found.values() for step in steps}))


def find_time(asked: str, times: Sequence[str], where: str = "") -> int:
    """Return the position of the one time step that is asked for.

    Raises:
        UnknownName: There is none.
        InvalidInput: There are several.

    >>> find_time("2023-08", ["2023-08-10T09:57:57", "2023-09-02T09:57:58"])
    0
    """
    found = find_times(asked, times, where)
    if len(found) > 1:
        several = ", ".join(times[step] for step in found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        place = f" in {where}" if where else ""
        raise InvalidInput(f"time {asked!r}{place} means {several}; give one of them")
    return found[0]


def picture_bands(known: Sequence[str]) -> tuple[int, int, int]:
    """Return the positions of the bands that a picture shows as red, green and blue.

    True colour where there is one, else the usual false colours of `_COLOURS`, which show vegetation red or green. Of
    other optical bands the longest wavelength is red; other bands keep their order, and of many the picture takes three
    that are far apart.

    >>> picture_bands(["blue", "green", "red", "nir"]), picture_bands(["green", "red", "nir"])
    ((2, 1, 0), (2, 1, 0))
    >>> picture_bands(["vv", "vh"]), picture_bands(["red", "nir"])
    ((0, 1, 0), (1, 0, 0))
    """
    names = [_common_name(name) for name in known]
    for wanted in _COLOURS:
        if all(name in names for name in wanted):
            red, green, blue = map(names.index, wanted)
            return red, green, blue
    place = {names.index(name): order for order, name in enumerate(_OPTICAL) if name in names}
    if len(place) >= 2:
        longest = sorted(place, key=lambda position: -place[position])
        return longest[0], longest[1], longest[min(2, len(longest) - 1)]
    if len(known) > _FEW:
        far, middle, near = (int(part * (len(known) - 1)) for part in (0.6, 0.3, 0.1))
        return far, middle, near
    return (0, 1, 2) if len(known) >= 3 else (0, len(known) - 1, 0)


def _common_name(name: str) -> str:
    """Return the name of a band in lower case, of a code such as B08 the name that it has for Sentinel-2."""
    text = name.casefold()
    # two digits or B8A: no other sensor writes its bands so, and only a picture's colours depend on it
    if not re.fullmatch(r"b(\d\d|8a)", text):
        return text
    return next((common for common, codes in BAND_CODES.items() if text in codes), text)


def _texts(asked: str | Iterable[str]) -> list[str]:
    parts = asked.split(",") if isinstance(asked, str) else asked
    return [text for part in parts if (text := part.strip())]


def _steps(text: str, moments: Sequence[str]) -> list[int]:
    if text.isdecimal() and len(text) < 4:  # shorter than a year: a position
        return [int(text)] if int(text) < len(moments) else []
    first, slash, last = (_plain(part.strip()) for part in text.partition("/"))
    if not slash:
        return [step for step, moment in enumerate(moments) if moment.startswith(first)]
    ends = [end for end in (first, last) if end not in ("", "..")]
    if not ends or not all(_DATE.fullmatch(end) for end in ends):
        return []
    return [
        step
        for step, moment in enumerate(moments)
        if (first not in ends or moment >= first) and (last not in ends or moment[: len(last)] <= last)
    ]


def _plain(time: str) -> str:
    """Return a time in the form that steps are compared in: "T" between date and hour, no zone, no empty fraction."""
    text = time.replace(" ", "T", 1).removesuffix("Z").removesuffix("+00:00")
    return re.sub(r"\.0+$", "", text)
