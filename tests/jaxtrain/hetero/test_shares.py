"""Shares by speed: the best whole numbers, a rate that hiccups do not move, and shares that do not flap."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.hetero.shares import RateFilter, ShareController, apportion, longest
from zarr_store.errors import InvalidInput

SECONDS = st.floats(0.01, 100.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=3), st.integers(1, 9), st.data())
def test_no_other_split_is_faster(seconds: list[float], chunks: int, data: st.DataObject) -> None:
    limits = {
        str(n): data.draw(st.one_of(st.none(), st.integers(0, chunks)), label="limit") for n in range(len(seconds))
    }
    rates = {str(n): value for n, value in enumerate(seconds)}
    room = [chunks if most is None else most for most in limits.values()]
    if sum(room) < chunks:
        with pytest.raises(InvalidInput, match=f"a step has {chunks} chunks, and the members hold {sum(room)}"):
            apportion(chunks, rates, limits)
        return
    shares = apportion(chunks, rates, limits)
    assert sum(shares.values()) == chunks
    assert all(0 <= share <= most for share, most in zip(shares.values(), room, strict=True))
    every = (split for split in itertools.product(*(range(most + 1) for most in room)) if sum(split) == chunks)
    best = min(max(share * value for share, value in zip(split, seconds, strict=True)) for split in every)
    assert longest(shares, rates) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=12), st.integers(1, 600))
def test_a_step_lasts_at_most_one_chunk_longer_than_in_fractions(seconds: list[float], chunks: int) -> None:
    rates = {str(n): value for n, value in enumerate(seconds)}
    shares = apportion(chunks, rates)
    assert sum(shares.values()) == chunks
    ideal = chunks / sum(1 / value for value in seconds)
    assert ideal <= longest(shares, rates) * (1 + 1e-9)
    assert longest(shares, rates) <= (ideal + max(seconds)) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=6), st.integers(0, 40), st.data())
def test_the_chunks_of_a_lost_member_all_find_one_who_does_them(
    seconds: list[float], chunks: int, data: st.DataObject
) -> None:
    control = ShareController(40)
    left = {str(n): data.draw(st.integers(0, 5)) for n in range(len(seconds))}
    for name, value in zip(left, seconds, strict=True):
        control.observe(name, value)
        control.observe(name, value)
    extra = control.hand_over(chunks, left)
    assert sum(extra.values()) == chunks
    assert list(extra) == list(left)
    ends = {name: (left[name] + extra[name]) * value for name, value in zip(left, seconds, strict=True)}
    for name, value in zip(left, seconds, strict=True):  # nobody else could have done the last one sooner
        if extra[name]:
            assert all(
                ends[name] <= ends[other] + other_value * 1.0000001
                for other, other_value in zip(left, seconds, strict=True)
            )
        assert value > 0


def test_a_hiccup_does_not_move_the_rate() -> None:
    rate = RateFilter()
    for second in [1.0] * 10 + [60.0, 60.0] + [1.0] * 10:
        rate.add(second)
        assert rate.seconds == 1.0
    for nothing in (0.0, -1.0, float("nan"), float("inf")):
        rate.add(nothing)
        assert rate.seconds == 1.0


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.1, 1.5, 5.0])
def test_a_lasting_change_counts_within_twenty_steps(factor: float) -> None:
    random = np.random.default_rng(0)
    rate = RateFilter()
    for _ in range(50):
        rate.add(1.0 + 0.02 * random.standard_normal())
    needed = 0
    while abs((rate.seconds or 0) / factor - 1) > 0.05:
        rate.add(factor * (1.0 + 0.02 * random.standard_normal()))
        needed += 1
        assert needed <= 20
    if abs(factor - 1) > 0.2:
        assert needed == 3, "a clear change counts once three of five steps show it"
    before, needed = rate.seconds, 0
    while abs((rate.seconds or 0) - 1) > 0.05:
        rate.add(1.0 + 0.02 * random.standard_normal())
        needed += 1
        assert needed <= 20
    assert before != rate.seconds


class Rig:
    """Steps of members with given speeds, as a group would see them."""

    def __init__(
        self, chunks: int, seconds: dict[str, float], *, noise: float = 0.0, hiccups: float = 0.0, seed: int = 0
    ) -> None:
        self.control, self.chunks, self.seconds = ShareController(chunks), chunks, dict(seconds)
        self.limits: dict[str, int | None] = dict.fromkeys(seconds)
        self.noise, self.hiccups, self.random = noise, hiccups, np.random.default_rng(seed)
        self.step, self.moves = 0, 0
        self.shares: dict[str, int] = {}
        self.events: list[str] = []

    def run(self, steps: int) -> list[float]:
        """Run steps; return the efficiency of each: rate ÷ sum of the rates alone."""
        found = []
        for _ in range(steps):
            decision = self.control.decide(self.step, self.limits)
            self.moves += bool(self.shares) and decision.shares != self.shares
            self.shares = decision.shares
            self.events += [f"{event.kind} {event.member}".strip() for event in decision.events]
            assert sum(self.shares.values()) == self.chunks
            ideal = self.chunks / sum(1 / value for value in self.seconds.values())
            found.append(ideal / longest(self.shares, self.seconds))
            for name, share in self.shares.items():
                if share:
                    hiccup = 8 if self.random.random() < self.hiccups else 1
                    noise = 1 + self.noise * self.random.standard_normal()
                    self.control.observe(name, self.seconds[name] * abs(noise) * hiccup)
            self.step += 1
        return found


@pytest.mark.parametrize("speeds", [(1, 1), (1, 2), (1, 3), (1, 5), (1, 2, 4, 4)])
def test_shares_find_the_speeds_and_stay(speeds: tuple[float, ...]) -> None:
    rig = Rig(64, dict(zip("abcd", speeds, strict=False)), noise=0.05, hiccups=0.03)
    efficiency = rig.run(500)
    assert statistics.mean(efficiency[4:]) > 0.97
    assert min(efficiency[4:]) > 0.85
    assert rig.moves <= 5


def test_shares_follow_a_change_both_ways() -> None:
    rig = Rig(64, {"a": 1.0, "b": 1.0}, noise=0.03)
    rig.run(50)
    rig.seconds["b"] = 4.0
    assert min(rig.run(40)[20:]) > 0.92
    rig.seconds["b"] = 1.0
    assert min(rig.run(40)[20:]) > 0.92


def test_a_member_below_one_chunk_is_set_aside_and_tried_again() -> None:
    rig = Rig(8, {"a": 1.0, "b": 1.0})
    rig.run(10)
    rig.seconds["b"] = 100.0
    rig.run(10)
    assert rig.shares == {"a": 8, "b": 0}
    assert "set_aside b" in rig.events
    rig.events.clear()
    rig.run(1000)
    assert rig.events.count("retried b") == 1, "each trial costs twelve steps: hardly ever"
    rig.seconds["b"] = 2.0
    rig.run(1100)
    assert rig.shares == {"a": 6, "b": 2} or rig.shares == {"a": 5, "b": 3}


def test_what_is_set_aside_says_why_and_what_helps() -> None:
    """One line each: too slow for one chunk, and more members than chunks."""
    control, limits = ShareController(8), dict[str, int | None](a=None, b=None)
    for _ in range(6):
        control.observe("a", 1.0)
        control.observe("b", 100.0)
    said = [str(event) for event in control.decide(3, limits).events if event.kind == "set_aside"]
    assert said == [
        "step 3: b: is set aside: one chunk takes it 100 s, a whole step takes the others 8 s; it is tried again at "
        "step 578, and smaller chunks (hetero.chunk) would let it do more"
    ]
    few = ShareController(2)
    said = [str(event) for event in few.decide(0, dict.fromkeys("abc")).events if event.kind == "set_aside"]
    assert len(said) == 1
    assert said[0].startswith("step 0: c: is set aside: a step has 2 chunks for 3 members; it is tried again at step ")
    assert "smaller chunks (hetero.chunk)" in said[0]
    held = ShareController(4).decide(0, {"a": None, "b": 0})
    assert held.shares == {"a": 4, "b": 0}
    assert [event.reason for event in held.events if event.kind == "set_aside"] == [
        "is set aside: its memory holds no chunk, and smaller ones (hetero.chunk) may fit"
    ]


def test_the_first_measurement_of_a_member_does_not_count() -> None:
    """Caches are cold in it, and files are opened."""
    control, limits = ShareController(8), dict[str, int | None](a=None, b=None)
    control.observe("a", 50.0)
    assert control.seconds("a") is None
    control.observe("a", 1.0)
    control.observe("b", 1.0)
    control.observe("b", 1.0)
    assert control.decide(1, limits).shares == {"a": 4, "b": 4}


def test_trials_are_cheap() -> None:
    """What a member that is set aside costs stays below three in a hundred."""
    rig = Rig(16, {"a": 1.0, "b": 18.0})
    times = []
    for _ in range(2000):
        rig.run(1)
        times.append(longest(rig.shares, rig.seconds))
    assert statistics.mean(times[10:]) < 16 * 1.03


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_a_member_hardly_worth_its_chunk_does_not_come_and_go_with_the_noise(chunks: int, seed: int) -> None:
    """With it or without it a step takes as long: noise decides nothing, and trials in vain become rare."""
    rig = Rig(chunks, {"a": 1.0, "b": float(chunks)}, noise=0.2, hiccups=0.05, seed=seed)
    efficiency = rig.run(1000)
    assert rig.events.count("set_aside b") <= 15
    assert statistics.mean(efficiency[10:]) > 0.95 / (1 + 1 / chunks)


@pytest.mark.parametrize("seed", range(5))
def test_one_hiccup_at_the_beginning_sets_nobody_aside_for_long(seed: int) -> None:
    rig = Rig(2, {"a": 1.0, "b": 1.0}, noise=0.2, seed=seed)
    rig.run(1)
    rig.seconds["b"] = 8.0
    rig.run(1)
    rig.seconds["b"] = 1.0
    rig.run(90)
    assert rig.shares == {"a": 1, "b": 1}


def test_memory_bounds_shares_as_speed_does() -> None:
    rig = Rig(16, {"a": 1.0, "b": 1.0})
    rig.limits["a"] = 3
    rig.run(10)
    assert rig.shares == {"a": 3, "b": 13}
    rig.limits["b"] = 10
    with pytest.raises(InvalidInput, match="raise the limits, or add members"):
        rig.run(1)


def test_a_newcomer_is_measured_with_one_chunk() -> None:
    rig = Rig(16, {"a": 1.0, "b": 1.0})
    rig.run(10)
    rig.limits["c"], rig.seconds["c"] = None, 0.5
    rig.run(1)
    assert rig.shares["c"] == 1
    rig.run(3)
    assert rig.shares == {"a": 4, "b": 4, "c": 8}


def test_recorded_shares_are_used_as_they_are() -> None:
    control = ShareController(8)
    limits: dict[str, int | None] = {"a": None, "b": None}
    assert control.decide(0, limits, {"a": 1, "b": 7}).shares == {"a": 1, "b": 7}
    assert control.decide(1, limits, {"a": 1, "c": 7}).shares == {"a": 4, "b": 4}, "of other members"
    assert control.decide(2, limits, {"a": 1, "b": 8}).shares == {"a": 4, "b": 4}, "of another batch"


def test_the_same_measurements_give_the_same_shares() -> None:
    runs = [Rig(32, {"a": 1.0, "b": 3.0, "c": 7.0}, noise=0.2, hiccups=0.1) for _ in range(2)]
    for _ in range(100):
        runs[0].run(1)
        runs[1].run(1)
        assert runs[0].shares == runs[1].shares
