"""From a STAC source to a cube: search → harmonise → probe → plan → read → write.

Nothing here imports jax. Exports load on first use, so `import ingest` costs nothing and the command line stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.plan.plan import Plan, make_plan
    from ingest.request.config import IngestConfig
    from ingest.run.loop import IngestReport, run
    from ingest.scenes.scene import AssetRef, Scene
    from ingest.scenes.search import search

__all__ = ["AssetRef", "IngestConfig", "IngestReport", "Plan", "Scene", "make_plan", "run", "search"]

_HOME = {
    "AssetRef": "ingest.scenes.scene",
    "IngestConfig": "ingest.request.config",
    "IngestReport": "ingest.run.loop",
    "Plan": "ingest.plan.plan",
    "Scene": "ingest.scenes.scene",
    "make_plan": "ingest.plan.plan",
    "run": "ingest.run.loop",
    "search": "ingest.scenes.search",
}


def __getattr__(name: str) -> Any:
    """Load an export on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ingest' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
