"""`GridArea`: an area with very many vertices, as the pixels of one grid see it: exact for each pixel, and short.

A border of 200,000 vertices has 8 MB as text, and would travel in each plan, in the cube's metadata and to each worker.
Only one question is asked of it: which pixel centres of the cube's grid lie inside. So the border is simplified to a
part of a pixel, and the few pixels for which that changes the answer are listed beside it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["MANY_VERTICES", "GridArea", "is_grid_area", "sha_of"]

MANY_VERTICES = 5_000
"""Number of vertices above which an area is kept as a `GridArea`."""

_TOLERANCE_PX = 0.25
"""Largest distance by which the border is simplified, in pixels."""
_LATTICE_PX = 0.125
"""Distance of the lattice that vertices are moved to, in pixels; short numbers pack well."""
_SAMPLE_PX = 0.5
"""Distance of the points along a border beside which pixels are compared."""
_MOST_BYTES = 256 << 20
"""Largest unpacked border or list of pixels, bytes."""
_HEAD = '{"area":'


def is_grid_area(clip: str | None) -> bool:
    """Return whether the text of a clip is that of a `GridArea`."""
    return clip is not None and clip.startswith(_HEAD)


def sha_of(clip: str) -> str:
    """Return the digest of the whole area that a text stands for, also where it is that of a `GridArea`."""
    if is_grid_area(clip):
        return str(json.loads(clip)["sha256"])
    return hashlib.sha256(clip.encode()).hexdigest()


@dataclass(frozen=True)
class GridArea:
    """An area on the pixels of a grid.

    Attributes:
        grid: The grid.
        border: The simplified area, in pixels from the grid's upper left corner.
        exceptions: (row, column) of the pixels for which `border` gives the wrong answer, sorted; int32 (n, 2).
        sha256: Digest of the text of the whole area.
    """

    grid: Grid
    border: BaseGeometry
    exceptions: npt.NDArray[np.int32]
    sha256: str

    @classmethod
    def of(cls, clip: str, area: BaseGeometry, grid: Grid) -> GridArea:
        """Reduce an area.

        Args:
            clip: Text of the area in lon/lat.
            area: The same area, in the CRS of the grid.
            grid: Grid of the cube.
        """
        a, _, c, _, e, f = grid.transform
        near = shapely.intersection(area, box(*_grown(grid)))
        whole = shapely.transform(near, lambda xy: (xy - (c, f)) / (a, e))
        border = shapely.set_precision(shapely.simplify(whole, _TOLERANCE_PX), _LATTICE_PX)
        shapely.prepare(area)
        shapely.prepare(border)
        rows, cols = _beside(border, whole, grid.shape)
        truth = shapely.contains_xy(area, grid.x()[cols], grid.y()[rows])
        wrong = truth != shapely.contains_xy(border, cols + 0.5, rows + 0.5)
        exceptions = np.stack([rows[wrong], cols[wrong]], axis=1).astype(np.int32)
        return cls(grid, border, exceptions, sha_of(clip))

    def to_text(self) -> str:
        """Return the text that recipes keep."""
        document = {
            "area": _packed(shapely.to_wkb(self.border)),
            "exceptions": _packed(self.exceptions.astype("<i4").T.tobytes()),
            "grid": self.grid.to_dict(),
            "sha256": self.sha256,
        }
        return json.dumps(document, separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def from_text(text: str) -> GridArea:
        """Read the text that `to_text` returns.

        Raises:
            InvalidInput: The text was changed.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            border = shapely.from_wkb(_unpacked(data["area"]))
            pairs = np.frombuffer(_unpacked(data["exceptions"]), "<i4").reshape(2, -1).T.astype(np.int32)
            shapely.prepare(border)
            return GridArea(Grid.from_dict(data["grid"]), border, pairs, str(data["sha256"]))
        except (ValueError, KeyError, TypeError, zlib.error, shapely.errors.ShapelyError) as error:
            raise InvalidInput(f"the area of the plan cannot be read ({error}); plan again") from error

    def inside(self, window: Grid) -> npt.NDArray[np.bool_] | None:
        """Return the pixels of a window of the grid whose centre lies in the area; None where all of them do."""
        row, col = self._place(window)
        height, width = window.shape
        odd = self._odd(row, col, height, width)
        frame = box(col, row, col + width, row + height)
        if not len(odd) and self.border.contains(frame):
            return None
        inside = np.zeros(window.shape, bool)
        if self.border.intersects(frame):
            x = np.arange(col, col + width) + 0.5
            for first in range(0, height, 256):  # coordinates of a whole shard would take more memory than its pixels
                y = np.arange(row + first, row + min(height, first + 256)) + 0.5
                inside[first : first + 256] = shapely.contains_xy(self.border, x[None, :], y[:, None])
        inside[odd[:, 0] - row, odd[:, 1] - col] ^= True
        return inside

    def is_outside(self, window: Grid) -> bool:
        """Return whether a window of the grid and the area have nothing in common."""
        row, col = self._place(window)
        height, width = window.shape
        frame = box(col, row, col + width, row + height)
        return not len(self._odd(row, col, height, width)) and not self.border.intersects(frame)

    def _place(self, window: Grid) -> tuple[int, int]:
        place = self.grid.offset_of(window)
        if place is None:
            raise InvalidInput(f"the area was planned for {self.grid}, not for {window}; give --geometry FILE again")
        return place

    def _odd(self, row: int, col: int, height: int, width: int) -> npt.NDArray[np.int32]:
        rows, cols = self.exceptions[:, 0], self.exceptions[:, 1]
        return self.exceptions[(rows >= row) & (rows < row + height) & (cols >= col) & (cols < col + width)]


def _grown(grid: Grid) -> tuple[float, float, float, float]:
    left, bottom, right, top = grid.bounds
    rx, ry = grid.resolution
    return (left - 2 * rx, bottom - 2 * ry, right + 2 * rx, top + 2 * ry)


def _beside(*areas: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return rows and columns of the pixels of a grid of shape `areas[-1]` that lie beside the border of an area."""
    *parts, (height, width) = areas
    lines = [shapely.segmentize(part.boundary, _SAMPLE_PX) for part in parts if not part.is_empty]
    if not lines:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    cells = np.unique(
        np.floor(np.concatenate([shapely.get_coordinates(line) for line in lines])).astype(np.int64), axis=0
    )
    steps = np.array([(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
    cells = np.unique((cells[:, None] + steps).reshape(-1, 2)[:, ::-1], axis=0)  # (row, column), in order
    kept = (cells >= 0).all(axis=1) & (cells < (height, width)).all(axis=1)
    return cells[kept, 0], cells[kept, 1]


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    unpacking = zlib.decompressobj()
    data = unpacking.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
    if not unpacking.eof:
        raise ValueError("it is cut off, or too large")
    return data
