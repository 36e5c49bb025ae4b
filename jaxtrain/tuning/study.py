"""`StudyFolder` is a search on disk: its plan, a study of Optuna, and a run directory for each trial.

- `search.json`: the plan; `config.toml`, `space.toml`: the same for people
- `journal.log`: the study, which optuna-dashboard opens as it is (unless a database holds it)
- `trials/0007/`: the run of trial 7, with a folder for each fold of a cross-validation
- `best.toml`: configuration of the best trial; `final/`: best and default configuration, trained with several seeds
- `tune.html`: figures; `verdict.json`: test scores of the best and of the defaults
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from jaxtrain.tuning.plan import SearchPlan
from zarr_store.bounded import MOST_JSON_BYTES, load_json, read_file
from zarr_store.errors import IntegrityError, InvalidInput, Locked
from zarr_store.folder import FolderStore
from zarr_store.keys import refuse_links
from zarr_store.lock import CubeLock
from zarr_store.temporary import is_temporary

__all__ = ["FINISHED", "PLAN", "StudyFolder", "is_study", "toml_tables"]

PLAN = "search.json"
_ASK, _TRIAL, _JOURNAL = "ask.lock", "trial.lock", "journal.log"
_PATIENCE_S = 120.0
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def is_study(path: Path) -> bool:
    """Return whether a folder holds a search."""
    return (path / PLAN).is_file()


@dataclass(frozen=True)
class StudyFolder:
    """A search in a folder.

    Attributes:
        path: The folder.
        plan: The plan of the search.
    """

    path: Path
    plan: SearchPlan

    @classmethod
    def create(cls, path: Path, plan: SearchPlan) -> StudyFolder:
        """Begin a search in a new or empty folder, or continue the one that it holds.

        Raises:
            InvalidInput: The folder holds something else, or another search; the difference is named.
        """
        if is_study(path):
            known = cls.open(path)
            differences = known.plan.differences(plan)
            if differences:
                raise InvalidInput(
                    f"{path} holds another search (there → asked for): {'; '.join(differences[:6])}"
                    f"{f'; and {len(differences) - 6} more' if len(differences) > 6 else ''}. Give another folder, or "
                    f"continue this one with: terrashard tune {path}"
                )
            return known
        texts = {
            name: tomli_w.dumps(toml_tables(tables)).encode()
            for name, tables in (("config.toml", plan.settings), ("space.toml", plan.space))
        }
        if path.exists() and not (path.is_dir() and all(_is_of_beginning(entry, texts) for entry in path.iterdir())):
            raise InvalidInput(f"{path} exists and holds no search; nothing was changed: give a new or empty folder")
        folder = cls(path, plan)
        folder.study()  # a database that does not answer leaves nothing behind
        store = FolderStore(path.absolute())
        for name, text in texts.items():
            store.write(name, text)
        store.write(PLAN, json.dumps(plan.to_dict(), indent=1, ensure_ascii=False).encode())
        return folder

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """Open the search that a folder holds.

        Raises:
            InvalidInput: It holds none.
            IntegrityError: The plan cannot be read.
        """
        if not is_study(path):
            raise InvalidInput(f"{path} holds no search (no {PLAN}); begin one with: terrashard tune CONFIG.toml "
                               "--space SPACE.toml --out STUDY")  # fmt: skip
        refuse_links(path, path)
        try:
            plan = SearchPlan.from_dict(load_json(read_file(path / PLAN, MOST_JSON_BYTES), str(path / PLAN)))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path / PLAN} is damaged or of another release ({error}); restore it") from error
        return cls(path, plan)

    @cached_property
    def _storage(self) -> BaseStorage:
        if self.plan.storage:
            try:
                return RDBStorage(self.plan.storage)
            except Exception as error:  # of SQLAlchemy, a driver or the network
                raise InvalidInput(f"--storage: the database cannot be opened ({type(error).__name__}): "
                                   f"{str(error).splitlines()[0]}") from error  # fmt: skip
        self.path.mkdir(parents=True, exist_ok=True)
        # absolute, as Optuna's lock is a link to this path
        return JournalStorage(JournalFileBackend(str((self.path / _JOURNAL).absolute())))

    def study(self, offset: int = 0) -> optuna.Study:
        """Open the study of Optuna, or make it.

        Args:
            offset: The argument of `SearchPlan.make_sampler`.

        Raises:
            InvalidInput: The database cannot be opened, or holds another search under this name.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=self._storage, study_name=self.plan.name, direction=self.plan.direction, load_if_exists=True,
                sampler=self.plan.make_sampler(offset), pruner=self.plan.make_pruner(),
            )  # fmt: skip
            key = study.user_attrs.get("search")
            if key is None:
                study.set_metric_names([self.plan.score])
                study.set_user_attr("search", self.plan.key())  # last: what was interrupted before is done again
            elif key != self.plan.key():
                raise InvalidInput(
                    f"the study {self.plan.name!r} that was begun before is of another search: give --out another "
                    "name, which names the study"
                )
        return study

    def trials(self) -> list[FrozenTrial]:
        """Return all trials."""
        return self.study().get_trials(deepcopy=False)

    def run_of(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Hold the right to count and to begin trials; wait while another process of this search has it."""
        until = time.monotonic() + _PATIENCE_S
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(CubeLock(self.path, "tune: asks for a trial", key=_ASK))
                    break
                except Locked:
                    if time.monotonic() > until:
                        raise
                time.sleep(0.05)
            yield

    def holding(self, number: int) -> CubeLock:
        """Return the lock of a trial, which whoever runs it holds.

        Raises (on entering):
            Locked: Another process runs this trial.
        """
        return CubeLock(self.run_of(number).parent, f"tune: trial {number}", key=f"{number:04d}.{_TRIAL}")

    def release(self, numbers: Sequence[int]) -> None:
        """Forget who holds trials: a process on another machine, which has ended."""
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.run_of(number).parent / f"{number:04d}.{_TRIAL}")

    def free_space(self, number: int, keep: bool) -> None:
        """Remove the checkpoints of a finished trial, unless it is the best so far; its history stays."""
        if not keep:
            for folder in self.run_of(number).rglob("checkpoints"):
                shutil.rmtree(folder, ignore_errors=True)

    def best(self) -> FrozenTrial | None:
        """Return the best complete trial, the earliest of equal ones; None if there is none."""
        done = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        sign = 1 if self.plan.direction == "minimize" else -1
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the search, at once."""
        FolderStore(self.path.absolute()).write(name, data)
        return self.path / name


def _is_of_beginning(entry: Path, texts: Mapping[str, bytes]) -> bool:
    """Return whether the beginning of a search, which was interrupted, left an entry of a folder.

    Args:
        entry: The entry.
        texts: Files that the search writes first, and their bytes: a person's own file has others, and stays.
    """
    if entry.name.startswith(_JOURNAL):  # the journal itself, and a link that is Optuna's lock
        return entry.is_file() or entry.is_symlink()
    if entry.is_symlink() or not entry.is_file():
        return False
    if entry.name in texts:
        return read_file(entry, MOST_JSON_BYTES) == texts[entry.name]
    return is_temporary(entry.name) and entry.name.startswith(tuple(f".{name}." for name in (*texts, PLAN)))


def toml_tables(value: Any) -> Any:
    """Return tables without what TOML lacks: nulls are left out."""
    if isinstance(value, Mapping):
        return {str(key): toml_tables(one) for key, one in value.items() if one is not None}
    return [toml_tables(one) for one in value] if isinstance(value, list | tuple) else value
