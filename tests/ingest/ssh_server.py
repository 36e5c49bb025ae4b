"""An SSH server on 127.0.0.1 for machines without sshd: `python ssh_server.py PORT HOST_KEY AUTHORIZED_KEYS`.

It runs what it is told in a shell, as sshd does, and ends those processes with their connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import asyncssh


async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    shell = await asyncio.create_subprocess_shell(
        process.command or "true", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        await process.redirect(stdin=shell.stdin, stdout=shell.stdout, stderr=shell.stderr)
        closed = asyncio.ensure_future(process.channel.wait_closed())
        ended = asyncio.ensure_future(shell.wait())
        await asyncio.wait((closed, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            process.exit(ended.result())
        closed.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)


async def main(port: str, host_key: str, authorized: str) -> None:
    server = await asyncssh.listen(
        "127.0.0.1", int(port), server_host_keys=[host_key], authorized_client_keys=authorized, process_factory=run,
        encoding=None,
    )  # fmt: skip
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
