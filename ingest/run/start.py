"""`start_cluster` starts a cluster for an ingest: over SSH, by a batch system, in Kubernetes, or by a gateway.

`describe` shows the same settings without starting anything, for --dry-run. The client libraries are extras, so they
are imported where they are used.
"""

from __future__ import annotations

import importlib
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import Any

import dask

from ingest.request.config import IngestConfig
from ingest.trust.hrefs import is_loopback
from ingest.worker.guard import LOG_ENVIRONMENT, WORKER_ENVIRONMENT
from zarr_store.errors import InvalidInput

__all__ = ["describe", "list_exposed", "make_manifest", "start_cluster"]

_EXTRAS = {
    "ssh": ("asyncssh", "ssh"),
    "slurm": ("dask_jobqueue", "slurm"),
    "pbs": ("dask_jobqueue", "slurm"),
    "k8s": ("dask_kubernetes", "k8s"),
    "gateway": ("dask_gateway", "gateway"),
}
_KNOWN = {
    "ssh": {"username", "port", "known_hosts", "client_keys", "remote_python", "start_s"},
    "slurm": {"queue", "account", "walltime", "interface", "log_directory", "local_directory", "shebang", "directives"},
    "k8s": {"name", "namespace", "image", "cpu"},
    "gateway": None,
}
_KNOWN["pbs"] = _KNOWN["slurm"]

_START_S, _DAY_S = 120.0, 86_400
"""Seconds that the hosts of --cluster ssh have to start: the default, and the most that can be given."""


def list_exposed(config: IngestConfig, dashboard: str) -> list[str]:
    """List what a run would open to other machines; `dashboard` is HOST:PORT."""
    opened = []
    code = "whoever reaches it can run code as you"
    if config.running.cluster == "ssh":
        opened += [
            f"{what} on {host} ({code})"
            for what, host in zip(
                ["a scheduler"] + ["a worker"] * len(config.running.hosts), config.running.hosts, strict=False
            )
            if not is_loopback(host)
        ]
    elif config.running.cluster in ("slurm", "pbs"):
        opened.append(f"a scheduler in this process, which the nodes must reach, and workers on the nodes ({code})")
    if config.running.cluster in ("local", "ssh", "slurm", "pbs") and not is_loopback(dashboard.rpartition(":")[0]):
        opened.append(f"the dashboard on {dashboard} (it shows paths, names and the state of the run)")
    return opened


def describe(config: IngestConfig, dashboard: str = "127.0.0.1:0") -> str:
    """Describe the cluster that `start_cluster` would start: its job script, manifest or options.

    Raises:
        InvalidInput: The extra is not installed, or an option is unknown or absent.
    """
    if config.running.scheduler:
        return f"a running scheduler at {config.running.scheduler}; nothing is started"
    workers = (
        f"{config.running.workers_least}..{config.running.workers}"
        if config.running.workers_least
        else str(config.running.workers)
    )
    head = f"cluster {config.running.cluster}, {workers} workers of {config.running.threads_per_worker} threads"
    if config.running.cluster == "local":
        return f"{head}, processes of this machine on 127.0.0.1; dashboard on {dashboard}\n" + _environment()
    options = _options(config)
    if config.running.cluster == "ssh":
        body = f"scheduler on {config.running.hosts[0]}, workers on {', '.join(config.running.hosts[1:])}\n"
        body += json.dumps(
            {**_ssh(config, options, dashboard), "hosts": list(config.running.hosts)}, indent=2, default=str
        )
    elif config.running.cluster in ("slurm", "pbs"):
        body = _job(config, options)
    elif config.running.cluster == "k8s":
        import yaml

        plain = json.loads(json.dumps(make_manifest(config, options)))  # or YAML writes an anchor for what occurs twice
        body = yaml.safe_dump(plain, sort_keys=False).rstrip()
    else:
        further = {name: value for name, value in options.items() if name != "address"}
        body = json.dumps({"address": _gateway_address(options), "options": further}, indent=2)
    opened = list_exposed(config, dashboard)
    notes = [f"opens: {text}" for text in opened]
    return "\n".join([head, body, *notes])


