"""Commands do the same whatever shell, editor, batch system or CI starts them; and so do the tests themselves."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ingest.request.config import IngestConfig
from ingest.scenes.documents import Documents
from ingest.simulate import SimulateConfig, serve, simulate
from zarr_store.errors import AccessError

SMALL = ["tiles=1", "tile_px=64", "overlap_px=0", 'dates=["2021-08-08"]', "radar_dates=[]"]
COMMAND = [sys.executable, "-m", "cli.main"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SimulateConfig(tiles=1, tile_px=64, overlap_px=0, dates=(dt.date(2021, 8, 8),), radar_dates=())
    return simulate(tmp_path_factory.mktemp("w") / "world", config).path


IGNORING_INTERRUPTS = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""Starts a command as a script starts what it puts in the background; a hook of fork would meet threads of JAX."""


def test_children_of_tests_can_be_interrupted_even_in_the_background(repository: Path) -> None:
    """A script's background job ignores SIGINT; the tests that send it to their children must not wait for ever."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_signals_of_a_child"]
    command = [*IGNORING_INTERRUPTS, *words]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_signals_of_a_child() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def test_tests_see_no_proxy_and_no_terminal() -> None:
    seen = {name.lower() for name in os.environ}
    assert not seen & {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "columns", "lines", "force_color"}
    assert (os.environ["TERM"], os.environ["NO_COLOR"]) == ("dumb", "1")


@contextlib.contextmanager
def _serving(world: Path, before: list[str]) -> Iterator[subprocess.Popen[str]]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [*before, *COMMAND, "simulate", str(world), "--serve", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("stop with") for line in process.stdout), process.communicate()[1]
            yield process
        finally:
            process.kill()


def test_a_server_in_the_background_ignores_interrupts_and_ends_by_sigterm(world: Path) -> None:
    """As POSIX has it for `command &` in a script, and for nohup: Ctrl-C is for what runs in the foreground."""
    with _serving(world, IGNORING_INTERRUPTS) as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "stopped by SIGTERM" in errors
        assert "Traceback" not in errors


def test_a_launcher_in_the_background_ignores_interrupts() -> None:
    """It listens for Ctrl-C to hand it on, but not where its shell has it ignored."""
    child = "import signal, sys, time; print('ready', flush=True); time.sleep(60)"
    code = (
        "import sys; from jaxtrain.launch import LaunchConfig, launch\n"
        f"outcome = launch([sys.executable, '-c', {child!r}], LaunchConfig(1, grace_s=5.0),\n"
        "    on_line=lambda number, stream, text: print(text, flush=True))\n"
        "sys.exit(outcome.exit_code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [*IGNORING_INTERRUPTS, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
            assert len(psutil.Process(process.pid).children()) == 1, "its process works on"
            process.terminate()
            assert process.wait(20) == 75
        finally:
            process.kill()


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that notes what it is asked and answers nothing useful."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        done = threading.Event()

        def answer() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listening.accept()
                    with connection:
                        connection.settimeout(2)
                        with contextlib.suppress(OSError):
                            asked.append(connection.recv(4096))
                            connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        done.set()
        thread.join()


def _behind(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, url)
        monkeypatch.setenv(name.lower(), url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "intranet.example")


def test_this_machine_is_never_asked_through_a_proxy(
    world: Path, proxy: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = proxy
    _behind(monkeypatch, url)
    config = IngestConfig(retries=0, timeout_s=5)
    with serve(world) as server, Documents(server.stac_url, config) as documents:
        assert documents.read(server.stac_url)["type"] == "Catalog"
    assert asked == []
    with Documents("http://catalogue.example/", config) as documents, pytest.raises(AccessError):
        documents.read("http://catalogue.example/")
    assert asked, "other hosts are asked through it"
    assert asked[0].startswith(b"GET http://catalogue.example/")


def test_a_bucket_on_this_machine_is_never_asked_through_a_proxy(
    bucket: Any, proxy: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients of obstore and tensorstore read the environment by themselves; so the command excludes loopback."""
    url, asked = proxy
    _behind(monkeypatch, url)
    done = subprocess.run(
        [*COMMAND, "info", "s3://cubes/none.zarr"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "s3://cubes/none.zarr does not exist" in done.stderr, "the bucket's own server has answered"
    assert asked == []


ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "a bare one, as cron gives": {
        "HOME": None, "TERM": None, "NO_COLOR": None, "LC_ALL": "C", "LANG": "C",
        "PYTHONDONTWRITEBYTECODE": "1",
    },
    "a narrow and colourful one, as CI gives": {
        "COLUMNS": "40", "LINES": "10", "FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": None, "CI": "true",
        "GITHUB_ACTIONS": "true",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_ingest_does_not_depend_on_its_environment(name: str, world: Path, tmp_path: Path) -> None:
    """One JSON document without colours on stdout, in a folder with a space and a letter beyond ASCII; and a private
    umask keeps every file private.
    """
    folder = tmp_path / "ä b"
    folder.mkdir()
    temporary = tmp_path / "t m p"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), **ENVIRONMENTS[name]}
    cube = folder / "cube.zarr"
    done = subprocess.run(
        [*COMMAND, "ingest", str(world / "catalog.json"), str(cube), "--workers", "1", "--bands", "red", "--json"],
        env={key: value for key, value in environment.items() if value is not None},
        cwd=folder, umask=0o077, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    document = json.loads(done.stdout)
    read = 64 * 64 + 32 * 32  # red, and the classes, whose pixels are twice as large
    assert (len(document["written"]), document["failed"], document["pixels_read"]) == (1, [], read)
    assert b"\x1b" not in done.stdout
    assert b"Traceback" not in done.stderr
    modes = {str(path.relative_to(cube)): path.stat().st_mode & 0o777 for path in [cube, *cube.rglob("*")]}
    assert len(modes) > 10
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_compiled_programs_that_a_kill_cut_short_are_dropped(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in the virtual environment, so each later run would find them broken and compile them again."""
    file = str(request.config.rootpath / "tests" / "conftest.py")
    settings: Any = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file)
    whole, cut, other = (tmp_path / name for name in ("jit_a-cache", "jit_b-cache", "looked-at"))
    data = zlib.compress(os.urandom(1000))
    for path, kept in ((whole, data), (cut, data[:500]), (other, b"?")):
        path.write_bytes(kept)
    settings.drop_broken(tmp_path)
    assert (whole.exists(), cut.exists(), other.exists()) == (True, False, True)
    monkeypatch.setattr(settings, "MOST_COMPILED", 900)
    settings.drop_broken(tmp_path)
    assert not whole.exists(), "more than may be kept"
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix
