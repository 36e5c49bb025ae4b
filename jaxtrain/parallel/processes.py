"""Join the processes of one run, synchronise them, and end them when one is lost.

Call `start_distributed` before anything that touches a device. It finds the other processes by its arguments, then by
the environment (`rendezvous`). If neither names any, the run has one process, and nothing is started.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # the coordinator's client has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import TrainConfig
from jaxtrain.parallel.mesh import share_cores
from jaxtrain.parallel.rendezvous import (
    COORDINATOR,
    LOCAL,
    LOCAL_COUNT,
    PROCESS,
    PROCESSES,
    Rendezvous,
    find_rendezvous,
    first_host,
    local_gpus,
    read_number,
)
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["Agreement", "ProcessInfo", "Rendezvous", "abandon", "await_name", "find_rendezvous", "first_host",
           "from_first", "local_gpus", "spread_mesh", "start_distributed", "start_replica", "wait_for_all"]  # fmt: skip

BIND = "TERRASHARD_COORDINATOR_BIND"
PARENT = "TERRASHARD_PARENT"
HEARTBEAT = "TERRASHARD_HEARTBEAT_S"

_HEARTBEAT_S = 30
"""Seconds of silence after which a process counts as dead and all others end. Heartbeats come from a C++ thread,
which goes on during compilation and while Python holds its lock."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessInfo:
    """The number of this process among the cooperating ones."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs and reports."""
        return self.index == 0


def start_distributed(
    coordinator: str | None = None,
    *,
    processes: int | None = None,
    process: int | None = None,
    timeout_s: int = 120,
    environment: Mapping[str, str] | None = None,
) -> ProcessInfo:
    """Join the other processes of this run; call it before anything touches a device.

    Args:
        coordinator: `host:port` of process 0.
        processes: Number of processes.
        process: Number of this one, 0 … processes-1.
        timeout_s: Seconds to wait for the others.
        environment: Replaces `os.environ`, from which values that are not given are read.

    Raises:
        InvalidInput: only some of the three are known, or they contradict each other.
        AccessError: the others did not come in time.
    """
    env = os.environ if environment is None else environment
    if PARENT in env:
        die_with_parent(read_number(PARENT, env) or 0)
    found = find_rendezvous(env) or Rendezvous(None, None, None, "the call")
    coordinator = coordinator or found.coordinator
    processes = found.processes if processes is None else processes
    process = found.process if process is None else process
    if coordinator is None and processes is None and process is None:
        if found.source == "the call":
            return ProcessInfo(0, 1)
        return _join({}, f"the processes that {found.source} names", timeout_s, env)
    if coordinator is None or processes is None or process is None:
        raise InvalidInput(
            "a run of several processes needs all of: coordinator host:port, number of processes, number of this "
            f"process; {found.source} gave {coordinator!r}, {processes!r}, {process!r}. Set {COORDINATOR}, {PROCESSES} "
            f"and {PROCESS}, or start with `terrashard launch -n N -- train …`, mpirun or srun"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidInput(f"the coordinator must be host:port, such as 10.0.0.1:1234, got {coordinator!r}")
    if not 0 <= process < processes:
        raise InvalidInput(f"process must be one of 0 … {processes - 1}, got {process}")
    if found.late:
        await_name(host, timeout_s)
    arguments = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        # all three are known, so JAX must not look for a cluster of its own
        "cluster_detection_method": "deactivate",
        # JAX binds to all interfaces by default; only that of the coordinator's name is needed
        "coordinator_bind_address": env.get(BIND, coordinator) if process == 0 else None,
        "local_device_ids": None if found.local is None else local_gpus(*found.local, env),
    }
    return _join(arguments, f"{coordinator}, where {found.source} expects {processes} processes", timeout_s, env)


def start_replica(environment: Mapping[str, str] | None = None) -> ProcessInfo:
    """Prepare a process that trains as a replica of its own: it has its share of the GPUs, and JAX knows no others.

    Call it before anything touches a device.

    Args:
        environment: Replaces `os.environ`.
    """
    env = os.environ if environment is None else environment
    if PARENT in env:
        die_with_parent(read_number(PARENT, env) or 0)
    process, count = read_number(LOCAL, env), read_number(LOCAL_COUNT, env)
    gpus = None if process is None or count is None else local_gpus(process, count, env)
    if gpus is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, gpus)))  # type: ignore[no-untyped-call]
    return ProcessInfo(0, 1)


