"""Decide the -1000 offset of Sentinel-2 baseline 04.00, from the metadata and from the pixels.

From baseline 04.00 on, a digital number (DN) is 10 000 · reflectance + 1000. Some providers subtract the 1000, some
state so wrongly, and some keep `offset: -0.1` in the metadata after subtracting. The rule depends on the item and its
baseline, never on its date: reprocessed scenes of 2015 have baseline 05.xx. The pixels decide in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ingest.request.products import ProductRule
from ingest.scenes.identity import BASELINE_WEIGHTS
from ingest.scenes.scene import Scene
from ingest.scenes.witnesses import OFFSET_DN, Witness, baseline_has_offset, support_of
from ingest.trust.providers import ProviderRule
from zarr_store.errors import InvalidInput

__all__ = [
    "OFFSET_DN",
    "UNKNOWN_OFFSET",
    "OffsetReading",
    "Verdict",
    "baseline_has_offset",
    "combine_bands",
    "decide_offset",
    "explain_wrong_scale",
    "hear_witnesses",
    "hears_raster_metadata",
    "is_settled_by",
    "needs_closer_look",
    "read_offset",
    "settle_offset",
]

Verdict = Literal["confirmed", "repaired", "contradicted", "inconclusive", "unchecked"]

UNKNOWN_OFFSET = "nothing states the offset"
"""Beginning of the evidence when neither flag, metadata nor baseline state the offset."""


_MIN_PIXELS = 256
"""Smallest number of pixels that decide."""
_MANY_PIXELS = 1 << 16
"""Smallest number of pixels of a region that settle the offset of its scene."""
_RAISED_SHARE, _RAISED_LOW = 0.005, (1000, 1600)
"""Largest share of DN below 1000, and range of the first percentile, of pixels that carry the +1000."""
_DEEP_DN = 750
"""Pixels that carry the +1000 are darker than this only where reflectance is below -0.025."""
_DEEP_SHARE, _DEEP_LOW = 0.05, 500
"""Share of deep pixels and largest first percentile of pixels that probably do not carry it.

Reflectance below -0.05 on a hundredth of a scene is no dark water, but an atmospheric correction that subtracts too
much leaves as little in the shadows of mountains. So metadata that agree weigh more.
"""
_MANY_DEEP, _MANY_ABYSSAL = 0.25, 0.05
"""Share of pixels below `_DEEP_DN`, or of those below `_DEEP_LOW`, that no metadata can explain.

