"""The -1000 offset of Sentinel-2 baseline 04.00: what the metadata of an item say of it, with the evidence.

From baseline 04.00 on, a digital number is 10 000 · reflectance + 1000. Some providers subtract the 1000, some say so
wrongly, and some keep `offset: -0.1` in the metadata after subtracting. The rule belongs to the item and its baseline,
never to its date: reprocessed scenes of 2015 have baseline 05.xx. The pixels have the last word (`ingest.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingest.products import ProductRule
from ingest.providers import ProviderRule

__all__ = ["OFFSET_DN", "UNKNOWN_OFFSET", "baseline_has_offset", "decide_offset"]

OFFSET_DN = -1000
UNKNOWN_OFFSET = "nothing states the offset"
"""How the evidence begins when neither flag, metadata nor baseline say anything."""


def baseline_has_offset(baseline: str | None) -> bool | None:
    """Whether products of this baseline carry the offset; None for unknown and for the 99.99 of special runs.

    >>> [baseline_has_offset(b) for b in ("03.01", "04.00", "05.11", "99.99", None)]
    [False, True, True, None, None]
    """
    if baseline is None or baseline.startswith("99"):
        return None
    return baseline >= "04.00"


def decide_offset(
    product: ProductRule,
    provider: ProviderRule,
    collection: str,
    properties: Mapping[str, Any],
    baseline: str | None,
    *,
    stated: Mapping[str, float],
    promised: Mapping[str, float],
) -> tuple[int, str]:
    """What must be added to a DN (0 or -1000) by the metadata, and why.

    The provider's rule comes first (its flag, or the baseline where items state nothing). Then the item's own raster
    metadata, the collection's where the baseline does not contradict it, and the baseline.

    Args:
        product: Product rule.
        provider: Provider rule.
        collection: Collection id.
        properties: Properties of the item.
        baseline: "05.09", or None.
        stated: Per band, the offset in DN by the item's raster metadata.
        promised: The same by the collection's `item_assets`.
    """
    if not product.offsets:
        return 0, f"{product.name} has no offset"
    by_baseline = baseline_has_offset(baseline)
    named = f"baseline {baseline}" if baseline else "unknown baseline"
    rule = provider.offset_rule(collection)
    flag = _truth(properties.get(provider.flag)) if rule == "flag" and provider.flag else None
    if flag is True:
        twice = ", though raster metadata still state -1000" if OFFSET_DN in stated.values() else ""
        return 0, f"{provider.flag} is true: 1000 is subtracted already ({named}{twice})"
    if flag is False and by_baseline is not None:
        still = "1000 is still in the pixels" if by_baseline else "there never was one"
        return (OFFSET_DN if by_baseline else 0), f"{provider.flag} is false, {named}: {still}"
    if rule == "baseline" and by_baseline is not None:
        return (OFFSET_DN if by_baseline else 0), f"{named}; {provider.name} serves pixels as produced"
    odd = ""
    for values, place in ((stated, "raster metadata of the item"), (promised, "raster metadata of the collection")):
        if not values:
            continue
        value = next(iter(values.values()))
        if len(set(values.values())) > 1 or value not in (0, OFFSET_DN):
            shown = ", ".join(f"{band} {v:g}" for band, v in values.items())
            odd = f"; {place} state neither 0 nor -1000 for all bands ({shown}) and are ignored"
            continue
        agrees = by_baseline is None or (value == OFFSET_DN) == by_baseline
        if not agrees and values is promised:
            continue  # a collection holds items of all baselines, so it cannot overrule the item's own
        although = "" if agrees else ", although that does not fit"
        return int(value), f"{place} state {value:g} ({named}{although}){odd}"
    if by_baseline is not None:
        return (OFFSET_DN if by_baseline else 0), f"{named}{odd}"
    return 0, f"{UNKNOWN_OFFSET} ({named}): taken as 0 unless the pixels say otherwise{odd}"


def _truth(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None
