"""Waiting that a stop ends: pauses between attempts, turns at a provider, and answers that come slowly.

A signal ends what the main thread waits for by itself. Threads that read from servers would go on until their own
timeouts, and the interpreter waits for them before it ends. So every wait of a thread goes through here, and
`end_waits` ends them all at once.
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from zarr_store.errors import Preempted

__all__ = ["allow_waits", "check_waits", "crew", "end_waits", "pause", "watch_socket"]

_ended = threading.Event()
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_lock = threading.Lock()


def pause(seconds: float) -> None:
    """Sleep, but not longer than until the process is told to stop.

    Raises:
        Preempted: The process is told to stop.
    """
    if seconds > 0:
        _ended.wait(seconds)
    check_waits()


def check_waits() -> None:
    """Go on, unless the process is told to stop.

    Raises:
        Preempted: The process is told to stop.
    """
    if _ended.is_set():
        raise Preempted("told to stop while it waited; the same command goes on from there")


def watch_socket(sock: socket.socket) -> None:
    """Let `end_waits` end what is read from a socket."""
    with _lock:
        _sockets.add(sock)
    if _ended.is_set():
        _shut(sock)


def end_waits() -> None:
    """End all pauses and all reads from servers in this process; new ones end at once, until `allow_waits`."""
    _ended.set()
    with _lock:
        found = list(_sockets)
    for sock in found:
        _shut(sock)


def allow_waits() -> None:
    """Let this process wait again, for its next command."""
    _ended.clear()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        # that of the plain class: the one of TLS takes the session from under a thread that reads
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


@contextmanager
def crew(size: int, name: str = "terrashard") -> Iterator[ThreadPoolExecutor]:
    """Threads for the `with` block; where it ends in an error, nobody waits for what they are still doing.

    Args:
        size: How many threads.
        name: What their names begin with.
    """
    pool = ThreadPoolExecutor(size, thread_name_prefix=name)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
