"""Maps are classes or values on the cube's grid, as Zarr v3 that xarray, rioxarray and GDAL read.

    MAP.zarr/class         (y, x) uint8         class index, 255 = no data
    MAP.zarr/confidence    (y, x) uint8         probability of that class in per cent, 255 = no data
    MAP.zarr/probability   (class, y, x) uint8  per cent, 255 = no data; only where asked for
    MAP.zarr/value         (y, x) float32       in place of these: the predicted value, nan = no data
    MAP.zarr/{y,x,spatial_ref}                  pixel centres and CRS

Class names, colours and the model's run are attributes. Chunks are not sharded and carry zstd's own checksum, because
GDAL reads neither shards nor crc32c. A map appears when it is complete, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from jaxtrain.data.classes import Classes
from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.georeference import georeference, write_axes
from zarr_store.grid import Grid
from zarr_store.group import ArrayCheck, axis_checks, open_group, read_array
from zarr_store.promises import check_array
from zarr_store.store import translate_os_errors
from zarr_store.temporary import remove_folder

__all__ = ["NODATA", "Map", "MapWriter", "create_map", "is_map", "open_map"]

NODATA = 255
"""Value of every layer where the cube has no data."""
CHUNK = 512
_FORMAT = 1

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Map:
    """A finished map.

    Attributes:
        url: URL of the map.
        grid: Grid of the map, which is that of the cube.
        classes: Names and colours by value of `class`.
        attributes: Origin of the map: run, step, cube, dates.
        layers: Names of its arrays: class, confidence and perhaps probability; or value.
    """

    url: str
    grid: Grid
    classes: Classes
    attributes: Mapping[str, Any]
    layers: tuple[str, ...]

    def dataset(self) -> xr.Dataset:
        """Open the map as a lazy xarray dataset of integers; `class` and `confidence` are data variables."""
        # a variable with the name of a dimension is taken for a coordinate; here it is the map itself
        checks = axis_checks(self.grid.height, self.grid.width)
        opened = open_group(
            FolderStore.at(self.url), "", checks | {name: self._layer_check(name) for name in self.layers}
        )
        return opened.reset_coords("class") if "probability" in self.layers else opened

    @property
    def values(self) -> bool:
        """Whether the map holds values, not classes."""
        return "value" in self.layers

    def read(self, layer: str = "class", rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Read rows of one layer: uint8 (rows, x), or (class, rows, x) for probability; float32 (rows, x) for value."""
        return read_array(FolderStore.at(self.url), layer, self._layer_check(layer), (..., rows, slice(None)))

    def _layer_check(self, layer: str) -> ArrayCheck:
        shape = (len(self.classes.names), *self.grid.shape) if layer == "probability" else self.grid.shape
        return partial(check_array, shape=shape, dtype="float32" if layer == "value" else "uint8")


@dataclass(frozen=True)
class MapWriter:
    """Writes the pixels of a new map; rows may come in any order, best in whole chunks."""

    group: zarr.Group
    probabilities: bool

    def write(self, y: int, x: int, chosen: Bytes, confidence: Bytes, probability: Bytes | None = None) -> None:
        """Write one box whose first pixel is (y, x).

        Args:
            y: First row.
            x: First column.
            chosen: Class index (rows, columns).
            confidence: Per cent (rows, columns).
            probability: Per cent (class, rows, columns), where the map keeps it.
        """
        box = (slice(y, y + chosen.shape[0]), slice(x, x + chosen.shape[1]))
        self._array("class")[box] = chosen
        self._array("confidence")[box] = confidence
        if self.probabilities and probability is not None:
            self._array("probability")[(slice(None), *box)] = probability

    def write_values(self, y: int, x: int, value: npt.NDArray[np.float32]) -> None:
        """Write one box of values whose first pixel is (y, x)."""
        self._array("value")[y : y + value.shape[0], x : x + value.shape[1]] = value

    def _array(self, name: str) -> Any:
        return self.group[name]


