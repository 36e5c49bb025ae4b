"""`Roll` holds the members of the group as the coordinator named them last, in the order of the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtrain.hetero.peers import Peer

__all__ = ["Roll"]


class Roll:
    """The members of the group.

    Attributes:
        order: All members, in the order in which contributions are added.
        leader: Name of the member that writes logs and checkpoints.
        epoch: Grows by one whenever the members change.
    """

    def __init__(self) -> None:
        self.order: tuple[Peer, ...] = ()
        self.leader = ""
        self.epoch = 0

    def take(self, message: Mapping[str, Any]) -> None:
        """Update the roll from a message."""
        self.epoch, self.leader = int(message["epoch"]), str(message["leader"])
        self.order = tuple(Peer(int(number), str(name), str(address)) for number, name, address in message["members"])
