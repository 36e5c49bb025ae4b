"""`FileServer` serves `/files/` over HTTP: GET and HEAD, byte ranges, ETags, and the faults of `faults.py`."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ingest.simulate.faults import Counters, Fault, flip_bits, send_half

__all__ = ["FileServer"]

_TYPES = {
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".json": "application/json",
    ".xml": "application/xml",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_LOGIN = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in to continue.</body></html>"


@dataclass
class FileServer:
    """A server of the files of one folder.

    Attributes:
        root: The folder; nothing outside it is served.
        faults: Faults of requests under /files/, by pattern (as in fnmatch, on the path below the root).
        latency_s: Pause before each answer in seconds.
        counters: Counts of requests and answers.
        stopping: Event that is set when the server ends, so that stalled answers end too.
        reset: Function that resets the connection of a client, given its address.
    """

    root: Path
    faults: Mapping[str, Fault] = field(default_factory=dict)
    latency_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    stopping: threading.Event = field(default_factory=threading.Event)
    reset: Callable[[Any], None] = lambda _: None

    def routes(self) -> list[Route]:
        return [
            Route("/files/{path:path}", self._plain, methods=["GET", "HEAD"]),
            Route("/fault/{mode}/files/{path:path}", self._faulty, methods=["GET", "HEAD"]),
        ]

    async def _plain(self, request: Request) -> Response:
        path = request.path_params["path"]
        chosen = next((fault for pattern, fault in self.faults.items() if fnmatch.fnmatch(path, pattern)), None)
        return await self._answer(request, path, chosen)

    async def _faulty(self, request: Request) -> Response:
        try:
            fault = Fault.parse(request.path_params["mode"])
        except ValueError as error:
            return Response(str(error), status_code=400, media_type="text/plain")
        return await self._answer(request, request.path_params["path"], fault)

    async def _answer(self, request: Request, path: str, fault: Fault | None) -> Response:
        nth = self.counters.request(request.url.path)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        refusal = self._refusal(fault, nth, request)
        if refusal is not None:
            return refusal
        file = self._find(path)
        if file is None:
            return Response("no such file\n", status_code=404, media_type="text/plain")
        if fault is not None and fault.mode == "swap" and nth > fault.number:
            other = self._find(f"{path}.swap")
            if other is not None:
                self.counters.fault("swap")
                file = other
        return self._send(request, file, fault)

    def _refusal(self, fault: Fault | None, nth: int, request: Request) -> Response | None:
        """Make the answer of a fault that needs no file, or None."""
        if fault is None:
            return None
        mode = fault.mode
        if mode in ("404", "403", "503"):
            self.counters.fault(mode)
            return Response(f"{mode} on purpose\n", status_code=int(mode), media_type="text/plain")
        if mode in ("503first", "429first") and nth <= fault.number:
            self.counters.fault(mode)
            return Response("later\n", status_code=int(mode[:3]), headers={"Retry-After": "0"})
        if mode == "503every" and self.counters.turn(mode) % max(1, int(fault.number)) == 0:
            self.counters.fault(mode)
            return Response("later\n", status_code=503, headers={"Retry-After": "0"})
        if mode == "expiring" and not _still_valid(request.query_params.get("until")):
            self.counters.fault(mode)
            return Response("the signature has expired\n", status_code=403, media_type="text/plain")
        if mode in ("redirect", "redirectloop"):
            self.counters.fault(mode)
            host = "localhost" if mode == "redirect" else "127.0.0.1"
            return Response(status_code=302, headers={"Location": str(request.url.replace(hostname=host))})
        if mode == "html200":
            self.counters.fault(mode)
            return Response(_LOGIN, media_type="text/html")
        return None

    def _find(self, path: str) -> Path | None:
        """Find the file at a path below the root, or None; links and `..` that lead outside count as absent."""
        if "\0" in path:
            return None
        file = (self.root / path).resolve()
        return file if file.is_relative_to(self.root.resolve()) and file.is_file() else None

    def _send(self, request: Request, file: Path, fault: Fault | None) -> Response:
        status = file.stat()
        size = status.st_size
        tag = hashlib.sha256(f"{size}-{status.st_mtime_ns}".encode()).hexdigest()[:24]
        headers = {
            "ETag": f'"{tag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": _TYPES.get(file.suffix, "application/octet-stream"),
        }
        asked = request.headers.get("if-match")
        if asked is not None and asked.strip() not in ("*", headers["ETag"]):
            return Response("the file has been replaced\n", status_code=412, media_type="text/plain")
        wanted = request.headers.get("range")
        mode = fault.mode if fault else ""
        if mode == "norange":
            del headers["Accept-Ranges"]
            if wanted:
                self.counters.fault(mode)
                wanted = None
        span = _parse_range(wanted, size)
        if span is None:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        start, stop = span
        if mode == "short206" and wanted and stop - start > 64:
            self.counters.fault(mode)
            stop = start + (stop - start) // 2
        partial = wanted is not None and _RANGE.fullmatch(wanted) is not None
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers["Content-Length"] = str(stop - start)
        code = 206 if partial else 200
        if request.method == "HEAD":
            return Response(status_code=code, headers=headers)
        # files of a simulated world have a few MB, and a range is smaller
        with file.open("rb") as source:
            source.seek(start)
            body = source.read(stop - start)
        if mode in ("trunc", "stall") and fault is not None:
            self.counters.fault(mode)
            self.counters.sent(len(body) // 2)
            pause = fault.number if mode == "stall" else 0.0
            return StreamingResponse(send_half(body, pause, self.stopping), status_code=code, headers=headers)
        if mode == "wrongrange" and fault is not None and partial and start + int(fault.number) < size:
            self.counters.fault(mode)
            with file.open("rb") as source:
                source.seek(start + int(fault.number))
                body = source.read(stop - start).ljust(stop - start, b"\0")
        if mode == "partialfile":
            kept = max(0, min(len(body), size // 2 - start))
            if any(body[kept:]):
                self.counters.fault(mode)
            body = body[:kept].ljust(len(body), b"\0")
        if mode == "reset":
            self.counters.fault(mode)
            reply = _ResetResponse(body[: len(body) // 2], status_code=code, headers=headers)
            reply.reset = self.reset
            return reply
        if mode == "flip":
            damaged = flip_bits(body, start, size)
            if damaged != body:
                self.counters.fault(mode)
            body = damaged
        self.counters.sent(len(body))
        return Response(body, status_code=code, headers=headers)


class _ResetResponse(Response):
    """An answer that ends with a reset of its connection, as when a machine on the path is restarted."""

    reset: Callable[[Any], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        self.reset(scope["client"])


def _still_valid(until: str | None) -> bool:
    try:
        return time.time() <= float(until or 0)
    except ValueError:
        return False


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Parse the bytes (start, stop) to send: all without a usable header, None where the range is outside.

    RFC 9110, section 14: a server may ignore forms it does not know, such as several ranges at once.
    """
    match = _RANGE.fullmatch(header) if header else None
    if match is None or match.group(0) == "bytes=-":
        return (0, size)
    first, last = match.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) > 0 else None
    start, stop = int(first), min(size, int(last) + 1) if last else size
    return (start, stop) if start < min(size, stop) else None
