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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.features import rasterize

from ingest.labels.alignment import compare_mirrored
from ingest.labels.features import Features, is_vector, read_features
from ingest.labels.rasters import Box, Draw, LabelResampling, RasterRules, numbered, place_raster
from ingest.labels.source_file import digest_of
from ingest.raster.drivers import limit_raster_drivers
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.grid import Grid
from zarr_store.labels import NOT_LABELLED, LabelKind, LabelLayer, LabelSpec, label_boxes, write_label
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region

__all__ = ["LabelReport", "LabelResampling", "import_labels", "place_classes"]

Progress = Callable[[int, int], None]


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
        warnings: Warnings for the user.
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
    origin: dict[str, Any] = {"file": source.name, "sha256": digest_of(source), "kind": kind}
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
        classes = numbered(known)
        draw = _burn(features, grid, {n: v for v, n in classes}, background, all_touched, kind)
        origin |= {"attribute": attribute, "layer": layer, "background": background, "all_touched": all_touched}
    else:
        if attribute or layer or background or all_touched:
            raise InvalidInput(
                f"--attribute, --layer, --background and --all-touched apply to polygons, but {source} is a raster; "
                "leave them out"
            )
        rules = RasterRules(kind, band, names, resampling, shifted)
        draw, classes, stated = place_raster(source, grid, rules, warnings)
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
    draw, _, _ = place_raster(source, grid, RasterRules("classes", 1, None, "auto", False, onto), warnings)
    return draw(Region(0, 1, 0, grid.height, 0, grid.width)).astype(np.uint8), warnings


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
