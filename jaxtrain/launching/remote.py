"""`RemoteHosts` starts the processes of a run over SSH, one on each host, and passes on their lines and exit codes.

Keys and known hosts are those of OpenSSH unless options name others. A host whose connection is lost counts as a
process that died, and the process there saves and ends by itself (`bootstrap`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import shlex
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, TypeVar

from jaxtrain.launching import bootstrap
from jaxtrain.launching.hosts import Host, HostOptions
from jaxtrain.launching.outcome import LOST
from jaxtrain.launching.process import OnLine
from zarr_store.errors import AccessError, InvalidInput

__all__ = ["RemoteHosts", "RemoteProcess"]

_KEEPALIVE_S, _SILENT = 15, 4
"""Seconds between two questions to a host, and unanswered questions after which the host is lost."""
_PACKAGES = ("terrashard", "jax")
_KILLED_S = 10.0
"""Seconds that a host has to report the end of a killed process before its connection is closed."""

Value = TypeVar("Value")


class RemoteHosts:
    """Places on hosts that SSH reaches; a context manager, which closes all connections.

    Args:
        hosts: One for each process.
        command: Arguments of the Python of each host.
        paths: Paths of the command that must exist on each host.
        options: Settings of the connections.
        environment: Variables that every process gets.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        command: Sequence[str],
        *,
        paths: Sequence[str] = (),
        options: HostOptions | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.hosts = tuple(hosts)
        self.names = [host.text for host in hosts]
        self.options = options or HostOptions()
        self.command, self.paths = list(command), list(paths)
        self.environment = dict(environment or {})
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ssh", daemon=True)
        self._seen: dict[Host, _Seen] = {}

    def __enter__(self) -> RemoteHosts:
        _asyncssh()
        self._thread.start()
        try:
            self._check(self.wait(self._look_at_all(), self.options.start_s + 5.0))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            self.wait(end(), 5.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self.loop.close()

    def wait(self, work: Coroutine[Any, Any, Value], seconds: float) -> Value:
        """Run a coroutine in the thread of the connections, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    @property
    def our_address(self) -> str:
        """Address of this machine as the hosts see it; the one towards another machine, if there is one."""
        addresses = [seen.ours for seen in self._seen.values()]
        return next((address for address in addresses if not _is_loopback(address)), addresses[0])

    def meeting(self) -> str:
        """Return an address of the first host, with a port that is free there."""
        first = self.hosts[0]
        seen = self.wait(self._look(first), self.options.start_s + 5.0)
        address = seen.theirs
        if _is_loopback(address):
            address = self.our_address  # it is this machine; others know it by another address
        return f"[{address}]:{seen.port}" if ":" in address else f"{address}:{seen.port}"

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> RemoteProcess:
        """Start one process; a host that cannot be reached is a process that ends with 255."""
        return RemoteProcess(self, number, self.environment | dict(environment), on_line)

    def connect(self, host: Host) -> Any:
        """Return the connection to a host, to be awaited or entered."""
        given = dict(self.options.connect)
        given |= {key: value for key, value in (("username", host.username), ("port", host.port)) if value is not None}
        return _asyncssh().connect(
            host.name, **given, connect_timeout=self.options.start_s, login_timeout=self.options.start_s,
            keepalive_interval=_KEEPALIVE_S, keepalive_count_max=_SILENT,
        )  # fmt: skip

    def program(self) -> str:
        """Return the command line of a host: the same for all, without anything that is to stay secret."""
        read = "import sys;i=sys.stdin.buffer;exec(compile(i.read(int(i.readline())),'terrashard-host','exec'))"
        return f"exec {shlex.quote(self.options.python)} -c {shlex.quote(read)}"

    async def _look_at_all(self) -> list[_Seen | BaseException]:
        return await asyncio.gather(*(self._look(host) for host in self.hosts), return_exceptions=True)

    async def _look(self, host: Host) -> _Seen:
        """Ask a host what it has, and for a free port."""
        try:
            async with asyncio.timeout(self.options.start_s), self.connect(host) as connection:
                theirs = str(connection.get_extra_info("peername")[0])
                ours = str(connection.get_extra_info("sockname")[0])
                order = {"packages": _PACKAGES, "folder": self.options.folder, "paths": self.paths, "address": theirs}
                done = await connection.run(self.program(), input=message(order), encoding="utf-8", errors="replace")
        except Exception as error:
            raise _unreachable(host, error, self.options.start_s) from error
        lines = [line for line in done.stdout.splitlines() if line.startswith(bootstrap.MARK)]
        if not lines:
            raise InvalidInput(
                f"{host.text}: {self.options.python} does not run there (exit code {done.exit_status}: "
                f"{_last_line(done.stderr)}); name the Python of terrashard on the hosts with --cluster-option "
                "remote_python=PATH"
            )
        found = json.loads(lines[-1].removeprefix(bootstrap.MARK))
        seen = _Seen(found, theirs, ours, int(found.get("port", 0)))
        self._seen[host] = seen
        return seen

    def _check(self, answers: Sequence[_Seen | BaseException]) -> None:
        """Refuse hosts that cannot run the command; each problem is named once, with its hosts."""
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, InvalidInput | AccessError):
                raise answer
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if failed:
            kind = InvalidInput if any(isinstance(error, InvalidInput) for error in failed) else AccessError
            raise kind("; ".join(str(error) for error in failed)) from failed[0]
        here = {"python": "{}.{}".format(*sys.version_info), **{name: _version_here(name) for name in _PACKAGES}}
        problems = []
        for host in self.hosts:
            seen = self._seen[host].found
            other = [f"{name} {seen.get(name) or 'none'}" for name, own in here.items() if seen.get(name) != own]
            if other:
                problems.append(f"{host.text} has {', '.join(other)}")
        if problems:
            ours = ", ".join(f"{name} {own or 'none'}" for name, own in here.items())
            raise InvalidInput(
                f"{'; '.join(problems)}; this machine has {ours}: install the same everywhere, or name another Python "
                "with --cluster-option remote_python=PATH"
            )
        absent = [f"{host.text} has no {path}" for host in self.hosts for path in self._seen[host].found["missing"]]
        if absent:
            raise InvalidInput(
                f"{'; '.join(absent)}: hosts must see the same files under the same paths; name the folder to start in "
                "with --cluster-option folder=PATH"
            )


class RemoteProcess:
    """One process on a host.

    Args:
        hosts: Its places.
        number: Number of the process in the run.
        environment: Added to that of the host.
        on_line: Called from the thread of the connections.
    """

    def __init__(self, hosts: RemoteHosts, number: int, environment: Mapping[str, str], on_line: OnLine) -> None:
        self._hosts, self._host, self._number = hosts, hosts.hosts[number], number
        self._environment, self._on_line = environment, on_line
        self._code: int | None = None
        self._ended = threading.Event()
        self._orders: asyncio.Queue[str] = asyncio.Queue()
        self._task = asyncio.run_coroutine_threadsafe(self._run(), hosts.loop)

    def code(self) -> int | None:
        """Return the exit code of the process; None while it runs."""
        return self._code

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the process to end (SIGTERM: it saves first), or kill it."""
        if not self._ended.is_set():
            self._hosts.loop.call_soon_threadsafe(self._orders.put_nowait, "KILL" if at_once else "TERM")

    def finish(self) -> int:
        """Wait for the end of the process and its last lines; one that was killed and does not report is given up."""
        if not self._ended.wait(_KILLED_S):
            self._task.cancel()
            self._ended.wait(_KILLED_S)
        return LOST if self._code is None else self._code

    async def _run(self) -> None:
        code = LOST
        try:
            async with self._hosts.connect(self._host) as connection:
                code = await self._hold(connection)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the process there is lost
            self._on_line(self._number, "stderr", str(_unreachable(self._host, error, self._hosts.options.start_s)))
        finally:
            self._code = code
            self._ended.set()

    async def _hold(self, connection: Any) -> int:
        options = self._hosts.options
        order = {
            "folder": options.folder,
            "command": self._hosts.command,
            "environment": dict(self._environment),
            "grace_s": options.grace_s,
        }
        process = await connection.create_process(self._hosts.program(), encoding="utf-8", errors="replace")
        process.stdin.write(message(order))
        tell = asyncio.ensure_future(self._tell(process))
        try:
            await asyncio.gather(
                self._pass_on("stdout", process.stdout), self._pass_on("stderr", process.stderr), process.wait_closed()
            )
        finally:
            tell.cancel()
        if process.exit_signal:
            return LOST
        status = process.exit_status
        if status is None:
            self._on_line(self._number, "stderr", f"the connection to {self._host.text} was lost")
            return LOST
        return int(status) if status <= 130 or status >= LOST else 128 - int(status)

    async def _pass_on(self, name: str, stream: Any) -> None:
        async for line in stream:
            self._on_line(self._number, name, line.rstrip("\r\n"))

    async def _tell(self, process: Any) -> None:
        while True:
            order = await self._orders.get()
            with contextlib.suppress(OSError):
                process.stdin.write(f"{order}\n")


@dataclass(frozen=True)
class _Seen:
    """The answer of a host: its releases, absent paths, both ends of the connection, and a free port."""

    found: Mapping[str, Any]
    theirs: str
    ours: str
    port: int


def message(order: Mapping[str, Any]) -> str:
    """Return the standard input of a host: the program with its length, and the order on one line."""
    source = _source()
    return f"{len(source.encode())}\n{source}{json.dumps(order)}\n"


@cache
def _source() -> str:
    return inspect.getsource(bootstrap)


@cache
def _asyncssh() -> Any:
    try:
        return importlib.import_module("asyncssh")
    except ImportError as error:
        raise InvalidInput(
            "--hosts needs the package asyncssh, which is not installed; install it with: pip install 'terrashard[ssh]'"
        ) from error


def _version_here(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unreachable(host: Host, error: BaseException, seconds: float) -> AccessError:
    ssh = _asyncssh()
    hint = "try: ssh " + host.text
    if isinstance(error, TimeoutError):
        return AccessError(
            f"{host.text} did not answer within {seconds:g} s; {hint}, or give more time with --cluster-option start_s="
            "SECONDS"
        )
    if isinstance(error, ssh.HostKeyNotVerifiable):
        return AccessError(
            f"the key of {host.text} is not among the known hosts ({error}); {hint}, once, or name a file with "
            "--cluster-option known_hosts=FILE"
        )
    if isinstance(error, ssh.PermissionDenied):
        return AccessError(
            f"{host.text} refuses the login ({error}); name user and key with --cluster-option username=NAME and "
            "--cluster-option client_keys=FILE"
        )
    return AccessError(f"{host.text} cannot be reached: {error or type(error).__name__}; {hint}")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
