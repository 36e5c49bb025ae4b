"""A member dies at every place of a step: the step ends with the whole global batch, and the others go on."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from jaxtrain.hetero import exchange, member, peers, rounds
from jaxtrain.hetero.membership import CoordinatorLost, Dropped, GroupChanged, RunFinished, TooFewMembers

from .replicas import (
    CHUNKS,
    Killed,
    Listener,
    Replica,
    add,
    check_steps,
    coordinator,
    finish,
    start_in_order,
    whole_vector,
)

STEPS = 4
PLACES = (
    "before ready",
    "before contributing",
    "after contributing",
    "a block was sent",
    "a block was received",
    "before adding",
    "before it has the sum",
    "after it has the sum",
    "committed",
    "before gathering",
    "after gathering",
)


class Crash:
    """Lets one replica die at the n-th time that it comes to a place; notes all places that it passes."""

    def __init__(self) -> None:
        self.victim: Replica | None = None
        self.place, self.at = "", 1
        self.fired_at: float | None = None
        self.passed: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def __call__(self, place: str) -> None:
        name = threading.current_thread().name.split()[0]
        with self._lock:
            self.passed.append((name, place))
            victim = self.victim
            if victim is None or name != victim.name or self.fired_at is not None or place != self.place:
                return
            self.at -= 1
            if self.at:
                return
            self.fired_at = time.monotonic()
        assert victim.member is not None
        victim.member.close()
        raise Killed(place)


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Crash:
    """Small blocks, so that each slice has several, and a switch that ends a replica."""
    armed = Crash()
    for module in (exchange, member, peers):
        monkeypatch.setattr(module, "crashpoint", armed)
    monkeypatch.setattr(rounds, "_BLOCK", 1024)
    monkeypatch.setattr(member, "BLOCK_BYTES", 4096)
    return armed


def group(steps: int = STEPS, **options: Any) -> tuple[Any, Listener, list[Replica]]:
    listener = Listener()
    server = coordinator(listener, **options)
    return server, listener, [Replica(f"r{n}", server.address, steps=steps) for n in range(3)]


def test_every_place_is_tried(crash: Crash) -> None:
    server, _, replicas = group(2)
    with server:
        start_in_order(replicas)
        finish(*replicas)
    assert {place for name, place in crash.passed if name == "r0"} == set(PLACES)


@pytest.mark.parametrize("victim", [0, 2], ids=["leader", "last"])
@pytest.mark.parametrize("place", PLACES)
def test_a_member_dies(crash: Crash, place: str, victim: int) -> None:
    server, listener, replicas = group()
    dead, left = replicas[victim], [replica for n, replica in enumerate(replicas) if n != victim]
    crash.victim, crash.place = dead, place
    crash.at = {"a block was sent": 31, "a block was received": 31, "before adding": 2, "before ready": 2}.get(place, 1)
    with server:
        start_in_order(replicas)
        finish(*replicas)
    assert crash.fired_at is not None, "the fault never came"
    assert [event.member for event in listener.of("dropped")] == [dead.name]
    for replica in left:
        check_steps(replica, 0, STEPS)
        np.testing.assert_array_equal(replica.params, left[0].params)
        # a value that was given may still count, for both of the others or for none
        assert replica.sums["members"] in ((2.0, 3.0) if place == "after gathering" else (2.0,))
        assert (replica.sums, replica.changed) == (left[0].sums, left[0].changed)
    if place in ("before contributing", "after contributing", "before adding"):
        assert sum(len(more.chunks) for replica in left for more in replica.more) == CHUNKS // 3
    if place == "before gathering":
        assert [replica.changed for replica in left] == [1, 1]
    after = [at for replica in left for at in replica.at.values() if at > crash.fired_at]
    assert not after or min(after) - crash.fired_at < 5


def test_the_sum_of_a_member_that_dies_once_all_have_it_counts(crash: Crash) -> None:
    """Nobody computes its chunks again: the two others hold the sum, and only the commit is missing."""
    server, _, replicas = group()
    crash.victim, crash.place = replicas[1], "after it has the sum"
    others, told = {"r0", "r2"}, threading.Barrier(3)

    def note(place: str) -> None:
        name = threading.current_thread().name
        if place == crash.place and crash.fired_at is None and name in {"r0", "r1", "r2"}:
            told.wait(10)
        crash(place)

    with server, pytest.MonkeyPatch.context() as patch:
        for module in (exchange, member, peers):
            patch.setattr(module, "crashpoint", note)
        start_in_order(replicas)
        finish(*replicas)
    assert crash.fired_at is not None
    for replica in (replicas[0], replicas[2]):
        check_steps(replica, 0, STEPS)
        assert not replica.more
        assert 0 in replica.totals
        assert others <= set(replica.totals[0].shares)


def newcomer(address: str, name: str = "r9", **options: Any) -> Replica:
    return Replica(name, address, steps=8, state_step=None, **options)


def slow(_replica: Replica, _work: Any) -> None:
    time.sleep(0.05)


@pytest.mark.parametrize(
    ("who", "place", "at"),
    [
        ("nobody", "", 1),
        ("donor", "a block was sent", 3),
        ("newcomer", "a block was received", 3),
        ("newcomer", "the state was received", 1),
        ("newcomer", "before ready", 1),
        ("newcomer", "after contributing", 1),
    ],
)
def test_a_newcomer_gets_the_state(crash: Crash, who: str, place: str, at: int) -> None:
    """It goes on bit for bit like the others; if it or the sender dies on the way, the others lose nothing."""
    server, listener, replicas = group(8, expected=3)
    late = newcomer(server.address)
    again = newcomer(server.address, "r8")
    for replica in replicas:
        replica.on_step = slow
    with server:
        start_in_order(replicas)
        while 1 not in replicas[0].work:
            time.sleep(0.01)
        # the first in order sends the state
        crash.victim, crash.place, crash.at = {"donor": replicas[0], "newcomer": late}.get(who), place, at
        if who == "donor":
            crash.place = "nowhere"
            replicas[0].member.offer_state(lambda: state_and_death(crash, replicas[0], place, at))
        late.start()
        if who == "newcomer":
            late.join(10)
            again.start()
        finish(*[replica for replica in (*replicas, late, again) if replica.ident is not None])
    assert (crash.fired_at is not None) == (who != "nobody"), "the fault never came"
    dead = {"donor": replicas[0], "newcomer": late}.get(who)
    joined = again if who == "newcomer" else late
    left = [replica for replica in replicas if replica is not dead]
    for replica in left:
        check_steps(replica, 0, 8)
    assert joined.error is None
    assert joined.received is not None
    check_steps(joined, joined.received, 8)
    for replica in (*left, joined):
        np.testing.assert_array_equal(replica.params, left[0].params)
    assert joined.name in [event.member for event in listener.of("joined")]
    assert [event.member for event in listener.of("dropped")] == ([] if dead is None else [dead.name])


def state_and_death(crash: Crash, replica: Replica, place: str, at: int) -> bytes:
    crash.place, crash.at = place, at
    return replica.params.tobytes()


def test_too_few_members_end_the_run_with_their_parameters_unchanged(crash: Crash) -> None:
    server, listener, replicas = group(min_members=3)
    crash.victim, crash.place, crash.at = replicas[0], "after contributing", 2
    with server:
        start_in_order(replicas)
        finish(*replicas)
        assert crash.fired_at is not None
        for replica in replicas[1:]:
            assert isinstance(replica.error, TooFewMembers)
            assert replica.error.exit_code == 8
            assert "r0 is gone, and 2 members are left where the run needs 3 (--min-processes)" in str(replica.error)
            check = whole(1)
            np.testing.assert_array_equal(replica.params, check)
        assert len(listener.of("ended")) == 1
        # the same coordinator serves the next attempt, which begins at the checkpoint
        crash.victim = None
        following = [Replica(f"r{n}", server.address, steps=3, state_step=1) for n in range(3)]
        for replica in following:
            replica.start()
        finish(*following)
    for replica in following:
        check_steps(replica, 1, 3)


def whole(steps: int) -> np.ndarray:
    return add(whole_vector(step) for step in range(steps))


def test_a_coordinator_that_goes_is_reported(crash: Crash) -> None:
    server, _, replicas = group(1000)
    with server:
        start_in_order(replicas)
        while 2 not in replicas[0].work:
            time.sleep(0.01)
        server.close()
        finish(*replicas)
    for replica in replicas:
        assert isinstance(replica.error, CoordinatorLost)
        assert "does not answer any more" in str(replica.error)
        assert replica.error.exit_code == 8


def test_one_that_comes_after_the_end_is_sent_away() -> None:
    server, _, replicas = group(2)
    with server:
        start_in_order(replicas)
        finish(*replicas)
        assert server.finished
        late = newcomer(server.address)
        late.start()
        finish(late)
    assert isinstance(late.error, RunFinished)
    assert late.error.exit_code == 0


def test_a_member_that_was_silent_is_dropped_and_comes_back() -> None:
    """Like a process that was stopped: no sign of life, but an open connection. Once awake it finds out, and joins."""
    server, listener, replicas = group(60, expected=3)
    frozen, gate = replicas[2], threading.Event()
    frozen.join_options["silence_s"] = 0.6

    def freeze(replica: Replica, work: Any) -> None:
        time.sleep(0.02)
        if replica is frozen and work.step == 2:
            # what a stopped process does not do: it sends nothing, and reads nothing
            with replica.member._control._lock:
                gate.wait(20)

    for replica in replicas:
        replica.on_step = freeze
    with server:
        start_in_order(replicas)
        until = time.monotonic() + 10
        while not listener.of("dropped") and time.monotonic() < until:
            time.sleep(0.02)
        dropped_at = time.monotonic()
        while replicas[0].at.get(3, 0) == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert replicas[0].at[3] - dropped_at < 2
        gate.set()
        frozen.join(10)
        assert isinstance(frozen.error, Dropped)
        assert "the group goes on without this member, which was silent for" in str(frozen.error)
        back = newcomer(server.address, "r2")
        back.steps = 60
        back.start()
        finish(replicas[0], replicas[1], back)
    for replica in replicas[:2]:
        check_steps(replica, 0, 60)
        np.testing.assert_array_equal(replica.params, back.params)
    assert back.received is not None
    check_steps(back, back.received, 60)


def test_one_that_is_called_away_leaves_and_the_others_go_on() -> None:
    server, listener, replicas = group(6)
    away = replicas[0]
    away.steps, away.finishes = 2, False
    away.validate = dict  # type: ignore[method-assign]
    with server:
        start_in_order(replicas)
        finish(*replicas)
    check_steps(away, 0, 2)
    for replica in replicas[1:]:
        check_steps(replica, 0, 6)
        assert not replica.more
        assert replica.member.leader == replicas[1].member.leader != "r0"
    assert str(listener.of("left")[0]) == "step 1: r0: has left"
    assert not listener.of("dropped")


class Broadcasting(Replica):
    """Gets the leader's value at the end of its steps; again under another name if a member is lost."""

    on_value = staticmethod(lambda _replica: None)
    value = b""

    def validate(self) -> dict[str, float]:
        assert self.member is not None
        while True:
            if not self.changed:
                self.on_value(self)
            try:
                name = f"value {self.changed}"
                self.value = bytes(self.member.broadcast(name, self.name.encode() * 20_000))
                return {}
            except GroupChanged:
                self.changed += 1


@pytest.mark.parametrize(
    ("victim", "place", "at"),
    [(None, "", 1), (0, "a block was sent", 5), (2, "a block was received", 5), (2, "after gathering", 1)],
    ids=["nobody", "leader", "receiver", "receiver at the end"],
)
def test_a_value_reaches_all_or_nobody(crash: Crash, victim: int | None, place: str, at: int) -> None:
    server, _, _ = group()
    replicas = [Broadcasting(f"r{n}", server.address, steps=2) for n in range(3)]
    left = [replica for n, replica in enumerate(replicas) if n != victim]

    def arm(replica: Replica) -> None:
        if replica is crash.victim:
            crash.place, crash.at = place, at

    for replica in replicas:
        replica.on_value = arm  # type: ignore[assignment]
    crash.victim = None if victim is None else replicas[victim]
    with server:
        start_in_order(replicas)
        finish(*replicas)
    assert (crash.fired_at is None) == (victim is None)
    values = {replica.value for replica in left}
    assert values == {left[0].name.encode() * 20_000}
    assert len({replica.changed for replica in left}) == 1
    for replica in left:
        check_steps(replica, 0, 2)
