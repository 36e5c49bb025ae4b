"""`TaskFolder` is the result of a task: a folder that appears complete, and whose beginning a repeated command finds.

The work lies in a hidden folder beside the result until it is complete. A run that was killed or told to stop leaves it
there with its state; the same command continues from it. Any other error removes it, so nothing half-written stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zarr_store.bounded import load_json
from zarr_store.crash import crashpoint
from zarr_store.durable import sync_tree, write_file
from zarr_store.errors import InvalidInput, NoSpace, Preempted
from zarr_store.lock import CubeLock
from zarr_store.store import translate_os_errors
from zarr_store.temporary import PARTIAL, remove_folder

__all__ = ["RESULT", "TaskFolder", "read_result"]

RESULT = "result.json"
"""Name of the file that describes a folder of results."""
_STATE = "state.json"
_LOCK = "lock.json"


class TaskFolder:
    """The work folder of one task.

    Args:
        out: Path of the result.
        task: Name of the command, such as "kmeans".
        request: JSON of all that determines the result; another request does not continue this one.

    Attributes:
        path: Folder in which files are made; it becomes `out`.
        state: State that an earlier run of the same request left; empty if there is none.

    Raises:
        InvalidInput: Something that is not a result of this task is at `out`.
        Locked: Another run makes the same result.
    """

    def __init__(self, out: str | Path, task: str, request: dict[str, Any]) -> None:
        self.out = Path(out).expanduser().absolute()
        self.task = task
        self.digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=list).encode()).hexdigest()
        self.path = self.out.with_name(f".{self.out.name}.{task}{PARTIAL}")
        self.state: dict[str, Any] = {}
        if "://" in str(out):
            raise InvalidInput(f"{out}: results go into a folder of this machine; give a path")
        if self.out.exists() and read_result(self.out, task) is None:
            raise InvalidInput(
                f"{self.out} exists and is not a result of `terrashard {task}`; nothing was changed: choose another "
                "path, or remove it"
            )

    def __enter__(self) -> Self:
        with translate_os_errors(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = CubeLock(self.path, self.task, key=_LOCK)
        self._lock.__enter__()
        try:
            held = load_json((self.path / _STATE).read_bytes(), str(self.path / _STATE))
            same = isinstance(held, dict) and held.get("request") == self.digest
        except (OSError, ValueError):
            held, same = {}, False
        if same:
            self.state = held["state"]
        else:
            self.clear()
        return self

    def keep(self, state: dict[str, Any]) -> None:
        """Keep the state from which a repeated command continues."""
        self.state = state
        with translate_os_errors(str(self.path)):
            write_file(self.path / _STATE, json.dumps({"request": self.digest, "state": state}).encode())

    def clear(self) -> None:
        """Remove everything but the lock."""
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def publish(self, result: dict[str, Any]) -> None:
        """Write what the folder is, and put it in its place; an earlier result of this task is replaced."""
        with translate_os_errors(str(self.path)):
            write_file(self.path / RESULT, json.dumps({"terrashard": self.task, **result}, indent=1).encode())
            sync_tree(self.path)
            crashpoint("before a result is in its place")
            if self.out.exists():
                remove_folder(self.out)
            crashpoint("before a result has its name")
            # the state goes last: a run that is killed before is continued, and publishes at once
            self.path.rename(self.out)
            (self.out / _STATE).unlink(missing_ok=True)
            (self.out / _LOCK).unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.path.exists():
            return
        if error is None or isinstance(error, KeyboardInterrupt | Preempted | NoSpace):
            self._lock.__exit__(kind, error, trace)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def read_result(folder: str | Path, task: str) -> dict[str, Any] | None:
    """Return what a folder of results says about itself; None if it is not a result of this task."""
    try:
        found = load_json((Path(folder) / RESULT).read_bytes(), str(Path(folder) / RESULT))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("terrashard") == task else None
