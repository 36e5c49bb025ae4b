"""`MODES` lists the faults that the file server can make, one at a time.

A request chooses a mode by its path, `/fault/<mode>/files/…`, or `serve(faults={pattern: mode})` sets it for some
files. Some modes take a number, as in `503first:3`. A mode is counted when it has really changed an answer, so a test
can assert that its fault happened.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from zarr_store.errors import InvalidInput, UnknownName

__all__ = ["MODES", "Counters", "Fault", "flip_bits", "send_half"]

MODES: dict[str, str] = {
    "404": "not found",
    "403": "forbidden, as when a signature has expired",
    "429first": "the first N requests (default 2) of each file get 429 with Retry-After: 0",
    "503first": "the first N requests (default 2) of each file get 503 with Retry-After: 0",
    "503": "every request gets 503",
    "503every": "each N-th request (default 20) of all files gets 503 with Retry-After: 0",
    "html200": "a login page with status 200",
    "trunc": "the body ends half way and the connection closes",
    "norange": "Range is ignored, and the answer is 200 with the whole file",
    "stall": "the body stops half way for N seconds (default 5), then the connection closes",
    "flip": "one bit in every kilobyte of the second half of the file is flipped",
    "reset": "the connection is reset half way through the body",
    "short206": "a range is answered with its first half, under headers of that half",
    "wrongrange": "a range is answered with the bytes N further on (default 512), under the headers of the range",
    "partialfile": "the second half of the file is zeros, as after a broken upload",
    "expiring": "403, unless the query has until=T and the time T (seconds since 1970) has not passed",
    "swap": "from request N + 1 on (default N = 2) another file is served: NAME.swap, with another ETag",
    "redirectloop": "302 to itself",
    "redirect": "302 to the same file under the name localhost, which is another host than 127.0.0.1",
}
"""Description of each mode."""

_DEFAULT_NUMBER = {"429first": 2.0, "503first": 2.0, "503every": 20.0, "stall": 5.0, "wrongrange": 512.0, "swap": 2.0}
# Longest pause of a stalled answer: no test should wait longer, and the server must be able to end.
_LONGEST_STALL_S = 60.0


@dataclass(frozen=True)
class Fault:
    """A fault mode with its number."""

    mode: str
    number: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse `mode` or `mode:number`.

        >>> Fault.parse("503first:3")
        Fault(mode='503first', number=3.0)
        """
        mode, _, number = text.partition(":")
        if mode not in MODES:
            raise UnknownName.of("fault mode", mode, MODES)
        try:
            value = float(number) if number else _DEFAULT_NUMBER.get(mode, 0.0)
        except ValueError as error:
            raise InvalidInput(f"fault {text!r}: expected a number after the colon, e.g. 503first:3") from error
        return cls(mode, min(value, _LONGEST_STALL_S) if mode == "stall" else value)


@dataclass
class Counters:
    """Counts of requests, faults and bytes sent; safe to use from any thread."""

    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def request(self, path: str) -> int:
        """Count a request, and return the number of requests for this path, this one included."""
        with self._lock:
            self.requests[path] += 1
            return self.requests[path]

    def turn(self, mode: str) -> int:
        """Count a request of any file under a mode, and return the number of such requests, this one included."""
        with self._lock:
            self.turns[mode] += 1
            return self.turns[mode]

    def fault(self, mode: str) -> None:
        with self._lock:
            self.faults[mode] += 1

    def sent(self, count: int) -> None:
        with self._lock:
            self.bytes_sent += count

    def snapshot(self) -> tuple[Counter[str], Counter[str], int]:
        with self._lock:
            return Counter(self.requests), Counter(self.faults), self.bytes_sent

    def reset(self) -> None:
        with self._lock:
            self.requests.clear()
            self.faults.clear()
            self.turns.clear()
            self.bytes_sent = 0


def flip_bits(body: bytes, start: int, size: int) -> bytes:
    """Flip a bit of every 1,024th byte in the second half of a file; the body begins at byte `start` of `size`."""
    first = max(size // 2, start)
    first += -first % 1024
    damaged = bytearray(body)
    for position in range(first, start + len(body), 1024):
        damaged[position - start] ^= 0x10
    return bytes(damaged)


async def send_half(body: bytes, stall_s: float, stopping: threading.Event) -> AsyncIterator[bytes]:
    """Send the first half of a body, pause, and then end the connection."""
    yield body[: len(body) // 2]
    waited = 0.0
    while waited < stall_s and not stopping.is_set():
        await asyncio.sleep(0.05)
        waited += 0.05
    # uvicorn closes a connection whose body is shorter than announced
    raise ConnectionAbortedError("the answer ends here on purpose")
