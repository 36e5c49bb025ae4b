"""The rules of the group, without sockets: members die and come at any message, and no chunk is lost or done twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.hetero.group import Group
from jaxtrain.hetero.membership import Event, Identity
from jaxtrain.hetero.seats import Application, pack_replay, unpack_replay

CHUNKS = 7


def application(name: str, state_step: int | None = 0, **other: Any) -> Application:
    values = {"identity": Identity("c", "d", "e"), "chunks": CHUNKS, "limit": None, "silence_s": 10.0, **other}
    return Application(name, "127.0.0.1:1", state_step=state_step, **values)


class Toy:
    """A member that does what a real one does, one message at a time."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.inbox: deque[Mapping[str, Any]] = deque()
        self.step = 0
        self.has_state = False
        self.order: list[int] = []
        self.key = (-1, 0)

    def say(self, **message: Any) -> None:
        self.world.outbox.append((self.number, message))

    def hear(self, message: Mapping[str, Any]) -> None:
        kind = message["kind"]
        if kind == "formed":
            self.has_state = not message["state"]
            self.say(**({"kind": "want"} if message["state"] else {"kind": "ready", "step": self.step}))
        elif kind == "give":
            taker = self.world.toys.get(message["to"][0])
            if taker is not None:
                assert self.step == message["step"], "a state from another step"
                taker.step, taker.has_state = self.step, True
                taker.say(kind="taken", step=self.step)
                taker.say(kind="ready", step=self.step)
        elif kind in ("begin", "again"):
            assert self.has_state
            assert message["step"] == self.step
            self.key, self.order = (message["step"], message["attempt"]), [one[0] for one in message["members"]]
            chunks = sorted(message["chunks"])
            self.world.contributed.setdefault(self.key, set()).add(self.number)
            self.say(kind="contributed", step=self.key[0], attempt=self.key[1], chunks=chunks, size=3,
                     weight=len(chunks), sums={}, seconds=[1.0] * len(chunks))  # fmt: skip
            self.say(kind="have", step=self.key[0], attempt=self.key[1])
        elif kind == "commit":
            assert (message["step"], message["attempt"]) == self.key
            waiting = [number for number, said in self.world.outbox if said["kind"] == "have"]
            assert self.number not in waiting, "committed before this member had the sum"
            done = sorted(chunk for _, part in message["parts"] for chunk in part["chunks"])
            assert done == list(range(CHUNKS)), f"step {self.step}: {message['parts']}"
            assert self.world.commits.setdefault(self.step, message["parts"]) == message["parts"]
            self.step += 1
            self.say(kind="ready", step=self.step)


