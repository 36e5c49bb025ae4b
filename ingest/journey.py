"""`find_scenes`, `make_plan` and `run_plan` are the functions that a script or a notebook calls to make a cube.

The command line uses the modules below. Each function takes a configuration, settings as keywords, or both; keywords
win.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

from ingest.request.config import IngestConfig
from ingest.request.settings import PlanSettings, RunSettings, SearchSettings, make_config, spell_out, trust_of
from ingest.scenes.scene import Scene
from ingest.scenes.scene_list import Scenes
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from distributed import Client

    from ingest.plan.plan import Plan
    from ingest.run.outcome import IngestEvent, IngestReport
    from ingest.scenes.dedupe import Duplicate
    from ingest.scenes.search import Unusable

__all__ = ["find_scenes", "make_plan", "run_plan"]


@spell_out(SearchSettings)
def find_scenes(
    source: str | os.PathLike[str],
    config: IngestConfig | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    **settings: Unpack[SearchSettings],
) -> Scenes:
    """Find the scenes of a source, without duplicates, in one form for all providers, in a fixed order.

    Args:
        source: STAC API URL; path or URL of a catalog.json, collection.json, item or item collection; stac-geoparquet.
        config: The selection; None for the defaults.
        headers: Request headers, sent only to the source's own origin.
        **settings: Fields of `IngestConfig` for selection and trust; they win over `config`.

    Returns:
        The scenes; `make_plan` takes all or some of them.

    Raises:
        NothingFound: The search is valid, and no scene matches.
        InvalidInput: The source or a setting cannot be used.
        AccessError: The source cannot be reached.

    Example:
        >>> import ingest
        >>> found = ingest.find_scenes("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> len(found), found[0].tile
        (2, '33TWL')
    """
    from ingest.scenes.search import find_scenes

    asked = make_config(config, settings)
    text = os.fspath(source)
    found = find_scenes(text, asked, headers=headers)
    return Scenes(tuple(found.scenes), text, asked, found.unusable, found.duplicates)


@spell_out(PlanSettings)
def make_plan(
    source: str | os.PathLike[str] | Scenes | Sequence[Scene],
    config: IngestConfig | None = None,
    *,
    found_in: str | os.PathLike[str] | None = None,
    **settings: Unpack[PlanSettings],
) -> Plan:
    """Plan an ingest: search, read file headers, and choose the grid and the shards; no pixel is stored.

    Args:
        source: As for `find_scenes`; or scenes that it returned, with whose settings the plan is made unless others are
            given.
        config: The settings; None for the defaults.
        found_in: The source of scenes that are given as a plain list; it decides which hosts may be opened.
        **settings: Fields of `IngestConfig`; they win over `config`.

    Returns:
        The plan; a notebook shows it as the dry run does, and `save` writes it as JSON.

    Raises:
        NothingFound: No scene matches, or none lies in the region.
        InvalidInput: The source or a setting cannot be used.
        AccessError: The source cannot be reached, or no file could be opened.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> plan
        <Plan of 2 scenes: sentinel-2-l2a, 2 dates, red nir; EPSG:32633 64×64 px at 10; 2 shards>
    """
    from ingest.plan.making import make_plan as plan_source
    from ingest.plan.making import probe_and_plan

    if isinstance(source, str | os.PathLike):
        return plan_source(os.fspath(source), make_config(config, settings))
    unusable: tuple[Unusable, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    if isinstance(source, Scenes):
        place, config = source.source, config or source.config
        unusable, duplicates = source.unusable, source.duplicates
    elif found_in is not None:
        place = os.fspath(found_in)
    else:
        raise InvalidInput(
            "a plain list of scenes needs its source, which decides which hosts may be opened: "
            "make_plan(scenes, found_in=SOURCE); the result of find_scenes, its slices and `where` keep their source"
        )
    asked = make_config(config, settings)
    return probe_and_plan(list(source), asked, place, unusable=unusable, duplicates=duplicates)


@spell_out(RunSettings)
def run_plan(
    plan: Plan | str | os.PathLike[str],
    cube: str | os.PathLike[str],
    config: IngestConfig | None = None,
    *,
    client: Client | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    **settings: Unpack[RunSettings],
) -> IngestReport:
    """Make the cube of a plan; a repeated call continues where it stopped, or finds nothing to do.

    Args:
        plan: A plan of `make_plan`, a loaded plan, or the path of a saved one; hrefs of a saved plan are checked first.
        cube: Place of the cube: a folder, or the URL of a bucket.
        config: Settings of the run; None for the defaults.
        client: A Dask client. None uses the current one of this process, unless settings ask for a cluster; without
            one, processes of this machine are started and end with the run; a small plan runs in threads of this one.
        overwrite: Replace the cube that is there when the new one is complete.
        progress: Whether to show a bar; None shows it in a terminal and in a notebook.
        on_event: Called in this thread with every shard that ends.
        **settings: Fields of `IngestConfig` for running and trust; they win over `config`.

    Returns:
        The report: shards written, partial, skipped and failed, with the causes.

    Raises:
        CubeMismatch: A cube of another plan is there.
        InvalidInput: Something else is there, a setting cannot be used, or the client is asynchronous.
        Locked: Another run writes to the cube.
        NoSpace: The disk is full; what was written stays, and the same call continues.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> ingest.run_plan(plan, "cube.zarr")
        <IngestReport cube.zarr: 0 written, 0 partial, 2 done before, 0 failed>
    """
    from ingest.plan.plan import Plan
    from ingest.plan.stored import check_hrefs
    from ingest.run.cluster import choose_client
    from ingest.run.loop import run
    from ingest.run.progress import show_progress
    from ingest.upkeep.overwrite import overwrite as run_over

    typed = ""
    if not isinstance(plan, Plan):
        typed, plan = os.fspath(plan), Plan.load(plan)
    if plan.origin is not None:  # this process made the plan, so the trust that it was made with still holds
        typed = plan.origin.typed
        asked = make_config(make_config(None, {**trust_of(plan.origin.config), **_fields(config)}), settings)
    else:
        asked = make_config(config, settings)
        check_hrefs(plan, asked, typed=typed)
    client = choose_client(client, asked)
    with show_progress("ingest", progress, on_event) as tell:
        return (run_over if overwrite else run)(plan, cube, config=asked, client=client, on_event=tell, typed=typed)


def _fields(config: IngestConfig | None) -> dict[str, object]:
    return {} if config is None else config.to_flat()
