"""`parse_hosts` reads the hosts of --hosts, and `HostOptions` the settings of their connections."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zarr_store.errors import InvalidInput

__all__ = ["SSH_OPTIONS", "Host", "HostOptions", "parse_hosts"]

SSH_OPTIONS = ("username", "port", "known_hosts", "client_keys", "remote_python", "start_s", "folder")
_MOST_START_S = 86_400.0


@dataclass(frozen=True)
class Host:
    """One host: `[user@]name[:port]`.

    Attributes:
        text: The host as it was given; the name of its process.
    """

    text: str
    name: str
    username: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class HostOptions:
    """Settings of the connections.

    Attributes:
        connect: Arguments of `asyncssh.connect`: username, port, known_hosts, client_keys.
        python: The Python of the hosts.
        folder: Folder in which the processes start.
        start_s: Seconds that a host has to answer.
        grace_s: Seconds that a process has to save and end when its connection is lost.
    """

    connect: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    folder: str = field(default_factory=lambda: str(Path.cwd()))
    start_s: float = 30.0
    grace_s: float = 60.0

    @classmethod
    def from_options(cls, options: Mapping[str, str], *, grace_s: float = 60.0) -> HostOptions:
        """Make the settings from KEY=VALUE options.

        Raises:
            InvalidInput: A key is unknown, or a value is not a number.
        """
        unknown = sorted(set(options) - set(SSH_OPTIONS))
        if unknown:
            raise InvalidInput(
                f"--hosts has no option {', '.join(unknown)}; its options are {', '.join(sorted(SSH_OPTIONS))}"
            )
        connect: dict[str, Any] = {
            name: options[name] for name in ("username", "known_hosts", "client_keys") if name in options
        }
        try:
            if "port" in options:
                connect["port"] = int(options["port"])
            start_s = float(options.get("start_s", cls.start_s))
        except ValueError as error:
            raise InvalidInput(f"--cluster-option: port and start_s are numbers ({error})") from error
        if not 0 < start_s <= _MOST_START_S:  # nan is neither
            raise InvalidInput(f"--cluster-option start_s={start_s:g}: expected seconds above 0, at most 86400")
        return cls(
            connect=connect,
            python=options.get("remote_python", sys.executable),
            folder=options.get("folder", str(Path.cwd())),
            start_s=start_s,
            grace_s=grace_s,
        )


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Parse hosts separated by commas.

    >>> [host.name for host in parse_hosts("gpu-a,me@gpu-b:2222,[fe80::1]:22")]
    ['gpu-a', 'gpu-b', 'fe80::1']

    Raises:
        InvalidInput: None is named, one cannot be read, or one is named twice.
    """
    hosts = []
    for part in (part.strip() for part in text.split(",")):
        found = re.fullmatch(
            r"(?:([^@\s]+)@)?(?:\[([0-9a-fA-F:.]+(?:%[\w.-]+)?)\]|([^\s:@\[\]/-][^\s:@\[\]/]*))(?::(\d{1,5}))?",
            part,
            re.ASCII,
        )
        if not found or int(found[4] or 1) not in range(1, 65536):
            bare = part.count(":") > 1 and not part.startswith("[")
            expected = f"an IPv6 address stands in brackets, [{part}]" if bare else "expected gpu-a,user@gpu-b:2222"
            raise InvalidInput(f"--hosts {text}: {part!r} is not a host; {expected}")
        hosts.append(Host(part, found[2] or found[3], found[1], int(found[4]) if found[4] else None))
    twice = sorted({host.text for host in hosts if hosts.count(host) > 1})
    if twice:
        raise InvalidInput(
            f"--hosts names {', '.join(twice)} twice: one process runs on each host and takes all its devices; name "
            "each host once, or run `terrashard launch -n` there"
        )
    return tuple(hosts)
