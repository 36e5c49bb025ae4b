"""`Plan`: all that an ingest will do, as a value. Scenes, headers and config go in; grid, shards and sources come out.

`plan_scenes` is pure: it opens nothing and reads no pixel. A plan is JSON both ways, its digest is stable, and its
summary is the dry run. Workers get tasks of the plan and never ask a catalogue.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from ingest.pixels.clip import clip_text
from ingest.pixels.indices import refuse_indices_without_reflectance
from ingest.plan.candidates import (
    Drop,
    FoundScene,
    Probes,
    collection_spec,
    place_scenes,
    product_of,
    refuse_unopened,
    select_scenes,
    sources_of,
)
from ingest.plan.grouping import group_scenes, overlap_order
from ingest.plan.statistics import collection_statistics, discrepancies
from ingest.plan.target import TargetGrid, choose_grid
from ingest.plan.task import PlannedScene, Recipe, ShardTask, digest
from ingest.request.config import IngestConfig
from ingest.request.products import choose_bands
from ingest.request.trust import Trust
from ingest.scenes.scene import Scene
from ingest.scenes.search import Unusable
from ingest.trust.redact import redact_text, redact_url
from zarr_store.bounded import load_json, read_file
from zarr_store.durable import write_file
from zarr_store.errors import AccessError, InvalidInput, NothingFound
from zarr_store.grid import Grid
from zarr_store.regions import Region
from zarr_store.spec import LAYOUTS, CubeSpec, Layout

__all__ = ["Drop", "Origin", "Plan", "make_plan", "plan_found", "plan_scenes", "probe_found"]

_FORMAT = 1
_MOST_BYTES = 256 << 20
"""Of a plan; that of 100,000 shards has about 60 MB."""


@dataclass(frozen=True)
class Origin:
    """Who asked for a plan in this process. It is never saved: a plan that comes from elsewhere gives no trust.

    Attributes:
        typed: SOURCE as the user gave it.
        config: What was asked, and who was trusted.
    """

    typed: str
    config: IngestConfig


@dataclass(frozen=True)
class Plan:
    """What an ingest will do.

    Attributes:
        recipes: One per collection.
        items: Collection → item table; `source_item` counts its rows.
        tasks: Every shard, in order.
        drops: Scenes that are not used.
        warnings: What a person should know before the run.
        reasons: Why this grid.
        facts: Collection → resampled_share, offset_verdicts, bytes_to_read, bytes_to_write, requests and more.
        config: What was asked, without what only concerns the running, and without what was trusted.
        source: Where the scenes were found, without secrets.
        origin: Who asked for it, where it was made by this process; None where it was read.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> plan.save("plan.json")
        >>> Plan.load("plan.json").digest == plan.digest
        True
        >>> print(plan.summary().splitlines()[1])
        grid      EPSG:32633 64×64 px at 10
    """

    recipes: tuple[Recipe, ...]
    items: Mapping[str, tuple[Mapping[str, Any], ...]]
    tasks: tuple[ShardTask, ...]
    drops: tuple[Drop, ...] = ()
    warnings: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def specs(self) -> tuple[CubeSpec, ...]:
        """What `create_cube` is given."""
        return tuple(recipe.spec for recipe in self.recipes)

    @property
    def grid(self) -> Grid:
        """The grid of all collections."""
        return self.recipes[0].spec.grid

    def recipe(self, collection: str) -> Recipe:
        """The recipe of a collection."""
        return next(recipe for recipe in self.recipes if recipe.spec.collection == collection)

    @cached_property
    def digest(self) -> str:
        """Of all that determines the cube: specs, rules, items and sources; not of remarks, estimates or workers."""
        return digest(
            {
                "recipes": [[recipe.rules(), list(recipe.spec.times)] for recipe in self.recipes],
                "items": {name: [dict(item) for item in rows] for name, rows in self.items.items()},
                "tasks": [task.key for task in self.tasks],
            }
        )

    @cached_property
    def unordered_digest(self) -> str:
        """As `digest`, but for the order in which scenes win and the cloud shares that it comes from.

        A file that could not be opened when a plan was made has no cloud share; the plan that finds it healed may put
        its scene elsewhere, and is still a plan of the same cube.
        """
        bare = {
            name: [{key: value for key, value in item.items() if key != "cloud_share"} for item in rows]
            for name, rows in self.items.items()
        }
        tasks = [[t.collection, t.index, t.region.to_list(), sorted(s.identity for s in t.sources)] for t in self.tasks]
        rules = [[recipe.rules(), list(recipe.spec.times)] for recipe in self.recipes]
        return digest({"recipes": rules, "items": bare, "tasks": tasks})

    def __repr__(self) -> str:
        parts = [
            f"{recipe.spec.collection}, {len(recipe.spec.times)} dates, {' '.join(recipe.spec.band_names)}"
            for recipe in self.recipes
        ]
        scenes = sum(len(rows) for rows in self.items.values())
        return f"<Plan of {scenes} scenes: {'; '.join(parts)}; {self.grid}; {len(self.tasks)} shards>"

    def _repr_html_(self) -> str:
        from ingest.plan.dry_run import plan_table

        return plan_table(self)

    def summary(self) -> str:
        """The dry run, for a person."""
        from ingest.plan.dry_run import describe

        return describe(self)

    def provenance(self) -> dict[str, Any]:
        """What a cube keeps of the plan that made it; the same bytes for a plan that went through a file."""
        kept = {
            "plan": self.digest,
            "source": self.source,
            "config": dict(self.config),
            "grid": list(self.reasons),
            "warnings": list(self.warnings),
            "drops": [vars(drop) for drop in self.drops],
            "collections": {name: dict(facts) for name, facts in self.facts.items()},
        }
        return _sorted_json(kept)

    def item_tables(self) -> dict[str, list[dict[str, Any]]]:
        """`items` as `create_cube` takes them; the same bytes for a plan that went through a file."""
        return _sorted_json({name: [dict(item) for item in rows] for name, rows in self.items.items()})

    def to_json(self) -> str:
        """JSON text; scenes are listed once and tasks name them by position."""
        scenes: dict[str, list[dict[str, Any]]] = {recipe.spec.collection: [] for recipe in self.recipes}
        place: dict[tuple[str, int], int] = {}
        for task in self.tasks:
            for scene in task.sources:
                if (task.collection, scene.item) not in place:
                    place[task.collection, scene.item] = len(scenes[task.collection])
                    scenes[task.collection].append(scene.to_dict())
        document = {
            "type": "terrashard-plan",
            "format": _FORMAT,
            "digest": self.digest,
            "source": self.source,
            "config": dict(self.config),
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "drops": [vars(drop) for drop in self.drops],
            "facts": {name: dict(facts) for name, facts in self.facts.items()},
            "recipes": [recipe.to_dict() for recipe in self.recipes],
            "items": {name: [dict(item) for item in rows] for name, rows in self.items.items()},
            "scenes": scenes,
            "tasks": [
                {
                    "collection": task.collection,
                    "index": list(task.index),
                    "region": task.region.to_list(),
                    "key": task.key,
                    "sources": [place[task.collection, scene.item] for scene in task.sources],
                }
                for task in self.tasks
            ],
        }
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "plan") -> Self:
        """Inverse of `to_json`.

        Raises:
            InvalidInput: Not a plan, or one that was edited by hand so that its digest no longer holds.
        """
        try:
            data = load_json(text.encode() if isinstance(text, str) else text, where, most=_MOST_BYTES)
            if not isinstance(data, dict) or data.get("type") != "terrashard-plan":
                raise InvalidInput(
                    f"{where} is no terrashard plan; make one with `terrashard plan SOURCE -o plan.json`"
                )
            if data["format"] != _FORMAT:
                raise InvalidInput(
                    f"{where} has plan format {data['format']}, this release reads {_FORMAT}; plan again"
                )
            recipes = tuple(Recipe.from_dict(recipe) for recipe in data["recipes"])
            scenes = {name: [PlannedScene.from_dict(s) for s in rows] for name, rows in data["scenes"].items()}
            by_name = {recipe.spec.collection: recipe for recipe in recipes}
            tasks = []
            for task in data["tasks"]:
                t, y, x = task["index"]
                sources = tuple(scenes[task["collection"]][i] for i in task["sources"])
                region = Region.from_list(task["region"])
                tasks.append(ShardTask.of(by_name[task["collection"]], (t, y, x), region, sources))
            plan = cls(
                recipes=recipes,
                items={name: tuple(rows) for name, rows in data["items"].items()},
                tasks=tuple(tasks),
                drops=tuple(Drop(**drop) for drop in data["drops"]),
                warnings=tuple(data["warnings"]),
                reasons=tuple(data["reasons"]),
                facts=data["facts"],
                # plans of earlier releases kept what was trusted
                config={name: value for name, value in data["config"].items() if name not in Trust.model_fields},
                source=data["source"],
            )
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"{where} cannot be read as a plan ({type(error).__name__}: {error}); plan again"
            ) from error
        if plan.digest != data["digest"]:
            raise InvalidInput(
                f"{where} was changed after it was made: its content has digest {plan.digest}, it says "
                f"{data['digest']}; plan again with the options you want"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        target = Path(path)
        write_file(target, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan.

        Raises:
            InvalidInput: Not readable or not a plan.
        """
        try:
            text = read_file(path, _MOST_BYTES)
        except OSError as error:
            raise InvalidInput(f"cannot read plan {path}: {error.strerror or error}") from error
        return cls.from_json(text, str(path))


