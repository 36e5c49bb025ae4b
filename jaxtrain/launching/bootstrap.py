"""The program that a host runs for the launcher: it starts one process of the run and ends it with the connection.

Its source is sent over standard input, so a host needs no file of it, and with it one line of JSON: what to look at,
or what to start. So secrets of the environment are in no list of processes. Further lines are orders: TERM or KILL. The
end of standard input means that the launcher or the connection is gone: the process gets SIGTERM, and SIGKILL later.

Only the standard library is used, and no syntax that old releases of Python lack: it must be able to report which
Python it is.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, BinaryIO

MARK = "terrashard-host "


def look(order: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about this host that the launcher needs before it starts anything."""
    found: dict[str, Any] = {"python": "{}.{}".format(*sys.version_info)}
    for name in order["packages"]:
        try:
            from importlib import metadata  # not in Python 3.7

            found[name] = metadata.version(name)
        except ImportError:  # PackageNotFoundError is one, too
            found[name] = None
    folder = order["folder"]
    found["missing"] = [path for path in [folder, *order["paths"]] if not os.path.exists(os.path.join(folder, path))]
    for address in (order["address"], ""):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue  # the address that others use may belong to a router
            found["port"] = probe.getsockname()[1]
            break
    return found


def pump(source: int, target: int, gone: threading.Event) -> None:
    """Pass output on; if nobody listens any longer, still read it, so that the process can continue and save."""
    while True:
        block = os.read(source, 65536)
        if not block:
            return
        while block and not gone.is_set():
            try:
                block = block[os.write(target, block) :]
            except OSError:
                gone.set()


def hold(order: dict[str, Any], orders: BinaryIO) -> int:
    """Run the process to its end, and return its exit code as a shell would show it."""
    os.chdir(order["folder"])
    environment = dict(os.environ)
    environment.update(order["environment"])
    environment.update(TERRASHARD_PARENT=str(os.getpid()), PYTHONUNBUFFERED="1")
    child = subprocess.Popen(
        [sys.executable, *order["command"]], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    gone = threading.Event()

    def leave(*_: object) -> None:
        child.terminate()
        late = threading.Timer(order["grace_s"], child.kill)
        late.daemon = True
        late.start()

    def obey() -> None:
        for line in orders:
            child.kill() if line.strip() == b"KILL" else child.terminate()
        gone.set()
        leave()

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)
    threading.Thread(target=obey, daemon=True).start()
    pumps = [
        threading.Thread(target=pump, args=(source.fileno(), target, gone), daemon=True)
        for source, target in ((child.stdout, 1), (child.stderr, 2))
        if source is not None
    ]
    for thread in pumps:
        thread.start()
    code = child.wait()
    for thread in pumps:
        thread.join(2)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Read the order, and do what it says."""
    orders = sys.stdin.buffer
    order = json.loads(orders.readline().decode("utf-8"))
    if "packages" in order:
        sys.stdout.write("\n" + MARK + json.dumps(look(order)) + "\n")
        sys.stdout.flush()
        code = 0
    else:
        code = hold(order, orders)
    os._exit(code)  # a thread still reads standard input


if __name__ == "__main__":
    main()
