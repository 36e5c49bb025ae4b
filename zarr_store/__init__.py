"""terrashard's cube on disk: sharded, checksummed Zarr v3 with a ledger of what is complete.

Start with `open_cube` to read, `create_cube` and `ShardWriter` to write, `verify_cube` to check.
docs/api/zarr_store.md lists all names with examples. Exports load on first use, so that a command imports only what it
needs; no export has the name of a module of this package, as importing that module would replace it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.imported import from_xarray
    from zarr_store.index import TrainingIndex
    from zarr_store.layers import StaticLayer, find_layers, open_layer
    from zarr_store.ledger import Ledger, LedgerRow, SourceOutcome
    from zarr_store.lock import CubeLock
    from zarr_store.read import Cube, open_cube
    from zarr_store.regions import Region
    from zarr_store.spec import LAYOUTS, BandSpec, CubeSpec, Layout
    from zarr_store.verify import VerifyReport, verify_cube
    from zarr_store.write import ShardWriter

__all__ = [
    "LAYOUTS",
    "BandSpec",
    "Cube",
    "CubeLock",
    "CubeSpec",
    "Grid",
    "Layout",
    "Ledger",
    "LedgerRow",
    "Region",
    "ShardWriter",
    "SourceOutcome",
    "StaticLayer",
    "TrainingIndex",
    "VerifyReport",
    "create_cube",
    "find_layers",
    "from_xarray",
    "open_cube",
    "open_layer",
    "verify_cube",
]

_HOME = {
    "BandSpec": "zarr_store.spec",
    "Cube": "zarr_store.read",
    "CubeLock": "zarr_store.lock",
    "CubeSpec": "zarr_store.spec",
    "Grid": "zarr_store.grid",
    "LAYOUTS": "zarr_store.spec",
    "Layout": "zarr_store.spec",
    "Ledger": "zarr_store.ledger",
    "LedgerRow": "zarr_store.ledger",
    "Region": "zarr_store.regions",
    "ShardWriter": "zarr_store.write",
    "SourceOutcome": "zarr_store.ledger",
    "StaticLayer": "zarr_store.layers",
    "TrainingIndex": "zarr_store.index",
    "VerifyReport": "zarr_store.verify",
    "create_cube": "zarr_store.create",
    "find_layers": "zarr_store.layers",
    "from_xarray": "zarr_store.imported",
    "open_cube": "zarr_store.read",
    "open_layer": "zarr_store.layers",
    "verify_cube": "zarr_store.verify",
}


def __getattr__(name: str) -> Any:
    """Load an export on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'zarr_store' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the exports, for completion in notebooks."""
    return sorted({*globals(), *__all__})
