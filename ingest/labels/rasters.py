"""`place_raster` puts one band of a GeoTIFF onto a grid, as classes or as values.

The nodata value, mask and alpha channel of a file are honoured, and so are scale and offset of values. Classes come
from the nearest pixel or, where the grid is coarser, are the most frequent one; values come from the nearest pixel, are
interpolated, or are a mean. A raster without a georeference, or whose transform turns or mirrors it, is refused, and so
is one whose pixels lie half a pixel off those of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.enums import MaskFlags
from rasterio.windows import Window

from ingest.raster.drivers import TIFF_MAGIC
from ingest.raster.faults import describe_fault, is_file_fault
from ingest.raster.gdal_read import read_window
from ingest.raster.header import grid_of
from ingest.raster.opening import open_geotiff
from ingest.raster.resample import axis_ratios, pick_resampling, place
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.labels import NOT_LABELLED, LabelKind
from zarr_store.regions import Region
from zarr_store.regular import open_regular

__all__ = ["Box", "Draw", "LabelResampling", "RasterRules", "numbered", "place_raster"]

Box = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Draw = Callable[[Region], Box]
LabelResampling = Literal["auto", "nearest", "mode", "average", "bilinear"]

_NONE = -(1 << 31)
"""Value of a pixel without a label while it is resampled."""
_HALF_PX = 0.1
"""Pixels by which a shift may differ from half a pixel to be taken for a confusion of pixel centres and corners."""


@dataclass(frozen=True)
class RasterRules:
    """The rules by which a raster becomes labels or a static layer.

    Attributes:
        kind: Classes, or values.
        band: Band of the raster, counted from 1.
        names: Names of the values of a class raster; None keeps all values up to 254.
        resampling: Resampling that was asked for.
        shifted: Accept pixels that lie half a pixel off those of the grid.
        onto: Name of what has the grid, for messages.
        nodata: Value of pixels without data, where the file states none or another; "none" if every pixel has data.
        scale: Scale of values in place of the file's own.
        offset: Offset of values in place of the file's own.
        unit: Unit of values in place of the file's own.
        static: Whether it becomes a static layer: its values are interpolated by default, and whole numbers need a
            stated value of pixels without data.
    """

    kind: LabelKind
    band: int
    names: Mapping[int, str] | None
    resampling: LabelResampling
    shifted: bool
    onto: str = "the cube"
    nodata: float | Literal["none"] | None = None
    scale: float | None = None
    offset: float | None = None
    unit: str | None = None
    static: bool = False


def place_raster(
    source: Path, grid: Grid, rules: RasterRules, warnings: list[str], *, name: str = ""
) -> tuple[Draw, tuple[tuple[int, str], ...], dict[str, Any]]:
    """Make the function that puts the raster's pixels onto a box of the cube's grid, and list the classes.

    The third value is what the file states of its numbers; it belongs to the origin of the layer.
    """
    kind, band, path = rules.kind, rules.band, source
    shown = name or str(source)
    with open_regular(path) as file:
        if file.read(4) not in TIFF_MAGIC:
            raise InvalidInput(
                f"{shown}: expected a GeoTIFF, or a file of polygons by its name; convert it with gdal_translate or "
                "ogr2ogr"
            )
    with open_geotiff(path) as dataset:
        try:
            theirs = grid_of(dataset)
        except InvalidInput as error:
            raise InvalidInput(f"{shown}: {error}") from error
        if dataset.transform.is_identity:
            raise InvalidInput(
                f"{shown} has no georeference, so it cannot be put onto the grid of {rules.onto}; add one, e.g. with "
                "gdal_edit"
            )
        if not 1 <= band <= dataset.count:
            raise InvalidInput(f"{shown} has {dataset.count} bands, so there is no band {band}; choose another --band")
        dtype = np.dtype(dataset.dtypes[band - 1])
        flags = dataset.mask_flag_enums[band - 1]
        masked = MaskFlags.all_valid not in flags and rules.nodata != "none"
        own = dataset.nodatavals[band - 1]
        unit = str(dataset.units[band - 1] or "") if rules.unit is None else rules.unit
        scale = float(dataset.scales[band - 1]) if rules.scale is None else rules.scale
        offset = float(dataset.offsets[band - 1]) if rules.offset is None else rules.offset
    if rules.static and kind == "values" and not masked and rules.nodata is None and dtype.kind in "iu":
        raise InvalidInput(
            f"{shown} holds {dtype} and states no value of pixels without data: give it with --nodata N, or say "
            "--nodata none where every pixel has data"
        )
    if kind == "classes" and not np.issubdtype(dtype, np.integer):
        raise InvalidInput(f"{shown}: expected whole numbers as classes, got {dtype}; for other numbers give --values")
    if not (np.isfinite(scale) and np.isfinite(offset)) or (kind == "classes" and (scale, offset) != (1.0, 0.0)):
        raise InvalidInput(
            f"{shown} states scale {scale:g} and offset {offset:g}, which classes cannot have; set them to 1 and 0, "
            "e.g. with gdal_edit -scale 1 -offset 0, or give --values"
        )
    _check_place(shown, theirs, grid, rules, warnings)
    values, classes = _mapping(rules.names)
    method = rules.resampling
    if method == "auto":
        method = pick_resampling(
            "class" if kind == "classes" else "data", theirs, grid, "bilinear" if rules.static else "nearest"
        )  # type: ignore[assignment]
        if kind == "values" and max(axis_ratios(theirs, grid)) >= 1.99:  # also where the units of the CRS differ
            method = "average"
    if kind == "classes" and method not in ("nearest", "mode"):
        raise InvalidInput(f"--resampling {method} mixes class values; choose nearest or mode")
    work: npt.DTypeLike = np.int32 if kind == "classes" else np.float32
    empty = _NONE if kind == "classes" else float("nan")

    def read(row: int, col: int, height: int, width: int, into: Any = None) -> Any:
        with open_geotiff(path) as dataset:
            try:
                window = Window(col, row, width, height)
                pixels = read_window(dataset, band, window=window)
                hidden = dataset.read_masks(band, window=window) == 0 if masked else None
            except Exception as error:
                if not is_file_fault(error):
                    raise
                cause = describe_fault(error)
                raise InvalidInput(f"{shown} cannot be read at row {row}, column {col}: {cause}") from error
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and has no value
            converted = pixels.astype(work)
        if kind == "values":
            if (scale, offset) != (1.0, 0.0):
                converted = (pixels.astype(np.float64) * scale + offset).astype(work)
            converted[~np.isfinite(converted)] = empty
        if hidden is not None:
            converted[hidden] = empty
        if masked and own is not None and MaskFlags.nodata not in flags:  # beside a mask, GDAL leaves it to the reader
            converted[pixels == own] = empty
        if isinstance(rules.nodata, float):
            converted[pixels == rules.nodata] = empty
        if kind == "classes" and pixels.size and int(pixels.max()) > np.iinfo(np.int32).max:
            raise InvalidInput(f"{shown} has class values above {np.iinfo(np.int32).max}, the largest that can be read")
        return converted

    def draw(box: Region) -> Box:
        window = grid.window(box.y0, box.x0, box.y1 - box.y0, box.x1 - box.x0)
        placed = place(read, theirs, window, method, dtype=work, nodata=empty)
        return _encoded(placed, values, shown, rules.static) if kind == "classes" else placed.astype(np.float32)

    stated: dict[str, Any] = {"scale": scale, "offset": offset} if (scale, offset) != (1.0, 0.0) else {}
    stated |= {"unit": unit} if unit and kind == "values" else {}
    stated |= {"resampling": method} if rules.static else {}
    if rules.nodata is not None:
        stated["nodata"] = rules.nodata
    elif rules.static and own is not None:
        stated["nodata"] = float(own) if np.isfinite(own) else str(own)
    return draw, classes, stated | ({"masked": True} if masked and MaskFlags.nodata not in flags else {})


def _mapping(names: Mapping[int, str] | None) -> tuple[dict[int, int] | None, tuple[tuple[int, str], ...]]:
    """Map values of the raster to stored values, and list the classes; values that do not fit a byte are renumbered."""
    if not names:
        return None, ()
    if len(set(names.values())) != len(names):
        merged = sorted(set(names.values()))
        return {value: merged.index(name) for value, name in names.items()}, numbered(merged)
    if all(0 <= value < NOT_LABELLED for value in names):
        return {value: value for value in names}, tuple(sorted(names.items()))
    ordered = sorted(names)
    return {value: i for i, value in enumerate(ordered)}, numbered([names[value] for value in ordered])


def _encoded(
    placed: npt.NDArray[Any], values: Mapping[int, int] | None, source: str, static: bool
) -> npt.NDArray[np.uint8]:
    if values is None:
        there = placed != _NONE
        found = placed[there]
        if found.size and (int(found.min()) < 0 or int(found.max()) >= NOT_LABELLED):
            least, most = int(found.min()), int(found.max())
            came = f"{source} has class {f'value {least}' if least == most else f'values {least} … {most}'}"
            if static:
                raise InvalidInput(
                    f"{came}, but a layer holds 0 … 254, as {NOT_LABELLED} stands for no data; give --nodata "
                    f"{NOT_LABELLED} if it is none of the classes, or renumber the values of the file"
                )
            raise InvalidInput(
                f"{came}, but 0 … 254 can be stored, as {NOT_LABELLED} stands for 'no label'; name the values that you "
                f"need with --names, and they are renumbered; or state {NOT_LABELLED} as the nodata value of the file, "
                "if it is none of the classes"
            )
        return np.where(there, placed, NOT_LABELLED).astype(np.uint8)
    encoded = np.full(placed.shape, NOT_LABELLED, np.uint8)
    for value, stored in values.items():
        encoded[placed == value] = stored
    return encoded


def _check_place(source: str, theirs: Grid, grid: Grid, rules: RasterRules, warnings: list[str]) -> None:
    """Refuse a raster that lies elsewhere or half a pixel off the cube's pixels; warn of other shifts below a pixel."""
    onto = rules.onto
    ours, other = grid.lonlat_bounds(), theirs.lonlat_bounds()
    if not (ours[0] < other[2] and other[0] < ours[2] and ours[1] < other[3] and other[1] < ours[3]):
        raise InvalidInput(
            f"{source} lies at {tuple(round(v, 4) for v in other)} (west, south, east, north), outside {onto} at "
            f"{tuple(round(v, 4) for v in ours)}; choose a raster of the same area"
        )
    if theirs.crs != grid.crs or theirs.resolution != grid.resolution:
        return
    rx, ry = grid.resolution
    col = (theirs.transform[2] - grid.transform[2]) / rx
    row = (grid.transform[5] - theirs.transform[5]) / ry
    off = tuple(value - np.floor(value + 1e-6) for value in (row, col))
    if max(off) < 1e-3:
        return
    shift = f"{off[0]:.2f} pixels down and {off[1]:.2f} right of those of {onto}"
    if any(abs(value - 0.5) < _HALF_PX for value in off) and not rules.shifted:
        anyway = ", or give --shifted to take the nearest pixels anyway" if onto == "the cube" else ""
        raise InvalidInput(
            f"{source} has the CRS and pixel size of {onto}, but its pixels lie {shift}: usually pixel centres were "
            f"taken for corners. Correct its transform{anyway}"
        )
    warnings.append(f"pixels of {Path(source).name} lie {shift}, so the labels move by as much")


def numbered(names: list[str]) -> tuple[tuple[int, str], ...]:
    if len(names) > NOT_LABELLED:
        raise InvalidInput(
            f"{len(names)} classes, but a layer holds at most {NOT_LABELLED}; name an --attribute with fewer values"
        )
    return tuple(enumerate(names))
