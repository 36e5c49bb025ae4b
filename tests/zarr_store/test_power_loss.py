"""Losing power (FAULTS Z17): what a ledger row says is done is on the disk before the row is.

The system calls of a writer are recorded with strace, and replayed against a disk that
forgets whatever was not synced: bytes of files, and names in folders.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zarr_store import durable, folder
from zarr_store.folder import FolderStore

WRITER = """
import sys
import numpy as np
from zarr_store.grid import Grid
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.create import create_cube
from zarr_store.write import ShardWriter

grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (64, 128))
layout = Layout("t", (1, 32, 32), (1, 64, 64))
bands = (BandSpec("red", 0, 1e-4, 0.0, "1", 0.66),)
spec = CubeSpec("s2", "reflectance", bands, grid, ("2023-08-10T10:00:00",), ("scl",), layout)
create_cube(sys.argv[1], [spec], items={"s2": [{"id": "a", "datetime": "2023-08-10T10:00:00"}]}, provenance={})
for region in spec.shards().values():
    size = {True: (1, 1, 64, 64), False: (1, 64, 64)}
    arrays = {a.name: np.ones(size["band" in a.dims], a.dtype) for a in spec.arrays()}
    ShardWriter(sys.argv[1], "s2").write(region, arrays, key="k", sources=())
"""


class Disk:
    """What would be lost if the power went now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: set[str] = set()
        """Files whose content is not synced."""
        self.names: set[tuple[str, str]] = set()
        """(folder, name) of names that are not synced."""

    def see(self, call: str, paths: list[str], line: str) -> None:
        mine = [path for path in paths if path == str(self.root) or path.startswith(f"{self.root}/")]
        if not mine:
            return
        if call == "openat" and "O_CREAT" in line:
            self.bytes.add(mine[-1])
            self.names.add((os.path.dirname(mine[-1]), os.path.basename(mine[-1])))
        elif call.startswith("mkdir"):
            self.names.add((os.path.dirname(mine[-1]), os.path.basename(mine[-1])))
        elif call in ("fsync", "fdatasync"):
            self.bytes.discard(mine[0])
            self.names = {(folder, name) for folder, name in self.names if folder != mine[0]}
        elif call.startswith("rename"):
            old, new = mine
            self.bytes = {self._moved(path, old, new) for path in self.bytes}
            self.names = {
                (self._moved(folder, old, new), name)
                for folder, name in self.names
                if (folder, name) != (os.path.dirname(old), os.path.basename(old))
            } | {(os.path.dirname(new), os.path.basename(new))}
        elif call.startswith("unlink"):
            self.bytes.discard(mine[-1])
            self.names.discard((os.path.dirname(mine[-1]), os.path.basename(mine[-1])))

    @staticmethod
    def _moved(path: str, old: str, new: str) -> str:
        return new + path.removeprefix(old) if path == old or path.startswith(f"{old}/") else path

    @property
    def lost(self) -> set[str]:
        return self.bytes | {f"{folder}/{name}" for folder, name in self.names}


def calls(trace: str) -> Iterator[tuple[str, list[str], str]]:
    """Calls that succeeded, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[pid] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        if found := re.match(r"<\.\.\. (\w+) resumed>(.*)", text):
            text = begun.pop(pid) + found[2]
        if not (found := re.match(r"(\w+)\(", text)) or not re.search(r"\)\s+= \d", text):
            continue
        told = [one or other for one, other in re.findall(r'"([^"]*)"|\d+<([^>]*)>', text.rpartition(" = ")[0])]
        yield found[1], told, text


def test_what_a_row_says_is_done_is_on_the_disk_before_the_row_is(tmp_path: Path, repository: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    trace, root = tmp_path / "trace", tmp_path / "disk"
    root.mkdir()
    watched = "trace=openat,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat"
    done = subprocess.run(
        [strace, "-f", "-y", "-s", "4096", "-e", watched, "-o", str(trace), sys.executable, "-c", WRITER,
         str(root / "cube.zarr")],
        env={**os.environ, "PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr[-2000:]
    disk, rows, shards = Disk(root), 0, 0
    for call, paths, line in calls(trace.read_text()):
        if call.startswith("rename") and "/_terrashard/ledger/" in paths[-1] and paths[-1].endswith(".json"):
            rows += 1
            own = os.path.dirname(paths[-1])
            at_risk = {path for path in disk.lost if not path.startswith(own + "/")}
            assert at_risk == set(), "losing power now would leave a row whose shard, or whose cube, is not there"
            assert paths[-2] not in disk.bytes, "the row appears with its bytes"
        shards += call.startswith("rename") and paths[-1].startswith(f"{root}/cube.zarr/") and "/c/" in paths[-1]
        disk.see(call, paths, line)
    assert (rows, shards) == (2, 2 * 5), "the recorder saw the rows and the shards of the arrays and the overview"
    assert disk.lost == set()


def test_new_folders_and_new_cubes_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for what Python itself does, where there is no strace."""
    synced: list[Path] = []
    real = durable.sync_folder

    def note(folder: Path) -> None:
        synced.append(folder)
        real(folder)

    monkeypatch.setattr(durable, "sync_folder", note)
    monkeypatch.setattr(folder, "sync_folder", note)
    store = FolderStore(tmp_path / "cube")
    with store.beside() as fresh:
        fresh.write("a/b/zarr.json", b"{}")
        assert fresh.root in synced
        synced.clear()
    assert {path.name for path in synced[:3]} == {fresh.root.name, "a", "b"}, "the whole of it, before it appears"
    assert synced[-1] == tmp_path
    synced.clear()
    x = store.root / "x"
    store.write("x/y/0/0", b"a")
    assert synced == [store.root, x, x / "y", x / "y" / "0"]
    synced.clear()
    store.write("x/y/0/1", b"a")
    assert synced == [x / "y" / "0"], "folders that are there need no syncing but the file's own"
