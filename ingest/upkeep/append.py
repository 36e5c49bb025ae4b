"""`merge_plans` adds scenes to a cube's plan: new dates at the end, new scenes of known dates, and newer copies.

It reads and writes no file. Rows of the item table and dates keep their numbers, so shards without new scenes keep
their keys and are not made again. A superseded scene keeps its row, because older shards refer to it.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from ingest.plan.grouping import lattice_rank, overlap_order, parse_time, step_label
from ingest.plan.plan import Plan
from ingest.plan.reach import Place, Reach
from ingest.plan.statistics import resampled_share
from ingest.plan.task import PlannedScene, Recipe, ShardTask
from zarr_store.create import list_differences
from zarr_store.errors import CubeMismatch, InvalidInput
from zarr_store.grid import Grid

__all__ = ["merge_plans"]

Row = dict[str, Any]


def merge_plans(old: Plan, fresh: Plan, *, replaces: Mapping[tuple[str, str], int], config: Mapping[str, Any]) -> Plan:
    """Merge the scenes of `fresh` into the plan of a cube.

    Args:
        old: Plan of the cube.
        fresh: Plan of the new scenes alone, on the cube's grid.
        replaces: Row of the item table that a scene of `fresh` supersedes, by the scene's (collection, id).
        config: Settings of the merged plan.

    Raises:
        CubeMismatch: The new scenes follow other rules than the cube, or belong to another collection.
        InvalidInput: A new date lies before the last one of the cube.
    """
    recipes, items, tasks = list(old.recipes), dict(old.items), list(old.tasks)
    facts = {name: dict(counts) for name, counts in old.statistics.items()}
    for recipe in fresh.recipes:
        name = recipe.spec.collection
        place = next((i for i, known in enumerate(recipes) if known.spec.collection == name), None)
        if place is None:
            raise CubeMismatch(
                f"the cube has no collection {name!r} (it has {', '.join(r.spec.collection for r in recipes)}); "
                "nothing was changed: select one of these with --collection, or make another cube"
            )
        _refuse_other_rules(recipes[place], recipe)
        merged = _Collection.of(old, recipes[place], str(config.get("group", "solar-day")))
        merged.add(
            fresh, {scene: row for (collection, scene), row in replaces.items() if collection == recipe.catalogue}
        )
        recipes[place] = merged.recipe
        items[name] = tuple(merged.rows)
        made = merged.tasks()
        tasks = [task for task in tasks if task.collection != name] + made
        facts[name] = _merged_facts(facts[name], fresh.statistics.get(name, {}), merged, made)
    return Plan(
        recipes=tuple(recipes),
        items=items,
        tasks=tuple(sorted(tasks)),
        drops=tuple(dict.fromkeys((*old.drops, *fresh.drops))),
        warnings=tuple(dict.fromkeys((*old.warnings, *fresh.warnings))),
        reasons=old.reasons,
        statistics=facts,
        config=dict(config),
        source=fresh.source or old.source,
    )


def _refuse_other_rules(there: Recipe, asked: Recipe) -> None:
    """Refuse new scenes by other rules; layout, item type and version are always those of the cube."""
    own = {"layout": None, "item_type": None}
    asked = replace(asked, version=there.version)
    kept, wanted = ({**r.rules(), "spec": {**r.rules()["spec"], **own}} for r in (there, asked))
    differences = list_differences(kept, wanted)
    if differences:
        raise CubeMismatch(
            f"collection {there.spec.collection} of the cube was made by other rules (cube → asked for): "
            f"{'; '.join(differences[:6])}. Nothing was changed: leave these options out, and those of the cube are "
            "used"
        )


@dataclass
class _Collection:
    """One collection while scenes are added to it."""

    recipe: Recipe
    rows: list[Row]
    scenes: dict[int, PlannedScene]
    old_tasks: dict[tuple[int, int, int], ShardTask]
    label_of: Callable[[Mapping[str, Any]], tuple[str, ...]]
    touched: set[int]
    finest: Grid

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, group: str) -> _Collection:
        name = recipe.spec.collection
        tasks = {task.index: task for task in plan.tasks if task.collection == name}
        west, _, east, _ = plan.grid.lonlat_bounds()
        longitude = (west + (east + 360.0 if east < west else east)) / 2.0
        return cls(
            recipe,
            [dict(row) for row in plan.items[name]],
            {scene.item: scene for task in tasks.values() for scene in task.sources},
            tasks,
            lambda row: step_label(_Row.of(row), cast(Any, group), longitude),
            set(),
            plan.grid,
        )

    def add(self, fresh: Plan, replaces: Mapping[str, int]) -> None:
        """Add each new scene to the item table, and its date to the time axis."""
        name = self.recipe.spec.collection
        planned = {s.item: s for task in fresh.tasks if task.collection == name for s in task.sources}
        times = list(self.recipe.spec.times)
        steps = {self.label_of(row): int(row["step"]) for row in self.rows}
        new_times = next(r.spec.times for r in fresh.recipes if r.spec.collection == name)
        for item, row in enumerate(fresh.items[name]):
            known = replaces.get(str(row["id"]))
            if known is not None:
                step = int(self.rows[known]["step"])
                self.rows[known] = {**self.rows[known], "superseded_by": row["id"]}
                self.scenes.pop(known, None)
            elif (label := self.label_of(row)) in steps:
                step = steps[label]
            else:
                step = steps[label] = len(times)
                times.append(self._next_time(new_times[int(row["step"])], times[-1], str(row["id"])))
            number = len(self.rows)
            self.rows.append({**row, "step": step})
            self.touched.add(step)
            if item in planned:
                self.scenes[number] = replace(planned[item], item=number, step=step)
        spec = replace(self.recipe.spec, times=tuple(times))
        spec.check_items(len(self.rows))
        self.recipe = replace(self.recipe, spec=spec)

    def _next_time(self, time: str, last: str, item_id: str) -> str:
        moment, end = parse_time(time), parse_time(last)
        if moment < end:
            raise InvalidInput(
                f"scene {item_id} of {time} lies before the last date of the cube, {last}: a cube grows only at its "
                "end, because its files are numbered by date. Nothing was changed: select later dates "
                "with --datetime, or make a new cube of all dates"
            )
        if moment == end:  # tiles of one pass share their second, but a time axis has no equal values
            moment += dt.timedelta(seconds=1)
        return moment.strftime("%Y-%m-%dT%H:%M:%S")

    def tasks(self) -> list[ShardTask]:
        """Make the tasks of all shards; those without new scenes stay as they were."""
        recipe, reach = self.recipe, Reach.of(self.recipe)
        by_step: dict[int, list[PlannedScene]] = defaultdict(list)
        for scene in self.scenes.values():
            by_step[scene.step].append(scene)
        order: Callable[[_Row], tuple[object, ...]] = overlap_order(
            lambda row: row.rank(self.finest), lambda row: row.cloud_share
        )
        shared: dict[int, Mapping[Place, list[PlannedScene]]] = {}
        tasks = []
        for index, region in recipe.spec.iterate_shards():
            old = self.old_tasks.get(index)
            steps = range(region.t0, region.t1)
            if old is not None and old.region == region and not self.touched.intersection(steps):
                tasks.append(old)
                continue
            if index[0] not in shared:
                for step in steps:
                    by_step[step].sort(key=lambda scene: order(_Row.of(self.rows[scene.item], scene)))
                shared[index[0]] = reach.share_out(scene for step in steps for scene in by_step[step])
            tasks.append(ShardTask.of(recipe, index, region, tuple(shared[index[0]].get(index[1:], ()))))
        return tasks


@dataclass(frozen=True)
class _Row:
    """A row of the item table as an `Acquisition`, with the planned scene where the plan reads it."""

    id: str
    datetime: str
    platform: str | None
    relative_orbit: int | None
    orbit_direction: str | None
    baseline: str | None
    created: str | None
    cloud_cover: float | None
    cloud_share: float | None
    planned: PlannedScene | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], planned: PlannedScene | None = None) -> _Row:
        values: dict[str, Any] = {one.name: row.get(one.name) for one in fields(cls)}
        return cls(**values | {"planned": planned})

    def rank(self, target: Grid) -> int:
        """Rank the scene as `lattice_rank` does, from the headers that the plan keeps."""
        assert self.planned is not None, "only scenes that are read overlap"
        headers = [asset.header for asset in self.planned.assets if asset.header]
        return lattice_rank(headers or [self.planned.extent], target)


def _merged_facts(
    old: Mapping[str, Any], fresh: Mapping[str, Any], merged: _Collection, tasks: Sequence[ShardTask]
) -> dict[str, Any]:
    """Add up the counts; the resampled share is computed again over all scenes."""
    added = ("lacking", "unopened_assets", "bytes_to_read", "bytes_to_write", "requests")
    named = ["offset_verdicts", "datastrips", "catalogue_ids"]
    named += ["overviews"] if "overviews" in old or "overviews" in fresh else []
    return {
        **old,
        **{name: old.get(name, 0) + fresh.get(name, 0) for name in added},
        **{name: {**old.get(name, {}), **fresh.get(name, {})} for name in named},
        "resampled_share": resampled_share(merged.scenes.values(), merged.recipe.spec.grid),
        "scenes": len(merged.scenes),
        "steps": len(merged.recipe.spec.times),
        "shards": merged.recipe.spec.shard_count,
        "empty_shards": sum(not task.sources for task in tasks),
    }
