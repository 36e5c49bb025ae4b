"""SIGKILL of `predict` at random moments: the repeated command makes what is missing, and the bytes are the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jaxtrain.inference.making import making_folder
from jaxtrain.inference.maps import open_map
from jaxtrain.inference.opening import open_scene
from jaxtrain.inference.options import MapOptions

from ..cube_factory import make_cube, shared_run

SIDE, SHARDS = 1536, 9
LONG = pytest.mark.skipif(not os.environ.get("TERRASHARD_LONG"), reason="minutes of killing; set TERRASHARD_LONG=1")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("kills") / "cube.zarr"
    make_cube(url, shape=(1, SIDE, SIDE), chunk=256, shard=512)
    assert len(open_scene(shared_run(), url, MapOptions()).shards) == SHARDS
    return url


@pytest.fixture(scope="module")
def whole(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map of a command that is not disturbed; its item links to the cube by the way from a folder like a test's."""
    out = tmp_path_factory.mktemp("whole") / "m.zarr"
    assert finish(start(scene, out))["shards_made"] == SHARDS
    return out


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, bytes]:
    return tree(whole)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(scene: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command; tests have eight devices, and the command as a user types it has those of the cores."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-m", "cli.main", "predict", str(shared_run()), str(scene), str(out), "--json", *more]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    document: dict[str, Any] = json.loads(out)
    return document


def rows(out: Path) -> int:
    """Shards that are complete."""
    return len(list(making_folder(out).glob("map/_terrashard/ledger/map/*.json")))


def wait_for(true: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until something is true, as long as the process runs; returns whether it is."""
    until = time.monotonic() + 300
    while not true():
        assert time.monotonic() < until
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill the command alone: what it has started must end with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def helpers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of the command that fill shards."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "jaxtrain.inference.helper" in child.cmdline():
                found.append(child)
    return found


def test_a_command_that_is_killed_is_continued_by_the_same_command(
    scene: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "m.zarr"
    process = start(scene, out)
    assert wait_for(lambda: rows(out) >= 2, process)
    kill_tree(process)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    left = rows(out)
    assert 2 <= left < SHARDS
    assert finish(start(scene, out))["shards_made"] == SHARDS - left
    assert tree(out) == expected


@LONG
@pytest.mark.parametrize(("more", "kills"), [((), 12), (("--workers", "2"), 10)])
def test_many_kills(scene: Path, expected: dict[str, bytes], tmp_path: Path, more: tuple[str, ...], kills: int) -> None:
    """Each kill comes a random time after a random number of complete shards, to a command or to its helper."""
    draw, out, killed, shards = random.Random(20), tmp_path / "m.zarr", 0, []
    while killed < kills:
        process = start(scene, out, *more)
        wanted = draw.randrange(rows(out), SHARDS)
        there = wait_for(lambda wanted=wanted: rows(out) >= wanted, process)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 3.0 if wanted == 0 else 0.3))
        if not there or process.poll() is not None:  # it was faster: the map is whole
            finish(process)
            assert tree(out) == expected
            shutil.rmtree(out)
            continue
        children = helpers(process)
        if children and draw.random() < 0.5:
            draw.choice(children).kill()  # it is started again
            finish(process)
            assert tree(out) == expected
            shutil.rmtree(out)
        else:
            kill_tree(process)
        killed += 1
        shards.append(wanted)
        if rows(out) > SHARDS - 3:  # what is left is too little for further moments
            finish(start(scene, out, *more))
            assert tree(out) == expected
            shutil.rmtree(out)
    finish(start(scene, out, *more))
    assert tree(out) == expected
    assert len(set(shards)) > 3


@pytest.fixture
def cluster(environment_given_back: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two workers that are processes, as a cluster has them; the eight devices of the tests are not theirs."""
    from distributed import LocalCluster

    monkeypatch.delenv("XLA_FLAGS")
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@LONG
def test_a_dask_worker_that_is_killed(scene: Path, expected: dict[str, bytes], tmp_path: Path, cluster: Any) -> None:
    out = tmp_path / "m.zarr"
    process = start(scene, out, "--dask", cluster.scheduler_address)
    assert wait_for(lambda: rows(out) >= 1, process)
    victim = cluster.workers[0].process.pid
    os.kill(victim, signal.SIGKILL)
    finish(process)
    assert tree(out) == expected


def test_the_number_of_devices_changes_the_last_digit_at_most(
    scene: Path, whole: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The command has one for each core. Both are commands: the tests' own compiler settings round otherwise."""
    finish(start(scene, tmp_path / "m.zarr", "--devices", "1"))
    assert tree(tmp_path / "m.zarr").keys() == expected.keys()
    one, many = (open_map(path) for path in (tmp_path / "m.zarr", whole))
    assert (one.read() == many.read()).mean() > 0.9999
    confidence = [made.read("confidence").astype(int) for made in (one, many)]
    assert np.abs(confidence[0] - confidence[1]).max() <= 1
