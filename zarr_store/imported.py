"""`from_xarray` makes an xarray dataset a collection of a cube, and `layer_from_xarray` a static layer or labels.

Numbers are stored as they are: whole numbers of up to 16 bits as uint16 with their scale, offset and nodata, all others
as float32 physical values. Shards are written one after the other through the ledger, so an import that was killed
continues when it is repeated, and an import that is complete writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zarr_store.backends import open_store
from zarr_store.cf import Band, Options, Recognised, recognise
from zarr_store.create import create_cube, describe, list_differences
from zarr_store.errors import CubeMismatch, InvalidInput, UnknownName
from zarr_store.grow import grow_cube
from zarr_store.labels import NOT_LABELLED, LabelLayer, LabelSpec, label_boxes, write_cube_item, write_label
from zarr_store.layers import StaticLayer, write_layer
from zarr_store.ledger import SourceOutcome
from zarr_store.lock import CubeLock, read_token
from zarr_store.nesting import nested_part, nesting_factor
from zarr_store.read import Cube, is_cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import (
    LAYOUTS,
    STATUS_MASKED,
    STATUS_NODATA,
    STATUS_OBSERVED,
    BandSpec,
    CubeSpec,
    Layout,
)
from zarr_store.store import Kind
from zarr_store.strays import sweep_strays
from zarr_store.write import ShardWriter

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ImportReport", "from_xarray", "layer_from_xarray"]

ImportKind = Literal["auto", "reflectance", "backscatter"]
Progress = Callable[[int, int], None]
Names = Iterable[str]
_PROVIDER = "import"
_EXACT = 1 << 24
"""Largest whole number up to which float32 holds every one."""


@dataclass(frozen=True)
class ImportReport:
    """The result of `from_xarray`.

    Attributes:
        cube: The cube.
        collection: Name of the collection.
        kind: "reflectance" (uint16, numbers as they are) or "backscatter" (float32, physical values).
        bands: Names of its bands.
        times: Its time steps.
        shape: (times, height, width).
        crs: CRS of its grid.
        resolution: Pixel size (x, y).
        written: Number of shards that were written now.
        done_before: Number of shards that were there already.
    """

    cube: str
    collection: str
    kind: str
    bands: tuple[str, ...]
    times: tuple[str, ...]
    shape: tuple[int, int, int]
    crs: str
    resolution: tuple[float, float]
    written: int
    done_before: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        return asdict(self)


def from_xarray(
    dataset: xr.Dataset,
    url: str | os.PathLike[str],
    *,
    collection: str,
    bands: Names = (),
    variable: str | None = None,
    time: str | None = None,
    band_dim: str | None = None,
    x: str | None = None,
    y: str | None = None,
    crs: str | None = None,
    nodata: float | Literal["none"] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    unit: str | None = None,
    decibel: tuple[float, float] | None = None,
    mask: str | None = None,
    masked: Iterable[int] = (),
    kind: ImportKind = "auto",
    profile: str = "train",
    store: Kind | None = None,
    source: Mapping[str, str] | None = None,
    on_shard: Progress | None = None,
) -> ImportReport:
    """Make a dataset a collection of a cube, which is made where it does not exist.

    Args:
        dataset: The dataset: bands as variables, or along a dimension; decoded or not, lazy or not.
        url: The cube.
        collection: Name of the collection in the cube.
        bands: Names of the bands to take; none takes all.
        variable: Variable that holds the bands along a dimension of their own.
        time: Name of the time dimension; for a dataset without one, its time, such as 2021-05-01.
        band_dim: Dimension along which the bands lie.
        x: Name of the coordinate of columns.
        y: Name of the coordinate of rows.
        crs: CRS of these coordinates.
        nodata: Number that stands for no data; "none" if every pixel has data. NaN never has data.
        scale: Scale in place of the stated one: physical = number · scale + offset.
        offset: Offset in place of the stated one.
        unit: Unit of the physical numbers.
        decibel: (a, b): the value is a · log10(number) + b, in dB, as float32.
        mask: Variable of classes that is stored as a class layer.
        masked: Values of `mask` whose pixels are masked.
        kind: "reflectance" stores whole numbers of up to 16 bits as they are, "backscatter" physical values as float32;
            "auto" takes the first where the numbers allow it.
        profile: Layout of chunks and shards: train, timeseries, archive or fast.
        store: Kind of a new cube, as for `create_cube`.
        source: Where the data come from: "file" and "sha256", which the item table keeps. Without a digest the numbers
            themselves decide whether a shard is done.
        on_shard: Called with (shards done, all shards).

    Raises:
        InvalidInput: Something is absent or ambiguous; the message names what to state. Or the grid does not nest in
            that of the cube.
        UnknownName: The dataset has no such band, variable or dimension.
        CubeMismatch: The cube has a collection of this name from other data.
        Locked: Another run writes to the cube.

    Example:
        >>> import xarray as xr
        >>> west, north = 600_005.0, 5_000_075.0
        >>> data = xr.Dataset(
        ...     {"red": (("time", "y", "x"), np.ones((1, 8, 8), "uint16"))},
        ...     {"time": np.array(["2023-08-10"], "datetime64[ns]"),
        ...      "y": north - 10 * np.arange(8), "x": west + 10 * np.arange(8)},
        ... )
        >>> from_xarray(data, "imported.zarr", collection="s2", crs="EPSG:32633", nodata=0).written
        1
    """
    options = Options(tuple(bands), variable, time, band_dim, x, y, crs, nodata, scale, offset, unit)
    where = (source or {}).get("file", "the dataset")
    found = recognise(dataset, options, where)
    if not found.times:
        raise InvalidInput(f"{where} has no time; give that of its pixels with --time, such as --time 2021-05-01")
    classes = _mask_band(dataset, mask, options, found) if mask is not None else None
    chosen: ImportKind = _kind(found.bands, kind, decibel)
    place = os.fspath(url)
    there = open_cube(place) if open_store(place).exists() and is_cube(open_store(place)) else None
    spec = CubeSpec(
        collection, chosen,  # type: ignore[arg-type]
        tuple(_band_spec(band, chosen, decibel) for band in found.bands), found.grid, found.times,
        () if classes is None else (classes.name,), _layout(there, collection, found, profile),
    )  # fmt: skip
    rows = _items(spec, found, dict(source or {}), decibel, mask, tuple(masked))
    if chosen == "backscatter":
        _check_exact(found.bands, decibel)
    _place_collection(there, place, spec, rows, store)
    filler = _Filler(spec, found, classes, tuple(masked), decibel)
    asked = _asked(options)
    written = before = 0
    with CubeLock(place, f"import of {collection}") as lock:
        sweep_strays(place)
        if collection not in open_cube(place).collections:
            cube = open_cube(place)
            grow_cube(
                place, [*(cube.spec(name) for name in cube.collections), spec],
                items={**{name: cube.items(name) for name in cube.collections}, collection: rows},
                provenance=cube.provenance,
            )  # fmt: skip
        _refuse_other(open_cube(place), spec, rows)
        writer = ShardWriter(place, collection, fence=lock.token)
        ledger = open_cube(place).ledger(collection)
        shards = spec.shards()
        for number, (index, region) in enumerate(shards.items(), 1):
            row = ledger.get(index)
            key = _key(spec, rows[region.t0 : region.t1], region, asked) if (source or {}).get("sha256") else None
            if key is None or row is None or row.state != "done" or row.key != key:
                arrays = filler.fill(region)
                key = key or _content_key(spec, region, arrays)
            if row is not None and row.state == "done" and row.key == key:
                before += 1
            else:
                outcomes = [SourceOutcome(t, rows[t]["id"], "read") for t in range(region.t0, region.t1)]
                writer.write(region, arrays, key=key, sources=outcomes)
                written += 1
            if on_shard:
                on_shard(number, len(shards))
        write_cube_item(place)
        kept = open_store(place)
        kept.commit(f"import of {collection}", still_ours=lambda: read_token(kept) == lock.token)
    return ImportReport(
        place, collection, chosen, spec.band_names, spec.times, spec.shape, spec.grid.crs, spec.grid.resolution,
        written, before,
    )  # fmt: skip


def layer_from_xarray(
    dataset: xr.Dataset,
    url: str | os.PathLike[str],
    *,
    name: str,
    role: Literal["layer", "labels"] = "layer",
    kind: Literal["values", "classes"] = "values",
    band: str | None = None,
    names: Mapping[int, str] | None = None,
    options: Options | None = None,
    replace_it: bool = False,
    source: Mapping[str, str] | None = None,
) -> tuple[StaticLayer | LabelLayer, bool]:
    """Make one band of a dataset a static layer or a label layer of a cube.

    A band with a time axis must be the same at all times. Its grid is that of the cube, or nests in it; a coarse pixel
    then gives all fine pixels in it its value.

    Args:
        dataset: The dataset.
        url: The cube.
        name: Name of the layer.
        role: A static layer is an input, labels are what is learned.
        kind: Values, or classes.
        band: The band; None where the dataset has only one.
        names: Names of classes by their value; other values get none. None keeps all values, renumbered where they do
            not fit in a byte.
        options: What the user states of the dataset.
        replace_it: Replace a layer of this name from another source.
        source: Where the data come from: "file" and "sha256".

    Returns:
        The layer, and whether it was written now.

    Raises:
        InvalidInput: Something is absent or ambiguous, the band changes with time, or the grid does not nest.
        CubeMismatch: A layer of this name comes from another source.
    """
    asked = options or Options()
    asked = replace(asked, bands=(band,)) if band is not None else asked
    found = recognise(dataset, asked, (source or {}).get("file", "the dataset"))
    if len(found.bands) != 1:
        raise InvalidInput(
            f"a layer is one band, and the dataset has {', '.join(b.name for b in found.bands)}; name one with --bands"
        )
    one = found.bands[0]
    cube = open_cube(url)
    factor = nesting_factor(cube.grid, found.grid)
    numbers = one.read()
    if numbers.ndim == 3:
        if any(not np.array_equal(numbers[0], later, equal_nan=numbers.dtype.kind == "f") for later in numbers[1:]):
            raise InvalidInput(
                f"{one.name} changes with time, and a layer has none; import it as a collection with --collection NAME"
            )
        numbers = numbers[0]
    numbers = found.oriented(numbers)
    origin: dict[str, Any] = {
        **(source or {"sha256": hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()}), "band": one.name,
        "kind": kind, "resampling": "nearest", "nodata": one.nodata,
    }  # fmt: skip
    classes: tuple[tuple[int, str], ...] = ()
    pixels: npt.NDArray[Any]
    if kind == "classes":
        pixels, classes = _classes(one, numbers, names)
        origin |= {"names": [list(one) for one in (names or {}).items()]}
    else:
        _check_exact([one])
        pixels = _physical(one, numbers, None)
        origin |= {"scale": one.scale, "offset": one.offset}
        origin |= {"unit": one.unit} if one.unit != "1" else {}
    whole = pixels.repeat(factor, axis=0).repeat(factor, axis=1)

    def boxes() -> Iterator[tuple[Region, Any]]:
        for box in label_boxes(cube):
            yield box, np.ascontiguousarray(whole[box.y0 : box.y1, box.x0 : box.x1])

    if role == "layer":
        return write_layer(url, name, kind, boxes, origin=origin, classes=classes, replace=replace_it)
    spec = LabelSpec(name, kind, classes, origin)
    return write_label(url, spec, boxes, replace=replace_it)


def _kind(bands: Iterable[Band], asked: ImportKind, decibel: Any) -> ImportKind:
    whole = all(band.dtype.kind == "u" and band.dtype.itemsize <= 2 for band in bands)
    one_nodata = len({band.nodata for band in bands}) == 1
    if decibel is not None:
        if asked == "reflectance":
            raise InvalidInput("--decibel gives values as float32, which --kind reflectance cannot hold; leave one out")
        return "backscatter"
    if asked == "auto":
        return "reflectance" if whole and one_nodata else "backscatter"
    if asked == "reflectance" and not (whole and one_nodata):
        held = ", ".join(f"{band.name} {band.dtype} (nodata {band.nodata})" for band in bands)
        raise InvalidInput(
            f"--kind reflectance stores whole numbers of 8 or 16 bits with one nodata value, got {held}; take --kind "
            "backscatter, which stores float32"
        )
    return asked


def _band_spec(band: Band, kind: str, decibel: tuple[float, float] | None) -> BandSpec:
    if kind == "backscatter":
        return BandSpec(band.name, None, unit="dB" if decibel is not None else band.unit)
    return BandSpec(band.name, band.nodata, band.scale, band.offset, band.unit)


def _mask_band(dataset: xr.Dataset, mask: str, options: Options, found: Recognised) -> Band:
    """Return the class variable of --mask, on the grid and the times of the bands."""
    if mask not in dataset.data_vars:
        raise UnknownName.of("variable", mask, [str(name) for name in dataset.data_vars], "the dataset (--mask)")
    theirs = recognise(
        dataset, replace(options, bands=(mask,), variable=None, nodata="none", scale=1.0, offset=0.0), "the dataset"
    )
    one = theirs.bands[0]
    if theirs.time_dim != found.time_dim or one.dtype.kind not in "iu":
        raise InvalidInput(f"--mask {mask} must hold whole numbers on the times of the bands, got {one.dtype}")
    return one


def _layout(cube: Cube | None, collection: str, found: Recognised, profile: str) -> Layout:
    """Return the chunks and shards of a new collection: over the ground of those of the cube where it has some."""
    if profile not in LAYOUTS:
        raise UnknownName.of("profile", profile, LAYOUTS, "--profile")
    if cube is None:
        return LAYOUTS[profile]
    if collection in cube.collections:
        return cube.spec(collection).layout
    factor = nesting_factor(cube.grid, found.grid)
    return nested_part(LAYOUTS[profile], cube.spec(cube.collections[0]).layout, factor)


def _items(
    spec: CubeSpec, found: Recognised, source: dict[str, str], decibel: Any, mask: str | None, masked: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return one row of the item table for each step, with the origin of the step."""
    west, south, east, north = found.grid.lonlat_bounds()
    rules: dict[str, Any] = {"bands": list(spec.band_names)}
    rules |= {"decibel": list(decibel)} if decibel is not None else {}
    rules |= {"mask": [mask, *masked]} if mask is not None else {}
    return [
        {
            "id": f"{spec.collection}-{time}", "datetime": f"{time}Z", "provider": _PROVIDER, "step": step,
            "position": found.order[step], "bbox": [west, south, east, north], "source": source, "rules": rules,
            "dn_offset": 0,
        }
        for step, time in enumerate(spec.times)
    ]  # fmt: skip


