"""`find_changes` fits a harmonic model to each pixel of a cube, and writes date, magnitude and kind of its breaks.

OUT/change.zarr   (break, y, x): break_date (days since 1970-01-01, 0 for none), magnitude, kind; (y, x): count
OUT/change.json   numbers of breaks by kind and year

Boxes are written one by one; a run that is stopped or killed continues with the next box, and the bytes are those of a
run that was never stopped.
"""

from __future__ import annotations

import json
import time as clock
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.display import result_table
from jaxtrain.tasks.cube_reader import CubeReader
from jaxtrain.tasks.folder import TaskFolder
from jaxtrain.tasks.harmonic import YEAR, Breaks, HarmonicModel, detect_breaks
from jaxtrain.tasks.layers import Layer, create_layers, open_layers
from jaxtrain.tasks.tables import CubeTable
from jaxtrain.tasks.work import LocalWorkers, TableRef, Workers
from zarr_store.crash import crashpoint
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.read import open_cube

__all__ = ["KINDS", "ChangeOptions", "ChangeResult", "find_changes"]

KINDS = ("none", "vegetation loss", "vegetation gain", "darker", "brighter")
"""Kinds of a break by value: NDVI falls or rises by a tenth; else the mean of the bands falls or rises."""
UNFOLLOWED = 255
"""Count of a pixel that no model could be fitted to."""
_NDVI = 0.1
_NONE = 0


@dataclass(frozen=True)
class ChangeOptions:
    """Options that determine changes, besides the data.

    Attributes:
        collection, bands, time: Selection of the data; see `CubeReader`.
        harmonics: Number of harmonics of the year.
        consecutive: Observations in a row that must deviate.
        probability: Share of usual observations within the limit.
        most: Most breaks of a pixel that are kept.
    """

    collection: str | None = None
    bands: str | tuple[str, ...] = ()
    time: str | None = None
    harmonics: int = 2
    consecutive: int = 6
    probability: float = 0.99
    most: int = 4

    def __post_init__(self) -> None:
        ranges = (("--harmonics", self.harmonics, 1, 3), ("--consecutive", self.consecutive, 2, 20),
                  ("--most", self.most, 1, 20))  # fmt: skip
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise InvalidInput(f"{name} {value}: expected {low} to {high}")
        if not 0.5 <= self.probability < 1:
            raise InvalidInput(f"--probability {self.probability:g}: expected 0.5 or more and below 1, such as 0.99")

    @property
    def model(self) -> HarmonicModel:
        """Rules for the model of a pixel."""
        return HarmonicModel(self.harmonics, self.consecutive, self.probability, most=self.most)


@dataclass(frozen=True, repr=False)
class ChangeResult:
    """The result of `find_changes`.

    Attributes:
        out: Folder of the results.
        breaks: Number of breaks of all pixels.
        changed: Number of pixels with a break.
        followed: Number of pixels that a model could be fitted to.
        unfollowed: Number of pixels with too few clear dates.
        kinds: Number of breaks of each kind.
        years: Number of breaks in each year.
        dates: Number of dates that were read.
        bands: Names of the bands.
        seconds: Wall time.
        warnings: Warnings about limits of the result.
    """

    out: str
    breaks: int
    changed: int
    followed: int
    unfollowed: int
    kinds: dict[str, int]
    years: dict[str, int]
    dates: int
    bands: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<ChangeResult {self.out}: {self.breaks:,} breaks in {self.followed:,} pixels>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return result_table(f"Changes {self.out}", {name: f"{count:,}" for name, count in self.kinds.items()})


@dataclass(frozen=True)
class _ChangeJob:
    ref: TableRef
    model: HarmonicModel

    def __call__(self, number: int) -> dict[str, npt.NDArray[Any]]:
        table = self.ref.table
        assert isinstance(table, CubeTable)
        reader = table.reader
        assert isinstance(reader, CubeReader)
        box = reader.boxes[number]
        values, _ = reader.read(box)
        days = _days(reader)
        found = detect_breaks(days, values.reshape(*values.shape[:2], -1), self.model, device=number)
        date = _dates(days, found.day)
        kind = _kinds(found, reader)
        count = np.where(found.fitted, np.minimum(found.count, UNFOLLOWED - 1), UNFOLLOWED).astype(np.uint8)
        return {
            "break_date": date.reshape(-1, *box.shape), "magnitude": found.magnitude.reshape(-1, *box.shape),
            "kind": kind.reshape(-1, *box.shape), "count": count.reshape(box.shape),
            "observations": found.observations.astype(np.uint16).reshape(box.shape),
        }  # fmt: skip


