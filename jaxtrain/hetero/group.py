"""The rules of a group: its members, the chunks of each, and when a step is complete. No sockets, no clock.

A step has two phases, so that no loss of a member can lose or double a chunk:

1. Every member computes its chunks and reports its contribution; slices are summed between the members.
2. A member that holds the whole sum says so. Once all that are left do, the step is **committed**, and only then may
   anyone apply it. Until then all still have the parameters from before the step.

If a member is lost before the commit, its chunks go to the others and the exchange begins again as a new **attempt**:
contributions that exist are kept. If all others already hold the sum, the step is committed with the dead one's part.

Newcomers come in between two steps, when all members stand still: one of them sends its state.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxtrain.hetero.complaints import Complaints
from jaxtrain.hetero.gathering import Gathering
from jaxtrain.hetero.membership import Event, EventKind
from jaxtrain.hetero.seats import Application, Replay, Seat, difference, recorded_chunks
from jaxtrain.hetero.shares import ShareController
from jaxtrain.hetero.step_sum import StepSum
from zarr_store.errors import InvalidInput

__all__ = ["Group"]


class Group:
    """The state of a group, and its answers to what members say.

    Args:
        min_members: Fewest members with which a run goes on.
        max_members: Most members; None is no limit.
        expected: Members that the group waits for before its first step.
        form_s: Seconds after the first joining until fewer members, but at least the minimum, may begin.
        stall_s: Seconds after which a member is dropped for which all others wait, though it shows signs of life.
        send: Sends a message to the member of a number.
        close: Ends the connection of the member of a number.
        on_event: Gets every change.
    """

    def __init__(
        self,
        *,
        min_members: int,
        max_members: int | None,
        expected: int,
        form_s: float,
        stall_s: float,
        send: Callable[[int, Mapping[str, Any]], None],
        close: Callable[[int], None],
        on_event: Callable[[Event], None],
    ) -> None:
        self._min, self._max, self._expected = min_members, max_members, expected
        self._form_s, self._stall_s = form_s, stall_s
        self._send, self._close, self._on_event = send, close, on_event
        self._numbers = itertools.count(1)
        self.finished = False
        self._reset()

    def _reset(self) -> None:
        self.id = secrets.token_hex(8)
        self._seats: dict[int, Seat] = {}
        self._phase: Literal["forming", "boundary", "step"] = "forming"
        self._first_join: float | None = None
        self._shares: ShareController | None = None
        self._replay: Replay = {}
        self._leader = 0
        self._step = self._epoch = 0
        self._chunks = 0
        self._sum = StepSum()
        self._events: list[Event] = []
        self._gathering = Gathering(self._send)
        self._progress = 0.0
        self._complaints = Complaints()

    # ── what is there ──

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part in steps, in their order."""
        return tuple(seat.name for seat in self._active())

    def names(self, number: int) -> str | None:
        """Return the name of a member; None if it is no longer in the group."""
        seat = self._seats.get(number)
        return None if seat is None else seat.name

    def _active(self) -> list[Seat]:
        return sorted((seat for seat in list(self._seats.values()) if seat.active), key=lambda seat: seat.name)

    def _event(self, kind: EventKind, member: str, reason: str, *, step: int | None = None) -> None:
        event = Event(kind, self._step if step is None else step, member, reason)
        self._events.append(event)
        self._on_event(event)

    # ── coming and going ──

    def join(self, application: Application, now: float) -> tuple[int, str, bool]:
        """Give a process a seat, or refuse it.

        Returns:
            Number of the seat and an empty text; or 0, why it is refused, and whether it may ask again soon.
        """
        if self.finished:
            return 0, "finished", False
        for seat in list(self._seats.values()):
            if seat.name == application.name:
                silent = now - seat.heard
                if silent <= seat.application.silence_s / 2:
                    return 0, f"the name {seat.name} is taken by a member that was heard {silent:.1f} s ago", True
                self.drop(seat.number, f"was silent for {silent:.1f} s, and a process of its name has come", now)
        first = min(self._seats.values(), key=lambda seat: (not seat.active, seat.number), default=None)
        differs = None if first is None else difference(application, first.application)
        if differs is not None:
            self._event("refused", application.name, f"is refused: {differs}")
            return 0, differs, False
        if self._max is not None and len(self._seats) >= self._max:
            self._event("refused", application.name, f"is refused: the group has its {self._max} members")
            return 0, f"the group already has its {self._max} members (--max-processes)", False
        number = next(self._numbers)
        self._seats[number] = Seat(number, application, now)
        if self._first_join is None:
            self._first_join = now
        return number, "", False

    def welcome(self, number: int, now: float) -> None:
        """Tell a process that has its seat the state of the group; form a group that is complete."""
        if self._phase == "forming":
            if len(self._seats) >= self._expected:
                self._form(now)
        else:
            self._tell_formed(self._seats[number])
            self._move(now)

    def _form(self, now: float) -> None:
        steps = [s.application.state_step for s in self._seats.values() if s.application.state_step is not None]
        if not steps:
            self._end("no member has a state to begin with: start from a checkpoint or from new weights")
            return
        self._step, self._phase, self._progress = max(steps), "boundary", now
        for seat in self._seats.values():
            seat.active = seat.application.state_step == self._step
        first = self._active()[0]
        self._leader, self._epoch = first.number, 1
        self._chunks = first.application.chunks
        self._shares = ShareController(self._chunks)
        self._replay = next((seat.application.replay for seat in self._active() if seat.application.replay), {})
        for seat in list(self._seats.values()):
            self._tell_formed(seat)

    def _tell_formed(self, seat: Seat) -> None:
        self._send(seat.number, {"kind": "formed", "state": not seat.active, "step": self._step, **self._roll()})

    def _roll(self) -> dict[str, Any]:
        """Return the members as a message names them."""
        leader = self._seats.get(self._leader)
        return {
            "epoch": self._epoch,
            "leader": "" if leader is None else leader.name,
            "members": [[seat.number, seat.name, seat.address] for seat in self._active()],
        }

    def drop(self, number: int, reason: str, now: float, *, left: bool = False) -> None:
        """Continue without a member that died, was silent, or has left."""
        seat = self._seats.pop(number, None)
        if seat is None:
            return
        if not left:
            self._send(number, {"kind": "dropped", "reason": reason})
        self._close(number)
        self._event("left" if left else "dropped", seat.name, reason)
        self._complaints.forget(number)
        for other in self._seats.values():
            if other.donor == number:
                other.donor = None
        if seat.active:
            self._lose(seat, now)
        self._move(now)

    def _lose(self, seat: Seat, now: float) -> None:
        self._epoch += 1
        self._progress = now
        if self._shares is not None:
            self._shares.forget(seat.name)
        left = self._active()
        if seat.number == self._leader and left:
            self._leader = min(left, key=lambda one: one.number).number
        self._gathering.change(left, self._roll())
        if self._phase == "step" and left and not self._committed(now):
            if len(left) < self._min and not self.finished:
                self._end_too_few(seat)
                return
            self._hand_over(seat, left)
            self._attempt_again()
        elif len(left) < max(self._min, 1) and not self.finished:
            self._end_too_few(seat)
        elif not left:
            self._reset()
        else:
            for other in left:
                self._send(other.number, {"kind": "gone", "number": seat.number})

    def _end_too_few(self, seat: Seat) -> None:
        count = len(self._active())
        self._end(
            f"{seat.name} is gone, and {count} member{'s are' if count != 1 else ' is'} left where the run needs "
            f"{self._min} (--min-processes); it continues from its newest checkpoint when it is started again"
        )

    def _end(self, reason: str) -> None:
        self._event("ended", "", reason)
        for number in list(self._seats):
            self._send(number, {"kind": "ended", "reason": reason})
            self._close(number)
        self._reset()

    # ── what members say ──

    def receive(self, number: int, message: Mapping[str, Any], now: float) -> None:
        """Process one message of a member.

        Raises:
            KeyError, TypeError, ValueError: It is not one that a member sends.
        """
        seat = self._seats.get(number)
        if seat is None:
            return
        seat.heard = now
        kind = message["kind"]
        if kind == "beat":
            return
        self._progress = now
        if kind == "want":
            seat.wants_state = not seat.active
        elif kind == "taken":
            self._take_in(seat, int(message["step"]))
        elif kind == "ready":
            seat.ready = int(message["step"])
        elif kind == "contributed":
            self._contribute(seat, message, now)
        elif kind == "have":
            if self._is_current(message) and seat.contributed is not None:
                seat.have = True
                self._committed(now)
        elif kind == "gather":
            self._gather(seat, str(message["name"]), int(message["epoch"]), dict(message["values"]))
        elif kind == "lost":
            other = int(message["number"])
            if other in self._seats:
                self._complaints.add(number, other, now)
        elif kind == "leave":
            self._leave(seat, now, finished=bool(message["finished"]))
        else:
            raise ValueError(f"unknown kind {str(kind)[:40]!r}")
        self._move(now)

    def tick(self, now: float) -> None:
        """Process the passing of time: drop silent members, and end what waits too long."""
        for seat in list(self._seats.values()):
            silent = now - seat.heard
            if silent > seat.application.silence_s and seat.number in self._seats:
                self.drop(seat.number, f"was silent for {silent:.1f} s", now)
        if self._phase == "forming":
            if self._first_join is not None and self._seats and now - self._first_join > self._form_s:
                if len(self._seats) >= self._min:
                    self._form(now)
                else:
                    self._end(f"{len(self._seats)} of at least {self._min} members came within {self._form_s:g} s")
            elif not self._seats:
                self._first_join = None
            return
        self._hear_complaints(now)
        waited = now - self._progress
        if waited > self._stall_s:
            awaited = self._awaited()
            for seat in awaited:
                self.drop(seat.number, f"kept the others waiting for {waited:.0f} s", now)
            if not awaited and self._phase == "step" and all(seat.contributed is not None for seat in self._active()):
                self._event(
                    "retry", "", f"the exchange stood still for {waited:.0f} s; it is repeated by new connections"
                )
                self._progress = now
                self._attempt_again()

    def forgive(self, seconds: float) -> None:
        """Move all times forward by the seconds for which this process stood still and could not hear anybody."""
        for seat in self._seats.values():
            seat.heard += seconds
        self._progress += seconds
        if self._first_join is not None:
            self._first_join += seconds

    def _awaited(self) -> list[Seat]:
        """Return the members for which others wait; none if all are busy."""
        active = self._active()
        givers = [seat for seat in self._seats.values() if seat.donor is not None]
        if self._phase == "step":
            flags = [
                (seat, seat.have if any(s.have for s in active) else seat.contributed is not None) for seat in active
            ]
        elif self._gathering.name is not None:
            flags = [(seat, seat.values is not None) for seat in active]
        else:
            flags = [*((seat, seat.ready is not None) for seat in active), *((seat, False) for seat in givers)]
        return [seat for seat, done in flags if not done] if any(done for _, done in flags) else []

    def _hear_complaints(self, now: float) -> None:
        """Repeat the exchange, or drop a member, for pairs whose connection broke although both are alive."""
        for older, newer, again in self._complaints.due(self._seats, now):
            if newer.active and self._phase == "step" and again:
                self._event("retry", newer.name, f"the connection with {older.name} broke; the exchange is repeated")
                self._attempt_again()
            else:
                why = f"{older.name} cannot exchange data with it at {newer.address}"
                self.drop(newer.number, f"{why}: open this address, or announce another", now)

    def _leave(self, seat: Seat, now: float, *, finished: bool) -> None:
        if finished:
            self.finished = True
            for other in list(self._seats.values()):
                if not other.active:
                    self._seats.pop(other.number)
                    self._send(other.number, {"kind": "finished"})
                    self._close(other.number)
        self.drop(seat.number, "has reached the end of the run" if finished else "has left", now, left=True)

    # ── between two steps ──

    def _move(self, now: float) -> None:
        """Begin the next step once everybody is ready and no newcomer waits for the state."""
        active = self._active()
        if self._phase != "boundary" or not active or any(seat.ready is None for seat in active):
            return
        leader = self._seats[self._leader]
        for seat in active:
            if seat.ready != leader.ready:
                self.drop(seat.number, f"wants to begin step {seat.ready}, the group step {leader.ready}", now)
                return  # `drop` has called this function again
        self._step = leader.ready or 0
        if self._give_state(active, now):
            return
        self._begin(active)

    def _give_state(self, active: list[Seat], now: float) -> bool:
        """Tell members to send their state to those that need it; return whether any state is on its way."""
        givers = itertools.cycle(active)
        for seat in self._seats.values():
            if seat.wants_state and seat.donor is None and not seat.active:
                giver = next(givers)
                seat.donor, seat.given = giver.number, now
                message = {"kind": "give", "step": self._step, "to": [seat.number, seat.name, seat.address]}
                self._send(giver.number, message)
                self._send(seat.number, {"kind": "take", "step": self._step, "from": giver.number})
        return any(seat.donor is not None for seat in self._seats.values())

    def _take_in(self, seat: Seat, step: int) -> None:
        if self._phase != "boundary" or not seat.wants_state or step != self._step:
            return
        seat.active, seat.wants_state, seat.donor = True, False, None
        self._epoch += 1
        self._event("joined", seat.name, "has joined, with the state of the others")

    def _begin(self, active: list[Seat]) -> None:
        assert self._shares is not None
        limits = {seat.name: seat.application.limit for seat in active}
        recorded = recorded_chunks(self._replay.get(self._step, {}), list(limits), self._chunks)
        counts = None if recorded is None else {name: len(own) for name, own in recorded.items()}
        try:
            decision = self._shares.decide(self._step, limits, counts)
        except InvalidInput as error:
            self._end(f"the members that are left cannot hold a step: {error}")
            return
        for event in decision.events:
            self._events.append(event)
            self._on_event(event)
        self._phase = "step"
        self._sum.begin(self._step)
        self._complaints.forget_retries()
        offset = 0
        for seat in active:
            share = decision.shares[seat.name]
            seat.assigned, seat.ready = tuple(range(offset, offset + share)), None
            if recorded is not None:
                seat.assigned = recorded[seat.name]
            offset += share
        events = [[event.kind, event.step, event.member, event.reason] for event in self._events]
        self._events.clear()
        self._open_attempt(active, "begin", {"shares": decision.shares, "events": events})

    # ── a step ──

    def _open_attempt(self, active: list[Seat], kind: str, more: Mapping[str, Any]) -> None:
        self._sum.open(active)
        self._complaints.clear()
        roll = {**self._roll(), "idle": [seat.number for seat in active if not seat.assigned]}
        for seat in active:
            seat.contributed, seat.have = None, False
            step = {"kind": kind, **self._sum.key, "chunks": list(seat.assigned)}
            self._send(seat.number, {**step, **roll, **more})

    def _attempt_again(self) -> None:
        self._sum.try_again()
        self._open_attempt(self._active(), "again", {})

    def _is_current(self, message: Mapping[str, Any]) -> bool:
        return self._phase == "step" and self._sum.is_of(message)

    def _contribute(self, seat: Seat, message: Mapping[str, Any], now: float) -> None:
        if self._is_current(message):
            wrong = self._sum.take(seat, message)
            if wrong is not None:
                self.drop(seat.number, wrong, now)

    def _committed(self, now: float) -> bool:
        """Commit the step if all members that are left hold its sum; return whether it was."""
        active = self._active()
        if self._phase != "step" or not active or not self._sum.is_held_by(active):
            return False
        parts = self._sum.parts()
        self._phase, self._progress = "boundary", now
        for name, part in parts:
            if part["seconds"] and self._shares is not None and name in self.members:
                self._shares.observe(name, sum(part["seconds"]) / len(part["seconds"]))
        message = {"kind": "commit", **self._sum.key, "parts": parts, **self._roll()}
        for seat in active:
            self._send(seat.number, message)
        return True

    def _hand_over(self, dead: Seat, left: Sequence[Seat]) -> None:
        """Assign the chunks of a lost member to the others."""
        assert self._shares is not None
        todo = {seat.name: 0 if seat.contributed is not None else len(seat.assigned) for seat in left}
        extra = self._shares.hand_over(len(dead.assigned), todo)
        chunks = iter(dead.assigned)
        for seat in left:
            own = (*seat.assigned, *itertools.islice(chunks, extra[seat.name]))
            seat.assigned = tuple(sorted(own))

    # ── gathering small values between steps ──

    def _gather(self, seat: Seat, name: str, epoch: int, values: dict[str, Any]) -> None:
        if not seat.active:
            raise ValueError("a newcomer gathers nothing")
        if epoch != self._epoch:
            self._send(seat.number, {"kind": "changed", "name": name, **self._roll()})
        else:
            self._gathering.give(seat, name, values, self._active())
