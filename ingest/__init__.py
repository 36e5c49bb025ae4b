"""`ingest` leads from a STAC source to a cube: search → harmonise → probe → plan → read → write.

    found = ingest.find_scenes(source, collections=["sentinel-2-l2a"], bbox=(16.0, 45.9, 16.2, 46.1))
    plan = ingest.make_plan(found, bands=["red", "nir", "scl"])
    report = ingest.run_plan(plan, "cube.zarr")

Nothing here imports jax. Exports load on first use, so `import ingest` is quick, and so is the command line. No export
has the name of a module of this package, as importing that module would replace it. docs/api/ingest.md lists all names
with examples.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.journey import find_scenes, make_plan, run_plan
    from ingest.keep import (
        append_scenes,
        audit_cube,
        refresh_scenes,
        repair_cube,
        retry_failed,
        verify_files,
        verify_sources,
    )
    from ingest.plan.plan import Plan
    from ingest.request.config import IngestConfig
    from ingest.run.outcome import IngestEvent, IngestReport
    from ingest.scenes.scene import AssetRef, Scene
    from ingest.scenes.scene_list import Scenes
    from ingest.stack import open_stack
    from ingest.upkeep.audit import AuditReport
    from ingest.upkeep.checksums import FilesReport
    from ingest.upkeep.repair import RepairReport, SourcesReport

__all__ = [
    "AssetRef",
    "AuditReport",
    "FilesReport",
    "IngestConfig",
    "IngestEvent",
    "IngestReport",
    "Plan",
    "RepairReport",
    "Scene",
    "Scenes",
    "SourcesReport",
    "append_scenes",
    "audit_cube",
    "find_scenes",
    "make_plan",
    "open_stack",
    "refresh_scenes",
    "repair_cube",
    "retry_failed",
    "run_plan",
    "verify_files",
    "verify_sources",
]

_HOME = {
    "AssetRef": "ingest.scenes.scene",
    "AuditReport": "ingest.upkeep.audit",
    "FilesReport": "ingest.upkeep.checksums",
    "IngestConfig": "ingest.request.config",
    "IngestEvent": "ingest.run.outcome",
    "IngestReport": "ingest.run.outcome",
    "Plan": "ingest.plan.plan",
    "RepairReport": "ingest.upkeep.repair",
    "Scene": "ingest.scenes.scene",
    "Scenes": "ingest.scenes.scene_list",
    "SourcesReport": "ingest.upkeep.repair",
    "append_scenes": "ingest.keep",
    "audit_cube": "ingest.keep",
    "find_scenes": "ingest.journey",
    "make_plan": "ingest.journey",
    "open_stack": "ingest.stack",
    "refresh_scenes": "ingest.keep",
    "repair_cube": "ingest.keep",
    "retry_failed": "ingest.keep",
    "run_plan": "ingest.journey",
    "verify_files": "ingest.keep",
    "verify_sources": "ingest.keep",
}


def __getattr__(name: str) -> Any:
    """Load an export on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ingest' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the exports, for completion in notebooks."""
    return sorted({*globals(), *__all__})