def find_changes(
    cube: str | PathLike[str],
    out: str | PathLike[str],
    options: ChangeOptions | None = None,
    *,
    workers: Workers | None = None,
    leads: bool = True,
    finish: Callable[[Path, ChangeResult], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ChangeResult:
    """Detect breaks in the time series of each pixel of a cube.

    Args:
        cube: A cube of several years.
        out: Folder of the results; it appears when they are complete. An earlier result of this task is replaced.
        options: Selection of the data, and the model.
        workers: Workers that compute; None takes all cores and devices of this process.
        leads: Whether this process writes the results; only one process of a run does.
        finish: Adds files to the folder before it appears; called with the folder and the result.
        on_progress: Called with (step, done, in all).

    Raises:
        InvalidInput: The cube has too few dates, or something else is at `out`.
        NothingFound: No pixel has enough clear observations.

    Example:
        >>> found = find_changes("zagreb.zarr", "zagreb_changes")
        >>> found.breaks
        0
    """
    began = clock.monotonic()
    options, workers = options or ChangeOptions(), workers or LocalWorkers()
    reader = CubeReader(
        open_cube(str(cube)), collection=options.collection, bands=options.bands, time=options.time
    )  # fmt: skip
    table = CubeTable(reader)
    _check_dates(reader, options.model)
    report = on_progress or (lambda step, done, total: None)
    # dates of these are other numbers than those of earlier releases, whose beginnings are not continued
    request = {"data": table.digest, "options": asdict(options), "dates": 2}
    folder = TaskFolder(str(out), "change", request) if leads else None
    with folder if folder is not None else nullcontext():
        state: dict[str, Any] = workers.share(folder.state if folder else {})
        done = int(state.get("done", 0))
        blocks = workers.map(_ChangeJob(TableRef.of(table), options.model), range(done, len(table)))
        if folder is None:
            for _ in blocks:
                pass
            return ChangeResult(str(out), 0, 0, 0, 0, {}, {}, len(reader.times), reader.names, 0.0, ())
        path = folder.path / "change.zarr"
        if not (path / "zarr.json").exists():
            _create(path, reader, options)
        layers: Any = open_layers(path, mode="r+")
        for number, found in zip(range(done, len(table)), blocks, strict=True):
            box = reader.boxes[number]
            for name, pixels in found.items():
                layers[name][..., box.y0 : box.y1, box.x0 : box.x1] = pixels
            crashpoint(f"change block written {number}")
            folder.keep({"done": number + 1})
            crashpoint(f"change block kept {number}")
            report("follow", number + 1, len(table))
        result = _count(str(out), layers, table, options)
        about = {name: value for name, value in result.to_dict().items() if name not in ("out", "seconds")}
        (folder.path / "change.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        result = replace(result, seconds=round(clock.monotonic() - began, 3))
        if finish:
            finish(folder.path, result)
        folder.publish({"breaks": result.breaks, "data": table.url})
    return result


def _days(reader: CubeReader) -> npt.NDArray[np.float64]:
    times = reader.spec.time_values[list(reader.dates)]
    days: npt.NDArray[np.float64] = times.astype("datetime64[s]").astype(np.int64) / 86_400.0
    return days


def _dates(days: npt.NDArray[np.float64], found: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Return the calendar day, in days since 1970, of the observation at each time that was found; 0 where none was.

    Times of breaks are float32, which may lie minutes beside the observation, and so on another day.
    """
    nearest = np.searchsorted((days[1:] + days[:-1]) / 2, np.nan_to_num(found))
    date: npt.NDArray[np.int32] = np.where(np.isfinite(found), np.floor(days)[nearest], 0).astype(np.int32)
    return date


def _check_dates(reader: CubeReader, model: HarmonicModel) -> None:
    """Refuse a cube that no model can be fitted to."""
    days, url = _days(reader), reader.cube.url
    if len(days) < model.least:
        raise InvalidInput(
            f"{url} has {len(days)} dates; a model of {model.harmonics} harmonics needs {model.least} clear ones: "
            f"{model.least - model.consecutive} to fit and {model.consecutive} to tell a break; give fewer "
            "--harmonics, or a longer cube"
        )
    if days[-1] - days[0] < YEAR:
        raise InvalidInput(
            f"{url} spans {days[-1] - days[0]:.0f} days; harmonics of the year need more than a year before a break "
            "can be told"
        )


def _kinds(found: Breaks, reader: CubeReader) -> npt.NDArray[np.uint8]:
    change = np.nan_to_num(found.change)
    kind = np.where(change.mean(axis=1) < 0, 3, 4).astype(np.uint8)
    if not reader.radar and {"red", "nir"} <= set(reader.names):
        red, nir = reader.names.index("red"), reader.names.index("nir")
        before, after = np.nan_to_num(found.before), np.nan_to_num(found.before + found.change)
        rise = _ndvi(after[:, red], after[:, nir]) - _ndvi(before[:, red], before[:, nir])
        kind[rise <= -_NDVI], kind[rise >= _NDVI] = 1, 2
    kind[~np.isfinite(found.day)] = _NONE
    return kind


def _ndvi(red: npt.NDArray[np.float32], nir: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    index: npt.NDArray[np.float32] = (nir - red) / np.maximum(np.abs(nir) + np.abs(red), np.float32(1e-6))
    return index


def _create(path: Path, reader: CubeReader, options: ChangeOptions) -> None:
    first = ("break", options.most)
    days = {"units": "days since 1970-01-01", "long_name": "first clear date after the break"}
    kinds = {"flag_values": list(range(len(KINDS))), "flag_meanings": " ".join(k.replace(" ", "_") for k in KINDS)}
    create_layers(path, reader.spec.grid, {
        "break_date": Layer("int32", _NONE, first, days),
        "magnitude": Layer("float32", np.nan, first, {"long_name": "median deviation in spreads of the model"}),
        "kind": Layer("uint8", _NONE, first, kinds),
        "count": Layer("uint8", UNFOLLOWED, attributes={"long_name": "number of breaks; 255: too few clear dates"}),
        "observations": Layer("uint16", 0, attributes={"long_name": "clear dates"}),
    }, attributes={"terrashard_change": {"data": reader.cube.url, "options": asdict(options)}})  # fmt: skip


def _count(out: str, layers: Any, table: CubeTable, options: ChangeOptions) -> ChangeResult:
    """Count what was written, some rows at a time."""
    kinds, years, numbers = Counter[int](), Counter[str](), Counter[str]()
    most = 0
    for start in range(0, table.reader.spec.grid.height, 512):
        rows = slice(start, start + 512)
        count = np.asarray(layers["count"][rows])
        followed = count != UNFOLLOWED
        numbers.update(breaks=int(count[followed].sum()), changed=int((count[followed] > 0).sum()),
                       followed=int(followed.sum()), unfollowed=int((~followed).sum()))  # fmt: skip
        date, kind = np.asarray(layers["break_date"][:, rows]), np.asarray(layers["kind"][:, rows])
        kinds.update(
            {int(value): int(n) for value, n in zip(*np.unique(kind[date > 0], return_counts=True), strict=True)}
        )
        year = date[date > 0].astype("datetime64[D]").astype("datetime64[Y]").astype(str)
        years.update({str(value): int(n) for value, n in zip(*np.unique(year, return_counts=True), strict=True)})
        most = max(most, int(np.asarray(layers["observations"][rows]).max()))
    if not numbers["followed"]:
        raise NothingFound(
            f"{table.url}: no pixel has enough clear dates for a stable model; the clearest has {most}, and "
            f"{options.model.least} are needed"
        )
    return ChangeResult(
        out, numbers["breaks"], numbers["changed"], numbers["followed"], numbers["unfollowed"],
        {KINDS[value]: kinds[value] for value in range(1, len(KINDS))}, dict(sorted(years.items())),
        len(table.reader.times), table.reader.names, 0.0, table.warnings,
    )  # fmt: skip
