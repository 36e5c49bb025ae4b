"""Values that a replica and its group exchange, and the errors that end a membership.

A **chunk** is `hetero.chunk` consecutive samples of the global batch of a step. A **share** is the number of chunks
of a step that one member computes. The group counts chunks from 0 in the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from zarr_store.errors import AccessError, InvalidInput, TerrashardError

__all__ = [
    "Assignment",
    "Contribution",
    "CoordinatorLost",
    "Dropped",
    "Event",
    "GroupChanged",
    "GroupError",
    "Identity",
    "MoreWork",
    "Refused",
    "RunFinished",
    "TooFewMembers",
    "Total",
]

EventKind = Literal["joined", "left", "dropped", "set_aside", "retried", "shares", "refused", "retry", "ended"]


@dataclass(frozen=True)
class Identity:
    """Digests of what all members of a run must have in common; a newcomer with another one is refused.

    Attributes:
        configuration: The resolved configuration, without what may differ between machines.
        data: The data and its split.
        code: The version of the code that computes.
    """

    configuration: str
    data: str
    code: str


@dataclass(frozen=True)
class Event:
    """A change in the group.

    Attributes:
        kind: `joined`, `left`, `dropped`, `set_aside`, `retried`, `shares`, `refused`, `retry` or `ended`.
        step: The step before which it counts.
        member: Name of the member; empty for `shares` and for a stranger that was refused.
        reason: The reason in words.
    """

    kind: EventKind
    step: int
    member: str
    reason: str

    def __str__(self) -> str:
        who = f"{self.member}: " if self.member else ""
        return f"step {self.step}: {who}{self.reason}"


@dataclass(frozen=True)
class Assignment:
    """The work of this member in one step.

    Attributes:
        step: Number of the step.
        chunks: Numbers of the chunks to compute, ascending; empty for a member that is set aside.
        members: Names of all members, in the order in which contributions are added.
        leader: Member that writes logs and checkpoints; the one that has been in the group for longest.
        shares: Chunks of each member, by name.
        events: Changes since the step before; each event comes once to every member.
        epoch: Grows by one whenever the members change.
    """

    step: int
    chunks: tuple[int, ...]
    members: tuple[str, ...]
    leader: str
    shares: dict[str, int]
    events: tuple[Event, ...] = ()
    epoch: int = 0


@dataclass(frozen=True)
class Contribution:
    """The part of a step that one member has computed.

    Attributes:
        step: Number of the step.
        chunks: Numbers of the chunks that are in it.
        vector: float32 (R,): the sum over these chunks; it must not change until the exchange has returned a `Total`.
        weight: Sum of the weights, for example of labelled pixels.
        sums: Sums for the metrics, by name.
        chunk_seconds: Seconds of computing of each chunk, without waiting; empty if they were not measured.
    """

    step: int
    chunks: tuple[int, ...]
    vector: npt.NDArray[np.float32]
    weight: float
    sums: dict[str, float] = field(default_factory=dict)
    chunk_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Total:
    """The sum of all contributions of a step; the same bytes for every member.

    Attributes:
        step: Number of the step.
        vector: float32 (R,); valid until the next call of `exchange`, which uses the memory again.
        weight: Sum of the weights.
        sums: Sums for the metrics, by name.
        shares: Chunks that each member has computed, by name; together every chunk of the step exactly once.
        seconds: Mean seconds per chunk of each member that measured them, by name.
    """

    step: int
    vector: npt.NDArray[np.float32]
    weight: float
    sums: dict[str, float]
    shares: dict[str, tuple[int, ...]]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MoreWork:
    """A member was lost, and these chunks of the current step are now ours as well.

    Attributes:
        step: Number of the step.
        chunks: The additional chunks. The next contribution holds them and all earlier ones.
    """

    step: int
    chunks: tuple[int, ...]


class GroupError(AccessError):
    """The membership of this process has ended."""


class Refused(InvalidInput):
    """The group does not take this process: it differs from the others, or the group is full."""


class Dropped(GroupError):
    """The group went on without this member, for example after a long silence; it may join again as a newcomer."""


class CoordinatorLost(GroupError):
    """The coordinator no longer answers."""


class TooFewMembers(GroupError):
    """Fewer members are left than the run needs: save, end, and start again from the newest checkpoint."""


class GroupChanged(GroupError):
    """The members changed while values were gathered: nobody got a result, and the call may be repeated.

    Attributes:
        members: Names of those that are left, in order.
        leader: The leader from now on.
    """

    members: tuple[str, ...] = ()
    leader: str = ""


class RunFinished(TerrashardError):
    """The run reached its end before this process could take part."""

    exit_code = 0
