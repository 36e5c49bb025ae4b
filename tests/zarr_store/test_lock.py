"""One writing run at a time; the dead hold nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zarr_store import CubeLock
from zarr_store.backends import open_store
from zarr_store.errors import Locked
from zarr_store.lock import LOCK_KEY, read_token


def test_the_second_run_is_told_who_holds_it(tmp_path: Path) -> None:
    with CubeLock(tmp_path, "ingest"):
        with pytest.raises(Locked, match=r"held by ingest \(host .*, pid \d+, since 20"), CubeLock(tmp_path, "ingest"):
            pass
        assert (tmp_path / LOCK_KEY).exists()
    assert not (tmp_path / LOCK_KEY).exists()


def test_a_killed_holder_lost_it(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from zarr_store import CubeLock\n"
        "CubeLock(sys.argv[1], 'ingest').__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -9
    assert (tmp_path / LOCK_KEY).exists()  # the fault fired: a lock without a holder
    with CubeLock(tmp_path, "ingest"):
        pass
    assert [p.name for p in (tmp_path / "_terrashard").iterdir()] == []


def test_a_lock_that_was_lost_meanwhile_is_not_given_back(tmp_path: Path) -> None:
    """Whoever removed the lock by hand and began another run still has it when the first run ends."""
    with CubeLock(tmp_path, "ingest") as lock:
        (tmp_path / LOCK_KEY).unlink()
        with CubeLock(tmp_path, "repair") as other:
            assert lock.token != other.token
            lock.__exit__(None, None, None)
            assert read_token(open_store(tmp_path)) == other.token
    assert read_token(open_store(tmp_path)) is None


@pytest.mark.parametrize(("field", "value"), [("boot", "another boot"), ("started", "1")])
def test_another_boot_or_a_recycled_pid_is_dead(tmp_path: Path, field: str, value: str) -> None:
    with CubeLock(tmp_path, "ingest"):
        held = json.loads((tmp_path / LOCK_KEY).read_text())
    (tmp_path / LOCK_KEY).write_text(json.dumps(held | {field: value}))
    with CubeLock(tmp_path, "ingest"):
        assert json.loads((tmp_path / LOCK_KEY).read_text())[field] != value


def test_a_holder_on_another_host_is_believed(tmp_path: Path) -> None:
    with CubeLock(tmp_path, "ingest"):
        held = json.loads((tmp_path / LOCK_KEY).read_text())
    (tmp_path / LOCK_KEY).write_text(json.dumps(held | {"host": "elsewhere", "pid": 1}))
    with pytest.raises(Locked, match="host elsewhere"), CubeLock(tmp_path, "ingest"):
        pass
