"""States of shards without their rows: what is kept, when it is believed, and how little is read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import zarr_store.states as keeping
from zarr_store.backends import open_store
from zarr_store.create import create_cube
from zarr_store.empty import keep_empty
from zarr_store.folder import FolderStore
from zarr_store.grid import Grid
from zarr_store.ledger import LedgerRow
from zarr_store.read import Cube, open_cube
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.states import ShardStates, StatesWatch, forget_states, keep_states, read_states

NAME = "s2"
GRID = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (48, 48))
SPEC = CubeSpec(
    NAME, "reflectance", (BandSpec("red"),), GRID, ("2023-01-01T00:00:00", "2023-01-02T00:00:00"), (),
    Layout("t", (1, 16, 16), (1, 16, 16)),
)  # fmt: skip
KEPT = f"_terrashard/states/{NAME}.bin"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are read from any folder."""
    keys: list[str] = []
    real = FolderStore.read

    def read(self: FolderStore, key: str) -> bytes | None:
        keys.append(key)
        return real(self, key)

    monkeypatch.setattr(FolderStore, "read", read)
    return keys


@pytest.fixture
def cube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cube:
    """Ten done, two partial, one failed, one empty, the rest pending, of 18 shards."""
    monkeypatch.setattr(keeping, "KEPT_FROM", 4)
    create_cube(tmp_path / "c.zarr", [SPEC], items={NAME: [{"id": "a", "datetime": "2023-01-01"}]}, provenance={})
    cube = open_cube(tmp_path / "c.zarr")
    shards = list(SPEC.shards().items())
    for number, (index, region) in enumerate(shards[:13]):
        state: Any = "done" if number < 10 else "partial" if number < 12 else "failed"
        cube.ledger(NAME).put(LedgerRow(index, region, f"key {number}", state))
    keep_empty(open_store(cube.url), SPEC, [(*shards[13], "empty")])
    return cube


COUNTS = {"done": 11, "partial": 2, "failed": 1, "pending": 4, "total": 18}


def row_reads(reads: list[str]) -> list[str]:
    return [key for key in reads if "/ledger/" in key]


def test_kept_states_equal_those_of_the_rows_and_no_row_is_read(cube: Cube, reads: list[str]) -> None:
    store = open_store(cube.url)
    states = cube.states(NAME)
    assert states.count() == COUNTS == cube.ledger(NAME).counts(18, SPEC.shards())
    keep_states(store, states)
    reads.clear()
    again = cube.states(NAME)
    assert row_reads(reads) == []
    assert again.count() == COUNTS
    assert list(again.unfinished()) == list(states.unfinished())
    assert [state for _, state in again.unfinished()] == ["partial"] * 2 + ["failed"] + ["pending"] * 4
    assert again.has_key((0, 0, 1), "key 1")
    assert not again.has_key((0, 0, 1), "key 2")
    assert again.has_key(list(SPEC.shards())[13], "empty")
    assert again.state((9, 9, 9)) == "pending"


def put(cube: Cube) -> None:
    index, region = list(SPEC.shards().items())[14]
    cube.ledger(NAME).put(LedgerRow(index, region, "new", "done"))


def drop(cube: Cube) -> None:
    cube.ledger(NAME).drop((0, 0, 0))


def remove(cube: Cube) -> None:
    Path(cube.url, "_terrashard/ledger", NAME, "0-0-0.json").unlink()


def list_more_empty(cube: Cube) -> None:
    shards = list(SPEC.shards().items())
    keep_empty(open_store(cube.url), SPEC, [(*shards[13], "empty"), (*shards[14], "empty")])


def forget(cube: Cube) -> None:
    forget_states(open_store(cube.url), NAME)


def damage(cube: Cube) -> None:
    path = Path(cube.url, KEPT)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(cube: Cube) -> None:
    path = Path(cube.url, KEPT)
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("change", [put, drop, remove, list_more_empty, forget, damage, cut])
def test_kept_states_are_not_believed_after(cube: Cube, reads: list[str], change: Any) -> None:
    keep_states(open_store(cube.url), cube.states(NAME))
    then = time.time_ns() - 10**9  # a clock of files may be coarser than this test
    os.utime(Path(cube.url, KEPT), ns=(then, then))
    for place in (Path(cube.url, "_terrashard/ledger", NAME), Path(cube.url, "_terrashard/empty", f"{NAME}.json")):
        os.utime(place, ns=(then - 10**8, then - 10**8))
    reads.clear()
    assert cube.states(NAME).count() == COUNTS
    assert row_reads(reads) == []
    change(cube)
    reads.clear()
    found = cube.states(NAME)
    assert len(row_reads(reads)) >= 12
    assert found.count() == cube.ledger(NAME).counts(18, SPEC.shards())


def test_states_whose_age_cannot_be_told_or_that_cannot_be_read_are_not_believed(cube: Cube, reads: list[str]) -> None:
    """The same tick of the clock as the last row, a clock that was ahead, and a folder of that name."""
    path, ledger = Path(cube.url, KEPT), Path(cube.url, "_terrashard/ledger", NAME)
    keep_states(open_store(cube.url), cube.states(NAME))
    for written in (ledger.stat().st_mtime_ns, time.time_ns() + 10**12):
        os.utime(path, ns=(written, written))
        reads.clear()
        assert cube.states(NAME).count() == COUNTS
        assert len(row_reads(reads)) >= 12
    path.unlink()
    path.mkdir()
    os.utime(ledger, ns=(0, 0))
    assert cube.states(NAME).count() == COUNTS


def test_states_of_a_cube_that_has_grown_since_are_read_from_the_rows(cube: Cube) -> None:
    states = cube.states(NAME)
    longer = CubeSpec(NAME, "reflectance", SPEC.bands, GRID, (*SPEC.times, "2023-01-03T00:00:00"), (), SPEC.layout)
    assert ShardStates.from_bytes(longer, states.to_bytes()) is None
    assert read_states(open_store(cube.url), longer).count()["total"] == 27


def test_a_row_of_another_region_is_pending() -> None:
    states = ShardStates.none(SPEC)
    (index, region), (_, other) = list(SPEC.shards().items())[:2]
    states.put(index, other, "k", "done")
    assert states.state(index) == "pending"
    states.put(index, region, "k", "done")
    assert states.state(index) == "done"


def test_a_watch_reads_a_row_that_is_done_once(cube: Cube, reads: list[str]) -> None:
    watch = StatesWatch(open_store(cube.url), SPEC)
    assert watch.look().count() == COUNTS
    put(cube)
    drop(cube)
    reads.clear()
    assert watch.look().count() == COUNTS  # one more, one less
    assert len(row_reads(reads)) == 4  # two partial, one failed, one new


def test_few_shards_leave_no_file(tmp_path: Path) -> None:
    create_cube(tmp_path / "c.zarr", [SPEC], items={NAME: [{"id": "a", "datetime": "2023-01-01"}]}, provenance={})
    keep_states(open_store(tmp_path / "c.zarr"), open_cube(tmp_path / "c.zarr").states(NAME))
    assert not (tmp_path / "c.zarr" / KEPT).exists()
