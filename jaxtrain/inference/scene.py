"""`predict` makes a map of a cube with a trained model, shard by shard; `help_making` fills a part of its shards."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.display import result_table
from jaxtrain.inference.area import Area
from jaxtrain.inference.filling import Filled, Progress
from jaxtrain.inference.making import Making, find_making, finish, hold_making, open_making, refuse_append
from jaxtrain.inference.map_item import map_item
from jaxtrain.inference.maps import CHUNK, Map, is_map, make_arrays, open_map, refuse_other
from jaxtrain.inference.opening import OpenScene, open_scene
from jaxtrain.inference.options import Dates, MapOptions, Method
from jaxtrain.parallel.heap import process_peak_bytes
from jaxtrain.runs.repeat import programs_kept
from zarr_store.errors import InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.ledger import ShardIndex
from zarr_store.stac_item import write_item

__all__ = ["Elsewhere", "MapResult", "help_making", "join_map", "predict"]

_LOOK_S = 0.5
"""Seconds between two looks at what the other processes of a map have done."""

Elsewhere = Callable[[Path], None]
"""Fills the shards of the map in a folder by other processes, each of which calls `help_making`."""


@dataclass(frozen=True, repr=False)
class MapResult:
    """The map that `predict` has made.

    Attributes:
        map: Path of the map.
        shape: (height, width), pixels.
        dates: Dates of the map: those whose answers it joins, or its dates along an axis `time`.
        pixels: Number of pixels of each class, by class name.
        nodata: Number of pixels without a class or value.
        values: Mean, minimum and maximum of a map of values; None for a map of classes.
        windows: Number of windows that this call predicted, over all dates.
        seconds: Wall time.
        warnings: Warnings about the map: damaged checkpoints, another resolution, absent chunks.
        shards_done: Number of shards of the map that are complete.
        shards_total: Number of its shards.
        shards_made: Number of shards that this call made; the others were there.
        peak_host_bytes: Largest memory of this process so far.
        pixels_per_second: Pixels that this call mapped, over all dates, in a second.
        forward_share: Share of the seconds in which the devices ran the network.
        modalities: Number of pixels by the modalities that were there, such as s1+s2; none of other networks.

    Example:
        >>> made = predict("runs/zagreb", "zagreb.zarr", "one_day.zarr", time="2023-08-11")
        >>> made.dates
        ('2023-08-11T10:00:00',)
        >>> sum(made.pixels.values()) + made.nodata == made.shape[0] * made.shape[1]
        True
    """

    map: str
    shape: tuple[int, int]
    dates: tuple[str, ...]
    pixels: dict[str, int]
    nodata: int
    values: dict[str, float] | None
    windows: int
    seconds: float
    warnings: tuple[str, ...]
    shards_done: int = 0
    shards_total: int = 0
    shards_made: int = 0
    peak_host_bytes: int = 0
    pixels_per_second: float = 0.0
    forward_share: float = 0.0
    modalities: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __repr__(self) -> str:
        height, width = self.shape
        kind = f"{len(self.pixels)} classes" if self.values is None else "values"
        return f"<MapResult {self.map}: {kind}, {height}×{width} px, {len(self.dates)} dates>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return result_table(f"Map {self.map}", {
            "shape": "×".join(map(str, self.shape)), "dates": ", ".join(self.dates), **self.pixels,
            **(self.values or {}), "nodata": self.nodata, "warnings": "\n".join(self.warnings),
        })  # fmt: skip


def predict(
    run: str | PathLike[str],
    cube: str | Path,
    out: str | Path,
    *,
    time: str | None = None,
    probabilities: bool = False,
    overlap: int | None = None,
    method: Method = "blend",
    dates: Dates = "mean",
    entropy: bool = False,
    scaled: bool = False,
    area: Area | None = None,
    append: bool = False,
    without: Sequence[str] = (),
    devices: int | None = None,
    allow_mismatch: bool = False,
    elsewhere: Elsewhere | None = None,
    part: tuple[int, int] | None = None,
    on_batch: Progress | None = None,
) -> MapResult:
    """Map a whole cube.

    The map is made shard by shard beside its place. A call that was interrupted leaves what is complete, and the same
    call does the rest; the bytes of the map are those of a call that was never interrupted.

    Args:
        run: The run directory; its best checkpoint is used where `run.monitor` names a score, else its newest
            undamaged one.
        cube: A cube with the bands of the model; it need not be the training cube.
        out: Path of the new map (Zarr). An existing map is replaced when the new one is complete.
        time: One date, as in the cube ("2023-08-15" is enough where it is unambiguous); None: all dates, joined as
            `dates` says; if a pixel never was clear and the model was trained on masked pixels, those count.
        probabilities: Also keep the probability of every class.
        overlap: Pixels that neighbouring windows share, at most half a patch; None: a quarter of it.
        method: "blend" overlaps windows of the size of training; "exact" gives what one pass over the scene would.
        dates: "mean": the mean probability over the dates on which a pixel was clear. "majority": the class of most
            dates; the confidence is its share. "each": a map of each date, along an axis `time`.
        entropy: Also keep the entropy of the probabilities, in per cent of its largest value.
        scaled: Store values as int16 with a scale, not as float32.
        area: Map these polygons only.
        append: Add the new dates of a cube that has grown to a map of each date.
        without: Modalities that the network does not get, as if they were missing everywhere.
        devices: Devices over which batches are split; None for those of the run.
        allow_mismatch: Map a cube whose pixels have another size on the ground, or whose numbers have a unit that
            cannot be converted, and warn.
        elsewhere: Fills the map by other processes; None fills it in this one.
        part: (0, count): fill the shards of process 0 of `count`, and wait for those of the others (`join_map`).
        on_batch: Called with (batches done, batches in all).

    Returns:
        Where the map is, its shape in pixels, and how many pixels each class has.

    Raises:
        InvalidInput: The run or the target is something else; the options do not fit each other or the model.
        UnknownName: The cube lacks the collection, a band or the date.
        CorruptShard: A shard is damaged.
        Locked: Another run makes this map.

    Example:
        >>> made = predict("runs/zagreb", "zagreb.zarr", "zagreb_map.zarr")
        >>> made.shape, list(made.pixels)
        ((192, 160), ['vegetation', 'not vegetated', 'water'])
    """
    began = clock.monotonic()
    options = MapOptions(time, method, overlap, dates, probabilities, entropy, scaled, area, tuple(without), devices,
                         allow_mismatch)  # fmt: skip
    target = FolderStore.at(out)
    refuse_other(target)
    opened = open_scene(Path(run), cube, options)
    old = None
    if append:
        old = open_map(out)
        refuse_append(old, opened.identity, opened.times)
    whole = _already_made(target, opened)
    if whole is not None:
        write_item(whole.store, map_item(opened, target.root))
        return _result(opened, whole, out, Filled(), began)
    make = partial(
        make_arrays, grid=opened.spec.grid, classes=opened.card.answers, kind=opened.kind,
        attributes=opened.attributes, times=opened.times,
    )  # fmt: skip
    with hold_making(
        out, opened.plan, opened.kind.names, dated=bool(opened.times), make=make, carry=old, dates=opened.times
    ) as making:
        missing = making.missing(opened.keys)
        if elsewhere is not None and missing:
            elsewhere(making.folder)
            filled = Filled(seconds=clock.monotonic() - began, shards=len(missing))
        else:
            mine = missing if part is None else [index for index in _part_of(opened, part) if index in set(missing)]
            filled = _fill(opened, making, mine, on_batch)
            if part is not None:
                _await_others(making, opened)
        left = making.missing(opened.keys) if elsewhere is not None or part is not None else []
        if left:
            raise InvalidInput(
                f"{len(left)} of {len(opened.keys)} shards of {target.url} were not made; repeat the command, which "
                "makes them alone"
            )
        write_item(making.store, map_item(opened, target.root))
        finish(making, out)
        made = Making(target.root, opened.kind.names, bool(opened.times))
        return _result(opened, made, out, filled, began)


def join_map(
    run: str | PathLike[str],
    cube: str | Path,
    out: str | Path,
    options: MapOptions,
    part: tuple[int, int],
    on_batch: Progress | None = None,
) -> Filled:
    """Fill the shards of one of several processes, all of which were started with the same arguments.

    Process 0 makes the map by `predict` with `part`; the others wait until it has begun, or has found the map made.

    Args:
        run: The run directory.
        cube: The cube.
        out: Path of the map.
        options: As those of `predict`.
        part: (number, count) of this process, from 1.
        on_batch: Called with (batches done, batches in all).
    """
    opened, target = open_scene(Path(run), cube, options), FolderStore.at(out)
    while True:
        folder = find_making(out, opened.plan["digest"])
        if folder is not None:
            return help_making(folder, part, on_batch)
        if _already_made(target, opened) is not None:
            return Filled()
        clock.sleep(_LOOK_S)


def help_making(folder: Path, part: tuple[int, int], on_batch: Progress | None = None) -> Filled:
    """Fill a part of the missing shards of a map that another process holds.

    Args:
        folder: The folder in which it is made (`Elsewhere`).
        part: (number, count): every count-th run of neighbouring shards, from this one on.
        on_batch: Called with (batches done, batches in all).
    """
    making, plan = open_making(folder)
    opened = open_scene(Path(plan["run"]), plan["cube"], MapOptions.from_dict(plan["options"]))
    if opened.plan["digest"] != plan["digest"]:
        raise InvalidInput(
            f"{plan['run']} or {plan['cube']} is not here what it is where the map was begun, or has changed since; "
            "repeat the command"
        )
    mine = _part_of(opened, part)
    missing = set(making.missing({index: opened.keys[index] for index in mine}))
    return _fill(opened, making, [index for index in mine if index in missing], on_batch)


def _part_of(opened: OpenScene, part: tuple[int, int]) -> list[ShardIndex]:
    """Return the shards of one process: every count-th run of neighbours, which share windows and batches.

    Every process gets the same lists, whatever the others have finished by now. Runs are dealt like cards, so that the
    processes have as much to do where the first shards are there already. They are parts of a row of shards, as long as
    there are two for each process and as many for one as for another. Each map of dates is dealt by itself, each time
    from the next process on: often the shards of one date are all that is missing.
    """
    number, count = part
    maps: dict[int, list[ShardIndex]] = {}
    for index in opened.keys:
        maps.setdefault(index[0], []).append(index)
    mine: list[ShardIndex] = []
    dealt = 0
    for shards in maps.values():
        columns = max(index[2] for index in shards) + 1
        lengths = [n for n in range(1, columns + 1) if columns % n == 0]
        even = [n for n in lengths if len(shards) // n >= 2 * count and len(shards) // n % count == 0]
        length = max(even, default=1)
        mine += [index for place, index in enumerate(shards) if (dealt + place // length) % count == number]
        dealt += -(-len(shards) // length)
    return mine


def _await_others(making: Making, opened: OpenScene) -> None:
    """Wait until every shard has its row; the starter of the processes ends all of them when one fails."""
    while True:
        rows = making.ledger.rows()
        if all(index in rows and rows[index].key == key for index, key in opened.keys.items()):
            return
        clock.sleep(_LOOK_S)


def _fill(opened: OpenScene, making: Making, missing: list[ShardIndex], on_batch: Progress | None) -> Filled:
    shards = {index: (opened.shards[index], opened.keys[index]) for index in missing}
    if not shards:
        return Filled()
    with programs_kept(opened.card.key):
        return opened.scene().fill(making, shards, on_batch)


def _already_made(target: FolderStore, opened: OpenScene) -> Making | None:
    """Return the map at the target if it is whole and the one that is asked for; else None."""
    if not target.exists() or not is_map(target.url):
        return None
    there = open_map(target.url)
    made = Making(target.root, opened.kind.names, bool(opened.times))
    same = there.layers == opened.kind.names and dict(there.attributes) == {
        name: value for name, value in opened.stated.items() if name != "times"
    }
    rows = made.ledger.rows() if same and there.times == opened.times else {}
    if {index: row.key for index, row in rows.items()} != dict(opened.keys) or made.missing(opened.keys):
        return None
    return made


def _result(opened: OpenScene, made: Making, out: str | Path, filled: Filled, began: float) -> MapResult:
    seconds = clock.monotonic() - began
    counts, _, nothing = made.counts(max(opened.kind.classes, 1))
    names = opened.card.answers.names
    values = opened.kind.values
    pixels = {} if values else {name: int(counts[i]) for i, name in enumerate(names)}
    if values:
        pixels = {name: made.counts(1)[1] if i == 0 else 0 for i, name in enumerate(names)}
    return MapResult(
        map=str(out),
        shape=opened.spec.grid.shape,
        dates=opened.dates,
        pixels=pixels,
        nodata=nothing,
        values=_summarise(open_map(out)) if values else None,
        windows=filled.windows,
        seconds=round(seconds, 3),
        warnings=opened.warnings,
        shards_done=len(opened.keys),
        shards_total=len(opened.keys),
        shards_made=filled.shards,
        peak_host_bytes=process_peak_bytes(),
        pixels_per_second=round(filled.pixels / filled.seconds, 1) if filled.seconds else 0.0,
        forward_share=round(filled.forward_s / filled.seconds, 4) if filled.seconds else 0.0,
        modalities={_combined(opened.kind.modalities, bits): n for bits, n in sorted(made.used().items()) if bits},
    )


def _combined(names: tuple[str, ...], bits: int) -> str:
    """Return a name such as s1+s2 for a combination of modalities."""
    return "+".join(name for i, name in enumerate(names) if bits >> i & 1)


def _summarise(made: Map) -> dict[str, float]:
    total, count, low, high = 0.0, 0, np.inf, -np.inf
    for time in range(len(made.times) or 1):
        for row in range(0, made.grid.height, CHUNK):
            values = made.read_values(slice(row, min(row + CHUNK, made.grid.height)), time=time)
            values = values[np.isfinite(values)].astype(np.float64)
            if values.size:
                total, count = total + values.sum(), count + values.size
                low, high = min(low, values.min()), max(high, values.max())
    return {"mean": total / count, "minimum": float(low), "maximum": float(high)} if count else {}
