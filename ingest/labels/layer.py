"""`import_labels` puts a class raster, a value raster or polygons onto the grid of a cube, as one of its label layers.

A raster may have any CRS and resolution. Its nodata value, mask and alpha channel are honoured, and so are scale and
offset of values. Classes come from the nearest pixel or, where the cube is coarser, are the most frequent one; values
come from the nearest pixel, or are a mean. A polygon gets the pixels whose centre it holds; with `all_touched`, all
pixels that it touches. Where polygons overlap, the smaller one counts.

Shifted or mirrored labels teach a network nonsense that no loss shows, so the signs of it are checked here. A raster
without a georeference, or whose transform turns or mirrors it, is refused, and so is one whose pixels lie half a pixel
off the cube's. Labels that would fit the image better mirrored give a warning (`alignment.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.enums import MaskFlags
from rasterio.features import rasterize
from rasterio.windows import Window

from ingest.labels.alignment import compare_mirrored
from ingest.labels.features import Features, is_vector, read_features
from ingest.raster.drivers import TIFF_MAGIC, limit_raster_drivers
from ingest.raster.faults import describe_fault, is_file_fault
from ingest.raster.gdal_read import read_window
from ingest.raster.header import grid_of
from ingest.raster.opening import open_geotiff
from ingest.raster.resample import pick_resampling, place
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.grid import Grid
from zarr_store.labels import NOT_LABELLED, LabelKind, LabelLayer, LabelSpec, label_boxes, write_label
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.regular import open_regular

__all__ = ["LabelReport", "LabelResampling", "import_labels", "place_classes"]

Box = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Draw = Callable[[Region], Box]
Progress = Callable[[int, int], None]
LabelResampling = Literal["auto", "nearest", "mode", "average", "bilinear"]

_NONE = -(1 << 31)
"""Value of a pixel without a label while it is resampled."""
_HALF_PX = 0.1
"""Pixels by which a shift may differ from half a pixel to be taken for a confusion of pixel centres and corners."""


@dataclass(frozen=True)
class LabelReport:
    """The result of an import.

    Attributes:
        cube: The cube.
        name: Name of the label layer.
        kind: "classes" or "values".
        written: False where the same layer was there already.
        labelled: Number of pixels with a label.
        pixels: Number of pixels of the grid.
        classes: Value and number of pixels of each class, by name.
        digest: Digest of the layer.
        warnings: What a person should look at.
    """

    cube: str
    name: str
    kind: LabelKind
    written: bool
    labelled: int
    pixels: int
    classes: Mapping[str, Mapping[str, int]]
    digest: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        return asdict(self)


def import_labels(
    cube: str | Path,
    source: Path,
    *,
    name: str,
    kind: LabelKind = "classes",
    attribute: str | None = None,
    layer: str | None = None,
    band: int = 1,
    names: Mapping[int, str] | None = None,
    background: str | None = None,
    all_touched: bool = False,
    resampling: LabelResampling = "auto",
    shifted: bool = False,
    replace: bool = False,
    on_box: Progress | None = None,
) -> LabelReport:
    """Write labels on the grid of a cube, as one of its label layers.

    Args:
        cube: The cube.
        source: A GeoTIFF; or polygons as GeoJSON, GeoPackage, FlatGeobuf, shapefile or GeoParquet.
        name: Name of the layer, which `data.label` of a training configuration refers to.
        kind: "classes", or "values" for numbers that are learned as they are.
        attribute: Attribute of polygons that has the class or value; None where all polygons are one class.
        layer: Layer of a vector file that has several.
        band: Band of a raster, counted from 1.
        names: Names of the values of a class raster; other values get no label. None keeps all values up to 254.
        background: Class of the pixels outside all polygons; None leaves them without a label.
        all_touched: Give a polygon all pixels that it touches, not only those whose centre it holds.
        resampling: Resampling of a raster.
        shifted: Accept a raster whose pixels lie half a pixel off those of the cube.
        replace: Replace a layer of this name that comes from another source.
        on_box: Called with (boxes done, all boxes).

    Raises:
        InvalidInput: The source cannot be read or does not fit; nothing was changed.
        NothingFound: No pixel of the cube gets a label.
        CubeMismatch: A layer of this name comes from another source.
    """
    opened = open_cube(cube)
    grid = opened.spec(opened.collections[0]).grid
    origin: dict[str, Any] = {"file": source.name, "sha256": _digest(source), "kind": kind}
    warnings: list[str] = []
    vector = is_vector(source)
    if vector:
        if names or band != 1 or resampling != "auto" or shifted:
            raise InvalidInput(
                f"--names, --band, --resampling and --shifted apply to rasters, but {source} has polygons; leave "
                "them out"
            )
        if background is not None and kind == "values":
            raise InvalidInput("--background names a class, so it cannot be used with --values; leave one of them out")
        features = read_features(source, grid, attribute=attribute, layer=layer, numbers=kind == "values")
        warnings += [f"left out: {line}" for line in features.left_out]
        known = sorted(set(features.values)) if kind == "classes" else []
        if background is not None:
            known = [background, *(n for n in known if n != background)]
        classes = _numbered(known)
        draw = _burn(features, grid, {n: v for v, n in classes}, background, all_touched, kind)
        origin |= {"attribute": attribute, "layer": layer, "background": background, "all_touched": all_touched}
    else:
        if attribute or layer or background or all_touched:
            raise InvalidInput(
                f"--attribute, --layer, --background and --all-touched apply to polygons, but {source} is a raster; "
                "leave them out"
            )
        rules = _RasterRules(kind, band, names, resampling, shifted)
        draw, classes, stated = _warp(source, grid, rules, warnings)
        origin |= {"band": band, "names": [list(c) for c in (names or {}).items()], "resampling": resampling, **stated}
    spec = LabelSpec(name, kind, classes, origin)
    boxes = label_boxes(opened)

    def drawn() -> Iterator[tuple[Region, Box]]:
        labelled = False
        for number, box in enumerate(boxes, 1):
            pixels = draw(box)
            labelled = labelled or bool(
                (pixels != NOT_LABELLED).any() if kind == "classes" else np.isfinite(pixels).any()
            )
            if number == len(boxes) and not labelled:
                raise NothingFound(
                    f"{source} gives no label to any pixel of {opened.url}; check whether they cover the same area"
                )
            yield box, pixels
            if on_box:
                on_box(number, len(boxes))

    def describe(counts: Mapping[int, int]) -> LabelSpec:
        """Describe the layer; a class raster without names has the values that occur as its classes."""
        occurring = classes or tuple((value, f"class {value}") for value in sorted(counts))
        return LabelSpec(name, kind, occurring, origin)

    made, written = write_label(opened.url, spec, drawn, describe=describe, replace=replace)
    warnings += _check_fit(opened, made)
    return LabelReport(
        opened.url, name, kind, written, made.labelled, grid.height * grid.width,
        {label: {"value": value, "pixels": made.counts[label]} for value, label in made.spec.classes},
        made.digest, tuple(warnings),
    )  # fmt: skip


def _digest(source: Path) -> str:
    try:
        with open_regular(source) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidInput(f"cannot read {source}: {error.strerror or error}") from error


def _numbered(names: list[str]) -> tuple[tuple[int, str], ...]:
    if len(names) > NOT_LABELLED:
        raise InvalidInput(
            f"{len(names)} classes, but a layer holds at most {NOT_LABELLED}; name an --attribute with fewer values"
        )
    return tuple(enumerate(names))


def _burn(
    features: Features,
    grid: Grid,
    value_of: Mapping[str, int],
    background: str | None,
    all_touched: bool,
    kind: LabelKind,
) -> Draw:
    """Make the function that draws polygons in a box, the largest first, so that the smaller of two is on top."""
    order = np.argsort(-shapely.area(features.geometries), kind="stable")
    shapes, values = features.geometries[order], features.values[order]
    tree = shapely.STRtree(shapes)

    def draw(box: Region) -> Box:
        window = grid.window(box.y0, box.x0, box.y1 - box.y0, box.x1 - box.x0)
        # one pixel more on each side, as a polygon may touch only the edge of a pixel
        rx, ry = window.resolution
        left, bottom, right, top = window.bounds
        near = np.sort(tree.query(shapely.box(left - rx, bottom - ry, right + rx, top + ry)))
        if kind == "values":
            pairs = [(shapes[i], float(values[i])) for i in near]
            fill, dtype = float("nan"), "float32"
        else:
            pairs = [(shapes[i], value_of[values[i]]) for i in near]
            fill, dtype = NOT_LABELLED if background is None else value_of[background], "uint8"
        if not pairs:
            return np.full(window.shape, fill, dtype)
        limit_raster_drivers()
        burnt: Box = rasterize(
            pairs, out_shape=window.shape, transform=window.affine, fill=fill, all_touched=all_touched, dtype=dtype
        )
        return burnt

    return draw


@dataclass(frozen=True)
class _RasterRules:
    """How a raster becomes labels: arguments of `import_labels`, and the name of what has the grid."""

    kind: LabelKind
    band: int
    names: Mapping[int, str] | None
    resampling: LabelResampling
    shifted: bool
    onto: str = "the cube"


def _warp(
    source: Path, grid: Grid, rules: _RasterRules, warnings: list[str]
) -> tuple[Draw, tuple[tuple[int, str], ...], dict[str, Any]]:
    """Make the function that puts the raster's pixels onto a box of the cube's grid, and list the classes.

    The third value is what the file states of its numbers; it belongs to the origin of the layer.
    """
    kind, band = rules.kind, rules.band
    with open_regular(source) as file:
        if file.read(4) not in TIFF_MAGIC:
            raise InvalidInput(
                f"{source}: expected a GeoTIFF, or a file of polygons by its name; convert it with gdal_translate or "
                "ogr2ogr"
            )
    with open_geotiff(source) as dataset:
        try:
            theirs = grid_of(dataset)
        except InvalidInput as error:
            raise InvalidInput(f"{source}: {error}") from error
        if dataset.transform.is_identity:
            raise InvalidInput(
                f"{source} has no georeference, so it cannot be put onto the grid of {rules.onto}; add one, e.g. with "
                "gdal_edit"
            )
        if not 1 <= band <= dataset.count:
            raise InvalidInput(f"{source} has {dataset.count} bands, so there is no band {band}; choose another --band")
        dtype = np.dtype(dataset.dtypes[band - 1])
        flags = dataset.mask_flag_enums[band - 1]
        masked = MaskFlags.all_valid not in flags
        unit = str(dataset.units[band - 1] or "")
        scale, offset = float(dataset.scales[band - 1]), float(dataset.offsets[band - 1])
    if kind == "classes" and not np.issubdtype(dtype, np.integer):
        raise InvalidInput(f"{source}: expected whole numbers as classes, got {dtype}; for other numbers give --values")
    if not (np.isfinite(scale) and np.isfinite(offset)) or (kind == "classes" and (scale, offset) != (1.0, 0.0)):
        raise InvalidInput(
            f"{source} states scale {scale:g} and offset {offset:g}, which classes cannot have; set them to 1 and 0, "
            "e.g. with gdal_edit -scale 1 -offset 0, or give --values"
        )
    _check_place(source, theirs, grid, rules, warnings)
    values, classes = _mapping(rules.names)
    method = rules.resampling
    if method == "auto":
        method = pick_resampling("class" if kind == "classes" else "data", theirs, grid, "nearest")  # type: ignore[assignment]
        if kind == "values" and theirs.resolution[0] < grid.resolution[0] / 1.99:
            method = "average"
    if kind == "classes" and method not in ("nearest", "mode"):
        raise InvalidInput(f"--resampling {method} mixes class values; choose nearest or mode")
    work: npt.DTypeLike = np.int32 if kind == "classes" else np.float32
    empty = _NONE if kind == "classes" else float("nan")

    def read(row: int, col: int, height: int, width: int, into: Any = None) -> Any:
        with open_geotiff(source) as dataset:
            try:
                window = Window(col, row, width, height)
                pixels = read_window(dataset, band, window=window)
                hidden = dataset.read_masks(band, window=window) == 0 if masked else None
            except Exception as error:
                if not is_file_fault(error):
                    raise
                cause = describe_fault(error)
                raise InvalidInput(f"{source} cannot be read at row {row}, column {col}: {cause}") from error
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and has no value
            converted = pixels.astype(work)
        if kind == "values":
            if (scale, offset) != (1.0, 0.0):
                converted = (pixels.astype(np.float64) * scale + offset).astype(work)
            converted[~np.isfinite(converted)] = empty
        if hidden is not None:
            converted[hidden] = empty
        if kind == "classes" and pixels.size and int(pixels.max()) > np.iinfo(np.int32).max:
            raise InvalidInput(
                f"{source} has class values above {np.iinfo(np.int32).max}, the largest that can be read"
            )
        return converted

    def draw(box: Region) -> Box:
        window = grid.window(box.y0, box.x0, box.y1 - box.y0, box.x1 - box.x0)
        placed = place(read, theirs, window, method, dtype=work, nodata=empty)
        return _encoded(placed, values, source) if kind == "classes" else placed.astype(np.float32)

    stated: dict[str, Any] = {"scale": scale, "offset": offset} if (scale, offset) != (1.0, 0.0) else {}
    stated |= {"unit": unit} if unit and kind == "values" else {}
    return draw, classes, stated | ({"masked": True} if masked and MaskFlags.nodata not in flags else {})


def place_classes(source: Path, grid: Grid, *, onto: str) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Put a class raster onto a grid by its transform, as `import_labels` does.

    Args:
        source: A GeoTIFF of whole numbers.
        grid: The grid.
        onto: Name of what has the grid, for messages.

    Returns:
        (y, x) of class values, 255 where there is no label; and what a person should look at.

    Raises:
        InvalidInput: The raster cannot be read, or does not lie as labels would.
    """
    warnings: list[str] = []
    draw, _, _ = _warp(source, grid, _RasterRules("classes", 1, None, "auto", False, onto), warnings)
    return draw(Region(0, 1, 0, grid.height, 0, grid.width)).astype(np.uint8), warnings


