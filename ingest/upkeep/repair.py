"""`repair` makes broken and absent shards of a cube again, `retry_failed` the incomplete ones, from the cube's plan.

`verify_sources` reads the sources again and compares them with the stored pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from shapely.geometry import shape

from ingest.plan.stored import check_hrefs, kept_plan
from ingest.plan.task import SourceAsset
from ingest.raster.access import with_raster
from ingest.raster.asset_file import find_mask_beside
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.loop import IngestEvent, IngestReport, Job, plain_url, run_job
from ingest.run.shard import fill_shard
from ingest.scenes.footprint import box_region, meets
from ingest.scenes.scene import Scene
from ingest.upkeep.disagreement import name_disagreement
from ingest.upkeep.lost_parts import find_lost_parts
from ingest.upkeep.offsets import recheck_offset
from zarr_store.backends import open_store
from zarr_store.errors import AssetUnreadable, IntegrityError
from zarr_store.ledger import LedgerRow
from zarr_store.lock import CubeLock
from zarr_store.read import Cube, open_cube
from zarr_store.spec import STATUS_NODATA
from zarr_store.states import forget_states
from zarr_store.verify import Damage, draw_shards, verify_cube

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Difference", "RepairReport", "SourcesReport", "repair", "retry_failed", "verify_sources"]

Watch = Callable[[IngestEvent], None]


@dataclass(frozen=True)
class RepairReport:
    """The damage of a cube, and the run that repaired it.

    Attributes:
        damage: Stored objects that differed from what was written.
        rows: Ledger rows that could not be read and were dropped.
        ingest: The run that made the shards again.

    Example:
        >>> import ingest
        >>> report = ingest.repair_cube("cube.zarr")
        >>> report.damage, len(report.ingest.skipped)
        ((), 2)
    """

    damage: tuple[Damage, ...]
    rows: tuple[str, ...]
    ingest: IngestReport

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        damage = [{**vars(one), "index": list(one.index)} for one in self.damage]
        return {"damage": damage, "unreadable_rows": list(self.rows), "ingest": self.ingest.to_dict()}


def repair(
    url: str | os.PathLike[str], config: IngestConfig, *, client: Client | None = None, on_event: Watch | None = None
) -> RepairReport:
    """Check each shard against its checksum, and make those again that are broken or were never written.

    Where a source is gone, the broken shard stays and is listed as failed: a repair never loses good pixels.

    Args:
        url: The cube.
        config: Trust, and how to run; the cube keeps the other settings.
        client: A Dask client to use in place of a cluster of `config`.
        on_event: As for `ingest.run.loop.run`.

    Raises:
        InvalidInput: The cube keeps no plan, or today's options do not allow a file that is needed.
        Locked: Another run writes to the cube.
    """
    with CubeLock(url, "repair") as lock:
        plan = kept_plan(url)
        cube = open_cube(url)
        for name in cube.collections:
            forget_states(open_store(url), name)
        rows = [key for name in cube.collections for key in cube.ledger(name).drop_unreadable()]
        damage = verify_cube(os.fspath(url)).damage
        again = frozenset((one.collection, one.index) for one in damage)
        job = Job(plan, plain_url(url), lock, config, grow=True, which="absent", again=again, judge=True)
        made = run_job(job, client=client, on_event=on_event)
    return RepairReport(damage, tuple(rows), made)


def retry_failed(
    url: str | os.PathLike[str], config: IngestConfig, *, client: Client | None = None, on_event: Watch | None = None
) -> IngestReport:
    """Make the partial and failed shards again, and no others; arguments and errors are those of `repair`."""
    with CubeLock(url, "retry of failed shards") as lock:
        plan = kept_plan(url)
        job = Job(plan, plain_url(url), lock, config, grow=True, which="unfinished", judge=True)
        return run_job(job, client=client, on_event=on_event)


@dataclass(frozen=True)
class Difference:
    """An array of a shard whose stored values differ from what its sources give now.

    Attributes:
        collection: Group of the cube.
        array: Array of the group.
        index: The shard.
        pixels: Number of values that differ.
        why: The cause, where it is known.
    """

    collection: str
    array: str
    index: tuple[int, int, int]
    pixels: int
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.collection}/{self.array} shard {self.index}, {self.pixels} values: {self.why}"
        return f"{self.collection}/{self.array} shard {self.index} differs from its sources in {self.pixels} values"


@dataclass(frozen=True)
class SourcesReport:
    """The result of comparing a cube with its sources.

    Attributes:
        checked: Number of shards whose sources were all read again.
        different: Arrays of shards that differ.
        unread: Shards whose sources could not be read now, with the cause.
        doubted: What the files state of their numbers and the plan of the cube did not know, one sentence for each
            file; the pixels that were made of it are wrong.

    Example:
        >>> import ingest
        >>> report = ingest.verify_sources("cube.zarr", share=0.5, allow_local="world")
        >>> report.checked, report.different
        (1, ())
    """

    checked: int
    different: tuple[Difference, ...]
    unread: tuple[str, ...]
    doubted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        different = [{**vars(one), "index": list(one.index)} for one in self.different]
        return {"checked": self.checked, "different": different, "unread": list(self.unread),
                "doubted": list(self.doubted)}  # fmt: skip


def verify_sources(
    url: str | os.PathLike[str],
    config: IngestConfig,
    *,
    share: float = 1.0,
    seed: int = 0,
    on_shard: Callable[[int, int], None] | None = None,
) -> SourcesReport:
    """Read the sources of shards again and compare each value with the stored one, one shard in memory at a time.

    The offset of each scene is decided again too, from its files and from what the cube keeps of its metadata. And the
    catalogue is searched for parts of its datatakes that the cube lacks, where it is trusted and can be reached.

    Args:
        url: The cube.
        config: Trust, timeouts and retries.
        share: Part of the complete shards to check; the same `seed` draws the same shards as `verify_cube`.
        seed: Seed of the draw of a partial check.
        on_shard: Called with (checked, total) after each shard.
    """
    cube = open_cube(url)
    plan = kept_plan(url)
    access = Access.of(config)
    tasks = {(task.collection, task.index): task for task in plan.tasks}
    drawn = [
        (tasks[name, row.index], row)
        for name, row in draw_shards(cube, share, seed)
        if row.state == "done" and (name, row.index) in tasks and tasks[name, row.index].key == row.key
    ]
    check_hrefs(plan, config, tasks=[task for task, _ in drawn])
    different: list[Difference] = []
    unread = []
    doubts: dict[str, str | None] = {}
    offsets: dict[tuple[str, int], str | None] = {}
    lost_parts = find_lost_parts(os.fspath(url), plan, config)
    for done, (task, row) in enumerate(drawn, 1):
        of_group = [(scene, step) for scene, step in lost_parts if scene.collection == plan.catalogue(task.collection)]
        different += _parts_absent(cube, task.collection, row, of_group)
        filled = fill_shard(task, plan.recipe(task.collection), access=access)
        lost = next((source for source in filled.outcomes if source.state == "missing"), None)
        if lost is None:
            different += _differences(cube, task.collection, row, filled.arrays)
            read = {outcome.item for outcome in filled.outcomes}
            for scene in (one for one in task.sources if one.item in read):
                if (task.collection, scene.item) not in offsets:
                    why = recheck_offset(plan, task.collection, scene, access)
                    offsets[task.collection, scene.item] = why
                if why := offsets[task.collection, scene.item]:
                    different.append(_of_scene(cube, task.collection, row, scene.item, why))
        else:
            text = f"{task.collection} shard {task.index}: scene {lost.item_id}, asset {lost.asset}: {lost.reason}"
            if lost.final:  # the shard was made of a file that is refused now
                doubts[text] = text
            unread.append(text)
        used = {outcome.item for outcome in filled.outcomes if outcome.state == "read"}
        for asset in (asset for scene in task.sources if scene.item in used for asset in scene.assets):
            if asset.href not in doubts:
                doubts[asset.href] = _doubt(asset, access)
        if on_shard:
            on_shard(done, len(drawn))
    doubted = tuple(text for text in doubts.values() if text)
    return SourcesReport(len(drawn) - len(unread), tuple(different), tuple(unread), doubted)


def _doubt(asset: SourceAsset, access: Access) -> str | None:
    """Describe what a file states about its numbers and the plan did not know; return None if there is nothing."""
    where = f"scene {asset.scene}, asset {asset.key}"
    if (name := find_mask_beside(asset.href)) is not None:
        return f"{where}: a mask lies beside the file ({name}), which was not applied"
    if asset.stored != "uint16" or asset.kind != "data" or asset.file_offset is not None:
        return None
    try:
        offset = with_raster(
            asset.href, lambda file: file.header.stated.offset_dn, scene=asset.scene, asset=asset.key, access=access
        )
    except AssetUnreadable:  # it could be read a moment ago; the next check will tell
        return None
    if offset in (0, asset.dn_offset):
        return None
    return f"{where}: the file states an offset of {offset:g} (OFFSET tag), {asset.dn_offset:+d} was added"


def _parts_absent(cube: Cube, collection: str, row: LedgerRow, lost: Sequence[tuple[Scene, int]]) -> list[Difference]:
    """Return the pixels without data of a shard which a part of a datatake that the cube does not have may show."""
    spec = cube.spec(collection)
    window = spec.grid.window(row.region.y0, row.region.x0, row.region.shape[1], row.region.shape[2])
    area = box_region(window.lonlat_bounds())
    differences = []
    for scene, step in lost:
        inside = row.region.t0 <= step < row.region.t1
        if not (inside and meets(shape(dict(scene.footprint)), area)):
            continue
        empty = int((cube.read(collection, "status", row.region)[step - row.region.t0] == STATUS_NODATA).sum())
        if empty:
            why = (
                f"scene {scene.id}, another part of datatake {scene.datatake}, is in the catalogue and not in the "
                "cube: add it with `terrashard ingest … --append`"
            )
            differences.append(Difference(collection, spec.kind, row.index, empty * len(spec.bands), why))
    return differences


def _of_scene(cube: Cube, collection: str, row: LedgerRow, item: int, why: str) -> Difference:
    """Return the difference of all values that a scene has given to a shard."""
    spec = cube.spec(collection)
    source = "source_item" if spec.reduce == "first" else "observations"
    given = cube.read(collection, source, row.region)
    pixels = int((given == item).sum() if spec.reduce == "first" else (given > 0).sum())
    return Difference(collection, spec.kind, row.index, pixels * len(spec.bands), why)


def _differences(cube: Cube, collection: str, row: LedgerRow, arrays: dict[str, Any]) -> list[Difference]:
    differences = []
    for name, expected in arrays.items():
        try:
            stored = cube.read(collection, name, row.region)
        except IntegrityError:
            differences.append(Difference(collection, name, row.index, int(expected.size)))
            continue
        equal = stored == expected
        if expected.dtype.kind == "f":
            equal |= np.isnan(stored) & np.isnan(expected)
        if not equal.all():
            why = name_disagreement(stored, expected) if name == cube.spec(collection).kind else ""
            differences.append(Difference(collection, name, row.index, int((~equal).sum()), why))
    return differences
