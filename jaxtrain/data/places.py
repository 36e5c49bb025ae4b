"""`SampleSplit` divides the samples of a store into training and held-out ones, by their places.

Samples with coordinates are split by cells (0.5° by default): a cell belongs to one part, by a hash of (seed, cell).
Neighbours across the edge of a cell can be left out of training by a buffer. A random split is possible; it is leaky,
because a sample's neighbour looks like it; the leakage figure measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from jaxtrain.config import SplitConfig
from jaxtrain.data.order import mix
from jaxtrain.data.splits import PARTS, UNUSED, Split
from zarr_store.errors import InvalidInput

__all__ = ["SampleSplit", "leakage", "nearest_m", "split_samples"]

Degrees = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]

_EARTH_M = 6_371_008.8
"""Mean radius of the Earth (IUGG), metres."""


@dataclass(frozen=True)
class SampleSplit:
    """The part of every sample.

    Attributes:
        kind: By cells, or at random.
        parts: int8 (samples,): position in `PARTS`, or `UNUSED`.
        cells: Cells of each part, in the order of `PARTS`; samples, where the split is random.
    """

    kind: Literal["cells", "random"]
    parts: Codes
    cells: tuple[int, int, int]

    @property
    def by_blocks(self) -> tuple[Split, ...]:
        """Splits that can be drawn as maps of blocks: none."""
        return ()

    def counts(self) -> dict[str, int]:
        """Count the cells of each part; the samples, if the split is random."""
        return dict(zip(PARTS, self.cells, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; parts as one letter each, so that ten thousand samples stay short."""
        letters = np.array(list("tvx-"))[self.parts]
        return {"kind": self.kind, "parts": "".join(letters), "cells": list(self.cells)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        parts = np.array(["tvx-".index(letter) for letter in data["parts"]], np.int8)
        train, validation, test = (int(v) for v in data["cells"])
        return cls(data["kind"], np.where(parts == 3, UNUSED, parts).astype(np.int8), (train, validation, test))


def split_samples(config: SplitConfig, longitude: Degrees, latitude: Degrees) -> SampleSplit:
    """Assign every sample to a part.

    Args:
        config: Kind, shares, seed, cell and buffer.
        longitude: Degrees (samples,), nan where unknown.
        latitude: Degrees (samples,), nan where unknown.

    Raises:
        InvalidInput: A place is unknown, or there are fewer cells than parts.
    """
    count = len(longitude)
    if config.kind == "checkerboard":
        raise InvalidInput("data.split.kind = 'checkerboard' is for a labelled scene; samples are split by 'blocks'")
    if config.kind == "random":
        names = np.arange(count, dtype=np.uint64)
        parts = _fill(config, names, "samples")
        return SampleSplit("random", parts, _tally(parts))
    unknown = int((~np.isfinite(longitude) | ~np.isfinite(latitude)).sum())
    if unknown:
        raise InvalidInput(
            f"{unknown} of {count} samples have no coordinates, so they cannot be split by place: import them with a "
            "coordinates.csv, or set data.split.kind = 'random', which is leaky"
        )
    cell = config.cell_deg
    row, column = np.floor((latitude + 90) / cell), np.floor((longitude + 180) / cell)
    names = row.astype(np.uint64) << np.uint64(32) | column.astype(np.uint64)
    cells, of_sample = np.unique(names, return_inverse=True)
    of_cell = _fill(config, cells, f"cells of {cell:g} degrees")
    parts = of_cell[of_sample]
    if config.buffer_m:
        train, held_out = parts == PARTS.index("train"), parts > PARTS.index("train")
        if held_out.any() and train.any():
            near = (
                nearest_m(longitude[train], latitude[train], longitude[held_out], latitude[held_out]) < config.buffer_m
            )
            parts[np.flatnonzero(train)[near]] = UNUSED
    return SampleSplit("cells", parts, _tally(of_cell))


def _fill(config: SplitConfig, names: npt.NDArray[np.uint64], what: str) -> Codes:
    total = len(names)
    test, first, last = config.count_parts(total)
    if total - test - (last - first) < 1 or (config.folds and last == first):
        validated = f"{config.folds} folds" if config.folds else f"validation {config.validation:g}"
        raise InvalidInput(
            f"split: {total} {what}, too few for training plus {validated} plus test "
            f"{config.test:g}; lower data.split.cell_deg or these shares"
        )
    ranked = np.argsort(mix(mix(np.array([config.seed % (1 << 64)], np.uint64)) ^ names), kind="stable")
    codes = np.full(total, PARTS.index("train"), np.int8)
    codes[ranked[:test]] = PARTS.index("test")
    codes[ranked[first:last]] = PARTS.index("validation")
    return codes


def _tally(codes: Codes) -> tuple[int, int, int]:
    train, validation, test = (int((codes == code).sum()) for code in range(len(PARTS)))
    return (train, validation, test)


def nearest_m(longitude: Degrees, latitude: Degrees, other_longitude: Degrees, other_latitude: Degrees) -> Degrees:
    """Return the distance from each place to the nearest of the others, metres on a sphere.

    >>> degree = nearest_m(np.array([16.0]), np.array([0.0]), np.array([17.0]), np.array([0.0]))
    >>> round(float(degree[0]))
    111195
    """
    from scipy.spatial import cKDTree

    chord, _ = cKDTree(_on_sphere(other_longitude, other_latitude)).query(_on_sphere(longitude, latitude))
    metres: Degrees = 2 * _EARTH_M * np.arcsin(np.minimum(np.asarray(chord) / 2, 1))
    return metres


def _on_sphere(longitude: Degrees, latitude: Degrees) -> Degrees:
    east, north = np.deg2rad(longitude), np.deg2rad(latitude)
    return np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)], axis=-1)


def leakage(parts: Codes, longitude: Degrees, latitude: Degrees, near_m: float) -> dict[str, Any]:
    """Return the leakage of the test part: the share of its samples with a training sample nearer than `near_m` metres.

    Returns:
        near_m, and share: none where a place is unknown or a part is empty.
    """
    train, test = parts == PARTS.index("train"), parts == PARTS.index("test")
    known = np.isfinite(longitude).all() and np.isfinite(latitude).all()
    share = None
    if known and train.any() and test.any():
        near = nearest_m(longitude[test], latitude[test], longitude[train], latitude[train])
        share = round(float((near < near_m).mean()), 4)
    return {"near_m": near_m, "share": share}
