"""The memory for blocks of other members: the round that is under way, or a large value that is expected."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.hetero.rounds import Round

__all__ = ["Bulk", "Landing"]

_BULK_MOST = 64 << 30
_REMEMBERED = 64


class Bulk:
    """One large value that another member is sending.

    Args:
        source: Number of the member that sends it.
        key: Key of the value.
    """

    def __init__(self, source: int, key: str) -> None:
        self.source, self.key = source, key
        self.data: npt.NDArray[np.uint8] | None = None
        self._got = self._crc = 0

    def place(self, header: Mapping[str, Any], length: int) -> memoryview | None:
        """Return where a block goes; None if it does not continue what is there."""
        total, offset = int(header["n"]), int(header["o"])
        if self.data is None:
            if not 0 < total <= _BULK_MOST:
                raise ValueError(f"expected a value of at most {_BULK_MOST} bytes, {total} are announced")
            self.data, self._crc = np.empty(total, np.uint8), int(header["c"])
        if offset != self._got or offset + length > len(self.data):
            return None
        return self.data.data[offset : offset + length]

    def arrived(self, length: int) -> None:
        """Count a complete block of `length` bytes."""
        self._got += length

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return self.data is not None and self._got == len(self.data)

    @property
    def intact(self) -> bool:
        """Whether all bytes are there, with the checksum that was announced."""
        return self.complete and self.data is not None and self._crc == zlib.crc32(self.data.data)


class Landing:
    """Memory for the blocks that threads receive: a block that is early waits, and a block that is late is dropped.

    Args:
        wake: Condition of the member: held while anything here changes.
    """

    def __init__(self, wake: threading.Condition) -> None:
        self._wake = wake
        self._round: Round | None = None
        self._reached = (-1, 0)
        self._bulk: Bulk | None = None
        self._passed: deque[str] = deque(maxlen=_REMEMBERED)
        """Values that are no longer expected, complete or not; late blocks of them are dropped."""
        self._closed = False

    @property
    def round(self) -> Round | None:
        """The round that is under way; None between rounds."""
        return self._round

    @property
    def bulk_complete(self) -> bool:
        """Whether the value that is waited for is there."""
        return self._bulk is not None and self._bulk.complete

    def expect_round(self, summing: Round | None) -> None:
        """Accept blocks of this round; blocks of earlier rounds are late from now on."""
        with self._wake:
            self._round = summing
            if summing is not None:
                self._reached = summing.key
            self._wake.notify_all()

    def expect_bulk(self, bulk: Bulk | None) -> None:
        """Accept blocks of this value; None if no value is expected any longer."""
        with self._wake:
            if self._bulk is not None:
                self._passed.append(self._bulk.key)
            self._bulk = bulk
            self._wake.notify_all()

    def close(self) -> None:
        """End all waiting."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def place(
        self, number: int, header: Mapping[str, Any], length: int, stands: Callable[[], bool]
    ) -> memoryview | None:
        """Return the memory for a block.

        Args:
            number: The member that sends it.
            header: The header of its message.
            length: Its bytes.
            stands: Whether the connection by which it comes is still open.
        """
        with self._wake:
            while not self._closed and stands() and self._is_early(number, header):
                self._wake.wait()
            if self._closed or not stands():
                return None
            if header["kind"] == "bulk":
                bulk = self._bulk
                wanted = bulk is not None and (bulk.source, bulk.key) == (number, header["k"])
                return bulk.place(header, length) if bulk is not None and wanted else None
            key = header["s"], header["a"]
            return None if self._round is None or self._round.key != key else self._round.place(number, header, length)

    def _is_early(self, number: int, header: Mapping[str, Any]) -> bool:
        if header["kind"] == "bulk":
            expected = self._bulk is not None and self._bulk.key == header["k"]
            return not expected and header["k"] not in self._passed
        return (int(header["s"]), int(header["a"])) > self._reached

    def arrived(self, number: int, header: Mapping[str, Any], length: int) -> None:
        """Count a complete block, and wake those that wait for it."""
        with self._wake:
            if header["kind"] == "bulk":
                if self._bulk is not None and (self._bulk.source, self._bulk.key) == (number, header["k"]):
                    self._bulk.arrived(length)
                news = self.bulk_complete
            elif self._round is not None and self._round.key == (header["s"], header["a"]):
                self._round.arrived(number, header, length)
                news = self._round.can_add or self._round.complete
            else:
                news = False
            if news:  # waking the member costs more than receiving a block
                self._wake.notify_all()