@contextlib.contextmanager
def create_map(
    url: str | Path,
    grid: Grid,
    classes: Classes,
    *,
    attributes: Mapping[str, Any],
    probabilities: bool = False,
    values: bool = False,
) -> Iterator[MapWriter]:
    """Make a map beside `url` and move it there when the block succeeds; an earlier map is replaced.

    Args:
        url: URL of the new map.
        grid: Grid of the cube.
        classes: Names and colours.
        attributes: JSON: what made it.
        probabilities: Keep the probability of every class.
        values: Whether the map holds values; the one name of `classes` is their name.

    Raises:
        InvalidInput: Something that is no map is at `url`.
    """
    store = FolderStore.at(url)
    if store.exists() and not is_map(url):
        raise InvalidInput(
            f"{store.url} exists and is not a terrashard map; nothing was changed: choose another path or remove it"
        )
    with store.beside() as fresh, translate_os_errors(store.url):
        about = {"format": _FORMAT, "grid": grid.to_dict(), "classes": classes.to_list(), **attributes}
        group = zarr.create_group(str(fresh.root), attributes={
            "Conventions": "CF-1.11",
            **georeference(grid.to_dict(), grid.bounds, grid.wkt),
            "terrashard_map": json.loads(json.dumps(about)),
        })  # fmt: skip
        if values:
            _create_value(group, grid, classes.names[0])
        else:
            _create_layers(group, grid, classes, probabilities)
        write_axes(group, grid)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            zarr.consolidate_metadata(str(fresh.root))
        yield MapWriter(zarr.open_group(str(fresh.root), mode="r+", use_consolidated=False), probabilities)
        if store.exists():
            remove_folder(store.root)


def _create_layers(group: zarr.Group, grid: Grid, classes: Classes, probabilities: bool) -> None:
    flags = {
        "long_name": "class",
        "flag_values": list(range(len(classes))),
        "flag_meanings": " ".join(name.replace(" ", "_") for name in classes.names),
        "flag_colors": " ".join(classes.colours),
        "class_names": list(classes.names),
    }
    percent = {"units": "percent", "valid_range": [0, 100]}
    layers: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "class": (grid.shape, flags),
        "confidence": (grid.shape, {"long_name": "probability of the class", **percent}),
    }
    if probabilities:
        layers["probability"] = ((len(classes), *grid.shape), {
            "long_name": "probability of each class", "class_names": list(classes.names), **percent})  # fmt: skip
    for name, (shape, attributes) in layers.items():
        group.create_array(
            name,
            shape=shape,
            chunks=tuple(min(CHUNK, side) for side in shape),
            dtype="uint8",
            fill_value=NODATA,
            compressors=[ZstdCodec(level=3, checksum=True)],
            dimension_names=("class", "y", "x")[-len(shape) :],
            # `nodata` and not `_FillValue`: xarray would turn integers with a fill value into floats
            attributes={**attributes, "nodata": NODATA, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
        )


def _create_value(group: zarr.Group, grid: Grid, name: str) -> None:
    group.create_array(
        "value",
        shape=grid.shape,
        chunks=tuple(min(CHUNK, side) for side in grid.shape),
        dtype="float32",
        fill_value=np.nan,
        compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=("y", "x"),
        attributes={"long_name": name, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
    )


def is_map(url: str | Path) -> bool:
    """Return whether a terrashard map is at `url`."""
    return _about(FolderStore.at(url)) is not None


def open_map(url: str | Path) -> Map:
    """Open a map.

    Raises:
        InvalidInput: There is nothing at `url`, or something else.
        IntegrityError: The map's description cannot be read.
    """
    store = FolderStore.at(url)
    about = _about(store)
    if about is None:
        found = "is something else" if store.exists() else "does not exist"
        raise InvalidInput(f"{store.url} {found}: expected a map as `terrashard predict` makes")
    store.check_inside()
    try:
        grid, classes = Grid.from_dict(about["grid"]), Classes.from_list(about["classes"])
        rest = {key: value for key, value in about.items() if key not in ("grid", "classes", "format")}
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{store.root / 'zarr.json'}: the map's description is damaged ({error!r}); make it again"
        ) from error
    layers = tuple(
        name for name in ("class", "confidence", "probability", "value") if store.exists(f"{name}/zarr.json")
    )
    return Map(store.url, grid, classes, rest, layers)


def _about(store: FolderStore) -> dict[str, Any] | None:
    data = store.read("zarr.json")
    try:
        about = load_json(data or b"{}", store.where("zarr.json"))["attributes"]["terrashard_map"]
    except (ValueError, KeyError, TypeError):
        return None
    return about if isinstance(about, dict) else None
