"""`CubeSpec` holds everything that fixes the bytes of one collection in a cube; it is checked when it is made."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

import numpy as np

from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid
from zarr_store.keys import GROUP_NAME
from zarr_store.lookup import find_bands, find_time, find_times
from zarr_store.regions import Region, box_at, count_boxes, iterate_boxes

__all__ = [
    "LAYOUTS",
    "MAIN_ARRAYS",
    "OVERVIEW_FACTOR",
    "STATUS_MASKED",
    "STATUS_MISSING",
    "STATUS_NODATA",
    "STATUS_OBSERVED",
    "ArraySpec",
    "BandSpec",
    "CubeSpec",
    "DerivedSpec",
    "ItemType",
    "Layout",
    "Reducer",
    "item_type_for",
    "overview_positions",
]

STATUS_NODATA, STATUS_OBSERVED, STATUS_MASKED, STATUS_MISSING = 0, 1, 2, 3
"""Values of `status`: outside every swath · clear pixel · observed but masked (cloud …) · asset unreadable."""

OVERVIEW_FACTOR = 8
"""Step of the overview; with every 8th pixel each way it adds 1/64, and a 2048² shard becomes one 256² chunk."""


def overview_positions(size: int) -> np.ndarray:
    """Return the rows or columns that the overview of a raster of `size` pixels keeps: the middle one of each block.

    >>> overview_positions(18).tolist()
    [4, 12, 17]
    """
    return np.minimum(np.arange(0, size, OVERVIEW_FACTOR) + OVERVIEW_FACTOR // 2, size - 1)


def _fill_attribute(dtype: str, nodata: float) -> int | str:
    """Return `_FillValue` as xarray has it in Zarr 3: a whole number, or for floats a double in base64."""
    if np.dtype(dtype).kind == "f":
        return base64.standard_b64encode(struct.pack("<d", math.nan)).decode()
    return int(nodata)


def item_type_for(scenes: int) -> ItemType:
    """Return the smallest type of `source_item` that can name that many scenes.

    >>> item_type_for(32_767), item_type_for(32_768)
    ('int16', 'int32')
    """
    return "int16" if scenes <= np.iinfo(np.int16).max else "int32"


Kind = Literal["reflectance", "backscatter"]
Reducer = Literal["first", "median", "mean"]
"""Rule by which several observations of one pixel in a time step become one value."""
ItemType = Literal["int16", "int32"]
"""Type of the row numbers of the item table in `source_item`."""
MAIN_ARRAYS: dict[Kind, str] = {"reflectance": "uint16", "backscatter": "float32"}
"""Name of the array that holds the bands, and its dtype."""


@dataclass(frozen=True)
class BandSpec:
    """One band of the main array: physical = stored · scale + offset, where stored ≠ nodata.

    Example:
        >>> BandSpec("red", nodata=0, scale=1e-4, wavelength_um=0.665).name
        'red'
    """

    name: str
    nodata: float | None = 0
    scale: float = 1.0
    offset: float = 0.0
    unit: str = "1"
    wavelength_um: float | None = None


@dataclass(frozen=True)
class DerivedSpec:
    """One array (time, y, x) that is computed from bands of the main array when a shard is written.

    Stored as int16: value = stored · scale, `nodata` where the bands do not allow one.
    """

    name: str
    bands: tuple[str, ...]
    formula: str
    source: str
    scale: float = 1e-4
    nodata: int = -32768


@dataclass(frozen=True)
class Layout:
    """The sizes into which arrays are cut: a `chunk` is compressed and checksummed as one, a `shard` is one file.

    Both are (time, y, x) in pixels; a chunk or shard always holds all bands.

    Example:
        >>> LAYOUTS["train"].fitted((10, 300, 300)).shard
        (1, 512, 512)
    """

    name: str
    chunk: tuple[int, int, int]
    shard: tuple[int, int, int]
    cname: str = "zstd"
    clevel: int = 1

    def fitted(self, shape: tuple[int, int, int]) -> Layout:
        """Return the same layout with shards no larger than needed to cover `shape`, in whole chunks."""
        shard = tuple(min(s, -(-n // c) * c) for s, c, n in zip(self.shard, self.chunk, shape, strict=True))
        return Layout(self.name, self.chunk, (shard[0], shard[1], shard[2]), self.cname, self.clevel)


LAYOUTS: dict[str, Layout] = {
    "train": Layout("train", (1, 256, 256), (1, 2048, 2048)),
    "timeseries": Layout("timeseries", (8, 128, 128), (8, 1024, 1024)),
    "archive": Layout("archive", (1, 512, 512), (1, 4096, 4096), clevel=9),
    "fast": Layout("fast", (1, 256, 256), (1, 2048, 2048), cname="lz4", clevel=5),
}
"""train: whole-scene patches · timeseries: many dates of a small box · archive: smallest · fast: as train, but packed
and unpacked twice as fast, and a twelfth larger."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a collection group."""

    name: str
    dtype: str
    dims: tuple[str, ...]
    fill: float
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CubeSpec:
    """One collection of a cube.

    Attributes:
        collection: Group name in the cube, e.g. "sentinel-2-l2a".
        kind: "reflectance" (uint16) or "backscatter" (float32); the name of the main array.
        bands: Bands of the main array, in order.
        grid: The georeference; other collections of the cube share it, or have one that nests (`zarr_store.nesting`).
        times: Acquisition time of each step, ISO 8601 UTC ("2023-08-15T09:57:57"), strictly ascending.
        class_layers: Extra uint8 layers (time, y, x), e.g. ("scl",).
        layout: Chunks and shards.
        derived: Spectral indices, each an array of its own.
        reduce: "first": every pixel is one observation and `source_item` names it. "median" and "mean": over the
            clear observations of the step; `observations` counts them in place of `source_item`.
        item_type: Type of `source_item`: "int16", or "int32" for more than 32,767 scenes.

    Example:
        >>> grid = Grid.from_bounds("EPSG:32633", (600_000, 5_000_000, 605_120, 5_005_120), resolution=10)
        >>> bands = (BandSpec("red", 0, 1e-4), BandSpec("nir", 0, 1e-4))
        >>> CubeSpec("s2", "reflectance", bands, grid, ("2023-08-10T09:57:57",)).shape
        (1, 512, 512)
    """

    collection: str
    kind: Kind
    bands: tuple[BandSpec, ...]
    grid: Grid
    times: tuple[str, ...]
    class_layers: tuple[str, ...] = ()
    layout: Layout = LAYOUTS["train"]
    derived: tuple[DerivedSpec, ...] = ()
    reduce: Reducer = "first"
    item_type: ItemType = "int16"

    def __post_init__(self) -> None:
        if not GROUP_NAME.fullmatch(self.collection):
            raise InvalidInput(
                f"collection name {self.collection!r} cannot name a group: use letters, digits, '.', '_', '-' "
                "(at most 100, first a letter or digit)"
            )
        if self.kind not in MAIN_ARRAYS:
            raise UnknownName.of("kind", self.kind, MAIN_ARRAYS)
        if self.item_type not in get_args(ItemType):
            raise UnknownName.of("item type", self.item_type, get_args(ItemType))
        names = [band.name for band in self.bands]
        if not names or len(set(names)) != len(names):
            raise InvalidInput(f"{self.collection}: bands must be named once each and not be empty, got {names}")
        for index in self.derived:
            lacking = [band for band in index.bands if band not in names]
            if lacking:
                raise InvalidInput(
                    f"{self.collection}: {index.name} is made of {' and '.join(index.bands)}, but the bands are "
                    f"{', '.join(names)}; add {','.join(lacking)} to --bands, or leave the index out"
                )
        arrays = [array.name for array in self.arrays()]
        for name in arrays:
            if not GROUP_NAME.fullmatch(name):
                raise InvalidInput(
                    f"{self.collection}: {name!r} cannot name an array: use letters, digits, '.', '_' and '-'"
                )
        if len(set(arrays)) != len(arrays):
            raise InvalidInput(f"{self.collection}: arrays must have unique names, got {', '.join(arrays)}")
        if not self.times or list(self.times) != sorted(set(self.times)):
            raise InvalidInput(
                f"{self.collection}: times must be strictly ascending and not be empty, got {self.times}"
            )
        for chunk, shard in zip(self.layout.chunk, self.layout.shard, strict=True):
            if chunk < 1 or shard % chunk:
                raise InvalidInput(
                    f"{self.collection}: each shard side must be a multiple of the chunk side, "
                    f"got chunk {self.layout.chunk}, shard {self.layout.shard}"
                )
        if self.layout.chunk[1] % OVERVIEW_FACTOR or self.layout.chunk[2] % OVERVIEW_FACTOR:
            raise InvalidInput(
                f"{self.collection}: chunk sides in y and x must be multiples of {OVERVIEW_FACTOR}, "
                f"the step of the overview; got {self.layout.chunk[1:]}"
            )
        object.__setattr__(self, "layout", self.layout.fitted(self.shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size as (times, height, width)."""
        return (len(self.times), self.grid.height, self.grid.width)

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    @property
    def time_values(self) -> np.ndarray:
        """Acquisition times as datetime64[s], shape (times,)."""
        return np.array([t.removesuffix("Z") for t in self.times], dtype="datetime64[s]")

    def find_bands(self, asked: str | Iterable[str] = (), *, option: str = "") -> tuple[int, ...]:
        """Return the positions of bands by name, in the order asked; of all bands where none is named.

        Args:
            asked: Names in any case, or codes such as "B04"; one text may hold several, with commas between.
            option: Setting that they come from, for the message.

        Raises:
            UnknownName: A name means no band; all such names are listed.
        """
        return find_bands(asked, self.band_names, self._where(option))

    def find_times(self, asked: str | Iterable[str], *, option: str = "") -> tuple[int, ...]:
        """Return the positions of all time steps that are meant, ascending.

        Args:
            asked: Dates ("2023-08-18", or "2023-08" for a month), ranges ("2023-08/2023-09") or positions ("0").
            option: Setting that they come from, for the message.

        Raises:
            UnknownName: A text means no time step; all such texts are listed.
        """
        return find_times(asked, self.times, self._where(option))

    def find_time(self, asked: str, *, option: str = "") -> int:
        """Return the position of the one time step that is meant; as `find_times`, but several are an error.

        Raises:
            UnknownName: It means no time step.
            InvalidInput: It means several.
        """
        return find_time(asked, self.times, self._where(option))

    def _where(self, option: str) -> str:
        return f"collection {self.collection}" + (f" ({option})" if option else "")

    def arrays(self) -> tuple[ArraySpec, ...]:
        """Return all pixel arrays: the main one, class layers, status, source_item or observations, and indices."""
        tyx = ("time", "y", "x")
        main: dict[str, Any] = {"long_name": self.kind}
        scales = {(b.scale, b.offset) for b in self.bands}
        if scales != {(1.0, 0.0)} and len(scales) == 1:
            # named so that xarray's CF decoding does not scale the numbers: reflectance is made on the device
            scale, offset = self.bands[0].scale, self.bands[0].offset
            main |= {
                "reflectance_scale": scale,
                "reflectance_offset": offset,
                "comment": f"reflectance = stored * {scale:g} + {offset:g}; "
                + (
                    "0 is no data, 65535 is saturated"
                    if not self.bands[0].nodata
                    else f"{self.bands[0].nodata:g} is no data"
                ),
            }
        nodata = self.bands[0].nodata
        main["_FillValue"] = _fill_attribute(MAIN_ARRAYS[self.kind], nodata or 0)
        return (
            ArraySpec(
                self.kind,
                MAIN_ARRAYS[self.kind],
                ("time", "band", "y", "x"),
                float("nan") if self.kind == "backscatter" else float(nodata or 0),
                main,
            ),
            *(ArraySpec(name, "uint8", tyx, 0, {"long_name": name}) for name in self.class_layers),
            ArraySpec(
                "status",
                "uint8",
                tyx,
                STATUS_NODATA,
                {
                    "long_name": "what is known of the pixel",
                    "flag_values": [STATUS_NODATA, STATUS_OBSERVED, STATUS_MASKED, STATUS_MISSING],
                    "flag_meanings": "nodata observed masked missing",
                },
            ),
            ArraySpec(
                "source_item",
                self.item_type,
                tyx,
                -1,
                {
                    "long_name": "row of the item table that gave the pixel, -1 for none",
                },
            )
            if self.reduce == "first"
            else ArraySpec(
                "observations",
                "uint16",
                tyx,
                0,
                {"long_name": f"clear observations that the {self.reduce} was taken over"},
            ),
            *(
                ArraySpec(
                    index.name,
                    "int16",
                    tyx,
                    index.nodata,
                    {
                        "long_name": index.name.upper(),
                        "formula": index.formula,
                        "bands": list(index.bands),
                        "references": index.source,
                        # named so that xarray's CF decoding does not scale the numbers, as with reflectance
                        "index_scale": index.scale,
                        "index_nodata": index.nodata,
                        "comment": f"value = stored * {index.scale:g}; {index.nodata} is no data",
                        "_FillValue": index.nodata,
                    },
                )
                for index in self.derived
            ),
        )

    def array(self, name: str) -> ArraySpec:
        for spec in self.arrays():
            if spec.name == name:
                return spec
        raise UnknownName.of("array", name, [a.name for a in self.arrays()], f"collection {self.collection}")

    def array_shape(self, name: str) -> tuple[int, ...]:
        times, height, width = self.shape
        return (times, len(self.bands), height, width) if "band" in self.array(name).dims else self.shape

    def box(self, name: str, tyx: tuple[int, int, int]) -> tuple[int, ...]:
        """Return the shape of a chunk or shard of array `name`: `tyx` (time, y, x), with all bands if it has bands."""
        t, y, x = tyx
        return (t, len(self.bands), y, x) if "band" in self.array(name).dims else tyx

    def shards(self) -> dict[tuple[int, int, int], Region]:
        """Return the region of every shard by its index (t, y, x), cut at the edge of the grid.

        A cube may have millions: `shard_counts`, `shard_at` and `iterate_shards` hold one at a time.
        """
        return dict(self.iterate_shards())

    def iterate_shards(self) -> Iterator[tuple[tuple[int, int, int], Region]]:
        """Yield the index (t, y, x) and the region of every shard, in order."""
        return iterate_boxes(self.shape, self.layout.shard)

    @property
    def shard_counts(self) -> tuple[int, int, int]:
        """Number of shards along (time, y, x)."""
        return count_boxes(self.shape, self.layout.shard)

    @property
    def shard_count(self) -> int:
        """Number of shards in all."""
        return math.prod(self.shard_counts)

    def shard_at(self, index: tuple[int, int, int]) -> Region | None:
        """Return the region of one shard; None where the cube has no shard of that index."""
        if not all(0 <= number < count for number, count in zip(index, self.shard_counts, strict=True)):
            return None
        return box_at(self.shape, self.layout.shard, index)

    def check_items(self, count: int) -> None:
        """Refuse an item table that has more rows than `source_item` can name.

        Raises:
            InvalidInput: It has.
        """
        most = int(np.iinfo(self.item_type).max)
        if self.reduce == "first" and count > most:
            raise InvalidInput(
                f"{self.collection}: {count} scenes are more than the {most} that this cube can name, whose item "
                f"numbers are {self.item_type}; make a new cube of all scenes, or split --datetime"
            )

    def chunks(self, region: Region) -> dict[tuple[int, int, int], Region]:
        """Return the chunks of one shard `region` by index inside the shard, in cube coordinates."""
        return {
            index: Region(
                box.t0 + region.t0,
                box.t1 + region.t0,
                box.y0 + region.y0,
                box.y1 + region.y0,
                box.x0 + region.x0,
                box.x1 + region.x0,
            )
            for index, box in iterate_boxes(region.shape, self.layout.chunk)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form without later fields at their defaults, so that it equals that of older cubes."""
        data = asdict(self) | {"grid": self.grid.to_dict()}
        if not self.derived:
            del data["derived"]
        if self.reduce == "first":
            del data["reduce"]
        if self.item_type == "int16":
            del data["item_type"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        layout = dict(data["layout"])
        return cls(
            collection=data["collection"],
            kind=data["kind"],
            bands=tuple(BandSpec(**band) for band in data["bands"]),
            grid=Grid.from_dict(data["grid"]),
            times=tuple(data["times"]),
            class_layers=tuple(data["class_layers"]),
            layout=Layout(
                layout["name"], tuple(layout["chunk"]), tuple(layout["shard"]), layout["cname"], layout["clevel"]
            ),
            derived=tuple(
                DerivedSpec(**{**index, "bands": tuple(index["bands"])}) for index in data.get("derived", ())
            ),
            reduce=data.get("reduce", "first"),
            item_type=data.get("item_type", "int16"),
        )
