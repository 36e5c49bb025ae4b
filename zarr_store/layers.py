"""Static layers: rasters without a time axis on the grid of a cube, as inputs: elevation, weather, soil.

A static layer is kept as a label layer is, under CUBE/labels/NAME, with the role "layer" in its origin: written whole
or not at all, verified, listed and opened by xarray in the same way. A layer is one band.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from zarr_store.errors import UnknownName
from zarr_store.labels import LabelKind, LabelLayer, LabelSpec, find_labels, open_label, write_label
from zarr_store.read import Cube
from zarr_store.regions import Region

__all__ = ["LayerStatistics", "StaticLayer", "find_layers", "is_static", "open_layer", "write_layer"]

Box = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_ROLE = "layer"


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer of values, over the pixels that have one.

    Attributes:
        count: Number of these pixels.
        mean: Mean, in the unit of the layer.
        std: Standard deviation.
        least: Smallest value.
        most: Largest value.
    """

    count: int
    mean: float
    std: float
    least: float
    most: float


@dataclass(frozen=True)
class StaticLayer:
    """A static layer that is open for reading.

    Attributes:
        stored: The layer as it is kept.

    Example:
        After `terrashard stack cube.zarr dem.tif --name dem --unit m`::

            layer = open_layer(open_cube("cube.zarr"), "dem")
            layer.unit, layer.shape, layer.statistics.mean
            heights = layer.read(slice(0, 256), slice(0, 256))    # float32, NaN without data
    """

    stored: LabelLayer

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.stored.spec.name

    @property
    def kind(self) -> LabelKind:
        """Whether pixels are values (physical numbers, NaN without data) or classes (255 without data)."""
        return self.stored.spec.kind

    @property
    def dtype(self) -> str:
        """Type of the pixels: "float32" or "uint8"."""
        return "float32" if self.kind == "values" else "uint8"

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the cube's finest grid."""
        return self.stored.shape

    @property
    def unit(self) -> str:
        """Unit of the values; empty where the source states none."""
        return str(self.stored.spec.origin.get("unit", ""))

    @property
    def classes(self) -> tuple[tuple[int, str], ...]:
        """Value and name of each class; none for values."""
        return self.stored.spec.classes

    @property
    def origin(self) -> Mapping[str, Any]:
        """Source, its SHA-256, and how it was put onto the grid."""
        return self.stored.spec.origin

    @property
    def digest(self) -> str:
        """SHA-256 of description and pixels."""
        return self.stored.digest

    @property
    def statistics(self) -> LayerStatistics | None:
        """Statistics that were counted when the layer was written; None for classes."""
        known = self.stored.moments
        if known is None:
            return None
        return LayerStatistics(int(known["count"]), known["mean"], known["std"], known["least"], known["most"])

    def array(self) -> ts.TensorStore:
        """Return the pixels (y, x), read-only."""
        return self.stored.array()

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> Box:
        """Read the pixels of a box, (y, x).

        Raises:
            CorruptShard: A chunk does not match its checksum.
        """
        return self.stored.read(rows, columns)


def find_layers(cube: Cube) -> tuple[str, ...]:
    """Return the names of the static layers of a cube, sorted.

    Example:
        >>> from zarr_store import open_cube
        >>> find_layers(open_cube("cube.zarr"))
        ()
    """
    return tuple(name for name in find_labels(cube) if is_static(open_label(cube, name)))


def is_static(layer: LabelLayer) -> bool:
    """Return whether a kept layer is a static layer, and not labels."""
    return layer.spec.origin.get("role") == _ROLE


def open_layer(cube: Cube, name: str) -> StaticLayer:
    """Open a static layer.

    Raises:
        UnknownName: The cube has no such layer.
        IntegrityError: It is listed, and is absent, damaged or of another grid.

    Example:
        A picture of the elevations of a cube::

            matplotlib.pyplot.imshow(open_layer(open_cube("cube.zarr"), "dem").read())
    """
    if name in find_labels(cube):
        layer = open_label(cube, name)
        if is_static(layer):
            return StaticLayer(layer)
    raise UnknownName.of("static layer", name, find_layers(cube), f"cube {cube.url}")


def write_layer(
    url: str | os.PathLike[str],
    name: str,
    kind: LabelKind,
    boxes: Callable[[], Iterable[tuple[Region, Box]]],
    *,
    origin: Mapping[str, Any],
    classes: tuple[tuple[int, str], ...] = (),
    replace: bool = False,
) -> tuple[StaticLayer, bool]:
    """Write a static layer, or check that the existing one is the same.

    Args:
        url: The cube.
        name: Name of the layer.
        kind: "values", or "classes".
        boxes: Gives the pixels of each of `zarr_store.labels.label_boxes(cube)`, in that order.
        origin: JSON: where the pixels come from; the same origin gives the same layer.
        classes: Value and name of each class; none names them by their values.
        replace: Whether a layer of this name and another origin is replaced.

    Returns:
        The layer, and whether it was written now.

    Raises:
        CubeMismatch: A layer of this name and another origin is there.
        InvalidInput: An array of the cube has the name.
        Locked: Another run writes to the cube.
    """
    spec = LabelSpec(name, kind, classes, {"role": _ROLE, **origin})

    def describe(counts: Mapping[int, int]) -> LabelSpec:
        occurring = classes or tuple((value, f"class {value}") for value in sorted(counts))
        return LabelSpec(name, kind, occurring, spec.origin)

    layer, written = write_label(url, spec, boxes, describe=describe, replace=replace)
    return StaticLayer(layer), written
