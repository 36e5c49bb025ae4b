"""`stack_layer` puts any raster onto the grid of a cube as a static layer: elevation, weather, soil.

The raster is read, checked and put onto the grid as labels are (`ingest.labels.rasters`). Values are interpolated
(bilinear) where the cube is finer, and averaged where it is coarser; classes come from the nearest pixel, or are the
most frequent one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ingest.labels.rasters import Box, LabelResampling, RasterRules, place_raster
from ingest.labels.source_file import open_source_file
from ingest.request.config import IngestConfig
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.labels import NOT_LABELLED, LabelKind, label_boxes
from zarr_store.layers import write_layer
from zarr_store.read import open_cube
from zarr_store.regions import Region

__all__ = ["StackReport", "stack_layer"]


@dataclass(frozen=True)
class StackReport:
    """The result of `stack_layer`.

    Attributes:
        cube: The cube.
        name: Name of the layer.
        kind: "values" or "classes".
        written: False where the same layer was there already.
        with_data: Number of pixels that have a value or class.
        pixels: Number of pixels of the grid.
        unit: Unit of the values.
        resampling: Method by which the raster was put onto the grid.
        statistics: For values: count, mean, std, least and most; None for classes.
        digest: Digest of the layer.
        origin: Where the layer comes from.
        warnings: Warnings about the raster, for the user.
    """

    cube: str
    name: str
    kind: LabelKind
    written: bool
    with_data: int
    pixels: int
    unit: str
    resampling: str
    statistics: dict[str, float] | None
    digest: str
    origin: dict[str, Any]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        return asdict(self)


def stack_layer(
    cube: str | Path,
    source: str | Path,
    *,
    name: str,
    kind: LabelKind = "values",
    asset: str | None = None,
    band: int = 1,
    resampling: LabelResampling = "auto",
    nodata: float | Literal["none"] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    unit: str | None = None,
    shifted: bool = False,
    replace: bool = False,
    config: IngestConfig | None = None,
    on_box: Callable[[int, int], None] | None = None,
) -> StackReport:
    """Put a raster onto the grid of a cube, as one of its static layers.

    Args:
        cube: The cube.
        source: Path or URL of a GeoTIFF, or of a STAC item.
        name: Name of the layer.
        kind: "values" for numbers, "classes" for codes such as soil types.
        asset: Asset of a STAC item; None for its only raster.
        band: Band of the raster, counted from 1.
        resampling: "auto" is bilinear for values, average where the cube is at least twice as coarse; for classes
            nearest, mode where it is coarser.
        nodata: Value of pixels without data in place of what the file or item states; "none" if every pixel has data.
        scale: Scale in place of what the file or item states: value = number · scale + offset.
        offset: Offset in place of what the file or item states.
        unit: Unit in place of what the file or item states.
        shifted: Accept a raster whose pixels lie half a pixel off those of the cube.
        replace: Replace a layer of this name that comes from another source.
        config: Trust, timeouts and retries; None for the defaults.
        on_box: Called with (boxes done, all boxes).

    Raises:
        InvalidInput: The source cannot be read or does not fit; nothing was changed.
        NothingFound: No pixel of the cube gets a value.
        CubeMismatch: A layer of this name comes from another source.
        AccessError: The source cannot be reached.
    """
    opened = open_cube(cube)
    grid = opened.grid
    for option, number in (("--scale", scale), ("--offset", offset)):
        if number is not None and not math.isfinite(number):
            raise InvalidInput(f"{option} must be a finite number, got {number}")
    if kind == "classes" and (scale, offset, unit) != (None, None, None):
        raise InvalidInput("--scale, --offset and --unit apply to values, not to classes; leave them out")
    warnings: list[str] = []
    with open_source_file(str(source), config or IngestConfig(), asset=asset) as file:
        stated = _stated_by_item_alone(file.path, band, file.stated) if kind == "values" else {}
        rules = RasterRules(
            kind,
            band,
            None,
            resampling,
            shifted,
            nodata=stated.get("nodata") if nodata is None else nodata,
            scale=stated.get("scale") if scale is None else scale,
            offset=stated.get("offset") if offset is None else offset,
            unit=stated.get("unit") if unit is None else unit,
            static=True,
        )
        draw, classes, facts = place_raster(file.path, grid, rules, warnings, name=file.name)
        origin = {**file.where, "sha256": file.sha256, "kind": kind, "band": band, **facts}
        boxes = label_boxes(opened)

        def drawn() -> Iterator[tuple[Region, Box]]:
            filled = False
            for number, box in enumerate(boxes, 1):
                pixels = draw(box)
                filled = filled or bool(
                    (pixels != NOT_LABELLED).any() if kind == "classes" else np.isfinite(pixels).any()
                )
                if number == len(boxes) and not filled:
                    raise NothingFound(
                        f"{file.name} has no data for any pixel of {opened.url}; check whether they cover the same area"
                    )
                yield box, pixels
                if on_box:
                    on_box(number, len(boxes))

        layer, written = write_layer(opened.url, name, kind, drawn, origin=origin, classes=classes, replace=replace)
    statistics = layer.statistics
    return StackReport(
        opened.url, name, kind, written, layer.stored.labelled, grid.height * grid.width, layer.unit,
        str(facts["resampling"]), None if statistics is None else asdict(statistics), layer.digest,
        dict(layer.origin), tuple(warnings),
    )  # fmt: skip


def _stated_by_item_alone(path: Path, band: int, stated: Any) -> dict[str, Any]:
    """Return what only the item states: where the file states something itself, the file counts."""
    from ingest.raster.opening import open_geotiff

    if not stated:
        return {}
    with open_geotiff(path) as dataset:
        if not 1 <= band <= dataset.count:
            return {}
        own = {
            "nodata": dataset.nodatavals[band - 1],
            "scale": dataset.scales[band - 1]
            if (dataset.scales[band - 1], dataset.offsets[band - 1]) != (1, 0)
            else None,
            "unit": dataset.units[band - 1] or None,
        }
        own["offset"] = dataset.offsets[band - 1] if own["scale"] is not None else None
    return {key: value for key, value in stated.items() if own.get(key) is None}
