"""Sentences of a plan on the overviews that it reads, and on those that were asked for and are not read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ingest.plan.task import PlannedScene, Recipe, SourceAsset
from ingest.raster.overview import AT_LEAST, ROUNDING, UNSTATED
from ingest.raster.read import reads_overviews
from ingest.raster.resample import axis_ratios

if TYPE_CHECKING:
    from ingest.plan.candidates import ProbedScene
    from ingest.plan.probe import AssetProbe

__all__ = ["count_overviews", "describe_overviews", "list_overviews", "overview_of"]

_MEANS = ("average", "average_bit2grayscale")
"""Resamplings that give each pixel of the file the same weight."""


def overview_of(asset: SourceAsset, recipe: Recipe) -> int | Literal["any"] | None:
    """Return the overview from which a shard is made, as `read_on_grid` takes it; None for the full image.

    A file that could not be opened when the plan was made decides it when it is read.
    """
    if not recipe.overviews or not reads_overviews(asset, asset.stored):
        return None
    return asset.overview if asset.header is not None else "any"


def list_overviews(
    planned: Iterable[PlannedScene], members: Sequence[ProbedScene]
) -> dict[str, dict[str, dict[str, Any]]]:
    """List the overviews that a plan reads: item id → band → factor, and resampling as the file states it."""
    probes = {one.scene.id: one.probe for one in members}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for scene in planned:
        probe = probes.get(scene.item_id)
        for asset in scene.assets:
            if asset.overview is None:
                continue
            about = probe.assets[asset.band].overview(asset.overview) if probe else None
            resampling = about.resampling if about else UNSTATED
            found.setdefault(scene.item_id, {})[asset.band] = {"factor": asset.overview, "resampling": resampling}
    return found


def describe_overviews(recipe: Recipe, planned: Sequence[PlannedScene], members: Sequence[ProbedScene]) -> list[str]:
    """Return sentences on files whose overviews are not read although asked for, or are not plain averages.

    Args:
        recipe: Recipe of the collection.
        planned: Its scenes.
        members: The same scenes with what their files say.
    """
    if not recipe.overviews:
        return []
    probes = {one.scene.id: one.probe for one in members}
    bands_by_text: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    compared = coarse = 0
    for scene in planned:
        probe = probes.get(scene.item_id)
        for asset in scene.assets:
            about = probe.assets.get(asset.band) if probe else None
            if asset.kind != "data" or asset.header is None or about is None:
                continue
            compared += 1
            ratio = min(axis_ratios(asset.header, recipe.spec.grid))
            if ratio < AT_LEAST:
                continue
            coarse += 1
            used = about.overview(asset.overview) if asset.overview else None
            coarser = [factor for factor in about.overviews if used and used.factor < factor <= ratio * ROUNDING]
            refused = [factor for factor in coarser if about.overview(factor) is None]
            if used is not None and refused and about.no_overviews:
                text = f"overviews at 1/{used.factor} are read, and no coarser ones: {about.no_overviews}"
                bands_by_text[text][scene.item_id].append(asset.band)
            if used is None:
                may = reads_overviews(asset, asset.stored)
                text = f"overviews are not read: {_why_not(about, may)}; all pixels of the file are averaged"
            elif used.resampling in _MEANS:
                continue
            elif used.resampling == UNSTATED:
                text = f"overviews at 1/{used.factor} are read; the file does not state how they were made"
            else:
                text = f"the overviews at 1/{used.factor} are no plain averages: their resampling is {used.resampling}"
            bands_by_text[text][scene.item_id].append(asset.band)
    if compared and not coarse:
        return ["--overviews changes nothing: the grid is less than twice as coarse as every file of reflectance"]
    return [_sentence(text, bands, len(planned)) for text, bands in bands_by_text.items()]


def count_overviews(overviews: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the overviews of a collection in a few words.

    >>> count_overviews({"a": {"red": {"factor": 4, "resampling": "average"}}})
    '1 file at 1/4 (average)'
    """
    counts = Counter((one["factor"], one["resampling"]) for bands in overviews.values() for one in bands.values())
    return ", ".join(
        f"{count} file{'s' if count > 1 else ''} at 1/{factor} ({resampling})"
        for (factor, resampling), count in sorted(counts.items())
    )


def _why_not(about: AssetProbe, may: bool) -> str:
    if not may:
        return "only those of reflectance are, whose one value without data is 0"
    if about.no_overviews:
        return about.no_overviews
    return "the finest is coarser than the grid"


def _sentence(text: str, bands: Mapping[str, Sequence[str]], scenes: int) -> str:
    names = ", ".join(dict.fromkeys(band for some in bands.values() for band in some))
    return f"{next(iter(bands)) if len(bands) == 1 else f'{len(bands)} of {scenes} scenes'}: {names}: {text}"
