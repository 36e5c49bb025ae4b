"""A Dask cluster inside this process: quick to start, and what its worker does can be watched and replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster


@contextmanager
def worker_here(threads: int, *, set_as_default: bool = True, name: str | None = None) -> Iterator[Client]:
    """A client of one worker, on 127.0.0.1 only."""
    with (
        LocalCluster(
            name=name,
            n_workers=1,
            threads_per_worker=threads,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=set_as_default) as client,
    ):
        yield client
