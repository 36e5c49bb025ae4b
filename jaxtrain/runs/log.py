"""`RunLog` writes the metrics of a run as JSON lines, as TensorBoard events and to trackers.

`metrics.jsonl` has one line for each step and one for each validation. A run that resumes from step n first drops the
lines after n, so that the history has each step once, however often the run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from jaxtrain.runs.track import Tracker
from zarr_store.errors import TerrashardError
from zarr_store.folder import FolderStore
from zarr_store.store import translate_os_errors

__all__ = ["Kind", "RunLog", "read_metrics"]

Kind = Literal["train", "validation"]
METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a run's history; a last line that a kill has cut is left out."""
    path = run / METRICS
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


class RunLog:
    """Writer of the history of a run; a context manager.

    Args:
        run: The run's folder.
        step: The step the run resumes from; lines after it are dropped.
        tensorboard_every: Steps between TensorBoard points of kind "train", and between those for trackers.
        trackers: Receivers of the same points as TensorBoard, closed with the log.
    """

    def __init__(self, run: Path, *, step: int, tensorboard_every: int = 1, trackers: Sequence[Tracker] = ()) -> None:
        from tensorboardX import SummaryWriter  # which brings PyTorch and boto3 with it, where they are installed

        kept = [line for line in read_metrics(run) if line["step"] <= step]
        FolderStore(run.absolute()).write(METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = (run / METRICS).open("a", encoding="utf-8")
        # purge_step makes TensorBoard forget the points of an earlier process after this step
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30)
        self._every, self._trackers = tensorboard_every, tuple(trackers)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with translate_os_errors(self._file.name):
                self._file.close()
                self._board.close()
                for tracker in self._trackers:
                    tracker.close()
        except TerrashardError:
            if error is None:  # else the disk was full before, and that error is raised already
                raise

    def write(self, kind: Kind, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one line: kind, step and the metrics, which are numbers, None, or numbers by name."""
        with translate_os_errors(self._file.name):
            self._file.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
            self._file.flush()
        if kind == "validation" or step % self._every == 0:
            known = {f"{kind}/{name}": number for name, number in _numbers(metrics)}
            for name, number in known.items():
                self._board.add_scalar(name, number, step)
            for tracker in self._trackers:
                tracker.log(known, step)


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{of}", number) for of, number in _numbers(value))
        elif value is not None:
            yield name, float(value)
