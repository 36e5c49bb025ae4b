"""`Places` are the places at which the processes of a run start; `ThisMachine` is the simplest kind."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxtrain.launching.process import OnLine, Process, Running

__all__ = ["Places", "ThisMachine", "free_port"]


class Places(Protocol):
    """The places of a run: one for each process, numbered from 0."""

    @property
    def names(self) -> Sequence[str]:
        """Name of each place, for messages and before each line."""

    def meeting(self) -> str:
        """Return host:port where process 0 can listen and all others reach it."""

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> Running:
        """Start process `number` with these variables added to the environment of its place.

        Raises:
            AccessError: The place cannot be reached.
        """


class ThisMachine:
    """Places for processes of this machine.

    Args:
        command: Program and arguments, the same for all.
        processes: Number of processes.
    """

    def __init__(self, command: Sequence[str], processes: int) -> None:
        self._command = list(command)
        self.names = [str(number) for number in range(processes)]

    def meeting(self) -> str:
        """Return an address of this machine alone."""
        return f"127.0.0.1:{free_port()}"

    def start(self, number: int, environment: Mapping[str, str], on_line: OnLine) -> Running:
        """Start one process; it gets its share of the machine's GPUs and cores."""
        share = {"TERRASHARD_LOCAL_PROCESS": str(number), "TERRASHARD_LOCAL_PROCESSES": str(len(self.names))}
        return Process(self._command, number, share | dict(environment), on_line)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
