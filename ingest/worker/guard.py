"""Checks and settings of workers: the client's packages, one decoding thread per thread, no threads inside GDAL.

Workers of a cluster that somebody else started may have another release of this package, which would write other
bytes under the same key. So each worker is asked before the first task, and workers that join later check themselves.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from distributed import Client
from distributed.diagnostics.plugin import WorkerPlugin

from ingest.trust.hosts import guard_application, machine_names
from ingest.trust.waits import end_waits
from ingest.worker.keeper import RateKeeper
from ingest.worker.meters import stage_totals
from ingest.worker.rates import bind_worker
from zarr_store.errors import InvalidInput
from zarr_store.printable import make_output_safe
from zarr_store.spec import CubeSpec

__all__ = [
    "CHECKED",
    "LOG_ENVIRONMENT",
    "WORKER_ENVIRONMENT",
    "WORKER_SETTINGS",
    "WorkerGuard",
    "check_workers",
    "differences",
    "keep_log_record",
    "memory_note",
    "process_versions",
]

log = logging.getLogger(__name__)

LOG_ENVIRONMENT = {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "20"}
"""Environment of every process of a cluster. Dask keeps the last messages of each connection for its developers, by
default a thousand, each with the tasks that were sent and up to a megabyte. So a scheduler grew with every shard."""
WORKER_ENVIRONMENT = {
    # one decoding thread per worker thread; GDAL_NUM_THREADS is not among them on purpose, see ingest.raster.access
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # The buffers of a shard stay with the process and serve the next shard: fresh memory from the system is faulted in
    # page by page, which took a quarter of a shard's time. What stays is bounded by what one shard needs. There is one
    # arena, as each arena keeps its own buffers: with two a worker grew to 5.5 shards, with one to 3.7. No buffer is
    # mapped by itself, as the C library would do from 32 MB on, the size of the pixels of most shards.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "MALLOC_MMAP_MAX_": "0",
    **LOG_ENVIRONMENT,
}
# The C library reads its settings once, when a process starts. So a nanny needs them before it starts its worker.
# Dask's profiler calls sys._current_frames() a hundred times a second. Before Python 3.12, a garbage collection inside
# that call can free a thread's locals, which waits for a lock that the call itself holds. The process then hangs while
# it holds the interpreter's lock (CPython gh-106883). Since 3.12 no garbage is collected inside an allocation.
WORKER_SETTINGS: dict[str, Any] = {
    "distributed.nanny.pre-spawn-environ": dict(WORKER_ENVIRONMENT),
    "distributed.admin.low-level-log-length": int(*LOG_ENVIRONMENT.values()),
    **({"distributed.worker.profile.enabled": False} if sys.version_info < (3, 12) else {}),
    # Scheduler, nannies and workers look at their event loops fifty times a second, at their memory ten times and at
    # themselves twice. With two idle workers that was 4 % of two cores, now it is 2 %.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "1s",
    "distributed.worker.memory.monitor-interval": "200ms",
}
"""Dask configuration of the clusters that we start; a nanny passes it on to its worker."""
SHARDS_HELD = 4
"""Most memory of one thread, in shards: the arrays of a shard, decoded blocks and compressed chunks.

benchmarks/ingest_memory.py measures it.
"""
IDLE_BYTES = 250 << 20
"""Memory of a worker that has imported everything and made no shard, bytes."""
CHECKED = ("terrashard", "dask", "distributed", "imagecodecs", "numcodecs", "numpy", "rasterio", "tensorstore", "zarr")
"""Packages whose release affects what is exchanged with a worker, or the bytes in a cube."""


def process_versions() -> dict[str, str]:
    """Return the versions and settings of this process that decide whether it may work on a cube."""
    return {**_releases(), "GDAL_NUM_THREADS": os.environ.get("GDAL_NUM_THREADS", "unset")}


@functools.cache
def _releases() -> dict[str, str]:
    """Return the releases of Python, GDAL and the checked packages; looking them up takes longer than a small shard."""
    import rasterio

    releases = {"python": ".".join(platform.python_version_tuple()[:2]), "gdal": rasterio.__gdal_version__}
    for name in CHECKED:
        try:
            releases[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            releases[name] = "absent"
    return releases


def differences(expected: Mapping[str, str], came: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return name → (expected, came) where a worker differs; GDAL_NUM_THREADS must be unset on every worker."""
    wanted = {**expected, "GDAL_NUM_THREADS": "unset"}
    return {name: (value, came.get(name, "absent")) for name, value in wanted.items() if came.get(name) != value}


