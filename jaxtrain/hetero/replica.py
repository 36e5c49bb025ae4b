"""`Replica` is one process of a run with unequal replicas, as the training loop sees it.

It takes the place of batches and of the train step: `steps` yields the assignments of the group, `train_step` computes
the chunks of this replica, exchanges the sum with the others and applies the total. Between two steps it shares what
must be equal everywhere: the state that a newcomer receives, the scores of a validation, a comparison of parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Rows, put_batch
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.hetero.chunks import SUMS, ChunkPrograms, pack_state, unpack_state
from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.history import read_shares
from jaxtrain.hetero.identity import identify
from jaxtrain.hetero.member import Member
from jaxtrain.hetero.membership import (
    Assignment,
    Contribution,
    Event,
    GroupChanged,
    GroupError,
    MoreWork,
    Total,
)
from jaxtrain.hetero.memory import most_chunks
from jaxtrain.hetero.stream import ChunkStream
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.rendezvous import Group, find_group
from zarr_store.errors import IntegrityError, InvalidInput

__all__ = ["Replica", "Work", "expect_group", "join_group", "warm_up"]

_HEAD = 8
"""Bytes in which the length of the JSON before a state is written."""


def expect_group(environment: Mapping[str, str]) -> Group:
    """Return where the replicas of a run meet.

    Raises:
        InvalidInput: Nothing in the environment names a group.
    """
    group = find_group(environment)
    if group is None:
        raise InvalidInput(
            "hetero.enabled needs a group of replicas, and this process was started alone: use `terrashard launch -n N "
            "-- train …` (also on several machines, with --hosts, --dask or --emit), or set hetero.enabled = false"
        )
    return group


@dataclass(frozen=True)
class Work:
    """The work of all replicas in one step.

    Attributes:
        shares: Chunks of each replica, by name.
        rates: Windows a second that each replica computes, without waiting; of those that computed any.
        waiting: Seconds that each replica waited for others in the step before.
        events: Changes of the group before this step.
        chunks: Numbers of the chunks of each replica, in the order in which their sums were added.
        leader: The replica that writes.
        asked: Whether this replica was asked to stop before it contributed to this step.
        stop: Whether all replicas were.
    """

    shares: dict[str, int]
    rates: dict[str, float]
    waiting: dict[str, float]
    events: tuple[Event, ...]
    chunks: dict[str, tuple[int, ...]]
    leader: str
    asked: bool
    stop: bool

    def to_log(self) -> dict[str, dict[str, float | int]]:
        """Return the columns of the history of a run."""
        return {
            "shares": dict(self.shares),
            "rates": {name: round(rate, 3) for name, rate in self.rates.items()},
            "waiting": {name: round(seconds, 4) for name, seconds in self.waiting.items()},
        }


@dataclass(kw_only=True)
class Replica:
    """One member of the group while it trains; a context manager, made by `join_group`.

    Attributes:
        member: Its place in the group.
        programs: Its compiled programs.
        ready: Training data of the run.
        config: The run.
        first: The step that comes next.
        state: The newest state, which newcomers receive.
        wishes_to_stop: Whether this process was asked to stop.
        position: Returns what newcomers need beside the state: the best validation and the counts of incidents.
        input_wait: Seconds that the last step waited for its input.
    """

    member: Member
    programs: ChunkPrograms
    ready: TrainingSet
    config: TrainConfig
    first: int
    state: TrainState | None = None
    wishes_to_stop: Callable[[], bool] = lambda: False
    position: Callable[[], dict[str, Any]] = dict
    input_wait: float = 0.0
    received: tuple[TrainState, dict[str, Any]] | None = None
    """State and position that another replica sent at the joining."""
    _stream: ChunkStream | None = None
    _vector: jax.Array | None = None
    _shares: dict[str, int] = field(default_factory=dict)
    _waited: float = 0.0
    _events: tuple[Event, ...] = ()

    @property
    def name(self) -> str:
        """Name of this replica."""
        return self.member.name

    @property
    def leads(self) -> bool:
        """Whether this replica writes history, checkpoints and report."""
        return self.member.leader == self.member.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.member.close()

    # ---- Steps.

    def steps(self, state: TrainState, first: int, last: int) -> Generator[tuple[int, Rows, Assignment], None, None]:
        """Yield number, windows of the whole batch and own chunks of each step, once all replicas are ready for it."""
        run, program = self.config.run, self.programs.program
        self.state = state
        self.member.offer_state(self._pack)
        self._vector = self.programs.zeros()
        with ChunkStream(
            self.ready.reader, self.ready.plan.parts["train"], order=self.ready.order(run), batch_size=run.batch_size,
            chunk=self.config.chunk, sharding=batch_sharding(program.mesh), last=last, threads=run.read_threads,
            ahead=run.prefetch,
        ) as self._stream:  # fmt: skip
            for number in range(first, last):
                began = time.perf_counter()
                assignment = self.member.start(number)
                self._waited += time.perf_counter() - began
                self._stream.expect(number, assignment.chunks)
                yield number, self._stream.rows(number), assignment

    def train_step(
        self, state: TrainState, assignment: Assignment, *, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array], Work]:
        """Compute the assigned chunks, exchange their sum, and update the state, which is donated.

        Args:
            state: The state before the step.
            assignment: The assignment, from `steps`.
            key: Random key of the step, the same on all replicas.
        """
        assert self._stream is not None
        number, chunks = assignment.step, assignment.chunks
        self.input_wait = 0.0
        sums = dict.fromkeys(SUMS, 0.0)
        seconds = self._compute(state, number, chunks, key, sums, first=True)
        # who is asked later stops a step later, so that all who were asked at once stop together
        asked = self.wishes_to_stop()
        told = {f"waited/{self.name}": self._waited, "stop": float(asked)}
        self._waited = 0.0
        while True:
            vector = self._sum_on_host(anything=bool(chunks))
            mine = Contribution(number, chunks, vector, sums["weight"], sums | told, tuple(seconds))
            began = time.perf_counter()
            answer = self.member.exchange(mine)
            self._waited += time.perf_counter() - began
            if isinstance(answer, Total):
                break
            assert isinstance(answer, MoreWork)
            self._stream.add(number, answer.chunks)
            seconds += self._compute(state, number, answer.chunks, key, sums, first=not chunks)
            chunks = (*chunks, *answer.chunks)
        whole = self.config.run.batch_size // self.config.chunk
        state, metrics = self.programs.apply(state, answer.vector, answer.sums, whole)
        self.state = state
        return state, metrics, self._work_of(answer, assignment, asked=asked)

    def _compute(
        self,
        state: TrainState,
        step: int,
        chunks: Sequence[int],
        key: jax.Array,
        sums: dict[str, float],
        *,
        first: bool,
    ) -> list[float]:
        """Add chunks to the sum on the device and to `sums`; return the seconds of each.

        The next chunk is sent to the device before the one before is waited for, so that the device never is idle.
        """
        assert self._stream is not None
        seconds: list[float] = []
        pending: dict[str, jax.Array] | None = None
        began = time.perf_counter()

        def settle(found: dict[str, jax.Array]) -> None:
            nonlocal began
            for name, value in jax.device_get(found).items():
                sums[name] += float(value)
            now = time.perf_counter()
            seconds.append(now - began)
            began = now

        for position, chunk in enumerate(chunks):
            asked = time.perf_counter()
            batch = self._stream.take(step, chunk)
            self.input_wait += time.perf_counter() - asked
            assert self._vector is not None
            self._vector, found = self.programs.add_chunk(
                self._vector, state, batch, key=key, number=chunk, first=first and position == 0
            )
            if pending is not None:
                settle(pending)
            pending = found
        if pending is not None:
            settle(pending)
        return seconds

    def _sum_on_host(self, *, anything: bool) -> np.ndarray:
        """Return a copy of the sum: the device's own memory is used again by the next chunk."""
        return np.array(self._vector) if anything else np.zeros(self.programs.size, np.float32)

    def _work_of(self, total: Total, assignment: Assignment, *, asked: bool) -> Work:
        chunk = self.config.chunk
        shares = {name: len(chunks) for name, chunks in total.shares.items()}
        self._shares = shares
        events, self._events = (*self._events, *assignment.events), ()
        return Work(
            shares=shares,
            rates={name: chunk / spent for name, spent in total.seconds.items() if spent > 0},
            waiting={name: total.sums[f"waited/{name}"] for name in shares if f"waited/{name}" in total.sums},
            events=events,
            chunks=dict(total.shares),
            leader=self.member.leader,
            asked=asked,
            stop=total.sums.get("stop", 0.0) >= len(shares),
        )

    # ---- What is shared between two steps.

    def compare(self, state: TrainState, step: int) -> tuple[TrainState, str | None]:
        """Compare the states of all replicas after step 1 and at intervals; if they differ, send the leader's to all.

        Replicas on the same kind of device have equal bits. Different kinds round differently, and drift apart slowly.

        Returns:
            The state to go on with, and a line to report where states differed.
        """
        if step > 1 and step % self.config.hetero.compare_every:
            return state, None
        packed = pack_state(state)
        digest = hashlib.sha256(packed).hexdigest()
        while True:
            name = f"state of step {step} in {', '.join(self.member.members)}"
            with contextlib.suppress(GroupChanged):
                found = self.member.gather(f"digest: {name}", {"digest": digest})
                if len({said["digest"] for said in found.values()}) == 1:
                    return state, None
                data = self.member.broadcast(name, packed if self.leads else None)
                self.state = state = unpack_state(self.programs.program, data)
                return state, (
                    f"step {step}: the states of the replicas differ, as different kinds of device round differently; "
                    f"all go on with that of {self.member.leader}"
                )

    def share_of(self, count: int) -> tuple[int, int]:
        """Return (first, stop) of the pieces of work, of `count`, for this replica, by the last shares."""
        members = self.member.members
        weights = np.array([self._shares.get(name, 0) for name in members], np.float64)
        if not weights.sum():
            weights[:] = 1
        ends = np.rint(np.cumsum(weights) / weights.sum() * count).astype(int).tolist()
        own = members.index(self.name)
        return (ends[own - 1] if own else 0), ends[own]

    def add_up(self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the sums over all replicas; if one is lost meanwhile, those that are left compute them again.

        Args:
            name: Names the sums.
            compute: Computes the part of this replica, see `share_of`.
        """
        while True:
            whose = f"{name}, in {', '.join(self.member.members)}"
            with contextlib.suppress(GroupChanged):
                return _unflatten(self.member.exchange_sums(whose, _flatten(compute())))

    def finish(self, save: Callable[[], None]) -> None:
        """Leave the group at the end of the run, once the leader has saved the last state.

        Args:
            save: Saves the state, if this replica leads or comes to lead.
        """
        while True:
            if self.leads:
                save()
            with contextlib.suppress(GroupChanged):
                self.member.gather(f"saved, in {', '.join(self.member.members)}", {})
                break
        with contextlib.suppress(GroupError):
            self.member.leave(finished=True)

    def leave(self) -> None:
        """Leave the group between two steps; the others go on."""
        with contextlib.suppress(GroupError):
            self.member.leave()

    def recompiles(self) -> int:
        """Return how often a program was compiled again after the first time."""
        return max(0, self.programs.compiled() - 2)

    def _pack(self) -> bytes:
        assert self.state is not None
        head = json.dumps(self.position()).encode()
        return b"".join((len(head).to_bytes(_HEAD, "little"), head, pack_state(self.state)))


def _flatten(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the numbers of arrays by name, shape and place; zeros are left out, except at the first place."""
    flat = {}
    for name, array in arrays.items():
        shape = ",".join(map(str, np.shape(array)))
        for place, value in enumerate(np.asarray(array, np.float64).ravel().tolist()):
            if value or not place:
                flat[f"{name}|{shape}|{place}"] = value
    return flat


def _unflatten(flat: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Rebuild arrays from the numbers that `_flatten` returns."""
    arrays: dict[str, np.ndarray] = {}
    for key, value in flat.items():
        name, shape, place = key.split("|")
        if name not in arrays:
            arrays[name] = np.zeros([int(size) for size in shape.split(",") if size], np.float64)
        arrays[name].reshape(-1)[int(place)] = value
    return arrays


@contextlib.contextmanager
def join_group(
    group: Group, config: TrainConfig, ready: TrainingSet, programs: ChunkPrograms, out: Path, *, state_step: int | None
) -> Iterator[Replica]:
    """Compile the programs of a replica and join the group; the block runs once the group is formed.

    Args:
        group: Where the replicas meet.
        config: The run.
        ready: Its training data.
        programs: Result of `make_chunk_programs`; compiled before the joining, so that nobody waits for a compiler.
        out: The run directory, for recorded shares.
        state_step: Step of the newest checkpoint, 0 for none; None if it cannot be read now.

    Raises:
        Refused: The group does not take this process.
        AccessError: There is no coordinator.
    """
    limit = warm_up(programs, config, ready)
    with contextlib.ExitStack() as held:
        if group.leads:
            held.enter_context(
                Coordinator(
                    group.address, group.secret, min_members=group.least, max_members=group.most,
                    expected=group.expected,
                )
            )  # fmt: skip
        member = held.enter_context(
            Member.join(
                group.address, group.secret, group.name, identify(config, ready),
                chunks=config.run.batch_size // config.chunk, limit=limit, state_step=state_step,
                silence_s=config.hetero.silence_s, replay=read_shares(out, first=state_step or 0),
            )
        )  # fmt: skip
        replica = Replica(member=member, programs=programs, ready=ready, config=config, first=state_step or 0)
        if member.needs_state():
            replica.first, data = member.receive_state()
            replica.received = _unpack(programs.program, data)
        held.enter_context(replica)
        yield replica


def _unpack(program: Program, data: memoryview) -> tuple[TrainState, dict[str, Any]]:
    end = _HEAD + int.from_bytes(data[:_HEAD], "little")
    return unpack_state(program, data[end:]), json.loads(bytes(data[_HEAD:end]))


def warm_up(programs: ChunkPrograms, config: TrainConfig, ready: TrainingSet) -> int | None:
    """Run both programs once on a temporary state; return the most chunks for which this host has memory."""
    program = programs.program
    try:
        sample = ready.reader.read(ready.plan.parts["train"].rows[:1])
    except IntegrityError:  # a damaged chunk is met again in training, where the run's policy holds
        return None
    repeated = {name: np.repeat(array, config.chunk, axis=0) for name, array in sample.items()}
    chunk = put_batch(repeated, batch_sharding(program.mesh), config.chunk)
    state = program.init(jax.random.key(0))
    key = jax.random.fold_in(jax.random.key(0), 0)
    vector, sums = programs.add_chunk(programs.zeros(), state, chunk, key=key, number=0, first=True)
    numbers = {name: float(value) for name, value in jax.device_get(sums).items()}
    jax.device_get(programs.apply(state, np.array(vector), numbers, 1)[1])
    return most_chunks(sum(array.nbytes for array in chunk.values()), steps=1 + config.run.prefetch)
