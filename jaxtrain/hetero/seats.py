"""A member as the coordinator sees it, and the checks at its joining."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.hetero.membership import Identity

__all__ = ["Application", "Replay", "Seat", "difference", "pack_replay", "recorded_chunks", "unpack_replay"]

Recorded = Mapping[str, int | Sequence[int]]
"""The chunks of each member in a step: their numbers, or how many."""
Replay = Mapping[int, Recorded]
"""Recorded chunks by step."""

_NAME_MOST = 128
_SILENCE_S = (0.2, 3600.0)


@dataclass(frozen=True)
class Application:
    """The statement of a process about itself when it asks to join.

    Attributes:
        name: Its name, the only one of this kind in the group.
        address: host:port at which other members reach it.
        identity: What it must have in common with the others.
        chunks: Number of chunks of a step.
        limit: Most chunks that its memory allows; None is no limit.
        state_step: The step before which its state stands; None if it has none.
        silence_s: Seconds without a sign of life after which it counts as dead.
        replay: Recorded chunks of a run that is repeated, by step.
    """

    name: str
    address: str
    identity: Identity
    chunks: int
    limit: int | None
    state_step: int | None
    silence_s: float
    replay: Replay = field(default_factory=dict)

    def to_message(self) -> dict[str, Any]:
        """Return the message that asks to join."""
        own = self.identity
        return {
            "kind": "join",
            "name": self.name,
            "address": self.address,
            "identity": [own.configuration, own.data, own.code],
            "chunks": self.chunks,
            "limit": self.limit,
            "state_step": self.state_step,
            "silence_s": self.silence_s,
            "replay": pack_replay(self.replay),
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Application:
        """Read the message that asks to join.

        Raises:
            ValueError: A value is of another kind, or out of its range.
        """
        name, limit, step = str(message["name"]), message["limit"], message["state_step"]
        if not 0 < len(name) <= _NAME_MOST or not name.isprintable():
            raise ValueError(f"expected a printable name of 1 to {_NAME_MOST} characters, got {name[:_NAME_MOST]!r}")
        chunks, silence_s = int(message["chunks"]), float(message["silence_s"])
        if chunks < 1 or not _SILENCE_S[0] <= silence_s <= _SILENCE_S[1]:
            raise ValueError(f"expected chunks ≥ 1 and silence_s in {_SILENCE_S}, got {chunks} and {silence_s}")
        limit, step = (None if value is None else max(0, int(value)) for value in (limit, step))
        configuration, data, code = map(str, message["identity"])
        return cls(
            name, str(message["address"]), Identity(configuration, data, code), chunks, limit, step, silence_s,
            unpack_replay(message["replay"]),
        )  # fmt: skip


@dataclass
class Seat:
    """The place of one process in the group; a process that joins again gets a new one.

    Attributes:
        number: Number of the joining; never given twice.
        application: The application of the process.
        heard: Time of its last sign of life.
        active: Whether it takes part in steps; a newcomer without state does not yet.
        wants_state: Whether it waits for the state.
        donor: Number of the member that sends it the state.
        given: Time since which the state is being sent.
        ready: The step that it wants to begin.
        assigned: Its chunks of the current step.
        contributed: The report on its contribution to the current attempt.
        have: Whether it holds the whole sum of the current attempt.
        values: Its values for the current gathering.
    """

    number: int
    application: Application
    heard: float
    active: bool = False
    wants_state: bool = False
    donor: int | None = None
    given: float = 0.0
    ready: int | None = None
    assigned: tuple[int, ...] = ()
    contributed: dict[str, Any] | None = None
    have: bool = False
    values: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.application.name

    @property
    def address(self) -> str:
        return self.application.address


def difference(own: Application, group: Application) -> str | None:
    """Return what differs between a newcomer and the group, and what to do; None if nothing differs."""
    advice = {
        "configuration": "start it with the same configuration file and --set options",
        "data": "let it read the same cube or store, and the same split",
        "code": "install the same version of terrashard and jax",
    }
    for part, what in advice.items():
        mine, theirs = getattr(own.identity, part), getattr(group.identity, part)
        if mine != theirs:
            return f"its {part} differs from that of the group ({mine[:12]} instead of {theirs[:12]}): {what}"
    if own.chunks != group.chunks:
        what = f"it divides a step into {own.chunks} chunks, the group into {group.chunks}"
        return f"{what}: start it with the same configuration"
    return None


def recorded_chunks(recorded: Recorded, members: Sequence[str], chunks: int) -> dict[str, tuple[int, ...]] | None:
    """Return the chunks of each member as they were recorded; None if these members cannot repeat that step.

    Members that were not there get no chunk, so that the sum has the same terms in the same order.

    >>> recorded_chunks({"a": [0, 3], "b": [1, 2]}, ["a", "b", "c"], 4)
    {'a': (0, 3), 'b': (1, 2), 'c': ()}
    >>> recorded_chunks({"a": 3, "b": 1}, ["a", "b"], 4)
    {'a': (0, 1, 2), 'b': (3,)}
    >>> recorded_chunks({"a": 3, "z": 1}, ["a", "b"], 4) is None
    True
    """
    found: dict[str, tuple[int, ...]] = {}
    offset = 0
    for name in members:
        own = recorded.get(name, 0)
        found[name] = tuple(range(offset, offset + own)) if isinstance(own, int) else tuple(sorted(own))
        offset += len(found[name])
    complete = sorted(chunk for some in found.values() for chunk in some) == list(range(chunks))
    return found if complete and set(recorded) <= set(members) else None


def pack_replay(replay: Replay) -> list[list[Any]]:
    """Write recorded chunks as runs of steps in which they are equal.

    >>> pack_replay({0: {"a": 2}, 1: {"a": 2}, 3: {"a": (0, 1)}})
    [[0, 1, {'a': 2}], [3, 3, {'a': [0, 1]}]]
    """
    runs: list[list[Any]] = []
    for step in sorted(replay):
        shares = {name: own if isinstance(own, int) else list(own) for name, own in replay[step].items()}
        if runs and runs[-1][1] == step - 1 and runs[-1][2] == shares:
            runs[-1][1] = step
        else:
            runs.append([step, step, shares])
    return runs


class _Runs(Mapping[int, Recorded]):
    """Recorded chunks, looked up by step in a list of runs."""

    def __init__(self, runs: list[tuple[int, int, Recorded]]) -> None:
        self._runs = runs

    def __getitem__(self, step: int) -> Recorded:
        at = bisect_right(self._runs, step, key=lambda run: run[0]) - 1
        if at < 0 or step > self._runs[at][1]:
            raise KeyError(step)
        return self._runs[at][2]

    def __iter__(self) -> Iterator[int]:
        return (step for first, last, _ in self._runs for step in range(first, last + 1))

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last, _ in self._runs)


def unpack_replay(runs: Any) -> Replay:
    """Read what `pack_replay` wrote.

    >>> unpack_replay([[0, 1, {"a": 2}], [3, 3, {"a": 2}]]).get(2) is None
    True
    """
    read: list[tuple[int, int, Recorded]] = [
        (
            int(first),
            int(last),
            {str(name): own if isinstance(own, int) else tuple(map(int, own)) for name, own in shares.items()},
        )
        for first, last, shares in runs
    ]
    return _Runs(sorted(read, key=lambda run: run[0]))
