"""terrashard's cube on disk: sharded, checksummed Zarr v3 with a ledger of what is complete.

Start with `open_cube` to read, `create_cube` and `ShardWriter` to write, `verify_cube` to check.
docs/api/zarr_store.md lists all names with examples.
"""

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
