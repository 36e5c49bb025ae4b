"""`hold_group` holds the coordinator of a group of replicas; `find_group_point` finds that of another launcher.

The address and the secret of the group are in a file beside the run directory that only its owner can read. So whoever
may write into the run may also join it, from any machine that sees the file. The file ends with the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zarr_store.errors import AccessError, InvalidInput, Locked

__all__ = ["GroupPoint", "address_towards", "find_group_point", "group_file", "hold_group"]

ADDRESS = "TERRASHARD_HETERO_COORDINATOR"
SECRET = "TERRASHARD_HETERO_SECRET"
_EXPECTED, _LEAST, _MOST = "TERRASHARD_HETERO_PROCESSES", "TERRASHARD_HETERO_MIN", "TERRASHARD_HETERO_MAX"
_ANSWER_S = 5.0
_SHOWN = ("refused", "retry", "ended")
"""Kinds of events that no member reports; all others are among the lines of the group's leader."""


@dataclass(frozen=True)
class GroupPoint:
    """The meeting point of the members of a group.

    Attributes:
        address: host:port of the coordinator.
        secret: Shared by all members; shown nowhere.
        members: Number of members at this moment; 0 where another launcher holds the coordinator.
    """

    address: str
    secret: str = field(repr=False)
    members: Callable[[], int] = field(default=lambda: 0, repr=False)

    def environment(self, *, expected: int, least: int, most: int | None) -> dict[str, str]:
        """Return the variables by which a process finds the group."""
        limit = {} if most is None else {_MOST: str(most)}
        return {ADDRESS: self.address, SECRET: self.secret, _EXPECTED: str(expected), _LEAST: str(least), **limit}


def group_file(run: Path) -> Path:
    """Return the file that names the group of a run directory.

    >>> str(group_file(Path("runs/zagreb")))
    'runs/zagreb.group.json'
    """
    return run.with_name(f"{run.name}.group.json")


@contextlib.contextmanager
def hold_group(
    run: Path | None,
    bind: str,
    *,
    expected: int,
    least: int,
    most: int | None,
    on_event: Callable[[str], None],
    make: Callable[..., Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[GroupPoint]:
    """Hold the coordinator of a group until the context ends.

    Args:
        run: The run directory, if it is known here: the group's file is beside it.
        bind: host:port to listen on; port 0 takes a free one.
        expected: Number of processes that the run begins with.
        least: Fewest members with which the run goes on.
        most: Largest number of members.
        on_event: Called with each event of the group, as a sentence.
        make: Makes the coordinator; the real one unless a test gives another.
        environment: Replaces `os.environ`, which may name the secret.

    Raises:
        Locked: Another launcher holds a group of this run.
        InvalidInput: The numbers contradict each other, or the address cannot be listened on.
    """
    if make is None:
        from jaxtrain.hetero.coordinator import Coordinator

        make = Coordinator
    env = os.environ if environment is None else environment
    if run is not None:
        refuse_second_group(run)
    secret = env.get(SECRET) or secrets.token_hex(32)
    coordinator = make(
        bind, secret, min_members=least, max_members=most, expected=expected,
        on_event=lambda event: on_event(str(event)) if event.kind in _SHOWN else None,
    )  # fmt: skip
    try:
        with _kept(run, coordinator.address, secret):
            yield GroupPoint(coordinator.address, secret, lambda: len(coordinator.members))
    finally:
        coordinator.close()


@contextlib.contextmanager
def _kept(run: Path | None, address: str, secret: str) -> Iterator[None]:
    if run is None:
        yield
        return
    path = group_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a launcher that was killed
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    text = json.dumps({"address": address, "secret": secret, "host": socket.gethostname(), "process": os.getpid()})
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{text}\n")
        yield
    finally:
        path.unlink(missing_ok=True)


def refuse_second_group(run: Path) -> None:
    """Refuse to hold a group where another launcher still answers.

    Raises:
        Locked: Another launcher answers.
    """
    known = _read(group_file(run))
    if known is not None and _answers(known["address"]):
        raise Locked(
            f"{run} is trained by a group already, whose coordinator is at {known['address']}; add processes to it "
            f"with terrashard launch --join {known['address']} -- train …, or end the other launcher first"
        )


def find_group_point(address: str, run: Path | None, environment: Mapping[str, str] | None = None) -> GroupPoint:
    """Return the group at an address, with the secret from the environment or from the file beside the run.

    Raises:
        InvalidInput: The address cannot be read, or no secret is known.
        AccessError: Nothing answers at the address.
    """
    env = os.environ if environment is None else environment
    bare = address.removeprefix("tcp://")
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+(?:%[\w.-]+)?\]|[^\s:/\[\]]+):(\d{1,5})", bare, re.ASCII)
    if found is None or int(found[1]) not in range(1, 65536):
        raise InvalidInput(f"--join {address}: expected HOST:PORT, the address that the first launcher has printed")
    known = None if run is None else _read(group_file(run))
    secret = env.get(SECRET) or (known["secret"] if known is not None and known["address"] == bare else None)
    gone = (
        f"no coordinator answers at {bare}; the run has ended (the same command without --join continues it), or a "
        "firewall is between"
    )
    if secret is None and known is None and not _answers(bare):  # a launcher takes the file with it when it ends
        raise AccessError(gone)
    if secret is None:
        place = f"{group_file(run)} has none for this address" if run is not None else "no run directory is named"
        raise InvalidInput(
            f"--join {bare} needs the secret of the group: {place}; use the same --out RUN on a file system that both "
            f"machines see, or set {SECRET} to the same text for both launchers"
        )
    if not _answers(bare):
        raise AccessError(gone)
    return GroupPoint(bare, secret)


def _read(path: Path) -> dict[str, str] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(document[name]) for name in ("address", "secret")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S):
            return True
    except (OSError, ValueError):
        return False


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine as `host` sees it; nothing is sent.

    >>> address_towards("127.0.0.1", 80)
    '127.0.0.1'
    """
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
