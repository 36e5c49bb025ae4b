"""Native grids: the groups of a cube in which each band keeps the pixel size of its files.

A band's size is that of most of its pixels, by the file headers. The finest size of all bands is that of the cube's
first grid; every other grid has pixels of a whole number of these, on edges that coincide, over the same ground. Bands
of one collection and one size make one group, named after both: `sentinel-2-l2a_20m`. A collection whose bands all have
one size keeps its name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ingest.pixels.indices import INDICES
from ingest.plan.candidates import ProbedScene, product_of
from ingest.plan.target import TargetGrid
from ingest.plan.task import Recipe
from ingest.request.config import IngestConfig
from ingest.request.products import BandChoice, choose_bands
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.ground import ground_scale
from zarr_store.nesting import nested_layouts
from zarr_store.spec import Layout

__all__ = ["Group", "NativeSizes", "groups_of", "measure_sizes", "nest_target"]

_SAME_SIZE = 0.02
"""Largest relative deviation from a whole number of fine pixels where sizes are compared on the ground."""
_ON_EDGE_PX = 1e-3
"""Largest distance between two edges that coincide, in pixels of the finest grid."""


@dataclass(frozen=True)
class Group:
    """One group of the cube that is planned.

    Attributes:
        name: Name of the group.
        scenes: Collection of the catalogue whose scenes it holds, where grids are native; else empty.
        choice: Its bands and class layers.
        grid: Its grid.
        layout: Its chunks and shards.
    """

    name: str
    scenes: str
    choice: BandChoice
    grid: Grid
    layout: Layout


@dataclass(frozen=True)
class NativeSizes:
    """The pixel size of each band, in pixels of the finest.

    Attributes:
        factors: Collection → band → whole number of finest pixels along one pixel of the band.
        finest_m: Size of the finest pixels, metres on the ground.
    """

    factors: Mapping[str, Mapping[str, int]]
    finest_m: float

    @property
    def all(self) -> tuple[int, ...]:
        """All factors of the cube, ascending."""
        return tuple(sorted({factor for bands in self.factors.values() for factor in bands.values()}))

    def name(self, factor: int) -> str:
        """Return the name of a pixel size, for example "20m"."""
        return f"{float(f'{self.finest_m * factor:.3g}'):g}m"


def measure_sizes(probed: Sequence[ProbedScene], config: IngestConfig) -> NativeSizes:
    """Find the pixel size of each data band from the file headers; the product's own where no file was opened.

    Raises:
        InvalidInput: The pixels of a band are not a whole number of those of the finest band.
    """
    votes: dict[tuple[str, str], dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for one in probed:
        choice = choose_bands(product_of(one.scene), config.selection.bands, config.pixels.mask)
        for band in choice.data:
            header = one.header(band.name)
            size, pixels = (_size_m(header), header.height * header.width) if header else (band.resolution_m, 0)
            votes[one.scene.collection, band.name][float(f"{size:.4g}")] += pixels
    sizes = {key: min(found, key=lambda size, of=found: (-of[size], size)) for key, found in votes.items()}  # type: ignore[misc]
    finest = min(sizes.values())
    finest_band = min(key for key, size in sizes.items() if size == finest)
    factors: dict[str, dict[str, int]] = defaultdict(dict)
    for (collection, name), size in sizes.items():
        factor = round(size / finest)
        if abs(size / finest - factor) > _SAME_SIZE * factor:
            raise _not_nested(
                f"{collection}: pixels of {name} are {size:g} m wide, which is {size / finest:.3g} times the "
                f"{finest:g} m of {finest_band[1]}",
                name,
            )
        factors[collection][name] = factor
    return NativeSizes(factors, finest)


def nest_target(
    target: TargetGrid, probed: Sequence[ProbedScene], sizes: NativeSizes, config: IngestConfig
) -> TargetGrid:
    """Move the edges of a grid outward, so that the pixels of all sizes begin and end on them.

    Raises:
        InvalidInput: Files of two sizes lie on lattices whose pixels do not nest.
    """
    grid = target.grid
    rx, ry = grid.resolution
    # (corner → pixels) of each size, for files in the CRS of the grid; the others are warped anyway
    corners: dict[int, dict[tuple[float, float], int]] = defaultdict(lambda: defaultdict(int))
    band_of: dict[int, str] = {}
    for one in probed:
        for band, factor in sizes.factors.get(one.scene.collection, {}).items():
            header = one.header(band)
            if header is None or header.crs != grid.crs or not _has_size(header, grid, factor):
                continue
            corners[factor][header.bounds[0], header.bounds[3]] += header.height * header.width
            band_of.setdefault(factor, band)
    anchor = (grid.bounds[0], grid.bounds[3])
    common = math.lcm(*sizes.all)
    if corners:
        coarsest = max(corners)
        anchor = _usual(corners[coarsest])
        for factor, found in corners.items():
            left, top = _usual(found)
            off = ((left - anchor[0]) / rx, (anchor[1] - top) / ry)
            # the anchor is a corner of the coarsest pixels; another size fits if its own pixels have an edge there
            if any(abs(value / factor - round(value / factor)) * factor > _ON_EDGE_PX for value in off):
                raise _not_nested(
                    f"pixels of {band_of[factor]} ({sizes.name(factor)}) begin {off[0] % factor:.3g} pixels right of "
                    f"and {off[1] % factor:.3g} below those of {band_of[coarsest]} ({sizes.name(coarsest)}), counted "
                    f"in pixels of {sizes.name(1)}",
                    band_of[factor],
                )
    outer = Grid.from_bounds(grid.crs, grid.bounds, resolution=(rx * common, ry * common), anchor=anchor)
    nested = Grid.from_bounds(grid.crs, outer.bounds, resolution=(rx, ry), anchor=anchor)
    names = ", ".join(sizes.name(factor) for factor in sizes.all)
    return TargetGrid(nested, (*target.reasons, f"native: bands keep their pixels of {names}, on edges that coincide"))


def groups_of(
    collection: str,
    choice: BandChoice,
    target: Grid,
    layout: Layout,
    sizes: NativeSizes | None,
    kept: Iterable[Recipe] = (),
) -> list[Group]:
    """List the groups that one collection of a catalogue becomes, the finest first.

    Args:
        collection: Id of the collection.
        choice: Its bands and class layers.
        target: The finest grid of the cube.
        layout: Chunks and shards for a cube of one grid.
        sizes: Native sizes; None puts all bands on `target`.
        kept: Recipes of a cube that is continued; its groups of this collection stay as they are.
    """
    there = [recipe for recipe in kept if recipe.catalogue == collection and recipe.native]
    if there:
        held = {band for recipe in there for band in recipe.spec.band_names}
        extra = tuple(band for band in choice.data if band.name not in held)  # refused when the plans are merged
        return [
            Group(
                recipe.spec.collection, collection,
                replace(choice, data=tuple(b for b in choice.data if b.name in recipe.spec.band_names) + extra),
                recipe.spec.grid, recipe.spec.layout,
            )
            for recipe in there
        ]  # fmt: skip
    if sizes is None:
        return [Group(collection, "", choice, target, layout)]
    factors = sizes.factors[collection]
    layouts = nested_layouts(layout, sizes.all)
    own = sorted({factors[band.name] for band in choice.data})
    return [
        Group(
            collection if len(own) == 1 else f"{collection}_{sizes.name(factor)}",
            collection,
            replace(choice, data=tuple(band for band in choice.data if factors[band.name] == factor)),
            target.coarsen(factor),
            layouts[factor],
        )
        for factor in own
    ]


def share_indices(groups: Sequence[Group], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Assign each spectral index to the group that holds its bands.

    Raises:
        InvalidInput: The bands of an index have different pixel sizes.
    """
    if len(groups) == 1:
        return [tuple(names)]
    shared: list[list[str]] = [[] for _ in groups]
    for name in names:
        needed = INDICES[name].bands if name in INDICES else ()
        homes = {band: n for n, group in enumerate(groups) for band in needed if band in _names(group)}
        if len(set(homes.values())) > 1:
            sizes = " and ".join(f"{band} in {groups[n].name}" for band, n in homes.items())
            raise InvalidInput(
                f"--index {name} is made of bands of different pixel sizes ({sizes}), which native grids keep apart; "
                "leave the index out, or leave --native out"
            )
        # an index that no group can make is refused by name where the group is specified
        shared[next(iter(homes.values()), 0)].append(name)
    return [tuple(one) for one in shared]


def _names(group: Group) -> list[str]:
    return [band.name for band in group.choice.data]


def _usual(corners: Mapping[tuple[float, float], int]) -> tuple[float, float]:
    """Return the corner of most pixels; the first in order where several have as many."""
    return min(corners, key=lambda corner: (-corners[corner], corner))


def _has_size(header: Grid, grid: Grid, factor: int) -> bool:
    pairs = zip(header.resolution, grid.resolution, strict=True)
    return all(abs(theirs / ours - factor) < 1e-6 * factor for theirs, ours in pairs)


def _size_m(grid: Grid) -> float:
    """Return the longer side of a pixel on the ground, metres."""
    (rx, ry), (mx, my) = grid.resolution, ground_scale(grid)
    return max(rx * mx, ry * my)


def _not_nested(what: str, band: str) -> InvalidInput:
    return InvalidInput(
        f"native grids must nest: {what}; leave {band} out of --bands, or leave --native out, which puts all bands on "
        "one grid"
    )
