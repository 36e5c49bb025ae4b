"""A source or a plan becomes a cube: the shared part of `ingest` and `demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import RUNNING, TRUST
from cli.progress import Reporter
from cli.session import Session
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from ingest.config import IngestConfig
    from ingest.plan import Plan
    from ingest.run import IngestEvent, IngestReport

__all__ = ["is_plan", "plan_of", "run_plan"]

_HEAD_BYTES = 64 << 20


def is_plan(source: str) -> bool:
    """Whether SOURCE is a plan.json of `terrashard plan`, which is run as it is."""
    path = Path(source)
    if "://" in source or path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > _HEAD_BYTES:
        return False
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("type") == "terrashard-plan"


def plan_of(session: Session, source: str, config: IngestConfig) -> Plan:
    """The plan that SOURCE is, or one made from what it lists.

    Raises:
        InvalidInput: SOURCE is a plan, and options ask for another one.
    """
    from ingest.plan import Plan, make_plan

    if not is_plan(source):
        return make_plan(source, config)
    fixed = sorted((set(session.options) | set(session.settings())) - set(RUNNING) - set(TRUST))
    if fixed:
        raise InvalidInput(f"{source} is a plan, which fixes {', '.join(fixed)}; plan again with the new settings")
    return Plan.load(source)


def run_plan(session: Session, plan: Plan, cube: str | Path, config: IngestConfig) -> IngestReport:
    """Run a plan with progress on stderr; the address of the dashboard comes first."""
    from ingest.run import run

    with Reporter(session, "ingest", unit="shards") as progress:

        def show(event: IngestEvent) -> None:
            if event.kind == "dashboard":
                progress.line(f"dashboard: {event.url}")
            elif event.kind == "shard":
                progress.update(event.done, event.total)
                if event.row is not None and event.row.state != "done":
                    names = ", ".join(s.item_id for s in event.row.sources if s.state == "missing")
                    progress.line(f"shard {event.row.index} is {event.row.state}: {names}")

        return run(plan, cube, config=config, on_event=show)
