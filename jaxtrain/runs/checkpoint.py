"""`CheckpointStore` saves state, data position and configuration together, and checks them before use.

    checkpoints/00000200/state/…         the arrays (orbax), each with its global shape, whatever the mesh was
    checkpoints/00000200/contents.json   step, data position, configuration, name → shape and dtype of every array
    checkpoints/00000200/manifest.json   SHA-256 and size of every other file; written last

A checkpoint is written beside and renamed, so a killed save leaves only a `.partial` folder, which the next run
removes. `begin` returns as soon as the arrays are copied and writes in the background; a failure is raised by the next
`check`, so at the next step. Before a restore every file is hashed; a damaged checkpoint is passed over, and the next
older one is taken. No file is ever unpickled. This is the only module that imports orbax.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtrain.learn.accumulate import UNKNOWN
from zarr_store.bounded import MOST_JSON_BYTES, load_json, read_file
from zarr_store.crash import crashpoint
from zarr_store.errors import IntegrityError, InvalidInput, NoSpace, TerrashardError
from zarr_store.folder import FolderStore
from zarr_store.store import translate_os_errors
from zarr_store.temporary import PARTIAL, is_temporary

if TYPE_CHECKING:
    from jaxtrain.learn.state import Program

__all__ = ["CheckpointStore", "Restored", "name_leaves", "target_of"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST, _CONTENTS, _STATE = "manifest.json", "contents.json", "state"
_starting = threading.Lock()
"""Held while orbax starts a save. It numbers saves by a counter of the process and reads that number until `save`
returns: of two that start at once (trials of a population), one would wait for the signal of the other without end."""
_LATER = {"opt_state.weight": UNKNOWN}
"""Arrays that checkpoints of release 0.1.0 lack, and the number that stands for that."""


@dataclass(frozen=True)
class Restored:
    """A state that was read back.

    Attributes:
        step: Steps that were done when it was saved.
        state: The state, in the structure and sharding of the target.
        extra: Data position and configuration, saved with the state.
        passed_over: One line for each newer checkpoint that is damaged.
    """

    step: int
    state: Any
    extra: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def target_of(program: Program) -> Any:
    """Return shapes, dtypes and shardings of the saved state of a program (`Program.of_saved`)."""
    place: Callable[..., Any] = jax.ShapeDtypeStruct
    where = program.saved_shardings
    return jax.tree.map(lambda s, at: place(s.shape, s.dtype, sharding=at), program.shapes, where)


def name_leaves(tree: Any) -> dict[str, Any]:
    """Name leaves by dotted path, e.g. "params.down_0.conv1.kernel".

    >>> name_leaves({"a": {"b": 1}, "c": (2, 3)})
    {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise InvalidInput(f"{len(leaves)} arrays share {len(named)} names and cannot be distinguished in a checkpoint")
    return named


class CheckpointStore:
    """The checkpoints of one run; only the holder of the run's lock may use it for writing.

    Args:
        folder: `checkpoints/` of the run.
        keep: Number of verified checkpoints to keep, at least 2, so that damage to the newest loses one interval.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        if keep < 2:
            raise InvalidInput(f"keep at least 2 checkpoints, got {keep}: a single one may be the damaged one")
        self.folder = folder.absolute()
        self._keep = keep
        self.protected: int | None = None
        """Step of the best checkpoint, which is kept beside the newest ones."""
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None

    def steps(self) -> list[int]:
        """Return the steps of finished checkpoints, ascending; they may have been damaged since."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal() and entry.is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def clear_partial(self) -> None:
        """Remove the remains of killed saves; the caller holds the run's lock."""
        if self.folder.is_dir() and jax.process_index() == 0:
            for entry in self.folder.iterdir():
                if is_temporary(entry.name) or "orbax-checkpoint-tmp" in entry.name:
                    shutil.rmtree(entry, ignore_errors=True)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return only when it is whole and durable; then remove the oldest.

        Args:
            step: Steps done.
            state: Any tree of arrays, sharded or not.
            extra: JSON: data position, configuration.

        Raises:
            NoSpace: The disk is full; nothing but the new checkpoint is lost.
        """
        self.begin(step, state, extra)
        self.wait()
        return self.path(step)

    def begin(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Copy the arrays and write them in the background, so that training continues; wait for the previous save.

        After this returns the state may be donated. All processes call it at the same step.

        Raises:
            NoSpace: The disk was full, for this save or for the one before.
        """
        self.wait()
        named = name_leaves(state)
        partial = self.folder / f".{step:08d}{PARTIAL}"
        with translate_os_errors(str(self.path(step))):
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                self._check_room(step, named)
                partial.mkdir()
            _together(f"checkpoint {step} begins")
            crashpoint("checkpoint-begins")
            writer = ocp.StandardCheckpointer()
            with _starting:
                writer.save(partial / _STATE, named)
        contents = {"format": _FORMAT, "step": step, "arrays": _describe(named), "extra": dict(extra)}
        self._failure = None
        self._saving = threading.Thread(
            target=self._finish, args=(step, writer, partial, contents), name=f"checkpoint-{step}"
        )
        self._saving.start()

    def check(self) -> None:
        """Raise the error of a save in the background, if it failed; costs nothing.

        Raises:
            NoSpace: The disk is full; the checkpoints before are as they were.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait for the save under way, and raise its error."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self.check()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Run a block and then wait for its saves; their error is raised, or logged if the block itself failed."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except TerrashardError as error:
                _log.error("%s", error)
            raise
        self.wait()

    def _check_room(self, step: int, named: Mapping[str, Any]) -> None:
        # before the first byte: a disk that fills up while arrays are written leaves writers of orbax behind
        needed, disk = sum(int(leaf.nbytes) for leaf in named.values()), shutil.disk_usage(self.folder)
        if disk.total and disk.free < needed:  # some network file systems report 0 of 0
            raise NoSpace(
                f"no space left for {self.path(step)}: a checkpoint needs {needed / 1e6:.1f} MB and "
                f"{disk.free / 1e6:.1f} MB are free; those before are as they were; free some and repeat the command"
            )

    def _finish(self, step: int, writer: Any, partial: Path, contents: Mapping[str, Any]) -> None:
        """Wait for the arrays in a thread, then check and rename; no collective of the devices may run here."""
        try:
            with translate_os_errors(str(self.path(step))):
                writer.wait_until_finished()
                writer.close()
                _together(f"checkpoint {step} is written")
                crashpoint("checkpoint-arrays")
                if jax.process_index() == 0:
                    self._seal(step, partial, contents)
                _together(f"checkpoint {step} is in place")
        except BaseException as error:  # noqa: BLE001  raised in the thread that trains, by `check`
            if jax.process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            kind = type(error) if isinstance(error, TerrashardError) else IntegrityError
            failure = kind(
                f"the checkpoint of step {step} could not be saved: {error}; those before are as they were "
                f"(newest: {max(self.steps(), default='none')}), and training stops rather than continue without saving"
            )
            failure.__cause__ = error
            self._failure = failure

    def _seal(self, step: int, partial: Path, contents: Mapping[str, Any]) -> None:
        store, final = FolderStore(partial), self.path(step)
        store.write(_CONTENTS, json.dumps(contents, indent=1, sort_keys=True).encode())
        crashpoint("checkpoint-contents")
        manifest = {"format": _FORMAT, "step": step, "files": _hash_files(partial)}
        store.write(_MANIFEST, json.dumps(manifest).encode())
        crashpoint("checkpoint-manifest")
        if final.exists():  # a damaged one of the same step, which the run has passed over
            shutil.rmtree(final)
        os.rename(partial, final)
        crashpoint("checkpoint-renamed")
        self._prune()

    def problems(self, step: int) -> list[str]:
        """List the faults of a checkpoint; empty if every file exists and has its hash."""
        folder = self.path(step)
        try:
            manifest = load_json(read_file(folder / _MANIFEST, MOST_JSON_BYTES), _MANIFEST)
            expected = {str(name): (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
            if manifest["format"] != _FORMAT or manifest["step"] != step:
                return [f"{_MANIFEST} is of format {manifest['format']}, step {manifest['step']}"]
        except FileNotFoundError:
            return [f"{_MANIFEST} is missing"]
        except (ValueError, KeyError, TypeError) as error:
            return [f"{_MANIFEST} is unreadable ({type(error).__name__})"]
        found = {name: (entry["sha256"], entry["bytes"]) for name, entry in _hash_files(folder).items()}
        wrong = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        return [f"{name} {_what_is_wrong(expected.get(name), found.get(name))}" for name in wrong]

    def newest(self) -> tuple[int | None, list[str]]:
        """Return the newest undamaged step, None without checkpoints, and a line for each newer one that is damaged.

        Raises:
            IntegrityError: There are checkpoints, and all are damaged.
        """
        passed_over: list[str] = []
        steps = self.steps()
        for step in reversed(steps):
            problems = self.problems(step)
            if not problems:
                return step, passed_over
            damage = "; ".join(problems[:3])
            passed_over.append(f"checkpoint {self.path(step)} is damaged and was passed over: {damage}")
            _log.warning(passed_over[-1])
        if steps:
            raise IntegrityError(
                f"all {len(steps)} checkpoints in {self.folder} are damaged: {' | '.join(passed_over)}; restore them "
                "from a copy, or train into another folder"
            )
        return None, []

    def contents(self, step: int) -> dict[str, Any]:
        """Return step, arrays (name → shape, dtype) and extra of a checkpoint."""
        contents: dict[str, Any] = load_json(read_file(self.path(step) / _CONTENTS, MOST_JSON_BYTES), _CONTENTS)
        return contents

    def digest(self, step: int) -> str:
        """Return the SHA-256 of the manifest of a checkpoint, which has the SHA-256 of each of its files."""
        return hashlib.sha256(read_file(self.path(step) / _MANIFEST, MOST_JSON_BYTES)).hexdigest()

    def restore(self, target: Any, *, step: int | None = None) -> Restored | None:
        """Read the newest undamaged checkpoint, or that of a step, onto the target's mesh.

        Args:
            target: Tree of `jax.ShapeDtypeStruct` with shardings: the structure, mesh and dtypes that are wanted.
            step: Step of a checkpoint that is known to be whole; None for the newest.

        Returns:
            The state, or None where there is no checkpoint.

        Raises:
            InvalidInput: Arrays, shapes or dtypes differ from the target's; the message is the diff.
            IntegrityError: All checkpoints are damaged.
        """
        passed_over: list[str] = []
        if step is None:
            step, passed_over = self.newest()
        if step is None:
            return None
        named = name_leaves(target)
        contents = self.contents(step)
        later = {name: _LATER[name] for name in _LATER if name in named and name not in contents["arrays"]}
        saved = {name: leaf for name, leaf in named.items() if name not in later}
        _check_same(contents["arrays"], _describe(saved), self.path(step))
        with ocp.StandardCheckpointer() as reader:
            values = reader.restore(self.path(step) / _STATE, saved)
        values |= {name: _filled(named[name], value) for name, value in later.items()}
        leaves = [values[name] for name in named]
        state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(target), leaves)
        return Restored(step, state, contents["extra"], tuple(passed_over))

    def _prune(self) -> None:
        """Keep the newest `keep` that are whole; a damaged one never counts, so the last good one is never removed."""
        kept = 0
        for step in reversed(self.steps()):
            if step == self.protected:
                continue
            if kept >= self._keep:
                # renamed first: a kill in between must not leave half a checkpoint under its name
                doomed = self.folder / f".{step:08d}.old{PARTIAL}"
                os.rename(self.path(step), doomed)
                crashpoint("checkpoint-old-renamed")
                shutil.rmtree(doomed, ignore_errors=True)
            # those of this process are hashed again too: damage since then must not count as good
            elif not self.problems(step):
                kept += 1


def _filled(like: jax.ShapeDtypeStruct, value: float) -> Any:
    """Return an array of one number where the target wants it."""
    make: Callable[..., Any] = jax.make_array_from_callback
    return make(like.shape, like.sharding, lambda index: np.full(like.shape, value, like.dtype)[index])


def _describe(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype)} for name, leaf in named.items()}


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    def show(entry: Mapping[str, Any] | None) -> str:
        return "absent" if entry is None else f"{entry['dtype']} {tuple(entry['shape'])}"

    lines = [
        f"{name}: {show(saved.get(name))} → {show(wanted.get(name))}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise InvalidInput(
            f"{path} holds another network (saved → asked for): {'; '.join(lines[:8])}{more}; use the configuration "
            "that it was trained with, or train into another folder"
        )


def _what_is_wrong(expected: tuple[str, int] | None, found: tuple[str, int] | None) -> str:
    if found is None:
        return "is missing"
    if expected is None:
        return "is not of this checkpoint"
    if found[1] != expected[1]:
        return f"has {found[1]} bytes, not {expected[1]}"
    return "does not hash to what was written"


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST):
        data = path.read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        files[path.relative_to(folder).as_posix()] = entry
    return files


def _together(what: str) -> None:
    """Wait for the other processes, through the coordinator: a collective here could overtake one of the training."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(what, processes=set(range(jax.process_count())))
