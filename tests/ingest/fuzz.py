"""Reads many damaged files in a process of its own, and says which of them did what it must not.

Each file has a number, which is all that it takes to have it again: `python -m tests.ingest.fuzz rasters 1234 1`. The
process that reads says before each file which one it is; the one that started it sees a crash, a file that takes too
long or too much memory, names its number, and goes on behind it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_S = 20.0
"""For one file."""
MOST_GROWTH_KB = 400_000
"""Of the memory that the process has had at most, by one file."""
MOST_SPACE = 3 << 30
"""Of address space beyond what the process has before the first file: a bomb ends it, not the machine."""
REMOTE_EACH = 16
"""One file of so many is read over HTTP."""

AUX = """<PAMDataset><SRS>EPSG:32633</SRS><GeoTransform>5e5, 10, 0, 5e6, 0, -10</GeoTransform></PAMDataset>"""
"""Beside each file; only a bare codestream may need it."""


class Finding(Exception):
    """A file that did what no file may do."""


@dataclass
class Report:
    """What became of the files: how many of each outcome, and (number, what it did) of those that must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)

    @property
    def files(self) -> int:
        return sum(self.outcomes.values())


def campaign(kind: str, first: int, count: int, *, seconds: float = float("inf"), most_s: float = MOST_S) -> Report:
    """Try the files `first` … `first + count - 1`, as many as there is time for.

    Args:
        kind: "rasters", "documents", or one of the faults in `KINDS` by which the search itself is tested.
        first: Number of the first file.
        count: How many.
        seconds: For all.
        most_s: For one.
    """
    report = Report()
    ends = time.monotonic() + seconds
    following = first
    while following < first + count and time.monotonic() < ends:
        following = _one_process(kind, following, first + count - following, ends, most_s, report)
    return report


def _one_process(kind: str, first: int, count: int, ends: float, most_s: float, report: Report) -> int:
    """Let a process try files until it is done or gone; the number to go on with."""
    command = [sys.executable, "-m", "tests.ingest.fuzz", kind, str(first), str(count)]
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True)

        def listen() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.put(line.rstrip("\n"))
            lines.put(None)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        at, doing, patience = first, "starting", 60 + most_s  # until it has imported all and written the good files
        try:
            while True:
                try:
                    line = lines.get(timeout=patience)
                except queue.Empty:
                    report.findings.append((at, f"no end after {patience:.0f} s, {doing}"))
                    report.outcomes["finding"] += 1
                    return at + 1
                if line is None:
                    if child.wait() == 0:
                        return first + count
                    log.seek(0)
                    said = log.read()[-1500:]
                    report.findings.append((at, f"the process ended with {child.returncode}, {doing}: {said}"))
                    report.outcomes["finding"] += 1
                    return at + 1
                word, _, rest = line.partition(" ")
                if word == "begin":
                    number, _, doing = rest.partition(" ")
                    at, patience = int(number), most_s
                elif word == "end":
                    report.outcomes[rest] += 1
                    if time.monotonic() > ends:
                        return first + count
                elif word == "finding":
                    report.findings.append((at, rest))
                    report.outcomes["finding"] += 1
        finally:
            child.kill()
            child.wait()
            listener.join(10)
            assert child.stdout is not None
            child.stdout.close()


def work(kind: str, first: int, count: int) -> None:
    """Try files one after the other, and tell of each on standard output."""
    logging.getLogger("rasterio").propagate = False
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, KINDS[kind](Path(name)) as (check, describe):
        _limit_memory()
        for number in range(first, first + count):
            what = describe(number)
            _tell(f"begin {number} reading", what)
            before = _peak()
            try:
                outcome = check(number)
            except Finding as finding:
                _tell("finding", f"{what}: {finding}")
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
                import traceback

                where = traceback.extract_tb(error.__traceback__)[-1]
                _tell(
                    "finding", f"{what}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
                )
            else:
                if (grown := _peak() - before) > MOST_GROWTH_KB:
                    _tell("finding", f"{what}: it took {grown >> 10} MiB")
                    continue
                _tell("end", outcome)


