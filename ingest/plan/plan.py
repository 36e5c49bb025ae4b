"""`Plan`: all that an ingest will do, as a value that can be saved, read and compared.

A plan is JSON both ways, and its digest is stable. Its summary is the dry run. Workers get tasks of the plan and never
ask a catalogue. `ingest.plan.making` makes plans.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

from ingest.plan.candidates import Drop
from ingest.plan.plan_file import PlanFile, pieces
from ingest.plan.task import PlannedScene, Recipe, ShardTask, digest, digest_of_parts
from ingest.request.config import IngestConfig
from ingest.request.trust import Trust
from zarr_store.durable import PendingFile
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.regions import Region
from zarr_store.regular import open_regular
from zarr_store.spec import CubeSpec

__all__ = ["Drop", "Origin", "Plan"]

_FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """The request that this process made a plan for.

    It is never saved, because a plan that comes from elsewhere gives no trust.

    Attributes:
        typed: SOURCE as the user typed it.
        config: The settings of the request, and the hosts and folders that the user trusts.
    """

    typed: str
    config: IngestConfig


@dataclass(frozen=True)
class Plan:
    """All that an ingest will do.

    Attributes:
        recipes: One recipe per collection.
        items: Collection → item table. The array `source_item` of a cube holds row numbers of this table.
        tasks: One task per shard, in order.
        drops: Scenes that the search returned and the plan does not use.
        warnings: Sentences that a person should read before the run.
        reasons: Sentences on why this grid was chosen.
        statistics: Collection → resampled_share, offset_verdicts, bytes_to_read, bytes_to_write, requests and more
            (`ingest.plan.statistics`); plan files hold them under "facts".
        config: Settings of the request that determine the cube; those of running and of trust are left out.
        source: SOURCE of the scenes, without secrets.
        origin: The request, if this process made the plan; None for a plan that was read from a file.

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
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def specs(self) -> tuple[CubeSpec, ...]:
        """The specifications of the cube's collections, as `create_cube` takes them."""
        return tuple(recipe.spec for recipe in self.recipes)

    @property
    def grid(self) -> Grid:
        """The grid of all collections; the finest one where grids are native."""
        return self.recipes[0].spec.grid

    def catalogue(self, group: str) -> str:
        """Return the collection of the catalogue whose scenes a group of the cube holds."""
        return self.recipe(group).catalogue

    @property
    def catalogue_items(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        """Collection of the catalogue → item table; all groups of a collection have the same rows."""
        found: dict[str, tuple[Mapping[str, Any], ...]] = {}
        for recipe in self.recipes:
            found.setdefault(recipe.catalogue, self.items[recipe.spec.collection])
        return found

    def recipe(self, collection: str) -> Recipe:
        """Return the recipe of a collection."""
        return next(recipe for recipe in self.recipes if recipe.spec.collection == collection)

    @cached_property
    def digest(self) -> str:
        """Digest of all that determines the cube: specs, rules, items and sources, without remarks and estimates."""
        # equal to `digest` of {"items", "recipes", "tasks"}, without holding the text
        recipes = [[recipe.rules(), list(recipe.spec.times)] for recipe in self.recipes]
        return digest_of_parts(
            {
                "items": {name: (dict(item) for item in rows) for name, rows in self.items.items()},
                "recipes": recipes,
                "tasks": (task.key for task in self.tasks),
            }
        )

    @cached_property
    def unordered_digest(self) -> str:
        """Digest like `digest`, without the order in which scenes win and the cloud shares that decide it.

        A file that could not be opened when a plan was made has no cloud share. A later plan that can open the file may
        put its scene at another place in the order, and is still a plan of the same cube.
        """
        bare = {
            name: [{key: value for key, value in item.items() if key != "cloud_share"} for item in rows]
            for name, rows in self.items.items()
        }
        tasks = [[t.collection, t.index, t.region.to_list(), sorted(s.identity for s in t.sources)] for t in self.tasks]
        rules = [[recipe.rules(), list(recipe.spec.times)] for recipe in self.recipes]
        return digest({"recipes": rules, "items": bare, "tasks": tasks})

    def under_rules(self, versions: Mapping[str, int]) -> Self:
        """Return the plan by other versions of the rules for pixels, which change the keys of its shards.

        Args:
            versions: Version by collection; others keep theirs.
        """
        recipes = tuple(replace(r, version=versions.get(r.spec.collection, r.version)) for r in self.recipes)
        if recipes == self.recipes:
            return self
        by_name = {recipe.spec.collection: recipe for recipe in recipes}
        tasks = tuple(ShardTask.of(by_name[t.collection], t.index, t.region, t.sources) for t in self.tasks)
        return replace(self, recipes=recipes, tasks=tasks)

    def __repr__(self) -> str:
        parts = [
            f"{recipe.spec.collection}, {len(recipe.spec.times)} dates, {' '.join(recipe.spec.band_names)}"
            for recipe in self.recipes
        ]
        scenes = sum(len(rows) for rows in self.catalogue_items.values())
        return f"<Plan of {scenes} scenes: {'; '.join(parts)}; {self.grid}; {len(self.tasks)} shards>"

    def _repr_html_(self) -> str:
        from ingest.plan.dry_run import plan_table

        return plan_table(self)

    def summary(self) -> str:
        """Return the dry run as text."""
        from ingest.plan.dry_run import describe

        return describe(self)

    def provenance(self) -> dict[str, Any]:
        """Return the parts of the plan that a cube keeps; a plan that went through a file gives the same bytes."""
        kept = {
            "plan": self.digest,
            "source": self.source,
            "config": dict(self.config),
            "grid": list(self.reasons),
            "warnings": list(self.warnings),
            "drops": [vars(drop) for drop in self.drops],
            "collections": {name: dict(values) for name, values in self.statistics.items()},
        }
        return _sorted_json(kept)

    def item_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return `items` as `create_cube` takes them; a plan that went through a file gives the same bytes."""
        return _sorted_json({name: [dict(item) for item in rows] for name, rows in self.items.items()})

    def to_json(self) -> str:
        """Return the plan as JSON text; scenes are listed once and tasks name them by position."""
        return b"".join(self.pieces()).decode()

    def pieces(self) -> Iterator[bytes]:
        """Yield the text of `to_json` piece by piece, as the plan of a large region has hundreds of megabytes."""
        scenes: dict[str, list[PlannedScene]] = {recipe.spec.collection: [] for recipe in self.recipes}
        place: dict[tuple[str, int], int] = {}
        for task in self.tasks:
            for scene in task.sources:
                if (task.collection, scene.item) not in place:
                    place[task.collection, scene.item] = len(scenes[task.collection])
                    scenes[task.collection].append(scene)
        return pieces(
            {
                "type": "terrashard-plan",
                "format": _FORMAT,
                "digest": self.digest,
                "source": self.source,
                "config": dict(self.config),
                "reasons": list(self.reasons),
                "warnings": list(self.warnings),
                "drops": [vars(drop) for drop in self.drops],
                "facts": {name: dict(values) for name, values in self.statistics.items()},
                "recipes": [recipe.to_dict() for recipe in self.recipes],
                "items": {name: (dict(item) for item in rows) for name, rows in self.items.items()},
                "scenes": {name: (scene.to_dict() for scene in rows) for name, rows in scenes.items()},
                "tasks": (
                    {
                        "collection": task.collection,
                        "index": list(task.index),
                        "region": task.region.to_list(),
                        "key": task.key,
                        "sources": [place[task.collection, scene.item] for scene in task.sources],
                    }
                    for task in self.tasks
                ),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "plan") -> Self:
        """Read a plan from the text of `to_json`.

        Raises:
            InvalidInput: The text is not a plan, or the plan was edited by hand and no longer has its digest.
        """
        data = text.encode() if isinstance(text, str) else text
        return cls.from_file(lambda: io.BytesIO(data), where)

    @classmethod
    def from_file(cls, opener: Callable[[], BinaryIO], where: str = "plan") -> Self:
        """Read a plan from a file that `opener` opens, line by line; errors are those of `from_json`."""
        try:
            file = PlanFile(opener, where)
            data = file.head
            if not isinstance(data, dict) or data.get("type") != "terrashard-plan":
                raise InvalidInput(
                    f"{where} is not a terrashard plan; make one with `terrashard plan SOURCE -o plan.json`"
                )
            if data["format"] != _FORMAT:
                raise InvalidInput(
                    f"{where} has plan format {data['format']}, this release reads {_FORMAT}; plan again"
                )
            recipes = tuple(Recipe.from_dict(recipe) for recipe in data["recipes"])
            scenes = file.tables("scenes", PlannedScene.from_dict)
            by_name = {recipe.spec.collection: recipe for recipe in recipes}
            tasks = []
            for task in file.tasks():
                t, y, x = task["index"]
                sources = tuple(scenes[task["collection"]][i] for i in task["sources"])
                region = Region.from_list(task["region"])
                tasks.append(ShardTask.of(by_name[task["collection"]], (t, y, x), region, sources))
            plan = cls(
                recipes=recipes,
                items={name: tuple(rows) for name, rows in file.tables("items", dict).items()},
                tasks=tuple(tasks),
                drops=tuple(Drop(**drop) for drop in data["drops"]),
                warnings=tuple(data["warnings"]),
                reasons=tuple(data["reasons"]),
                statistics=data["facts"],
                # plans of earlier releases kept the settings of trust
                config={name: value for name, value in data["config"].items() if name not in Trust.model_fields},
                source=data["source"],
            )
            made, stated = plan.digest, data["digest"]
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"{where} cannot be read as a plan ({type(error).__name__}: {error}); plan again"
            ) from error
        if made != stated:
            raise InvalidInput(
                f"{where} was changed after it was made: its content has digest {made}, it says "
                f"{stated}; plan again with the options you want"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        target = Path(path)
        PendingFile(target, target.name, self.pieces()).finish()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan from a file.

        Raises:
            InvalidInput: The file cannot be read, or is not a plan.
        """
        try:
            return cls.from_file(lambda: open_regular(path), str(path))
        except OSError as error:
            raise InvalidInput(f"cannot read plan {path}: {error.strerror or error}") from error


def _sorted_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as it comes back from JSON with sorted keys."""
    result: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    return result
