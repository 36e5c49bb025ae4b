"""Where tasks run: what is refused, what is shown, and clusters that are really started on this machine."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
import yaml
from distributed import Client
from distributed.comm.core import CommClosedError
from pydantic import ValidationError

from ingest.raster.access import with_asset
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.cluster import _silence_dask, count_in_flight, open_cluster, prepare
from ingest.run.loop import run
from ingest.run.start import describe, start_cluster
from ingest.testing import write_raster
from ingest.worker.guard import WORKER_ENVIRONMENT, differences, process_versions
from ingest.worker.rates import RateLimiter
from zarr_store.errors import AccessError, InvalidInput
from zarr_store.grid import Grid

from ..growing import plan_of, scene, tree

GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (64, 64))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def dask_processes(*, workers: int = 1, environment: dict[str, str] | None = None) -> Iterator[str]:
    """`dask scheduler` and `dask worker` as a person starts them; the address of the scheduler."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    plain = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "error"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
             "--dashboard-address", "127.0.0.1:0"],
            env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    ]  # fmt: skip
    started += [
        subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--nthreads", "1",
             "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--death-timeout", "30"],
            env={**plain, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for _ in range(workers)
    ]  # fmt: skip
    try:
        yield address
    finally:
        # workers first: one whose scheduler is gone seeks it for half a minute before it ends
        for some in (started[1:], started[:1]):
            for process in some:
                process.terminate()
            for process in some:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)


