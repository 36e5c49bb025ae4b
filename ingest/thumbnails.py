"""Small pictures of what a search found, one for each time step, before anything is ingested.

Headers are read once, then a few coarse pixels of three bands through the lazy stack and the files' own overviews.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import numpy as np
import numpy.typing as npt

from ingest.plan.candidates import FoundScene, refuse_unopened
from ingest.plan.plan import Plan, plan_scenes, probe_found
from ingest.plan.target import choose_grid
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.scenes.scene import Scene
from ingest.stack import stack
from ingest.trust.redact import redact_text
from zarr_store.errors import AssetUnreadable
from zarr_store.lookup import picture_bands

__all__ = ["Preview", "Thumbnail", "draw_thumbnails", "with_colours"]

_COLOURS = ("red", "green", "blue")
_USUAL = (*_COLOURS, "vv", "vh")
"""True colour of Sentinel-2 and both polarisations of Sentinel-1: names of another product are left to it."""
_AT_ONCE = 8
_DAY, _MONTH = len("2023-08-10"), len("2023-08")


@dataclass(frozen=True)
class Thumbnail:
    """One time step, coarsely.

    Attributes:
        collection: Id.
        time: Of the step, ISO 8601.
        scenes: Ids of the scenes in it.
        cloud: Share of clouds, the mean over its scenes; None where it is not known.
        pixels: (3, y, x) of stored numbers, for red, green and blue of a picture.
        seen: (y, x), where there is data.
        kind: "reflectance" or "backscatter".
    """

    collection: str
    time: str
    scenes: tuple[str, ...]
    cloud: float | None
    pixels: npt.NDArray[np.generic]
    seen: npt.NDArray[np.bool_]
    kind: str


@dataclass(frozen=True)
class Preview:
    """What a search found, as pictures and in words.

    Attributes:
        plan: The coarse plan that was read.
        thumbnails: The first time steps.
        unread: Scenes that could not be read, with the cause.
        left_out: Scenes of later time steps.
    """

    plan: Plan
    thumbnails: tuple[Thumbnail, ...]
    unread: tuple[str, ...]
    left_out: int


def draw_thumbnails(
    scenes: Sequence[Scene], config: IngestConfig, source: str, *, side_px: int = 256, most: int = 24
) -> Preview:
    """Read the first time steps of scenes that were found, so coarsely that the longer side has about `side_px` pixels.

    Args:
        scenes: From a search for `config`, or for `with_colours(config)`.
        config: Region, bands, grouping, trust.
        source: Where they were found.
        side_px: Longer side of a thumbnail.
        most: Time steps that are read; no file of others is opened.

    Raises:
        NothingFound: None of them lies in the region.
        AssetUnreadable: Not one file could be opened.
    """
    near = _first_steps(scenes, config, most)
    probes = probe_found(near, config, source)
    found = [FoundScene.of(scene, probes) for scene in near]
    candidates = [candidate for one in found for candidate in one.candidates()]
    if not candidates:
        refuse_unopened(found)
    fine = choose_grid(candidates, config).grid
    coarse = max(
        max(fine.resolution), max(f * n for f, n in zip(fine.resolution, fine.shape[::-1], strict=True)) / side_px
    )
    asked = config.model_copy(update={"resolution": coarse, "crs": fine.crs})
    plan = plan_scenes(near, probes, asked, source=source)
    access = replace(Access.of(config, source), sign=config.sign)
    thumbnails: list[Thumbnail] = []
    unread: list[str] = []
    for recipe in plan.recipes:
        made, lost = _of_collection(plan, recipe.spec.collection, access)
        thumbnails += made
        unread += lost
    return Preview(plan, tuple(thumbnails[:most]), tuple(unread), len(scenes) - len(near))


def with_colours(config: IngestConfig) -> IngestConfig:
    """`config`, with the bands that a picture needs where none are named."""
    return config if config.bands else config.model_copy(update={"bands": _USUAL})


def _first_steps(scenes: Sequence[Scene], config: IngestConfig, most: int) -> list[Scene]:
    """Scenes of the first `most` time steps of each collection, before their steps are known to the second."""
    length = {"solar-day": _DAY, "month": _MONTH}.get(config.group)
    steps: dict[str, dict[str, None]] = {}
    kept = []
    for scene in sorted(scenes, key=lambda one: (one.collection, one.datetime, one.id)):
        step = scene.datetime[:length] if length else scene.id
        known = steps.setdefault(scene.collection, {})
        if step in known or len(known) < most:
            known[step] = None
            kept.append(scene)
    return kept


def _of_collection(plan: Plan, collection: str, access: Access) -> tuple[list[Thumbnail], list[str]]:
    spec = plan.recipe(collection).spec
    rows = plan.items[collection]
    names = [spec.band_names[position] for position in picture_bands(spec.band_names)]
    lazy = stack(plan, collection, chunk=max(plan.grid.shape), access=access, overviews=True).sel(band=names)
    place = {str(item): at for at, item in enumerate(lazy["id"].values)}
    made, unread = [], []
    for step, time in enumerate(spec.times):
        order = list(
            dict.fromkeys(
                scene.item_id
                for task in plan.tasks
                if task.collection == collection
                for scene in task.sources
                if scene.step == step
            )
        )
        pixels = np.zeros((3, *plan.grid.shape), lazy.dtype)
        seen = np.zeros(plan.grid.shape, bool)
        for item in order:
            if item not in place:
                continue
            try:
                with dask.config.set(scheduler="threads", num_workers=_AT_ONCE):
                    values = lazy[place[item]].to_numpy()
            except AssetUnreadable as error:
                unread.append(redact_text(str(error)))
                continue
            fresh = np.isfinite(values).all(axis=0) & (values != 0).any(axis=0) & ~seen
            np.copyto(pixels, values, where=fresh)
            seen |= fresh
        shares = [share for row in rows if row["step"] == step and (share := _cloud(row)) is not None]
        cloud = sum(shares) / len(shares) if shares else None
        made.append(Thumbnail(collection, time, tuple(order), cloud, pixels, seen, spec.kind))
    return made, unread


def _cloud(row: Mapping[str, Any]) -> float | None:
    if row.get("cloud_share") is not None:
        return float(row["cloud_share"])
    return None if row.get("cloud_cover") is None else float(row["cloud_cover"]) / 100.0