def _sorted_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON with sorted keys."""
    result: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    return result


def make_plan(source: str, config: IngestConfig) -> Plan:
    """Search, look at file headers, and plan.

    Raises:
        NothingFound: No scene matches, or none lies in the region.
        InvalidInput: The source or the selection cannot be used.
        AccessError: The source cannot be reached, or no file could be opened.
    """
    from ingest.scenes.search import find_scenes

    found = find_scenes(source, config)
    return plan_found(found.scenes, config, source, unusable=found.unusable)


def plan_found(
    scenes: Sequence[Scene], config: IngestConfig, source: str, *, unusable: Sequence[Unusable] = ()
) -> Plan:
    """Look at the file headers of scenes that were found in `source`, and plan; raises as `make_plan`.

    Args:
        scenes: What was found.
        config: What is asked.
        source: Where.
        unusable: Items that were left out, to be named in the plan.
    """
    from ingest.trust.hrefs import is_url

    told = redact_url(source) if is_url(source) else str(Path(source).expanduser().resolve())
    plan = plan_scenes(scenes, probe_found(scenes, config, source), config, source=told)
    left_out = tuple(f"{one.collection}: item {one.item_id!r} is left out: {one.reason}" for one in unusable)
    return replace(plan, warnings=(*left_out, *plan.warnings), origin=Origin(source, config))


def probe_found(scenes: Sequence[Scene], config: IngestConfig, source: str) -> Probes:
    """Read the file headers of scenes that were found in `source`, once all their hosts may be opened."""
    from ingest.plan.probe import probe_scenes
    from ingest.trust.hrefs import refuse_private_address

    policy = config.trust.href_policy(source)
    hosts = {urlsplit(a.href).netloc: a.href for s in scenes for a in s.assets.values() if "://" in a.href}
    for href in hosts.values():
        with suppress(AccessError):  # a name that is not found becomes the error of each asset behind it
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
) -> Plan:
    """Plan the ingest of `scenes`. Pure.

    Args:
        scenes: From `search`.
        probes: (collection, id), or the id alone, → what the file headers and a few pixels say.
        config: What is asked.
        source: Shown in the plan.
        layout: Chunks and shards; None for the profile of `config`.
        grid: Of a cube that the scenes go into; None to choose one from the files.

    Raises:
        NothingFound: No scene touches the region.
        AssetUnreadable: Not one file could be opened.
    """
    if not scenes:
        raise NothingFound("no scenes to plan: the search found nothing; widen --bbox, --datetime or --query")
    found = [FoundScene.of(scene, probes) for scene in scenes]
    candidates = [c for f in found for c in f.candidates()]
    if not candidates:
        refuse_unopened(found)
    unseen = [f.stated_place() for f in found if f.scene.assets and not f.candidates()]
    target = (
        TargetGrid(grid, (f"grid: {grid}, that of the cube",))
        if grid
        else choose_grid(candidates, config, unseen=unseen)
    )
    kept, drops = select_scenes(found, target.grid, config)
    west, _, east, _ = target.grid.lonlat_bounds()
    longitude = (west + (east + 360.0 if east < west else east)) / 2.0
    recipes, items, tasks, warnings, told = [], {}, [], [], {}
    for collection in dict.fromkeys(f.scene.collection for f in kept):
        members = [f for f in kept if f.scene.collection == collection]
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
        recipe = Recipe(
            collection_spec(
                collection, product, choice, target.grid, steps, layout or LAYOUTS[config.grid.profile], config
            ),
            choice.mask.name if choice.mask else None,
            tuple(sorted(config.pixels.mask_classes)) if choice.mask else (),
            config.pixels.mask_dilate_m if choice.mask else 0.0,
            clip_text(config.selection.geometry) if config.pixels.clip else None,
        )
        table, planned = place_scenes(recipe, steps, by_id, config)
        recipes.append(recipe)
        items[collection] = table
        spans = {(region.t0, region.t1) for region in recipe.spec.shards().values()}
        of_step = {(t0, t1): [scene for scene in planned if t0 <= scene.step < t1] for t0, t1 in spans}
        tasks += [
            ShardTask.of(
                recipe, index, region, sources_of(region, of_step[region.t0, region.t1], target.grid, recipe.clip)
            )
            for index, region in recipe.spec.shards().items()
        ]
        warnings += [f"{collection}: {text}" for text in (*remarks, *discrepancies(members))]
        told[collection] = collection_statistics(recipe, members, [t for t in tasks if t.collection == collection])
    refuse_indices_without_reflectance(config.pixels.indices, [recipe.spec.kind for recipe in recipes])
    return Plan(
        recipes=tuple(recipes),
        items=items,
        tasks=tuple(sorted(tasks)),
        drops=tuple(replace(drop, reason=redact_text(drop.reason)) for drop in drops),
        warnings=tuple(redact_text(text) for text in warnings),
        reasons=target.reasons,
        facts=told,
        config=config.plan_settings(),
        source=source,
    )