@contextlib.contextmanager
def counting_server(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """Serves files in ranges, and keeps the moment of every request."""
    moments: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            moments.append(time.monotonic())
            data = (folder / self.path.lstrip("/")).read_bytes()
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Type", "image/tiff")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.write(data[start:stop])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", moments
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def read_sum(href: str, access: Access) -> int:
    return int(with_asset(href, lambda d: d.read(1).sum(), scene="s", asset="a", access=access))


def test_two_processes_share_one_rate_limit_and_a_page(tmp_path: Path) -> None:
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    for number in range(8):
        write_raster(tmp_path / f"{number}.tif", GRID, pixels)
    rate = 10.0
    with counting_server(tmp_path) as (url, moments), dask_processes(workers=2) as address:
        config = IngestConfig(scheduler=address, rate_limits=(f"{url.removeprefix('http://')}={rate}",))
        with open_cluster(config) as client:
            client.wait_for_workers(2, timeout=30)
            assert client.dashboard_link.startswith("http://127.0.0.1:")
            hrefs = [f"{url}/{number}.tif" for number in range(8)] * 2
            futures = client.map(read_sum, hrefs, access=Access.of(config), pure=False)
            assert client.gather(futures) == [int(pixels.sum())] * 16
            assert len({w for found in client.who_has(futures).values() for w in found}) == 2, "both workers read"
    assert len(moments) >= 16
    spans = [b - a for a, b in zip(moments, moments[10:], strict=False)]
    assert min(spans) > 0.8 * 10 / rate, "never more than the rate in any second, from both together"
    assert (len(moments) - 1) / (moments[-1] - moments[0]) <= 1.05 * rate


def test_turns_are_per_name_and_evenly_spaced() -> None:
    turns = RateLimiter()
    assert [turns.take("a", 4, now=10.0) for _ in range(3)] == [0, 0.25, 0.5]
    assert turns.take("b", 4, now=10.0) == 0
    assert turns.take("a", 4, now=20.0) == 0


def test_workers_with_forbidden_settings_are_refused_with_a_table() -> None:
    with dask_processes(environment={"GDAL_NUM_THREADS": "4"}) as address:
        cluster = open_cluster(IngestConfig(scheduler=address))
        with pytest.raises(InvalidInput, match="1 of 1 workers differ") as caught:
            cluster.__enter__()
        assert str(caught.value).splitlines()[1].split() == [
            "worker",
            "what",
            "expected",
            "came",
        ]
        assert "GDAL_NUM_THREADS  unset     4" in str(caught.value)


def test_a_heartbeat_that_comes_after_the_scheduler_is_no_alarm(capfd: pytest.CaptureFixture[str]) -> None:
    """As a cluster ends, a worker may find the scheduler gone; Dask would print a traceback into a good run."""
    with open_cluster(IngestConfig(workers=1)) as client:
        client.run(beat_in_vain)
    said = capfd.readouterr().err
    assert "heartbeat" not in said
    assert said.count("Traceback") == 1
    assert "a disk that is gone" in said


def beat_in_vain() -> None:
    """On a worker: what `distributed.worker` logs, in its words, and an error that is one."""
    logger = logging.getLogger("distributed.worker")
    try:
        raise CommClosedError("stream is closed")
    except OSError:
        logger.exception("Failed to communicate with scheduler during heartbeat.")
    try:
        raise OSError("a disk that is gone")
    except OSError:
        logger.exception("Something else")


def test_a_worker_of_another_release_that_joins_later_is_sent_home(tmp_path: Path) -> None:
    other = tmp_path / "terrashard-99.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: terrashard\nVersion: 99.0\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with dask_processes() as address, Client(address, timeout=20) as client:
        client.wait_for_workers(1, timeout=30)
        prepare(client)
        before = set(client.scheduler_info()["workers"])
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-nanny",
             "--no-dashboard", "--death-timeout", "20"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            said = process.communicate(timeout=40)[1]
        finally:
            process.kill()
            process.wait(10)
        assert "terrashard 99.0, expected" in said
        assert set(client.scheduler_info()["workers"]) == before


def test_differences_name_what_came() -> None:
    mine = process_versions()
    assert differences(mine, mine) == {}
    assert differences(mine, {**mine, "numpy": "1.0"}) == {"numpy": (mine["numpy"], "1.0")}
    assert differences({**mine, "GDAL_NUM_THREADS": "2"}, {**mine, "GDAL_NUM_THREADS": "2"})


@pytest.mark.parametrize(
    "settings",
    [
        {"dashboard": "0.0.0.0:8787"},
        {"cluster": "slurm", "memory": "4GB"},
        {"cluster": "pbs", "memory": "4GB"},
        {"cluster": "ssh", "hosts": "node1,node2"},
    ],
)
def test_nothing_opens_to_other_machines_unasked(settings: dict[str, Any]) -> None:
    before = listening()
    with pytest.raises(InvalidInput, match=r"would open to other machines: .*--tls FOLDER .*--expose"):
        open_cluster(IngestConfig(**settings)).__enter__()
    assert listening() == before


def listening() -> set[tuple[str, int]]:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = set()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {(s.laddr.ip, s.laddr.port) for s in process.net_connections("tcp") if s.status == "LISTEN"}
    return found


def test_workers_follow_the_work_and_listen_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # as another cluster of Dask leaves it in this process
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    environment = dict(os.environ)
    config = IngestConfig(workers="1..2")
    assert (config.running.workers, config.running.workers_least) == (2, 1)
    before = listening()
    with open_cluster(config) as client:
        assert len(client.scheduler_info()["workers"]) == 1
        assert count_in_flight(client, config) == 7, "enough for the workers that may come"
        # Dask's own 15 s closed nannies that were still starting a worker anew on a machine under load
        assert dask.config.get("distributed.deploy.lost-worker-timeout") == "120s"
        opened = listening() - before
        assert opened, "the scheduler listens"
        assert {host for host, _ in opened} == {"127.0.0.1"}
        # as the process began: what is set later no longer reaches the C library
        begun = client.run(lambda: Path("/proc/self/environ").read_bytes().split(b"\0"))
        for name, value in WORKER_ENVIRONMENT.items():
            assert all(f"{name}={value}".encode() in lines for lines in begun.values()), name
        futures = client.map(time.sleep, [0.4] * 30, pure=False)
        deadline = time.monotonic() + 30
        while len(client.scheduler_info()["workers"]) < 2:
            assert time.monotonic() < deadline, "no second worker came"
            time.sleep(0.1)
        client.cancel(futures)
        deadline = time.monotonic() + 40
        while len(client.scheduler_info()["workers"]) > 1:
            assert time.monotonic() < deadline, "the second worker did not go when there was nothing to do"
            time.sleep(0.1)
        assert client.submit(int, "7", pure=False).result(timeout=20) == 7, "the one that stays works on"
        assert os.environ["MALLOC_ARENA_MAX"] == "1", "the nanny has set it, which is what is undone"
    assert dict(os.environ) == environment


def skip_without_jobqueue() -> None:
    """Skip without importing it: its import takes Ctrl-C, which only the product's own import gives back."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("dask_jobqueue is not installed")


def test_workers_that_do_not_start_in_time_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starved machine: the nanny gives up a process that has not started, and fails an assertion of its own."""

    def give_up(*_: object, **__: object) -> None:
        raise AssertionError("Status.starting")

    monkeypatch.setattr("ingest.run.cluster.LocalCluster", give_up)
    with (
        pytest.raises(AccessError, match=r"the 2 worker processes of this run did not start within 60 s; repeat"),
        open_cluster(IngestConfig(workers=2), most=4),
    ):
        pass


def test_slurm_and_pbs_show_their_job_script() -> None:
    skip_without_jobqueue()
    before = listening()
    options = ["queue=short", "walltime=01:00:00", "account=eo", "directives=--constraint=ssd"]
    text = describe(IngestConfig(cluster="slurm", memory="8GB", threads_per_worker=2, cluster_options=options))  # type: ignore[arg-type]
    for line in ("#SBATCH -p short", "#SBATCH -A eo", "#SBATCH -t 01:00:00", "#SBATCH --cpus-per-task=2",
                 "#SBATCH --constraint=ssd", "unset GDAL_NUM_THREADS", "export OMP_NUM_THREADS=1"):  # fmt: skip
        assert line in text.splitlines(), text
    assert "--nthreads 2" in text
    text = describe(IngestConfig(cluster="pbs", memory="8GB", cluster_options={"queue": "short"}))
    assert "#PBS -q short" in text
    assert "opens: a scheduler in this process" in text
    assert listening() == before, "nothing is started to show a script"


def test_a_library_of_clusters_does_not_take_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """dask_jobqueue lets the process end with code 0 from its import on; the run would no longer hear the signal."""
    skip_without_jobqueue()
    for name in [name for name in sys.modules if name.partition(".")[0] == "dask_jobqueue"]:
        monkeypatch.delitem(sys.modules, name)  # as in a process that has not imported it yet
    before = signal.getsignal(signal.SIGINT)
    try:
        describe(IngestConfig(cluster="slurm", memory="8GB"))
        assert "dask_jobqueue.runner" in sys.modules
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def test_kubernetes_shows_its_manifest() -> None:
    text = describe(
        IngestConfig(cluster="k8s", workers=3, memory="4GiB", cluster_options={"image": "r/t:1", "name": "a"})
    )
    document = yaml.safe_load(text.partition("\n")[2])
    assert (document["kind"], document["apiVersion"]) == ("DaskCluster", "kubernetes.dask.org/v1")
    worker = document["spec"]["worker"]
    assert worker["replicas"] == 3
    container = worker["spec"]["containers"][0]
    assert (container["image"], container["resources"]["limits"]["memory"]) == ("r/t:1", "4Gi")
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in container["env"]
    logs = {"name": "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH", "value": "20"}
    assert logs in container["env"]
    assert logs in document["spec"]["scheduler"]["spec"]["containers"][0]["env"]
    assert document["spec"]["scheduler"]["service"]["type"] == "ClusterIP"


def test_gateway_shows_its_options() -> None:
    text = describe(
        IngestConfig(cluster="gateway", cluster_options=["address=https://gate.example.org", "profile=big"])  # type: ignore[arg-type]
    )
    assert '"address": "https://gate.example.org"' in text
    assert '"profile": "big"' in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster": "ssh"}, "needs --hosts"),
        ({"cluster": "slurm"}, "needs --memory"),
        ({"cluster": "k8s"}, "image=NAME"),
        ({"cluster": "gateway"}, "address=https"),
        (
            {"cluster": "slurm", "memory": "1GB", "cluster_options": ["que=short"]},
            "no option que; its options are .*queue",
        ),
    ],
)
def test_what_a_cluster_needs_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        describe(IngestConfig(**settings))


