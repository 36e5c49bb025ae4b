"""`ModalitySource` is one modality of the network `multimodal`, open for reading: a collection, or a static layer.

Each date of the collection that gives the windows is paired with dates of the modality: the nearest one, so many of
the nearest, or all (`data.modalities.NAME.dates`). A date that is further away than `most_days` counts as missing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.config import DataConfig, ModalityConfig
from jaxtrain.data.arrays import HostBatch, Rows
from jaxtrain.data.ground import cube_digest
from jaxtrain.data.numbers import BandNumbers, Conversion, convert_to, cube_numbers, unlike_moments
from jaxtrain.data.reader import OnUnreadable, WindowReader
from jaxtrain.data.windows import window_shares
from jaxtrain.models.modality import Modality
from zarr_store.errors import IntegrityError, InvalidInput, NotACube, UnknownName
from zarr_store.labels import LabelLayer
from zarr_store.layers import StaticLayer, open_layer
from zarr_store.nesting import nesting_factor
from zarr_store.read import Cube, open_cube
from zarr_store.spec import CubeSpec
from zarr_store.steps import nearest_times

__all__ = ["ModalitySource", "open_sources", "pair_steps", "seen_by_window", "sources_digest"]

_LEAST_POWER = np.float32(1e-10)
"""Smallest power that is turned into decibels, -100 dB; smaller powers count as this one."""


@dataclass(frozen=True)
class ModalitySource:
    """One modality that is open for reading.

    Attributes:
        modality: Its description for the network: name, bands, ratio of pixel sizes, number of dates.
        steps: int32 (times, dates): for each time step of the windows, the paired ones of the modality, -1 for none.
        numbers: Meaning of the stored numbers of each band.
        digest: SHA-256 over all bytes of it.
        reader: Reads its bands, on its own grid; None for a layer, and for a modality that the cube lacks.
        layer: The static layer; None for a collection.
        decibel: Whether power is turned into decibels.
        conversion: Turns numbers of other data into those of training.
    """

    modality: Modality
    steps: npt.NDArray[np.int32]
    numbers: tuple[BandNumbers, ...]
    digest: str
    reader: WindowReader | None = None
    layer: StaticLayer | None = None
    decibel: bool = False
    conversion: Conversion | None = None

    @property
    def side(self) -> int:
        """Side of a window on its own grid, pixels."""
        assert self.reader is not None
        return self.reader.patch

    def begin(self, rows: Rows, patch: int, *, images: bool = True) -> Callable[[], HostBatch]:
        """Start to read windows (time, y, x) of the finest grid, each `patch` pixels wide.

        Args:
            rows: Windows.
            patch: Side of a window on the finest grid.
            images: False reads only which pixels were observed.

        Returns:
            A function that waits and returns image (B, [T,] C, h, w), observed (B, [T,] h, w), clear (B, h, w), and for
            a series the day of the year (B, T).
        """
        if self.layer is not None:
            return lambda: self._read_layer(rows, patch)
        if self.reader is None:
            return lambda: self._read_nothing(len(rows), patch // self.modality.ratio)
        ratio, reader, chosen = self.modality.ratio, replace(self.reader, images=images), self.steps[rows[:, 0]]
        count, times = chosen.shape
        flat = np.stack([chosen.ravel(), *(np.repeat(rows[:, i] // ratio, times) for i in (1, 2))], axis=1)
        there = flat[:, 0] >= 0
        wait = reader.begin(np.ascontiguousarray(flat[there].astype(np.int32))) if there.any() else None

        def finish() -> HostBatch:
            found = {} if wait is None else wait()
            side, bands = reader.patch, len(reader.bands)
            image: npt.NDArray[Any]
            if not images:
                image = np.zeros((0,))
            elif there.all():
                image = self._numbers(found["image"])
            else:
                image = np.zeros((len(flat), bands, side, side), np.float32)
                if there.any():
                    numbers = self._numbers(found["image"])
                    image = image.astype(numbers.dtype)
                    image[there] = numbers
                else:
                    image = self._numbers(image.astype(reader.cube.spec(reader.collection).array(_kind(reader)).dtype))
            masks = {}
            for name in ("observed", "clear"):
                masks[name] = np.zeros((len(flat), side, side), np.uint8)
                if there.any():
                    masks[name][there] = found[name]
            series = (times,) if self.modality.dates else ()
            result = {
                "observed": masks["observed"].reshape(count, *series, side, side),
                "clear": masks["clear"].reshape(count, times, side, side).max(axis=1),
            }
            if images:
                result["image"] = image.reshape(count, *series, bands, side, side)
            if series:
                result["day"] = self._days(chosen)
            return result

        return finish

    def _numbers(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return stored numbers as the network takes them: converted, and in decibels if asked for."""
        converted = image if self.conversion is None else self.conversion.apply(image)
        if not self.decibel:
            return converted
        power = np.maximum(np.nan_to_num(converted.astype(np.float32)), _LEAST_POWER)
        return np.asarray(np.float32(10) * np.log10(power))

    def _days(self, chosen: npt.NDArray[np.int32]) -> npt.NDArray[np.uint16]:
        assert self.reader is not None
        moments = self.reader.cube.spec(self.reader.collection).time_values.astype("datetime64[D]")
        since = (moments - moments.astype("datetime64[Y]")).astype(np.int64) + 1
        return np.asarray(np.where(chosen >= 0, since[chosen], 1).astype(np.uint16))

    def moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Return mean and standard deviation of the stored numbers of each band, from the ledger; None if unknown."""
        if self.layer is not None:
            known = self.layer.statistics
            return None if known is None else (np.array([known.mean]), np.array([known.std or 1.0]))
        if self.reader is None or self.reader.index is None or not self.reader.index.observed.any():
            return None
        mean, spread = self.reader.index.statistics()
        chosen = list(self.reader.bands)
        return mean[chosen], spread[chosen]

    def unlike(self, mean: npt.ArrayLike, std: npt.ArrayLike, url: str) -> list[str]:
        """Return a warning if the numbers probably have another unit than those that the model was trained on.

        Args:
            mean: Mean of each band in training.
            std: Standard deviation of each band in training.
            url: The cube, for the message.
        """
        known = self.moments()
        if known is None:
            return []
        there, spread = known
        if self.conversion is not None:
            gain, shift = np.array(self.conversion.gain), np.array(self.conversion.shift)
            there, spread = there * gain + shift, spread * np.abs(gain)
        if self.decibel:  # the mean in decibels is near that of the mean power; the spread is not known
            there, spread = 10 * np.log10(np.maximum(there, float(_LEAST_POWER))), np.asarray(std)
        return unlike_moments(mean, std, there, spread, f"modality {self.modality.name} of {url}")

    def check_power(self, where: str) -> None:
        """Refuse to turn numbers into decibels that cannot be power.

        Raises:
            InvalidInput: They are decibels already, by their unit or because their mean is not above 0.
        """
        if not self.decibel:
            return
        name = self.modality.name
        stated = [one for one in self.numbers if one.unit.strip().lower() in ("db", "decibel", "decibels")]
        if stated:
            raise InvalidInput(
                f"data.modalities.{name}.decibel: band {stated[0].band} of {where} is in {stated[0].unit} already: "
                "leave decibel out"
            )
        known = self.moments()
        if known is None:
            return
        conversion = self.conversion or Conversion((1.0,) * len(self.numbers), (0.0,) * len(self.numbers))
        power = known[0] * np.array(conversion.gain) + np.array(conversion.shift)
        if (power <= 0).any():
            band = int(np.argmax(power <= 0))
            raise InvalidInput(
                f"data.modalities.{name}.decibel turns power into decibels, but band {self.modality.bands[band]} of "
                f"{where} has the mean {power[band]:.4g}, but power is above 0: leave decibel out if the numbers are "
                "decibels already"
            )

    def _read_nothing(self, count: int, side: int) -> HostBatch:
        series = (self.modality.dates,) if self.modality.dates else ()
        days = {"day": np.ones((count, *series), np.uint16)} if series else {}
        return {
            "image": np.zeros((count, *series, len(self.modality.bands), side, side), np.float32),
            "observed": np.zeros((count, *series, side, side), np.uint8),
            "clear": np.zeros((count, side, side), np.uint8),
            **days,
        }

    def _read_layer(self, rows: Rows, patch: int) -> HostBatch:
        assert self.layer is not None
        image = np.zeros((len(rows), 1, patch, patch), np.float32)
        seen = np.zeros((len(rows), patch, patch), np.uint8)
        height, width = self.layer.shape
        for i, (_, y, x) in enumerate(rows.tolist()):
            box = self.layer.read(slice(y, min(y + patch, height)), slice(x, min(x + patch, width)))
            known = np.isfinite(box) if self.layer.kind == "values" else box != 255
            image[i, 0, : box.shape[0], : box.shape[1]] = np.where(known, box, 0)
            seen[i, : box.shape[0], : box.shape[1]] = known
        return {"image": self._numbers(image), "observed": seen, "clear": seen}


def open_sources(
    config: DataConfig,
    cube: Cube,
    *,
    trained: Sequence[Modality] = (),
    numbers: Sequence[BandNumbers] = (),
    usual: tuple[Sequence[float], Sequence[float]] | None = None,
    without: Sequence[str] = (),
    insist: bool = False,
    on_unreadable: OnUnreadable | None = None,
) -> tuple[tuple[ModalitySource, ...], list[str]]:
    """Open all modalities of a configuration.

    Args:
        config: The data of the run.
        cube: The cube that gives the windows.
        trained: Modalities of a trained model, whose bands are read; none for a new run.
        numbers: Meaning of the numbers of that model, of all bands of all modalities one after the other.
        usual: Mean and standard deviation of each of these bands in training; unlike data give a warning.
        without: Modalities that the network does not get; the cube may lack them.
        insist: Use numbers that cannot be converted as they are, and warn.
        on_unreadable: The argument of `WindowReader`.

    Returns:
        The modalities, and messages about numbers that are converted, or unlike those of training.

    Raises:
        UnknownName: A cube lacks a collection, a layer or a band.
        InvalidInput: Grids do not nest, a window is not a whole number of pixels of a modality, or no dates are near.
    """
    spec = cube.spec(config.collection)
    if spec.grid != cube.grid:
        raise InvalidInput(
            f"data.collection {config.collection} of {cube.url} has pixels of {spec.grid.resolution[0]:g} m, and "
            f"labels lie on the finest grid: name {cube.collections[0]}, and {config.collection} in data.modalities"
        )
    known = {one.name: one for one in trained}
    found: list[ModalitySource] = []
    lines: list[str] = []
    first = 0
    for name, one in config.modalities.items():
        bands = known[name].bands if name in known else one.bands
        opener = _open_layer if one.layer else _open_collection
        last = first + len(bands)
        try:
            there = cube if not one.cube else _open_other(name, one.cube, config, cube, bool(trained))
            source = opener(name, one.model_copy(update={"bands": bands}), config, cube, there, on_unreadable)
            if numbers:
                last = first + len(source.numbers)
                conversion, notes = convert_to(numbers[first:last], source.numbers, there.url, insist=insist)
                source = replace(source, conversion=conversion)
                lines += notes
            source.check_power(there.url)
            if name in known and source.modality != known[name]:
                raise InvalidInput(
                    f"modality {name} of {there.url} has {_described(source.modality)}, the model was trained on "
                    f"{_described(known[name])}; give data on such a grid with such dates"
                )
            if usual is not None and name not in without:
                lines += source.unlike(usual[0][first:last], usual[1][first:last], there.url)
        except (InvalidInput, NotACube):
            if name not in without or name not in known:
                raise
            source = _absent(known[name], len(spec.times))
        found.append(source)
        first = last
    return tuple(found), lines


def _absent(one: Modality, times: int) -> ModalitySource:
    """Return a modality that is missing everywhere, for a model that works without it."""
    return ModalitySource(one, np.full((times, max(one.dates, 1)), -1, np.int32), (), "")


def _described(one: Modality) -> str:
    dates = f"{one.dates} dates" if one.dates else "one date"
    return f"pixels of {one.ratio} × the finest and {dates}"


def _open_other(name: str, url: str, config: DataConfig, cube: Cube, trained: bool) -> Cube:
    if trained and "://" in url:
        raise InvalidInput(
            f"the run reads modality {name} from {url}. A run may come from somebody else, so a URL in it is never "
            f"opened by itself: put the modality into the cube, or leave it out with --without {name}"
        )
    try:
        return open_cube(url)
    except NotACube:
        # moved together with the cube of the windows, whose place is known
        beside = Path(cube.url).parent / os.path.relpath(url, Path(str(config.cube)).parent)
        if "://" in f"{url} {cube.url} {config.cube}" or not beside.is_dir():
            raise
        return open_cube(beside)


def _open_layer(
    name: str, one: ModalityConfig, config: DataConfig, cube: Cube, there: Cube, on_unreadable: OnUnreadable | None
) -> ModalitySource:
    del on_unreadable
    layer = open_layer(there, one.layer)
    if layer.shape != cube.grid.shape:
        raise InvalidInput(
            f"data.modalities.{name}: layer {one.layer} of {there.url} has {layer.shape[0]}×{layer.shape[1]} pixels, "
            f"{cube.url} has {cube.grid.height}×{cube.grid.width}: put it onto that cube with `terrashard stack`"
        )
    times = len(cube.spec(config.collection).times)
    numbers = (BandNumbers(one.layer, "layer", layer.dtype, layer.unit),)
    return ModalitySource(
        Modality(name, (one.layer,)), np.zeros((times, 1), np.int32), numbers, layer.digest, layer=layer,
        decibel=one.decibel,
    )  # fmt: skip


def _open_collection(
    name: str, one: ModalityConfig, config: DataConfig, cube: Cube, there: Cube, on_unreadable: OnUnreadable | None
) -> ModalitySource:
    collection = one.collection or config.collection
    if collection not in there.collections:
        where = f"{there.url} (data.modalities.{name}.collection)"
        raise UnknownName.of("collection", collection, there.collections, where)
    spec, main = there.spec(collection), cube.spec(config.collection)
    ratio = nesting_factor(main.grid, spec.grid)
    if config.patch % ratio:
        raise InvalidInput(
            f"data.patch {config.patch} must be a multiple of {ratio}: one pixel of {collection} (data.modalities."
            f"{name}) is {ratio} pixels of {config.collection}"
        )
    positions = spec.find_bands(one.bands, option=f"data.modalities.{name}.bands")
    wanted = config.dates if one.dates == 0 else one.dates
    steps = pair_steps(main, spec, wanted, one.most_days)
    if not (steps >= 0).any():
        gap = np.abs(main.time_values[:, None] - spec.time_values[None, :]).min() / np.timedelta64(86_400, "s")
        raise InvalidInput(
            f"data.modalities.{name}: no date of {collection} lies within most_days = {one.most_days:g} of one of "
            f"{config.collection} (the nearest is {gap:.1f} days away): raise most_days, or ingest nearer dates"
        )
    dates = 0 if wanted == 1 else steps.shape[1]
    names = tuple(spec.band_names[i] for i in positions)
    reader = WindowReader(
        there, collection, positions, config.patch // ratio, config.learn_masked, index=there.index(collection),
        lenient=True, on_unreadable=_on_finest(on_unreadable, ratio),
    )  # fmt: skip
    return ModalitySource(
        Modality(name, names, ratio, dates), steps, cube_numbers(spec, positions), cube_digest(there, collection),
        reader=reader, decibel=one.decibel,
    )  # fmt: skip


def pair_steps(ours: CubeSpec, theirs: CubeSpec, dates: int | str, most_days: float) -> npt.NDArray[np.int32]:
    """Return the time steps of one collection for each step of another, int32 (times, dates), -1 where none is near.

    Args:
        ours: The collection of the windows.
        theirs: The collection of the modality.
        dates: Number of the nearest time steps to take, in their order; or "all".
        most_days: Largest distance in days; a time step further away counts as missing, unless all are taken.
    """
    if dates == "all":
        return np.tile(np.arange(len(theirs.times), dtype=np.int32), (len(ours.times), 1))
    if dates == 1:
        return nearest_times(ours.time_values, theirs.time_values, most_days=most_days).index.astype(np.int32)[:, None]
    gap = np.abs((theirs.time_values[None, :] - ours.time_values[:, None]).astype("timedelta64[s]").astype(np.int64))
    nearest = np.sort(np.argsort(gap, axis=1, kind="stable")[:, : int(dates)], axis=1)
    near = np.take_along_axis(gap, nearest, axis=1) <= most_days * 86_400
    return np.where(near, nearest, -1).astype(np.int32)


def seen_by_window(
    sources: Sequence[ModalitySource], spec: CubeSpec, patch: int, learn_masked: bool
) -> npt.NDArray[np.float64]:
    """Estimate the share of each window that any modality observed, (times, rows, columns) of the finest grid."""
    rows, columns = (-(-size // patch) for size in spec.shape[1:])
    best = np.zeros((len(spec.times), rows, columns))
    dated = [source for source in sources if source.reader is not None]
    for source in dated:
        assert source.reader is not None
        index = source.reader.index
        assert index is not None
        shape = source.reader.cube.spec(source.reader.collection).shape
        seen = index.observed + index.masked if learn_masked else index.observed
        here = window_shares(index, shape, source.side, seen / np.maximum(index.pixels, 1), edges=True)
        # step -1, a missing date, takes the last entry, which is zero
        every = np.concatenate([here, np.zeros_like(here[:1])])
        best = np.maximum(best, every[source.steps].max(axis=1))
    return best if dated else np.ones_like(best)


def sources_digest(sources: Sequence[ModalitySource], label: LabelLayer | None) -> str:
    """Return one SHA-256 of all modalities and the label layer."""
    parts = [f"{source.modality.name} {source.digest}" for source in sources]
    return hashlib.sha256("\n".join([*parts, label.digest if label is not None else ""]).encode()).hexdigest()


def _on_finest(on_unreadable: OnUnreadable | None, ratio: int) -> OnUnreadable | None:
    """Return `on_unreadable` for a modality, with windows placed on the finest grid; None for None."""
    if on_unreadable is None:
        return None
    report = on_unreadable

    def report_on_finest(row: npt.NDArray[np.int32], error: IntegrityError) -> None:
        report(row * np.array([1, ratio, ratio], np.int32), error)

    return report_on_finest


def _kind(reader: WindowReader) -> str:
    return reader.cube.spec(reader.collection).kind
