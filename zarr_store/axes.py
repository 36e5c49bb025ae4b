"""Find damaged axes of a cube: time, band, y and x of its collections and overviews, and the coordinates of its steps.

The ledger has no checksum of them, but what they hold follows from the description of their collection. So they are
made again in memory and compared, value by value, as other releases of zarr-python pack the same values otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from zarr.storage import MemoryStore

from zarr_store.create import describe, lay_out
from zarr_store.errors import IntegrityError
from zarr_store.group import axis_checks, read_array
from zarr_store.read import Cube
from zarr_store.spec import OVERVIEW_FACTOR
from zarr_store.store import Store

__all__ = ["find_damaged_axes"]

_NEEDED = ("time", "band", "y", "x")
"""Axes that every cube has; earlier releases wrote no others."""


def find_damaged_axes(cube: Cube, store: Store) -> list[str]:
    """Compare the axes of a cube with the descriptions of its collections.

    Returns:
        One line for each axis that is missing, cannot be decoded, or holds other values.
    """
    specs = [cube.spec(name) for name in cube.collections]
    fresh: dict[str, Any] = {}
    items = {name: cube.items(name) for name in cube.collections}
    lay_out(MemoryStore(store_dict=fresh), specs, describe(specs, items), {})
    lines = []
    for spec in specs:
        for group, grid in ((spec.collection, spec.grid), (f"overview/{spec.collection}", _coarse(spec))):
            checks = axis_checks(grid.height, grid.width, bands=len(spec.bands))
            for name, check in checks.items():
                path = f"{group}/{name}"
                chunks = {key: value for key, value in fresh.items() if key.startswith(f"{path}/c/")}
                if not chunks or (store.read(f"{path}/zarr.json") is None and name not in _NEEDED):
                    continue
                held = {key: store.read(key) for key in chunks}
                if all(held[key] == bytes(value.to_bytes()) for key, value in chunks.items()):
                    continue
                right = _values(fresh, path)
                if (fault := _fault(store, path, check, right, held)) is not None:
                    lines.append(f"axis {path} {fault}: {store.where(f'{path}/c')}")
    return lines


def _coarse(spec: Any) -> Any:
    return spec.grid.coarsen(OVERVIEW_FACTOR)


def _values(fresh: dict[str, Any], path: str) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(MemoryStore(store_dict=fresh), path=path, mode="r")[...])


def _fault(store: Store, path: str, check: Any, right: np.ndarray, held: dict[str, bytes | None]) -> str | None:
    """Return the fault of an axis whose bytes are not those written today; None where its values are right."""
    if store.read(f"{path}/zarr.json") is None or all(data is None for data in held.values()):
        return "is missing"
    try:
        stored = read_array(store, path, check)
    except IntegrityError as error:
        return f"cannot be read ({error})"
    if len(stored) < len(right):
        return f"has {len(stored)} values, its collection {len(right)}"
    # while a cube grows, its axis of time is already longer than its collection states
    wrong = np.flatnonzero(stored[: len(right)] != right)
    if not len(wrong):
        return None
    first = int(wrong[0])
    shown = f"{stored[first]!s}, not {right[first]!s}"
    return f"holds {len(wrong)} other values than its collection states, first {shown}"
