"""`CubeLock` admits one writing run at a time to a cube or run directory.

The lock is a file that names its holder. A holder on this machine that is no longer alive (other boot, dead pid, or
a pid that now belongs to a process started later) has lost it; a holder on another machine counts as alive.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zarr_store.backends import open_store
from zarr_store.bounded import load_json
from zarr_store.errors import Locked
from zarr_store.store import Store

__all__ = ["CubeLock", "is_held", "read_token"]

LOCK_KEY = "_terrashard/lock.json"


class CubeLock:
    """Hold the only write access to the store at `url`.

    Attributes:
        token: Names this holding; what is written for a run is written only while the lock still has its token.
        took_over: Whether a run that died had held the lock.

    Raises (on entering):
        Locked: Another run holds it; the message names host, process, purpose and since when.

    Example:
        >>> with CubeLock("cube.zarr", "a look from Python") as lock:
        ...     lock.took_over
        False
    """

    def __init__(self, url: str | os.PathLike[str], purpose: str, *, key: str = LOCK_KEY) -> None:
        self._store = open_store(url)
        self._purpose = purpose
        self._key = key
        self._mine: bytes | None = None
        self.token = secrets.token_hex(8)
        self.took_over = False

    def __enter__(self) -> Self:
        self._acquire()
        self._store.settle()
        return self

    def _acquire(self) -> None:
        mine = json.dumps(
            {
                **_identity(os.getpid()),
                "purpose": self._purpose,
                "token": self.token,
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        ).encode()
        # twice: the holder may end during the check; losing the lock to another run again is a true conflict
        for _ in range(2):
            if self._store.create_exclusive(self._key, mine):
                self._mine = mine
                return
            held = self._store.read(self._key)
            if held is None:
                continue
            holder = _parse(held)
            if not _is_dead(holder):
                raise Locked(
                    f"{self._store.url} is held by {holder.get('purpose', 'another run')} "
                    f"(host {holder.get('host', '?')}, pid {holder.get('pid', '?')}, "
                    f"since {holder.get('since', '?')}); "
                    f"wait for it to end, or, if that machine is gone, remove {self._store.where(self._key)}"
                )
            if self._store.take(self._key, held, mine):
                self._mine = mine
                self.took_over = True
                return
        raise Locked(f"{self._store.url} was taken by another run at the same moment; repeat the command")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine is not None and self._store.read(self._key) == self._mine:
            self._store.delete(self._key)
        self._mine = None


def read_token(store: Store, key: str = LOCK_KEY) -> str | None:
    """Return the token of the holder of the lock of a store; None if it is free."""
    held = store.read(key)
    token = _parse(held).get("token") if held else None
    return str(token) if token else None


def is_held(store: Store, key: str = LOCK_KEY) -> bool:
    """Return whether a living run holds the lock of a store; a holder on another machine counts as alive."""
    held = store.read(key)
    return held is not None and not _is_dead(_parse(held))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = load_json(data, "lock", most=1 << 16)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _identity(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "started": _start_time(pid)}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") != _boot_id():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    return _start_time(pid) != holder.get("started")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return the start of a process in clock ticks since boot (field 22 of /proc/<pid>/stat); None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _alive_without_proc(pid)
    return None if fields[0] in ("Z", "X") else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
