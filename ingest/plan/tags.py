"""Apply the tags of a scene's files to a plan: scale, offset and unit that the files state about their numbers.

How the numbers are converted is decided again when they are read (`ingest.raster.values`). Here is what concerns the
scene as a whole, and the sentences for the person who reads the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ingest.raster.asset_file import find_mask_beside
from ingest.raster.values import DECIBEL
from ingest.request.products import PRODUCTS
from ingest.scenes.offsets import OFFSET_DN, UNKNOWN_OFFSET
from ingest.scenes.scene import AssetRef, Scene
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from ingest.raster.read import Stored

__all__ = ["describe_conversion", "find_refusals", "follow_offset_of_files", "stored_type"]

_MOST_NEGATIVE = 0.5
"""Largest share of negative pixels of a scene in linear power; noise that was subtracted leaves few."""


def stored_type(scene: Scene, asset: AssetRef) -> Stored:
    """Return the type of the pixels of an asset in a cube."""
    if asset.kind == "class":
        return "uint8"
    return "float32" if _is_radar(scene) else "uint16"


def find_refusals(scene: Scene, units: Mapping[str, str], negative: float | None, *, strict: bool) -> dict[str, str]:
    """Find the bands that can be read and are not used, because what they hold would be misread.

    These are bands of a radar scene whose pixels are negative although nothing states that they are in decibel, and
    local files beside which a mask lies: only the files themselves are read, and the mask would be lost.

    Args:
        scene: The scene.
        units: Unit that the file states, by band, for the bands whose files could be opened.
        negative: Share of negative pixels of one of its bands; None where it was not measured.
        strict: Whether a refusal is an error.

    Returns:
        Band → reason.

    Raises:
        InvalidInput: A band is refused, and `strict`.
    """
    refusals = {}
    most_negative = _is_radar(scene) and negative is not None and negative > _MOST_NEGATIVE
    for band, unit in units.items():
        asset = scene.assets[band]
        name = find_mask_beside(asset.href)
        if name is not None:
            refusals[band] = (
                f"a mask lies beside the file ({name}), and only the file itself is read: write the mask into the "
                "file, or take the mask away"
            )
        elif most_negative and asset.kind == "data" and not _in_decibel(asset, unit):
            refusals[band] = (
                f"expected linear power, {negative:.0%} of the pixels are negative: they seem to be in decibel; state "
                "the unit dB in the item's raster:bands or in the file, or convert the file"
            )
    if refusals and strict:
        band, reason = next(iter(refusals.items()))
        raise InvalidInput(f"scene {scene.id}: {band}: {reason}")
    return refusals


def follow_offset_of_files(
    scene: Scene, offsets: Mapping[str, float], tagged: Collection[str]
) -> tuple[Scene, list[str], frozenset[str]]:
    """Take the offset that the files of a scene state where nothing else states one, band by band where they differ.

    Args:
        scene: The scene.
        offsets: Offset in digital numbers that the file of each band states; 0.0 where it states none.
        tagged: Bands whose files state a scale or an offset, so that an offset of 0 is stated too.

    Returns:
        The scene, the sentences for the plan, and the bands whose offset nothing states while those of others differ.
        Where the metadata state another offset, the pixels decide.
    """
    data = [band for band in offsets if scene.assets[band].kind == "data" and not _is_radar(scene)]
    raised = [band for band in data if offsets[band] == OFFSET_DN]
    plain = [band for band in data if offsets[band] == 0 and band in tagged]
    silent = [band for band in data if band not in raised and band not in plain]
    if not raised:
        return scene, [], frozenset()
    tags = f"{', '.join(raised)}: the file states an offset of {OFFSET_DN} (OFFSET tag)"
    tags += f", {', '.join(plain)}: of 0" if plain else ""
    tags += f", {', '.join(silent)}: none" if silent else ""
    unknown = scene.offset_evidence.startswith(UNKNOWN_OFFSET)
    if plain or (unknown and silent):
        # a tag of -1000 that is older than the subtraction is frequent; one of 0 beside it is meant as it stands
        own = {band: OFFSET_DN if unknown else scene.offset_of(band) for band in raised} | dict.fromkeys(plain, 0)
        return (
            replace(scene, band_offsets={**scene.band_offsets, **own}),
            [f"{tags}; each band is decided by itself"],
            frozenset(silent) if unknown else frozenset(),
        )
    if scene.dn_offset == OFFSET_DN:
        return scene, [], frozenset()
    if not unknown:
        text = f"{tags}, the metadata {scene.dn_offset:+d} ({scene.offset_evidence}); the pixels decide"
        return scene, [text], frozenset()
    evidence = f"the tags of the files state {OFFSET_DN}, and nothing else states an offset"
    followed = replace(scene, dn_offset=OFFSET_DN, offset_evidence=evidence)
    return followed, [f"{tags}; nothing else does: it is followed"], frozenset()


def describe_conversion(scene: Scene, asset: AssetRef, stated_scale: float, unit: str) -> str | None:
    """Describe how the numbers of a file are converted because of what it states; None where they are not."""
    if _is_radar(scene):
        in_decibel = _in_decibel(asset, unit)
        return "the unit is stated as dB: the numbers are converted to linear power" if in_decibel else None
    scale = next(rule.scale for rule in PRODUCTS if rule.name == scene.product)
    if stated_scale == 1.0 or abs(stated_scale / scale - 1.0) < 1e-5:
        return None
    return f"the file states a scale of {stated_scale:g}: its numbers are converted to {scale:g}"


def _is_radar(scene: Scene) -> bool:
    return any(rule.name == scene.product and rule.kind == "backscatter" for rule in PRODUCTS)


def _in_decibel(asset: AssetRef, unit: str) -> bool:
    return (unit or asset.unit or "").strip().lower() in DECIBEL
