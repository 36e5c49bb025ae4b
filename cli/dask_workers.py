"""`DaskWorkers` starts the processes of a run on the workers of a Dask cluster, one on each, for `jaxtrain.launching`.

A task on the worker holds the process as a child, so that the worker itself never starts JAX. The process ends with its
worker, and with the client of the launcher.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from jaxtrain.launching.process import OnLine, Process
from zarr_store.errors import AccessError, InvalidInput

if TYPE_CHECKING:
    from ingest.request.config import IngestConfig

__all__ = ["FORWARDED", "DaskProcess", "DaskWorkers", "check_address", "cluster_places", "dask_workers"]

FORWARDED = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "TERRASHARD_HEARTBEAT_S")
"""Environment variables that a worker takes from the caller, because JAX reads them; all others are its own."""

_POLL_S = 0.2
"""Seconds between two looks at a process."""
_GRACE_S = 30.0
"""Seconds that a process has to save after its task was cancelled."""
_LAST_LINES_S = 10.0
"""Seconds to wait for the last lines of a process that has ended."""
_KILLED_S = 10.0
"""Seconds to wait until a process that was killed is reported."""


@contextmanager
def dask_workers(address: str, command: Sequence[str], processes: int | None) -> Iterator[DaskWorkers]:
    """Open the workers of the cluster at `address` as places of a run.

    Args:
        address: Address of the scheduler, such as tcp://10.0.0.1:8786.
        command: Arguments of the Python of each worker.
        processes: Number of processes; None starts one on each worker.

    Raises:
        InvalidInput: The address has no scheme.
        AccessError: The cluster does not answer, or has too few workers.
    """
    check_address(address)
    from ingest.request.config import IngestConfig

    with cluster_places(IngestConfig(scheduler=address), command, processes) as places:
        yield places


def check_address(address: str) -> None:
    """Refuse an address of a scheduler without its scheme.

    Raises:
        InvalidInput: The address has no scheme.
    """
    if not re.match(r"[a-z]+://.", address):
        raise InvalidInput(
            f"--dask {address}: expected the address of a scheduler with its scheme, such as tcp://10.0.0.1:8786"
        )


@contextmanager
def cluster_places(config: IngestConfig, command: Sequence[str], processes: int | None) -> Iterator[DaskWorkers]:
    """Open the workers of the cluster that a configuration names, as places of processes; start it if needed.

    Raises:
        AccessError: The cluster does not answer, or has too few workers.
        InvalidInput: The configuration cannot be used.
    """
    from ingest.run.cluster import open_cluster

    with open_cluster(config) as client:
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        wanted = len(workers) if processes is None else processes
        if not workers or wanted > len(workers):
            needed = f"{wanted} processes need one worker each" if wanted else "each process needs a worker"
            raise AccessError(
                f"the cluster has {len(workers)} Dask workers, but {needed}: start more workers, or give a smaller -n"
            )
        places = DaskWorkers(client, command, wanted)
        with places.listening():
            yield places


class DaskWorkers:
    """The workers of a Dask cluster, as places in which the processes of a run start.

    Args:
        client: Connected to the cluster.
        command: Arguments of the Python of each worker.
        processes: Number of places.
    """

    def __init__(self, client: Any, command: Sequence[str], processes: int) -> None:
        self.client = client
        self.names = [str(number) for number in range(processes)]
        self.topic = f"terrashard-launch-{uuid.uuid4().hex[:12]}"
        self.heard: Counter[str] = Counter()
        """Number of lines that have come from each process, by the key of its task."""
        self._command = list(command)
        self._chosen: dict[int, str] = {}
        self._listeners: dict[str, tuple[int, OnLine]] = {}
        self._count = 0

    def meeting(self) -> str:
        """Return an address of the first process's worker, with a port that is free there."""
        where = self._choose(0)
        address: str = self.client.submit(
            _rendezvous, workers=[where], allow_other_workers=False, pure=False, key=self._key("meeting")
        ).result()
        return address

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> DaskProcess:
        """Start one process on its worker, or on an idle one if that worker is gone.

        Raises:
            AccessError: No worker is idle.
        """
        where, key = self._choose(number), self._key(str(number))
        self._listeners[key] = (number, on_line)
        values = {name: os.environ[name] for name in FORWARDED if name in os.environ} | dict(environment)
        future = self.client.submit(
            _hold_process, self._command, number, values, self.topic, key, key=key, workers=[where],
            allow_other_workers=False, pure=False, retries=0, priority=100,
        )  # fmt: skip
        return DaskProcess(self, future, key, where)

    def has(self, where: str) -> bool:
        """Return whether the cluster has this worker; it counts as there while the scheduler does not answer."""
        try:
            return where in self.client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, TimeoutError):
            return True

    def _key(self, what: str) -> str:
        self._count += 1
        return f"{self.topic}-{what}-{self._count}"

    def _choose(self, number: int) -> str:
        """Return the worker of a process: the one that it had, or one that has none."""
        there = sorted(self.client.scheduler_info(n_workers=-1)["workers"])
        mine = self._chosen.get(number)
        if mine not in there:
            taken = {where for other, where in self._chosen.items() if other != number}
            idle = [where for where in there if where not in taken]
            if not idle:
                raise AccessError(
                    f"no Dask worker is idle for process {number}: {len(there)} workers, {len(self.names)} processes"
                )
            mine = self._chosen[number] = idle[0]
        return str(mine)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass on the lines of the processes while the context is open."""

        def receive(event: tuple[float, Mapping[str, Any]]) -> None:
            _, line = event
            number, on_line = self._listeners[str(line["key"])]
            on_line(number, str(line["stream"]), str(line["text"]))
            self.heard[str(line["key"])] += 1

        self.client.subscribe_topic(self.topic, receive)
        try:
            yield
        finally:
            with suppress(OSError, TimeoutError):
                self.client.unsubscribe_topic(self.topic)


class DaskProcess:
    """One process on a worker.

    Args:
        places: Its places.
        future: The task that holds it.
        key: Key of the task.
        where: Address of the worker.
    """

    def __init__(self, places: DaskWorkers, future: Any, key: str, where: str) -> None:
        self._places, self._future, self._key, self._where = places, future, key, where
        self._killed = self._lost = False

    def code(self) -> int | None:
        """Return the exit code of the process; None while it runs, 1 where its worker died with it."""
        status = self._future.status
        if status == "pending" and not self._is_lost():
            return None
        if status == "finished":
            return int(self._future.result()[0])
        return -15 if self._killed else 1

    def _is_lost(self) -> bool:
        """Return whether its worker is gone: the scheduler would keep its task waiting for that worker."""
        if not self._lost and not self._places.has(self._where):
            self._lost = True
            self._future.cancel()
        return self._lost

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the process to end (SIGTERM: it saves first), or kill it."""
        if self.code() is None:
            self._killed = self._killed or at_once
            # a worker that is gone would keep the caller waiting
            threading.Thread(target=self._tell, args=(at_once,), name=f"stop-{self._key}", daemon=True).start()

    def _tell(self, at_once: bool) -> None:
        with suppress(Exception):
            self._places.client.run(_stop_process, self._key, at_once, workers=[self._where], on_error="ignore")

    def finish(self) -> int:
        """Wait for the end of the process and its last lines; wait only briefly for a killed one without report."""
        until = time.monotonic() + _KILLED_S
        while self.code() is None and time.monotonic() < until:
            time.sleep(_POLL_S / 4)
        if self.code() is None:
            self._killed = True
            self._future.cancel()
            return -15
        if self._future.status == "finished":  # lines arrive separately from the result, and later
            lines, until = int(self._future.result()[1]), time.monotonic() + _LAST_LINES_S
            while self._places.heard[self._key] < lines and time.monotonic() < until:
                time.sleep(_POLL_S / 4)
        code = self.code()
        return 1 if code is None else code