def _mapping(names: Mapping[int, str] | None) -> tuple[dict[int, int] | None, tuple[tuple[int, str], ...]]:
    """Map values of the raster to stored values, and list the classes; values that do not fit a byte are renumbered."""
    if not names:
        return None, ()
    if len(set(names.values())) != len(names):
        merged = sorted(set(names.values()))
        return {value: merged.index(name) for value, name in names.items()}, _numbered(merged)
    if all(0 <= value < NOT_LABELLED for value in names):
        return {value: value for value in names}, tuple(sorted(names.items()))
    ordered = sorted(names)
    return {value: i for i, value in enumerate(ordered)}, _numbered([names[value] for value in ordered])


def _encoded(placed: npt.NDArray[Any], values: Mapping[int, int] | None, source: Path) -> npt.NDArray[np.uint8]:
    if values is None:
        there = placed != _NONE
        found = placed[there]
        if found.size and (int(found.min()) < 0 or int(found.max()) >= NOT_LABELLED):
            raise InvalidInput(
                f"{source} has class values {int(found.min())} … {int(found.max())}, but 0 … 254 can be stored, as "
                f"{NOT_LABELLED} stands for 'no label'; name the values that you need with --names, and they are "
                f"renumbered; or state {NOT_LABELLED} as the nodata value of the file, if it is none of the classes"
            )
        return np.where(there, placed, NOT_LABELLED).astype(np.uint8)
    encoded = np.full(placed.shape, NOT_LABELLED, np.uint8)
    for value, stored in values.items():
        encoded[placed == value] = stored
    return encoded


def _check_place(source: Path, theirs: Grid, grid: Grid, rules: _RasterRules, warnings: list[str]) -> None:
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
    warnings.append(f"pixels of {source.name} lie {shift}, so the labels move by as much")


def _check_fit(cube: Cube, layer: LabelLayer) -> list[str]:
    """Warn where the labels would explain the image better if they were mirrored."""
    if layer.spec.kind != "classes":
        return []
    fit = compare_mirrored(cube, layer)
    if fit is None or fit.best == "as it is":
        return []
    return [
        f"labels of {layer.spec.name} fit the image better {fit.best}: they then explain "
        f"{fit.shares[fit.best]:.1%} of its variance, but only {fit.shares['as it is']:.1%} as they are; compare "
        "them with the image before you train"
    ]
