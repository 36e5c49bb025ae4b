"""Recognise time, bands, grid and numbers of an xarray dataset, by CF metadata and by what the user states.

What the metadata say unambiguously is taken. Where they say nothing, or two things, the error names the one option that
answers; nothing is guessed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid, check_on_earth, normal_crs

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Band", "Options", "Recognised", "recognise"]

_X = ("projection_x_coordinate", "longitude", "grid_longitude")
_Y = ("projection_y_coordinate", "latitude", "grid_latitude")
_X_NAMES, _Y_NAMES = ("x", "lon", "longitude", "easting"), ("y", "lat", "latitude", "northing")
_BAND_NAMES = ("band", "bands")
_SINCE = re.compile(r"^\s*(seconds?|secs?|s|minutes?|mins?|hours?|hrs?|h|days?|d|milliseconds?|microseconds?) since ")
_VALID = ("valid_range", "valid_min", "valid_max")
_DEFAULT_FILL = float(np.float32(9.969209968386869e36))
"""What the netCDF library leaves in floats that were never written, where no other number is stated."""
_EVEN_PX = 1e-3
"""Largest distance of a coordinate from its place on an even lattice, pixels."""


@dataclass(frozen=True)
class Options:
    """The statements of a user about a dataset; None leaves it to the metadata.

    Attributes:
        bands: Names of the bands to take; none takes all.
        variable: Variable that holds the bands along a dimension of their own.
        time: Name of the time dimension, or the time of a dataset without one, as ISO 8601.
        band_dim: Dimension along which the bands lie.
        x, y: Names of the coordinates of columns and rows.
        crs: CRS of these coordinates.
        nodata: Number that stands for no data; "none" if every pixel has data.
        scale, offset: physical = number · scale + offset.
        unit: Unit of the physical numbers.
    """

    bands: tuple[str, ...] = ()
    variable: str | None = None
    time: str | None = None
    band_dim: str | None = None
    x: str | None = None
    y: str | None = None
    crs: str | None = None
    nodata: float | Literal["none"] | None = None
    scale: float | None = None
    offset: float | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Band:
    """One band of a dataset.

    Attributes:
        name: Name of the band.
        array: Its numbers (time, y, x), or (y, x) without a time; lazy where the dataset is.
        dtype: Type of the numbers, after `_Unsigned` was applied.
        nodata: Number that stands for no data; None if every pixel has data. NaN never has data.
        scale, offset: physical = number · scale + offset.
        unit: Unit of the physical numbers; "1" where none is stated.
        others: Further numbers that stand for no data, as `missing_value` may list.
        valid: Smallest and largest number that is data; None if all are.
    """

    name: str
    array: xr.DataArray = field(repr=False)
    dtype: np.dtype[Any]
    nodata: float | None
    scale: float
    offset: float
    unit: str
    others: tuple[float, ...] = ()
    valid: tuple[float, float] | None = None

    def read(self, times: slice | None = None) -> npt.NDArray[Any]:
        """Read the numbers as they are stored, (time, y, x) or (y, x); rows and columns as the dataset has them."""
        array = self.array if times is None else self.array[times]
        numbers = np.asarray(array.values)
        return numbers.view(self.dtype) if numbers.dtype != self.dtype else numbers

    def lost(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which numbers are no data, as the metadata say; NaN and infinity are left to the caller."""
        lost = np.zeros(numbers.shape, bool)
        for value in (self.nodata, *self.others):
            if value is not None:
                lost |= numbers == value
        if self.valid is not None:
            lost |= (numbers < self.valid[0]) | (numbers > self.valid[1])
        return lost


