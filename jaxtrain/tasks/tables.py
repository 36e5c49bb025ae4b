"""Open a cube, a sample store or the vectors of `terrashard embed` as a `Table`."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.data.ground import cube_digest
from jaxtrain.tasks.cube_reader import BY_BANDS, Box, CubeReader
from jaxtrain.tasks.date_change import LOOKS, change_from_before, normal_ratio
from jaxtrain.tasks.network_reader import NetworkReader, Shows
from jaxtrain.tasks.table import Block, Feature, Kind, Table
from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.group import read_array
from zarr_store.promises import check_array
from zarr_store.read import open_cube
from zarr_store.samples import SampleStore, is_sample_store, open_samples

__all__ = ["VECTORS_IN_BLOCK", "CubeTable", "Dates", "SampleTable", "VectorTable", "change_from_before",
           "is_embedding", "open_table"]  # fmt: skip

Dates = Literal["mean", "stack", "change"]
"""Rule by which the dates of a cube become features: their mean, each date as features of its own, or how far the last
date is from the mean of those before it."""
Rule = Literal["mean", "stack", "change", "each"]
"""`Dates`, and for what shows the usual, each date of a pixel as a row of its own."""
VECTORS_IN_BLOCK = 1 << 18
"""Largest number of rows of a block of samples or vectors."""
_LEAST_SHARE = 0.5
"""Share of the dates that a pixel must have been seen on before its gaps are filled in time."""


class CubeTable:
    """The pixels of a cube.

    Args:
        reader: Reads the chosen bands and dates, or what a network makes of them.
        dates: "mean" has the bands as features, each the mean over the clear observations of a pixel. "stack" has each
            band of each date; gaps are filled linearly in time, in pixels that were seen on at least half of the dates.
            "change" has the last date less the mean of those before it; of radar it is the ratio of intensities, as a
            standard normal number. "each" has the bands as features, and a row for each date of a pixel.
        looks: Equivalent number of looks of radar, for its change.
    """

    kind: Kind = "cube"

    def __init__(self, reader: CubeReader | NetworkReader, dates: Rule = "mean", looks: float = LOOKS) -> None:
        self.reader = reader
        self.dates, self.looks = dates, looks
        # ratios of radar follow from their number of looks
        self._ratios = dates == "change" and reader.radar
        self.url = reader.cube.url
        plain = tuple(replace(one, unit="1") for one in reader.features) if self._ratios else reader.features
        if dates == "change" and len(reader.times) < 2:
            raise InvalidInput(
                f"--dates change compares the last date with those before it, and {self.url} has "
                f"{len(reader.times)} of the chosen; choose more with --time, or another rule"
            )
        self.features: tuple[Feature, ...] = tuple(
            replace(one, time=time) for time in reader.times for one in plain
        ) if dates == "stack" and len(reader.times) > 1 else plain  # fmt: skip
        chosen = [reader.spec.collection, reader.names, reader.times, dates,
                  *([reader.made_by] if reader.made_by else []), *([looks] if self._ratios else [])]  # fmt: skip
        self.digest = _digest(cube_digest(reader.cube, reader.spec.collection), chosen)
        self.description: dict[str, Any] = {
            "url": self.url, "collection": reader.spec.collection, "time": ",".join(map(str, reader.dates)),
            "dates": dates, **reader.asked, **({"looks": looks} if self._ratios else {}),
        }  # fmt: skip
        self.warnings, self.remedy = reader.warnings, reader.remedy

    def __len__(self) -> int:
        return len(self.reader.boxes)

    def read(self, number: int) -> Block:
        return self.read_box(self.reader.boxes[number])

    def read_box(self, box: Box) -> Block:
        """Read the pixels of any box."""
        values, clear = self.reader.read(box)
        shape: tuple[int, ...] = box.shape
        if self.dates == "change":
            made = normal_ratio(values, self.looks) if self._ratios else change_from_before(values)
            rows = made.reshape(len(values[0]), -1)
            observed = (clear[-1] & clear[:-1].any(axis=0)).ravel()
        elif self.dates == "mean" and len(values) > 1:
            seen = np.isfinite(values)
            count = seen.sum(axis=0, dtype=np.float32)
            total = np.where(seen, values, np.float32(0)).sum(axis=0, dtype=np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                rows = (total / count).astype(np.float32).reshape(len(values[0]), -1)
            observed = clear.any(axis=0).ravel()
        elif self.dates == "stack" and len(values) > 1:
            values = fill_in_time(values, self.reader.spec.time_values[list(self.reader.dates)])
            rows = values.reshape(-1, box.shape[0] * box.shape[1])
            observed = clear.any(axis=0).ravel()
        elif self.dates == "each" and len(values) > 1:
            rows, observed = np.moveaxis(values, 1, 0).reshape(len(values[0]), -1), clear.ravel()
            shape = (len(values), *box.shape)
        else:
            rows, observed = values.reshape(len(values[0]), -1), clear[0].ravel()
        width = self.reader.spec.grid.width
        block = _block(rows, observed, shape, (box.y0 * width + box.x0, width))
        return replace(block, dates=shape[0]) if len(shape) > 2 else block

    def features_without_numbers(self) -> tuple[str, ...]:
        return self.reader.bands_without_numbers()


class SampleTable:
    """The pixels of a sample store, whole samples in each block."""

    kind: Kind = "samples"

    def __init__(self, store: SampleStore, bands: str | tuple[str, ...] = ()) -> None:
        from zarr_store.lookup import find_bands

        self.store, self.url = store, store.url
        self.bands = find_bands(bands, store.spec.bands, f"store {store.url} (--bands)")
        units = [unit for _, _, unit in store.spec.scales] or [""] * len(store.spec.bands)
        self.features = tuple(Feature(store.spec.bands[at], units[at] or "stored") for at in self.bands)
        self.digest = _digest(store.digest, [self.bands])
        self.description: dict[str, Any] = {"url": self.url, "bands": tuple(one.name for one in self.features)}
        self.warnings: tuple[str, ...] = ()
        self.remedy = BY_BANDS
        height, width = store.spec.size
        self.samples_in_block = max(1, VECTORS_IN_BLOCK // (height * width))

    def __len__(self) -> int:
        return math.ceil(self.store.spec.count / self.samples_in_block)

    def read(self, number: int) -> Block:
        first = number * self.samples_in_block
        numbers = np.arange(first, min(first + self.samples_in_block, self.store.spec.count))
        images = self.store.images(numbers, self.bands).astype(np.float32)
        for column, position in enumerate(self.bands):
            if self.store.spec.scales:
                scale, offset, _ = self.store.spec.scales[position]
                images[:, column] = images[:, column] * np.float32(scale) + np.float32(offset)
        valid = self.store.valid(numbers).astype(bool)
        rows = images.transpose(1, 0, 2, 3).reshape(len(self.bands), -1)
        return _block(rows, valid.ravel(), valid.shape, (first * valid[0].size, valid.shape[-1]))

    def features_without_numbers(self) -> tuple[str, ...]:
        return ()


class VectorTable:
    """The vectors of `terrashard embed`."""

    kind: Kind = "vectors"

    def __init__(self, url: str) -> None:
        store = FolderStore.at(url)
        about = _embedding(store)
        if about is None:
            raise InvalidInput(f"{store.url}: expected vectors as `terrashard embed` makes them")
        shape = _shape(store, "embedding")
        self.url, self.about = store.url, about
        self.vectors: npt.NDArray[np.float32] = read_array(
            store, "embedding", lambda document, where: check_array(document, where, shape=shape, dtype="float32")
        )
        self.places = {
            name: _column(store, name, shape[0])
            for name in ("time", "y", "x", "name", "longitude", "latitude")
            if store.exists(f"{name}/zarr.json")
        }
        self.features = tuple(Feature(f"v{at}", "") for at in range(shape[1]))
        self.digest = _digest(hashlib.sha256(np.ascontiguousarray(self.vectors).tobytes()).hexdigest(), [about])
        self.description: dict[str, Any] = {"url": self.url}
        self.warnings: tuple[str, ...] = ()
        self.remedy = "vectors of another run"

    def __len__(self) -> int:
        return math.ceil(len(self.vectors) / VECTORS_IN_BLOCK)

    def read(self, number: int) -> Block:
        rows = np.ascontiguousarray(self.vectors[number * VECTORS_IN_BLOCK : (number + 1) * VECTORS_IN_BLOCK].T)
        there = np.ones(rows.shape[1], bool)
        return _block(rows, there, there.shape, (number * VECTORS_IN_BLOCK, 0))

    def features_without_numbers(self) -> tuple[str, ...]:
        return ()


def open_table(
    url: str,
    *,
    collection: str | None = None,
    bands: str | tuple[str, ...] = (),
    time: str | None = None,
    dates: Rule = "mean",
    looks: float = LOOKS,
    run: str | None = None,
    shows: Shows = "residual",
) -> Table:
    """Open data as rows of features.

    Args:
        url: A cube, a sample store, or vectors of `terrashard embed`.
        collection: Collection of a cube; None for its first.
        bands: Names of bands, and of indices that the cube holds; none for all bands.
        time: Dates of a cube; None for all.
        dates: Rule by which the dates of a cube become features.
        looks: Equivalent number of looks of radar, for its change.
        run: Run directory of an autoencoder; the features are then what it makes of a cube.
        shows: "residual" for the error of its reconstruction of each band, or "code".

    Raises:
        NotACube: It is none of them.
        InvalidInput: A choice does not apply to this kind of data.
    """
    if is_embedding(url) or is_sample_store(url):
        for option, given in (("--collection", collection), ("--time", time)):
            if given is not None:
                raise InvalidInput(f"{url} is not a cube: {option} does not apply to it; leave it out")
        if is_sample_store(url):
            return SampleTable(open_samples(url), bands)
        if bands:
            raise InvalidInput(f"{url} holds vectors, which have no bands: leave --bands out")
        return VectorTable(url)
    if run is not None:
        reader = NetworkReader(open_cube(url), run, shows, time=time)
        if bands or collection not in (None, reader.spec.collection):
            raise InvalidInput(
                f"{run} was trained on {reader.spec.collection}, bands {', '.join(reader.plain.names)}: leave out "
                "--bands and --collection"
            )
        return CubeTable(reader, dates)
    return CubeTable(CubeReader(open_cube(url), collection=collection, bands=bands, time=time), dates, looks)


def is_embedding(url: str) -> bool:
    """Return whether vectors of `terrashard embed` are at `url`."""
    return "://" not in url and _embedding(FolderStore.at(url)) is not None


def fill_in_time(values: npt.NDArray[np.float32], times: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Fill gaps of (time, band, y, x) linearly in time, with the nearest value before the first and after the last.

    Pixels with fewer than half of the dates keep their gaps.

    >>> series = np.array([1, np.nan, np.nan, 4], np.float32)[:, None, None, None]
    >>> fill_in_time(series, np.array(["2023-08-01", "2023-08-11", "2023-08-21", "2023-08-31"], "M8[s]")).ravel()
    array([1., 2., 3., 4.], dtype=float32)
    """
    seen = np.isfinite(values)
    if seen.all():
        return values
    day = (times - times[0]).astype("timedelta64[s]").astype(np.float64) / 86_400
    step = np.arange(len(values)).reshape(-1, 1, 1, 1)
    before = np.maximum.accumulate(np.where(seen, step, -1), axis=0)
    after = np.minimum.accumulate(np.where(seen, step, len(values))[::-1], axis=0)[::-1]
    low = np.where(before < 0, np.minimum(after, len(values) - 1), before)
    high = np.where(after >= len(values), np.maximum(before, 0), after)
    start, end = np.take_along_axis(values, low, 0), np.take_along_axis(values, high, 0)
    span = day[high] - day[low]
    share = np.where(span > 0, (day.reshape(-1, 1, 1, 1) - day[low]) / np.where(span > 0, span, 1.0), 0.0)
    filled = np.where(seen, values, start + (end - start) * share.astype(np.float32))
    filled[:, seen.mean(axis=0) < _LEAST_SHARE] = np.nan
    return filled.astype(np.float32)


