"""Run by `test_crash.py` in a process of its own: dies at every crash point in turn, repeats, and compares the bytes.

Each run is a fork of this process, which has imported everything and has no thread; Dask is left out, as the tasks are
the same without it. Prints one JSON line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import ingest.run.work as running
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.job import Job
from ingest.run.loop import run
from ingest.run.task import ingest_shard
from zarr_store import crash
from zarr_store.spec import Layout

sys.path.insert(0, str(Path(__file__).resolve().parent))
import growing  # type: ignore[import-not-found]  # mypy knows it as tests.ingest.growing

CLIENT: Any = SimpleNamespace(dashboard_link="")


def work_here(_client: Any, job: Job, tasks: Any, tally: Any, _tell: Any) -> None:
    for task in tasks:
        again = (task.collection, task.index) in job.again
        recipe = job.plan.recipe(task.collection)
        row, pixels = ingest_shard(task, recipe, job.url, Access(), fence=job.lock.token, again=again)
        tally.rows[row.state].append(row)
        tally.pixels_read += pixels


STAND_INS: dict[str, Callable[..., Any]] = {
    "_work": work_here,
    "prepare": lambda _client: None,
    "memory_note": lambda *_: None,
    "publish": lambda _client, _plan, _url, _known, tell: ("", tell),
}
for name, stand_in in STAND_INS.items():
    assert hasattr(running, name), name
    setattr(running, name, stand_in)


def threads() -> list[str]:
    """Names of the threads of this process; a fork keeps one of them, and locks of the others stay taken for good."""
    folder = Path("/proc/self/task")
    return sorted((task / "comm").read_text().strip() for task in folder.iterdir()) if folder.exists() else ["python"]


def forked(action: Callable[[], Any], at: int) -> int:
    """Exit code of a child that does the action and dies at the `at`-th crash point."""
    alone_by = time.monotonic() + 10
    while len(threads()) > 1:  # the kernel lists a thread for a moment after it was joined
        assert time.monotonic() < alone_by, threads()
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            crash.arm(at)
            action()
            code = 0
        except BaseException:  # noqa: BLE001 - a child never runs on in the parent's code, but says why it ends
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def published(cube: Path, into: Path) -> None:
    """What a program sees that knows Icechunk and not us: arrays and ledger of the branch, by their digests."""
    import hashlib

    import icechunk
    import zarr

    icechunk.set_logs_filter("error")
    store = icechunk.Repository.open(icechunk.local_filesystem_storage(str(cube))).readonly_session("main").store
    found = {}
    try:
        for name, node in zarr.open_group(store, mode="r").members(max_depth=None):
            data = node[...] if isinstance(node, zarr.Array) else None
            raw = b"" if data is None else repr(data.tolist()).encode() if data.dtype.kind in "TO" else data.tobytes()
            found[name] = hashlib.sha256(raw + json.dumps(dict(node.attrs), sort_keys=True).encode()).hexdigest()
    except zarr.errors.GroupNotFoundError:
        pass
    into.write_text(json.dumps(found))


def look(cube: Path, kind: str) -> dict[str, str]:
    """The files of a folder; of a repository what it publishes, as its files have random names, and our own files."""
    if kind == "folder":
        return {path: digest for path, digest in growing.tree(cube.parent).items() if not path.startswith(".")}
    into = cube.parent / "published.json"
    assert forked(lambda: published(cube, into), 0) == 0
    seen: dict[str, str] = json.loads(into.read_text())
    into.unlink()
    return seen


def points(action: Callable[[], Any], into: Path, kind: str) -> list[int]:
    """Where to die: everywhere; in a repository at each step of its commit, and now and then before it."""

    def count() -> None:
        crash.arm(1 << 30)
        action()
        into.write_text(json.dumps(crash.reached()))

    assert forked(count, 0) == 0
    names = json.loads(into.read_text())
    commit = ("commit", "staged")
    return [
        at
        for at, name in enumerate(names, 1)
        if kind == "folder" or at % 7 == 1 or any(word in name for word in commit)
    ]


def die_everywhere(
    name: str, action: Callable[[Path], Any], start: Path | None, folder: Path, kind: str
) -> dict[str, Any]:
    def fresh(at: str) -> Path:
        cube = folder / f"{name}-{at}" / "cube.zarr"
        cube.parent.mkdir()
        if start:
            shutil.copytree(start, cube)
        return cube

    whole = fresh("whole")
    assert forked(lambda: action(whole), 0) == 0
    expected, unlike, deaths = look(whole, kind), [], 0
    before = look(start, kind) if start else {}
    for at in points(lambda: action(fresh("count")), folder / f"{name}-names.json", kind):
        cube = fresh(str(at))
        code = forked(lambda cube=cube: action(cube), at)  # type: ignore[misc]
        assert code == crash.EXIT_CODE, f"{name}: crash point {at} ended with {code}"
        deaths += 1
        if kind == "icechunk" and cube.exists() and look(cube, kind) not in (before, expected):
            unlike.append([at, ["a snapshot of half a run"]])
        assert forked(lambda cube=cube: action(cube), 0) == 0, f"{name}: no repeat after crash point {at}"  # type: ignore[misc]
        left = look(cube, kind)
        if kind == "icechunk":
            left |= {path: "left over" for path in growing.tree(cube, under="_terrashard") if "/staged" in path}
        if left != expected:
            unlike.append([at, sorted(key for key in {*left, *expected} if left.get(key) != expected.get(key))])
        shutil.rmtree(cube.parent)
    return {"deaths": deaths, "unlike": unlike}


def main(folder: Path, kind: Literal["folder", "icechunk"]) -> None:
    if kind == "icechunk":
        # once here, not in every child; but not icechunk itself, whose threads no child would have
        importlib.import_module("zarr_store.repository")
    for name in ("imagecodecs._blosc", "odc.geo.geobox", "zarr_store.read"):  # what a run imports when it needs it
        importlib.import_module(name)
    config = IngestConfig(store=kind)
    layout = Layout("t", (1, 16, 16), (1, 64, 64))
    scenes = [growing.scene(folder / "scenes", day) for day in (10, 12, 15)]
    newer = growing.scene(folder / "scenes", 12, version=1)
    plan = growing.plan_of(scenes[:2], layout=layout)
    # A collection of garbage writes into every object, and the child gets a copy of every page that is written to: that
    # took as long as the run itself.
    gc.collect()
    gc.freeze()
    gc.disable()
    found: dict[str, Any] = {
        "make": die_everywhere("make", lambda c: run(plan, c, client=CLIENT, config=config), None, folder, kind),
    }
    made = folder / "make-whole" / "cube.zarr"

    def grow(cube: Path) -> None:
        growing.extend_with(cube, [scenes[0], newer, scenes[2]], CLIENT, refresh=True)

    found["grow"] = die_everywhere("grow", grow, made, folder, kind)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "icechunk" if sys.argv[2] == "icechunk" else "folder")
