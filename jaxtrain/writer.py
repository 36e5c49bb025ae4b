"""`RunWriter` writes history, shares and checkpoints of a run: in the first process, or in the replica that leads.

Of unequal replicas each has one, but only that of the leader writes. The others keep the lines of the last step, so
that whichever comes to lead goes on where the one before it has ended.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.hetero.history import ShareHistory
from jaxtrain.hetero.replica import Replica, Work
from jaxtrain.runs.best import Best
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.events import Teller
from jaxtrain.runs.log import Kind, RunLog, read_metrics
from jaxtrain.runs.rundir import CARD, LOCK_KEY, ModelCard, write_run
from jaxtrain.runs.track import check_trackers, start_trackers
from zarr_store.backends import open_store
from zarr_store.errors import Locked
from zarr_store.lock import CubeLock

__all__ = ["RunWriter"]

_LOCK_S = 10.0
"""Seconds in which a replica that no longer leads should have given the lock of the run back."""


@dataclass(kw_only=True)
class RunWriter:
    """Writer of the files of a run; a process writes nothing until it leads.

    Attributes:
        config: The run.
        out: The run directory.
        card: Model card of the run.
        store: Checkpoints of the run.
        best: Best validation so far.
        tell: Reports its progress.
        replica: This process in a group of unequal replicas.
        held: Closed at the end: what the process that writes holds.
        log: History of the run; None where another process writes.
        shares: Who computed which chunks, written by the replica that leads.
    """

    config: TrainConfig
    out: Path
    card: ModelCard
    store: CheckpointStore
    best: Best
    tell: Teller
    replica: Replica | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    log: RunLog | None = None
    shares: ShareHistory | None = None
    _recent: list[tuple[Kind, int, dict[str, Any]]] = field(default_factory=list)
    """Lines of the last step, for a replica that comes to lead."""
    _recent_work: tuple[int, Work] | None = None
    _followed: bool = False
    """Whether another replica led a step that this one took part in."""

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.log is not None

    def lead(self, step: int, *, inherited: bool = False, patience_s: float = _LOCK_S) -> None:
        """Begin to write for the run, from the line after `step` on.

        Args:
            step: Steps done.
            inherited: Whether another replica wrote so far, which the group has lost. Its lock is waited for, and taken
                if it stays: a process that stands still holds it, but no longer takes part.
            patience_s: Seconds to wait for it; with 0 it is not taken from a process that lives.

        Raises:
            Locked: Another run trains in this folder.
        """
        run = self.config.run
        trackers = check_trackers(run.track)
        if self.replica is not None:
            if inherited:
                _take_lock(self.held, self.out, patience_s=patience_s)
            if not (self.out / CARD).exists():  # a replica with a disk of its own that has to write from now on
                write_run(self.out, self.card)
        if inherited:
            self.store.clear_partial()
            self.store.protected = self.best.step
        started = start_trackers(trackers, self.out, self.config.model_dump(mode="json"))
        known = {(line["kind"], line["step"]) for line in read_metrics(self.out)}
        self.log = self.held.enter_context(
            RunLog(self.out, step=step, tensorboard_every=run.log_every, trackers=started)
        )
        if self.replica is None:
            return
        self.shares = self.held.enter_context(ShareHistory(self.out))
        self.tell.quiet = False
        if inherited:
            for kind, at, values in self._recent:
                if at <= step and (kind, at) not in known:
                    self.log.write(kind, at, values)
            if self._recent_work is not None:
                self._record(*self._recent_work)
            self.tell("group", step, f"step {step}: {self.replica.name} leads the run from here on")

    def follow(self, step: int, led_by: str | None = None) -> None:
        """Begin to lead if the replica that led is gone.

        Args:
            step: Steps done.
            led_by: The replica that led at the beginning of the last step, after a step: it held the lock of the run.
                Where there never was one, whoever holds the lock is of another group.

        Raises:
            Locked: Another group trains in this folder.
        """
        if self.replica is None:
            return
        self._followed |= led_by not in (None, self.replica.name)
        if self.replica.leads and not self.leads:
            self.lead(step, inherited=True, patience_s=_LOCK_S if self._followed else 0.0)

    def write(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """Write one line of the history, or keep it for the case that this process comes to lead."""
        if self.replica is not None:
            self._recent = [line for line in self._recent if line[1] == step] + [(kind, step, values)]
        if self.log:
            self.log.write(kind, step, values)

    def record(self, step: int, work: Work) -> None:
        """Record who computed which chunks in a step, or keep it; report how the group has changed."""
        self._recent_work = step, work
        self._record(step, work)

    def _record(self, step: int, work: Work) -> None:
        if self.shares is None:
            return
        for event in work.events:
            self.shares.write_event(event)
            if event.kind != "shares":
                self.tell("group", step, str(event))
        self.shares.write(step - 1, work.chunks, work.leader)


def _take_lock(held: contextlib.ExitStack, out: Path, *, patience_s: float) -> None:
    """Hold the lock of a run; after `patience_s` it is taken from who has it, if that is above 0.

    Raises:
        Locked: Another process has it, and `patience_s` is 0.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            held.enter_context(CubeLock(out, "train", key=LOCK_KEY))
            return
        except Locked:
            if not patience_s:
                raise
        if time.monotonic() > until:
            open_store(out).delete(LOCK_KEY)
        time.sleep(0.1)
