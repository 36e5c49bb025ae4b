"""`Making` is the folder beside a map in which it is made, shard by shard; a run that is killed leaves it for the next.

    .MAP.zarr.making.partial/_terrashard/lock.json   the run that works on it
    .MAP.zarr.making.partial/plan.json               what is made, for the processes that help
    .MAP.zarr.making.partial/map/                    the map, with a row in its ledger for each shard that is complete

A row is written after all chunks of its shard are on the disk. When every shard has one, the folder `map` takes the
place of the map in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from jaxtrain.inference.maps import CHUNK, Map, MapWriter, is_map, refuse_other
from jaxtrain.inference.overviews import write_overviews
from zarr_store.bounded import load_json
from zarr_store.chunk_stats import ChunkStats
from zarr_store.crash import crashpoint
from zarr_store.durable import sync_folder, sync_tree
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.ledger import Ledger, LedgerRow, ShardIndex
from zarr_store.lock import CubeLock, is_held
from zarr_store.regions import Region
from zarr_store.store import translate_os_errors
from zarr_store.temporary import PARTIAL, remove_folder

__all__ = ["Making", "digest_of", "find_making", "finish", "hold_making", "making_folder", "map_progress",
           "open_making", "refuse_append"]  # fmt: skip

LEDGER = "map"
_PLAN = "plan.json"
_MAP = "map"
_LOCK = "_terrashard/lock.json"


@dataclass(frozen=True)
class Making:
    """A map that is being made.

    Attributes:
        root: Folder of the unfinished map.
        names: Names of its layers.
        dated: Whether it has an axis `time`.
    """

    root: Path
    names: tuple[str, ...]
    dated: bool

    @property
    def store(self) -> FolderStore:
        """The unfinished map."""
        return FolderStore(self.root)

    @property
    def folder(self) -> Path:
        """The folder beside the map, which another process is told."""
        return self.root.parent

    @property
    def ledger(self) -> Ledger:
        """Rows of the shards that are complete."""
        return Ledger(self.store, LEDGER)

    def missing(self, keys: Mapping[ShardIndex, str]) -> list[ShardIndex]:
        """Return the shards without a row of this key, or whose chunks are not those that the row names."""
        self.ledger.drop_unreadable()
        rows = self.ledger.rows()
        return [
            index
            for index, key in keys.items()
            if index not in rows or rows[index].key != key or not self._whole(rows[index])
        ]

    def _whole(self, row: LedgerRow) -> bool:
        stored = dict(row.checksums or {})
        return all(self.store.digest(key) == stored.get(key) for key in self._chunks(row.region))

    def _chunks(self, region: Region) -> Iterator[str]:
        """Yield the keys of the chunks under a region."""
        for name in self.names:
            array: Any = zarr.open_array(str(self.store.root), path=name, mode="r", zarr_format=3)
            rows = range(region.y0 // CHUNK, -(-region.y1 // CHUNK))
            columns = range(region.x0 // CHUNK, -(-region.x1 // CHUNK))
            classes = range(-(-array.shape[-3] // array.chunks[-3])) if name == "probability" else (None,)
            for time in range(region.t0, region.t1) if self.dated else (None,):
                for number in classes:
                    for i in rows:
                        for j in columns:
                            parts = [part for part in (time, number, i, j) if part is not None]
                            yield f"{name}/c/{'/'.join(map(str, parts))}"

    def writer(self) -> MapWriter:
        """Return the writer of its pixels."""
        group = zarr.open_group(str(self.store.root), mode="r+", use_consolidated=False)
        return MapWriter(group, "probability" in self.names)

    def begin(self, index: ShardIndex, region: Region) -> None:
        """Forget a shard: until its new row is there it counts as never written, and its chunks go."""
        self.ledger.drop(index)
        for key in self._chunks(region):
            self.store.delete(key)
        crashpoint(f"map shard begun {index}")

    def complete(
        self,
        index: ShardIndex,
        region: Region,
        key: str,
        counts: npt.NDArray[np.int64],
        seen: int,
        used: npt.NDArray[np.int64],
    ) -> None:
        """Make the chunks of a shard durable and then write its row.

        Args:
            index: The shard.
            region: Its pixels.
            key: Digest of all that determined the shard.
            counts: Pixels of each class.
            seen: Pixels with data.
            used: Pixels by the modalities that were there, as bits.
        """
        crashpoint(f"map shard filled {index}")
        checksums = {}
        with translate_os_errors(str(self.root)):
            for chunk in self._chunks(region):
                digest = self.store.digest(chunk)
                if digest is not None:  # a chunk without data is not stored
                    checksums[chunk] = digest
                    _sync(self.store.root / chunk)
        held = {
            name: {int(value): int(of[value]) for value in np.flatnonzero(of)}
            for name, of in (("class", counts), ("modalities", used))
            if name == "class" or len(of) > 1
        }
        nothing = int(np.prod(region.shape)) - seen
        stats = ChunkStats(seen, 0, nothing, (), (), held)
        self.ledger.put(LedgerRow(index, region, key, "done", (), checksums, (stats,)))

    def counts(self, size: int) -> tuple[npt.NDArray[np.int64], int, int]:
        """Return the pixels of each class, those with data and those without, over all shards."""
        counts, seen, nothing = np.zeros(size, np.int64), 0, 0
        for row in self.ledger.rows().values():
            stats = row.stats[0]
            for value, count in stats.classes.get("class", {}).items():
                counts[value] += count
            seen, nothing = seen + stats.observed, nothing + stats.missing
        return counts, seen, nothing

    def used(self) -> dict[int, int]:
        """Return the pixels by the modalities that were there, as bits, over all shards."""
        found: dict[int, int] = {}
        for row in self.ledger.rows().values():
            for value, count in row.stats[0].classes.get("modalities", {}).items():
                found[value] = found.get(value, 0) + count
        return found

    def carry_over(self, old: Map, dates: Sequence[str]) -> None:
        """Add the dates of a finished map, whose files are linked if possible and else copied.

        Args:
            old: A map of each date.
            dates: Dates of the map that is made.
        """
        place = {date: at for at, date in enumerate(dates)}
        source = FolderStore.at(old.url)
        for row in Ledger(source, LEDGER).rows().values():
            t, i, j = row.index
            new = place.get(old.times[t]) if t < len(old.times) else None
            if new is None:
                continue
            checksums = {}
            for key, digest in (row.checksums or {}).items():
                name, c, _, rest = key.split("/", 3)
                moved = f"{name}/{c}/{new}/{rest}"
                target = self.store.root / moved
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(source.root / key, target)
                checksums[moved] = digest
            region = replace(row.region, t0=new, t1=new + 1)
            self.ledger.put(replace(row, index=(new, i, j), region=region, checksums=checksums))


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with contextlib.suppress(FileNotFoundError):  # a shard without its chunk never counts as complete
            shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def making_folder(url: str | Path) -> Path:
    """Return the folder in which the map at `url` is made.

    >>> making_folder("/maps/zagreb.zarr").name
    '.zagreb.zarr.making.partial'
    """
    root = FolderStore.at(url).root
    return root.with_name(f".{root.name}.making{PARTIAL}")


@contextlib.contextmanager
def hold_making(
    url: str | Path,
    plan: Mapping[str, Any],
    names: tuple[str, ...],
    *,
    dated: bool,
    make: Callable[[FolderStore], None],
    carry: Map | None = None,
    dates: Sequence[str] = (),
) -> Iterator[Making]:
    """Hold the folder in which a map is made; what an earlier run of the same plan has made is kept.

    Args:
        url: The map.
        plan: What is made, as JSON; its `digest` decides whether shards of an earlier run count, and so do `parts`, the
            number of devices of the processor, and `batches`, how windows are put into them: the last digit of an
            answer depends on both.
        names: Names of the layers.
        dated: Whether the map has an axis `time`.
        make: Writes metadata and axes of the map into an empty folder.
        carry: A finished map whose dates are taken over.
        dates: Dates of the map.

    Raises:
        InvalidInput: Something that is not a map is at `url`.
        Locked: Another run makes this map.
        NoSpace: The disk is full.
    """
    target = FolderStore.at(url)
    refuse_other(target)
    folder = making_folder(url)
    with translate_os_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
    making = Making(folder / _MAP, names, dated)
    try:
        with CubeLock(folder, f"terrashard predict … {target.url}"), translate_os_errors(str(folder)):
            before = _plan_of(folder)
            same = all(before.get(name) == plan.get(name) for name in ("digest", "parts", "batches"))
            if not same or not making.store.exists("zarr.json"):
                (folder / _PLAN).unlink(missing_ok=True)
                FolderStore(folder).clear(_MAP)
                make(making.store)
                if carry is not None:
                    making.carry_over(carry, dates)
                crashpoint("map arrays made")
            FolderStore(folder).write(_PLAN, json.dumps(plan, sort_keys=True).encode())
            yield making
    finally:
        _tidy(making)


def finish(making: Making, url: str | Path) -> None:
    """Move a map whose shards are all complete to its place in one step, and remove an earlier map.

    The caller holds the lock.
    """
    target = FolderStore.at(url)
    with translate_os_errors(target.url):
        write_overviews(making.store, making.names, CHUNK)
        crashpoint("map overviews made")
        sync_tree(making.store.root)
        if target.exists():
            refuse_other(target)
            remove_folder(target.root)
        crashpoint("before the map appears")
        os.rename(making.store.root, target.root)
        sync_folder(target.root.parent)
        crashpoint("after the map appears")
        (making.folder / _PLAN).unlink(missing_ok=True)


def _tidy(making: Making) -> None:
    """Remove the folder if it holds no shard that a repeated run could use."""
    if (making.folder / _LOCK).exists():
        return  # another run has it
    if not making.store.list(f"_terrashard/ledger/{LEDGER}", ".json"):
        (making.folder / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(making.folder / _MAP, ignore_errors=True)
        for folder in (making.folder / "_terrashard", making.folder):
            with contextlib.suppress(OSError):  # another run has just taken it
                folder.rmdir()


def open_making(folder: Path) -> tuple[Making, dict[str, Any]]:
    """Open the folder of a map that another process holds, to help with it; return its plan, too.

    Raises:
        IntegrityError: There is no plan, or it cannot be read.
    """
    plan = _plan_of(folder)
    if not plan:
        raise IntegrityError(f"{folder / _PLAN} is absent or unreadable; repeat `terrashard predict`")
    return Making(folder / _MAP, tuple(plan["layers"]), bool(plan["dated"])), plan


def _plan_of(folder: Path) -> dict[str, Any]:
    data = FolderStore(folder).read(_PLAN)
    try:
        plan = load_json(data or b"{}", str(folder / _PLAN), most=64 << 20)
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def find_making(url: str | Path, digest: str) -> Path | None:
    """Return the folder in which a living run makes the map at `url` from a plan of this digest; None without one."""
    folder = making_folder(url)
    if not (folder / _LOCK).exists() or not is_held(FolderStore(folder)):
        return None
    return folder if _plan_of(folder).get("digest") == digest else None


def map_progress(url: str | Path) -> dict[str, Any] | None:
    """Return done and total shards of a map, and whether it is finished; None where there is no map.

    A map that is being made again counts as unfinished.
    """
    folder = making_folder(url)
    plan = _plan_of(folder)
    if plan:
        done = len(FolderStore(folder / _MAP).list(f"_terrashard/ledger/{LEDGER}", ".json"))
        total = int(plan.get("shards", 0))
        held = (folder / _LOCK).exists()
        return {"done": done, "total": total, "pending": max(total - done, 0), "complete": False, "running": held}
    if not is_map(url):
        return None
    done = len(FolderStore.at(url).list(f"_terrashard/ledger/{LEDGER}", ".json"))
    return {"done": done, "total": done, "pending": 0, "complete": True, "running": False}


def refuse_append(old: Map, identity: str, dates: Sequence[str]) -> None:
    """Refuse to add dates to a map that was made in another way.

    Raises:
        InvalidInput: The map has no axis `time`, or was made by another model, on another grid or with other options.
    """
    if not old.times:
        raise InvalidInput(
            f"--append adds dates to a map of each date, and {old.url} is one map of all dates: repeat the command "
            "without --append, which makes it again from all dates"
        )
    if old.attributes.get("made_with") != identity:
        raise InvalidInput(
            f"--append: {old.url} was made with another model, grid or options (run {old.attributes.get('run')}, step "
            f"{old.attributes.get('step')}); give the same run and options, or another map"
        )
    gone = [date for date in old.times if date not in dates]
    if gone:
        raise InvalidInput(
            f"--append: {old.url} has {len(gone)} dates that the cube has not, such as {gone[0]}; make another map"
        )


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
