"""A run whose workers are all gone ends: Dask alone would wait for ever.

A nanny gives up for good when the worker that it starts anew does not come up in time, and a batch system may take
every worker back. Tasks then stay with the scheduler, which says nothing.
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

__all__ = ["attended"]

log = logging.getLogger(__name__)

OWN_PATIENCE_S = 150.0
"""Of workers on this machine; a worker that died is started anew within seconds, under great load within a minute."""
PATIENCE_S = 600.0
"""Of workers that somebody else starts."""
_LOOK_S = 1.0
_JOIN_S = 2.0


@contextmanager
def attended(client: Client, queue: Any, *, own: bool) -> Iterator[None]:
    """While this is open, `queue` is emptied when no worker has been there for long; that is the error at its end.

    Args:
        client: Of the scheduler.
        queue: The `as_completed` that the caller goes through.
        own: Whether the workers are started by this process, on this machine.

    Raises:
        AccessError: No worker was left.
    """
    done, absent = threading.Event(), threading.Event()
    patience_s = OWN_PATIENCE_S if own else PATIENCE_S

    def watch() -> None:
        since: float | None = None
        while not done.wait(_LOOK_S):
            workers: Any = True
            with suppress(Exception):  # whatever a scheduler that goes away makes of it: the tasks say that
                workers = client.nthreads()  # type: ignore[no-untyped-call]
            if workers:
                since = None
                continue
            if since is None:
                since = time.monotonic()
                log.warning("no worker is left; waiting %.0f s for one", patience_s)
            if time.monotonic() - since >= patience_s:
                absent.set()
                queue.clear()  # again and again: the caller may be about to put back a task whose result was lost

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
            "command goes on from there (if they ran out of memory, give --memory or fewer --workers)"
        )