# ---- On the worker


_processes: dict[str, Process] = {}
"""Processes of this worker, by the key of the task that holds them."""


def _rendezvous() -> str:
    """Return the address of this worker, as the others see it, and a free port."""
    from distributed import get_worker

    host = get_worker().address.rpartition("://")[2].rpartition(":")[0].strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _stop_process(key: str, at_once: bool) -> None:
    process = _processes.get(key)
    if process is not None:
        process.stop(at_once=at_once)


def _hold_process(
    arguments: list[str], number: int, environment: dict[str, str], topic: str, key: str
) -> tuple[int, int]:
    """Run one process to its end on a worker; return its exit code and how many lines it wrote.

    The process ends with the worker, and when the client cancels the task or is gone.
    """
    import distributed

    worker = distributed.get_worker()
    leave_pool: Callable[[], None] = distributed.secede
    leave_pool()  # it runs for hours: it must not count in estimates for other tasks, nor block a thread of the pool

    counting = threading.Lock()
    lines = 0

    def on_line(_process: int, stream: str, text: str) -> None:
        nonlocal lines
        with counting:
            lines += 1
        worker.log_event(topic, {"key": key, "stream": stream, "text": text})

    process = _processes[key] = Process([sys.executable, *arguments], number, environment, on_line)
    try:
        while process.code() is None:
            task = worker.state.tasks.get(key)
            if task is None or task.state not in ("executing", "long-running"):
                break
            time.sleep(_POLL_S)
        if process.code() is None:  # cancelled: it saves first, as after any SIGTERM
            process.stop()
            until = time.monotonic() + _GRACE_S
            while process.code() is None and time.monotonic() < until:
                time.sleep(_POLL_S)
    finally:
        process.stop(at_once=True)
        code = process.finish()
        del _processes[key]
    return code, lines
