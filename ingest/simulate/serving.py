"""`main` is the process of the server, `python -m ingest.simulate.serving`, which only `server.serve` starts.

It reads one line of JSON from standard input, answers with one line that holds the port, and serves until its input
ends.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ingest.simulate.faults import Fault
from ingest.simulate.files import FileServer
from ingest.trust.hosts import HostCheck, machine_names

__all__ = ["load_world", "main"]

Json = dict[str, Any]


def main() -> int:
    """Serve one world, and return the exit status."""
    order = json.loads(sys.stdin.readline())
    files = FileServer(
        Path(order["root"]), {p: Fault.parse(mode) for p, mode in order["faults"].items()}, order["latency_s"]
    )
    host = order["host"]
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, order["port"]))
    except OSError as error:
        _say({"error": error.strerror or str(error)})
        return 8
    config = uvicorn.Config(
        HostCheck(make_application(files), {host.lower(), *machine_names()}),
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    listener.listen(128)  # from now on the kernel accepts connections, so the port can be reported

    def watch() -> None:
        sys.stdin.read()
        files.stopping.set()
        server.should_exit = True

    def reset(client: Any) -> None:
        for connection in list(server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None and getattr(connection, "client", None) == client:
                # no time to linger: the kernel sends a reset in place of an orderly end
                linger = struct.pack("ii", 1, 0)
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                transport.abort()

    files.reset = reset
    threading.Thread(target=watch, daemon=True).start()
    _say({"port": listener.getsockname()[1]})
    server.run(sockets=[listener])
    return 0


def make_application(files: FileServer) -> Any:
    """Make one ASGI application of the STAC API, the files and the counters of the world in `files.root`."""
    # stac-fastapi warns about its default settings while it is imported, but they are all set explicitly here
    logging.getLogger("stac_fastapi.types.config").setLevel(logging.ERROR)
    from ingest.simulate.api import make_application as make_api

    async def counters(request: Request) -> JSONResponse:
        if request.method == "DELETE":
            files.counters.reset()
        requests, faults, sent = files.counters.snapshot()
        return JSONResponse({"requests": requests, "faults": faults, "bytes_sent": sent})

    collections, items = load_world(files.root)
    return make_api(collections, items, [*files.routes(), Route("/_counters", counters, methods=["GET", "DELETE"])])


def load_world(root: Path) -> tuple[dict[str, Json], list[Json]]:
    """Load collections by id, and all items by (collection, time, id); hrefs become paths on the server."""
    catalog = json.loads((root / "catalog.json").read_text(encoding="utf-8"))
    collections: dict[str, Json] = {}
    items: list[Json] = []
    for child in (link["href"] for link in catalog["links"] if link["rel"] == "child"):
        path = (root / child).resolve()
        collection = json.loads(path.read_text(encoding="utf-8"))
        members = [link["href"] for link in collection["links"] if link["rel"] == "item"]
        collection["links"] = []
        collections[collection["id"]] = collection
        for href in members:
            file = (path.parent / href).resolve()
            item = json.loads(file.read_text(encoding="utf-8"))
            folder = file.parent.relative_to(root.resolve()).as_posix()
            for asset in item["assets"].values():
                asset["href"] = f"/files/{folder}/{asset['href'].removeprefix('./')}"
            item["links"] = [link for link in item["links"] if link["rel"] == "license"]
            items.append(item)
    items.sort(key=lambda item: (item["collection"], item["properties"]["datetime"], item["id"]))
    return collections, items


def _say(message: Json) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
