"""`draw_patches` turns the patches of a map into polygons, strip by strip; one that spans strips is joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine

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
        # patches of this strip, numbered from 1 on
        here, found = np.unique(patches.patch[start : start + count], return_inverse=True)
        table = np.concatenate([[0], found + 1]).astype(np.int32)
        strip = table[labels]
        for shape, value in zip(*_faces(strip, rows.start), strict=True):
            open_pieces.setdefault(int(here[value - 1]), []).append(shape)
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


def _faces(strip: npt.NDArray[np.int32], top: int) -> tuple[npt.NDArray[Any], list[int]]:
    """Return the outlines of the areas of equal numbers above 0, in pixels of the map, and the number of each.

    GDAL could draw them too, but only with its driver Memory, which is switched off in this process.
    """
    height, width = strip.shape
    framed = np.zeros((height + 2, width + 2), np.int32)
    framed[1:-1, 1:-1] = strip
    across = framed[:-1, 1:-1] != framed[1:, 1:-1]  # an edge runs along the top of each pixel, (height + 1, width)
    down = framed[1:-1, :-1] != framed[1:-1, 1:]  # along its left side, (height, width + 1)
    open_x, open_y = np.pad(across, ((0, 0), (1, 1))), np.pad(down, ((1, 1), (0, 0)))
    west, east, north, south = open_x[:, :-1], open_x[:, 1:], open_y[:-1], open_y[1:]
    node_x, node_y = north | south, west | east  # where an edge along a row, or along a column, is cut
    lines = [_segments(east & (~west | node_x), west & (~east | node_x)),
             _segments((south & (~north | node_y)).T, (north & (~south | node_y)).T)[..., ::-1]]  # fmt: skip
    ends = np.concatenate(lines).astype(np.float64)
    if not len(ends):
        return np.zeros(0, object), []
    ends[..., 1] += top
    made = shapely.get_parts(shapely.polygonize(np.asarray(shapely.linestrings(ends))))
    inside = shapely.get_coordinates(shapely.point_on_surface(made))
    value = strip[np.floor(inside[:, 1]).astype(int) - top, np.floor(inside[:, 0]).astype(int)]
    return made[value > 0], value[value > 0].tolist()


def _segments(begins: npt.NDArray[np.bool_], stops: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the straight edges along rows as (segments, 2, (x, y)), each from where it begins to where it stops."""
    (y0, x0), (y1, x1) = np.nonzero(begins), np.nonzero(stops)
    return np.stack([np.stack([x0, y0], axis=-1), np.stack([x1, y1], axis=-1)], axis=1)


def _join(pieces: list[Any]) -> Any:
    """Join the pieces of one patch."""
    whole = pieces[0] if len(pieces) == 1 else shapely.union_all(pieces)
    # a normal ring begins at a corner; so simplifying by nothing takes all vertices of straight edges away
    whole = shapely.simplify(shapely.normalize(whole), 0)
    return whole if shapely.is_valid(whole) else shapely.make_valid(whole, method="structure", keep_collapsed=False)


def _placed(polygons: npt.NDArray[Any], transform: Affine) -> npt.NDArray[Any]:
    """Move polygons from pixels to the CRS."""

    def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        a, _, c, _, e, f = tuple(transform)[:6]
        return np.column_stack([c + a * xy[:, 0], f + e * xy[:, 1]])

    oriented: npt.NDArray[Any] = shapely.orient_polygons(shapely.transform(polygons, place))
    return oriented
