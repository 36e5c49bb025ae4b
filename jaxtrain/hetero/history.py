"""`ShareHistory` keeps, for every step of a run, which replica computed which chunks: RUN/shares.jsonl.

A float32 sum depends on its order, so a run that continues repeats the recorded shares of the steps that it does again,
and ends with the same bits. A line is

    {"step": 12, "shares": {"0": [0, 1, 2, 3, 4, 5], "1": [6, 7]}, "leader": "0"}

with members in the order in which their sums were added, or `{"step": 12, "event": "dropped", …}`. A later line of a
step replaces an earlier one. When a run continues from a checkpoint, `metrics.jsonl` loses the steps after it; this
file does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxtrain.hetero.membership import Event
from zarr_store.folder import FolderStore
from zarr_store.store import translate_os_errors

__all__ = ["HISTORY", "ShareHistory", "read_events", "read_shares"]

HISTORY = "shares.jsonl"

Shares = dict[str, tuple[int, ...]]


def _read(run: Path) -> list[dict[str, Any]]:
    path = run / HISTORY
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a last line that a kill has cut
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _is_share(line: Mapping[str, Any]) -> bool:
    shares = line.get("shares")
    return isinstance(shares, dict) and all(
        isinstance(chunks, list) and all(isinstance(chunk, int) for chunk in chunks) for chunks in shares.values()
    )


def read_shares(run: Path, *, first: int = 0) -> dict[int, Shares]:
    """Return step → member → chunks of a run, from step `first` on; nothing of a run that never recorded any."""
    lines = [line for line in _read(run) if line["step"] >= first and _is_share(line)]
    return {line["step"]: {name: tuple(chunks) for name, chunks in line["shares"].items()} for line in lines}


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return the recorded changes of the group: step, event, member, reason; each once."""
    events = [line for line in _read(run) if "event" in line]
    return list({json.dumps(event, sort_keys=True): event for event in events}.values())


class ShareHistory:
    """Writer of the history of the shares; a context manager of the replica that leads.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / HISTORY
        # one line for each step, so that a run that is killed again and again does not grow without end
        events, shares = read_events(run), {line["step"]: line for line in _read(run) if _is_share(line)}
        lines = sorted([*events, *shares.values()], key=lambda line: line["step"])
        FolderStore(run.absolute()).write(HISTORY, "".join(map(_line, lines)).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, shares: Mapping[str, Iterable[int]], leader: str) -> None:
        """Record the chunks that each member has computed in a step."""
        self._append(
            {"step": step, "shares": {name: list(chunks) for name, chunks in shares.items()}, "leader": leader}
        )

    def write_event(self, event: Event) -> None:
        """Record a change of the group."""
        self._append({"step": event.step, "event": event.kind, "member": event.member, "reason": event.reason})

    def _append(self, line: Mapping[str, Any]) -> None:
        with translate_os_errors(str(self._path)):
            self._file.write(_line(line))
            self._file.flush()


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