def start_cluster(config: IngestConfig, dashboard: str, security: Any, stack: ExitStack) -> Any:
    """Start the cluster of `config.running.cluster` (other than "local"); it ends with `stack`.

    Args:
        config: Kind, size and options of the cluster.
        dashboard: HOST:PORT, which `resolve_dashboard` has checked.
        security: `distributed.Security` for every connection, or None.
        stack: The context that closes the cluster.

    Raises:
        InvalidInput: The extra is not installed, or an option is unknown or absent.
    """
    options = _options(config)
    _needs(config.running.cluster)
    least = config.running.workers_least or config.running.workers
    protocol = "tls://" if security is not None else "tcp://"
    make: Callable[[], Any]
    if config.running.cluster == "ssh":
        from distributed import SSHCluster

        settings = _ssh(config, options, dashboard)
        if security is not None:
            settings["scheduler_options"]["protocol"] = settings["worker_options"]["protocol"] = protocol
            settings["security"] = security
        # SSHCluster reads the address of each process from its log, and waits without end where that log is silent
        with dask.config.set({"logging.distributed": "info"}):
            started = _in_time(
                lambda: SSHCluster(list(config.running.hosts), **settings), _seconds(options), config.running.hosts
            )
        return stack.enter_context(started)
    if config.running.cluster in ("slurm", "pbs"):
        jobqueue = _load("dask_jobqueue")
        kind = jobqueue.SLURMCluster if config.running.cluster == "slurm" else jobqueue.PBSCluster
        scheduler = {"dashboard_address": dashboard}
        settings = {**_job_settings(config, options), "scheduler_options": scheduler, "protocol": protocol}

        def make() -> Any:
            return kind(security=security, **settings) if security is not None else kind(**settings)

    elif config.running.cluster == "k8s":
        operator = _load("dask_kubernetes.operator")
        namespace = options.get("namespace")

        def make() -> Any:
            return operator.KubeCluster(custom_cluster_spec=make_manifest(config, options), namespace=namespace)

    else:
        gateway = stack.enter_context(_load("dask_gateway").Gateway(_gateway_address(options)))
        further = {name: value for name, value in options.items() if name != "address"}

        def make() -> Any:
            return gateway.new_cluster(shutdown_on_close=True, **further)

    cluster = stack.enter_context(make())
    if config.running.cluster != "k8s" or config.running.workers_least:
        cluster.scale(least)
    return cluster


def _in_time(make: Callable[[], Any], seconds: float, hosts: Sequence[str]) -> Any:
    """Return what `make` makes, or stop waiting: a host that is reached and does not answer would block without end."""
    made: Future[Any] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            made.set_exception(error)

    threading.Thread(target=run, name="ssh", daemon=True).start()
    if not wait([made], seconds).done:
        raise TimeoutError(
            f"{', '.join(dict.fromkeys(hosts))} did not start within {seconds:g} s: try ssh and the remote Python by "
            "hand, or give more time with --cluster-option start_s=SECONDS"
        )
    return made.result()


def _seconds(options: dict[str, Any]) -> float:
    try:
        seconds = float(options.get("start_s", _START_S))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _DAY_S:  # nan is neither
        raise InvalidInput(f"--cluster-option start_s={options['start_s']}: expected seconds above 0, at most {_DAY_S}")
    return seconds


