"""Read the identity of a scene: time, platform, baseline, tile and datatake, wherever catalogues keep them."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ingest.request.products import ProductRule
from ingest.scenes.witnesses import baseline_has_offset
from zarr_store.errors import InvalidInput

__all__ = [
    "BASELINE_WEIGHTS",
    "acquisition_time",
    "baseline_of",
    "baselines_of",
    "datastrip_of",
    "datatake_of",
    "first_of",
    "number_of",
    "platform_of",
    "product_names",
    "relative_orbit_of",
    "text_of",
    "tile_of",
    "whole_of",
]


_YEARS = (1970, 2200)
"""First and last year that a satellite image may have."""
_OFFICIAL = 3
BASELINE_WEIGHTS = {"asset href": 2, "datatake id": 1, "processing:version": 2, "processing:version (short)": 1}
"""Weight of a baseline by the place that names it, where it is not a field or name that ESA gives the product (3).

The datatake may name the baseline of the L1C product, and `processing:version` the version of a processor.
"""
_FIRST_RAISED_DAY = "2022-01-26"
"""First day whose scenes cannot have a baseline before 04.00: later processing only raises the baseline."""
_MAX_WHOLE_NUMBER = 2**53
"""Whole numbers below this one are exact as floats; this one may be a rounded larger number."""


def product_names(item: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values that may hold the name of the SAFE product or tile, the most reliable first."""
    properties = item["properties"]
    keys = (
        "s2:product_uri",
        "sentinel:product_id",
        "sentinel2:product_title",
        "s2:tile_id",
        "s2:granule_id",
        "sentinel2:tile_id",
        "title",
    )
    return tuple(str(v) for v in (*(properties.get(k) for k in keys), item["id"]) if v)


def acquisition_time(properties: Mapping[str, Any], where: str, notes: list[str]) -> str:
    """Return the acquisition time in whole UTC seconds: `datetime`, or `start_datetime` if that is null.

    Raises:
        InvalidInput: There is no time, or it is not a time of a satellite image.
    """
    raw = first_of(properties, "datetime", "start_datetime")
    if raw is None:
        raise InvalidInput(f"{where}: datetime is null and there is no start_datetime; leave the item out")
    try:
        moment = dt.datetime.fromisoformat(str(raw))
    except ValueError as error:
        raise InvalidInput(
            f"{where}: datetime {raw!r} is not an RFC 3339 time ({error}); leave the item out"
        ) from error
    if moment.tzinfo is None:
        notes.append(f"datetime {raw} names no time zone: read as UTC")
        moment = moment.replace(tzinfo=dt.UTC)
    if properties.get("datetime") is None:
        notes.append("datetime is null: start_datetime is used")
    if not _YEARS[0] <= moment.year <= _YEARS[1]:
        raise InvalidInput(
            f"{where}: datetime {str(raw)[:60]!r} is not a time of a satellite image; leave the item out"
        )
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def baselines_of(properties: Mapping[str, Any], names: Iterable[str], hrefs: Iterable[str] = ()) -> dict[str, str]:
    """Return every baseline that an item names: where it stands → the baseline, the most reliable place first.

    `processing:version` may be the version of a processor (Sen2Cor 2.11). It is believed last, and not at all where it
    would be a baseline that was out of use when the scene was taken.

    Args:
        properties: Properties of the item.
        names: Values that may hold the name of the product (`product_names`).
        hrefs: Hrefs of its assets, which often hold that name too.

    >>> baselines_of({"processing:version": "2.11"}, ["S2A_MSIL2A_20230810T100601_N0509_R122_T33TWM_20230810T141122"])
    {'product name': '05.09', 'processing:version (short)': '02.11'}
    """
    found = {
        "s2:processing_baseline": _as_baseline(properties.get("s2:processing_baseline")),
        "sentinel2:processing_baseline": _as_baseline(properties.get("sentinel2:processing_baseline")),
        "sentinel:processing_baseline": _as_baseline(properties.get("sentinel:processing_baseline")),
        "product name": _named_baseline(names),
        "asset href": _named_baseline(part for href in hrefs for part in href.split("/")),
        "datatake id": _named_baseline(
            str(properties.get(name) or "") for name in ("s2:datatake_id", "eopf:datatake_id", "sentinel2:datatake_id")
        ),
    }
    version = _as_baseline(properties.get("processing:version"))
    taken = str(first_of(properties, "datetime", "start_datetime") or "")[:10]
    if version is not None and (any(found.values()) or version >= "04.00" or taken < _FIRST_RAISED_DAY):
        # a baseline has two digits on both sides of its point, versions of processors have not
        padded = re.fullmatch(r"\d\d\.\d\d", str(properties["processing:version"]).strip())
        found["processing:version" if padded else "processing:version (short)"] = version
    return {place: baseline for place, baseline in found.items() if baseline is not None}


def baseline_of(baselines: Mapping[str, str]) -> str | None:
    """Return the processing baseline, for example "05.09", from all that an item names; None if it names none.

    Where the places disagree on whether there is an offset, the side with more weight is followed, then the order.
    """
    sides: dict[bool | None, int] = {}
    for place, baseline in baselines.items():
        side = baseline_has_offset(baseline)
        sides[side] = sides.get(side, 0) + BASELINE_WEIGHTS.get(place, _OFFICIAL)
    best = max(sides.values(), default=0)
    return next((b for b in baselines.values() if sides[baseline_has_offset(b)] == best), None)