def _tell(word: str, text: str) -> None:
    sys.stdout.write(f"{word} {' '.join(text.split())[:2000]}\n")
    sys.stdout.flush()


def _peak() -> int:
    """Most memory so far, kB; not by getrusage, which begins with what the parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MOST_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# What is tried

Checks = tuple[Callable[[int], str], Callable[[int], str]]


@contextlib.contextmanager
def _rasters(folder: Path) -> Iterator[Checks]:
    from ingest.simulate import serve

    from .fuzz_files import good_files, mutated

    (folder / "catalog.json").write_text('{"type": "Catalog", "id": "c", "links": []}')
    with serve(folder) as server:

        def check(number: int) -> str:
            data = good_files()["tiles-deflate-uint16-2"] if number < 0 else mutated(number)[1]
            path = folder / f"{number}.tif"
            path.write_bytes(data)
            (folder / f"{number}.tif.aux.xml").write_text(AUX)
            try:
                return check_raster(path, server.file_url(path.name) if number % REMOTE_EACH == 0 else None)
            finally:
                path.unlink()
                (folder / f"{number}.tif.aux.xml").unlink()

        assert check(-REMOTE_EACH) == "read"  # every thread there will be is there now

        yield check, lambda number: mutated(number)[0]


def check_raster(path: Path, url: str | None = None) -> str:
    """Read a file as an ingest does: local, again from the header kept, and over HTTP; GDAL must give the same pixels.

    Returns:
        "read", or "error" where it is refused.

    Raises:
        Finding: It gives other pixels, or pixels where GDAL gives none.
    """
    import numpy as np

    from ingest.raster.access import with_raster
    from ingest.raster.limits import Access
    from ingest.raster.read import read_on_grid
    from ingest.scenes.scene import AssetRef
    from zarr_store.errors import TerrashardError

    access = Access(attempts=1, deadline_s=10, private_names=None)
    place = str(path)
    try:
        told = with_raster(place, lambda raster: raster.header, scene="S", asset="a", access=access)
        kind = np.dtype(told.dtype).kind
        stored: Any = "float32" if kind == "f" else "uint8" if told.dtype == "uint8" else "uint16"
        windows = _windows(told.grid.height, told.grid.width)
        kind_of_band: Any = "class" if stored == "uint8" or told.palette else "data"
        asset = AssetRef(key="a", href=place, band="a", kind=kind_of_band)
        ours = [
            read_on_grid(asset, told.grid, told.grid.window(*window), "nearest", stored=stored, access=access)
            for window in windows
        ]
    except TerrashardError:
        return "error"
    expected = _gdal(path, windows, stored)
    for window, one, other in zip(windows, ours, expected, strict=True):
        if one.shape != other.shape or not np.array_equal(one, other, equal_nan=kind == "f"):
            differ = int((one != other).sum()) if one.shape == other.shape else -1
            raise Finding(f"{differ} of {one.size} pixels of {window} are not GDAL's")
    if url is not None:
        asset = AssetRef(key="a", href=url, band="a", kind=kind_of_band)
        try:
            far = read_on_grid(asset, None, told.grid.window(*windows[0]), "nearest", stored=stored, access=access)
        except TerrashardError as error:
            raise Finding(f"it is read here, and not over HTTP: {error}") from error
        if not np.array_equal(far, ours[0], equal_nan=kind == "f"):
            raise Finding("over HTTP it has other pixels")
    return "read"


def _windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """All of a small file, twice; corners of a large one."""
    if height * width <= 1 << 20:
        return [(0, 0, height, width), (height // 3, width // 3, height - height // 3, width - width // 3)]
    tall, wide = min(height, 128), min(width, 128)
    return [(0, 0, tall, wide), (height - tall, width - wide, tall, wide)]


def _gdal(path: Path, windows: list[tuple[int, int, int, int]], stored: str) -> list[Any]:
    """What GDAL reads, with no data as a cube has it."""
    import numpy as np
    import rasterio
    from rasterio._err import CPLE_BaseError
    from rasterio.enums import MaskFlags
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    driver = "GTiff" if path.read_bytes()[:2] in (b"II", b"MM") else "JP2OpenJPEG"
    options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO", "GDAL_NUM_THREADS": 1}
    if path.read_bytes()[:4] == b"\xff\x4f\xff\x51":
        options |= {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE", "GDAL_PAM_ENABLED": "YES"}
    pixels = []
    try:
        with rasterio.Env(**options), rasterio.open(path, driver=driver, sharing=False) as dataset:
            for row, col, height, width in windows:
                window = Window(col, row, width, height)
                raw = dataset.read(1, window=window)
                empty = ~np.isfinite(raw) if stored == "float32" else np.zeros(raw.shape, bool)
                if dataset.driver == "GTiff" and MaskFlags.per_dataset in dataset.mask_flag_enums[0]:
                    empty |= dataset.read_masks(1, window=window) == 0
                if dataset.nodata is not None and np.isfinite(dataset.nodata):
                    empty |= raw == dataset.nodata
                raw[empty] = np.nan if stored == "float32" else 0
                pixels.append(_as_in_a_cube(raw, stored, dataset.scales[0], dataset.offsets[0], dataset.units[0]))
    except (RasterioError, CPLE_BaseError) as error:
        raise Finding(f"it is read, and GDAL refuses it: {error}") from error
    return pixels


def _as_in_a_cube(raw: Any, stored: str, scale: float, offset: float, unit: str | None) -> Any:
    """GDAL's numbers by the rules of docs/ingest.md, "What a file states"; NaN or 0 where a number is no data."""
    import numpy as np

    if stored == "float32":
        with np.errstate(all="ignore"):
            power = (raw.astype(np.float32).astype(np.float64) * scale + offset).astype(np.float32)
            if (unit or "").strip().lower() in ("db", "decibel", "decibels"):
                power = np.power(np.float32(10), power / np.float32(10), dtype=np.float32)
            elif (power < 0).mean() > 0.5:
                raise Finding(f"it is read, and {(power < 0).mean():.0%} of its numbers are negative")
            return np.where(np.isfinite(power) & (power > 0), power, np.float32(np.nan))
    top = np.iinfo(stored).max
    numbers = raw.astype(np.float64)
    factor = scale / 1e-4 if scale != 1.0 and stored == "uint16" else 1.0
    if abs(factor - 1.0) > 1e-5:
        made = np.where((raw == 65535) & (raw.dtype == np.uint16), top, np.clip(np.rint(numbers * factor), 1, top))
        made[(raw == 0) | (numbers * factor < -1000)] = 0
    else:
        made = np.clip(numbers, 0, top)
        if stored == "uint16":
            made[(numbers < 0) & (numbers >= -1000)] = 1
    return made.astype(stored)


@contextlib.contextmanager
def _documents(folder: Path) -> Iterator[Checks]:
    from .fuzz_documents import Documents

    documents = Documents(folder)
    for name, data in documents.good.items():
        assert documents.read(name, data) == "read"
    yield documents.check, lambda number: documents.mutated(number)[0]


@contextlib.contextmanager
def _fault(folder: Path, what: str) -> Iterator[Checks]:
    def check(number: int) -> str:
        if number % 5 == 3:
            if what == "crash":
                os.abort()
            if what == "hang":
                time.sleep(3600)
            if what == "bomb":
                held = b"x" * (MOST_GROWTH_KB * 1024 + (64 << 20))
                return f"held {len(held)}"
            raise KeyError(number)
        return "read"

    yield check, lambda number: f"a file that makes a {what}"


KINDS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Checks]]] = {
    "rasters": _rasters,
    "documents": _documents,
    **{f"test-{what}": functools.partial(_fault, what=what) for what in ("crash", "hang", "bomb", "raise")},
}

if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
