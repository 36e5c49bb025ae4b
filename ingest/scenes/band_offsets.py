"""Offsets of single bands, where the metadata or the files of one scene state different ones.

All bands of a product carry the same offset, but providers rewrite files band by band. So each band's own statement is
followed and held against its own pixels; a band of which nobody knows the offset is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ingest.scenes.offsets import UNKNOWN_OFFSET, OffsetReading, Verdict, settle_offset
from ingest.scenes.scene import Scene
from ingest.scenes.witnesses import OFFSET_DN, Witness
from zarr_store.errors import InvalidInput

__all__ = ["BandOffsets", "own_offsets", "settle_bands"]

_BLUEST = ("coastal", "blue")
"""Bands whose dark ground tells the +1000 from bright ground; in other bands bright ground looks the same."""


@dataclass(frozen=True)
class BandOffsets:
    """The offsets of the bands of one scene.

    Attributes:
        offsets: Band → what must be added to its digital numbers: 0 or -1000.
        verdicts: Band → verdict of its pixels.
        refusals: Band → why nobody knows its offset.
        sentences: What the plan states about them.
    """

    offsets: Mapping[str, int]
    verdicts: Mapping[str, Verdict]
    refusals: Mapping[str, str]
    sentences: tuple[str, ...]


def own_offsets(stated: Mapping[str, float], bands: Collection[str], *, known: bool) -> tuple[dict[str, int], set[str]]:
    """Find the offset of each band, where the raster metadata of an item state different ones.

    Args:
        stated: Band → offset in digital numbers that the raster metadata state.
        bands: Data bands of the scene.
        known: Whether anything else states an offset, which holds for the bands that state none.

    Returns:
        Band → offset, for the bands that state one which can be applied; and the bands of which nobody knows it. Both
        are empty where the bands do not differ.

    >>> own_offsets({"blue": -1000, "red": 0}, ["blue", "red", "nir"], known=False)
    ({'blue': -1000, 'red': 0}, {'nir'})
    """
    if len(set(stated.values())) < 2:
        return {}, set()
    own = {band: int(value) for band, value in stated.items() if value in (0, OFFSET_DN)}
    return own, {band for band in bands if band not in own and (band in stated or not known)}


def settle_bands(
    scene: Scene, readings: Mapping[str, OffsetReading], unknown: Collection[str], *, policy: str
) -> BandOffsets:
    """Decide the offset of each data band of a scene by itself.

    Args:
        scene: The scene, with the offsets that its bands state.
        readings: Band → what its own pixels say; bands that could not be read are left out.
        unknown: Bands whose offset nothing states; their pixels must tell it.
        policy: As for `ingest.scenes.offsets.settle_offset`.

    Raises:
        InvalidInput: The policy is "fail", and the pixels of a band contradict what is stated of it.
    """
    offsets: dict[str, int] = {}
    verdicts: dict[str, Verdict] = {}
    refusals: dict[str, str] = {}
    sentences: list[str] = []
    for band in (name for name, asset in scene.assets.items() if asset.kind == "data"):
        reading = readings.get(band)
        if reading is not None and reading.state == "raised" and band not in _BLUEST:
            reading = replace(reading, state="unclear", weight=0)
        own = scene.offset_of(band)
        if band in unknown:
            if reading is None or reading.dn_offset is None:
                refusals[band] = _refuse(scene, band, policy)
                offsets[band], verdicts[band] = own, "unchecked"
                continue
            offsets[band], verdicts[band] = reading.dn_offset, "repaired"
            sentences.append(f"{band}: {UNKNOWN_OFFSET} of this band; its pixels are followed ({reading.dn_offset:+d})")
            continue
        stated = band in scene.band_offsets
        alone = replace(
            scene,
            dn_offset=own,
            offset_evidence=f"the band states {own:+d} itself" if stated else scene.offset_evidence,
            witnesses=(*scene.witnesses, Witness(f"{band} itself", f"{own:+d}", own, 1)) if stated else scene.witnesses,
        )
        offsets[band], verdicts[band], sentence = settle_offset(alone, reading, policy=policy)
        sentences += [f"{band}: {sentence}"] if sentence else []
    return BandOffsets(offsets, verdicts, refusals, tuple(sentences))


def _refuse(scene: Scene, band: str, policy: str) -> str:
    reason = (
        f"{UNKNOWN_OFFSET} of {band}, those of the other bands differ, and its pixels do not tell: state `offset` in "
        "the raster:bands of each asset, or the OFFSET tag in each file"
    )
    if policy == "fail":
        raise InvalidInput(f"scene {scene.id}: {reason}")
    return reason
