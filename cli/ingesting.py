"""Shared part of `ingest`, `repair`, `audit` and `demo`: run a plan, and extend a cube."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import RUNNING, TRUST
from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from ingest.plan.plan import Plan
    from ingest.request.config import IngestConfig
    from ingest.run.loop import IngestEvent, IngestReport
    from ingest.run.record import RunRecord

__all__ = [
    "check_report",
    "cube_config",
    "extend_cube",
    "is_plan",
    "keep_report",
    "plan_of",
    "run_plan",
    "watching",
]

_HEAD_BYTES = 64 << 20
"""Largest JSON file that is read whole to see whether it is a plan, bytes; larger ones are read by lines."""


def is_plan(source: str) -> bool:
    """Return whether SOURCE is a plan.json of `terrashard plan`, which runs unchanged."""
    from zarr_store.bounded import load_json, read_file

    path = Path(source)
    if "://" in source or path.suffix.lower() != ".json" or not path.is_file():
        return False
    if path.stat().st_size > _HEAD_BYTES:
        from ingest.plan.plan_file import is_plan_file

        with path.open("rb") as stream:
            return is_plan_file(stream)
    try:
        document = load_json(read_file(path, _HEAD_BYTES), source)
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("type") == "terrashard-plan"


def plan_of(session: Session, source: str, config: IngestConfig) -> Plan:
    """Load the plan that SOURCE is, or make one from what SOURCE lists.

    Raises:
        InvalidInput: SOURCE is a plan and options contradict it, or one of its hrefs may not be opened.
    """
    from ingest.plan.making import make_plan
    from ingest.plan.plan import Plan
    from ingest.plan.stored import check_hrefs

    if not is_plan(source):
        return make_plan(source, config)
    fixed = sorted((set(session.options) | set(session.settings())) - set(RUNNING) - set(TRUST))
    if fixed:
        raise InvalidInput(f"{source} is a plan, which fixes {', '.join(fixed)}; plan again with the new settings")
    plan = Plan.load(source)
    check_hrefs(plan, config, typed=source)
    return plan


def run_plan(
    session: Session,
    plan: Plan,
    cube: str | Path,
    config: IngestConfig,
    *,
    record: RunRecord | None = None,
    overwriting: bool = False,
    typed: str = "",
) -> IngestReport:
    """Run a plan with progress on stderr, after the address of the dashboard."""
    from ingest.run.loop import run
    from ingest.upkeep.overwrite import overwrite

    with watching(session, "ingest") as show:
        return (overwrite if overwriting else run)(plan, cube, config=config, on_event=show, record=record, typed=typed)


def check_report(path: Path | None) -> None:
    """Refuse a --report that could not be written, before the first pixel is read.

    Raises:
        InvalidInput: The name ends in neither .html nor .json, or there is no folder to write to.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".json"):
        raise InvalidInput(f"--report {path}: expected a name that ends in .html (for people) or .json (for programs)")
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "is a folder" if path.is_dir() else f"the folder {path.absolute().parent} does not exist"
        raise InvalidInput(f"--report {path}: {why}; give the name of a file in a folder that exists")


def keep_report(path: Path, result: IngestReport, record: RunRecord | None) -> None:
    """Write the report of a run: HTML where the run was recorded, else JSON."""
    if record is None:
        from zarr_store.redact import redact_value

        path.write_text(json.dumps(redact_value(result.to_dict()), indent=2) + "\n", encoding="utf-8")
        return
    from ingest.run.report import write_report

    write_report(path, record, result)


def cube_config(session: Session, cube: str) -> IngestConfig:
    """Build the configuration from what the cube was made with, then the settings and options of this command."""
    from cli.config import merge
    from ingest.request.settings import make_config
    from ingest.upkeep.extend import selection_of

    kept = selection_of(cube)
    given = merge(session.settings(), session.options)
    if {"bbox", "geometry"} & set(given):
        kept = {name: value for name, value in kept.items() if name not in ("bbox", "geometry")}
    return make_config(None, merge(kept, given), where=f"{cube} with options")


def extend_cube(
    session: Session,
    source: str,
    cube: str,
    config: IngestConfig,
    *,
    append: bool,
    refresh: bool,
    record: RunRecord | None = None,
) -> IngestReport:
    """Add what is new in SOURCE to a cube, with progress on stderr.

    Raises:
        InvalidInput: SOURCE is a plan, which has its own grid.
    """
    from ingest.upkeep.extend import extend

    if is_plan(source):
        raise InvalidInput(
            f"{source} is a plan with its own grid, but --append and --refresh plan on the grid of the cube; give the "
            "STAC source instead"
        )
    with watching(session, "ingest") as show:
        return extend(source, cube, config, append=append, refresh=refresh, on_event=show, record=record)


@contextmanager
def watching(session: Session, title: str) -> Iterator[Callable[[IngestEvent], None]]:
    """Show a run on stderr: the address of the dashboard, finished shards, missing scenes."""
    with Reporter(session, title, unit="shards") as progress:

        def show(event: IngestEvent) -> None:
            if event.kind == "dashboard":
                progress.line(f"dashboard: {event.url}")
            elif event.kind == "shard":
                progress.update(event.done, event.total)
                if event.row is not None and event.row.state != "done":
                    names = ", ".join(s.item_id for s in event.row.sources if s.state == "missing")
                    progress.line(f"shard {event.row.index} is {event.row.state}: {names}")

        yield show
