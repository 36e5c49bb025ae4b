"""`draw_thumbnails` makes a small picture of each time step that a search found, before anything is ingested.

Headers are read once, then a few coarse pixels of three bands through the lazy stack and the files' own overviews.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import numpy as np
import numpy.typing as npt

from ingest.plan.candidates import ProbedScene, refuse_unopened
from ingest.plan.making import check_hosts_and_probe, plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.target import choose_grid
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.scenes.scene import Scene
from ingest.stack import stack
from ingest.trust.redact import redact_text
from zarr_store.errors import AssetUnreadable
from zarr_store.lookup import picture_bands

__all__ = ["Preview", "Thumbnail", "add_colours", "draw_thumbnails"]

_COLOURS = ("red", "green", "blue")
_USUAL = (*_COLOURS, "vv", "vh")
"""True colour of Sentinel-2 and both polarisations of Sentinel-1; each product uses the names that it has."""
_AT_ONCE = 8
"""Number of blocks that are read at once."""
_DAY, _MONTH = len("2023-08-10"), len("2023-08")
"""Number of characters of a date that name its day and its month."""


@dataclass(frozen=True)
class Thumbnail:
    """A coarse picture of one time step.

    Attributes:
        collection: Id of the collection.
        time: Time of the step, ISO 8601.
        scenes: Ids of its scenes.
        cloud: Share of clouds, the mean over its scenes; None where it is not known.
        pixels: Stored values (3, y, x) for red, green and blue of the picture.
        seen: Mask (y, x), True where there is data.
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
    """The pictures of a search.

    Attributes:
        plan: The coarse plan that was read.
        thumbnails: Pictures of the first time steps.
        unread: Scenes that could not be read, with the cause.
        left_out: Number of scenes of later time steps.
    """

    plan: Plan
    thumbnails: tuple[Thumbnail, ...]
    unread: tuple[str, ...]
    left_out: int


def draw_thumbnails(
    scenes: Sequence[Scene], config: IngestConfig, source: str, *, side_px: int = 256, most: int = 24
) -> Preview:
    """Read the first time steps of scenes, so coarsely that the longer side has about `side_px` pixels.

    Args:
        scenes: Result of a search with `config`, or with `add_colours(config)`.
        config: Region, bands, grouping and trust.
        source: The source of the scenes.
        side_px: Longer side of a thumbnail in pixels.
        most: Largest number of time steps; no file of others is opened.

    Raises:
        NothingFound: No scene lies in the region.
        AssetUnreadable: No file could be opened.
    """
    near = _first_steps(scenes, config, most)
    probes = check_hosts_and_probe(near, config, source)
    found = [ProbedScene.of(scene, probes) for scene in near]
    candidates = [candidate for one in found for candidate in one.candidates()]
    if not candidates:
        refuse_unopened(found)
    fine = choose_grid(candidates, config).grid
    coarse = max(
        max(fine.resolution), max(f * n for f, n in zip(fine.resolution, fine.shape[::-1], strict=True)) / side_px
    )
    asked = config.model_copy(update={"native": False, "resolution": coarse, "crs": fine.crs})
    plan = plan_scenes(near, probes, asked, source=source)
    access = replace(Access.of(config, source), sign=config.trust.sign)
    thumbnails: list[Thumbnail] = []
    unread: list[str] = []
    for recipe in plan.recipes:
        made, lost = _of_collection(plan, recipe.spec.collection, access)
        thumbnails += made
        unread += lost
    return Preview(plan, tuple(thumbnails[:most]), tuple(unread), len(scenes) - len(near))


def add_colours(config: IngestConfig) -> IngestConfig:
    """Add the bands that a picture needs to a configuration that names none."""
    return config if config.selection.bands else config.model_copy(update={"bands": _USUAL})


def _first_steps(scenes: Sequence[Scene], config: IngestConfig, most: int) -> list[Scene]:
    """Choose the scenes of the first `most` time steps of each collection by their dates, before any file is opened."""
    length = {"solar-day": _DAY, "month": _MONTH}.get(config.pixels.group)
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
