"""Worker processes that do not run the user's script once more.

A process that is started by multiprocessing imports the main module of its parent first. A script without
`if __name__ == "__main__":` would thereby search, plan and ingest again in each worker. Workers need nothing of that
module: what a task refers to in it is sent by value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from typing import Any

__all__ = ["main_module_left_alone"]

_DASK_WORKER = "Dask Worker"
"""How `distributed.Nanny` calls the processes of its workers."""

_lock = threading.Lock()
_open = 0
_preparation_data = spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _preparation_data(name)
    if name.startswith(_DASK_WORKER):
        data.pop("init_main_from_path", None)
        data.pop("init_main_from_name", None)
    return data


@contextmanager
def main_module_left_alone() -> Iterator[None]:
    """While this is open, workers of Dask start without the main module; other processes start as ever."""
    global _open  # several runs may be open at once
    with _lock:
        _open += 1
        spawn.get_preparation_data = _without_main
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                spawn.get_preparation_data = _preparation_data