def _as_baseline(raw: object) -> str | None:
    match = (
        re.fullmatch(r"[Nn]?(\d{1,2})\.(\d{1,2})|[Nn]?(\d{2})(\d{2})", str(raw).strip()) if raw is not None else None
    )
    if match is None:
        return None
    major, minor = (g for g in match.groups() if g is not None)
    # the number 5.1 is the text "05.10" without its zero; every baseline has two digits after the point
    return f"{int(major):02d}.{minor.ljust(2, '0')}"


def _named_baseline(names: Iterable[str]) -> str | None:
    text = search_in(r"_N(\d{2}\.?\d{2})(?:_|\.|$)", names)
    return f"{text[:2]}.{text[-2:]}" if text else None


def tile_of(properties: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the MGRS tile, for example "01WCR"; None if nothing names it."""
    whole = first_of(properties, "s2:mgrs_tile", "grid:code", "sentinel:mgrs", "tileId")
    parts = [
        first_of(properties, f"mgrs:{part}", f"sentinel:{part}")
        for part in ("utm_zone", "latitude_band", "grid_square")
    ]
    text = str(whole) if whole else "".join(str(part) for part in parts) if all(parts) else ""
    match = re.fullmatch(r"(?:MGRS-)?T?(\d{1,2})([C-X][A-Z]{2})", text)
    if match:
        return f"{int(match[1]):02d}{match[2]}"
    text = search_in(r"(?:^|_)T?(\d{2}[C-X][A-Z]{2})(?:_|\.|$)", names) or ""
    return text or None


def platform_of(names: Iterable[str]) -> str | None:
    """Return the platform that a product name begins with, for example "sentinel-2a"."""
    unit = search_in(r"^S([12][A-D])_", names)
    return f"sentinel-{unit.lower()}" if unit else None


def datatake_of(properties: Mapping[str, Any], names: Iterable[str], product: ProductRule) -> str | None:
    """Return the datatake id, or the part that the product name holds; for Sentinel-1 the absolute orbit; or None."""
    if product.kind == "backscatter":
        orbit = whole_of(properties.get("sat:absolute_orbit"))
        return str(orbit) if orbit is not None else None
    known = text_of(first_of(properties, "s2:datatake_id", "eopf:datatake_id", "sentinel2:datatake_id"))
    if known:
        return known
    for name in names:
        match = re.match(r"(S2[A-D])_MSIL\d[AC]_(\d{8}T\d{6})_", name)
        if match:
            return f"G{match[1]}_{match[2]}"
    return None


def datastrip_of(properties: Mapping[str, Any], names: Iterable[str], hrefs: Iterable[str] = ()) -> str | None:
    """Return the sensing start, "20230810T100559", of the datastrip: a part of a datatake from one station.

    A datatake may come down to two stations, and then each has its own part of a tile. The name of a granule ends in
    the same time. Hrefs of assets hold both names, as folders of the product.

    >>> datastrip_of({}, [], ["X.SAFE/GRANULE/L2A_T33TWM_A042485_20230810T100559/IMG_DATA/B02.jp2"])
    '20230810T100559'
    """
    stated = text_of(first_of(properties, "s2:datastrip_id", "eopf:datastrip_id", "sentinel2:datastrip_id"))
    strip, granule = r"_S(\d{8}T\d{6})(?:_|\.|$)", r"^L[12][AC]_T\d{2}[C-X][A-Z]{2}_A\d{6}_(\d{8}T\d{6})(?:_|\.|$)"
    found = (search_in(strip, [stated]) if stated else None) or search_in(granule, names)
    if found:
        return found
    folders = [part for href in hrefs for part in href.split("/")]
    return search_in(granule, folders) or search_in(r"(?:^|_)DS_.*" + strip, folders)


def relative_orbit_of(properties: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """Return the relative orbit: 1 to 143 for Sentinel-2, 1 to 175 for Sentinel-1; None if nothing states it."""
    stated = whole_of(first_of(properties, "sat:relative_orbit", "sentinel2:relative_orbit_number"))
    return (stated if stated in range(1, 1000) else None) or whole_of(search_in(r"_R(\d{3})(?:_|$)", names))


def first_of(holder: Mapping[str, Any], *names: str) -> Any:
    """Return the first value under these names that is neither None nor empty; None if there is none."""
    return next((holder[name] for name in names if holder.get(name) not in (None, "")), None)


def search_in(pattern: str, texts: Iterable[str]) -> str | None:
    """Return the first group of a pattern in the first text that has it; None if no text has it."""
    return next((match[1] for text in texts if (match := re.search(pattern, text))), None)


def text_of(value: object, *, lower: bool = False) -> str | None:
    """Return a value as text; None for None and for an empty text."""
    return (str(value).lower() if lower else str(value)) if value not in (None, "") else None


def number_of(value: object) -> float | None:
    """Return a value as a number, also "nan" and "-inf" as the raster extension spells them; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def whole_of(value: object) -> int | None:
    """Return a value as an integer; None for anything that is not a number, or too large to be exact."""
    number = number_of(value)
    return int(number) if number is not None and abs(number) < _MAX_WHOLE_NUMBER else None