@dataclass(frozen=True)
class Recognised:
    """A dataset whose axes are known.

    Attributes:
        bands: Its bands, in order.
        grid: North-up grid of the pixels.
        times: ISO 8601 UTC of each step, ascending; none where the dataset has no time.
        order: Position of each step in the dataset, in the order of `times`.
        flip: Whether rows and columns run the other way in the dataset.
        time_dim: Name of the time dimension; None without one.
    """

    bands: tuple[Band, ...]
    grid: Grid
    times: tuple[str, ...]
    order: tuple[int, ...]
    flip: tuple[bool, bool]
    time_dim: str | None

    def oriented(self, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn (…, y, x) of the dataset into rows from north to south and columns from west to east."""
        rows, columns = (slice(None, None, -1) if back else slice(None) for back in self.flip)
        return np.ascontiguousarray(numbers[..., rows, columns])


def recognise(dataset: xr.Dataset, options: Options, where: str = "the dataset") -> Recognised:
    """Recognise the axes and numbers of a dataset.

    Raises:
        InvalidInput: Something is absent or ambiguous; the message names the option that answers.
        UnknownName: A name that was given is not in the dataset.
    """
    x, y = (_spatial(dataset, axis, getattr(options, axis), where) for axis in ("x", "y"))
    time_dim = _time_dim(dataset, options.time, {x, y}, where)
    chosen = _bands(dataset, options, x, y, time_dim, where)
    has_time = [time_dim is not None and time_dim in array.dims for _, array in chosen]
    if any(has_time) and not all(has_time):
        without = [name for (name, _), dated in zip(chosen, has_time, strict=True) if not dated]
        raise InvalidInput(f"{where}: {', '.join(without)} have no time, and the others have; choose with --bands")
    if not any(has_time):
        time_dim = None
    grid, flip = _grid(dataset, [array for _, array in chosen], x, y, options.crs, where)
    if time_dim is None:
        times: tuple[str, ...] = (
            () if options.time is None or options.time in dataset.variables else (_iso(options.time, where),)
        )
        order = tuple(range(len(times)))
    else:
        times, order = _times(dataset, time_dim, where)
    dims = (time_dim, y, x) if time_dim is not None else (y, x)
    bands = tuple(_numbers(name, array.transpose(*dims), options, where) for name, array in chosen)
    return Recognised(bands, grid, times, order, flip, time_dim)


def _spatial(dataset: xr.Dataset, axis: str, asked: str | None, where: str) -> str:
    """Return the name of the coordinate of columns ("x") or rows ("y")."""
    if asked is not None:
        if asked not in dataset.dims:
            raise UnknownName.of("dimension", asked, [str(d) for d in dataset.dims], f"{where} (--{axis})")
        return asked
    standard, names = (_X, _X_NAMES) if axis == "x" else (_Y, _Y_NAMES)
    coordinates = {str(name): one for name, one in dataset.variables.items() if one.dims == (name,)}
    found = [
        name for name, one in coordinates.items()
        if one.attrs.get("standard_name") in standard or str(one.attrs.get("axis", "")).upper() == axis.upper()
    ] or [name for name in coordinates if name.lower() in names]  # fmt: skip
    if len(found) != 1:
        what = f"{len(found)} ({', '.join(found)})" if found else f"none of its dimensions {_listed(dataset.dims)}"
        raise InvalidInput(
            f"{where}: expected one coordinate of {'columns' if axis == 'x' else 'rows'}, found {what}; name it with "
            f"--{axis} NAME"
        )
    return found[0]


def _time_dim(dataset: xr.Dataset, asked: str | None, taken: set[str], where: str) -> str | None:
    """Return the name of the time dimension, or None."""
    if asked is not None and asked in dataset.dims:
        return asked
    if asked is not None and not re.match(r"\d{4}", asked):
        raise UnknownName.of("dimension", asked, [str(d) for d in dataset.dims], f"{where} (--time)")
    found = [
        str(name) for name in dataset.dims
        if name not in taken and name in dataset.variables and _is_time(dataset.variables[name])
    ]  # fmt: skip
    if len(found) > 1:
        raise InvalidInput(f"{where} has several dimensions of time ({', '.join(found)}); name one with --time NAME")
    return found[0] if found else None


def _is_time(variable: Any) -> bool:
    return (
        variable.dtype.kind == "M"
        or _SINCE.match(str(variable.attrs.get("units", ""))) is not None
        or variable.attrs.get("standard_name") == "time"
    )


def _bands(
    dataset: xr.Dataset, options: Options, x: str, y: str, time_dim: str | None, where: str
) -> list[tuple[str, xr.DataArray]]:
    """List the bands with their arrays, in the order asked for."""
    known = {x, y} | ({time_dim} if time_dim else set())
    plain: dict[str, xr.DataArray] = {}
    stacked: dict[str, tuple[str, xr.DataArray]] = {}
    unclear: list[str] = []
    for name, array in dataset.data_vars.items():
        if not {x, y} <= set(array.dims):
            continue
        rest = [str(dim) for dim in array.dims if dim not in known]
        if not rest:
            plain[str(name)] = array
        elif len(rest) == 1 and _is_band_dim(dataset, rest[0], options.band_dim):
            stacked[str(name)] = (rest[0], array)
        else:
            unclear.append(f"{name} ({', '.join(map(str, array.dims))})")
    if options.variable is not None:
        if options.variable in plain:
            stacked = {}
            plain = {options.variable: plain[options.variable]}
        elif options.variable in stacked:
            plain, stacked = {}, {options.variable: stacked[options.variable]}
        else:
            raise UnknownName.of("variable", options.variable, [*plain, *stacked], f"{where} (--variable)")
    if not plain and not stacked:
        if unclear:
            raise InvalidInput(
                f"{where}: the dimensions of {unclear[0]} are ambiguous: {x} and {y} are columns and rows"
                f"{f', {time_dim} is time' if time_dim else ', and none is known to be time'}; name the others with "
                "--time NAME or --band-dim NAME"
            )
        raise InvalidInput(f"{where} has no variable on {y} and {x}; it has {_listed(dataset.data_vars)}")
    if stacked and (len(stacked) > 1 or (plain and not options.bands)):
        raise InvalidInput(
            f"{where}: bands are variables ({_listed(plain) or 'none'}) or lie along a dimension "
            f"({', '.join(f'{n} along {d}' for n, (d, _) in stacked.items())}); choose with --variable NAME or --bands"
        )
    bands = dict(plain)
    for dim, array in stacked.values():
        labels = _labels(dataset, dim, array.sizes[dim], options, where)
        bands |= {label: array.isel({dim: number}) for number, label in enumerate(labels)}
    names = options.bands or tuple(bands)
    unknown = [name for name in names if name not in bands]
    if unknown:
        raise UnknownName.of("band", unknown, list(bands), f"{where} (--bands)")
    return [(name, bands[name]) for name in names]


def _is_band_dim(dataset: xr.Dataset, dim: str, asked: str | None) -> bool:
    if asked is not None:
        return dim == asked
    labelled = dim in dataset.variables and dataset.variables[dim].dtype.kind in "OSUT"
    return labelled or dim.lower() in _BAND_NAMES


def _labels(dataset: xr.Dataset, dim: str, size: int, options: Options, where: str) -> list[str]:
    if dim in dataset.variables and dataset.variables[dim].dtype.kind in "OSUT":
        return [one.decode() if isinstance(one, bytes) else str(one) for one in dataset.variables[dim].values.tolist()]
    if len(options.bands) == size:
        return list(options.bands)  # names in the order in which the bands lie
    raise InvalidInput(
        f"{where}: the {size} bands along {dim} have no names; give all {size} with --bands A,B,…, in their order"
    )


def _grid(
    dataset: xr.Dataset, arrays: Sequence[xr.DataArray], x: str, y: str, asked: str | None, where: str
) -> tuple[Grid, tuple[bool, bool]]:
    """Return the north-up grid, and whether rows and columns must be turned."""
    west, rx, back_x = _axis(dataset, x, where)
    south, ry, back_y = _axis(dataset, y, where)
    crs = normal_crs(asked) if asked is not None else _stated_crs(dataset, arrays, where)
    height, width = dataset.sizes[y], dataset.sizes[x]
    left, top = west - rx / 2, south + ry * (height - 1) + ry / 2
    grid = Grid(crs, (rx, 0.0, _plain(left, rx), 0.0, -ry, _plain(top, ry)), (height, width))
    try:
        check_on_earth(grid)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}; give the CRS of {x} and {y} with --crs") from error
    return grid, (not back_y, back_x)


def _axis(dataset: xr.Dataset, name: str, where: str) -> tuple[float, float, bool]:
    """Return the smallest coordinate, the step, and whether the coordinates descend."""
    if name not in dataset.variables:
        raise InvalidInput(f"{where}: dimension {name} has no coordinates, so the place of its pixels is unknown")
    values = np.asarray(dataset.variables[name].values, np.float64)
    if values.size < 2:
        raise InvalidInput(f"{where}: {name} has {values.size} pixels, and at least 2 are needed to know their size")
    step = (values[-1] - values[0]) / (values.size - 1)
    if not np.isfinite(values).all() or step == 0:
        raise InvalidInput(f"{where}: the coordinates of {name} are not finite and different")
    step = float(f"{step:.12g}")
    close = float(f"{step:.6g}")  # 0.1 in float32 is 0.10000000149
    if abs(close - step) * values.size < abs(step) * _EVEN_PX:
        step = close
    even = values[0] + step * np.arange(values.size)
    rounding = np.finfo(np.float32).eps * np.abs(values).max() if dataset.variables[name].dtype == np.float32 else 0.0
    if (np.abs(values - even) > abs(step) * _EVEN_PX + rounding).any():
        raise InvalidInput(f"{where}: the coordinates of {name} are not evenly spaced; resample the data first")
    return float(min(values[0], values[-1])), abs(step), step < 0


def _plain(value: float, size: float) -> float:
    """Return an edge without the noise of a division: a whole number of hundredths of a pixel, where it is one."""
    steps = value / size * 100
    return round(steps) * size / 100 if abs(steps - round(steps)) < 1e-4 else value


def _stated_crs(dataset: xr.Dataset, arrays: Sequence[xr.DataArray], where: str) -> str:
    """Return the CRS that the metadata state."""
    mappings = {str(one.attrs.get("grid_mapping") or one.encoding.get("grid_mapping") or "") for one in arrays} - {""}
    named = [name.split(":")[0].strip() for name in sorted(mappings)]
    if not named:
        named = [str(n) for n, v in dataset.variables.items() if v.ndim == 0 and "grid_mapping_name" in v.attrs]
    texts: list[Any] = []
    for name in named:
        if name in dataset.variables:
            attributes = dataset.variables[name].attrs
            wkt = attributes.get("crs_wkt") or attributes.get("spatial_ref")
            texts.append(wkt if wkt else dict(attributes) if "grid_mapping_name" in attributes else None)
    holders = (*(one.attrs for one in arrays), dataset.attrs)
    texts = [text for text in texts if text] or [h["crs"] for h in holders if isinstance(h.get("crs"), str)]
    found = sorted({_crs_of(text, where) for text in texts})
    if len(found) != 1:
        what = (
            f"{len(found)} coordinate reference systems ({', '.join(found)})"
            if found
            else "no coordinate reference system"
        )
        raise InvalidInput(f"{where} states {what}; give it with --crs EPSG:N")
    return found[0]


def _crs_of(text: Any, where: str) -> str:
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    if isinstance(text, dict):
        try:
            return normal_crs(CRS.from_cf(text).to_wkt())
        except (CRSError, KeyError, ValueError) as error:
            raise InvalidInput(
                f"{where}: its grid mapping is not a CRS ({error}); give it with --crs EPSG:N"
            ) from error
    code = re.fullmatch(r"\s*(?:\+init=)?epsg:(\d+)\s*", str(text), re.IGNORECASE)
    return normal_crs(f"EPSG:{code[1]}" if code else str(text))


def _times(dataset: xr.Dataset, dim: str, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the times as ISO 8601 UTC, ascending, and the position of each in the dataset."""
    import xarray as xr

    if dim not in dataset.variables:
        raise InvalidInput(f"{where}: dimension {dim} has no coordinates, so its times are unknown")
    variable = dataset.variables[dim]
    try:
        if variable.dtype.kind == "M":
            moments = variable.values
        elif variable.dtype.kind in "OSUT":
            moments = np.array([str(one).removesuffix("Z") for one in variable.values.tolist()], "datetime64[s]")
        else:
            moments = xr.coding.times.CFDatetimeCoder(use_cftime=False).decode(variable, name=dim).values
        seconds = moments.astype("datetime64[s]")
    except Exception as error:
        raise InvalidInput(
            f"{where}: the times of {dim} cannot be read ({str(error).splitlines()[0][:120]}); name another dimension "
            "with --time"
        ) from error
    if seconds.dtype.kind != "M" or np.isnat(seconds).any():
        raise InvalidInput(f"{where}: {dim} holds values that are no times; name another dimension with --time")
    order = np.argsort(seconds, kind="stable")
    texts = [str(one) for one in seconds[order]]
    if len(set(texts)) != len(texts):
        twice = next(one for one, after in itertools.pairwise(texts) if one == after)
        raise InvalidInput(f"{where}: the time {twice} occurs twice; combine these steps first, or take one of them")
    return tuple(texts), tuple(int(n) for n in order)


def _iso(text: str, where: str) -> str:
    try:
        return str(np.datetime64(text.removesuffix("Z"), "s"))
    except ValueError as error:
        raise InvalidInput(f"{where}: --time {text!r} is neither a dimension nor a time such as 2021-05-01") from error


def _numbers(name: str, array: xr.DataArray, options: Options, where: str) -> Band:
    """Return what the numbers of one band mean."""
    stated: Mapping[str, Any] = array.attrs  # of a decoded dataset they are gone, and so is what they state
    dtype = array.dtype
    if dtype.kind not in "iufb":
        raise InvalidInput(f"{where}: {name} holds {dtype}, expected numbers; choose others with --bands")
    unsigned = dtype.kind == "i" and str(stated.get("_Unsigned", "")).lower() == "true"
    if unsigned:
        dtype = np.dtype(f"u{dtype.itemsize}")
    nodata: float | None
    others: tuple[float, ...] = ()
    valid: tuple[float, float] | None = None
    if options.nodata == "none":
        nodata = None
    elif options.nodata is not None:
        given = float(options.nodata)
        nodata = None if math.isnan(given) else given
    else:
        fills = [
            value
            for key in ("_FillValue", "missing_value", "nodata", "NoData")
            for value in _stated_numbers(stated.get(key), dtype, unsigned, f"{where}: {key} of {name}")
        ]
        valid = _valid_range(array.rename(name), dtype, unsigned, where)
        if not fills and valid is None and dtype.kind != "f":
            raise InvalidInput(
                f"{where}: {name} holds {dtype} and states no number for pixels without data; give it with --nodata N, "
                "or say --nodata none where every pixel has data"
            )
        known = [value for value in dict.fromkeys(fills) if not np.isnan(value)]
        nodata, others = (known[0], tuple(known[1:])) if known else (None, ())
        if not fills and dtype.kind == "f":
            others = (_DEFAULT_FILL,)
    scale = float(stated.get("scale_factor", 1.0)) if options.scale is None else options.scale
    offset = float(stated.get("add_offset", 0.0)) if options.offset is None else options.offset
    if not (np.isfinite(scale) and np.isfinite(offset)) or scale == 0:
        raise InvalidInput(f"{where}: {name} has scale {scale:g} and offset {offset:g}, which no number has")
    unit = str(array.attrs.get("units") or "") if options.unit is None else options.unit
    return Band(name, array, dtype, nodata, scale, offset, unit.strip() or "1", others, valid)


def _stated_numbers(stated: Any, dtype: np.dtype[Any], unsigned: bool, what: str) -> list[float]:
    """Return the numbers of an attribute that has none, one or several, in the range of the band's type."""
    if stated is None:
        return []
    try:
        numbers = [float(one) for one in np.asarray(stated).ravel().tolist()]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{what} is {stated!r}, expected a number; give --nodata N or --nodata none") from error
    return [one + 2.0 ** (8 * dtype.itemsize) if unsigned and one < 0 else one for one in numbers]


def _valid_range(array: xr.DataArray, dtype: np.dtype[Any], unsigned: bool, where: str) -> tuple[float, float] | None:
    """Return the smallest and largest number that is data, by the attributes of CF; None where nothing is stated.

    Whole numbers of the attributes are of the packed data and floats of the unpacked, whatever xarray has decoded.
    """
    stated, what = array.attrs, f"{where}: {array.name}"
    both = _stated_numbers(stated.get("valid_range"), dtype, unsigned, f"{what}: valid_range")
    low = _stated_numbers(stated.get("valid_min"), dtype, unsigned, f"{what}: valid_min") or both[:1]
    high = _stated_numbers(stated.get("valid_max"), dtype, unsigned, f"{what}: valid_max") or both[1:2]
    if not low and not high:
        return None
    least, most = (low or [-math.inf])[0], (high or [math.inf])[0]
    if least > most:
        raise InvalidInput(f"{what} says that valid numbers are {least:g} … {most:g}; give --nodata N or --nodata none")
    packing = stated if {"scale_factor", "add_offset"} & stated.keys() else array.encoding
    scale, offset = float(packing.get("scale_factor", 1.0)), float(packing.get("add_offset", 0.0))
    if (scale, offset) == (1.0, 0.0) or scale == 0:
        return least, most
    packed = packing is stated
    of_packed = all(np.asarray(stated[key]).dtype.kind in "iu" for key in _VALID if key in stated)
    if packed == of_packed:
        return least, most
    ends = [(end - offset) / scale if packed else end * scale + offset for end in (least, most)]
    slack = _EVEN_PX if packed else abs(scale) / 2  # half a step of the packed numbers, for rounding
    return min(ends) - slack, max(ends) + slack


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
