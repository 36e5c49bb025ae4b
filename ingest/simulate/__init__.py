"""`simulate` writes a landscape as Sentinel-2 and Sentinel-1 see it, for `terrashard simulate`, the demo and tests.

    SimulateConfig ── ground.py ── spectra.py + clouds.py + radar.py ── scenes.py ──▶ COGs, STAC items, truth
                                                                    └─ server.py ──▶ STAC API and file server

`import ingest` does not import it. Exports load on first use, because the server needs no raster library and the writer
no web framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.simulate.config import SimulateConfig
    from ingest.simulate.ground import CLASSES
    from ingest.simulate.scenes import SimulatedWorld, simulate
    from ingest.simulate.server import ServerHandle, serve

__all__ = ["CLASSES", "ServerHandle", "SimulateConfig", "SimulatedWorld", "serve", "simulate"]

_HOME = {
    "CLASSES": "ingest.simulate.ground",
    "ServerHandle": "ingest.simulate.server",
    "SimulateConfig": "ingest.simulate.config",
    "SimulatedWorld": "ingest.simulate.scenes",
    "serve": "ingest.simulate.server",
    "simulate": "ingest.simulate.scenes",
}


def __getattr__(name: str) -> Any:
    """Load an export on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ingest.simulate' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