That is reflectance below -0.025 on a quarter of a scene, or below -0.05 on a twentieth of it.
"""
_SHALLOW_LOW, _SHALLOW_SHARE = 850, 0.005
"""Smallest first percentile, and largest share of deep pixels, of pixels that carry it and are partly below 1000."""
_DOUBTED_SHARE, _DOUBTED_DEEP = 0.05, 0.01
"""Share of DN below 1000, and of deep ones, from which on a scene that keeps its offset of -1000 is reported."""
_SURE, _LIKELY, _HINT = 100, 2, 1
"""Weights of pixels: too many too deep; some too deep, or all just above 1000; in part just below 1000."""
_OFFICIAL, _STATED = 3, 1
_DARKEST, _BRIGHTEST = 0.001, 1.6
"""Limits of reflectance: no whole scene is darker than black water or brighter than fresh snow in low sun."""


@dataclass(frozen=True)
class OffsetReading:
    """The evidence of the pixels of the bluest band on the offset.

    Attributes:
        state: "raised" by 1000, "subtracted" (or never raised), or "unclear".
        share_below_1000: Share of the valid DN in 1…999.
        low: First percentile of the valid DN.
        pixels: Number of valid pixels.
        share_deep: Share of the valid DN in 1…749.
        weight: Weight of the state against the evidence of the metadata.
        windows: Number of windows at full resolution; 0 for pixels of an overview.
        share_abyssal: Share of the valid DN in 1…499.
    """

    state: Literal["raised", "subtracted", "unclear"]
    share_below_1000: float | None = None
    low: float | None = None
    pixels: int = 0
    share_deep: float | None = None
    weight: int = _LIKELY
    windows: int = 0
    share_abyssal: float | None = None

    @property
    def dn_offset(self) -> int | None:
        """The offset that follows: 0 or -1000; None if the pixels do not tell."""
        return {"raised": OFFSET_DN, "subtracted": 0}.get(self.state)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def hear_witnesses(
    product: ProductRule,
    provider: ProviderRule,
    collection: str,
    properties: Mapping[str, Any],
    baselines: Mapping[str, str],
    *,
    stated: Mapping[str, float],
    promised: Mapping[str, float],
) -> tuple[Witness, ...]:
    """List all that the metadata say about the offset; arguments as for `decide_offset`.

    Args:
        product: Rules of the product.
        provider: Rules of the provider.
        collection: Collection id.
        properties: Properties of the item.
        baselines: Place → baseline that it names (`ingest.scenes.identity.baselines_of`).
        stated: Band → offset in DN from the item's raster metadata.
        promised: Band → offset in DN from the collection's `item_assets`.
    """
    if not product.offsets:
        return ()
    flagged = provider.flag if provider.offset_rule(collection) == "flag" else None
    flag = _truth(properties.get(flagged)) if flagged else None
    heard = []
    if flagged and flag is not None:
        heard.append(Witness(flagged, str(flag).lower(), 0 if flag else None, _STATED))
    for values, place, weight in (
        (stated, "raster metadata of the item", _STATED),
        (promised, "raster metadata of the collection", 0),  # a collection holds items of all baselines
    ):
        if values:
            offset = next(iter(values.values()))
            known = len(set(values.values())) == 1 and offset in (0, OFFSET_DN)
            # catalogues keep -1000 after the subtraction that their flag reports
            believed = 0 if flag and offset == OFFSET_DN else weight
            shown = f"{offset:g}" if known else ", ".join(f"{band} {v:g}" for band, v in values.items())
            heard.append(Witness(place, shown, int(offset) if known else None, believed if known else 0))
    subtracted = bool(flag) or any(one.dn_offset == 0 and one.weight for one in heard)
    for place, baseline in baselines.items():
        raised = baseline_has_offset(baseline)
        # the original product is no evidence against a provider that reports that it subtracted the offset
        says = None if raised is None or (raised and subtracted) else OFFSET_DN if raised else 0
        heard.append(Witness(place, baseline, says, BASELINE_WEIGHTS.get(place, _OFFICIAL)))
    return tuple(heard)


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


def hears_raster_metadata(
    product: ProductRule, provider: ProviderRule, collection: str, properties: Mapping[str, Any], baseline: str | None
) -> bool:
    """Return whether the raster metadata of an item count in `decide_offset`: no provider rule precedes them."""
    known = baseline_has_offset(baseline) is not None
    rule = provider.offset_rule(collection)
    flag = _truth(properties.get(provider.flag)) if rule == "flag" and provider.flag else None
    return product.offsets and flag is not True and not (known and (flag is False or rule == "baseline"))


def _truth(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def read_offset(*windows: npt.NDArray[Any], full_resolution: bool = False) -> OffsetReading:
    """Decide whether digital numbers of the bluest band still carry the +1000 of baseline 04.00.

    Land that carries it has almost no valid DN in 1…999, and its darkest percent is just above 1000. Dark water that
    carries it reaches a little below 1000, as its reflectance is slightly negative, but not deeper. Subtracted land has
    many DN far below 1000. A few of them may be shadows of mountains, and weigh less than metadata that agree. Clouds
    and snow alone decide nothing. Pixels beside nodata are left out, as lossy compression smears them.

    Args:
        windows: Parts of the band.
        full_resolution: Whether they are pixels of the file itself, and not of an overview.

    >>> read_offset(np.full((64, 64), 300, np.uint16)).state
    'subtracted'
    >>> read_offset(np.full((64, 64), 950, np.uint16)).state
    'raised'
    """
    valid = [(dn > 0) & (dn < 65535) for dn in windows]
    values = np.concatenate([dn[_inside(there)] for dn, there in zip(windows, valid, strict=True)])
    if values.size < _MIN_PIXELS:
        values = np.concatenate([dn[there] for dn, there in zip(windows, valid, strict=True)])
    count = len(windows) if full_resolution else 0
    if values.size < _MIN_PIXELS:
        return OffsetReading("unclear", pixels=int(values.size), windows=count)
    share, deep = float(np.mean(values < -OFFSET_DN)), float(np.mean(values < _DEEP_DN))
    abyssal = float(np.mean(values < _DEEP_LOW))
    low = float(np.percentile(values, 1))
    state: Literal["raised", "subtracted", "unclear"] = "unclear"
    weight = 0
    if deep > _MANY_DEEP or abyssal > _MANY_ABYSSAL:
        state, weight = "subtracted", _SURE
    elif deep > _DEEP_SHARE and low < _DEEP_LOW:
        state, weight = "subtracted", _LIKELY
    elif share < _RAISED_SHARE and _RAISED_LOW[0] <= low <= _RAISED_LOW[1]:
        state, weight = "raised", _LIKELY
    elif deep < _SHALLOW_SHARE and _SHALLOW_LOW <= low < _RAISED_LOW[0]:
        state, weight = "raised", _HINT
    return OffsetReading(
        state, round(share, 6), low, int(values.size), round(deep, 6), weight, count, round(abyssal, 6)
    )


def explain_wrong_scale(dn: npt.NDArray[Any], scale: float) -> str | None:
    """Return the reason why digital numbers cannot be reflectance at `scale`; None if they can.

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
    """Return the valid pixels whose eight neighbours are valid too."""
    padded = np.pad(valid, 1, constant_values=True)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    inside: npt.NDArray[np.bool_] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return inside


