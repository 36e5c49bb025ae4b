"""A simulated landscape seen by Sentinel-2 and Sentinel-1: behind `terrashard simulate`, `terrashard demo` and tests.

    SimulateConfig ── ground.py ── spectra.py + clouds.py + radar.py ── scenes.py ──▶ COGs, STAC items, truth
                                                                    └─ server.py ──▶ STAC API and file server

Not imported by `import ingest`: the server's libraries load only where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingest.simulate.config import SimulateConfig
from ingest.simulate.ground import CLASSES
from ingest.simulate.scenes import SimulatedWorld, simulate

if TYPE_CHECKING:
    from ingest.simulate.server import ServerHandle, serve

__all__ = ["CLASSES", "ServerHandle", "SimulateConfig", "SimulatedWorld", "serve", "simulate"]


def __getattr__(name: str) -> Any:
    # FastAPI takes a second to import, and writing a world does not need it
    if name in ("ServerHandle", "serve"):
        from ingest.simulate import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
