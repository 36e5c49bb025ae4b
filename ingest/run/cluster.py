"""`open_cluster` gives the Dask cluster that runs the tasks: on this machine, started elsewhere, or running already.

What is started here listens on 127.0.0.1 only: whoever reaches a scheduler's port can run code, and a dashboard shows
paths and names. Other machines can connect with TLS, or where the user allows it. The dashboard's address is known
before the first task is sent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, default_client
from distributed.security import Security

from ingest.request.config import IngestConfig
from ingest.run.start import list_exposed, start_cluster
from ingest.trust.hosts import guard_application, machine_names
from ingest.worker.guard import WORKER_ENVIRONMENT, WORKER_SETTINGS, check_workers
from ingest.worker.spawn import environment_lent, main_module_left_alone, refuse_unguarded_script
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["CLUSTER_SETTINGS", "choose_client", "count_in_flight", "open_cluster", "prepare", "resolve_dashboard"]

_CONNECT_S = 20
"""Seconds to wait for a scheduler to answer."""
_DEATH_S = 60
"""Seconds after which a worker that cannot reach its scheduler ends, so that none outlives a killed run."""
_LOST_S = 120
"""Seconds that a dead worker has to come back. With Dask's 15 s, on a machine under load, its nanny is closed while it
is still restarting the worker, and the cluster has one worker less from then on."""
_START_S = 120
"""Seconds to wait for the first workers of a cluster."""
CLUSTER_SETTINGS: dict[str, Any] = {
    "distributed.comm.timeouts.connect": f"{_CONNECT_S}s",
    "distributed.scheduler.allowed-failures": 3,  # a shard that kills its worker this often is given up
    "distributed.worker.daemon": True,
    "distributed.deploy.lost-worker-timeout": f"{_LOST_S}s",
    **WORKER_SETTINGS,
}
"""Dask configuration of a cluster that we start."""
_PER_THREAD = 3
"""Tasks in flight per thread: one decodes, one writes, one waits, so that workers never idle."""
_TLS_FILES = ("ca.pem", "cert.pem", "key.pem")


@contextmanager
def open_cluster(config: IngestConfig, *, most: int | None = None) -> Iterator[Client]:
    """Open a Dask client on the cluster that `config` asks for; a cluster that was started ends with the context.

    Args:
        config: `cluster`, `workers`, `threads_per_worker`, `memory`, `dashboard`, `tls`, or `scheduler`.
        most: Number of tasks; at most as many workers are started.

    Raises:
        AccessError: No scheduler answers at `config.running.scheduler`.
        InvalidInput: The dashboard address cannot be used, a port would be open to others without TLS and without
            --expose, an extra is not installed, or the workers differ from this process.
    """
    dashboard = resolve_dashboard(config.running.dashboard)
    refuse_open_ports(config, dashboard)
    settings = {**CLUSTER_SETTINGS, **(_tls(config.running.tls) if config.running.tls else {})}
    with dask.config.set(settings), ExitStack() as stack:
        security = Security() if config.running.tls else None  # type: ignore[no-untyped-call]  # from the settings
        if config.running.scheduler:
            client = stack.enter_context(_connected(config.running.scheduler, security))
        else:
            workers = min(config.running.workers, most or config.running.workers)
            least = min(config.running.workers_least or workers, workers)
            try:
                if config.running.cluster == "local":
                    refuse_unguarded_script()
                    stack.enter_context(main_module_left_alone())
                    stack.enter_context(environment_lent(WORKER_ENVIRONMENT))
                    cluster = stack.enter_context(_local(config, least, dashboard, security))
                else:
                    cluster = start_cluster(config, dashboard, security, stack)
            except (OSError, RuntimeError) as error:
                raise AccessError(
                    f"--cluster {config.running.cluster} could not be started: {error}; --dry-run shows the settings "
                    "it was started with"
                ) from error
            client = stack.enter_context(Client(cluster, timeout=_CONNECT_S))  # type: ignore[no-untyped-call]
            _wait(client, least if config.running.cluster == "local" else 1, config)
            if config.running.workers_least:
                cluster.adapt(minimum=least, maximum=workers, interval="1s", wait_count=5)
        prepare(client)
        yield client


def choose_client(client: Client | None, config: IngestConfig) -> Client | None:
    """Choose the client for a call from Python; None means that the cluster of `config` is started.

    Args:
        client: The client that the caller gave, or None.
        config: Where it asks for a cluster or scheduler, the current client of this process is not used.

    Raises:
        InvalidInput: The client is asynchronous, so this function could not wait for its tasks.
    """
    asked = {
        "scheduler",
        "cluster",
        "workers",
        "hosts",
        "memory",
        "threads_per_worker",
    } & config.running.model_fields_set
    if client is None and not asked:
        with suppress(ValueError):  # there is none
            client = default_client()  # type: ignore[no-untyped-call]
            if client.asynchronous:
                return None
    if client is not None and client.asynchronous:
        raise InvalidInput(
            "the Dask client is asynchronous, and this function waits for its tasks: give a client that was made "
            "without "
            "asynchronous=True (it also works inside a running event loop), or none"
        )
    return client


def prepare(client: Client) -> None:
    """Check the workers of a client, and let its scheduler keep the rate limits of providers.

    Raises:
        InvalidInput: The workers differ from this process.
    """
    check_workers(client)


def count_in_flight(client: Client, config: IngestConfig) -> int:
    """Count the tasks to keep in flight: enough for all threads, and for those that the cluster may still add.

    Raises:
        AccessError: The scheduler no longer answers.
    """
    try:
        threads = sum(client.nthreads().values())  # type: ignore[no-untyped-call]
    except OSError as gone:
        raise AccessError(
            f"the Dask scheduler no longer answers ({gone}); what was written stays, and the same command continues "
            "from there"
        ) from gone
    if config.running.workers_least and not config.running.scheduler:
        threads = max(threads, config.running.workers * config.running.threads_per_worker)
    return max(1, threads) * _PER_THREAD + 1


def resolve_dashboard(asked: str | None) -> str:
    """Resolve the dashboard's host and port; the host is loopback unless another one was named.

    >>> resolve_dashboard(None), resolve_dashboard(":8787")
    ('127.0.0.1:0', '127.0.0.1:8787')
    """
    if asked is None:
        return "127.0.0.1:0"
    match = re.fullmatch(r"(?:(?P<host>[\w.\-]*|\[[0-9a-fA-F:]+\]):)?(?P<port>\d{1,5})", asked.strip())
    if not match or int(match["port"]) > 65535:
        raise InvalidInput(f"dashboard address {asked!r}: expected :PORT or HOST:PORT, e.g. :8787")
    return f"{match['host'] or '127.0.0.1'}:{match['port']}"


def refuse_open_ports(config: IngestConfig, dashboard: str) -> None:
    """Refuse ports that other machines could reach, unless TLS or --expose is given.

    Raises:
        InvalidInput: A port would be open; the message names it.
    """
    opened = (
        []
        if config.running.scheduler or config.running.tls or config.running.expose
        else list_exposed(config, dashboard)
    )
    if opened:
        raise InvalidInput(
            f"this would open to other machines: {'; '.join(opened)}. Give --tls FOLDER with {', '.join(_TLS_FILES)}, "
            "or --expose if you trust every machine that can reach these ports"
        )


def _tls(folder: str) -> dict[str, Any]:
    """Make the Dask settings that put TLS on every connection and on the dashboard."""
    authority, certificate, key = (Path(folder) / name for name in _TLS_FILES)
    absent = [str(path) for path in (authority, certificate, key) if not path.is_file()]
    if absent:
        raise InvalidInput(f"--tls {folder} lacks {', '.join(absent)}; the folder must hold {', '.join(_TLS_FILES)}")
    roles = {
        f"distributed.comm.tls.{role}.{what}": str(path)
        for role in ("client", "scheduler", "worker")
        for what, path in (("cert", certificate), ("key", key))
    }
    return {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": str(authority),
        **roles,
        "distributed.scheduler.dashboard.tls.cert": str(certificate),
        "distributed.scheduler.dashboard.tls.key": str(key),
        "distributed.dashboard.link": "https://{host}:{port}/status",
    }


def _silence_dask() -> None:
    """Keep what Dask logs of its own course out of notebooks and of programs that log; its errors stay.

    `silence_logs` reaches only the handler that Dask adds where the program has none. A level that the program itself
    has set is left alone.
    """
    logger = logging.getLogger("distributed")
    if not logger.handlers and logger.level == logging.INFO:  # Dask's default
        logger.setLevel(logging.ERROR)


def _local(config: IngestConfig, workers: int, dashboard: str, security: Security | None) -> LocalCluster:
    _silence_dask()
    try:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=config.running.threads_per_worker,
            processes=True,  # GDAL's caches and locks are per process
            host="127.0.0.1",
            dashboard_address=dashboard,
            memory_limit=int(dask.utils.parse_bytes(config.running.memory)) if config.running.memory else "auto",
            death_timeout=_DEATH_S,
            silence_logs=logging.ERROR,
            security=security,
            protocol="tls://" if security is not None else "tcp://",
        )  # type: ignore[no-untyped-call]
    except (AssertionError, TimeoutError) as error:  # Dask's nanny fails on a process that it gives up
        raise AccessError(
            f"the {workers} worker processes of this run did not start within {_DEATH_S} s; repeat the command when "
            "this machine is less busy, or with fewer --workers"
        ) from error
    # Dask itself checks no Host header and lets every page open its web sockets
    scheduler: Any = cluster.scheduler
    guard_application(scheduler.http_application, {dashboard.rpartition(":")[0].lower(), *machine_names()})
    return cluster


def _wait(client: Client, workers: int, config: IngestConfig) -> None:
    try:
        client.wait_for_workers(workers, timeout=_START_S)
    except TimeoutError as error:
        raise AccessError(
            f"no worker of --cluster {config.running.cluster} started within {_START_S} s; look at its logs and at "
            "the queue of "
            "the batch system"
        ) from error


@contextmanager
def _connected(address: str, security: Security | None) -> Iterator[Client]:
    try:
        client = Client(address, timeout=_CONNECT_S, security=security)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:
        raise AccessError(
            f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler --host 127.0.0.1`, or "
            "leave --scheduler out to run on this machine"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            try:
                client.wait_for_workers(1, timeout=_CONNECT_S)
            except TimeoutError as error:
                raise AccessError(
                    f"the Dask scheduler at {address} has no worker; start some with `dask worker {address}`"
                ) from error
        yield client
