"""Run by `test_crash.py` in a process of its own: dies at every crash point in turn, repeats, and compares the bytes.

Each run is a fork of this process, which has imported everything and has no thread; Dask is left out, as the tasks are
the same without it. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ingest.run as running
from ingest.access import Access
from ingest.run import ingest_shard, run
from zarr_store import crash
from zarr_store.spec import Layout

sys.path.insert(0, str(Path(__file__).resolve().parent))
import growing

CLIENT: Any = SimpleNamespace(dashboard_link="")


def work_here(_client: Any, plan: Any, tasks: Any, url: str, _config: Any, tally: Any, _tell: Any, **more: Any) -> None:
    for task in tasks:
        again = (task.collection, task.index) in more["again"]
        row, pixels = ingest_shard(task, plan.recipe(task.collection), url, Access(), fence=more["fence"], again=again)
        tally.rows[row.state].append(row)
        tally.pixels_read += pixels


running._work = work_here
running.prepare = lambda _client: None
running.publish = lambda _client, _plan, _url, _known, tell: ("", tell)


def forked(action: Callable[[], Any], at: int) -> int:
    """Exit code of a child that does the action and dies at the `at`-th crash point."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            crash.arm(at)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_everywhere(name: str, action: Callable[[Path], Any], start: Path | None, folder: Path) -> dict[str, Any]:
    def fresh(at: str) -> Path:
        cube = folder / f"{name}-{at}" / "cube.zarr"
        cube.parent.mkdir()
        if start:
            shutil.copytree(start, cube)
        return cube

    whole = fresh("whole")
    assert forked(lambda: action(whole), 0) == 0
    expected, unlike, deaths = growing.tree(whole.parent), [], 0
    for at in range(1, 500):
        cube = fresh(str(at))
        code = forked(lambda cube=cube: action(cube), at)  # type: ignore[misc]
        if code == 0:
            break
        assert code == crash.EXIT_CODE, f"{name}: crash point {at} ended with {code}"
        deaths += 1
        assert forked(lambda cube=cube: action(cube), 0) == 0, f"{name}: no repeat after crash point {at}"  # type: ignore[misc]
        left = {path: digest for path, digest in growing.tree(cube.parent).items() if not path.startswith(".")}
        if left != expected:
            unlike.append([at, sorted(key for key in {*left, *expected} if left.get(key) != expected.get(key))])
        shutil.rmtree(cube.parent)
    return {"deaths": deaths, "unlike": unlike}


def main(folder: Path) -> None:
    layout = Layout("t", (1, 16, 16), (1, 64, 64))
    scenes = [growing.scene(folder / "scenes", day) for day in (10, 12, 15)]
    newer = growing.scene(folder / "scenes", 12, version=1)
    plan = growing.plan_of(scenes[:2], layout=layout)
    found: dict[str, Any] = {
        "make": die_everywhere("make", lambda cube: run(plan, cube, client=CLIENT), None, folder),
    }
    made = folder / "make-whole" / "cube.zarr"

    def grow(cube: Path) -> None:
        growing.extend_with(cube, [scenes[0], newer, scenes[2]], CLIENT, refresh=True)

    found["grow"] = die_everywhere("grow", grow, made, folder)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
