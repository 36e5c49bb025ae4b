"""`Lattice` places windows on a scene: which windows the pixels of a shard need, and of which size.

Windows lie on one lattice of the whole grid, so a map does not depend on how it is cut into shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from jaxtrain.inference.blend import Box, window_starts
from jaxtrain.inference.layers import MapLayers
from jaxtrain.inference.maps import CHUNK
from zarr_store.regions import Region, iterate_boxes

__all__ = ["Lattice"]

_PATCHES_OF_SHARD = 12
"""Least side of a shard in windows of a blend: those across its edge are predicted twice, which costs a sixth."""
_SHARDS_ACROSS = 3
"""Shards that a large scene has across: fewer edges, and still enough shards for several processes."""
_MOST_PATCHES = 16
_MOST_SHARD = 4096
_EXACT_SHARD = 2048
_SUMS_BYTES = 64 << 20
"""Largest sum of one row of windows, bytes."""
_BLOCK_BYTES = 128 << 20
"""Largest array of one shard, bytes: its layers, or its votes."""
_HELD_BYTES = 32 << 20
"""Largest size of the answers of the windows across the edge of two shards, bytes, that are held for the second one."""
_TRAINING_BATCHES = 8
"""Pixels of an exact window, in batches of training: without gradients a network needs this much less memory."""


@dataclass(frozen=True)
class Lattice:
    """The places of windows on a scene.

    Attributes:
        grid: (height, width) of the scene.
        window: (height, width) of a window.
        shard: Side of a shard of the map, a multiple of the side of its chunks.
        batch: Windows of a batch.
        overlap: Pixels that neighbouring windows of a blend share.
        core: Side of the middle of an exact window; 0 in a blend.
        pad: Pixels around it.
        stride: Pixels by which a window may be moved.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shard: int
    batch: int
    overlap: int = 0
    core: int = 0
    pad: int = 0
    stride: int = 1

    @classmethod
    def blended(
        cls,
        grid: tuple[int, int],
        patch: int,
        overlap: int,
        batch: int,
        kind: MapLayers,
        *,
        votes: bool,
        stride: int = 1,
    ) -> Self:
        """Place overlapping windows of the size of training, each of which begins at a multiple of `stride`."""
        wanted = min(max(_PATCHES_OF_SHARD * patch, max(grid) // _SHARDS_ACROSS), _MOST_PATCHES * patch)
        side = min(max(-(-wanted // CHUNK), 1) * CHUNK, _MOST_SHARD)
        while side > CHUNK and patch * side * kind.channels * 4 > _SUMS_BYTES:
            side -= CHUNK
        return cls(grid, (patch, patch), _within(side, kind, votes), batch, overlap, stride=stride)

    @classmethod
    def exact(
        cls,
        grid: tuple[int, int],
        radius: int,
        stride: int,
        patch: int,
        batch: int,
        devices: int,
        kind: MapLayers,
        *,
        votes: bool,
    ) -> Self:
        """Place windows whose middles lie side by side, each with a margin of the receptive field around it."""
        pad = -(-radius // stride) * stride
        pixels = batch * patch**2
        most = max(_TRAINING_BATCHES * pixels, (4 * max(pad, stride)) ** 2)
        shard = _within(_EXACT_SHARD, kind, votes)
        core = shard
        while core > max(stride, 64) and (
            (core + 2 * pad) ** 2 > most or core**2 * kind.classes * 4 > _SUMS_BYTES
            or (core == shard and devices > 1)
        ):  # fmt: skip
            core //= 2
        core = max(core - core % stride, stride)
        height, width = (min(core + 2 * pad, -(-side // stride) * stride) for side in grid)
        size = max(1, min(pixels // (height * width), (shard // core) ** 2))
        return cls(grid, (height, width), shard, -(-size // devices) * devices, core=core, pad=pad, stride=stride)

    def shards(self, times: int) -> dict[tuple[int, int, int], Region]:
        """Return the region of each shard of a map by its index."""
        return dict(iterate_boxes((times, *self.grid), (1, self.shard, self.shard)))

    def windows(self, region: Region, inside: npt.NDArray[np.bool_] | None) -> list[tuple[int, int, Box]]:
        """Return the windows of a shard as (y, x, box of the pixels that it is needed for), by rows.

        Args:
            region: The shard.
            inside: Pixels of it that are mapped; None for all.
        """
        found = self._cores(region) if self.core else self._overlapping(region)
        if inside is None:
            return found
        kept = []
        for y, x, (y0, y1, x0, x1) in found:
            if inside[y0 - region.y0 : y1 - region.y0, x0 - region.x0 : x1 - region.x0].any():
                kept.append((y, x, (y0, y1, x0, x1)))
        return kept

    def shares_edges(self, channels: int, dates: int) -> bool:
        """Return whether the answers of windows across the edge of two shards are few enough to be held for both.

        Args:
            channels: Numbers of an answer for a pixel.
            dates: Dates of a map.
        """
        if self.core:
            return False
        height, width = self.window
        rows = -(-min(self.shard, self.grid[0]) // max(height - self.overlap, 1)) + 1
        across = width / max(width - self.overlap, 1)  # windows of a row that lie across an edge, on average
        return rows * across * dates * height * width * (channels + 1) * 4 <= _HELD_BYTES

    def _overlapping(self, region: Region) -> list[tuple[int, int, Box]]:
        height, width = self.window
        columns = [x for x in self._starts(self.grid[1], width) if region.x0 - width < x < region.x1]
        return [
            (y, x, (max(y, region.y0), min(y + height, region.y1), max(x, region.x0), min(x + width, region.x1)))
            for y in self._starts(self.grid[0], height)
            if region.y0 - height < y < region.y1
            for x in columns
        ]

    def _starts(self, side: int, window: int) -> list[int]:
        # a window begins with a whole pixel of every modality, so the last one may reach over the edge
        ceil = -(-np.array([side, self.overlap]) // self.stride)
        starts = window_starts(int(ceil[0]), window // self.stride, int(ceil[1])) * self.stride
        return [int(start) for start in starts]

    def _cores(self, region: Region) -> list[tuple[int, int, Box]]:
        def start(first: int, side: int, window: int) -> int:
            # the whole scene reaches to a multiple of the stride; at its edges windows end with it
            return min(max(first - self.pad, 0), -(-side // self.stride) * self.stride - window)

        found = []
        for y0 in range(region.y0, region.y1, self.core):
            for x0 in range(region.x0, region.x1, self.core):
                box = (y0, min(y0 + self.core, region.y1), x0, min(x0 + self.core, region.x1))
                y, x = start(y0, self.grid[0], self.window[0]), start(x0, self.grid[1], self.window[1])
                found.append((y, x, box))
        return found


def _within(side: int, kind: MapLayers, votes: bool) -> int:
    """Return the largest side of a shard whose arrays stay within their bound."""
    each = 2 + kind.classes * ((1 if kind.probabilities else 0) + (4 if votes else 0))
    while side > CHUNK and side**2 * each > _BLOCK_BYTES:
        side //= 2
    return max(side - side % CHUNK, CHUNK)