def is_settled_by(scene: Scene, reading: OffsetReading) -> bool:
    """Return whether the pixels of a small region suffice: many, in clear agreement with undisputed metadata.

    Pixels that contradict the metadata, or do not tell, never suffice: the rest of the scene may tell more.
    """
    return (
        reading.pixels >= _MANY_PIXELS
        and reading.weight >= _LIKELY
        and reading.dn_offset == scene.dn_offset
        # dark pixels show that the 1000 is absent; bright ground without it looks like ground that has it
        and reading.state == "subtracted"
        and not _is_disputed(scene)
        and not scene.band_offsets
        and not scene.offset_evidence.startswith(UNKNOWN_OFFSET)
    )


def needs_closer_look(scene: Scene, reading: OffsetReading) -> bool:
    """Return whether more pixels must be read: these contradict the metadata, or the metadata are in dispute."""
    if reading.dn_offset is not None and reading.dn_offset != scene.dn_offset:
        return True
    return _is_disputed(scene) and not reading.windows


def combine_bands(bluest: OffsetReading, others: Sequence[OffsetReading]) -> OffsetReading:
    """Return the reading of the bluest band, which counts as "raised" only if no other visible band denies it.

    Bright ground without the offset is as bright in blue as dark ground with it, and much brighter in red.
    """
    if bluest.state == "raised" and any(other.state != "raised" for other in others):
        return replace(bluest, state="unclear", weight=0)
    return bluest


