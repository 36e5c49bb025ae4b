"""`Incidents` counts, limits and records the faults of a run that do not end it.

- a step whose loss or gradient was not finite, and which therefore changed nothing (`run.on_nan = "skip"`)
- a window whose chunk is damaged, and which is left out of training (`run.on_corrupt = "quarantine"`)
- a batch without one labelled pixel, which teaches nothing

`incidents.jsonl` of the run has a line for each, of process 0; the n-th other process, and replica n of a run with
unequal replicas, writes `incidents-n.jsonl`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.config import RunConfig
from jaxtrain.data.arrays import Rows
from zarr_store.errors import CorruptShard, IntegrityError, InvalidInput, MissingShard
from zarr_store.redact import redact_text
from zarr_store.store import translate_os_errors

__all__ = ["INCIDENTS", "Incidents", "file_part", "name_windows"]

INCIDENTS = "incidents.jsonl"


class Incidents:
    """The incidents of one run, seen by one process.

    Args:
        run: Folder of the run.
        config: Policies and limits.
        process: Number of this process, or name of this replica.
        on_warning: Called with one line for each incident; from any thread.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        *,
        process: int | str = 0,
        on_warning: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._path = run / (INCIDENTS if process in (0, "0") else f"incidents-{file_part(str(process))}.jsonl")
        self._config, self._warn = config, on_warning
        self._lock = threading.Lock()
        self._windows: set[tuple[int, ...]] = set()
        self._held: list[str] | None = []
        self.skipped = self.empty = 0

    def begin(self, before: Mapping[str, int]) -> None:
        """Start to record in the run's folder; `before` has the counts of the checkpoint, which limits include."""
        self.skipped, self.empty = before.get("skipped_steps", 0), before.get("empty_batches", 0)
        with self._lock:
            held, self._held = self._held or [], None
            self._append("".join(held))

    @property
    def quarantined(self) -> int:
        """Number of windows that this process no longer learns from."""
        return len(self._windows)

    def to_dict(self) -> dict[str, int]:
        """Return the counts that a checkpoint keeps."""
        return {"skipped_steps": self.skipped, "empty_batches": self.empty}

    def not_finite(self, step: int, rows: Rows, metrics: dict[str, float], saved: Sequence[int]) -> None:
        """Record a step whose loss or gradient is not finite. All processes see the same numbers and decide alike.

        Raises:
            InvalidInput: The policy is to stop, or there were too many; the message names the windows.
        """
        config = self._config
        self.skipped += 1
        why = (
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}, expected finite numbers; "
            f"the batch holds the windows {name_windows(rows)}"
        )
        if config.on_nan == "stop" or self.skipped > config.max_skipped:
            limit = "" if config.on_nan == "stop" else f"{self.skipped} steps were skipped, run.max_skipped is "
            limit += "" if config.on_nan == "stop" else f"{config.max_skipped}; "
            kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint was made yet"
            raise InvalidInput(
                f"{why}. {limit}Training stopped, {kept}: lower optim.learning_rate, set optim.clip_norm, or look at "
                "these windows of the cube"
            )
        self._write({"kind": "not_finite", "step": step, "windows": rows.tolist()})
        self._warn(f"{why}; the step changed nothing ({self.skipped} of at most {config.max_skipped})")

    def no_labels(self, step: int, rows: Rows) -> None:
        """Record a batch without a labelled pixel: its loss is 0 and its gradient too."""
        self.empty += 1
        self._write({"kind": "no_labels", "step": step, "windows": rows.tolist()})

    def unreadable(self, row: npt.NDArray[np.int32], error: IntegrityError) -> None:
        """Record a window whose chunk is damaged or absent; called by the threads that read.

        Raises:
            CorruptShard: The policy is to stop, or there were too many windows.
        """
        config = self._config
        if config.on_corrupt == "stop":
            raise error
        with self._lock:
            window = tuple(int(v) for v in row)
            if window in self._windows:
                return
            count = len(self._windows) + 1
            if count > config.max_quarantined:
                kind = type(error) if isinstance(error, CorruptShard | MissingShard) else CorruptShard
                raise kind(
                    f"{error}; {count} windows cannot be read, run.max_quarantined is {config.max_quarantined}"
                ) from error
            self._windows.add(window)
            why = redact_text(error)  # of a bucket, it quotes what the server answered
            self._write({"kind": "quarantined", "window": list(window), "why": why})
        self._warn(f"window {window} is left out of training ({count} of at most {config.max_quarantined}): {why}")

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        if self._held is not None:  # nothing is written before everything is known to fit
            self._held.append(text)
        else:
            self._append(text)

    def _append(self, text: str) -> None:
        if not text:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)  # a replica may be here before the one that writes the run
        with translate_os_errors(str(self._path)), self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def file_part(name: str) -> str:
    """Return a name as a part of the name of a file.

    >>> file_part("gpu-a:0"), file_part("../x")
    ('gpu-a-0', '..-x')
    """
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def name_windows(rows: Rows) -> str:
    """Name the first windows of a batch, for messages."""
    names = ", ".join(f"(time {row[-3]}, y {row[-2]}, x {row[-1]})" for row in rows[:4].tolist())
    return f"{names}{f' and {len(rows) - 4} more' if len(rows) > 4 else ''}"
