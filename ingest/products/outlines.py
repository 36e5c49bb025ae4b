"""`draw_patches` turns the patches of a map into polygons, strip by strip; one that spans strips is joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import shapes

from ingest.products.layer import ClassLayer
from ingest.products.patches import Patches, label_strip

__all__ = ["Drawn", "draw_patches", "simplify"]


@dataclass(frozen=True)
class Drawn:
    """Some patches with their outlines.

    Attributes:
        patch: Numbers of the patches.
        shape: Their polygons, in the CRS of the map; exterior rings run counterclockwise.
    """

    patch: npt.NDArray[np.int64]
    shape: npt.NDArray[Any]


def draw_patches(layer: ClassLayer, patches: Patches) -> Iterator[Drawn]:
    """Yield the polygons of all patches, those that end in a strip together; each patch is one polygon.

    Edges are those of the pixels. They are joined in pixel coordinates, which are whole numbers, so nothing is rounded.
    """
    open_pieces: dict[int, list[Any]] = {}
    for number, rows in enumerate(layer.strips()):
        labels, count = label_strip(layer.read(rows), len(layer.names))
        start = int(patches.starts[number])
        if start + count != int(patches.starts[number + 1]):
            raise RuntimeError("the map has changed while its polygons were drawn")
        # patches of this strip, numbered from 1 on, as GDAL draws areas of 32-bit numbers
        here, found = np.unique(patches.patch[start : start + count], return_inverse=True)
        table = np.concatenate([[0], found + 1]).astype(np.int32)
        strip = table[labels]
        moved = Affine.translation(0, rows.start)
        for shape, value in shapes(strip, mask=strip > 0, connectivity=4, transform=moved):
            rings = shape["coordinates"]
            open_pieces.setdefault(int(here[int(value) - 1]), []).append(shapely.Polygon(rings[0], rings[1:]))
        done = [patch for patch in open_pieces if patches.last_strip[patch] <= number]
        done.sort()
        if done:
            joined = [_join(open_pieces.pop(patch)) for patch in done]
            yield Drawn(np.array(done, np.int64), _placed(np.array(joined, object), layer.grid.affine))


def simplify(drawn: list[Drawn], tolerance: float, pixel: float) -> list[Drawn]:
    """Simplify the polygons of a whole map together, so that neighbours keep a common border.

    Args:
        drawn: All patches: this step needs all polygons in memory.
        tolerance: Triangles of a border below tolerance² disappear (Visvalingam-Whyatt), in units of the CRS.
        pixel: Shorter side of a pixel.
    """
    if not drawn:
        return drawn
    # neighbours must have the same vertices along a common border, also where three of them meet
    whole = shapely.segmentize(np.concatenate([part.shape for part in drawn]), pixel)
    made = shapely.orient_polygons(shapely.coverage_simplify(whole, tolerance))
    ends = np.cumsum([len(part.shape) for part in drawn])[:-1]
    return [Drawn(part.patch, shape) for part, shape in zip(drawn, np.split(made, ends), strict=True)]


def _join(pieces: list[Any]) -> Any:
    """Join the pieces of one patch."""
    if len(pieces) == 1:
        whole = pieces[0]
    else:  # a normal ring begins at a corner; so simplifying by nothing takes all vertices of the seam away
        whole = shapely.simplify(shapely.normalize(shapely.union_all(pieces)), 0)
    return whole if shapely.is_valid(whole) else shapely.make_valid(whole, method="structure", keep_collapsed=False)


def _placed(polygons: npt.NDArray[Any], transform: Affine) -> npt.NDArray[Any]:
    """Move polygons from pixels to the CRS."""

    def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        a, _, c, _, e, f = tuple(transform)[:6]
        return np.column_stack([c + a * xy[:, 0], f + e * xy[:, 1]])

    oriented: npt.NDArray[Any] = shapely.orient_polygons(shapely.transform(polygons, place))
    return oriented
