"""Waits that end when the process is stopped: pauses between attempts, rate limits, and slow responses.

A signal interrupts the main thread only. Threads that read from servers would go on until their own timeouts, and the
interpreter waits for them before it exits. So every wait of a thread goes through this module, and `end_waits` ends
them all at once.
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
    """Sleep for some seconds, or until the process is stopped.

    Raises:
        Preempted: The process is being stopped.
    """
    if seconds > 0:
        _ended.wait(seconds)
    check_waits()


def check_waits() -> None:
    """Raise if the process is being stopped.

    Raises:
        Preempted: The process is being stopped.
    """
    if _ended.is_set():
        raise Preempted("stopped while it waited; the same command continues from there")


def watch_socket(sock: socket.socket) -> None:
    """Register a socket, so that `end_waits` ends the reads from it."""
    with _lock:
        _sockets.add(sock)
    if _ended.is_set():
        _shut(sock)


def end_waits() -> None:
    """End all pauses and all reads from servers in this process; until `allow_waits`, new ones end at once too."""
    _ended.set()
    with _lock:
        watched = list(_sockets)
    for sock in watched:
        _shut(sock)


def allow_waits() -> None:
    """Allow waits in this process again, for its next command."""
    _ended.clear()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        # the plain socket's method: that of TLS would drop the session while another thread reads from it
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


@contextmanager
def crew(size: int, name: str = "terrashard") -> Iterator[ThreadPoolExecutor]:
    """Open a pool of threads for a `with` block; after an error, the block does not wait for their work.

    Args:
        size: Number of threads.
        name: Prefix of the threads' names.
    """
    pool = ThreadPoolExecutor(size, thread_name_prefix=name)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