def test_an_absent_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    monkeypatch.setitem(sys.modules, "dask_kubernetes", None)
    with pytest.raises(InvalidInput, match=r"pip install 'terrashard\[slurm\]'") as caught:
        describe(IngestConfig(cluster="slurm", memory="1GB"))
    assert caught.value.exit_code == 2
    with contextlib.ExitStack() as stack, pytest.raises(InvalidInput, match=r"terrashard\[k8s\]"):
        start_cluster(IngestConfig(cluster="k8s", cluster_options={"image": "x"}), "127.0.0.1:0", None, stack)


@pytest.mark.parametrize("bad", [{"workers": "4..1"}, {"workers": "x"}, {"rate_limits": "h=0"}, {"rate_limits": "5"}])
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        IngestConfig(**bad)


@pytest.mark.slow
def test_ssh_on_this_machine(tmp_path: Path) -> None:
    asyncssh = pytest.importorskip("asyncssh")
    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(tmp_path / name))
        key.write_public_key(str(tmp_path / f"{name}.pub"))
    port, authorized = free_port(), tmp_path / "user.pub"
    key_line = " ".join((tmp_path / "host.pub").read_text().split()[:2])
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {key_line}\n")
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if sshd and os.geteuid() == 0:
        (tmp_path / "conf").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {authorized}\n"
            f"PidFile {tmp_path}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        command = [sshd, "-D", "-f", str(tmp_path / "conf")]
    else:
        server = Path(__file__).parents[1] / "ssh_server.py"
        command = [sys.executable, str(server), str(port), str(tmp_path / "host"), str(authorized)]
    # what logs in over SSH has nothing of this environment
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    process = subprocess.Popen(command, env=clean, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while f"127.0.0.1:{port}" not in {f"{host}:{number}" for host, number in listening()}:
            assert process.poll() is None, "the SSH server ended"
            assert time.monotonic() < deadline, "the SSH server does not listen"
            time.sleep(0.05)
        options = [f"username={getpass.getuser()}", f"port={port}", f"known_hosts={tmp_path}/known",
                   f"client_keys={tmp_path}/user"]  # fmt: skip
        config = IngestConfig(cluster="ssh", hosts="127.0.0.1,127.0.0.1", cluster_options=options)  # type: ignore[arg-type]
        # as the command line sets it: Dask learns from the log of a remote scheduler and worker where they are
        with dask.config.set({"logging.distributed": "error"}), open_cluster(config) as client:
            (worker,) = client.scheduler_info()["workers"]
            assert worker.startswith("tcp://127.0.0.1:")
            asked = client.submit(lambda: (os.environ["OMP_NUM_THREADS"], os.getppid()), pure=False).result(timeout=20)
            assert asked[0] == "1"
            assert client.dashboard_link.startswith("http://127.0.0.1:")
        # and an ingest as it is typed, into a cube that is named relative to where it is typed
        plan = plan_of([scene(tmp_path / "s", day) for day in (1, 2)])
        plan.save(tmp_path / "plan.json")
        typed = ["ingest", "plan.json", "cube.zarr", "--cluster", "ssh", "--hosts", "127.0.0.1,127.0.0.1",
                 *(part for option in options for part in ("--cluster-option", option))]  # fmt: skip
        done = subprocess.run([Path(sys.executable).with_name("terrashard"), *typed], cwd=tmp_path, env=clean,
                              capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        with open_cluster(IngestConfig(workers=1)) as client:
            run(plan, tmp_path / "here.zarr", client=client)
        assert tree(tmp_path / "cube.zarr") == tree(tmp_path / "here.zarr")
    finally:
        process.terminate()
        process.wait(10)


def test_an_ssh_host_that_says_nothing_is_not_waited_for_without_end() -> None:
    """A port that takes the call and never answers."""
    pytest.importorskip("asyncssh")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        options = [f"port={silent.getsockname()[1]}", "start_s=1.5"]
        config = IngestConfig(cluster="ssh", hosts="127.0.0.1,127.0.0.1", cluster_options=options)  # type: ignore[arg-type]
        began = time.monotonic()
        late = r"127\.0\.0\.1 did not start within 1\.5 s.*start_s=SECONDS"
        with pytest.raises(AccessError, match=late), open_cluster(config):
            pass
        assert time.monotonic() - began < 30
        called, _ = silent.accept()
        called.close()
    for no_time in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(InvalidInput, match=f"start_s={no_time}: expected seconds above 0, at most 86400"):
            start_cluster(config.model_copy(update={"cluster_options": {"start_s": no_time}}), "", None, ExitStack())


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="nothing is collected inside an allocation since Python 3.12")
def test_workers_do_not_profile_where_that_can_stop_them() -> None:
    def profiles(dask_worker: Any) -> bool:
        return "profile" in dask_worker.periodic_callbacks

    with (
        dask.config.set({"distributed.worker.profile.enabled": True}),
        open_cluster(IngestConfig(workers=1)) as client,
    ):
        assert list(client.run(profiles).values()) == [False]


def test_dask_keeps_its_course_out_of_a_program_that_logs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook has a handler of its own before Dask is imported, so Dask adds none, which it could make silent."""
    dask_log, scheduler = logging.getLogger("distributed"), logging.getLogger("distributed.scheduler")
    monkeypatch.setattr(dask_log, "handlers", [])
    monkeypatch.setattr(dask_log, "propagate", True)
    level = dask_log.level
    try:
        dask_log.setLevel(logging.INFO)
        scheduler.info("State start")
        assert caplog.messages == ["State start"]
        _silence_dask()
        scheduler.info("State start")
        scheduler.error("lost")
        assert caplog.messages == ["State start", "lost"]
        dask_log.setLevel(logging.DEBUG)  # by the program itself
        _silence_dask()
        assert dask_log.level == logging.DEBUG
    finally:
        dask_log.setLevel(level)
