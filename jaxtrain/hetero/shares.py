"""Decide how many chunks of a step each member gets: from measured seconds per chunk to whole shares.

The time of a step is that of its slowest member, max(share × seconds per chunk). `apportion` finds the whole numbers
that minimise it. `RateFilter` turns measured seconds into a rate that one hiccup does not move. `ShareController` joins
both over the steps of a run: it keeps shares while another split would gain little, sets members aside that cannot do
one chunk in time, and tries them again. Nothing here reads a clock: the same measurements give the same shares.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtrain.hetero.membership import Event
from zarr_store.errors import InvalidInput

__all__ = ["Decision", "RateFilter", "ShareController", "apportion", "longest"]

_SHORT, _LONG = 5, 31
_CHANGED, _CERTAIN = 0.12, 0.5
"""Relative difference of the two medians above which a change of speed counts as lasting. It grows with the spread of
the measurements, from the first number to the second."""
_GAIN, _ERRORS = 0.01, 2.0
"""Smallest gain for which shares change: a part of the step, and a number of standard errors of the rates. With smaller
gains, noise would move shares back and forth."""
_ASIDE, _DOUBT, _TRUSTED = 0.1, 2.0, 3
"""Smallest gain, as a part of the step, for which the set of working members changes. A member whose speed was measured
n times is set aside only for a gain of the second number ÷ n. Below the third number it is tried again sooner."""
_TRIAL_COST = 0.02
"""Part of the running time that trials of a member that is set aside may cost."""
_TRIALS = (20, 1000)
"""Fewest and most steps between two trials; each trial without success doubles them."""
_TRIAL_STEPS, _HOPELESS = 3, 2.0
"""Steps of a trial, of which the median counts. A trial ends at once if a chunk takes so many times as long as a step
of the others."""


def longest(shares: Mapping[str, int], seconds: Mapping[str, float]) -> float:
    """Return the time of a step: that of the member that takes longest.

    >>> longest({"a": 2, "b": 1}, {"a": 1.0, "b": 2.5})
    2.5
    """
    return max((share * seconds[name] for name, share in shares.items()), default=0.0)


def apportion(
    chunks: int, seconds: Mapping[str, float], limits: Mapping[str, int | None] | None = None
) -> dict[str, int]:
    """Split chunks among members so that the longest share × seconds is as short as whole numbers allow.

    Each member first gets what it can do within the time that a split into fractions would take; no better split gives
    it less. The rest goes, one by one, to whoever would be ready first.

    Args:
        chunks: Number of chunks of a step.
        seconds: Seconds per chunk of each member, above 0. Ties go to the member that comes first.
        limits: Largest share of each member; None is no limit.

    Raises:
        InvalidInput: The limits together hold fewer chunks than there are.

    >>> apportion(8, {"gpu": 1.0, "old": 3.0})
    {'gpu': 6, 'old': 2}
    >>> apportion(8, {"gpu": 1.0, "old": 3.0}, {"gpu": 5, "old": None})
    {'gpu': 5, 'old': 3}
    """
    room = {
        name: chunks if (limits or {}).get(name) is None else min(chunks, (limits or {})[name] or 0) for name in seconds
    }
    if sum(room.values()) < chunks:
        listed = ", ".join(f"{name} {most}" for name, most in room.items())
        raise InvalidInput(
            f"a step has {chunks} chunks, and the members hold {sum(room.values())} ({listed or 'there are none'}): "
            "raise the limits, or add members"
        )
    ideal = chunks / sum(1 / value for value in seconds.values()) if seconds else 0.0
    shares = {name: min(room[name], math.floor(ideal / value * (1 - 1e-12))) for name, value in seconds.items()}
    order = {name: number for number, name in enumerate(seconds)}
    heap = [((shares[name] + 1) * seconds[name], order[name], name) for name in seconds if shares[name] < room[name]]
    heapq.heapify(heap)
    for _ in range(chunks - sum(shares.values())):
        _, number, name = heapq.heappop(heap)
        shares[name] += 1
        if shares[name] < room[name]:
            heapq.heappush(heap, ((shares[name] + 1) * seconds[name], number, name))
    return shares


class RateFilter:
    """Seconds per chunk of one member, robust to hiccups.

    The rate is the median of the last 31 steps, which is steady. Once the median of the last 5 differs from it by more
    than 12 % (more where measurements spread more), the change is a lasting one: the older steps are forgotten. So two
    slow steps in five change nothing, a clear change counts after three steps, and a small one after sixteen.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_LONG)

    @property
    def seconds(self) -> float | None:
        """Rate, in seconds per chunk; None before anything was measured."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def count(self) -> int:
        """Number of measurements on which the rate rests."""
        return len(self._seconds)

    @property
    def error(self) -> float:
        """Relative standard error of the rate, from the spread of the measurements; 0 for fewer than three."""
        steady = self.seconds
        if steady is None or self.count < 3:
            return 0.0
        deviation = 1.48 * statistics.median(abs(value / steady - 1) for value in self._seconds)
        return 1.25 * deviation / math.sqrt(self.count)

    def add(self, seconds: float) -> None:
        """Add the mean seconds per chunk of one step; a value that is not finite or not above 0 is ignored."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        self._seconds.append(seconds)
        if len(self._seconds) > _SHORT:
            recent = list(self._seconds)[-_SHORT:]
            short, steady = statistics.median(recent), statistics.median(self._seconds)
            spread = 1.5 * statistics.median(abs(value / steady - 1) for value in self._seconds)
            lasting = min(max(_CHANGED, 2 * spread), _CERTAIN)
            if abs(short / steady - 1) > lasting:
                self._seconds = deque((value for value in recent if abs(value / short - 1) <= lasting), maxlen=_LONG)

    def restart(self, seconds: float) -> None:
        """Forget everything but this one measurement."""
        self._seconds.clear()
        self.add(seconds)