class World:
    """A group and its members; who says what and dies when is drawn."""

    def __init__(self, members: int, min_members: int = 1) -> None:
        self.now = 0.0
        self.toys: dict[int, Toy] = {}
        self.outbox: deque[tuple[int, dict[str, Any]]] = deque()
        self.contributed: dict[tuple[int, int], set[int]] = {}
        self.commits: dict[int, Any] = {}
        self.events: list[Event] = []
        self.count = 0
        self.group = Group(
            min_members=min_members, max_members=None, expected=members, form_s=60, stall_s=60, send=self.send,
            close=lambda number: None, on_event=self.events.append,
        )  # fmt: skip
        for _ in range(members):
            self.come(0)

    def come(self, state_step: int | None = None, **other: Any) -> int:
        self.count += 1
        number, _, _ = self.group.join(application(f"m{self.count}", state_step, **other), self.now)
        self.toys[number] = Toy(self, number)
        self.group.welcome(number, self.now)
        return number

    def send(self, number: int, message: Mapping[str, Any]) -> None:
        if number in self.toys:
            self.toys[number].inbox.append(message)

    def die(self, number: int) -> None:
        del self.toys[number]
        kept = [(sender, message) for sender, message in self.outbox if sender != number]
        self.outbox = deque(kept)
        self.group.drop(number, "died", self.now)

    def may_have(self, number: int) -> bool:
        """Whether a member can hold the sum: all of its attempt have given their slices."""
        toy = self.toys[number]
        return set(toy.order) <= self.contributed.get(toy.key, set())

    def step_on(self, pick: int) -> bool:
        """Deliver one message; return whether there was one."""
        said: dict[int, dict[str, Any]] = {}
        for sender, message in self.outbox:
            said.setdefault(sender, message)
        ready = [number for number, m in said.items() if m["kind"] != "have" or self.may_have(number)]
        heard = [number for number, toy in self.toys.items() if toy.inbox]
        choices = [("say", number) for number in ready] + [("hear", number) for number in heard]
        if not choices:
            return False
        what, number = choices[pick % len(choices)]
        if what == "hear":
            self.toys[number].hear(self.toys[number].inbox.popleft())
        else:
            message = said[number]
            self.outbox.remove((number, message))
            self.group.receive(number, message, self.now)
        return True

    def run_to(self, step: int) -> None:
        for pick in range(20_000):
            if self.commits.get(step) is not None or not self.step_on(pick):
                return


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 25)), max_size=120))
def test_members_die_and_come_at_any_message(members: int, course: list[tuple[int, int]]) -> None:
    world = World(members)
    for pick, what in course:
        if what == 0 and len(world.toys) > 1:
            # somebody with the state is left
            number = sorted(world.toys)[pick % len(world.toys)]
            others = [toy for toy in world.toys.values() if toy.number != number and toy.has_state]
            if any(world.group.names(toy.number) in world.group.members for toy in others):
                world.die(number)
        elif what == 1 and len(world.toys) < 5:
            world.come()
        else:
            world.step_on(pick)
    latest = max(world.commits, default=-1)
    world.run_to(latest + 3)
    assert max(world.commits) >= latest + 3, "the group stands still"
    assert not any(event.kind == "ended" for event in world.events)


def test_a_member_for_which_all_wait_is_dropped() -> None:
    world = World(3)
    while world.step_on(0):
        if len(world.commits) == 2:
            break
    stuck = sorted(world.toys)[1]
    world.toys[stuck].inbox.clear()
    while True:
        number = next((n for n, toy in world.toys.items() if n != stuck and toy.inbox), None)
        world.outbox = deque((n, m) for n, m in world.outbox if n != stuck)
        if number is not None:
            world.toys[number].hear(world.toys[number].inbox.popleft())
        elif any(n != stuck and (m["kind"] != "have" or world.may_have(n)) for n, m in world.outbox):
            sender, message = next((n, m) for n, m in world.outbox if m["kind"] != "have" or world.may_have(n))
            world.outbox.remove((sender, message))
            world.group.receive(sender, message, world.now)
        else:
            break
    for _ in range(100):
        world.now += 1
        for number in list(world.toys):
            world.group.receive(number, {"kind": "beat"}, world.now)
        world.group.tick(world.now)
    assert [event.reason for event in world.events if event.kind == "dropped"] == ["kept the others waiting for 61 s"]


def test_silence_is_death_but_not_if_the_coordinator_itself_stood_still() -> None:
    world = World(2)
    first, second = sorted(world.toys)
    world.now += 9
    world.group.receive(first, {"kind": "beat"}, world.now)
    world.group.tick(world.now)
    assert len(world.group.members) == 2
    world.now += 100
    world.group.forgive(100)
    world.group.tick(world.now)
    assert len(world.group.members) == 2
    world.now += 2
    world.group.receive(first, {"kind": "beat"}, world.now)
    world.group.tick(world.now)
    assert list(world.group.members) == ["m1"]
    assert world.group.names(second) is None


