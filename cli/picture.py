"""Pictures of cubes and maps: choose pixels, stretch their values, and lay out the sheet.

Large rasters are read from the cube's overviews, so that a picture of a country costs a few megabytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cli.mapping import class_colours
from jaxtrain.inference.maps import CHUNK, Map, is_map, open_map
from zarr_store import Cube, open_cube
from zarr_store.decoding import decoding
from zarr_store.durable import write_file
from zarr_store.errors import InvalidInput, NotACube
from zarr_store.lookup import picture_bands
from zarr_store.spec import (
    OVERVIEW_FACTOR,
    STATUS_MASKED,
    STATUS_MISSING,
    STATUS_NODATA,
    STATUS_OBSERVED,
    CubeSpec,
    overview_positions,
)

if TYPE_CHECKING:
    from ingest.thumbnails import Thumbnail

__all__ = ["draw", "draw_preview", "refuse_other_than_png"]

RGB = npt.NDArray[np.uint8]
_NODATA_COLOUR = (32, 32, 36)
_MISSING_COLOUR = (150, 0, 120)
_PAPER = (250, 250, 248)
_INK = (30, 30, 34)
_GAP = 8
_CAPTION = 24
_MOST_PANELS = 24
_LEAST_PANEL = 48


def draw(
    store: str,
    out: str,
    *,
    collection: str | None = None,
    time: str | None = None,
    bands: str | None = None,
    width: int = 2000,
) -> dict[str, Any]:
    """Draw a cube or map into a PNG.

    Args:
        store: Cube or map.
        out: The picture; it appears complete or not at all.
        collection: Collection of a cube; None for its first.
        time: "2023-08-18", or a position; None for all dates.
        bands: "nir,red,green"; None for true colour where there is one.
        width: Largest width of the picture, pixels.

    Returns:
        path, width, height, and what it shows.
    """
    refuse_other_than_png(out)
    try:
        cube = open_cube(store)
    except NotACube:
        if not is_map(store):
            raise
        for name, given in (("--collection", collection), ("--time", time), ("--bands", bands)):
            if given is not None:
                raise InvalidInput(f"{store} is a map: {name} is for cubes") from None
        image, what = _draw_map(open_map(store), width)
    else:
        image, what = _draw_cube(cube, collection, time, bands, width)
    _save(image, Path(out))
    return {"path": out, "width": image.width, "height": image.height, "what": what}


def refuse_other_than_png(out: str | Path) -> None:
    """Refuse a name that would be written as something else, before anything is read."""
    if Path(out).suffix.lower() != ".png":
        raise InvalidInput(f"the picture must be a .png file, got {out}")


def draw_preview(thumbnails: Sequence[Thumbnail], out: Path, *, width: int) -> dict[str, Any]:
    """Draw thumbnails of time steps into a PNG, each under its date and share of clouds.

    Args:
        thumbnails: All of one size.
        out: The picture; it appears complete or not at all.
        width: Largest width of the picture, pixels.

    Returns:
        path, width and height.
    """
    height_px, width_px = thumbnails[0].seen.shape
    columns = max(1, min(len(thumbnails), (width - _GAP) // (width_px + _GAP)))
    columns = -(-len(thumbnails) // -(-len(thumbnails) // columns))
    panels: dict[int, RGB] = {}
    for kind in dict.fromkeys(one.kind for one in thumbnails):  # one stretch for all dates of a kind
        places = [at for at, one in enumerate(thumbnails) if one.kind == kind]
        values = np.stack([thumbnails[at].pixels for at in places]).astype(np.float32)
        seen = np.stack([thumbnails[at].seen for at in places])
        # clouds must not decide how dark the ground is, and no mask is read here: the clearest dates decide
        shares = [thumbnails[at].cloud or 0.0 for at in places]
        clear = np.array([share <= sorted(shares)[(len(shares) - 1) // 4] for share in shares])
        status = np.where(seen, np.where(clear, STATUS_OBSERVED, STATUS_MASKED)[:, None, None], STATUS_NODATA)
        colours = _stretch(values, status.astype(np.uint8), logarithmic=kind == "backscatter")
        colours[~seen] = _NODATA_COLOUR
        panels |= dict(zip(places, colours, strict=True))
    captions = [
        one.time[:10] + ("" if one.cloud is None else f"  cloud {one.cloud:.0%}") for one in thumbnails
    ]  # fmt: skip
    scale = max(1, ((width - _GAP) // columns - _GAP) // width_px) if height_px else 1
    image = _sheet([panels[at] for at in range(len(thumbnails))], captions, columns, scale)
    _save(image, out)
    return {"path": out, "width": image.width, "height": image.height}


def _save(image: Image.Image, path: Path) -> None:
    packed = io.BytesIO()
    image.save(packed, format="PNG")
    write_file(path, packed.getvalue())


# ---- cubes


def _draw_cube(
    cube: Cube, collection: str | None, time: str | None, bands: str | None, width: int
) -> tuple[Image.Image, str]:
    name = collection or cube.collections[0]
    spec = cube.spec(name)
    chosen = _pick_bands(spec, bands)
    steps = list(spec.find_times(time, option="--time") if time else range(len(spec.times)))[:_MOST_PANELS]
    columns = max(1, min(len(steps), math.ceil(math.sqrt(len(steps) * 1.6 * spec.grid.height / spec.grid.width))))
    columns = min(columns, max(1, (width - _GAP) // (_LEAST_PANEL + _GAP)))
    columns = -(-len(steps) // -(-len(steps) // columns))  # rows of equal length
    panel = max(_LEAST_PANEL, (width - _GAP * (columns + 1)) // columns)
    step = max(1, -(-spec.grid.width // panel))
    if step > OVERVIEW_FACTOR:  # the overview has no other steps, and a smaller one makes the picture too wide
        step = -(-step // OVERVIEW_FACTOR) * OVERVIEW_FACTOR
    with decoding(f"{cube.url} {name}"):  # no pixel is decoded before it is asked for
        dataset = _coarse(cube, name, step)
        values = dataset[spec.kind].isel(time=steps, band=list(chosen)).to_numpy()
        status = dataset["status"].isel(time=steps).to_numpy()
    pixels = _stretch(values.astype(np.float32), status, logarithmic=spec.kind == "backscatter")
    pixels[status == STATUS_NODATA] = _NODATA_COLOUR
    pixels[status == STATUS_MISSING] = _MISSING_COLOUR
    scale = max(1, panel // pixels.shape[2])
    captions = [
        f"{spec.times[t][:10]}  clear {np.mean(s == STATUS_OBSERVED):.0%}"
        + (f"  missing {np.mean(s == STATUS_MISSING):.0%}" if (s == STATUS_MISSING).any() else "")
        for t, s in zip(steps, status, strict=True)
    ]
    left_out = (
        f" (the first {_MOST_PANELS} of {len(spec.times)})" if time is None and len(spec.times) > _MOST_PANELS else ""
    )
    names = "/".join(spec.band_names[position] for position in chosen)
    what = f"{name} {names}, {len(steps)} date{'s' if len(steps) > 1 else ''}{left_out}"
    return _sheet(list(pixels), captions, columns, scale), what


def _pick_bands(spec: CubeSpec, asked: str | None) -> tuple[int, ...]:
    if not asked:
        return picture_bands(spec.band_names)
    chosen = spec.find_bands(asked, option="--bands")
    if len(chosen) not in (1, 3):
        raise InvalidInput(f"--bands needs one band or three for red, green and blue, got {asked!r}")
    return chosen * (3 // len(chosen))


def _coarse(cube: Cube, collection: str, step: int) -> Any:
    """Return every `step`-th pixel of the main array and the status; the main array from the overview if possible.

    An overview holds the main array alone. The status, which packs well, is read at the pixels that the overview kept.
    """
    if step >= OVERVIEW_FACTOR:
        every = slice(None, None, step // OVERVIEW_FACTOR)
        coarse = cube.overview(collection).isel(y=every, x=every)
        rows, columns = (overview_positions(size)[every] for size in cube.spec(collection).grid.shape)
        status = cube.dataset(collection)["status"].isel(y=rows, x=columns)
        return coarse.assign(status=(status.dims, status.to_numpy()))
    every = slice(None, None, step)
    return cube.dataset(collection).isel(y=every, x=every)


def _stretch(values: npt.NDArray[np.float32], status: npt.NDArray[np.uint8], *, logarithmic: bool) -> RGB:
    """Turn values (time, 3, y, x) into colours (time, y, x, 3), stretched alike on all dates to be comparable.

    The limits are the 2nd and 98th percentile of clear pixels: clouds must not decide how dark the ground is.
    """
    values = np.moveaxis(values, 1, -1)
    if logarithmic:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.float32(10.0) * np.log10(values)
    clear = values[status == STATUS_OBSERVED]
    if not clear.size:
        clear = values[status != STATUS_NODATA]
    clear = clear[np.isfinite(clear).all(axis=-1)] if clear.size else clear
    if not clear.size:
        return np.zeros(values.shape, np.uint8)
    if logarithmic:
        low, high = np.percentile(clear, (2, 98), axis=0)
    else:  # one stretch for the three bands keeps the colours true
        low, high = np.percentile(clear, (1, 98))
    with np.errstate(invalid="ignore"):
        share = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1)
    # a mild gamma lifts the dark ground, as viewers of Sentinel-2 do
    colours: RGB = (np.nan_to_num(share) ** (1 / 1.3) * 255).round().astype(np.uint8)
    return colours


# ---- maps


def _draw_map(made: Map, width: int) -> tuple[Image.Image, str]:
    height_px, width_px = made.grid.shape
    step = max(1, -(-width_px // max(64, width - 2 * _GAP)))
    # strip by strip: a map may be larger than memory, its picture is not
    strip = max(step, CHUNK // step * step)
    read = made.read_values if made.values else partial(made.read, "class")
    values = np.concatenate([read(slice(y, y + strip))[::step, ::step] for y in range(0, height_px, strip)])
    if made.values:
        return _draw_values(values, made, width)
    pixels = np.full((*values.shape, 3), _NODATA_COLOUR, np.uint8)
    colours = class_colours(made)
    for value, colour in colours.items():
        pixels[values == value] = colour
    scale = max(1, min(8, (width - 2 * _GAP) // pixels.shape[1]))
    counts = np.bincount(values.ravel(), minlength=256)[: len(colours)]
    shares = counts / max(int(counts.sum()), 1)
    entries = [(colours[v], f"{name}  {shares[v]:.1%}") for v, name in enumerate(made.classes.names)]
    what = f"{len(entries)} classes over {height_px}×{width_px} px"
    return _with_legend(_sheet([pixels], [""], 1, scale), entries), what


def _draw_values(values: np.ndarray, made: Map, width: int) -> tuple[Image.Image, str]:
    from matplotlib import colormaps

    known = np.isfinite(values)
    low, high = np.percentile(values[known], [2, 98]) if known.any() else (0.0, 1.0)
    palette = (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    share = np.clip((np.where(known, values, low) - low) / max(high - low, 1e-12), 0, 1)
    pixels = np.where(known[..., None], palette[(share * 255).astype(np.uint8)], np.array(_NODATA_COLOUR, np.uint8))
    scale = max(1, min(8, (width - 2 * _GAP) // pixels.shape[1]))
    marks = zip(palette[[0, 127, 255]].tolist(), (0.0, 0.5, 1.0), strict=True)
    entries = [((r, g, b), f"{low + part * (high - low):.4g}") for (r, g, b), part in marks]
    height_px, width_px = made.grid.shape
    what = f"{made.classes.names[0]} over {height_px}×{width_px} px"
    return _with_legend(_sheet([pixels], [""], 1, scale), entries), what


def _with_legend(image: Image.Image, entries: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    font = ImageFont.load_default(size=14)
    measure = ImageDraw.Draw(image)
    widths = [30 + int(measure.textlength(text, font=font)) + 16 for _, text in entries]
    room = max(image.width, max(widths, default=0) + 2 * _GAP)
    x, lines = _GAP, 1
    for wide in widths:
        if x > _GAP and x + wide > room:
            x, lines = _GAP, lines + 1
        x += wide
    sheet = Image.new("RGB", (room, image.height + lines * _CAPTION + _GAP), _PAPER)
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    x, y = _GAP, image.height
    for (colour, text), wide in zip(entries, widths, strict=True):
        if x > _GAP and x + wide > room:
            x, y = _GAP, y + _CAPTION
        pen.rectangle((x, y + 4, x + 22, y + 18), fill=colour, outline=_INK)
        pen.text((x + 30, y + 3), text, fill=_INK, font=font)
        x += wide
    return sheet


def _sheet(panels: Sequence[RGB], captions: Sequence[str], columns: int, scale: int) -> Image.Image:
    """Lay out panels in rows, each under its caption; enlarge small rasters by a whole factor to keep pixels square."""
    height, width = panels[0].shape[0] * scale, panels[0].shape[1] * scale
    caption = _CAPTION if any(captions) else 0
    rows = -(-len(panels) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + caption + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, (panel, text) in enumerate(zip(panels, captions, strict=True)):
        x = _GAP + index % columns * (width + _GAP)
        y = _GAP + index // columns * (height + caption + _GAP)
        pen.text((x, y + 3), text, fill=_INK, font=font)
        image = Image.fromarray(panel)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else image, (x, y + caption))
    return sheet