@dataclass(frozen=True)
class Decision:
    """The shares of one step.

    Attributes:
        shares: Chunks of each member; 0 for one that is set aside.
        events: The changes, each with its reason.
    """

    shares: dict[str, int]
    events: tuple[Event, ...] = ()


@dataclass
class _Pace:
    """The known speed of one member."""

    rate: RateFilter = field(default_factory=RateFilter)
    warm: bool = False
    aside: bool = False
    trial_at: int | None = None
    """Step of the next trial of a member that is set aside."""
    trial: int = 0
    """Measurements that are left of the trial under way."""
    failed: int = 0
    """Number of trials without success in a row."""

    def observe(self, seconds: float) -> None:
        """Add a measurement; the first of a trial replaces all older ones."""
        if not self.warm:
            self.warm = True
        elif self.trial == _TRIAL_STEPS:
            self.rate.restart(seconds)
            self.trial -= 1
        else:
            self.rate.add(seconds)
            self.trial = max(0, self.trial - 1)


class ShareController:
    """Shares from step to step.

    Args:
        chunks: Number of chunks of a step.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._paces: dict[str, _Pace] = {}
        self._shares: dict[str, int] = {}
        self._limits: dict[str, int | None] = {}

    def observe(self, member: str, seconds: float) -> None:
        """Add the mean seconds per chunk of a member's last step.

        The first measurement of a member is left out: programs are compiled and caches are filled in it.
        """
        self._paces.setdefault(member, _Pace()).observe(seconds)

    def seconds(self, member: str) -> float | None:
        """Return the seconds per chunk of a member as far as they are known."""
        pace = self._paces.get(member)
        return None if pace is None else pace.rate.seconds

    def forget(self, member: str) -> None:
        """Forget a member that has left: one that comes back may be another machine."""
        self._paces.pop(member, None)

    def decide(
        self, step: int, limits: Mapping[str, int | None], recorded: Mapping[str, int] | None = None
    ) -> Decision:
        """Return the shares of a step.

        Args:
            step: Number of the step.
            limits: Largest share of each member of this step, in the order of the group.
            recorded: Shares to use as they are, of a run that is repeated.

        Raises:
            InvalidInput: The limits together hold fewer chunks than there are.
        """
        for name in limits:
            self._paces.setdefault(name, _Pace())
        if recorded is not None and self._may_use(recorded, limits):
            self._keep({name: recorded[name] for name in limits}, limits)
            return Decision(dict(self._shares))
        known = {name: rate for name in limits if (rate := self.seconds(name)) is not None}
        if not known:
            return self._adopt(
                step, apportion(self._chunks, dict.fromkeys(limits, 1.0), limits), limits, "no speed is known yet"
            )
        return self._by_speed(step, known, limits)

    def hand_over(self, chunks: int, members: Mapping[str, int]) -> dict[str, int]:
        """Split the chunks of a lost member among the others, in the middle of a step.

        Args:
            chunks: Number of these chunks.
            members: The chunks that each of the others still has to do, in the order of the group. Memory limits do not
                count: these chunks are computed after the others.
        """
        known = [rate for name in members if (rate := self.seconds(name)) is not None]
        usual = statistics.median(known) if known else 1.0
        seconds = {name: self.seconds(name) or usual for name in members}
        extra = dict.fromkeys(members, 0)
        heap = [((left + 1) * seconds[name], number, name) for number, (name, left) in enumerate(members.items())]
        heapq.heapify(heap)
        for _ in range(chunks):
            ready, number, name = heapq.heappop(heap)
            extra[name] += 1
            heapq.heappush(heap, (ready + seconds[name], number, name))
        return extra

    def _may_use(self, recorded: Mapping[str, int], limits: Mapping[str, int | None]) -> bool:
        return set(recorded) == set(limits) and sum(recorded.values()) == self._chunks and min(recorded.values()) >= 0

    def _by_speed(self, step: int, known: Mapping[str, float], limits: Mapping[str, int | None]) -> Decision:
        """Split by the known speeds; a member of unknown speed gets one chunk, to measure it."""
        new = [name for name in limits if name not in known]
        begun = [name for name in limits if self._begins_trial(name, step)]
        trials = [name for name in limits if self._goes_on_trying(name, known)]
        probes = [name for name in (*new, *trials) if limits[name] is None or (limits[name] or 0) >= 1]
        rest = {name: known[name] for name in limits if name in known and name not in trials}
        best = self._split(rest, limits, probes, known)
        same = set(self._shares) == set(limits) and self._limits == dict(limits)
        if any(best[name] for name in trials):
            decision = self._adopt(step, best, limits, "a member is tried again")
            events = (Event("retried", step, name, "is tried again with one chunk") for name in begun if best[name])
            return Decision(decision.shares, (*events, *decision.events))
        if same and not new:
            best = self._steady(best, known, limits)
            now, then = longest(self._shares, known), longest(best, known)
            # a trial is over: whoever was tried is in the shares of the last step, but is not taken back by that alone
            ended = any(self._shares[name] and not best[name] and self._paces[name].aside for name in limits)
            if now <= then * (1 + self._least_gain(known)) and not ended:
                return Decision(dict(self._shares))
            why = f"{now:.3g} s → {then:.3g} s a step"
        else:
            why = "the members changed" if not same else "the speed of a member is not known yet"
        return self._adopt(step, best, limits, why)

    def _split(
        self,
        rest: Mapping[str, float],
        limits: Mapping[str, int | None],
        probes: Sequence[str],
        known: Mapping[str, float],
    ) -> dict[str, int]:
        """Give one chunk to each of `probes` and split the rest among `rest`, or among all if `rest` lacks room."""
        room = sum(self._chunks if limits[name] is None else limits[name] or 0 for name in rest)
        probes = probes[: max(0, self._chunks - 1)] if rest else probes
        left = self._chunks - len(probes)
        if not rest or room < left:
            usual = statistics.median(known.values())
            return apportion(self._chunks, {name: known.get(name, usual) for name in limits}, limits)
        split = apportion(left, rest, limits)
        return {name: split.get(name, 1 if name in probes else 0) for name in limits}

    def _steady(
        self, best: dict[str, int], known: Mapping[str, float], limits: Mapping[str, int | None]
    ) -> dict[str, int]:
        """Return `best` if it is clearly shorter than the best split among those who take part now; else that one.

        A member that is hardly worth its chunk would otherwise come and go with the noise.
        """
        leaving = [name for name in limits if not best[name] and not self._paces[name].aside and limits[name] != 0]
        coming = [name for name in limits if best[name] and self._paces[name].aside]
        if not leaving and not coming:
            return best
        within = {name: known[name] for name in limits if not self._paces[name].aside and name not in leaving}
        held = self._split(within, limits, leaving, known)
        needed = max(_ASIDE, self._least_gain(known), *(_DOUBT / self._paces[name].rate.count for name in leaving))
        return best if longest(held, known) > longest(best, known) * (1 + needed) else held

    def _least_gain(self, known: Mapping[str, float]) -> float:
        """Return by which share a step must become shorter for shares to change: more where rates are less certain."""
        return max(_GAIN, _ERRORS * max(self._paces[name].rate.error for name in known))

    def _begins_trial(self, name: str, step: int) -> bool:
        pace = self._paces[name]
        if pace.trial_at is None or step < pace.trial_at:
            return False
        pace.trial_at, pace.trial = None, _TRIAL_STEPS
        return True

    def _goes_on_trying(self, name: str, known: Mapping[str, float]) -> bool:
        """Return whether a member is on trial; a trial ends once the member is clearly far too slow."""
        pace = self._paces[name]
        if 0 < pace.trial < _TRIAL_STEPS:
            others = {other: rate for other, rate in known.items() if other != name}
            usual = longest({other: self._shares.get(other, 0) for other in others}, others)
            if known[name] > _HOPELESS * usual > 0:
                pace.trial = 0
        return pace.trial > 0

    def _adopt(self, step: int, shares: dict[str, int], limits: Mapping[str, int | None], why: str) -> Decision:
        if shares == self._shares:
            self._keep(shares, limits)
            return Decision(dict(shares))
        text = ", ".join(f"{name} {share}" for name, share in shares.items())
        events = [Event("shares", step, "", f"shares are {text} ({why})")]
        for name, share in shares.items():
            pace = self._paces[name]
            if share and not pace.trial:
                pace.aside, pace.trial_at, pace.failed = False, None, 0
            elif not share and (self._shares.get(name, 1) or pace.trial_at is None):
                events.append(self._set_aside(step, name, shares, limits[name]))
        self._keep(shares, limits)
        return Decision(dict(shares), tuple(events))

    def _set_aside(self, step: int, name: str, shares: Mapping[str, int], limit: int | None) -> Event:
        """Plan the next trial of a member that gets no chunk: the slower it is, the later."""
        pace = self._paces[name]
        if limit == 0:
            why = "its memory holds no chunk, and smaller ones (hetero.chunk) may fit"
            return Event("set_aside", step, name, f"is set aside: {why}")
        own = pace.rate.seconds
        others = {other: rate for other in shares if (rate := self.seconds(other)) is not None}
        usual = longest({other: shares[other] for other in others}, others)
        ratio = own / usual if own and usual else 2.0
        pace.failed += pace.aside
        pace.aside = True
        wait = math.ceil((ratio - 1) / _TRIAL_COST * min(1.0, (pace.failed + pace.rate.count) / _TRUSTED))
        wait = max(wait, _TRIALS[0]) * 2 ** min(pace.failed, 10)
        pace.trial_at = step + min(wait, _TRIALS[1])
        if len(shares) > self._chunks:
            why = f"a step has {self._chunks} chunks for {len(shares)} members"
        elif own:
            why = f"one chunk takes it {own:.3g} s, a whole step takes the others {usual:.3g} s"
        else:
            why = "it has no share"
        hope = f"it is tried again at step {pace.trial_at}, and smaller chunks (hetero.chunk) would let it do more"
        return Event("set_aside", step, name, f"is set aside: {why}; {hope}")

    def _keep(self, shares: Mapping[str, int], limits: Mapping[str, int | None]) -> None:
        self._shares, self._limits = dict(shares), dict(limits)
