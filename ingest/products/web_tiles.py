"""`write_pmtiles` writes a map as tiles of a web map: one PMTiles file of PNGs with the colours of the classes.

The map is brought to Web Mercator at its largest zoom, by nearest neighbour, into a file on disk; each smaller zoom
takes every second pixel. So memory holds a row of tiles, whatever the size of the map.

Spec: PMTiles version 3 (github.com/protomaps/PMTiles).
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ingest.products.layer import ClassLayer
from ingest.products.vector_file import beside
from zarr_store.crs import transformer_between
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.store import translate_os_errors

__all__ = ["check_pmtiles", "write_pmtiles"]

_SIDE = 256
_HALF = math.pi * 6_378_137.0
"""Half the side of the world in Web Mercator, metres."""
_MOST_ZOOM = 20
_MOST_LATITUDE = 85.0511
_NODES = 9
"""Places along a tile at which coordinates are exact; between them they are interpolated, within 0.01 pixel."""


def check_pmtiles() -> None:
    """Refuse to write tiles where the library is not installed.

    Raises:
        InvalidInput: It is not.
    """
    if importlib.util.find_spec("pmtiles") is None:
        raise InvalidInput("--pmtiles needs the extra pmtiles: pip install 'terrashard[pmtiles]'")


def write_pmtiles(layer: ClassLayer, path: Path) -> dict[str, Any]:
    """Write the tiles of a map; tiles without a class are left out.

    Args:
        layer: The classes.
        path: The file; replaced if it exists.

    Returns:
        path, tiles, zooms (smallest, largest).

    Raises:
        NothingFound: The map holds no class anywhere.
    """
    check_pmtiles()
    from pmtiles.tile import Compression, TileType, zxy_to_tileid
    from pmtiles.writer import Writer

    west, south, east, north = layer.grid.lonlat_bounds()
    if west > east:
        raise InvalidInput("the map crosses the antimeridian, which a file of web tiles cannot; map both sides apart")
    north, south = min(north, _MOST_LATITUDE), max(south, -_MOST_LATITUDE)
    zoom = _largest_zoom(layer)
    first, last = _tile_at(west, north, zoom), _tile_at(east, south, zoom)
    with translate_os_errors(str(path)), beside(path) as part:
        levels = _levels(layer, part.parent, zoom, first, last)
        found = sorted(
            (zxy_to_tileid(z, x, y), z, x, y)
            for z, (_, (x0, y0), (columns, rows)) in levels.items()
            for x in range(x0, x0 + columns)
            for y in range(y0, y0 + rows)
        )
        written, zooms = 0, set()
        with part.open("wb") as file:
            writer: Any = Writer(file)  # type: ignore[no-untyped-call]
            with closing(writer.tile_f):  # its tiles, until they are put in order
                for number, z, x, y in found:
                    array, (x0, y0), _ = levels[z]
                    at = np.s_[(y - y0) * _SIDE : (y - y0 + 1) * _SIDE, (x - x0) * _SIDE : (x - x0 + 1) * _SIDE]
                    classes = np.asarray(array[at])
                    if (classes < len(layer.names)).any():
                        writer.write_tile(number, _png(layer, classes))
                        written += 1
                        zooms.add(z)
                if not written:
                    raise NothingFound(f"no pixel of the map has a class, so {path.name} would hold no tile")
                corners = {"min_lon_e7": west, "min_lat_e7": south, "max_lon_e7": east, "max_lat_e7": north,
                           "center_lon_e7": (west + east) / 2, "center_lat_e7": (south + north) / 2}  # fmt: skip
                writer.finalize(
                    {"tile_type": TileType.PNG, "tile_compression": Compression.NONE, "center_zoom": max(zoom - 2, 0),
                     **{name: round(value * 1e7) for name, value in corners.items()}},
                    {"name": path.stem, "type": "overlay", "legend": dict(zip(layer.names, map(_hex, layer.colours),
                                                                              strict=True))},
                )  # fmt: skip
    return {"path": str(path), "tiles": written, "zooms": [min(zooms), max(zooms)]}


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _largest_zoom(layer: ClassLayer) -> int:
    """Return the zoom at which a pixel of a tile is not larger than one of the map."""
    height, width = layer.grid.shape
    west, south, east, north = layer.grid.lonlat_bounds()
    pixel = min((east - west) / width, (north - south) / height) / 180 * _HALF
    return min(max(math.ceil(math.log2(2 * _HALF / _SIDE / pixel)), 0), _MOST_ZOOM)


def _tile_at(lon: float, lat: float, zoom: int) -> tuple[int, int]:
    x = (lon + 180) / 360 * 2**zoom
    y = (1 - math.asinh(math.tan(math.radians(lat))) / math.pi) / 2 * 2**zoom
    return min(max(int(x), 0), 2**zoom - 1), min(max(int(y), 0), 2**zoom - 1)


Level = tuple[npt.NDArray[Any], tuple[int, int], tuple[int, int]]
"""Pixels, the first tile (x, y), and the numbers of tiles (columns, rows)."""


def _levels(
    layer: ClassLayer, folder: Path, zoom: int, first: tuple[int, int], last: tuple[int, int]
) -> dict[int, Level]:
    """Return the pixels of each zoom, as arrays in files."""
    columns, rows = last[0] - first[0] + 1, last[1] - first[1] + 1
    kind = np.uint8 if len(layer.names) <= 255 else np.uint16
    array = _array_on_disk(folder / f"{zoom}.raw", kind, (rows * _SIDE, columns * _SIDE))
    for row in range(rows):
        array[row * _SIDE : (row + 1) * _SIDE] = _tile_row(layer, zoom, first[0], first[1] + row, columns, kind)
    levels: dict[int, Level] = {zoom: (array, first, (columns, rows))}
    for z in range(zoom - 1, -1, -1):
        below, (x0, y0), (wide, high) = levels[z + 1]
        corner, end = (x0 // 2, y0 // 2), ((x0 + wide - 1) // 2, (y0 + high - 1) // 2)
        columns, rows = end[0] - corner[0] + 1, end[1] - corner[1] + 1
        array = _array_on_disk(folder / f"{z}.raw", kind, (rows * _SIDE, columns * _SIDE))
        array[:] = np.iinfo(kind).max
        y, x = (y0 - 2 * corner[1]) * _SIDE // 2, (x0 - 2 * corner[0]) * _SIDE // 2
        for row in range(0, below.shape[0], _SIDE):
            some = below[row : row + _SIDE : 2, ::2]
            array[y + row // 2 : y + row // 2 + some.shape[0], x : x + some.shape[1]] = some
        levels[z] = (array, corner, (columns, rows))
    return levels


def _array_on_disk(path: Path, kind: type, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """Return an array in a new file whose room is taken at once: a write to a map of a full disk ends the process."""
    with path.open("wb") as file:
        size = math.prod(shape) * np.dtype(kind).itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, kind, "r+", shape=shape)


def _tile_row(layer: ClassLayer, zoom: int, x0: int, y: int, columns: int, kind: type) -> npt.NDArray[Any]:
    """Return the nearest pixels of the map in a row of tiles; no data is the largest number."""
    made: npt.NDArray[Any] = np.full((_SIDE, columns * _SIDE), np.iinfo(kind).max, kind)
    places = [_pixels_of_tile(layer, zoom, x0 + column, y) for column in range(columns)]
    height, width = layer.grid.shape
    top = min(int(np.floor(row.min())) for row, _ in places)
    bottom = max(int(np.floor(row.max())) for row, _ in places) + 1
    top, bottom = max(top, 0), min(bottom, height)
    if top >= bottom:
        return made
    classes = layer.read(slice(top, bottom))
    for column, (row, across) in enumerate(places):
        i, j = np.floor(row).astype(np.int64), np.floor(across).astype(np.int64)
        inside = (i >= top) & (i < bottom) & (j >= 0) & (j < width)
        tile = made[:, column * _SIDE : (column + 1) * _SIDE]
        found = classes[i[inside] - top, j[inside]]
        tile[inside] = np.where(found < len(layer.names), found, np.iinfo(kind).max).astype(kind)
    return made


def _pixels_of_tile(layer: ClassLayer, zoom: int, x: int, y: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return row and column of the map, as fractions, at the centres of the pixels of a tile."""
    size = 2 * _HALF / 2**zoom
    at = np.linspace(0, 1, _NODES)
    move = transformer_between("EPSG:3857", layer.grid.crs).transform
    eastings, northings = np.meshgrid(-_HALF + (x + at) * size, _HALF - (y + at) * size)
    there_x, there_y = (np.asarray(values) for values in move(eastings, northings))
    a, _, c, _, e, f = layer.grid.transform
    centres = (np.arange(_SIDE) + 0.5) / _SIDE
    weights = np.stack([np.interp(centres, at, row) for row in np.eye(_NODES)], axis=1)
    return weights @ ((there_y - f) / e) @ weights.T, weights @ ((there_x - c) / a) @ weights.T


def _png(layer: ClassLayer, classes: npt.NDArray[Any]) -> bytes:
    colours = np.array(layer.colours, np.uint8).reshape(-1, 3)
    if classes.dtype == np.uint8:
        image = Image.frombytes("P", classes.shape[::-1], classes.tobytes())
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(colours)] = colours
        image.putpalette(palette.tobytes())
        transparency: Any = bytes([255] * 255 + [0])
    else:
        rgba = np.zeros((*classes.shape, 4), np.uint8)
        has = classes < len(colours)
        rgba[has] = np.concatenate([colours[classes[has]], np.full((int(has.sum()), 1), 255, np.uint8)], axis=1)
        image, transparency = Image.fromarray(rgba), None
    made = io.BytesIO()
    image.save(made, "PNG", optimize=True, **({} if transparency is None else {"transparency": transparency}))
    return made.getvalue()