def _place_collection(
    there: Cube | None, place: str, spec: CubeSpec, rows: list[dict[str, Any]], store: Kind | None
) -> None:
    """Make a new cube of the collection; check it against a cube that is there, before anything is changed."""
    if there is None:
        create_cube(place, [spec], items={spec.collection: rows}, provenance={"import": spec.collection}, kind=store)
        return
    if spec.collection in there.collections:
        _refuse_other(there, spec, rows)
        return
    nesting_factor(there.grid, spec.grid)


def _refuse_other(cube: Cube, spec: CubeSpec, rows: list[dict[str, Any]]) -> None:
    name = spec.collection
    kept = json.loads(json.dumps({"spec": cube.spec(name).to_dict(), "items": cube.items(name)}))
    differences = list_differences(kept, describe([spec], {name: rows})[name])
    if differences:
        raise CubeMismatch(
            f"{cube.url} has a collection {name} of other data (there → asked for): {'; '.join(differences[:4])}. "
            "Nothing was changed: give another --collection NAME"
        )


def _asked(options: Options) -> dict[str, Any]:
    """Return what was stated in place of what the file says, and decides which numbers are stored."""
    names = ("variable", "band_dim", "x", "y", "nodata", "scale", "offset")
    stated = {name: getattr(options, name) for name in names}
    return {
        name: value if isinstance(value, str) else repr(value) for name, value in stated.items() if value is not None
    }


