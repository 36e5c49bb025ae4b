"""Limits on one HTTP response: how long it may take, how many bytes of it are read, and how it may be compressed.

The timeout of a socket restarts with each byte, so a server that sends one byte a second never times out. Here the
status and the headers together must arrive within one timeout. From then on, each interval of that length must bring
at least `MIN_BYTES_PER_S`. A response of N bytes therefore ends within 2 · timeout + N / MIN_BYTES_PER_S, and a steady
one is never cut, however large it is.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import zlib
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from ingest.trust.waits import check_waits, watch_socket

__all__ = ["MIN_BYTES_PER_S", "PackedError", "TimedResponse", "TooLongError", "read_answer", "read_start", "unpack"]

MIN_BYTES_PER_S = 1000
"""Least rate of a response, bytes per second; scenes cannot be read over a slower line, so the server has stalled."""
_PIECE = 1 << 16


class TooLongError(HTTPError):
    """A response holds more bytes than were asked for."""


class PackedError(HTTPError):
    """A response has a compression that was not asked for, is damaged, or holds more than may be decompressed."""


class _Clock:
    """The clock of one response: it raises where the response comes too slowly.

    Args:
        timeout_s: Seconds for status and headers together, and length of each interval of the body; None for no limit.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._until = time.monotonic() + (timeout_s or 0.0)
        self._came: int | None = None  # bytes of this interval; None until the headers are complete

    def begin_body(self) -> None:
        """Start the first interval of the body: status and headers have arrived."""
        self._came = 0
        self._until = time.monotonic() + (self.timeout_s or 0.0)

    def left_s(self) -> float | None:
        """Return the seconds that the next bytes may take.

        Raises:
            TimeoutError: The interval is over, and too few bytes came in it.
        """
        if self.timeout_s is None:
            return None
        now = time.monotonic()
        enough = self._came is not None and self._came >= MIN_BYTES_PER_S * self.timeout_s
        if now >= self._until:
            if not enough:
                what = "its headers" if self._came is None else f"more than {self._came} bytes"
                raise TimeoutError(f"the server did not send {what} within {self.timeout_s:g} s")
            self.begin_body()
            return self.timeout_s
        return self.timeout_s if enough else min(self.timeout_s, self._until - now)

    def count(self, size: int) -> None:
        """Add bytes that arrived."""
        if self._came is not None:
            self._came += size


class _TimedReader(io.RawIOBase):
    """The bytes of one socket, read while its clock allows."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        super().__init__()
        self._raw = sock.makefile("rb", buffering=0)
        self._sock = sock
        self._clock = clock

    def readinto(self, buffer: Any) -> int | None:
        check_waits()
        self._sock.settimeout(self._clock.left_s())
        size = self._raw.readinto(buffer)
        check_waits()  # a socket that `end_waits` has shut looks like one that ended
        self._clock.count(size or 0)
        return int(size or 0)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _TimedSocket:
    """The part of a socket that `http.client` uses."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._clock), 1 << 16)


class TimedResponse(http.client.HTTPResponse):
    """A response that must come fast enough; it takes its timeout from the socket that it is read from."""

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        watch_socket(sock)
        self._timed = _Clock(sock.gettimeout())
        super().__init__(_TimedSocket(sock, self._timed), *args, **more)  # type: ignore[arg-type]

    def begin(self) -> None:
        super().begin()
        self._timed.begin_body()


def read_answer(reply: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Read a whole response of at most `most` bytes, without decompressing it.

    Raises:
        TooLongError: The response is longer.
    """
    data = read_start(reply, most + 1)
    if len(data) > most:
        raise TooLongError(f"the response holds more than the {most} bytes that are read")
    return data


def read_start(reply: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """Read the first `most` bytes of a response, or all of a shorter one, without decompressing them."""
    pieces, came = [], 0
    while came < most:
        piece = reply.read(most - came, decode_content=False)
        if not piece:
            break
        pieces.append(piece)
        came += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def unpack(data: bytes, encoding: str | None, most: int) -> bytes:
    """Decompress the body of a response; gzip and deflate are understood.

    Args:
        data: The body as it was sent.
        encoding: Content-Encoding of the response.
        most: Largest number of decompressed bytes.

    Raises:
        PackedError: Another compression, damaged bytes, or more than `most` bytes.

    >>> unpack(zlib.compress(b"{}"), "deflate", 10)
    b'{}'
    """
    name = (encoding or "").strip().lower()
    if name in ("", "identity"):
        return data
    if name not in ("gzip", "x-gzip", "deflate"):
        raise PackedError(f"the response is compressed with {name[:40]!r}, which was not asked for")
    # "deflate" means the zlib format by the standard, but some servers send a bare stream
    bare = name == "deflate" and (len(data) < 2 or data[0] & 15 != 8 or int.from_bytes(data[:2], "big") % 31)
    unpacking = zlib.decompressobj(31 if "gzip" in name else -15 if bare else 15)
    try:
        text = unpacking.decompress(data, most + 1)
    except zlib.error as error:
        raise PackedError(f"the response is damaged {name} ({error})") from error
    if len(text) > most:
        raise PackedError(f"the response holds more than {most} bytes once it is decompressed")
    if not unpacking.eof:
        raise PackedError(f"the {name} response is cut off after {len(data)} bytes")
    return text
