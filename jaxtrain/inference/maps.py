"""Maps are classes or values on the cube's grid, as Zarr v3 that xarray, rioxarray and GDAL read.

    MAP.zarr/class         (y, x) uint8         class index, 255 = no data; uint16 and 65535 with more classes
    MAP.zarr/confidence    (y, x) uint8         probability of that class in per cent, 255 = no data
    MAP.zarr/probability   (class, y, x) uint8  per cent, 255 = no data; only where asked for
    MAP.zarr/entropy       (y, x) uint8         of the probabilities, per cent of its largest; only where asked for
    MAP.zarr/value         (y, x) float32       in place of these: the predicted value, nan = no data; or scaled int16
    MAP.zarr/modalities    (y, x) uint16        of a network of several: bit i is set where modality i was there
    MAP.zarr/{y,x,spatial_ref}                  pixel centres and CRS
    MAP.zarr/overview/{4,16,…}/                 coarser copies of the layers of a map that is larger than a chunk
    MAP.zarr/_terrashard/ledger/map/            one row for each box of the map: what it was made of, and its digests

A map of each date has an axis `time` before the others. Class names, colours and the model's run are attributes.
Chunks are not sharded and carry zstd's own checksum, because GDAL before 3.13 reads neither shards nor crc32c. A map
appears when it is complete, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from jaxtrain.inference.layers import NODATA, MapLayers
from jaxtrain.inference.overviews import write_overviews
from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.georeference import georeference, write_axes
from zarr_store.grid import Grid
from zarr_store.group import ArrayCheck, axis_checks, open_group, read_array
from zarr_store.promises import check_array
from zarr_store.store import translate_os_errors
from zarr_store.temporary import remove_folder

__all__ = ["CHUNK", "NODATA", "Map", "MapWriter", "create_map", "is_map", "make_arrays", "open_map", "refuse_other"]

CHUNK = 512
_CLASSES_OF_CHUNK = 16
"""Largest number of classes in a chunk of probabilities: a reader of one class decodes no hundreds of others."""
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
        layers: Names of its arrays: class, confidence and perhaps probability and entropy; or value; perhaps
            modalities.
        times: Dates along the axis `time` of a map of each date; none of a map without that axis.
    """

    url: str
    grid: Grid
    classes: Classes
    attributes: Mapping[str, Any]
    layers: tuple[str, ...]
    times: tuple[str, ...] = ()

    def dataset(self) -> xr.Dataset:
        """Open the map as a lazy xarray dataset of integers; `class` and `confidence` are data variables."""
        # a variable with the name of a dimension is taken for a coordinate; here it is the map itself
        checks = axis_checks(self.grid.height, self.grid.width)
        if self.times:
            checks["time"] = partial(check_array, shape=(len(self.times),), dtype="int64")
        opened = open_group(
            FolderStore.at(self.url), "", checks | {name: self._layer_check(name) for name in self.layers}
        )
        return opened.reset_coords("class") if "probability" in self.layers else opened

    @property
    def values(self) -> bool:
        """Whether the map holds values, not classes."""
        return "value" in self.layers

    @property
    def kind(self) -> MapLayers:
        """Description of the layers: types, values of no data, scale."""
        scale = self.attributes.get("scale")
        return MapLayers(
            len(self.classes),
            values=self.values,
            probabilities="probability" in self.layers,
            entropy="entropy" in self.layers,
            scale=None if scale is None else (float(scale[0]), float(scale[1])),
            modalities=tuple(self.attributes.get("modalities", ())) if "modalities" in self.layers else (),
        )

    def read(self, layer: str = "class", rows: slice = slice(None), *, time: int = -1) -> npt.NDArray[Any]:
        """Read rows of one layer as they are stored: (rows, x), or (class, rows, x) for probability.

        Args:
            layer: Its name.
            rows: Rows of the grid.
            time: Position of the date in a map of each date; by default the last one.
        """
        at: tuple[Any, ...] = (..., rows, slice(None))
        if self.times:
            at = (range(len(self.times))[time], *at)
        return read_array(FolderStore.at(self.url), layer, self._layer_check(layer), at)

    def read_values(self, rows: slice = slice(None), *, time: int = -1) -> npt.NDArray[np.float32]:
        """Read rows of a map of values in their own unit, float32 (rows, x); nan where there is none."""
        stored, kind = self.read("value", rows, time=time), self.kind
        if kind.scale is None:
            return stored
        scale, offset = kind.scale
        value = (stored * scale + offset).astype(np.float32)
        return np.where(stored == kind.nodata("value"), np.float32(np.nan), value)

    def _layer_check(self, layer: str) -> ArrayCheck:
        return partial(
            check_array, shape=_layer_shape(layer, self.kind, self.grid, self.times), dtype=self.kind.dtype(layer)
        )


def _layer_shape(layer: str, kind: MapLayers, grid: Grid, times: Sequence[str]) -> tuple[int, ...]:
    classes = (kind.classes,) if layer == "probability" else ()
    return (*((len(times),) if times else ()), *classes, *grid.shape)