def keep_log_record(record: logging.LogRecord) -> bool:
    """Filter the worker's log: a heartbeat that finds no scheduler is logged as information, not as an error.

    This is how some clusters end. A run that really loses its scheduler reports that itself.
    """
    kind = record.exc_info[0] if record.exc_info else None
    if kind is None or not issubclass(kind, OSError) or "heartbeat" not in str(record.msg):
        return True
    log.info("%s (%s)", record.getMessage(), kind.__name__)
    return False


class WorkerGuard(WorkerPlugin):
    """A plugin that ends workers that differ from the client, and lets the others send their counters."""

    name = "terrashard-guard"
    idempotent = True

    def __init__(self, expected: Mapping[str, str]) -> None:
        self.expected = dict(expected)

    async def setup(self, worker: Any) -> None:
        """Check and set up a worker; Dask calls this in each worker that is there, and in each that joins."""
        make_output_safe()
        worker.metrics["terrashard"] = lambda _: stage_totals()
        logging.getLogger("distributed.worker").addFilter(keep_log_record)
        bind_worker(worker)
        guard_application(worker.http_application, machine_names())
        differ = differences(self.expected, process_versions())
        if differ:
            text = "; ".join(f"{name} {came}, expected {wanted}" for name, (wanted, came) in differ.items())
            log.error("worker %s may not work on this ingest and ends: %s", worker.address, text)
            # scheduled and not awaited: a worker cannot close while it is being set up
            worker.loop.call_later(0.1, worker.close, reason="terrashard-other-versions")

    def teardown(self, worker: Any) -> None:
        """End the reads of a closing worker; one without a nanny is left alone, as it may share its process."""
        if worker.nanny:
            end_waits()


def memory_note(client: Client, spec: CubeSpec) -> str | None:
    """Return advice if a worker's memory limit is too low for its threads to make shards; None if all suffice.

    Args:
        client: Client of the scheduler, which knows the memory limits; a worker without a limit has enough.
        spec: The collection that is made.
    """
    pixels = math.prod(spec.shape)
    pixel = sum(
        np.dtype(array.dtype).itemsize * math.prod(spec.array_shape(array.name)) // pixels for array in spec.arrays()
    )
    shard = pixel * math.prod(min(size, step) for size, step in zip(spec.shape, spec.layout.shard, strict=True))
    for address, worker in sorted(client.scheduler_info(n_workers=-1)["workers"].items()):
        limit, threads = int(worker["memory_limit"] or 0), int(worker["nthreads"])
        needed = IDLE_BYTES + SHARDS_HELD * shard * threads
        if limit and limit < needed:
            return (
                f"worker {address} may use {limit >> 20} MiB, and {threads} thread(s) that make shards of "
                f"{shard >> 20} MiB need about {needed >> 20} MiB; give --memory {-(-needed // 10**6)}MB, or plan with "
                "a --profile of smaller shards"
            )
    return None


def check_workers(client: Client) -> None:
    """Refuse workers that differ from this process, and start the plugins that check later ones and keep rate limits.

    Raises:
        InvalidInput: Workers differ; the message is a table of worker, name, expected and actual value.
    """
    expected = process_versions()
    answers = client.run(process_versions, on_error="return")
    rows = []
    for address, came in sorted(answers.items()):
        if isinstance(came, BaseException):
            rows.append((address, "terrashard", expected["terrashard"], f"cannot be asked: {came}"))
        else:
            rows += [(address, name, *pair) for name, pair in differences(expected, came).items()]
    if rows:
        head = ("worker", "what", "expected", "came")
        wide = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
        table = "\n".join(
            "  " + "  ".join(text.ljust(w) for text, w in zip(row, wide, strict=True)).rstrip() for row in (head, *rows)
        )
        raise InvalidInput(
            f"{len({row[0] for row in rows})} of {len(answers)} workers differ from this process; install the same "
            f"packages there, and unset GDAL_NUM_THREADS (it hides failed reads):\n{table}"
        )
    client.register_plugin(RateKeeper())
    client.register_plugin(WorkerGuard(expected))
