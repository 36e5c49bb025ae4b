"""From Python: find scenes, plan, run. What a script or a notebook calls; the command line uses the parts below.

Each function takes a configuration, settings of it as keywords, or both; keywords win.
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

__all__ = ["find_scenes", "make_plan", "run_plan"]


@spell_out(SearchSettings)
def find_scenes(
    source: str | os.PathLike[str],
    config: IngestConfig | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    **settings: Unpack[SearchSettings],
) -> Scenes:
    """Find the scenes that a source has: de-duplicated, in one form for all providers, in order.

    Args:
        source: STAC API URL; path or URL of a catalog.json, collection.json, item or item collection; stac-geoparquet.
        config: What is asked; None for the defaults.
        headers: Request headers for the source's own origin only.
        **settings: Fields of `IngestConfig` that say what is selected and who is trusted; they win over `config`.

    Returns:
        The scenes, which `make_plan` takes, all or some of them.

    Raises:
        NothingFound: A valid question without an answer.
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
    return Scenes(tuple(find_scenes(text, asked, headers=headers).scenes), text, asked)


@spell_out(PlanSettings)
def make_plan(
    source: str | os.PathLike[str] | Scenes | Sequence[Scene],
    config: IngestConfig | None = None,
    *,
    found_in: str | os.PathLike[str] | None = None,
    **settings: Unpack[PlanSettings],
) -> Plan:
    """Plan an ingest: search, read file headers, choose the grid and the shards. No pixel is stored.

    Args:
        source: As for `find_scenes`; or scenes that it found, whose own settings then hold where nothing else is given.
        config: What is asked; None for the defaults.
        found_in: Where scenes were found that come as a plain list; it decides which hosts may be opened.
        **settings: Fields of `IngestConfig`; they win over `config`.

    Returns:
        The plan; it shows itself as the dry run does, and `save` keeps it as JSON.

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
    if isinstance(source, Scenes):
        place, config = source.source, config or source.config
    elif found_in is not None:
        place = os.fspath(found_in)
    else:
        raise InvalidInput(
            "say where a list of scenes was found, as that decides which hosts may be opened: "
            "make_plan(scenes, found_in=SOURCE); what find_scenes gives, its slices and `where` know it themselves"
        )
    return probe_and_plan(list(source), make_config(config, settings), place)


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
    """Make the cube of a plan, or what of it is not there yet. Calling it again goes on, or finds nothing to do.

    Args:
        plan: From `make_plan`; or a plan that was saved, or its path: then its hrefs are judged first.
        cube: Where the cube is or will be: a folder, or the URL of a bucket.
        config: How to run; None for the defaults.
        client: A Dask client. None: the current one of this process, unless settings ask for a cluster; else processes
            of this machine, which end with the run.
        overwrite: Put a new cube in the place of the one there, when the new one is whole.
        progress: Whether to show a bar; None shows it in a terminal and in a notebook.
        on_event: Told of every shard that ends, in this thread.
        **settings: Fields of `IngestConfig` that say how it is run and who is trusted; they win over `config`.

    Returns:
        What was done: shards written, partial, skipped and failed, and why.

    Raises:
        CubeMismatch: A cube of another plan is there.
        InvalidInput: Something else is there, a setting cannot be used, or the client is asynchronous.
        Locked: Another run writes to the cube.
        NoSpace: The disk is full; what was written stays, and the same call goes on.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> ingest.run_plan(plan, "cube.zarr")
        <IngestReport cube.zarr: 0 written, 0 partial, 2 done before, 0 failed>
    """
    from ingest.plan.plan import Plan
    from ingest.plan.stored import check_hrefs
    from ingest.run.cluster import usable_client
    from ingest.run.loop import run
    from ingest.run.progress import shown_progress
    from ingest.upkeep.overwrite import overwrite as run_over

    typed = ""
    if not isinstance(plan, Plan):
        typed, plan = os.fspath(plan), Plan.load(plan)
    if plan.origin is not None:  # made by this process, with trust that counts as given now
        typed = plan.origin.typed
        asked = make_config(make_config(None, {**trust_of(plan.origin.config), **_fields(config)}), settings)
    else:
        asked = make_config(config, settings)
        check_hrefs(plan, asked, typed=typed)
    client = usable_client(client, asked)
    with shown_progress("ingest", progress, on_event) as tell:
        return (run_over if overwrite else run)(plan, cube, config=asked, client=client, on_event=tell, typed=typed)


def _fields(config: IngestConfig | None) -> dict[str, object]:
    return {} if config is None else config.to_flat()
