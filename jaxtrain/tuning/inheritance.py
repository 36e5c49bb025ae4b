"""`inherit` lets a run begin with the state of another one, as a member of a population does in each generation."""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxtrain.config import TrainConfig
from jaxtrain.prepare import prepare
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import METRICS
from jaxtrain.runs.rundir import CARD, write_run
from jaxtrain.shared import Sharing
from jaxtrain.tuning.study import FINISHED, StudyFolder
from zarr_store.errors import IntegrityError

__all__ = ["free_generations", "inherit"]


def inherit(parent: Path, out: Path, config: TrainConfig, shared: Sharing) -> None:
    """Make a run whose newest checkpoint and history are copies of another run's; one that is there stays.

    Args:
        parent: Run directory of the other one.
        out: Run directory to make.
        config: Configuration of the new run; network and data are those of the other one.
        shared: Open data.

    Raises:
        IntegrityError: The other run has no checkpoint that is whole.
    """
    if (out / CARD).exists():
        return
    shutil.rmtree(out, ignore_errors=True)  # an earlier process may have died in the middle
    card, _ = prepare(config, shared.open(config.data.cube), None)
    there = CheckpointStore(parent / "checkpoints")
    step, _ = there.newest()
    if step is None:
        raise IntegrityError(f"{parent} has no checkpoint, from which {out} should continue; restore it")
    shutil.copytree(there.path(step), CheckpointStore(out / "checkpoints").path(step))
    if (parent / METRICS).exists():
        shutil.copy(parent / METRICS, out / METRICS)
    write_run(out, card)  # last, as the card makes the folder a run


def free_generations(folder: StudyFolder, keep: int | None) -> None:
    """Remove checkpoints of members whose next generation has ended, so that no run continues from them.

    Args:
        folder: A search with a population.
        keep: Number of the trial that keeps its checkpoints, the best so far.
    """
    trials, members = folder.trials(), folder.plan.members
    ended = 0
    while (ended + 1) * members <= len(trials) and all(
        trial.state in FINISHED for trial in trials[ended * members : (ended + 1) * members]
    ):
        ended += 1
    for trial in trials[: max(0, ended - 1) * members]:
        folder.free_space(trial.number, keep=trial.number == keep)
