"""Decide the -1000 offset of Sentinel-2 baseline 04.00, from the metadata and from the pixels.

From baseline 04.00 on, a digital number (DN) is 10 000 · reflectance + 1000. Some providers subtract the 1000, some
state so wrongly, and some keep `offset: -0.1` in the metadata after subtracting. The rule depends on the item and its
baseline, never on its date: reprocessed scenes of 2015 have baseline 05.xx. The pixels decide in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ingest.request.products import ProductRule
from ingest.scenes.scene import Scene
from ingest.trust.providers import ProviderRule
from zarr_store.errors import InvalidInput

__all__ = [
    "OFFSET_DN",
    "UNKNOWN_OFFSET",
    "OffsetReading",
    "Verdict",
    "baseline_has_offset",
    "decide_offset",
    "explain_wrong_scale",
    "read_offset",
    "settle_offset",
]

Verdict = Literal["confirmed", "repaired", "contradicted", "inconclusive", "unchecked"]

OFFSET_DN = -1000
"""Number that is added to digital numbers which still carry the offset."""
UNKNOWN_OFFSET = "nothing states the offset"
"""Beginning of the evidence when neither flag, metadata nor baseline state the offset."""


_MIN_PIXELS = 256
"""Smallest number of pixels that decide."""
_RAISED_SHARE, _RAISED_LOW = 0.005, (1000, 1600)
"""Largest share of DN below 1000, and range of the first percentile, of pixels that carry the +1000."""
_SUBTRACTED_SHARE = 0.05
"""Smallest share of DN below 1000 of pixels that do not carry it."""
_DARKEST, _BRIGHTEST = 0.001, 1.6
"""Limits of reflectance: no whole scene is darker than black water or brighter than fresh snow in low sun."""


@dataclass(frozen=True)
class OffsetReading:
    """State of the pixels: "raised" by 1000, "subtracted" (or never raised), or "unclear"."""

    state: Literal["raised", "subtracted", "unclear"]
    share_below_1000: float | None = None
    low: float | None = None
    pixels: int = 0


def baseline_has_offset(baseline: str | None) -> bool | None:
    """Whether products of this baseline carry the offset; None if it is unknown, or the 99.99 of special runs.

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
    """Decide from the metadata what must be added to a DN (0 or -1000), and state why.

    The provider's rule comes first: its flag, or the baseline where its items state nothing. Then come the item's own
    raster metadata, those of the collection if the baseline does not contradict them, and the baseline.

    Args:
        product: Rules of the product.
        provider: Rules of the provider.
        collection: Collection id.
        properties: Properties of the item.
        baseline: Processing baseline such as "05.09", or None.
        stated: Band → offset in DN from the item's raster metadata.
        promised: Band → offset in DN from the collection's `item_assets`.
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
    remark = ""
    for values, place in ((stated, "raster metadata of the item"), (promised, "raster metadata of the collection")):
        if not values:
            continue
        value = next(iter(values.values()))
        if len(set(values.values())) > 1 or value not in (0, OFFSET_DN):
            shown = ", ".join(f"{band} {v:g}" for band, v in values.items())
            remark = f"; {place} state neither 0 nor -1000 for all bands ({shown}) and are ignored"
            continue
        agrees = by_baseline is None or (value == OFFSET_DN) == by_baseline
        if not agrees and values is promised:
            continue  # a collection holds items of all baselines, so it cannot overrule the item's baseline
        although = "" if agrees else ", although that does not fit"
        return int(value), f"{place} state {value:g} ({named}{although}){remark}"
    if by_baseline is not None:
        return (OFFSET_DN if by_baseline else 0), f"{named}{remark}"
    return 0, f"{UNKNOWN_OFFSET} ({named}): taken as 0 unless the pixels say otherwise{remark}"


def _truth(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def read_offset(dn: npt.NDArray[Any]) -> OffsetReading:
    """Decide whether digital numbers of the bluest band still carry the +1000 of baseline 04.00.

    Land that carries it has almost no valid DN in 1…999, and its darkest percent is just above 1000. Subtracted land
    has many DN in 1…999. Clouds and snow alone decide nothing. Pixels beside nodata are left out, as lossy compression
    smears them.

    >>> read_offset(np.full((64, 64), 300, np.uint16)).state
    'subtracted'
    """
    valid = (dn > 0) & (dn < 65535)
    values = dn[_inside(valid)]
    if values.size < _MIN_PIXELS:
        values = dn[valid]
    if values.size < _MIN_PIXELS:
        return OffsetReading("unclear", pixels=int(values.size))
    share = float(np.mean(values < -OFFSET_DN))
    low = float(np.percentile(values, 1))
    if share > _SUBTRACTED_SHARE:
        return OffsetReading("subtracted", share, low, int(values.size))
    if share < _RAISED_SHARE and _RAISED_LOW[0] <= low <= _RAISED_LOW[1]:
        return OffsetReading("raised", share, low, int(values.size))
    return OffsetReading("unclear", share, low, int(values.size))


def explain_wrong_scale(dn: npt.NDArray[Any], scale: float) -> str | None:
    """The reason why digital numbers cannot be reflectance at `scale`; None if they can.

    A file that was scaled before it was stored as integers holds almost only 0 and 1. A file that was stretched over
    all 16 bits is brighter than snow everywhere. A scale that was applied twice looks like one of the two.

    >>> explain_wrong_scale(np.full((64, 64), 3, np.uint16), 1e-4)
    '99% of the values are at most 3, a reflectance of 0.0003: the scale seems to be applied already'
    """
    values = dn[(dn > 0) & (dn < 65535)]
    if values.size < _MIN_PIXELS:
        return None
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    if high * scale < _DARKEST:
        return (
            f"99% of the values are at most {high:.0f}, a reflectance of {high * scale:.4f}: the scale seems to be "
            "applied already"
        )
    if low * scale > _BRIGHTEST:
        return (
            f"99% of the values are above {low:.0f}, a reflectance of {low * scale:.2f}: they seem to be in another "
            "scale"
        )
    return None


def _inside(valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Valid pixels whose eight neighbours are valid too."""
    padded = np.pad(valid, 1, constant_values=True)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    inside: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return inside


