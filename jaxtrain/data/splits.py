"""`Split` assigns blocks of ground to the training, validation and test part.

The grid is cut into square blocks, and a block belongs to one part. A window lies wholly within one block, so no ground
is in two parts on any date; only where whole dates are held out (`data.split.test_dates`) is a block tested on dates on
which it was not learned. Which block goes where depends on a hash of (seed, block), not on how blocks are counted;
shares are filled by rank of that hash, so that also a dozen blocks fill all parts. A checkerboard gives every other
block to the test part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from jaxtrain.config import SplitConfig
from jaxtrain.data.order import mix
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["PARTS", "UNUSED", "Part", "Split", "add_blocks", "block_shape", "make_split"]

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
UNUSED = -1
"""Code of a block without a usable window."""


@dataclass(frozen=True)
class Split:
    """The part of every block.

    Attributes:
        block: (height, width) of a block, pixels; the first block starts at the grid's first pixel.
        parts: int8 (rows, columns) of blocks: position in `PARTS`, or `UNUSED`.
    """

    block: tuple[int, int]
    parts: npt.NDArray[np.int8]

    @classmethod
    def whole(cls, block: tuple[int, int], shape: tuple[int, int], part: Part = "test") -> Self:
        """Put all ground of a grid of `shape` (height, width) into one part, for a cube that is not training data."""
        rows, columns = (-(-size // side) for size, side in zip(shape, block, strict=True))
        return cls(block, np.full((rows, columns), PARTS.index(part), np.int8))

    @property
    def by_blocks(self) -> tuple[Self, ...]:
        """The splits that can be drawn as maps of blocks."""
        return (self,)

    def part_at(self, y: npt.NDArray[np.int64], x: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Return the codes of the blocks that hold the pixels (y, x)."""
        return self.parts[y // self.block[0], x // self.block[1]]

    def counts(self) -> dict[str, int]:
        """Count the blocks of each part."""
        return {part: int((self.parts == code).sum()) for code, part in enumerate(PARTS)}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"block": list(self.block), "parts": self.parts.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        height, width = data["block"]
        return cls((int(height), int(width)), np.array(data["parts"], np.int8))


def block_shape(config: SplitConfig, grid: Grid, patch: int) -> tuple[int, int]:
    """Return (height, width) of a block in pixels: `config.block_m`, rounded to whole patches, at least one.

    >>> grid = Grid("EPSG:32633", (120.0, 0.0, 0.0, 0.0, -120.0, 0.0), (1000, 1000))
    >>> block_shape(SplitConfig(block_m=10_000), grid, 32)
    (96, 96)
    """
    side = config.block_m * grid.units_per_metre
    height, width = (max(1, round(side / resolution / patch)) * patch for resolution in grid.resolution[::-1])
    return (height, width)


def make_split(config: SplitConfig, block: tuple[int, int], usable: npt.NDArray[np.bool_]) -> Split:
    """Assign every usable block to a part.

    Args:
        config: Shares and seed.
        block: (height, width) of a block, pixels.
        usable: bool (rows, columns): blocks that hold at least one usable window.

    Returns:
        The split. Validation and test have at least one block each where their share is not zero.

    Raises:
        InvalidInput: There are fewer usable blocks than parts.
    """
    rows, columns = np.nonzero(usable)
    total = len(rows)
    test, first, last = config.count_parts(total)
    if total - test - (last - first) < 1 or (config.folds and last == first):
        raise InvalidInput(
            f"spatial split: {total} blocks of {block[0]}×{block[1]} pixels have something to learn, too few for "
            f"training plus {_validated(config)} plus test {config.test:g}; lower data.split.block_m "
            f"(now {config.block_m:g} m), data.patch or data.min_labelled"
        )
    ranked = np.argsort(_draws(config.seed, rows, columns), kind="stable")
    codes = np.full(total, PARTS.index("train"), np.int8)
    codes[ranked[:test]] = PARTS.index("test")
    codes[ranked[first:last]] = PARTS.index("validation")
    parts = np.full(usable.shape, UNUSED, np.int8)
    parts[rows, columns] = codes
    return Split(block, parts)


def add_blocks(split: Split, config: SplitConfig, more: npt.NDArray[np.bool_]) -> Split:
    """Draw a part for each further block by itself, so that the parts of the other blocks do not change.

    Args:
        split: Result of `make_split`.
        config: Shares and seed.
        more: bool (rows, columns): blocks that hold labels but no usable window.
    """
    rows, columns = np.nonzero(more)
    drawn = _draws(config.seed, rows, columns).astype(np.float64) / 2.0**64
    codes = np.where(drawn < config.test, PARTS.index("test"), PARTS.index("train"))
    first, last = config.validation_range
    codes = np.where((drawn >= first) & (drawn < last), PARTS.index("validation"), codes)
    parts = split.parts.copy()
    parts[rows, columns] = codes.astype(np.int8)
    return Split(split.block, parts)


def _validated(config: SplitConfig) -> str:
    return f"{config.folds} folds" if config.folds else f"validation {config.validation:g}"


def _draws(seed: int, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return a hash of (seed, block) for each block."""
    names = rows.astype(np.uint64) << np.uint64(32) | columns.astype(np.uint64)
    return mix(mix(np.array([seed % (1 << 64)], np.uint64)) ^ names)
