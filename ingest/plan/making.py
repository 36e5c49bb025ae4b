"""Make a plan: search for scenes, probe their files, choose the grid, cut shards and give each its sources.

`plan_scenes` is pure: it opens nothing and reads no pixel. Everything up to the plan runs once, on the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ingest.pixels.clip import clip_on, clip_text, reduced
from ingest.pixels.indices import refuse_indices_without_reflectance
from ingest.plan.candidates import (
    Drop,
    ProbedScene,
    Probes,
    make_collection_spec,
    place_scenes,
    product_of,
    refuse_unopened,
    select_scenes,
)
from ingest.plan.grouping import group_scenes, overlap_order
from ingest.plan.native import groups_of, measure_sizes, nest_target, share_indices
from ingest.plan.overviews import describe_overviews
from ingest.plan.plan import Origin, Plan
from ingest.plan.reach import make_tasks
from ingest.plan.statistics import collect_statistics, list_discrepancies
from ingest.plan.target import TargetGrid, choose_grid, doubt_resolution
from ingest.plan.task import Recipe
from ingest.request.config import IngestConfig
from ingest.request.products import choose_bands
from ingest.scenes.dedupe import Duplicate
from ingest.scenes.scene import Scene
from ingest.scenes.search import Unusable
from ingest.trust.redact import redact_text, redact_url
from zarr_store.errors import AccessError, InvalidInput, NothingFound
from zarr_store.grid import Grid
from zarr_store.spec import LAYOUTS, Layout

__all__ = ["check_hosts_and_probe", "make_plan", "plan_scenes", "probe_and_plan"]


def make_plan(source: str, config: IngestConfig) -> Plan:
    """Search for scenes, probe their files, and plan.

    Raises:
        NothingFound: No scene matches, or none lies in the region.
        InvalidInput: The source or the selection cannot be used.
        AccessError: The source cannot be reached, or no file could be opened.
    """
    from ingest.scenes.search import find_scenes

    result = find_scenes(source, config)
    return probe_and_plan(result.scenes, config, source, unusable=result.unusable, duplicates=result.duplicates)


def probe_and_plan(
    scenes: Sequence[Scene],
    config: IngestConfig,
    source: str,
    *,
    unusable: Sequence[Unusable] = (),
    duplicates: Sequence[Duplicate] = (),
) -> Plan:
    """Probe the files of scenes and plan; errors are those of `make_plan`.

    Args:
        scenes: Scenes that a search in `source` returned.
        config: Settings of the request.
        source: SOURCE as the user typed it.
        unusable: Items that the search left out; the plan names them in its warnings.
        duplicates: Copies that the search left out; the plan lists them among its drops.
    """
    from ingest.trust.hrefs import is_url

    shown = redact_url(source) if is_url(source) else str(Path(source).expanduser().resolve())
    plan = plan_scenes(scenes, check_hosts_and_probe(scenes, config, source), config, source=shown)
    left_out = tuple(f"{one.collection}: item {one.item_id!r} is left out: {one.reason}" for one in unusable)
    drops = (*_copies_of(duplicates), *plan.drops)
    return replace(plan, drops=drops, warnings=(*left_out, *plan.warnings), origin=Origin(source, config))


def _copies_of(duplicates: Sequence[Duplicate]) -> tuple[Drop, ...]:
    """Return the drops of a plan for copies that a search left out."""
    return tuple(
        Drop(one.dropped.collection, one.dropped.id, redact_text(one.reason), copy_of=one.kept.id) for one in duplicates
    )


def check_hosts_and_probe(scenes: Sequence[Scene], config: IngestConfig, source: str) -> Probes:
    """Check that every host of the scenes may be opened, then read the headers of their files.

    Args:
        scenes: Scenes that a search in `source` returned.
        config: Settings of the request.
        source: SOURCE as the user typed it; its own host may be a private one.
    """
    from ingest.plan.probe import probe_scenes
    from ingest.trust.hrefs import refuse_private_address

    policy = config.trust.href_policy(source)
    hosts = {urlsplit(a.href).netloc: a.href for s in scenes for a in s.assets.values() if "://" in a.href}
    for href in hosts.values():
        with suppress(AccessError):  # an unknown host name becomes the error of each of its assets
            refuse_private_address(href, policy)
    return probe_scenes(scenes, config, source=source)


def plan_scenes(
    scenes: Sequence[Scene],
    probes: Probes,
    config: IngestConfig,
    *,
    source: str = "",
    layout: Layout | None = None,
    grid: Grid | None = None,
    clip: str | None = None,
    kept: Sequence[Recipe] = (),
) -> Plan:
    """Plan the ingest of `scenes`, without opening a file.

    Args:
        scenes: Scenes that `find_scenes` returned.
        probes: (collection, id), or the id alone, → what the headers and a few pixels of the scene's files say.
        config: Settings of the request.
        source: SOURCE as the plan shows it.
        layout: Sizes of chunks and shards; None for those of the profile in `config`.
        grid: Grid of a cube that the scenes are added to; None to choose one from the files.
        clip: Area of that cube, as its recipe keeps it; None for that of `config`.
        kept: Recipes of that cube; groups of native grids stay as they are.

    Raises:
        NothingFound: No scene touches the region.
        InvalidInput: Native grids are asked for, and those of the files do not nest.
        AssetUnreadable: Not one file could be opened.
    """
    if not scenes:
        raise NothingFound("no scenes to plan: the search found nothing; widen --bbox, --datetime or --query")
    probed = [ProbedScene.of(scene, probes) for scene in scenes]
    candidates = [c for f in probed for c in f.candidates()]
    if not candidates:
        refuse_unopened(probed)
    unseen = [f.stated_place() for f in probed if f.scene.assets and not f.candidates()]
    target = (
        TargetGrid(grid, (f"grid: {grid}, that of the cube",))
        if grid
        else choose_grid(candidates, config, unseen=unseen)
    )
    sizes = measure_sizes(probed, config) if config.grid.native and not grid else None
    if sizes:
        target = nest_target(target, probed, sizes, config)
    used, drops = select_scenes(probed, target.grid, config)
    west, _, east, _ = target.grid.lonlat_bounds()
    longitude = (west + (east + 360.0 if east < west else east)) / 2.0
    recipes, items, tasks, statistics = [], {}, [], {}
    warnings = [] if grid else doubt_resolution(target.grid, candidates, config)
    for collection in dict.fromkeys(f.scene.collection for f in used):
        members = [f for f in used if f.scene.collection == collection]
        by_id = {f.scene.id: f for f in members}
        product = product_of(members[0].scene)
        choice = choose_bands(product, config.selection.bands, config.pixels.mask)
        steps, remarks = group_scenes(
            [f.scene for f in members],
            group=config.pixels.group,
            longitude=longitude,
            order=overlap_order(
                lambda scene, by=by_id: by[scene.id].rank(target.grid),  # type: ignore[misc]
                lambda scene, by=by_id: by[scene.id].cloud_share,  # type: ignore[misc]
            ),
        )
        warnings += [f"{collection}: {text}" for text in (*remarks, *list_discrepancies(members))]
        groups = groups_of(collection, choice, target.grid, layout or LAYOUTS[config.grid.profile], sizes, kept)
        for group, indices in zip(groups, share_indices(groups, config.pixels.indices), strict=True):
            own = next((recipe.clip for recipe in kept if recipe.spec.collection == group.name), clip) if clip else None
            recipe = Recipe(
                make_collection_spec(group.name, product, group.choice, group.grid, steps, group.layout,
                                     config.model_copy(update={"indices": indices}), scenes=len(members)),
                choice.mask.name if choice.mask else None,
                tuple(sorted(config.pixels.mask_classes)) if choice.mask else (),
                config.pixels.mask_dilate_m if choice.mask else 0.0,
                _clip(config, group.grid, own) if config.pixels.clip else None,
                group.scenes,
                overviews=config.grid.read_overviews,
            )  # fmt: skip
            table, planned = place_scenes(recipe, steps, by_id, config)
            warnings += [f"{group.name}: {text}" for text in describe_overviews(recipe, planned, members)]
            recipes.append(recipe)
            items[group.name] = table
            made = make_tasks(recipe, planned)
            tasks += made
            statistics[group.name] = collect_statistics(recipe, members, made)
    # the finest grid comes first: it is that of the cube
    recipes.sort(key=lambda recipe: recipe.spec.grid.resolution if sizes else (0.0, 0.0))
    refuse_indices_without_reflectance(config.pixels.indices, [recipe.spec.kind for recipe in recipes])
    return Plan(
        recipes=tuple(recipes),
        items=items,
        tasks=tuple(sorted(tasks)),
        drops=tuple(replace(drop, reason=redact_text(drop.reason)) for drop in drops),
        warnings=tuple(redact_text(text) for text in warnings),
        reasons=target.reasons,
        statistics=statistics,
        config=_kept_settings(config),
        source=source,
    )


def _clip(config: IngestConfig, grid: Grid, kept: str | None) -> str | None:
    """Return the text of the area that a plan is clipped to.

    Raises:
        InvalidInput: `config` has only the reduced form of an area, and there is no cube that keeps the whole one.
    """
    geometry = config.selection.geometry
    if kept is not None:
        return kept
    if geometry is not None and "sha256" in geometry:
        raise InvalidInput(
            "geometry is the reduced form in which a plan keeps a region of very many vertices; give the file of the "
            "whole region with --geometry"
        )
    return clip_on(clip_text(geometry), grid)


def _kept_settings(config: IngestConfig) -> dict[str, Any]:
    settings = config.plan_settings()
    if settings.get("geometry") is not None:
        settings["geometry"] = reduced(settings["geometry"])
    return settings
