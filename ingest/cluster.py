"""Where tasks run: a Dask cluster of this machine's processes, or a scheduler that is already there.

Everything of our own listens on 127.0.0.1 only: an open scheduler port is code execution, an open dashboard shows
paths and names. The dashboard's address is known before the first task is sent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import dask
from distributed import Client, LocalCluster

from ingest.config import IngestConfig
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["WORKER_ENVIRONMENT", "dashboard_address", "open_cluster"]

WORKER_ENVIRONMENT = {
    # one decoding thread per worker thread; GDAL_NUM_THREADS is not among them on purpose, see ingest.access
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # freed decode buffers go back to the system instead of counting against the worker's memory limit
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
_CONNECT_S = 20
_DEATH_S = 60
"""A worker that cannot find its scheduler for this long ends itself, so none outlives a killed run."""


@contextmanager
def open_cluster(config: IngestConfig, *, most: int | None = None) -> Iterator[Client]:
    """A Dask client on the cluster that `config` asks for; a local cluster ends with the context.

    Args:
        config: `workers`, `threads_per_worker`, `memory`, `dashboard`, or `scheduler`.
        most: Number of tasks there will be: no more local workers than that are started.

    Raises:
        AccessError: No scheduler answers at `config.scheduler`.
        InvalidInput: The dashboard address cannot be used.
    """
    settings = {
        "distributed.comm.timeouts.connect": f"{_CONNECT_S}s",
        "distributed.scheduler.allowed-failures": 3,  # a shard that kills its worker this often is given up
        "distributed.worker.daemon": True,
    }
    with dask.config.set(settings):
        if config.scheduler:
            with _connected(config.scheduler) as client:
                yield client
            return
        workers = min(config.workers, most or config.workers)
        options = {
            "n_workers": workers,
            "threads_per_worker": config.threads_per_worker,
            "processes": True,  # GDAL's caches and locks are per process
            "host": "127.0.0.1",
            "dashboard_address": dashboard_address(config.dashboard),
            "memory_limit": _bytes(config.memory) if config.memory else "auto",
            "env": WORKER_ENVIRONMENT,
            "death_timeout": _DEATH_S,
            "silence_logs": logging.ERROR,
        }
        with (
            LocalCluster(**options) as cluster,  # type: ignore[no-untyped-call]
            Client(cluster, timeout=_CONNECT_S) as client,  # type: ignore[no-untyped-call]
        ):
            client.wait_for_workers(workers, timeout=120)
            yield client


def dashboard_address(asked: str | None) -> str:
    """Host and port of the dashboard: on loopback unless another host was named.

    >>> dashboard_address(None), dashboard_address(":8787")
    ('127.0.0.1:0', '127.0.0.1:8787')
    """
    if asked is None:
        return "127.0.0.1:0"
    found = re.fullmatch(r"(?:(?P<host>[\w.\-]*|\[[0-9a-fA-F:]+\]):)?(?P<port>\d{1,5})", asked.strip())
    if not found or int(found["port"]) > 65535:
        raise InvalidInput(f"dashboard address {asked!r} must be :PORT or HOST:PORT, e.g. :8787")
    return f"{found['host'] or '127.0.0.1'}:{found['port']}"


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        client = Client(address, timeout=_CONNECT_S)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:
        raise AccessError(
            f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler --host 127.0.0.1`, or "
            "leave --scheduler out to run on this machine"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            try:
                client.wait_for_workers(1, timeout=_CONNECT_S)
            except TimeoutError as error:
                raise AccessError(
                    f"the Dask scheduler at {address} has no worker; start some with `dask worker {address}`"
                ) from error
        try:
            client.get_versions(check=True)
        except ValueError as error:
            raise InvalidInput(
                f"the workers at {address} have other packages than this process; install the same: {error}"
            ) from error
        yield client


def _bytes(text: str) -> int:
    return int(dask.utils.parse_bytes(text))
