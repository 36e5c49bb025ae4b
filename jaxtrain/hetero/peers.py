"""The connections of one member with the others: a thread for each direction, so that sending and receiving overlap.

Every member connects to each other member to send, and accepts a connection from each to receive. Who accepts decides
where a body goes before it is received, so it lands in its final place without a copy.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtrain.hetero.wire import (
    BLOCK_BYTES,
    BULK_HEADER_BYTES,
    SHAPE_ERRORS,
    connect,
    format_address,
    greet,
    pack,
    receive,
    receive_into,
    send,
)
from zarr_store.crash import crashpoint

__all__ = ["Peer", "Peers"]

_STRANGERS = 256
"""Most connections at a time whose member is not yet known; in a large group many peers connect at once."""
_CONNECT_S = 5.0
_AGAIN_S = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Another member: its number, its name, and host:port at which it receives."""

    number: int
    name: str
    address: str


@dataclass(frozen=True)
class _Message:
    token: Hashable
    head: bytes
    body: memoryview


class _Sender:
    """Sender of messages to one peer, in order, in a thread."""

    def __init__(self, peers: Peers, peer: Peer) -> None:
        self._peers, self._peer = peers, peer
        self._queue: deque[_Message] = deque()
        self._wake = threading.Condition()
        self._socket: socket.socket | None = None
        self.closed = False
        self._thread = threading.Thread(target=self._run, name=f"{peers.name} to {peer.name}", daemon=True)
        self._thread.start()

    def put(self, message: _Message) -> None:
        with self._wake:
            self._queue.append(message)
            self._wake.notify()

    def purge(self, token: Hashable) -> None:
        """Remove unsent messages that do not belong to this token."""
        with self._wake:
            self._queue = deque(message for message in self._queue if message.token == token)

    def close(self) -> None:
        with self._wake:
            self.closed = True
            self._queue.clear()
            self._wake.notify()
        _end(self._socket)

    def join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_CONNECT_S + 1)

    def _connect(self) -> socket.socket:
        """Connect; a peer that is too busy to answer gets as much time as a silent one."""
        until = time.monotonic() + self._peers.silence_s
        while True:
            try:
                return self._peers.connect(self._peer)
            except OSError:
                if self.closed or time.monotonic() > until:
                    raise
            time.sleep(_AGAIN_S)

    def _next(self) -> _Message | None:
        with self._wake:
            while not self._queue and not self.closed:
                self._wake.wait()
            return None if self.closed else self._queue.popleft()

    def _run(self) -> None:
        try:
            self._socket = self._connect()
            if self.closed:
                _end(self._socket)
            while (message := self._next()) is not None:
                send(self._socket, message.head, message.body)
                crashpoint("a block was sent")
        except OSError as error:
            if not self.closed:
                self.close()
                self._peers.lose(self._peer.number, error)
        finally:
            self.closed = True
            if self._socket is not None:
                self._socket.close()


