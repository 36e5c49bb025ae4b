"""Shards of one worker overlap while they wait, and compute one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from distributed import Client, LocalCluster

from ingest import turns
from ingest.turns import computing, in_seat

pytestmark = pytest.mark.slow

_inside: dict[str, list[int]] = {"seated": [], "reading": [], "computing": []}
_lock = threading.Lock()
_threads: set[str] = set()
"""Those that made shards."""


@contextmanager
def counted(where: str, number: int, most: dict[str, int]) -> Iterator[None]:
    """Be at a place, and note how many are there at once."""
    with _lock:
        _inside[where].append(number)
    yield
    with _lock:
        most[where] = max(most.get(where, 0), len(_inside[where]))
        _inside[where].remove(number)


def work(number: int, remote: bool) -> dict[str, int]:
    """Read, compute and write; returns the most that did each at once."""
    most: dict[str, int] = {}

    def make(give_way: Callable[[], None]) -> str:
        with counted("seated", number, most):
            with counted("reading", number, most):
                time.sleep(0.3)
                with computing(), counted("computing", number, most):
                    time.sleep(0.1)
            give_way()
            time.sleep(0.3)
        return threading.current_thread().name

    name = in_seat(make, remote=remote)
    with _lock:
        _threads.add(name)
    return most


@pytest.mark.parametrize(("remote", "reading"), [(True, 2), (False, 1)])
def test_one_waits_while_another_computes(remote: bool, reading: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", None)
    _threads.clear()
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        came = client.gather(client.map(work, range(4), remote=remote, pure=False))
    most = {where: max(one[where] for one in came) for where in _inside}
    assert most["seated"] == 2, "shards in hand at once, for one thread"
    assert most["reading"] == reading, "only what waits for a network is read ahead of its turn"
    assert most["computing"] == 1, "more computed than there are threads"
    assert len(_threads) == 2, "threads stay: in a new one PROJ begins anew"


def test_outside_a_worker_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", None)
    together = threading.Barrier(3)

    def wait(give_way: Callable[[], None]) -> None:
        give_way()
        with computing():
            together.wait(timeout=10)

    def enter() -> None:
        in_seat(wait, remote=True)

    threads = [threading.Thread(target=enter, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    together.wait(timeout=10)  # raises if one of them waits for the other
    assert turns._turns is None, "there is nobody to take turns with"


@pytest.mark.parametrize("late", [False, True], ids=["before it gives way", "after it gave way"])
def test_what_goes_wrong_in_a_seat_is_told(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", None)

    def fail(give_way: Callable[[], None]) -> None:
        if late:
            give_way()
            time.sleep(0.2)
        raise ValueError("told")

    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
        pytest.raises(ValueError, match="told"),
    ):
        client.submit(in_seat, fail, remote=False).result(timeout=20)
