"""`watch_workers` ends a run that has lost all its workers; Dask alone would wait without end.

A nanny gives up when the worker that it restarts does not come up in time, and a batch system may take every worker
back. The scheduler then keeps the tasks and reports no error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client

from zarr_store.errors import AccessError

__all__ = ["watch_workers"]

log = logging.getLogger(__name__)

OWN_PATIENCE_S = 150.0
"""Seconds to wait for a worker on this machine; a dead one is restarted in seconds, under heavy load in a minute."""
PATIENCE_S = 600.0
"""Seconds to wait for a worker that somebody else starts."""
_LOOK_S = 1.0
"""Seconds between two looks at the number of workers."""
_JOIN_S = 2.0
"""Seconds to wait for the watching thread at the end."""


@contextmanager
def watch_workers(client: Client, queue: Any, *, is_local: bool) -> Iterator[None]:
    """Watch the workers of a run: when none has been there for too long, empty `queue` and raise an error at the end.

    Args:
        client: A client of the scheduler.
        queue: The `as_completed` over which the caller iterates.
        is_local: Whether the workers are started by this process, on this machine.

    Raises:
        AccessError: No worker was left.
    """
    done, absent = threading.Event(), threading.Event()
    patience_s = OWN_PATIENCE_S if is_local else PATIENCE_S

    def watch() -> None:
        since: float | None = None
        while not done.wait(_LOOK_S):
            workers: Any = True
            with suppress(Exception):  # a scheduler that goes away is reported by the tasks
                workers = client.nthreads()  # type: ignore[no-untyped-call]
            if workers:
                since = None
                continue
            if since is None:
                since = time.monotonic()
                log.warning("no worker is left; waiting %.0f s for a new one", patience_s)
            if time.monotonic() - since >= patience_s:
                absent.set()
                queue.clear()  # each time: the caller may be about to put back a task whose result was lost

    watcher = threading.Thread(target=watch, name="terrashard-attendance", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(_JOIN_S)
    if absent.is_set():
        raise AccessError(
            f"all workers ended, and none came back within {patience_s:.0f} s; what was written stays, and the same "
            "command continues from there (if they ran out of memory, give --memory or fewer --workers)"
        )
