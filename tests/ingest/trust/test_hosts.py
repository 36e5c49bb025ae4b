"""Pages that are served on this machine, asked by a browser that a foreign name has led here (DNS rebinding)."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from distributed import Client

from ingest.request.config import IngestConfig
from ingest.run.cluster import open_cluster
from ingest.run.dashboard import PAGE, ShardPage
from ingest.simulate import serve
from ingest.trust.hosts import why_refused

from ..clusters import worker_here


def ask(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest("GET", path, skip_host=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def own() -> Iterator[Client]:
    """A cluster as an ingest starts it."""
    with open_cluster(IngestConfig(workers=1)) as client:
        client.register_plugin(ShardPage())
        yield client


def port_of(client: Client) -> int:
    return int(urlsplit(client.dashboard_link).port or 0)


@pytest.mark.parametrize(
    "path", [f"/{PAGE}", f"/{PAGE}/data.json", f"/{PAGE}/metrics", "/status", "/info/main/workers.html"]
)
def test_a_foreign_name_sees_nothing_of_the_dashboard(own: Client, path: str) -> None:
    port = port_of(own)
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9999", f"[::1]:{port}"):
        assert ask(port, path, Host=host)[0] == 200, host
    for host in (f"rebound.example:{port}", "rebound.example", "127.0.0.1.rebound.example"):
        status, body = ask(port, path, Host=host)
        assert status == 403, host
        assert b"refused: the Host header names" in body
    assert ask(port, path, Host=f"127.0.0.1:{port}", Origin="https://stranger.example")[0] == 403
    assert ask(port, path, Host=f"127.0.0.1:{port}", Origin="null")[0] == 403
    assert ask(port, path, Host=f"127.0.0.1:{port}", Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_a_foreign_page_opens_no_web_socket_of_the_dashboard(own: Client) -> None:
    port = port_of(own)
    upgrade = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==", "Host": f"127.0.0.1:{port}",
    }  # fmt: skip
    assert ask(port, "/eventstream", **upgrade, Origin="https://stranger.example")[0] == 403
    assert ask(port, "/status/ws", **upgrade, Origin="https://stranger.example")[0] == 403


def test_workers_answer_no_foreign_name_either(own: Client) -> None:
    def find_port(dask_worker: object) -> int:
        return int(dask_worker.http_server.port)  # type: ignore[attr-defined]

    (port,) = own.run(find_port).values()
    assert ask(port, "/health", Host=f"127.0.0.1:{port}")[0] == 200
    assert ask(port, "/health", Host=f"rebound.example:{port}")[0] == 403


def test_on_a_scheduler_of_somebody_else_the_page_itself_refuses_foreign_names() -> None:
    with worker_here(1, set_as_default=False) as client:
        client.register_plugin(ShardPage())
        port = port_of(client)
        for path in (f"/{PAGE}", f"/{PAGE}/data.json", f"/{PAGE}/metrics"):
            assert ask(port, path, Host=f"127.0.0.1:{port}")[0] == 200
            assert ask(port, path, Host="rebound.example")[0] == 403


def test_the_simulators_server_answers_no_foreign_name(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text('{"type": "Catalog", "id": "c", "links": []}')
    with serve(tmp_path) as server:
        for path in ("/", "/collections", "/files/catalog.json", "/_counters"):
            assert ask(server.port, path, Host=f"127.0.0.1:{server.port}")[0] == 200, path
            assert ask(server.port, path, Host=f"rebound.example:{server.port}")[0] == 403, path
            assert ask(server.port, path, Host="localhost", Origin="https://stranger.example")[0] == 403, path


def test_names_of_this_machine_and_programs_without_a_name_are_answered() -> None:
    assert why_refused(None, None) is None
    assert why_refused("node7:80", None, {"node7"}) is None
    assert why_refused("Node7.:80", "http://node7", {"node7"}) is None
    assert why_refused("localhost:1", "http://localhost:2") is not None
    assert why_refused("node7:443", "https://node7", {"node7"}) is None
