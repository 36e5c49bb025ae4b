"""These functions keep a cube complete and up to date; each is also a command: `terrashard repair`, `audit`, …"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Unpack

from ingest.request.config import IngestConfig
from ingest.request.settings import (
    RunSettings,
    SearchSettings,
    TrustSettings,
    UpkeepSettings,
    make_config,
    spell_out,
)

if TYPE_CHECKING:
    from distributed import Client

    from ingest.run.outcome import IngestEvent, IngestReport
    from ingest.upkeep.audit import AuditReport
    from ingest.upkeep.checksums import FilesReport
    from ingest.upkeep.repair import RepairReport, SourcesReport

__all__ = [
    "append_scenes",
    "audit_cube",
    "refresh_scenes",
    "repair_cube",
    "retry_failed",
    "verify_files",
    "verify_sources",
]

Watch = Callable[["IngestEvent"], None]


@spell_out(UpkeepSettings)
def append_scenes(
    cube: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    client: Client | None = None,
    progress: bool | None = None,
    on_event: Watch | None = None,
    **settings: Unpack[UpkeepSettings],
) -> IngestReport:
    """Add scenes that a cube does not have; their dates must come after its last, or be among its dates.

    Args:
        cube: The cube.
        source: The source to search; None for the one that the cube names, which must be of a known provider or be
            trusted by `allow_local` or `allow_hosts`.
        client: As for `run_plan`.
        progress: Whether to show a bar; None shows it in a terminal and in a notebook.
        on_event: Called with every shard that ends.
        **settings: Fields of `IngestConfig`; they win over the settings that the cube was made with.

    Raises:
        InvalidInput: A new date lies before the last one of the cube.
        CubeMismatch: The settings ask for other rules than those of the cube.

    Example:
        >>> import ingest
        >>> ingest.append_scenes("cube.zarr", "world/catalog.json").pending
        0
    """
    return _extend("append", cube, source, client, progress, on_event, settings)


@spell_out(UpkeepSettings)
def refresh_scenes(
    cube: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    client: Client | None = None,
    progress: bool | None = None,
    on_event: Watch | None = None,
    **settings: Unpack[UpkeepSettings],
) -> IngestReport:
    """Make shards again whose scenes have a newer copy, or other files under the same names.

    Arguments are those of `append_scenes`.

    Example:
        >>> import ingest
        >>> ingest.refresh_scenes("cube.zarr", "world/catalog.json").written
        ()
    """
    return _extend("refresh", cube, source, client, progress, on_event, settings)


@spell_out(RunSettings)
def retry_failed(
    cube: str | os.PathLike[str],
    *,
    client: Client | None = None,
    progress: bool | None = None,
    on_event: Watch | None = None,
    **settings: Unpack[RunSettings],
) -> IngestReport:
    """Make the partial and failed shards again, and no others.

    Args:
        cube: The cube.
        client: As for `run_plan`.
        progress: Whether to show a bar; None shows it in a terminal and in a notebook.
        on_event: Called with every shard that ends.
        **settings: Fields of `IngestConfig` for running and trust.

    Example:
        >>> import ingest
        >>> ingest.retry_failed("cube.zarr").exit_code
        0
    """
    from ingest.run.cluster import choose_client
    from ingest.run.progress import show_progress
    from ingest.upkeep.repair import retry_failed as retry

    config = make_config(None, settings)
    with show_progress("retry", progress, on_event) as tell:
        return retry(cube, config, client=choose_client(client, config), on_event=tell)


@spell_out(RunSettings)
def repair_cube(
    cube: str | os.PathLike[str],
    *,
    client: Client | None = None,
    progress: bool | None = None,
    on_event: Watch | None = None,
    **settings: Unpack[RunSettings],
) -> RepairReport:
    """Check each shard against its checksum, and make those again that are broken or were never written.

    Arguments are those of `retry_failed`. Where a source is gone, the broken shard stays and is listed as failed.

    Raises:
        InvalidInput: The cube keeps no plan, or one of its hrefs may not be opened.
        Locked: Another run writes to the cube.

    Example:
        >>> import ingest
        >>> ingest.repair_cube("cube.zarr").damage
        ()
    """
    from ingest.run.cluster import choose_client
    from ingest.run.progress import show_progress
    from ingest.upkeep.repair import repair

    config = make_config(None, settings)
    with show_progress("repair", progress, on_event) as tell:
        return repair(cube, config, client=choose_client(client, config), on_event=tell)


@spell_out(SearchSettings)
def audit_cube(
    cube: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    files: bool = True,
    **settings: Unpack[SearchSettings],
) -> AuditReport:
    """Compare a cube with the current catalogue: scenes that are missing, superseded, removed or replaced.

    Args:
        cube: The cube.
        source: The source to search; None for the one that the cube names, which must be of a known provider or be
            trusted by `allow_local` or `allow_hosts`.
        files: Also check whether each file that was read is still the same, with one small request each.
        **settings: Fields of `IngestConfig`; they win over the settings that the cube was made with.

    Raises:
        NothingFound: The catalogue has no scene left for this selection.
        AccessError: The source cannot be reached.

    Example:
        >>> import ingest
        >>> ingest.audit_cube("cube.zarr", "world/catalog.json").exit_code
        0
    """
    from ingest.upkeep.audit import audit

    return audit(cube, _config_of(cube, settings), source=None if source is None else os.fspath(source), files=files)


@spell_out(TrustSettings)
def verify_sources(
    cube: str | os.PathLike[str],
    *,
    share: float = 1.0,
    seed: int = 0,
    on_shard: Callable[[int, int], None] | None = None,
    **settings: Unpack[TrustSettings],
) -> SourcesReport:
    """Read the sources of shards again, and compare each value with the stored one.

    Args:
        cube: The cube.
        share: Part of the complete shards to check; the same `seed` draws the same shards as `verify_cube`.
        seed: Seed of the draw of a partial check.
        on_shard: Called with (checked, total) after each shard.
        **settings: Fields of `IngestConfig` for trust.

    Example:
        >>> import ingest
        >>> ingest.verify_sources("cube.zarr", allow_local="world").checked
        2
    """
    from ingest.upkeep.repair import verify_sources as compare

    return compare(cube, make_config(None, settings), share=share, seed=seed, on_shard=on_shard)


@spell_out(TrustSettings)
def verify_files(
    cube: str | os.PathLike[str],
    *,
    share: float = 1.0,
    seed: int = 0,
    on_file: Callable[[int, int], None] | None = None,
    **settings: Unpack[TrustSettings],
) -> FilesReport:
    """Read the source files of shards as a whole, and compare them with the checksums that their items state.

    Args:
        cube: The cube.
        share: Part of the written shards whose files are checked.
        seed: Seed of the draw of a partial check.
        on_file: Called with (checked, total) after each file.
        **settings: Fields of `IngestConfig` for trust.

    Example:
        >>> import ingest
        >>> ingest.verify_files("cube.zarr", allow_local="world").different
        ()
    """
    from ingest.upkeep.checksums import verify_files as compare

    return compare(cube, make_config(None, settings), share=share, seed=seed, on_file=on_file)


def _extend(
    what: Literal["append", "refresh"],
    cube: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    client: Client | None,
    progress: bool | None,
    on_event: Watch | None,
    settings: UpkeepSettings,
) -> IngestReport:
    from ingest.plan.stored import check_kept_source, kept_plan
    from ingest.run.cluster import choose_client
    from ingest.run.progress import show_progress
    from ingest.upkeep.extend import extend

    config = _config_of(cube, settings)
    place = check_kept_source(kept_plan(cube), config, os.fspath(cube)) if source is None else os.fspath(source)
    with show_progress(what, progress, on_event) as tell:
        return extend(
            place,
            cube,
            config,
            append=what == "append",
            refresh=what == "refresh",
            client=choose_client(client, config),
            on_event=tell,
        )


def _config_of(cube: str | os.PathLike[str], settings: SearchSettings | UpkeepSettings) -> IngestConfig:
    from ingest.upkeep.extend import selection_of

    return make_config(make_config(None, selection_of(cube)), settings)