def test_who_comes_late_to_form_a_group_is_not_waited_for() -> None:
    world = World(0, min_members=2)
    world.group._expected = 3
    world.come(0)
    world.come(4)
    assert not list(world.group.members)
    world.now += 61
    for number in world.toys:
        world.group.receive(number, {"kind": "beat"}, world.now)
    world.group.tick(world.now)
    assert list(world.group.members) == ["m2"], "the newest state counts; the other receives it"
    world.toys[min(world.toys)].step = 0
    world.toys[max(world.toys)].step = 4
    world.run_to(6)
    assert max(world.commits) == 6
    assert list(world.group.members) == ["m1", "m2"]


def test_too_few_to_form_a_group_is_said() -> None:
    world = World(0, min_members=2)
    world.group._expected = 3
    world.come(0)
    world.now += 61
    world.group.receive(min(world.toys), {"kind": "beat"}, world.now)
    world.group.tick(world.now)
    assert [event.reason for event in world.events] == ["1 of at least 2 members came within 60 s"]


def test_two_that_cannot_reach_each_other() -> None:
    """The exchange is tried again; in the end the newer one goes, with its address in the message."""
    world = World(3)
    while not any(message["kind"] == "have" for _, message in world.outbox):
        world.step_on(0)
    first, _, third = sorted(world.toys)
    for _ in range(3):
        assert len(world.group.members) == 3
        world.group.receive(first, {"kind": "lost", "number": third}, world.now)
        world.now += 1.5
        for number in world.toys:
            world.group.receive(number, {"kind": "beat"}, world.now)
        world.group.tick(world.now)
    assert list(world.group.members) == ["m1", "m2"]
    assert [event.kind for event in world.events if event.kind in ("retry", "dropped")] == ["retry", "retry", "dropped"]
    assert "m1 cannot exchange data with it at 127.0.0.1:1" in world.events[-1].reason


def test_replayed_chunks_rule_where_their_members_are_there() -> None:
    """Also those of a step that two of three ended, with the third one's chunks: then the third has none."""
    recorded: dict[int, Any] = {
        0: {"m1": 2, "m2": 1, "m3": 4},
        1: {"m1": (0, 1, 5), "m2": (2, 3, 4, 6)},
        2: {"m1": (0, 1, 2), "gone": (3, 4, 5, 6)},
        3: {"m1": (0, 0, 1), "m2": (2, 3, 4, 6)},
    }
    world = World(0)
    world.group._expected = 3
    world.come(0, replay=unpack_replay(pack_replay(recorded)))
    world.come(0)
    world.come(0)
    world.run_to(4)
    done = {step: {name: tuple(part["chunks"]) for name, part in parts} for step, parts in world.commits.items()}
    assert done[0] == {"m1": (0, 1), "m2": (2,), "m3": (3, 4, 5, 6)}
    assert done[1] == {"m1": (0, 1, 5), "m2": (2, 3, 4, 6), "m3": ()}
    assert set(done[2]) == {"m1", "m2", "m3"}
    assert all(done[step]["m3"] for step in (2, 3, 4)), "no record of these members, or a wrong one: by speed"


def test_the_memory_of_a_member_bounds_its_chunks() -> None:
    world = World(0)
    world.group._expected = 2
    world.come(0, limit=1)
    world.come(0)
    world.run_to(8)
    shares = [{name: len(part["chunks"]) for name, part in parts} for parts in world.commits.values()]
    assert shares == [{"m1": 1, "m2": 6}] * 9


def test_an_exchange_that_stands_still_is_repeated() -> None:
    """As when data between two members get lost, though both reach the coordinator."""
    world = World(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "may_have", lambda number: False)
        while world.step_on(0):
            pass
    world.outbox.clear()
    for _ in range(62):
        world.now += 1
        for number in world.toys:
            world.group.receive(number, {"kind": "beat"}, world.now)
        world.group.tick(world.now)
    assert [str(event) for event in world.events if event.kind != "shares"] == [
        "step 0: the exchange stood still for 61 s; it is repeated by new connections"
    ]
    world.run_to(2)
    assert max(world.commits) == 2