@dataclass(frozen=True)
class MapWriter:
    """Writer of the pixels of a new map; boxes may come in any order, best in whole chunks."""

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
        layers = {"class": chosen, "confidence": confidence}
        if self.probabilities and probability is not None:
            layers["probability"] = probability
        self.put(y, x, layers)

    def put(self, y: int, x: int, layers: Mapping[str, npt.NDArray[Any]], *, time: int | None = None) -> None:
        """Write one box of some layers, whose first pixel is (y, x); with `time` into a map of each date."""
        for name, pixels in layers.items():
            height, width = pixels.shape[-2:]
            at: tuple[Any, ...] = (..., slice(y, y + height), slice(x, x + width))
            array: Any = self.group[name]
            array[at if time is None else (time, *at)] = pixels


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
        InvalidInput: Something that is not a map is at `url`.
    """
    store = FolderStore.at(url)
    refuse_other(store)
    kind = MapLayers(len(classes), values=values, probabilities=probabilities)
    with store.beside() as fresh, translate_os_errors(store.url):
        make_arrays(fresh, grid, classes, kind, attributes=attributes)
        yield MapWriter(zarr.open_group(str(fresh.root), mode="r+", use_consolidated=False), probabilities)
        write_overviews(fresh, kind.names, CHUNK)
        if store.exists():
            remove_folder(store.root)


def refuse_other(store: FolderStore) -> None:
    """Refuse to write a map where something else is.

    Raises:
        InvalidInput: Something that is not a map is there.
    """
    if store.exists() and not is_map(store.url):
        raise InvalidInput(
            f"{store.url} exists and is not a terrashard map; nothing was changed: choose another path or remove it"
        )


def make_arrays(
    store: FolderStore,
    grid: Grid,
    classes: Classes,
    kind: MapLayers,
    *,
    attributes: Mapping[str, Any],
    times: Sequence[str] = (),
) -> None:
    """Write the metadata and axes of a map; its pixels hold no data yet.

    Args:
        store: Store of the map, in which nothing is yet.
        grid: Grid of the cube.
        classes: Names and colours.
        kind: Its layers.
        attributes: JSON: what made it.
        times: Dates of a map of each date.
    """
    about = {"format": _FORMAT, "grid": grid.to_dict(), "classes": classes.to_list(), **attributes}
    about |= {"times": list(times)} if times else {}
    about |= {"scale": list(kind.scale)} if kind.scale is not None else {}
    group = zarr.create_group(str(store.root), attributes={
        "Conventions": "CF-1.11",
        **georeference(grid.to_dict(), grid.bounds, grid.wkt),
        "terrashard_map": json.loads(json.dumps(about)),
    })  # fmt: skip
    for name in kind.names:
        shape = _layer_shape(name, kind, grid, times)
        chunks = tuple(min(CHUNK, side) for side in shape)
        if name == "probability":
            chunks = (*chunks[:-3], min(_CLASSES_OF_CHUNK, kind.classes), *chunks[-2:])
        if times:
            chunks = (1, *chunks[1:])
        dims = ("class", "y", "x") if name == "probability" else ("y", "x")
        group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=kind.dtype(name),
            fill_value=kind.nodata(name),
            compressors=[ZstdCodec(level=3, checksum=True)],
            dimension_names=("time", *dims) if times else dims,
            attributes={**_layer_attributes(name, kind, classes), "grid_mapping": "spatial_ref",
                        "coordinates": "spatial_ref"},
        )  # fmt: skip
    write_axes(group, grid)
    if times:
        seconds = np.array(times, "datetime64[s]").astype(np.int64)
        group.create_array(
            "time", shape=seconds.shape, dtype="int64", dimension_names=("time",),
            compressors=[ZstdCodec(level=3, checksum=True)],
            attributes={"standard_name": "time", "units": "seconds since 1970-01-01",
                        "calendar": "proleptic_gregorian"},
        )[...] = seconds  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(str(store.root))


def _layer_attributes(name: str, kind: MapLayers, classes: Classes) -> dict[str, Any]:
    if name == "value":
        scaled = {} if kind.scale is None else {
            "scale_factor": kind.scale[0], "add_offset": kind.scale[1], "nodata": kind.nodata(name)}  # fmt: skip
        return {"long_name": classes.names[0], **scaled}
    if name == "modalities":
        return {
            "long_name": "modalities that were there",
            "flag_masks": [1 << bit for bit in range(len(kind.modalities))],
            "flag_meanings": " ".join(kind.modalities),
        }
    percent = {"units": "percent", "valid_range": [0, 100]}
    attributes: dict[str, dict[str, Any]] = {
        "class": {
            "long_name": "class",
            "flag_values": list(range(len(classes))),
            "flag_meanings": " ".join(name.replace(" ", "_") for name in classes.names),
            "flag_colors": " ".join(classes.colours),
            "class_names": list(classes.names),
        },
        "confidence": {"long_name": "probability of the class", **percent},
        "probability": {"long_name": "probability of each class", "class_names": list(classes.names), **percent},
        "entropy": {"long_name": "entropy of the probabilities, of its largest value", **percent},
    }
    # `nodata` and not `_FillValue`: xarray would turn integers with a fill value into floats
    return {**attributes[name], "nodata": kind.nodata(name)}


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
        rest = {key: value for key, value in about.items() if key not in ("grid", "classes", "format", "times")}
        times = tuple(str(time) for time in about.get("times", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{store.root / 'zarr.json'}: the map's description is damaged ({error!r}); make it again"
        ) from error
    layers = tuple(
        name
        for name in ("class", "confidence", "probability", "entropy", "value", "modalities")
        if store.exists(f"{name}/zarr.json")
    )
    return Map(store.url, grid, classes, rest, layers, times)


def _about(store: FolderStore) -> dict[str, Any] | None:
    data = store.read("zarr.json")
    try:
        about = load_json(data or b"{}", store.where("zarr.json"))["attributes"]["terrashard_map"]
    except (ValueError, KeyError, TypeError):
        return None
    return about if isinstance(about, dict) else None