def _key(spec: CubeSpec, rows: list[dict[str, Any]], region: Region, asked: Mapping[str, Any]) -> str:
    """Return the digest of all that determines a shard of a file whose digest the rows have."""
    rules = {key: value for key, value in spec.to_dict().items() if key != "times"}
    return _digest([rules, region.to_list(), rows, *([asked] if asked else [])])  # without any, as in earlier releases


def _content_key(spec: CubeSpec, region: Region, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    hashes = {name: hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for name, one in arrays.items()}
    return _digest([{k: v for k, v in spec.to_dict().items() if k != "times"}, region.to_list(), hashes])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Filler:
    """Maker of the arrays of a shard from the dataset."""

    spec: CubeSpec
    found: Recognised
    classes: Band | None
    masked: tuple[int, ...]
    decibel: tuple[float, float] | None

    def fill(self, region: Region) -> dict[str, npt.NDArray[Any]]:
        """Read the numbers of a shard, and set the status of each pixel."""
        spec = self.spec
        times = range(region.t0, region.t1)
        main = np.stack([self._band(band, times, region) for band in self.found.bands], axis=1)
        lost = np.zeros((len(times), *region.shape[1:]), bool)
        if spec.kind == "backscatter":
            lost = ~np.isfinite(main).all(axis=1)
        else:
            for number, band in enumerate(self.found.bands):
                absent = band.lost(main[:, number])
                if band.nodata is not None:  # one number stands for no data in the cube
                    main[:, number][absent] = band.nodata
                lost |= absent
        status = np.where(lost, np.uint8(STATUS_NODATA), np.uint8(STATUS_OBSERVED))
        arrays = {spec.kind: main, "status": status}
        if self.classes is not None:
            layer = self._numbers(self.classes, times, region)
            if layer.size and not 0 <= int(layer.min()) <= int(layer.max()) <= 255:
                raise InvalidInput(
                    f"--mask {self.classes.name}: classes must be 0 … 255, got {layer.min()} … {layer.max()}"
                )
            arrays[self.classes.name] = layer.astype(np.uint8)
            status[np.isin(layer, self.masked) & ~lost] = STATUS_MASKED
        steps = np.arange(region.t0, region.t1, dtype=np.int16)[:, None, None]
        arrays["source_item"] = np.where(lost, np.int16(-1), steps)
        return arrays

    def _band(self, band: Band, times: range, region: Region) -> npt.NDArray[Any]:
        numbers = self._numbers(band, times, region)
        return _physical(band, numbers, self.decibel) if self.spec.kind == "backscatter" else numbers.astype(np.uint16)

    def _numbers(self, band: Band, times: range, region: Region) -> npt.NDArray[Any]:
        rows, columns = slice(region.y0, region.y1), slice(region.x0, region.x1)
        if self.found.time_dim is None:
            return self.found.oriented(band.read())[None, rows, columns]
        steps = [band.read(slice(self.found.order[t], self.found.order[t] + 1)) for t in times]
        return self.found.oriented(np.concatenate(steps))[:, rows, columns]


def _check_exact(bands: Iterable[Band], decibel: tuple[float, float] | None = None) -> None:
    """Refuse whole numbers without a scale of which float32 would lose digits; others are read only then."""
    for band in bands:
        if (
            band.dtype.kind not in "iu"
            or band.dtype.itemsize <= 2
            or (band.scale, band.offset) != (1.0, 0.0)
            or decibel
        ):
            continue
        for step in range(len(band.array) if band.array.ndim == 3 else 1):
            numbers = band.read(slice(step, step + 1) if band.array.ndim == 3 else None)
            known = numbers[~band.lost(numbers)]
            if known.size and max(-int(known.min()), int(known.max())) > _EXACT:
                raise InvalidInput(
                    f"{band.name} holds whole numbers {known.min()} … {known.max()}, and float32 holds every one only "
                    f"up to {_EXACT}: give their --scale and --offset, or other numbers"
                )


def _physical(band: Band, numbers: npt.NDArray[Any], decibel: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    """Return the physical values of numbers as float32; NaN without data."""
    values = numbers.astype(np.float64)
    lost = ~np.isfinite(values) | band.lost(numbers)
    if (band.scale, band.offset) != (1.0, 0.0):
        values = values * band.scale + band.offset
    if decibel is not None:
        a, b = decibel
        with np.errstate(divide="ignore", invalid="ignore"):
            values = a * np.log10(values) + b
    values[lost | ~np.isfinite(values)] = np.nan
    return values.astype(np.float32)


def _classes(
    band: Band, numbers: npt.NDArray[Any], names: Mapping[int, str] | None
) -> tuple[npt.NDArray[np.uint8], tuple[tuple[int, str], ...]]:
    """Return the class values as bytes, 255 without a class; values that do not fit in a byte are renumbered."""
    if numbers.dtype.kind not in "iu":
        raise InvalidInput(f"{band.name} holds {numbers.dtype}, and classes are whole numbers; give --values")
    if (band.scale, band.offset) != (1.0, 0.0):
        raise InvalidInput(
            f"{band.name} has scale {band.scale:g} and offset {band.offset:g}, which classes cannot have; give "
            "--scale 1 --offset 0 if its numbers are codes, or --values"
        )
    there = ~band.lost(numbers)
    known = names or {int(value): f"class {value}" for value in np.unique(numbers[there])}
    if len(known) > NOT_LABELLED:
        raise InvalidInput(
            f"{band.name} has {len(known)} classes, and a layer holds {NOT_LABELLED}; choose with --names"
        )
    merged = sorted(set(known.values()))
    fits = all(0 <= value < NOT_LABELLED for value in known)
    if len(merged) < len(known):  # several values of one name are one class
        stored_of = {value: merged.index(name) for value, name in known.items()}
    else:
        stored_of = {value: value if fits else number for number, value in enumerate(sorted(known))}
    pixels = np.full(numbers.shape, NOT_LABELLED, np.uint8)
    for value, stored in stored_of.items():
        pixels[there & (numbers == value)] = stored
    return pixels, tuple(sorted({(stored, known[value]) for value, stored in stored_of.items()}))
