"""Start worker processes that neither run the user's script again nor change its environment for good.

A process that multiprocessing starts first imports the main module of its parent. With a script that lacks
`if __name__ == "__main__":`, each worker would search, plan and ingest again. Workers need nothing of that module, as
everything in it that a task refers to is sent by value.

A worker inherits its environment. A Dask nanny therefore writes its settings into the environment of the process that
it runs in, unless they are there already, and leaves them there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import current_process, spawn
from typing import Any

from zarr_store.errors import InvalidInput

__all__ = ["environment_lent", "main_module_left_alone", "refuse_unguarded_script"]

_DASK_WORKER = "Dask Worker"
"""Prefix of the names that `distributed.Nanny` gives to the processes of its workers."""

_BY_DASK = ("PYTHONHASHSEED", "__DASK_PARENT_PID")
"""Variables that Dask sets for its workers, besides the settings."""

_lock = threading.Lock()
_open = 0
_preparation_data = spawn.get_preparation_data
_borrowers = 0
_before: dict[str, str | None] = {}


def _without_main(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _preparation_data(name)
    if name.startswith(_DASK_WORKER):
        data.pop("init_main_from_path", None)
        data.pop("init_main_from_name", None)
    return data


def refuse_unguarded_script() -> None:
    """Refuse to start workers while a process that multiprocessing has started is still importing the user's script.

    Raises:
        InvalidInput: A script without `if __name__ == "__main__":` runs again in each process that it starts.
    """
    if getattr(current_process(), "_inheriting", False):
        raise InvalidInput(
            "a process that this script started is running the script again, and cannot start workers: put what the "
            'script does, from the Dask client on, into a function and call it under `if __name__ == "__main__":`'
        )


@contextmanager
def main_module_left_alone() -> Iterator[None]:
    """Start Dask workers without the main module during a `with` block; other processes start as usual."""
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


@contextmanager
def environment_lent(settings: Mapping[str, str]) -> Iterator[None]:
    """Put the environment of workers into that of this process during a `with` block, and put the old one back.

    Without it, the settings that an earlier cluster of Dask left would win over ours, and ours would stay: a training
    that follows in the same process would compute with one thread, and leave the memory settings of a worker alone.

    Args:
        settings: Name → value.
    """
    global _borrowers  # several runs may be open at once
    with _lock:
        if not _borrowers:
            _before.update({name: os.environ.get(name) for name in (*settings, *_BY_DASK)})
        _borrowers += 1
        os.environ.update(settings)
    try:
        yield
    finally:
        with _lock:
            _borrowers -= 1
            if not _borrowers:
                for name, value in _before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
                _before.clear()