def _block(
    rows: npt.NDArray[np.float32], observed: npt.NDArray[np.bool_], shape: tuple[int, ...], numbering: tuple[int, int]
) -> Block:
    """Return the block of the observed rows of (feature, row) that hold numbers in every feature."""
    finite = [np.isfinite(row) & observed for row in rows]
    whole = np.logical_and.reduce(finite)
    kept = None if whole.all() else np.flatnonzero(whole).astype(np.int32)
    counts = np.array([np.count_nonzero(one) for one in finite], np.int64)
    values = np.ascontiguousarray(rows) if kept is None else np.stack([np.take(row, kept) for row in rows])
    return Block(values, kept, shape, numbering, counts, int(np.count_nonzero(observed)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def _embedding(store: FolderStore) -> dict[str, Any] | None:
    try:
        about = load_json(store.read("zarr.json") or b"{}", store.where("zarr.json"))["attributes"]
        found = about["terrashard_embedding"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _shape(store: FolderStore, name: str) -> tuple[int, int]:
    try:
        rows, columns = load_json(store.read(f"{name}/zarr.json") or b"{}", store.where(name))["shape"]
        return int(rows), int(columns)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{store.where(name)}: the vectors' description is damaged ({error!r})") from error


def _column(store: FolderStore, name: str, rows: int) -> npt.NDArray[Any]:
    document = load_json(store.read(f"{name}/zarr.json") or b"{}", store.where(name))
    dtype = str(document.get("data_type"))
    if dtype not in ("string", "float64", "int64", "float32", "int32"):
        raise IntegrityError(f"{store.where(name)}: expected text or numbers, got {dtype}")
    found: npt.NDArray[Any] = read_array(
        store, name, lambda about, where: check_array(about, where, shape=(rows,), dtype=dtype)
    )
    return found
