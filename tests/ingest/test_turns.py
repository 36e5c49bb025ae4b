"""Shards of one worker overlap while they wait, and compute one after the other."""

from __future__ import annotations

import threading
import time

import pytest
from distributed import Client, LocalCluster

from ingest import turns
from ingest.turns import computing, seat

pytestmark = pytest.mark.slow

_seated: list[int] = []
_computing: list[int] = []
_lock = threading.Lock()


def work(number: int, remote: bool) -> tuple[int, int]:
    """Wait as for a network, then compute; returns the most that did either at once."""
    with seat(remote=remote):
        with _lock:
            _seated.append(number)
            seated = len(_seated)
        time.sleep(0.3)
        with _lock:
            seated = max(seated, len(_seated))
        with computing():
            with _lock:
                _computing.append(number)
                computed = len(_computing)
            time.sleep(0.1)
            with _lock:
                computed = max(computed, len(_computing))
                _computing.remove(number)
        with _lock:
            _seated.remove(number)
    return seated, computed


@pytest.mark.parametrize(("remote", "together"), [(True, 2), (False, 1)])
def test_one_waits_while_another_computes(remote: bool, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", None)
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        came = client.gather(client.map(work, range(4), remote=remote, pure=False))
    assert max(seated for seated, _ in came) == together, "shards in hand at once, for one thread"
    assert max(computed for _, computed in came) == 1, "more computed than there are threads"


def test_outside_a_worker_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_turns", None)
    together = threading.Barrier(3)

    def enter() -> None:
        with seat(remote=True), computing():
            together.wait(timeout=10)

    threads = [threading.Thread(target=enter, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    together.wait(timeout=10)  # raises if one of them waits for the other
    assert turns._turns is None, "there is nobody to take turns with"
