"""Opening a map that `predict` wrote, for pictures and GeoTIFFs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zarr_store import Grid

__all__ = ["OpenedMap", "open_map"]


@dataclass(frozen=True)
class OpenedMap:
    """A map on its grid."""

    classes: Any
    names: dict[int, str]
    colours: dict[int, tuple[int, int, int]]
    grid: Grid


def open_map(store: str) -> OpenedMap | None:
    return None