def await_name(host: str, timeout_s: float) -> None:
    """Wait until the name of a host is known: that of a pod is published some seconds after the pod has started.

    Raises:
        AccessError: It did not become known in time.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > until:
                raise AccessError(
                    f"no name server knows {host} within {timeout_s:g} s ({error}). Check that the first pod was "
                    "started, and that its headless service exists"
                ) from error
            time.sleep(min(1.0, timeout_s / 10))
        else:
            return


def _join(arguments: Mapping[str, Any], where: str, timeout_s: int, env: Mapping[str, str]) -> ProcessInfo:
    beat = read_number(HEARTBEAT, env) or _HEARTBEAT_S
    who = f"process {arguments['process_id']}" if "process_id" in arguments else "this process"
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=beat,
            shutdown_timeout_seconds=2 * beat,
        )
    except RuntimeError as error:
        if "before any JAX" in str(error) or "only be called once" in str(error):
            raise InvalidInput(f"{who}: the run must be joined once, before any array is made") from error
        raise AccessError(
            f"{who} could not join {where}, within {timeout_s} s: {error}. "
            "Check that all processes were started and that the port can be reached"
        ) from error
    info = ProcessInfo(jax.process_index(), jax.process_count())
    logger.info("process %d of %d joined %s", info.index, info.count, where)
    return info


def spread_mesh(config: TrainConfig) -> TrainConfig:
    """Return the configuration with `mesh.data` over all devices of all processes, if it was not named.

    One process takes as many accelerators as divide its batch, and leaves them where the answer would change
    (`model.norm = "local"`); on a processor it uses all cores (`share_cores`).
    """
    config = share_cores(config)
    if "data" in config.mesh.model_fields_set:
        return config
    parts = jax.device_count() // config.mesh.size
    if jax.process_count() == 1:
        if jax.default_backend() == "cpu" or config.model.norm == "local":
            return config
        rows = config.unit // (config.mesh.microbatches if config.mesh.pipe > 1 else 1)
        parts = max((n for n in range(1, parts + 1) if rows % n == 0), default=1)
        if parts == 1:
            return config
    elif jax.device_count() % config.mesh.size:
        return config  # `make_mesh` has the better message about what does not fit
    mesh = {**config.mesh.model_dump(exclude_unset=True), "data": parts}
    values = config.model_dump(exclude_unset=True) | {"mesh": mesh}
    return TrainConfig.model_validate(values)


def wait_for_all(what: str, timeout_s: int = 3600) -> None:
    """Wait for all processes through the coordinator, not by a collective, whose timeout is shorter.

    Args:
        what: Name of the wait, for the message about an absent process.
        timeout_s: Seconds to wait.
    """
    client = global_state.client
    if client is not None:
        _WAIT_COUNTS[what] += 1
        client.wait_at_barrier(f"terrashard: {what}, {_WAIT_COUNTS[what]}", timeout_s * 1000)


def from_first(what: str, make: Callable[[], str], timeout_s: int = 3600) -> str:
    """Return a text that the first process makes and the others wait for, through the coordinator.

    Args:
        what: Name of the text, used once in a run.
        make: Called by the first process alone; an error is raised there, and the others report it.
        timeout_s: Seconds to wait.

    Raises:
        InvalidInput: the first process could not make it.
    """
    client = global_state.client
    if client is None:
        return make()
    name = f"terrashard: {what}"
    if global_state.process_id == 0:
        try:
            text = make()
        except BaseException as error:
            client.key_value_set(name, f"-{error}")
            raise
        client.key_value_set(name, f"+{text}")
        return text
    answer: str = client.blocking_key_value_get(name, timeout_s * 1000)
    if not answer.startswith("+"):
        raise InvalidInput(f"process 0 has no {what}: {answer[1:]}")
    return answer[1:]


_WAIT_COUNTS: Counter[str] = Counter()
"""Number of waits of each name: the name of a barrier can be used only once."""


class Agreement:
    """Agreement of all processes, at the same step, on whether one of them wants to stop: a maximum over all devices.

    A signal reaches processes at different times; acting on it alone would leave the others waiting in a collective.
    `ask` starts the computation and returns at once, `answer` reads it; reading it one step later costs no time.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.alone = jax.process_count() == 1
        self._flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._split = NamedSharding(self._flat, PartitionSpec("all"))  # type: ignore[no-untyped-call]  # of jax
        whole = NamedSharding(self._flat, PartitionSpec())  # type: ignore[no-untyped-call]  # of jax
        self._any = jax.jit(jnp.max, out_shardings=whole)

    def ask(self, wanted: bool) -> Any:
        """Send whether this process wants to stop; every process must ask equally often."""
        if self.alone:
            return wanted
        mine = np.full(len(self._flat.local_devices), wanted, np.int32)
        place: Callable[..., jax.Array] = jax.make_array_from_process_local_data
        return self._any(place(self._split, mine, (self._flat.size,)))

    def answer(self, asked: Any) -> bool:
        """Return whether any process wants to stop."""
        return bool(asked)


def peer_lost(error: Exception, out: Path) -> AccessError | None:
    """Return an error that says that another process was lost, in place of the library error that shows it.

    Args:
        error: Error of JAX.
        out: The run directory.

    Returns:
        The error; None where this process is alone, or the error is about something else.
    """
    text = str(error)
    if jax.process_count() == 1 or not any(mark in text.lower() for mark in _LOST_MARKS):
        return None
    return AccessError(
        f"process {jax.process_index()} of {jax.process_count()} lost another process of {out}, which ended or can no "
        "longer be reached; the same command continues from the newest checkpoint, and `terrashard launch` repeats it "
        "by itself"
    )


_LOST_MARKS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "heartbeat", "coordination",
               "unavailable", "deadline_exceeded", "socket closed")  # fmt: skip
"""Words by which errors of the libraries below JAX show that a process was lost."""


def abandon(code: int) -> None:
    """End this process with `code` without waiting for the others, which would wait for it in a collective.

    They notice within a heartbeat, and a launcher at once. Leaving in the ordinary way waits for all to leave.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)

    if jax.process_count() > 1:
        atexit.register(leave)  # the last that was registered runs first, so before JAX's own


def die_with_parent(parent: int) -> None:
    """End this process as soon as its `parent` is gone, for whatever reason.

    Linux does it by itself; elsewhere a thread looks once a second.
    """
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(death_signal, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # gone before this line was reached
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
