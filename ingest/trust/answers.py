"""One answer of a server: how long it may take, how many bytes of it are read, and how it may be packed.

A timeout of a socket begins anew with each byte, so a server that sends one byte a second is never late. Here the
status and the headers must be there within the timeout as a whole, and from then on each stretch of that length must
bring at least `MIN_BYTES_PER_S`. An answer of N bytes therefore ends within 2 · timeout + N / MIN_BYTES_PER_S, and one
that flows steadily is never cut, however large it is.
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
"""Slower than the slowest line that a scene can be read over; less than this is a server that stalls."""
_PIECE = 1 << 16


class TooLongError(HTTPError):
    """An answer holds more bytes than were asked for."""


class PackedError(HTTPError):
    """An answer is packed in a way that was not asked for, is damaged, or holds more than may be unpacked."""


class _Clock:
    """Whether an answer comes fast enough.

    Args:
        timeout_s: For status and headers together, and of each stretch of the body; None for no limit.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._until = time.monotonic() + (timeout_s or 0.0)
        self._came: int | None = None  # while the headers come

    def begin_body(self) -> None:
        """Status and headers are here."""
        self._came = 0
        self._until = time.monotonic() + (self.timeout_s or 0.0)

    def left_s(self) -> float | None:
        """How long the next bytes may take.

        Raises:
            TimeoutError: Too few came.
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
        """Some bytes came."""
        if self._came is not None:
            self._came += size


class _TimedReader(io.RawIOBase):
    """The bytes of one socket, as long as its clock allows."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        super().__init__()
        self._raw = sock.makefile("rb", buffering=0)
        self._sock = sock
        self._clock = clock

    def readinto(self, buffer: Any) -> int | None:
        check_waits()
        self._sock.settimeout(self._clock.left_s())
        size = self._raw.readinto(buffer)
        check_waits()  # a socket that was shut because of a stop looks like one that ended
        self._clock.count(size or 0)
        return int(size or 0)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _TimedSocket:
    """What `http.client` wants of a socket."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._clock), 1 << 16)


class TimedResponse(http.client.HTTPResponse):
    """An answer that must come fast enough; its timeout is the one that the socket has when the answer is awaited."""

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        watch_socket(sock)
        self._timed = _Clock(sock.gettimeout())
        super().__init__(_TimedSocket(sock, self._timed), *args, **more)  # type: ignore[arg-type]

    def begin(self) -> None:
        super().begin()
        self._timed.begin_body()


def read_answer(reply: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """The bytes of an answer as they were sent, of at most `most`; nothing is unpacked.

    Raises:
        TooLongError: There are more.
    """
    data = read_start(reply, most + 1)
    if len(data) > most:
        raise TooLongError(f"the answer holds more than the {most} bytes that are read")
    return data


def read_start(reply: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """The first `most` bytes of an answer as they were sent, or all of a shorter one."""
    pieces, came = [], 0
    while came < most:
        piece = reply.read(most - came, decode_content=False)
        if not piece:
            break
        pieces.append(piece)
        came += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def unpack(data: bytes, encoding: str | None, most: int) -> bytes:
    """What an answer says, once it is unpacked; gzip and deflate are what may be asked for.

    Args:
        data: As it was sent.
        encoding: Its Content-Encoding.
        most: Bytes that are unpacked.

    Raises:
        PackedError: Another packing, damaged bytes, or more than `most`.

    >>> unpack(zlib.compress(b"{}"), "deflate", 10)
    b'{}'
    """
    name = (encoding or "").strip().lower()
    if name in ("", "identity"):
        return data
    if name not in ("gzip", "x-gzip", "deflate"):
        raise PackedError(f"the answer is packed with {name[:40]!r}, which was not asked for")
    # "deflate" is zlib's form by the standard, and a bare stream from some servers
    bare = name == "deflate" and (len(data) < 2 or data[0] & 15 != 8 or int.from_bytes(data[:2], "big") % 31)
    unpacking = zlib.decompressobj(31 if "gzip" in name else -15 if bare else 15)
    try:
        text = unpacking.decompress(data, most + 1)
    except zlib.error as error:
        raise PackedError(f"the answer is damaged {name} ({error})") from error
    if len(text) > most:
        raise PackedError(f"the answer holds more than {most} bytes once it is unpacked")
    if not unpacking.eof:
        raise PackedError(f"the {name} answer is cut off after {len(data)} bytes")
    return text
