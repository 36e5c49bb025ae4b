"""`choose_asset` finds the asset of an item that holds a band, where several may say that they do.

What an asset is for decides before how it is spelled. Pictures come last, then files of a type that is never read, such
as PNG. Among the others its roles decide, then its media type, then the size of its pixels, then whether it names the
band by its code ("B02") or by its common name ("blue"). The alphabet decides only between equals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ingest.request.products import BandRule

__all__ = ["AssetChoice", "choose_asset"]

_FOR_PEOPLE = {"overview", "thumbnail", "visual", "preview", "browse", "metadata", "date", "quicklook"}
"""Roles of files that show a scene, or describe it; their numbers are no measurements."""
_PICTURE, _NO_RASTER = 3, 3
"""The last ranks: of the purpose of an asset, and of its media type."""


class AssetChoice(NamedTuple):
    """The key of the asset that is read, and the keys of those that also say that they hold the band."""

    key: str
    others: tuple[str, ...]


def choose_asset(band: BandRule, assets: Mapping[str, Any]) -> AssetChoice | None:
    """Choose the asset that holds a band; None where none does.

    >>> from ingest.request.products import PRODUCTS
    >>> blue = PRODUCTS[0].band("blue")
    >>> choose_asset(blue, {"blue": {"roles": ["thumbnail"]}, "x": {"eo:bands": [{"name": "B02"}], "roles": ["data"]}})
    AssetChoice(key='x', others=('blue',))
    """
    ranked = sorted(
        (*_purpose(asset), _gsd(asset, band), spelling, key)
        for key, asset in assets.items()
        if isinstance(asset, Mapping) and (spelling := _spelling(band, key, asset)) is not None
    )
    return AssetChoice(ranked[0][-1], tuple(entry[-1] for entry in ranked[1:])) if ranked else None


def _purpose(asset: Mapping[str, Any]) -> tuple[bool, bool, int, int]:
    """Rank an asset by its purpose: pictures last, before them what is not a raster, else by role and media type."""
    use, media = _use(asset), _media(asset)
    return (use == _PICTURE, media == _NO_RASTER, use, media)


def _use(asset: Mapping[str, Any]) -> int:
    """Rank an asset by roles: 0 for data alone, 1 if nothing is stated, 2 for data and picture, 3 for a picture."""
    stated = asset.get("roles")
    listed = [stated] if isinstance(stated, str) else stated if isinstance(stated, list | tuple) else []
    roles = {str(role).lower() for role in listed}
    if "data" in roles or "reflectance" in roles:
        return 2 if roles & _FOR_PEOPLE else 0
    return _PICTURE if roles & _FOR_PEOPLE else 1


def _media(asset: Mapping[str, Any]) -> int:
    """Rank a media type: 0 for GeoTIFF, 1 for JPEG 2000, 2 if nothing is stated, 3 for no raster of measurements."""
    stated = str(asset.get("type") or "").lower()
    if not stated:
        return 2
    return 0 if "tiff" in stated else 1 if "jp2" in stated else _NO_RASTER


def _spelling(band: BandRule, key: str, asset: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how an asset names the band: codes first, keys before the names inside; None where it does not name it."""
    by_code = [one for one in band.keys if re.match(r"B\d", one)]
    if key in by_code:
        return (0, by_code.index(key))
    # the list has two spellings; an asset of several bands, such as a picture, is not a band
    listed = asset.get("eo:bands") or asset.get("bands")
    only = listed[0] if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], Mapping) else {}
    name = str(only.get("name") or "").lower()
    if name in band.aliases:
        return (1, 0)
    if key in band.keys:
        # a code inside that is another band's is believed: "nir" of some services is B8A
        return None if re.fullmatch(r"b\d[\da]?", name) else (2, band.keys.index(key))
    if re.fullmatch(r"b\d[\da]?", name):
        return None
    common = {str(only.get(field)).lower() for field in ("common_name", "eo:common_name") if only.get(field)}
    return (3, 0) if name == band.name else (4, 0) if common & {band.name, *band.aliases} else None


def _gsd(asset: Mapping[str, Any], band: BandRule) -> float:
    listed = asset.get("eo:bands") or asset.get("bands")
    inner = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], Mapping) else {}
    gsd = asset.get("gsd") or inner.get("gsd")
    return float(gsd) if isinstance(gsd, int | float) and not isinstance(gsd, bool) and gsd > 0 else band.resolution_m