def settle_offset(scene: Scene, reading: OffsetReading | None, *, policy: str) -> tuple[int, Verdict, str | None]:
    """Decide the offset of a scene from its metadata, its pixels and the policy.

    The pixels overrule the metadata where they weigh more than all witnesses together.

    Returns:
        The offset, the verdict of the pixels, and a sentence for the plan, if there is something to state.

    Raises:
        InvalidInput: The policy is "fail", and pixels contradict the metadata or nothing states the offset.
    """
    by_metadata = scene.dn_offset
    unknown = scene.offset_evidence.startswith(UNKNOWN_OFFSET)
    by_pixels = reading.dn_offset if reading is not None else None
    disputed = f"offset: {_dispute(scene)}; {by_metadata:+d} is taken" if _is_disputed(scene) else None
    if reading is None or by_pixels is None:
        verdict: Verdict = "unchecked" if reading is None else "inconclusive"
        if unknown:
            disputed = f"offset: {scene.offset_evidence}, and the pixels do not tell"
        if (unknown or disputed) and policy == "fail":
            raise InvalidInput(f"scene {scene.id}: {disputed}; use --offset-policy warn to take it as {by_metadata}")
        return by_metadata, verdict, disputed or _doubt(scene, reading)
    if by_pixels == by_metadata:
        return by_metadata, "confirmed", f"{disputed}, as the pixels confirm" if disputed else _doubt(scene, reading)
    seen = (
        f"{reading.share_below_1000:.1%} of the pixels are in 1…999 and the darkest percent ends at {reading.low:.0f}: "
        f"{'1000 is still in them' if by_pixels else 'nothing is to be subtracted'}"
    )
    text = f"offset: metadata say {by_metadata:+d} ({scene.offset_evidence}), but {seen}"
    if reading.weight <= _support(scene):
        return by_metadata, "inconclusive", None if _is_old(scene) else f"{text}; the metadata weigh more and are kept"
    if policy == "fail":
        raise InvalidInput(f"scene {scene.id}: {text}; --offset-policy repair follows the pixels, warn the metadata")
    if policy == "warn":
        return by_metadata, "contradicted", f"{text}; the metadata are followed"
    return by_pixels, "repaired", f"{text}; the pixels are followed ({by_pixels:+d})"


def _support(scene: Scene) -> int:
    """Return the weight of the metadata of a scene for its offset; scenes of older plans have no witnesses."""
    if scene.offset_evidence.startswith(UNKNOWN_OFFSET):
        return 0
    if scene.witnesses:
        return max(0 if _is_disputed(scene) else _STATED, support_of(scene.witnesses, scene.dn_offset))
    return _OFFICIAL if _is_old(scene) else _STATED


def _is_old(scene: Scene) -> bool:
    """Return whether the scene is of a time when nothing was added: bright ground does not mean an offset then."""
    return baseline_has_offset(scene.baseline) is False and scene.dn_offset == 0 and not _is_disputed(scene)


def _sides(scene: Scene) -> tuple[list[Witness], list[Witness]]:
    """Return the witnesses that are believed, for the offset of the metadata and against it."""
    heard = [one for one in scene.witnesses if one.weight and one.dn_offset is not None]
    return (
        [one for one in heard if one.dn_offset == scene.dn_offset],
        [one for one in heard if one.dn_offset != scene.dn_offset],
    )


def _is_disputed(scene: Scene) -> bool:
    return bool(_sides(scene)[1])


def _dispute(scene: Scene) -> str:
    agreed, against = (", ".join(map(str, side)) or "nothing" for side in _sides(scene))
    return f"the metadata contradict themselves ({agreed} against {against})"


def _doubt(scene: Scene, reading: OffsetReading | None) -> str | None:
    """Return a sentence for a scene that keeps its -1000 although many pixels are below 1000."""
    if reading is None or scene.dn_offset != OFFSET_DN:
        return None
    if (reading.share_below_1000 or 0.0) <= _DOUBTED_SHARE and (reading.share_deep or 0.0) <= _DOUBTED_DEEP:
        return None
    deep = (reading.share_deep or 0.0) > _DOUBTED_DEEP
    cause = (
        "deep shadows, or 1000 is subtracted already" if deep else "slightly negative reflectance, as over dark water"
    )
    return (
        f"offset: {reading.share_below_1000:.1%} of the pixels are in 1…999, {reading.share_deep or 0.0:.1%} below "
        f"{_DEEP_DN}: {cause}; the metadata ({scene.offset_evidence}) are followed"
    )
