"""`extend` adds to an existing cube: new dates (append) and newer copies of its scenes (refresh).

It searches the catalogue, plans the new scenes on the cube's own grid, merges this plan into that of the cube, and runs
it: only shards with new scenes are made. The cube's lock is held all the time, so no two runs add to the same state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ingest.pixels.clip import clip_text
from ingest.pixels.grid_area import is_grid_area, sha_of
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import probe_scenes
from ingest.plan.stored import kept_plan, require_providers
from ingest.request.config import IngestConfig
from ingest.request.selection import parse_interval
from ingest.run.loop import IngestEvent, IngestReport, Job, plain_url, run_job
from ingest.scenes.dedupe import name_apart
from ingest.scenes.scene import Scene
from ingest.scenes.search import SearchResult, find_scenes
from ingest.trust.hrefs import is_url
from ingest.upkeep.append import merge_plans
from ingest.upkeep.audit import compare, replaced_files
from ingest.upkeep.contradictions import refuse_contradictions
from zarr_store.errors import NothingFound
from zarr_store.lock import CubeLock

if TYPE_CHECKING:
    from distributed import Client

    from ingest.run.record import RunRecord

__all__ = ["extend", "plan_extension", "selection_of"]

log = logging.getLogger(__name__)


def selection_of(url: str | os.PathLike[str]) -> dict[str, Any]:
    """Get the settings that a cube was made with; the options of a new command replace them one by one.

    They do not say what was trusted: each command states that again.
    """
    return dict(kept_plan(url).config)


def extend(
    source: str,
    cube_url: str | os.PathLike[str],
    config: IngestConfig,
    *,
    append: bool = True,
    refresh: bool = False,
    client: Client | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    record: RunRecord | None = None,
) -> IngestReport:
    """Add the new scenes of a catalogue to a cube; a repeated call continues, or finds nothing to do.

    Args:
        source: As for `ingest.plan.making.make_plan`.
        cube_url: The cube.
        config: The selection, with the cube's own rules (`selection_of`), and how to run.
        append: Add scenes that the cube does not have; their dates must come after its last, or be among its dates.
        refresh: Make shards again whose scenes have a newer copy, or other files under the same names.
        client: A Dask client to use in place of a cluster of `config`.
        on_event: As for `ingest.run.loop.run`.
        on_plan: Called with the merged plan before anything is written.
        record: Filled with what the report on the run needs.

    Raises:
        InvalidInput: A new date lies before the last one of the cube, or today's options do not allow one of its files.
        CubeMismatch: The settings ask for other rules than those of the cube.
        Locked: Another run writes to the cube.
    """
    url = os.fspath(cube_url)
    what = " and ".join(word for word, on in (("append", append), ("refresh", refresh)) if on)
    with CubeLock(url, f"{what} from {source if not is_url(source) else 'a catalogue'}") as lock:
        old = kept_plan(url)
        require_providers(old, config)
        merged = plan_extension(old, source, config, append=append, refresh=refresh, cube_url=url)
        if on_plan:
            on_plan(merged)
        job = Job(merged, plain_url(url), lock, config, grow=True, typed=source, judge=True)
        return run_job(job, client=client, on_event=on_event, record=record)


def plan_extension(
    old: Plan,
    source: str,
    config: IngestConfig,
    *,
    append: bool,
    refresh: bool,
    found: SearchResult | None = None,
    cube_url: str | None = None,
) -> Plan:
    """Plan a cube with the new scenes of a catalogue; `old` itself is returned where nothing is new.

    Args:
        old: Plan of the cube.
        source: As for `make_plan`.
        config: The selection.
        append: Add scenes that the cube does not have.
        refresh: Replace scenes that have a newer copy, or whose files were replaced under their old names.
        found: Result of a search that was made already.
        cube_url: The cube, whose ledger names the files that were read; None does not check for replaced files.

    Raises:
        CubeMismatch: The settings contradict the cube, also where nothing is new.
    """
    refuse_contradictions(old, config)
    try:
        found = found or find_scenes(source, config)
    except NothingFound:
        return old  # nothing new; shards that are missing are still made
    news = compare(
        old, found, replaced_files(cube_url, old, found, config, source=source) if refresh and cube_url else None
    )
    taken = [(name, str(row["id"])) for name, rows in old.catalogue_items.items() for row in rows]
    scenes: list[Scene] = name_apart(news.missing, taken) if append else []
    replaces: dict[tuple[str, str], int] = {}
    if refresh:
        for key, (scene, row) in news.superseded.items():
            replaces[key] = row
            scenes.append(scene)
    if news.superseded and not refresh:
        log.warning("%d scenes of the cube have newer copies; take them in with --refresh", len(news.superseded))
    if news.missing and not append:
        log.warning("%d scenes are not in the cube; add them with --append", len(news.missing))
    if not scenes:
        return old
    recipe = old.recipes[0]
    try:
        fresh = plan_scenes(
            scenes,
            probe_scenes(scenes, config, source=source),
            config,
            source=old.source,
            layout=recipe.spec.layout,
            grid=recipe.spec.grid,
            clip=_kept_clip(recipe.clip, config),
            kept=old.recipes,
        )
    except NothingFound as error:
        raise NothingFound(f"{error} (the region is the cube's)") from error
    return merge_plans(old, fresh, replaces=replaces, config=_joined(old.config, config))


def _kept_clip(clip: str | None, config: IngestConfig) -> str | None:
    """Return the area of a cube where it is the one that the settings ask for and the cube keeps it in pixels."""
    geometry = config.selection.geometry
    if not is_grid_area(clip) or clip is None or geometry is None or not config.pixels.clip:
        return None
    asked = geometry.get("sha256") or sha_of(clip_text(geometry) or "")
    return clip if asked == sha_of(clip) else None


def _joined(old: Mapping[str, Any], config: IngestConfig) -> dict[str, Any]:
    """Join the settings of both: the rules are the same, and the dates reach from the first to the last asked for."""
    new = config.plan_settings()
    joined = {**new, **{name: value for name, value in old.items() if name != "datetime"}}
    texts = (old.get("datetime"), new.get("datetime"))
    if texts[0] and texts[1]:
        bounds = [parse_interval(str(text)) for text in texts]
        starts, ends = [b[0] for b in bounds], [b[1] for b in bounds]
        first = "" if None in starts else min(s for s in starts if s).isoformat().replace("+00:00", "Z")
        last = "" if None in ends else max(e for e in ends if e).isoformat().replace("+00:00", "Z")
        joined.pop("datetime", None)
        if first or last:
            joined["datetime"] = texts[0] if texts[0] == texts[1] else f"{first or '..'}/{last or '..'}"
    else:
        joined.pop("datetime", None)
    return joined
