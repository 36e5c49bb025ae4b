"""Replicas that stand for training: threads whose chunks are whole numbers, so that every sum has one exact value."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.member import Member
from jaxtrain.hetero.membership import Assignment, Contribution, Event, GroupChanged, Identity, MoreWork, Total

SECRET = "a secret of these tests alone"
IDENTITY = Identity("configuration", "data", "code")
CHUNKS, SIZE = 6, 30_000
PATIENCE_S = 30.0


def chunk_vector(step: int, chunk: int, size: int = SIZE) -> np.ndarray:
    return ((np.arange(size) % 97) * (chunk + 1) + step).astype(np.float32)


def whole_vector(step: int, chunks: int = CHUNKS, size: int = SIZE) -> np.ndarray:
    return add(chunk_vector(step, chunk, size) for chunk in range(chunks))


def add(vectors: Iterable[np.ndarray]) -> np.ndarray:
    total = np.zeros(SIZE, np.float32)
    for vector in vectors:
        total = total + vector
    return total


class Killed(ConnectionError):
    """The end of a replica that a test has chosen."""


class Replica(threading.Thread):
    """One replica: joins, takes the state if it must, runs until `steps`, and leaves."""

    def __init__(
        self,
        name: str,
        address: str,
        *,
        steps: int,
        state_step: int | None = 0,
        seconds: float = 0.01,
        on_step: Callable[[Replica, Assignment], None] = lambda _replica, _work: None,
        **join: Any,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.address, self.steps, self.state_step, self.on_step, self.seconds = (
            address,
            steps,
            state_step,
            on_step,
            seconds,
        )
        self.join_options: dict[str, Any] = {"chunks": CHUNKS, "silence_s": 8.0, **join}
        self.secret = self.join_options.pop("secret", SECRET)
        self.identity = self.join_options.pop("identity", IDENTITY)
        self.finishes = True
        self.member: Member | None = None
        self.params = np.zeros(SIZE, np.float32)
        self.totals: dict[int, Total] = {}
        self.work: dict[int, Assignment] = {}
        self.at: dict[int, float] = {}
        self.more: list[MoreWork] = []
        self.received: int | None = None
        self.changed = 0
        self.sums: dict[str, float] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.train()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            if self.member is not None:
                self.member.close()

    def train(self) -> None:
        member = self.member = Member.join(
            self.address, self.secret, self.name, self.identity, state_step=self.state_step, **self.join_options
        )
        step = self.state_step or 0
        self.params = np.full(SIZE, self.params[0], np.float32)
        member.offer_state(lambda: self.params.tobytes())
        if member.needs_state():
            step, state = member.receive_state()
            self.received, self.params = step, np.frombuffer(state, np.float32).copy()
        while step < self.steps:
            work = self.work[step] = member.start(step)
            self.at[step] = time.monotonic()
            self.on_step(self, work)
            total = self.exchange(work)
            self.totals[step] = Total(
                total.step, total.vector.copy(), total.weight, total.sums, total.shares, total.seconds
            )
            self.params = self.params + total.vector
            step += 1
        self.sums = self.validate()
        member.leave(finished=self.finishes)

    def exchange(self, work: Assignment) -> Total:
        assert self.member is not None
        chunks = work.chunks
        while True:
            vector = add(chunk_vector(work.step, chunk) for chunk in chunks)
            result = self.member.exchange(
                Contribution(work.step, chunks, vector, float(len(chunks)), {"n": 1.0}, (self.seconds,) * len(chunks))
            )
            if isinstance(result, Total):
                return result
            self.more.append(result)
            assert not set(result.chunks) & set(chunks)
            chunks = tuple(sorted((*chunks, *result.chunks)))

    def validate(self) -> dict[str, float]:
        assert self.member is not None
        while True:
            try:
                return self.member.exchange_sums("validation", {"members": 1.0})
            except GroupChanged:
                self.changed += 1


def wait_until(what: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


def start_in_order(replicas: Iterable[Replica]) -> None:
    """Start one after the other: the one that joined first leads, whatever else the machine does."""
    for replica in replicas:
        replica.start()
        until = time.monotonic() + PATIENCE_S
        while replica.member is None and replica.is_alive() and time.monotonic() < until:
            time.sleep(0.001)


def finish(*replicas: Replica) -> None:
    """Wait for all, but not for ever; then nobody is left."""
    until = time.monotonic() + PATIENCE_S
    for replica in replicas:
        replica.join(max(0.1, until - time.monotonic()))
    stuck = [replica.name for replica in replicas if replica.is_alive()]
    for replica in replicas:
        if replica.member is not None:
            replica.member.close()
    assert not stuck, f"still waiting: {stuck}"


def check_steps(replica: Replica, first: int, last: int, chunks: int = CHUNKS) -> None:
    """Every step has the sum over all chunks, each of them once."""
    if replica.error is not None:
        raise replica.error
    assert sorted(replica.totals) == list(range(first, last))
    for step, total in replica.totals.items():
        done = sorted(chunk for some in total.shares.values() for chunk in some)
        assert done == list(range(chunks)), f"step {step}: {total.shares}"
        assert total.weight == chunks
        np.testing.assert_array_equal(total.vector, whole_vector(step, chunks))


class Listener:
    """Collects the events of a coordinator."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def coordinator(listener: Listener | None = None, *, expected: int = 3, **options: Any) -> Coordinator:
    return Coordinator("127.0.0.1:0", SECRET, expected=expected, max_members=options.pop("max_members", 16),
                       on_event=listener or Listener(), **options)  # fmt: skip
