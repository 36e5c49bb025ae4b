"""`WindowReader` reads windows of a cube as batches.

All reads of a batch are under way at once and share chunks. Tensorstore decodes on a pool of its own, straight into the
batch, and keeps decoded chunks in the cube's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from jaxtrain.config import DataConfig
from jaxtrain.data.arrays import HostBatch, Rows
from jaxtrain.data.classes import UNLABELLED, Classes
from jaxtrain.data.memory import empty_array
from jaxtrain.data.numbers import Conversion
from jaxtrain.data.targets import Target, resolve_target
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.index import TrainingIndex
from zarr_store.read import Cube, await_read
from zarr_store.regions import Region
from zarr_store.spec import STATUS_MASKED, STATUS_OBSERVED, CubeSpec

__all__ = ["OnUnreadable", "WindowReader", "series_dates"]

OnUnreadable = Callable[[npt.NDArray[np.int32], IntegrityError], None]


def series_dates(config: DataConfig, spec: CubeSpec) -> int:
    """Return the number of dates in a window of a cube.

    Raises:
        InvalidInput: The cube has fewer than are asked for, or only one where there should be several.
    """
    held = len(spec.times)
    if config.dates == 1:
        return 1
    if held < 2 or (config.dates != "all" and config.dates > held):
        raise InvalidInput(
            f"data.dates = {config.dates!r}, but {spec.collection} has {held} dates: ingest more, or ask for fewer"
        )
    return held if config.dates == "all" else config.dates


@dataclass(frozen=True)
class WindowReader:
    """Reader of windows of one collection.

    Attributes:
        cube: The open cube.
        collection: Group that is read.
        bands: Positions in the main array, in the order of the network's channels.
        patch: Side of a window, pixels.
        learn_masked: Whether masked pixels count as observed.
        target: The label, or None if only the image is read.
        table: uint8 (256,) layer value → class index, of classes.
        index: Counts of the chunks; the status of chunks that are observed throughout is not read.
        lenient: Chunks that, by the index, were never written read as not observed; else they raise.
        images: False reads labels and what was observed, without images.
        dates: Dates of a window that follow each other; its row has the first.
        conversion: Turns the stored numbers into those of the model; None where they are.
        on_unreadable: Called for each window whose chunk is damaged or gone: it raises, or the window counts as not
            observed and not labelled. None raises.
    """

    cube: Cube
    collection: str
    bands: tuple[int, ...]
    patch: int
    learn_masked: bool
    target: Target | None = None
    table: npt.NDArray[np.uint8] | None = None
    index: TrainingIndex | None = None
    lenient: bool = False
    dates: int = 1
    conversion: Conversion | None = None
    images: bool = True
    on_unreadable: OnUnreadable | None = None

    @classmethod
    def of(
        cls, cube: Cube, config: DataConfig, classes: Classes, target: Target | None = None,
        index: TrainingIndex | None = None,
    ) -> WindowReader:  # fmt: skip
        """Make the reader of a training run; the target defaults to `data.label`."""
        spec = cube.spec(config.collection)
        bands = spec.find_bands(config.bands, option="data.bands")
        target = target or resolve_target(cube, config)
        dates = series_dates(config, spec)
        table = None if target.values else classes.table()
        learned = None if target.place == "image" else target
        index = index or cube.index(config.collection)
        return cls(cube, config.collection, bands, config.patch, config.learn_masked, learned, table, index,
                   lenient=True, dates=dates)  # fmt: skip

    @property
    def shows(self) -> Literal["windows", "images"]:
        """Kind of a row: a window of the cube."""
        return "windows"

    def read(self, rows: Rows) -> HostBatch:
        """Read windows; an unreadable one counts as not observed and not labelled, if `on_unreadable` allows it.

        Args:
            rows: int32 (B, 3) of (time, y, x).

        Returns:
            image, observed, of series day, and, with a target, label; without one, `clear`: 1 where the pixel is not
            masked.

        Raises:
            MissingShard: A shard under a window is absent.
            CorruptShard: Its checksum does not match; the message names the box.
        """
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start all reads of `rows`, which share chunks, and return a function that waits for them."""
        begin = self._begin if self.dates == 1 else self._begin_series
        wait = begin(rows)

        def finish() -> HostBatch:
            try:
                return wait()
            except IntegrityError:
                if self.on_unreadable is None:
                    raise
            parts: list[HostBatch | None] = []
            for row in rows:
                try:
                    parts.append(begin(row[None])())
                except IntegrityError as error:
                    self.on_unreadable(row, error)
                    parts.append(None)
            nothing = self._nothing()
            return {name: np.concatenate([(part or nothing)[name] for part in parts]) for name in nothing}

        return finish

    def begin_labels(self, rows: Rows) -> Callable[[], npt.NDArray[Any]]:
        """Start to read labels of a label layer, (B, patch, patch), also where nothing was observed."""
        target = self.target
        if target is None or target.place != "label":
            raise InvalidInput(f"{self.cube.url}: {target} is not a label layer")
        stored = np.zeros((len(rows), self.patch, self.patch), target.dtype)
        wait = replace(self, lenient=False)._fetch(rows, {target.name: stored})

        def finish() -> npt.NDArray[Any]:
            wait()
            return target.decode(stored, self.table)

        return finish

    def _begin(self, rows: Rows) -> Callable[[], HostBatch]:
        spec = self.cube.spec(self.collection)
        side, count = self.patch, len(rows)
        target = self.target
        gaps = self._with_gaps(rows)
        parts: dict[str, np.ndarray] = {"status": self._array((count, side, side), np.uint8, gaps)}
        if target is not None:
            parts[target.name] = self._array((count, side, side), target.dtype, gaps)
        if self.images:
            parts[spec.kind] = self._array((count, len(self.bands), side, side), spec.array(spec.kind).dtype, gaps)
        known = self._observed_throughout(rows)
        parts["status"][known] = STATUS_OBSERVED
        fetched = self._fetch(rows, parts, known)

        def finish() -> HostBatch:
            fetched()
            clear = parts["status"] == STATUS_OBSERVED
            observed = clear | (parts["status"] == STATUS_MASKED) if self.learn_masked else clear
            whole = bool(known.all())
            result = {}
            if self.images:
                image_BCHW = parts[spec.kind]
                if image_BCHW.dtype.kind == "f":  # one number that is not finite would spread over the whole window
                    finite = np.isfinite(image_BCHW).all(axis=1)
                    whole = whole and bool(finite.all())
                    observed, clear = observed & finite, clear & finite
                result["image"] = image_BCHW if self.conversion is None else self.conversion.apply(image_BCHW)
            result["observed"] = observed.view(np.uint8)
            if target is None:
                result["clear"] = clear.astype(np.uint8)
            else:
                label = target.decode(parts[target.name], self.table)
                if not whole:
                    target.hide(label, observed)
                result["label"] = label
            return result

        return finish

    def _array(self, shape: tuple[int, ...], dtype: Any, gaps: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        """Return an array to fill; windows that are not read whole are zeroed, so that the rest holds no data."""
        made = empty_array(shape, dtype)
        made[gaps] = 0
        return made

    def _with_gaps(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return which windows (B,) reach over the edge of the grid, or hold chunks that were never written."""
        _, height, width = self.cube.spec(self.collection).shape
        found = np.asarray((rows[:, 1] + self.patch > height) | (rows[:, 2] + self.patch > width))
        if self.index is not None and self.lenient and not self.index.present.all():
            ct, cy, cx = self.index.chunk
            last = self.patch - 1
            for i, (t, y, x) in enumerate(rows.tolist()):
                under = self.index.present[t // ct, y // cy : (y + last) // cy + 1, x // cx : (x + last) // cx + 1]
                found[i] |= not under.all()
        return found

    def _observed_throughout(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return which windows (B,) have chunks that the index knows to be observed in every pixel."""
        found = np.zeros(len(rows), bool)
        if self.index is not None:
            ct, cy, cx = self.index.chunk
            whole, last = self.index.whole, self.patch - 1
            _, height, width = self.cube.spec(self.collection).shape
            for i, (t, y, x) in enumerate(rows.tolist()):
                inside = y + last < height and x + last < width
                found[i] = (
                    inside and whole[t // ct, y // cy : (y + last) // cy + 1, x // cx : (x + last) // cx + 1].all()
                )
        return found

    def _fetch(
        self, rows: Rows, parts: Mapping[str, np.ndarray], known: npt.NDArray[np.bool_] | None = None
    ) -> Callable[[], None]:
        """Start to fill arrays (B, …, patch, patch) by name, and return a function that waits until they are full.

        The status of windows where it is `known` (B,) is not read.
        """
        pending: list[tuple[str, list[Region], Any]] = []
        with ts.Batch() as batch:
            for name, part in parts.items():
                skipped = known if name == "status" and known is not None else np.zeros(len(rows), bool)
                for first, last, boxes in self._runs(rows, skipped):
                    place = ts.array(part[first:last])  # decoded straight into the batch, without a copy between
                    if boxes is not None:  # one operation for all of them: a tenth of the time was in having many
                        whole = ts.stack([self._view(name, box)[ts.d[:].translate_to[0]] for box in boxes])
                        pending.append((name, boxes, place.write(whole, batch=batch)))
                        continue
                    y, x = int(rows[first, 1]), int(rows[first, 2])
                    for box in self._boxes(rows[first]):
                        cut = place[0, ..., box.y0 - y : box.y1 - y, box.x0 - x : box.x1 - x]
                        pending.append((name, [box], cut.write(self._view(name, box), batch=batch)))

        def wait() -> None:
            # the last first: the others are there by then, and no thread is woken for each of them
            for name, boxes, read in reversed(pending):
                try:
                    await_read(read, partial(self._place, name, boxes[0]))
                except IntegrityError:
                    for box in boxes:  # which of them it is
                        await_read(self._view(name, box).read(), partial(self._place, name, box))
                    raise

        return wait

    def _runs(self, rows: Rows, skipped: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int, list[Region] | None]]:
        """Yield runs of windows that are read whole: (first, last + 1, their boxes); without boxes, one
        that is not.
        """
        run: list[Region] = []
        for i, row in enumerate(rows):
            boxes = [] if skipped[i] else self._boxes(row)
            whole = len(boxes) == 1 and boxes[0].shape[1:] == (self.patch, self.patch)
            if run and not whole:
                yield i - len(run), i, run
                run = []
            if whole:
                run.append(boxes[0])
            elif boxes:
                yield i, i + 1, None
        if run:
            yield len(rows) - len(run), len(rows), run

    def _place(self, name: str, box: Region) -> str:
        return f"{self.cube.url} {self.collection}/{name} {box}"

    def _begin_series(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start to read windows of several dates; each date is read as a window of its own."""
        count, times, side = len(rows), self.dates, self.patch
        every = np.repeat(rows, times, axis=0)
        every[:, 0] += np.tile(np.arange(times, dtype=np.int32), count)
        target, stored, labels = self.target, np.empty(0), None
        if target is not None:
            dated = target.place != "label"
            stored = np.zeros((len(every) if dated else count, side, side), target.dtype)
            given = self if dated else replace(self, lenient=False)
            labels = given._fetch(every if dated else rows, {target.name: stored})
        images = replace(self, target=None, dates=1)._begin(every)

        def finish() -> HostBatch:
            flat = images()
            observed = flat["observed"].reshape(count, times, side, side)
            result = {"image": flat["image"].reshape(count, times, -1, side, side)} if self.images else {}
            result |= {"observed": observed, "day": self._days(every[:, 0])}
            if target is None or labels is None:
                return result | {"clear": flat["clear"].reshape(observed.shape).max(axis=1)}
            labels()
            label = target.decode(stored, self.table)
            if target.place != "label":
                label = self._latest(label.reshape(observed.shape), observed)
            target.hide(label, np.asarray(observed.any(axis=1)))
            return result | {"label": label}

        return finish

    def _latest(self, dated: npt.NDArray[Any], observed: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return labels (B, H, W) of the last date on which a pixel was seen and labelled."""
        assert self.target is not None
        label = np.full((len(dated), *dated.shape[2:]), self.target.nothing)
        for t in range(self.dates):
            known = np.isfinite(dated[:, t]) if self.target.values else dated[:, t] != UNLABELLED
            label = np.where(known & (observed[:, t] == 1), dated[:, t], label)
        return label

    def _days(self, times: npt.NDArray[np.int32]) -> npt.NDArray[np.uint16]:
        """Return the day of the year of each date, (B, T)."""
        moments = self.cube.spec(self.collection).time_values.astype("datetime64[D]")
        since: npt.NDArray[np.int64] = (moments - moments.astype("datetime64[Y]")).astype(np.int64)
        found: npt.NDArray[np.uint16] = (since[times] + 1).astype(np.uint16)
        return found.reshape(-1, self.dates)

    def _nothing(self) -> HostBatch:
        """Return one window that is not observed and not labelled, in the form of `read`."""
        side = (self.patch, self.patch)
        many = (1,) if self.dates == 1 else (1, self.dates)
        spec = self.cube.spec(self.collection)
        empty = np.zeros((1, *side), np.uint8)
        image = np.zeros((*many, len(self.bands), *side), spec.array(spec.kind).dtype)
        last = {"clear": empty} if self.target is None else {"label": np.full(empty.shape, self.target.nothing)}
        nothing = {"image": image} if self.images else {}
        nothing |= {"observed": np.zeros((*many, *side), np.uint8), **last}
        return nothing if self.dates == 1 else nothing | {"day": np.ones((1, self.dates), np.uint16)}

    def _boxes(self, row: npt.NDArray[np.int32]) -> list[Region]:
        """Return the boxes that are read of a window: all of it on the grid, or its present chunks if absent ones are
        allowed.
        """
        t, y, x = (int(v) for v in row)
        _, height, width = self.cube.spec(self.collection).shape
        whole = Region(t, t + 1, y, min(y + self.patch, height), x, min(x + self.patch, width))
        if self.index is None or not self.lenient:
            return [whole]
        ct, cy, cx = self.index.chunk
        rows, columns = range(y // cy, -(-whole.y1 // cy)), range(x // cx, -(-whole.x1 // cx))
        present = self.index.present[t // ct]
        if present[rows.start : rows.stop, columns.start : columns.stop].all():
            return [whole]
        chunks = [
            Region(t, t + 1, i * cy, (i + 1) * cy, j * cx, (j + 1) * cx) for i in rows for j in columns if present[i, j]
        ]
        return [box for chunk in chunks if (box := chunk.intersect(whole))]

    def _view(self, name: str, box: Region) -> ts.TensorStore:
        y, x = slice(box.y0, box.y1), slice(box.x0, box.x1)
        if self.target is not None and name == self.target.name:
            handle = self.target.array(self.cube, self.collection)
            return handle[y, x] if handle.rank == 2 else handle[box.t0, y, x]
        handle = self.cube.tensorstore(self.collection, name)
        if handle.rank == 3:
            return handle[box.t0, y, x]
        if self.bands == tuple(range(handle.shape[1])):
            return handle[box.t0, :, y, x]
        return handle[box.t0, :, y, x][list(self.bands)]
