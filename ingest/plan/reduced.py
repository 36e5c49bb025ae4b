"""`ReducedProbe`: an overview that probing found in a file and that can be read in place of the full image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ingest.raster.overview import Overview
from zarr_store.grid import Grid

__all__ = ["ReducedProbe"]


@dataclass(frozen=True)
class ReducedProbe:
    """One overview of a file that can be read.

    Attributes:
        factor: How many pixels of the file lie along one of its pixels, rounded.
        grid: Its grid.
        resampling: How its pixels were made, as the file states it.
        block: (height, width) of its blocks in pixels.
        block_bytes: Mean stored bytes of the blocks that the region touches, or of all.
    """

    factor: int
    grid: Grid
    resampling: str
    block: tuple[int, int]
    block_bytes: float

    @classmethod
    def of(cls, overview: Overview, window: tuple[int, int, int, int]) -> Self:
        """Describe an overview; `window` (row, col, height, width) of the whole file is the region."""
        block_bytes = overview.block_bytes(window)
        return cls(overview.factor, overview.grid, overview.resampling, overview.packing.block, block_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "grid": self.grid.to_dict(), "block": list(self.block)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(**{**data, "grid": Grid.from_dict(data["grid"]), "block": tuple(data["block"])})
