"""`write_gallery` shows ranked places as pictures: OUT/thumbnails/NNN.png, and OUT/gallery.html, one file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.cube_reader import Box
from jaxtrain.tasks.places import Place
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, SampleTable
from zarr_store.lookup import picture_bands

__all__ = ["write_gallery"]

_SHOWN = 50
_SIDE = 48
"""Side of a thumbnail in pixels of the cube; a larger place is shown whole."""
_MOST_SIDE = 512
_STYLE = (
    "body{font:14px sans-serif;margin:2em;background:#fafaf8;color:#1e1e22}main{display:flex;flex-wrap:wrap;gap:16px}"
    "figure{margin:0;width:200px}img{width:200px;image-rendering:pixelated}figcaption{font-size:12px}"
)


def write_gallery(folder: Path, table: Table, places: Sequence[Place], title: str) -> None:
    """Write thumbnails of the first places, and the page that shows them.

    Args:
        folder: Folder of the results.
        table: The data that were scored.
        places: The ranked places.
        title: Title of the page.
    """
    (folder / "thumbnails").mkdir(exist_ok=True)
    figures = []
    for place in places[:_SHOWN]:
        picture = _picture(table, place)
        image = ""
        if picture is not None:
            png = _png(picture)
            (folder / "thumbnails" / f"{place.rank:03}.png").write_bytes(png)
            image = f'<img alt="place {place.rank}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        where = "" if math.isnan(place.lon) else f"{place.lat:.5f}, {place.lon:.5f}<br>"
        area = "" if math.isnan(place.area_m2) else f", {place.area_m2 / 1e4:.2f} ha"
        words = f"{escape(place.name)}<br>" if place.name else ""
        figures.append(
            f"<figure>{image}<figcaption><b>#{place.rank}</b> score {place.score:.4g}<br>{words}{where}"
            f"{place.pixels} px{area}<br>{escape(place.date)}</figcaption></figure>"
        )
    shown = "".join(figures) or "<p>No place exceeds the threshold.</p>"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><main>{shown}</main></html>\n"
    )
    (folder / "gallery.html").write_text(page, encoding="utf-8")


def _picture(table: Table, place: Place) -> npt.NDArray[np.uint8] | None:
    if isinstance(table, CubeTable):
        reader, (left, bottom, right, top) = table.reader, place.box
        grid = reader.spec.grid
        rows, columns = (top - bottom) / grid.resolution[1], (right - left) / grid.resolution[0]
        half = min(_MOST_SIDE, max(_SIDE, int(1.5 * max(rows, columns)))) // 2
        box = Box(max(0, place.row - half), min(grid.height, place.row + half),
                  max(0, place.column - half), min(grid.width, place.column + half))  # fmt: skip
        values, _ = reader.read(box)
        # the last date on which the place was clear: that is where a change shows
        seen = [at for at in range(len(values)) if np.isfinite(values[at]).any()]
        return _colours(values[seen[-1] if seen else -1], reader.names, place.row - box.y0, place.column - box.x0)
    if isinstance(table, SampleTable):
        values = table.store.images(np.array([place.row]), table.bands).astype(np.float32)[0]
        return _colours(values, [one.name for one in table.features], None, None)
    return None


def _colours(
    values: npt.NDArray[np.float32], names: Sequence[str], row: int | None, column: int | None
) -> npt.NDArray[np.uint8]:
    chosen = values[list(picture_bands(tuple(names)))]
    seen = np.isfinite(chosen).all(axis=0)
    colours = np.full((*chosen.shape[1:], 3), 32, np.uint8)
    if seen.any():
        low, high = np.percentile(chosen[:, seen], [1, 99])
        share = np.clip((chosen - low) / max(float(high - low), 1e-12), 0, 1)
        colours[seen] = (255 * np.nan_to_num(share) ** (1 / 1.3)).astype(np.uint8).transpose(1, 2, 0)[seen]
    if row is not None and column is not None:  # four marks around the pixel of the largest score
        for dy, dx in ((-4, 0), (4, 0), (0, -4), (0, 4)):
            y, x = row + dy, column + dx
            if 0 <= y < colours.shape[0] and 0 <= x < colours.shape[1]:
                colours[y, x] = (255, 40, 40)
    return colours


def _png(colours: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    Image.fromarray(colours).save(made, "PNG")
    return made.getvalue()