def settle_offset(scene: Scene, reading: OffsetReading | None, *, policy: str) -> tuple[int, Verdict, str | None]:
    """Decide the offset of a scene from its metadata, its pixels and the policy.

    Returns:
        The offset, the verdict of the pixels, and a sentence for the plan, if there is something to state.

    Raises:
        InvalidInput: The policy is "fail", and pixels contradict the metadata or nothing states the offset.
    """
    by_metadata = scene.dn_offset
    unknown = scene.offset_evidence.startswith(UNKNOWN_OFFSET)
    by_pixels = None if reading is None else {"raised": OFFSET_DN, "subtracted": 0}.get(reading.state)
    if by_pixels == OFFSET_DN and by_metadata == 0 and baseline_has_offset(scene.baseline) is False:
        by_pixels = None  # nothing was added before baseline 04.00: the ground is bright
    if reading is None or by_pixels is None:
        verdict: Verdict = "unchecked" if reading is None else "inconclusive"
        if not unknown:
            return by_metadata, verdict, None
        text = f"offset: {scene.offset_evidence}, and the pixels do not tell"
        if policy == "fail":
            raise InvalidInput(f"scene {scene.id}: {text}; use --offset-policy warn to take it as 0")
        return by_metadata, verdict, text
    if by_pixels == by_metadata:
        return by_metadata, "confirmed", None
    seen = (
        f"{reading.share_below_1000:.1%} of the pixels are in 1…999 and the darkest percent ends at {reading.low:.0f}: "
        f"{'1000 is still in them' if by_pixels else 'nothing is to be subtracted'}"
    )
    text = f"offset: metadata say {by_metadata:+d} ({scene.offset_evidence}), but {seen}"
    if policy == "fail":
        raise InvalidInput(f"scene {scene.id}: {text}; --offset-policy repair follows the pixels, warn the metadata")
    if policy == "warn":
        return by_metadata, "contradicted", f"{text}; the metadata are followed"
    return by_pixels, "repaired", f"{text}; the pixels are followed ({by_pixels:+d})"
