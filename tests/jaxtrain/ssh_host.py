"""An SSH server in a thread of the test, on 127.0.0.1; it runs what it is told in a shell, as sshd does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SshHost:
    """A running server: its port, files of keys, and the command lines that clients gave."""

    port: int = 0
    folder: Path = Path()
    commands: list[str] = field(default_factory=list)
    shells: list[int] = field(default_factory=list)
    connections: list[Any] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop | None = None

    def options(self) -> dict[str, str]:
        return {
            "username": "tester",
            "known_hosts": str(self.folder / "known"),
            "client_keys": str(self.folder / "user"),
        }

    def cut(self) -> None:
        """End all connections without a word, as a cable that is pulled."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(lambda: [connection.abort() for connection in self.connections])


@contextlib.contextmanager
def ssh_host(folder: Path, *, ports: int = 2) -> Iterator[list[SshHost]]:
    """Serve on so many ports, each of which is a host of its own."""
    import asyncssh

    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(folder / name))
        key.write_public_key(str(folder / f"{name}.pub"))
    hosts = [SshHost(folder=folder) for _ in range(ports)]
    loop = asyncio.new_event_loop()

    async def run(host: SshHost, process: Any) -> None:
        host.commands.append(process.command or "")
        shell = await asyncio.create_subprocess_shell(
            process.command or "true", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        host.shells.append(shell.pid)
        shell_in, shell_out, shell_err = shell.stdin, shell.stdout, shell.stderr
        assert shell_in is not None
        assert shell_out is not None
        assert shell_err is not None

        async def feed() -> None:
            with contextlib.suppress(asyncssh.Error, OSError):
                while block := await process.stdin.read(4096):
                    shell_in.write(block)
            shell_in.close()  # sshd closes the pipes of what it runs, and sends no signal

        async def fetch(source: asyncio.StreamReader, target: Any) -> None:
            while block := await source.read(4096):
                with contextlib.suppress(asyncssh.Error, OSError):
                    target.write(block)

        feeding = asyncio.ensure_future(feed())
        await asyncio.gather(fetch(shell_out, process.stdout), fetch(shell_err, process.stderr))
        code = await shell.wait()
        feeding.cancel()
        process.exit(code if code >= 0 else 128 - code)

    async def serve() -> list[Any]:
        servers = []
        for host in hosts:

            class Server(asyncssh.SSHServer):
                def __init__(self, host: SshHost = host) -> None:
                    self.host = host

                def connection_made(self, connection: Any) -> None:
                    self.host.connections.append(connection)

            async def factory(process: Any, host: SshHost = host) -> None:
                await run(host, process)

            server = await asyncssh.listen(
                "127.0.0.1", 0, server_host_keys=[str(folder / "host")], server_factory=Server,
                authorized_client_keys=str(folder / "user.pub"), process_factory=factory, encoding=None,
            )  # fmt: skip
            host.port, host.loop = server.get_port(), loop
            servers.append(server)
        return servers

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers = asyncio.run_coroutine_threadsafe(serve(), loop).result(20)
    known = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text("".join(f"[127.0.0.1]:{host.port} {known}\n" for host in hosts))
    try:
        yield hosts
    finally:

        async def end() -> None:
            for server in servers:
                server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        for host in hosts:
            for pid in host.shells:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        loop.close()
