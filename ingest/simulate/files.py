"""The HTTP file server under `/files/`: GET and HEAD, byte ranges, ETags, and the faults of `faults.py`."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ingest.simulate.faults import Counters, Fault, flip_bits, interrupted

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
    """Serves the files of one folder.

    Attributes:
        root: The folder; nothing outside it is served.
        faults: Pattern (as in fnmatch, on the path below the root) → fault, for requests under /files/.
        latency_s: Pause before each answer.
        counters: What was asked and sent.
        stopping: Set when the server ends, so that stalled answers end too.
    """

    root: Path
    faults: Mapping[str, Fault] = field(default_factory=dict)
    latency_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    stopping: threading.Event = field(default_factory=threading.Event)

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
        refusal = self._refusal(fault, nth)
        if refusal is not None:
            return refusal
        file = self._find(path)
        if file is None:
            return Response("no such file\n", status_code=404, media_type="text/plain")
        return self._send(request, file, fault)

    def _refusal(self, fault: Fault | None, nth: int) -> Response | None:
        """The answer of a fault that needs no file, or None."""
        if fault is None:
            return None
        mode = fault.mode
        if mode in ("404", "403", "503"):
            self.counters.fault(mode)
            return Response(f"{mode} on purpose\n", status_code=int(mode), media_type="text/plain")
        if mode in ("503first", "429first") and nth <= fault.number:
            self.counters.fault(mode)
            return Response("later\n", status_code=int(mode[:3]), headers={"Retry-After": "0"})
        if mode == "html200":
            self.counters.fault(mode)
            return Response(_LOGIN, media_type="text/html")
        return None

    def _find(self, path: str) -> Path | None:
        """The file at `path` below the root, or None; links and `..` that lead outside count as absent."""
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
        partial = wanted is not None and _RANGE.fullmatch(wanted) is not None
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers["Content-Length"] = str(stop - start)
        code = 206 if partial else 200
        if request.method == "HEAD":
            return Response(status_code=code, headers=headers)
        # files of a simulated world are a few MB, and a range is less
        with file.open("rb") as source:
            source.seek(start)
            body = source.read(stop - start)
        if mode in ("trunc", "stall") and fault is not None:
            self.counters.fault(mode)
            self.counters.sent(len(body) // 2)
            pause = fault.number if mode == "stall" else 0.0
            return StreamingResponse(interrupted(body, pause, self.stopping), status_code=code, headers=headers)
        if mode == "flip":
            damaged = flip_bits(body, start, size)
            if damaged != body:
                self.counters.fault(mode)
            body = damaged
        self.counters.sent(len(body))
        return Response(body, status_code=code, headers=headers)


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of the bytes to send, all of them without a usable header; None where the range is outside.

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
