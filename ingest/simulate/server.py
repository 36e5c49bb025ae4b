"""`serve` serves a simulated world on 127.0.0.1: its STAC API (`api.py`) and its files (`files.py`) on one port.

The server is a child process, not a thread: rasterio holds Python's lock during some of GDAL's HTTP requests, so a
server in the same process could never answer them. The child ends when its standard input closes, which also happens
when the parent is killed, so no server outlives its user.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ingest.simulate.faults import Fault
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["ServerHandle", "serve"]

# Seconds for the start: importing the web framework takes one, and many more on a machine under load.
_START_S = 60.0
_STOP_S = 10.0


@dataclass(frozen=True)
class ServerHandle:
    """A running server.

    Attributes:
        url: Root of all URLs, e.g. "http://127.0.0.1:43210".
        host: Address that the server listens on.
        port: Port that the server listens on.
        pid: Id of its process.
    """

    url: str
    host: str
    port: int
    pid: int

    @property
    def stac_url(self) -> str:
        """URL of the landing page of the STAC API."""
        return f"{self.url}/"

    def file_url(self, path: str, *, fault: str | None = None) -> str:
        """Make the URL of a file of the world, with a fault mode if one is named."""
        return f"{self.url}/fault/{fault}/files/{path}" if fault else f"{self.url}/files/{path}"

    @property
    def requests(self) -> Counter[str]:
        """Number of requests for each path so far."""
        return Counter(self._counters("GET")["requests"])

    @property
    def faults(self) -> Counter[str]:
        """Number of answers that each fault mode has changed so far."""
        return Counter(self._counters("GET")["faults"])

    @property
    def bytes_sent(self) -> int:
        """Number of bytes of file bodies sent so far."""
        return int(self._counters("GET")["bytes_sent"])

    def reset_counters(self) -> None:
        """Start counting from zero; modes that count requests, as `503first` does, start over too."""
        self._counters("DELETE")

    def _counters(self, method: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_STOP_S)
        try:
            connection.request(method, "/_counters")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return answer


@contextmanager
def serve(
    out: str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    faults: Mapping[str, str] | None = None,
    latency_s: float = 0.0,
) -> Iterator[ServerHandle]:
    """Serve the world in `out` while the `with` block runs.

    Args:
        out: Folder that `simulate` has written.
        host: Address to bind; the loopback address unless asked otherwise.
        port: Port to listen on; 0 for a free one.
        faults: Fault mode (see `faults.MODES`) of the files that match a pattern (fnmatch, "*" crosses slashes), for
            the hrefs that the API gives; every file is also under /fault/<mode>/files/….
        latency_s: Pause before each answer with a file, in seconds.

    Raises:
        InvalidInput: `out` holds no catalogue, or a fault mode is unknown.
        AccessError: The port is taken, or the server does not start.
    """
    root = Path(out).resolve()
    for mode in (faults or {}).values():
        Fault.parse(mode)
    if not (root / "catalog.json").is_file():
        raise InvalidInput(f"{out} holds no simulated world; write one with `terrashard simulate {out}`")
    order = {"root": str(root), "host": host, "port": port, "faults": dict(faults or {}), "latency_s": latency_s}
    child = subprocess.Popen(
        [sys.executable, "-m", "ingest.simulate.serving"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # the same import path as here, so that a checkout that is not installed works too
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,  # Ctrl-C is for the parent, which then ends the child in order
        text=True,
    )
    try:
        bound = _start(child, order)
        shown = f"[{host}]" if ":" in host else host
        yield ServerHandle(f"http://{shown}:{bound}", host, bound, child.pid)
    finally:
        _stop(child)


def _start(child: subprocess.Popen[str], order: Mapping[str, Any]) -> int:
    """Send the settings to the child, and wait for its port."""
    to_child, from_child = _pipes(child)
    where = f"{order['host']}:{order['port']}"
    with suppress(BrokenPipeError):  # it ended at once, which the wait below reports
        to_child.write(json.dumps(order) + "\n")
        to_child.flush()
    limit = time.monotonic() + _START_S
    while time.monotonic() < limit:
        ready, _, _ = select.select([from_child], [], [], 0.2)
        if not ready:
            continue
        line = from_child.readline()
        if not line:
            raise AccessError(f"the server on {where} ended while it started, with exit status {child.wait(_STOP_S)}")
        answer = json.loads(line)
        if "error" in answer:
            raise AccessError(f"cannot listen on {where}: {answer['error']}; choose another port or 0")
        return int(answer["port"])
    raise AccessError(f"the server on {where} did not start within {_START_S:g} s")


def _pipes(child: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Get the pipes to the child's input and from its output."""
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("the server was started without pipes")
    return child.stdin, child.stdout


def _stop(child: subprocess.Popen[str]) -> None:
    """Close the child's input, which asks it to end; kill it if it does not end."""
    to_child, from_child = _pipes(child)
    with suppress(BrokenPipeError):
        to_child.close()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(_STOP_S)
    from_child.close()
