"""`find_patches` finds the connected areas of one class on a map, joined over strips, and merges the small ones.

A map is read twice in strips: here its patches are counted, and afterwards `outlines` draws them. Memory holds a strip
and some numbers for each patch, whatever the size of the map.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ingest.products.layer import ClassLayer
from zarr_store.pixel_area import PixelAreas

__all__ = ["Patches", "find_patches", "label_strip"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Patches:
    """The patches of a map.

    Attributes:
        starts: Number of the first piece of each strip; pieces are patches as one strip shows them.
        patch: Patch of each piece.
        value: Class of each patch.
        area: Area of each patch on the ground, square metres.
        confidence: Mean confidence of its pixels, per cent; nan where the map has none.
        last_strip: Last strip that each patch reaches.
        merged: Number of patches that were too small and went into a neighbour.
    """

    starts: Ints
    patch: Ints
    value: Ints
    area: Floats
    confidence: Floats
    last_strip: Ints
    merged: int

    def __len__(self) -> int:
        return len(self.value)


def label_strip(classes: npt.NDArray[Any], known: int) -> tuple[npt.NDArray[np.int32], int]:
    """Number the connected areas of equal classes from 1 on, over edges and not corners; 0 is no data.

    Args:
        classes: Rows of a map.
        known: Number of classes; larger values are no data.

    >>> label_strip(np.array([[1, 1, 0], [9, 0, 0]]), 2)
    (array([[2, 2, 1],
           [0, 1, 1]], dtype=int32), 2)
    """
    labels, count = np.zeros(classes.shape, np.int32), 0
    for value in np.unique(classes[classes < known]):
        there = classes == value
        found, more = ndimage.label(there)
        labels[there] = found[there] + count
        count += int(more)
    return labels, count


def find_patches(layer: ClassLayer, *, min_area: float = 0.0) -> Patches:
    """Find the patches of a map.

    Args:
        layer: The classes.
        min_area: Patches below this area, in square metres, go into their largest neighbour, as `gdal_sieve` does it;
            the smallest first. One without a neighbour stays.
    """
    pixel, known = PixelAreas(layer.grid), len(layer.names)
    starts, values, areas, sums, counts, last = [0], [], [], [], [], []
    same: list[Ints] = []
    beside: list[Ints] = []
    above: tuple[npt.NDArray[Any], Ints] | None = None
    for number, rows in enumerate(layer.strips()):
        classes = layer.read(rows)
        labels, count = label_strip(classes, known)
        flat = labels.ravel()
        weight = np.broadcast_to(pixel.rows(rows.start, rows.stop), labels.shape).ravel()
        size = np.bincount(flat, minlength=count + 1)[1:]
        first = np.zeros(count + 1, np.int64)
        first[flat[::-1]] = classes.ravel()[::-1]
        values.append(first[1:])
        areas.append(np.bincount(flat, weights=weight, minlength=count + 1)[1:])
        counts.append(size)
        confidence = None if layer.confidence is None else layer.confidence(rows).ravel().astype(np.float64)
        sums.append(np.full(count, np.nan) if confidence is None
                    else np.bincount(flat, weights=confidence, minlength=count + 1)[1:])  # fmt: skip
        last.append(np.full(count, number, np.int64))
        pieces = np.where(labels > 0, labels + starts[-1], 0).astype(np.int64)
        if above is not None:
            touching = (above[1] > 0) & (pieces[0] > 0)
            equal = touching & (above[0] == classes[0])
            same.append(_pairs(above[1][equal], pieces[0][equal]))
            if min_area:
                beside.append(_pairs(above[1][touching & ~equal], pieces[0][touching & ~equal]))
        if min_area:
            beside += [_differing(pieces[:, :-1], pieces[:, 1:]), _differing(pieces[:-1], pieces[1:])]
        above = (classes[-1], pieces[-1])
        starts.append(starts[-1] + count)
    total = starts[-1]
    patch = _joined(total, np.concatenate(same) - 1 if same else np.zeros((0, 2), np.int64))
    made = int(patch.max()) + 1 if total else 0
    value, reached = np.zeros(made, np.int64), np.zeros(made, np.int64)
    value[patch[::-1]] = np.concatenate(values)[::-1] if values else []
    np.maximum.at(reached, patch, np.concatenate(last) if last else np.zeros(0, np.int64))
    area: Floats = np.bincount(patch, weights=np.concatenate(areas), minlength=made).astype(np.float64)
    pixels = np.bincount(patch, weights=np.concatenate(counts), minlength=made)
    total_confidence = np.bincount(patch, weights=np.concatenate(sums), minlength=made)
    merged = 0
    if min_area and made:
        pairs = patch[np.concatenate(beside) - 1] if beside else np.zeros((0, 2), np.int64)
        into, merged = _merge_small(area, value, np.unique(pairs, axis=0), min_area)
        kept, target = np.unique(into, return_inverse=True)
        patch, value = target[patch], value[kept]
        far = np.zeros(len(kept), np.int64)
        np.maximum.at(far, target, reached)
        area, pixels, total_confidence, reached = (
            np.bincount(target, weights=area).astype(np.float64), np.bincount(target, weights=pixels),
            np.bincount(target, weights=total_confidence), far,
        )  # fmt: skip
    return Patches(np.asarray(starts), patch, value, area, total_confidence / np.maximum(pixels, 1), reached, merged)


def _differing(one: Ints, other: Ints) -> Ints:
    apart = (one != other) & (one > 0) & (other > 0)
    return _pairs(one[apart], other[apart])


def _pairs(one: Ints, other: Ints) -> Ints:
    """Return the different pairs (smaller, larger), (pairs, 2)."""
    if not one.size:
        return np.zeros((0, 2), np.int64)
    low, high = np.minimum(one, other), np.maximum(one, other)
    base = int(high.max()) + 1
    keys = np.unique(low * base + high)
    return np.column_stack([keys // base, keys % base])


def _joined(total: int, pairs: Ints) -> Ints:
    """Return the patch of each piece, in the order in which patches appear."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not total:
        return np.zeros(0, np.int64)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(total, total))
    _, found = connected_components(graph, directed=False)
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _merge_small(area: Floats, value: Ints, pairs: Ints, least: float) -> tuple[Ints, int]:
    """Return the patch that each patch ends in, and how many small ones went: each into its largest neighbour.

    A patch keeps the class of the one it ends in. Patches of one class that touch after that become one.
    """
    into, size, small_ones = np.arange(len(area)), area.copy(), 0
    border: list[set[int]] = [set() for _ in area]
    for one, other in pairs.tolist():
        border[one].add(other)
        border[other].add(one)

    def absorb(one: int, target: int) -> None:
        into[one] = target
        size[target] += size[one]
        for other in border[one]:
            border[other].discard(one)
            if other != target:
                border[target].add(other)
                border[other].add(target)
        border[one] = set()

    waiting = [(float(size[at]), at) for at in np.flatnonzero(size < least).tolist()]
    heapq.heapify(waiting)
    while waiting:
        was, small = heapq.heappop(waiting)
        if into[small] != small or was != size[small] or not border[small]:
            continue  # it was merged, has grown, or has no neighbour
        target = max(border[small], key=lambda other: (size[other], -other))
        gained = border[small] - border[target]
        absorb(small, target)
        small_ones += 1
        for other in sorted(gained - {target}):
            if value[other] == value[target]:
                absorb(other, target)
        if size[target] < least:
            heapq.heappush(waiting, (float(size[target]), target))
    while (into[into] != into).any():
        into = into[into]
    return into, small_ones