class Peers:
    """All connections of one member with others.

    Args:
        name: Name of this member, for threads and messages.
        listener: Socket at which others reach it.
        key: The secret of the group.
        group: Name of the group; who means another one is refused.
        number: Number of this member.
        silence_s: Seconds after which a connection that acknowledges nothing is given up.
        place: Returns where a body goes: (number of the sender, header, bytes, whether the connection still stands) →
            memory, or None to throw it away. It may wait until it knows.
        arrived: Called when a body is complete.
        lost: Called when a member cannot be reached.
    """

    def __init__(
        self,
        name: str,
        listener: socket.socket,
        *,
        key: bytes,
        group: str,
        number: int,
        silence_s: float,
        place: Callable[[int, Mapping[str, Any], int, Callable[[], bool]], memoryview | None],
        arrived: Callable[[int, Mapping[str, Any], int], None],
        lost: Callable[[int, str], None],
    ) -> None:
        self.name = name
        self._listener, self._key, self._purpose = listener, key, f"peer of {group}"
        self._number, self.silence_s = number, silence_s
        self._place, self._arrived, self._lost = place, arrived, lost
        self._lock = threading.Lock()
        self._senders: dict[int, _Sender] = {}
        self._incoming: dict[socket.socket, int] = {}
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._start(self._accept, "listener")

    def _start(self, run: Callable[..., None], what: str, *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, name=f"{self.name} {what}", daemon=True)
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    # ── sending ──

    def send(self, peer: Peer, token: Hashable, header: Mapping[str, Any], body: memoryview) -> None:
        """Put a message into the queue of a peer; the body must not change until it is sent.

        Args:
            peer: The receiver.
            token: Token of the message; `purge` drops messages of other tokens.
            header: Map with a kind.
            body: The body, at most `BLOCK_BYTES` bytes.
        """
        with self._lock:
            if self._closed:
                return
            sender = self._senders.get(peer.number)
            if sender is None or sender.closed:
                sender = self._senders[peer.number] = _Sender(self, peer)
        sender.put(_Message(token, pack(header, len(body)), body))

    def purge(self, token: Hashable) -> None:
        """Drop all queued messages that do not belong to a token."""
        with self._lock:
            senders = list(self._senders.values())
        for sender in senders:
            sender.purge(token)

    def reconnect(self) -> None:
        """Send over new connections from now on, as a present one may have broken without notice."""
        with self._lock:
            senders = list(self._senders.values())
            self._senders.clear()
        for sender in senders:
            sender.close()

    def keep(self, numbers: Iterable[int]) -> None:
        """End the connections with all members but these."""
        kept = set(numbers)  # a connection of number 0 has not yet said whose it is
        with self._lock:
            gone = [self._senders.pop(number) for number in set(self._senders) - kept]
            ended = [sock for sock, number in self._incoming.items() if number and number not in kept]
            for sock in ended:  # a thread that waits for a place for its block stops waiting
                del self._incoming[sock]
        for sender in gone:
            sender.close()
        for sock in ended:
            _end(sock)

    def connect(self, peer: Peer) -> socket.socket:
        """Connect to a peer and identify this member."""
        sock = connect(peer.address, self._key, self._purpose, silence_s=self.silence_s, wait_s=_CONNECT_S)
        sock.sendall(pack({"kind": "peer", "number": self._number}))
        return sock

    def lose(self, number: int, error: OSError) -> None:
        """Report that a peer cannot be reached."""
        if not self._closed:
            self._lost(number, str(error))

    # ── receiving ──

    def _accept(self) -> None:
        while True:
            try:
                sock, source = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_AGAIN_S)  # for example no free file descriptor at the moment
                continue
            with self._lock:
                if self._closed or sum(number == 0 for number in self._incoming.values()) >= _STRANGERS:
                    sock.close()
                    continue
                self._incoming[sock] = 0
            self._start(self._receive, "from " + format_address(*source[:2]), sock, source[0])

    def _receive(self, sock: socket.socket, host: str) -> None:
        """Serve one connection from its proof to its end."""
        try:
            try:
                greet(sock, self._key, self._purpose, silence_s=self.silence_s)
                header, _ = receive(sock, header_most=BULK_HEADER_BYTES)
                number = int(header["number"])
            except (OSError, *SHAPE_ERRORS) as error:
                if not self._closed:
                    logger.warning("a connection from %s to %s was refused: %s", host, self.name, error)
                return
            with self._lock:
                self._incoming[sock] = number
            with contextlib.suppress(OSError):
                self._take_in(sock, number)
        finally:
            with self._lock:
                self._incoming.pop(sock, None)
            sock.close()

    def _take_in(self, sock: socket.socket, number: int) -> None:
        scratch = bytearray(0)
        while True:
            header, length = receive(sock, header_most=BULK_HEADER_BYTES, body_most=BLOCK_BYTES)
            try:
                target = self._place(number, header, length, lambda: sock.fileno() >= 0 and sock in self._incoming)
                if target is None:
                    scratch = scratch or bytearray(BLOCK_BYTES)
                    receive_into(sock, memoryview(scratch)[:length])
                    continue
                receive_into(sock, target)
                self._arrived(number, header, length)
                crashpoint("a block was received")
            except SHAPE_ERRORS as error:
                logger.warning("member %d sent %s something that was not understood: %s", number, self.name, error)
                return

    def close(self) -> None:
        """End all connections and wait for the threads."""
        with self._lock:
            self._closed = True
            senders, incoming = list(self._senders.values()), list(self._incoming)
            self._incoming.clear()
        _end(self._listener)
        self._listener.close()
        for sender in senders:
            sender.close()
        for sock in incoming:
            _end(sock)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for sender in list(self._senders.values()):
            sender.join()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=_CONNECT_S + 1)


def _end(sock: socket.socket | None) -> None:
    """Shut down a socket, which ends every wait in it: nothing more is received or sent."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
