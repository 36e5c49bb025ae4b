"""What a worker must be like: the packages of the client, one decoding thread each, and no threads inside GDAL.

Workers of a cluster that somebody else started may have another release of this package, which would write other
bytes under the same key. So each is asked before the first task, and each that joins later checks itself.
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
from ingest.worker.meters import stage_totals
from ingest.worker.rates import RateKeeper, bind_worker
from zarr_store.errors import InvalidInput
from zarr_store.printable import make_output_safe
from zarr_store.spec import CubeSpec

__all__ = [
    "CHECKED",
    "WORKER_ENVIRONMENT",
    "WORKER_SETTINGS",
    "WorkerGuard",
    "check_workers",
    "differences",
    "facts",
    "heartbeat_is_news",
    "memory_note",
]

log = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    # one decoding thread per worker thread; GDAL_NUM_THREADS is not among them on purpose, see ingest.raster.access
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Buffers of a shard stay with the process and serve the next: fresh memory from the system has to be faulted in
    # page by page, which took a quarter of a shard's time. What is kept is bounded by what one shard needs; one arena,
    # as each keeps its own: with two the worker grew to five and a half shards, with one to 3.7. And none is mapped by
    # itself, as the C library does with 32 MB and more, which are the pixels of most shards.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "MALLOC_MMAP_MAX_": "0",
}
# The C library reads its own settings once, as a process begins: so a nanny must have all of them before it starts one.
# Dask's profiler calls sys._current_frames() a hundred times a second. Before Python 3.12 a garbage collection within
# that call can free a thread's locals, which waits for a lock that the call itself holds: the process stops for ever,
# with the interpreter's lock in hand (CPython gh-106883). Since 3.12 nothing is collected inside an allocation.
WORKER_SETTINGS: dict[str, Any] = {
    "distributed.nanny.pre-spawn-environ": dict(WORKER_ENVIRONMENT),
    **({"distributed.worker.profile.enabled": False} if sys.version_info < (3, 12) else {}),
}
"""Dask's own configuration for workers that we start; a nanny hands it to its worker."""
SHARDS_HELD = 4
"""Shards that a thread holds at most while it makes one: its arrays, what is decoded, what is packed; measured by
benchmarks/ingest_memory.py."""
IDLE_BYTES = 250 << 20
"""Of a worker that has imported everything and done nothing."""
CHECKED = ("terrashard", "dask", "distributed", "imagecodecs", "numcodecs", "numpy", "rasterio", "tensorstore", "zarr")
"""Packages whose release decides over what is exchanged with a worker, or over bytes in the cube."""


def facts() -> dict[str, str]:
    """What of this process decides whether it may work on a cube."""
    return {**_releases(), "GDAL_NUM_THREADS": os.environ.get("GDAL_NUM_THREADS", "unset")}


@functools.cache
def _releases() -> dict[str, str]:
    """Of Python, GDAL and the packages that are checked; looking them up takes longer than many a shard."""
    import rasterio

    found = {"python": ".".join(platform.python_version_tuple()[:2]), "gdal": rasterio.__gdal_version__}
    for name in CHECKED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def differences(expected: Mapping[str, str], came: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Fact → (expected, came) where a worker differs; GDAL_NUM_THREADS must be unset, whatever the client has."""
    wanted = {**expected, "GDAL_NUM_THREADS": "unset"}
    return {name: (value, came.get(name, "absent")) for name, value in wanted.items() if came.get(name) != value}


def heartbeat_is_news(record: logging.LogRecord) -> bool:
    """Filter of the worker's log: a scheduler that is gone when a heartbeat comes is no error of the worker.

    That is how clusters end, now and then; a run whose scheduler really is lost says so itself.
    """
    kind = record.exc_info[0] if record.exc_info else None
    if kind is None or not issubclass(kind, OSError) or "heartbeat" not in str(record.msg):
        return True
    log.info("%s (%s)", record.getMessage(), kind.__name__)
    return False


class WorkerGuard(WorkerPlugin):
    """Sends a worker home that differs from the client, and lets the others send what their stages count."""

    name = "terrashard-guard"
    idempotent = True

    def __init__(self, expected: Mapping[str, str]) -> None:
        self.expected = dict(expected)

    async def setup(self, worker: Any) -> None:
        """Runs in each worker that is there, and in each that joins."""
        make_output_safe()
        worker.metrics["terrashard"] = lambda _: stage_totals()
        logging.getLogger("distributed.worker").addFilter(heartbeat_is_news)
        bind_worker(worker)
        guard_application(worker.http_application, machine_names())
        differ = differences(self.expected, facts())
        if differ:
            text = "; ".join(f"{name} {came}, expected {wanted}" for name, (wanted, came) in differ.items())
            log.error("worker %s may not work on this ingest and ends: %s", worker.address, text)
            # not awaited: a worker cannot close while it is being set up
            worker.loop.call_later(0.1, worker.close, reason="terrashard-other-versions")

    def teardown(self, worker: Any) -> None:
        """End what a closing worker still reads; one without a nanny may share its process with others."""
        if worker.nanny:
            end_waits()


def memory_note(client: Client, spec: CubeSpec) -> str | None:
    """What to change where a worker's memory limit is below what its threads need to make shards; None where it fits.

    Args:
        client: Its scheduler knows the limits of the workers; one without a limit has enough.
        spec: Of the collection that is made.
    """
    pixels = math.prod(spec.shape)
    pixel = sum(
        np.dtype(array.dtype).itemsize * math.prod(spec.array_shape(array.name)) // pixels for array in spec.arrays()
    )
    shard = pixel * max((math.prod(region.shape) for region in spec.shards().values()), default=0)
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
    """Refuse workers that differ from this process; those that join later are sent home by the guard.

    It also lets the scheduler keep the rate limits of providers.

    Raises:
        InvalidInput: With a table of what differs, where.
    """
    expected = facts()
    answers = client.run(facts, on_error="return")
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