def make_manifest(config: IngestConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Make the DaskCluster resource for the Kubernetes operator."""
    name, image = options.get("name", "terrashard"), options["image"]
    environment, logs = (
        [{"name": key, "value": value} for key, value in pairs.items()]
        for pairs in (WORKER_ENVIRONMENT, LOG_ENVIRONMENT)
    )
    limits: dict[str, Any] = {"cpu": str(options.get("cpu", config.running.threads_per_worker))}
    if config.running.memory:
        limits["memory"] = config.running.memory.replace("iB", "i").replace("B", "").replace(" ", "").replace("k", "K")
    worker = {
        "name": "worker",
        "image": image,
        "args": [
            "dask",
            "worker",
            "--name",
            "$(DASK_WORKER_NAME)",
            "--nthreads",
            str(config.running.threads_per_worker),
        ],
        "env": environment,
        "resources": {"requests": limits, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    ports = [("tcp-comm", 8786), ("http-dashboard", 8787)]
    scheduler = {
        "name": "scheduler",
        "image": image,
        "args": ["dask", "scheduler"],
        "env": logs,
        "ports": [{"name": label, "containerPort": port, "protocol": "TCP"} for label, port in ports],
        "readinessProbe": {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 5},
        "securityContext": worker["securityContext"],
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "idleTimeout": 3600,
            "worker": {
                "replicas": config.running.workers_least or config.running.workers,
                "spec": {"containers": [worker], "automountServiceAccountToken": False},
            },
            "scheduler": {
                "spec": {"containers": [scheduler]},
                "service": {
                    "type": "ClusterIP",  # reachable inside the cluster's network only
                    "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
                    "ports": [{"name": n, "protocol": "TCP", "port": p, "targetPort": n} for n, p in ports],
                },
            },
        },
    }


def _options(config: IngestConfig) -> dict[str, Any]:
    """Check the options of the cluster, and return them."""
    options = dict(config.running.cluster_options)
    known = _KNOWN[config.running.cluster]
    unknown = sorted(set(options) - known) if known is not None else []
    if unknown:
        raise InvalidInput(
            f"--cluster {config.running.cluster} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(sorted(known or ()))}"
        )
    if config.running.cluster == "ssh" and len(config.running.hosts) < 2:
        raise InvalidInput("--cluster ssh needs --hosts SCHEDULER,WORKER[,WORKER…], e.g. --hosts node1,node1,node2")
    if config.running.cluster in ("slurm", "pbs") and not config.running.memory:
        raise InvalidInput(
            f"--cluster {config.running.cluster} needs --memory, the memory of one job, e.g. --memory 8GB"
        )
    if config.running.cluster == "k8s" and not options.get("image"):
        raise InvalidInput("--cluster k8s needs --cluster-option image=NAME, an image with this terrashard in it")
    if config.running.cluster == "gateway":
        _gateway_address(options)
    return options


def _load(module: str) -> Any:
    """Import a library of a kind of cluster, and keep what this process does on Ctrl-C.

    dask_jobqueue replaces that when it is imported: the process would end with code 0 in the middle of a run.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module(module)
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def _needs(kind: str) -> None:
    module, extra = _EXTRAS[kind]
    try:
        _load(module)
    except ImportError as error:
        raise InvalidInput(
            f"--cluster {kind} needs the package {module.replace('_', '-')}, which is not installed; "
            f"install it with: pip install 'terrashard[{extra}]'"
        ) from error


def _ssh(config: IngestConfig, options: dict[str, Any], dashboard: str) -> dict[str, Any]:
    """Make the arguments of `SSHCluster`, except the hosts."""
    connect = {name: value for name, value in options.items() if name not in ("remote_python", "start_s")}
    if "port" in connect:
        connect["port"] = int(connect["port"])
    worker: dict[str, Any] = {
        "nthreads": config.running.threads_per_worker,
        "env": dict(WORKER_ENVIRONMENT),
        "death_timeout": "60s",
    }
    if config.running.memory:
        worker["memory_limit"] = config.running.memory
    scheduler: dict[str, Any] = {"port": 0, "dashboard_address": dashboard}
    if all(is_loopback(host) for host in config.running.hosts):  # no other machine takes part, so none may connect
        worker["host"] = scheduler["host"] = "127.0.0.1"
    return {
        "connect_options": connect,
        "worker_options": worker,
        "scheduler_options": scheduler,
        "worker_class": "distributed.Nanny",
        "remote_python": options.get("remote_python", sys.executable),
    }


def _job_settings(config: IngestConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments of a dask-jobqueue cluster and of its jobs."""
    settings = {name: value for name, value in options.items() if name != "directives"}
    settings |= {
        "cores": config.running.threads_per_worker,
        "processes": 1,
        "memory": config.running.memory,
        "python": shlex.quote(sys.executable),
        "job_script_prologue": [
            "unset GDAL_NUM_THREADS",
            *(f"export {name}={shlex.quote(value)}" for name, value in WORKER_ENVIRONMENT.items()),
        ],
        "death_timeout": 60,
        "job_name": "terrashard",
    }
    if options.get("directives"):
        settings["job_extra_directives"] = [part.strip() for part in str(options["directives"]).split(";")]
    return settings


def _job(config: IngestConfig, options: dict[str, Any]) -> str:
    """Make the script of one job; the scheduler's address is filled in when the cluster starts."""
    _needs(config.running.cluster)
    module = _load(f"dask_jobqueue.{config.running.cluster}")
    kind = module.SLURMJob if config.running.cluster == "slurm" else module.PBSJob
    job = kind("tcp://SCHEDULER:PORT", name="terrashard", **_job_settings(config, options))
    script: str = job.job_script()
    return script.rstrip()


def _gateway_address(options: dict[str, Any]) -> str:
    address = str(options.get("address", ""))
    if not address.startswith(("http://", "https://")):
        raise InvalidInput("--cluster gateway needs --cluster-option address=https://…, the address of the gateway")
    return address


def _environment() -> str:
    return "\n".join(f"  {name}={value}" for name, value in WORKER_ENVIRONMENT.items())
