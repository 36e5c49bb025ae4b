"""What must not lose a step or teach nonsense: full disks, kills while saving, loss of nan, damaged chunks, hangs.

Each test provokes the fault, asserts that it has fired, and that the run is what it would have been without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import TrainEvent, train
from jaxtrain import loop as train_module
from jaxtrain.learn.step import make_train_step
from jaxtrain.parallel.processes import Agreement
from jaxtrain.runs import checkpoint
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.watchdog import HUNG
from zarr_store.errors import CorruptShard, InvalidInput, NoSpace, Preempted

from .cube_factory import COLLECTION, shared_cube, shared_run, tiny_config
from .test_train import assert_same_run, params_of

TrainStep = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("shared_programs")


def change_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Batches pass through `change(number of the batch, batch)` before they are trained on."""
    make = make_train_step

    def changed(program: Any) -> TrainStep:
        step, numbers = make(program), iter(range(10_000))

        def train_on(state: Any, batch: dict[str, Any], key: jax.Array) -> Any:
            if isinstance(batch["image"], jax.core.Tracer):  # the rehearsal before a run, which trains on no batch
                return step(state, batch, key=key)
            return step(state, change(next(numbers), batch), key=key)

        return train_on

    monkeypatch.setattr(train_module, "make_train_step", changed)


def incidents(run: Path) -> list[dict[str, Any]]:
    path = run / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- T01: killed while saving


def test_a_kill_at_any_point_of_a_save_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied at every crash point: what a kill would leave there must be a folder that resumes."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    state = {"w": jnp.arange(6.0), "n": jnp.int32(0)}
    for step in (5, 10):
        store.save(step, state | {"n": jnp.int32(step)}, {})
    left: list[str] = []

    def copy(name: str) -> None:
        left.append(name)
        shutil.copytree(store.folder, tmp_path / "left" / f"{len(left)}-{name}")

    monkeypatch.setattr(checkpoint, "crashpoint", copy)
    store.save(15, state | {"n": jnp.int32(15)}, {})
    assert left == ["checkpoint-begins", "checkpoint-arrays", "checkpoint-contents", "checkpoint-manifest",
                    "checkpoint-renamed", "checkpoint-old-renamed"]  # fmt: skip
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)
    for folder in sorted((tmp_path / "left").iterdir()):
        after = CheckpointStore(folder, keep=2)
        after.clear_partial()
        assert not [entry for entry in folder.iterdir() if "partial" in entry.name]
        restored = after.restore(target)
        assert restored is not None
        expected = 15 if "renamed" in folder.name else 10
        assert (restored.step, int(restored.state["n"]), restored.passed_over) == (expected, expected, ())


# ---- T03: the disk is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


# TensorBoard's own writer thread meets the full disk too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_stops_the_run_before_a_save_begins_and_nothing_is_lost(small_disk: Path) -> None:
    run, config = small_disk / "run", tiny_config(shared_cube())
    ballast = small_disk / "ballast"

    def fill(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 8:
            # saved in the background: on a busy machine it may still be written now, and would be the one that fails
            until = time.monotonic() + 60
            while not CheckpointStore(run / "checkpoints").steps() and time.monotonic() < until:
                time.sleep(0.01)
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_frsize))

    with pytest.raises(NoSpace, match=r"no space left .*00000010: a checkpoint needs 0\.\d MB and 0\.0 MB are free"):
        train(config, run, on_event=fill)
    assert ballast.stat().st_size > 0  # the fault fired
    store = CheckpointStore(run / "checkpoints")
    assert store.steps() == [5]  # the one that failed has no name
    assert store.problems(5) == []
    ballast.unlink()
    assert train(config, run).resumed_from == 5
    assert_same_run(shared_run(), run)


def test_a_disk_that_fills_up_while_arrays_are_written_is_told_as_such(small_disk: Path) -> None:
    """In a process of its own: writers of orbax that answer too late are heard of in whatever test runs by then."""
    program = f"""
        import os
        from pathlib import Path
        import jax.numpy as jnp
        from jaxtrain.runs import checkpoint
        disk = Path({str(small_disk)!r})
        store = checkpoint.CheckpointStore(disk / "checkpoints")
        state = {{str(number): jnp.arange(40_000.0) + number for number in range(8)}}
        store.save(5, state, {{}})
        def fill(name):
            if name == "checkpoint-begins":
                free = os.statvfs(disk)
                (disk / "ballast").write_bytes(bytes((free.f_bavail - 20) * free.f_frsize))
        checkpoint.crashpoint = fill
        try:
            store.save(10, state, {{}})
        except checkpoint.NoSpace as error:
            print("told:", error)
        print("left:", store.steps(), store.problems(5), [path.name for path in store.folder.iterdir()])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, left = done.stdout.splitlines()
    assert told.startswith("told: the checkpoint of step 10 could not be saved: no space left for ")
    assert left == "left: [5] [] ['00000005']"


def test_a_failed_save_is_told_at_the_next_step_and_awaited_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shared_cube(), run={"steps": 200, "checkpoint_every": 20, "evaluate_every": 200})
    seal = CheckpointStore._seal

    def fail(self: CheckpointStore, step: int, *rest: Any) -> None:
        if step >= 40:
            raise OSError(28, "No space left on device")
        seal(self, step, *rest)

    monkeypatch.setattr(CheckpointStore, "_seal", fail)
    with pytest.raises(NoSpace, match=r"the checkpoint of step 40 could not be saved: no space.*newest: 20"):
        train(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] <= 60  # within one interval
    assert not list((tmp_path / "run" / "checkpoints").glob(".*partial"))
    # the very last save has no next step; its end is awaited
    monkeypatch.setattr(CheckpointStore, "_seal", lambda self, step, *rest: fail(self, step + 40, *rest))
    with pytest.raises(NoSpace, match="the checkpoint of step 3 could not be saved"):
        train(tiny_config(shared_cube(), run={"steps": 3}), tmp_path / "short")


# ---- T04: told to stop by another process


def test_a_wish_of_another_process_stops_this_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's wish comes with the sum over all, a step late; the run is saved and goes on bit-equal."""
    asked = iter(range(100))
    monkeypatch.setattr(Agreement, "ask", lambda self, wanted: next(asked))
    monkeypatch.setattr(Agreement, "answer", lambda self, number: number == 6)
    with pytest.raises(Preempted, match="saved at step 8 of 12"):
        train(tiny_config(shared_cube()), tmp_path / "run")
    monkeypatch.undo()
    assert train(tiny_config(shared_cube()), tmp_path / "run").resumed_from == 8
    assert_same_run(shared_run(), tmp_path / "run")


# ---- T09: other numbers of devices


def test_a_run_moves_from_eight_devices_to_two_and_to_eight_others(tmp_path: Path) -> None:
    """4×2 → 2×1 → 8×1: no sample is skipped or doubled, and the numbers are those of one device up to rounding."""
    sections: dict[str, dict[str, Any]] = {"model": {"width": 8, "dropout": 0.0}, "run": {"checkpoint_every": 4}}

    def part(mesh: dict[str, int], until: int) -> int:
        def stop(event: TrainEvent) -> None:
            if event.kind == "step" and event.step == until:
                raise KeyboardInterrupt

        config = tiny_config(shared_cube(), **sections, mesh=mesh)
        if until == 12:
            return train(config, tmp_path / "moved").resumed_from
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "moved", on_event=stop)
        return 0

    part({"data": 4, "model": 2}, 5)
    part({"data": 2, "model": 1}, 9)
    assert part({"data": 8, "model": 1}, 12) == 8
    train(tiny_config(shared_cube(), **sections), tmp_path / "alone")
    alone, moved = read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "moved")
    assert [(line["kind"], line["step"]) for line in alone] == [(line["kind"], line["step"]) for line in moved]
    for a, b in zip(alone, moved, strict=True):
        assert a.get("labelled") == b.get("labelled")  # the same samples in each batch
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3), a


# ---- T12: a loss that is not a number


def test_steps_that_are_not_finite_are_skipped_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(number: int, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "image": batch["image"].astype(jnp.float32) * jnp.inf} if number in (3, 7) else batch

    change_batches(monkeypatch, infinite)
    run = tmp_path / "run"
    events: list[TrainEvent] = []
    config = tiny_config(shared_cube(), run={"on_nan": "skip", "max_skipped": 2})
    result = train(config, run, on_event=events.append)
    assert result.skipped_steps == 2
    assert [(line["kind"], line["step"]) for line in incidents(run)] == [("not_finite", 4), ("not_finite", 8)]
    assert len(incidents(run)[0]["windows"]) == 8
    assert [line["loss"] for line in read_metrics(run) if line["step"] in (4, 8)] == [None, None]
    warnings = [event.message for event in events if event.kind == "warning"]
    assert "step 4: loss nan" in warnings[0]
    assert "(2 of at most 2)" in warnings[1]
    assert all(np.isfinite(leaf).all() for leaf in params_of(run).values())
    assert CheckpointStore(run / "checkpoints").contents(12)["extra"]["incidents"]["skipped_steps"] == 2


def test_too_many_such_steps_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_batches(monkeypatch, lambda _, batch: {**batch, "image": batch["image"].astype(jnp.float32) * jnp.inf})
    config = tiny_config(shared_cube(), run={"on_nan": "skip", "max_skipped": 2})
    with pytest.raises(InvalidInput, match=r"step 3: .*3 steps were skipped, run\.max_skipped is 2; Training stopped"):
        train(config, tmp_path / "run")
    assert len(incidents(tmp_path / "run")) == 2


# ---- T13: a chunk is damaged


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A run of five steps whose cube is damaged afterwards."""
    cube = tmp_path / "c.zarr"
    shutil.copytree(shared_cube(), cube)
    shutil.copytree(shared_run(), tmp_path / "run")
    for step in (10, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{step:08d}")
    path = cube / COLLECTION / "reflectance" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data) - 200, 97):
        data[at] ^= 1
    path.write_bytes(data)
    return cube


def test_a_damaged_chunk_stops_the_run_by_name(tmp_path: Path, damaged: Path) -> None:
    with pytest.raises(CorruptShard, match=r"sentinel-2-l2a/reflectance Region\(t0=0"):
        train(tiny_config(damaged), tmp_path / "run")


def test_a_damaged_chunk_is_put_into_quarantine_up_to_a_limit(tmp_path: Path, damaged: Path) -> None:
    run = tmp_path / "run"
    strict = tiny_config(damaged, run={"on_corrupt": "quarantine", "max_quarantined": 1})
    with pytest.raises(CorruptShard, match=r"2 windows cannot be read, run\.max_quarantined is 1"):
        train(strict, run)
    (run / "incidents.jsonl").unlink()
    events: list[TrainEvent] = []
    config = tiny_config(damaged, run={"on_corrupt": "quarantine"})
    result = train(config, run, on_event=events.append)
    lines = incidents(run)
    assert result.resumed_from == 5
    assert result.quarantined_windows == len(lines) >= 2
    for line in lines:
        assert line["kind"] == "quarantined"
        time, y, x = line["window"]
        assert time == 0
        assert y < 64
        assert x < 64
        assert "sentinel-2-l2a/reflectance Region" in line["why"]
    assert any("is left out of training" in event.message for event in events if event.kind == "warning")
    before, after = read_metrics(shared_run()), read_metrics(run)
    labelled = [[line["labelled"] for line in lines if line["kind"] == "train"] for lines in (before, after)]
    assert sum(labelled[1]) < sum(labelled[0])  # what is not read is not trained on, and never as zeros


# ---- T16: nothing to learn in a batch


def test_batches_without_labels_teach_nothing_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_batches(
        monkeypatch,
        lambda number, batch: {**batch, "label": jnp.full_like(batch["label"], 255)} if number == 2 else batch,
    )
    result = train(tiny_config(shared_cube()), tmp_path / "run")
    assert result.empty_batches == 1
    assert [(line["kind"], line["step"]) for line in incidents(tmp_path / "run")] == [("no_labels", 3)]
    line = next(line for line in read_metrics(tmp_path / "run") if line["step"] == 3)
    assert (line["loss"], line["gradient_norm"], line["labelled"]) == (0.0, 0.0, 0.0)


# ---- T07: a hang; T20: no fork


def test_a_run_that_hangs_shows_its_stacks_and_ends(tmp_path: Path) -> None:
    program = f"""
        import time
        from pathlib import Path
        from jaxtrain.runs.watchdog import Watchdog
        def wait_for_the_others():
            time.sleep(60)
        with Watchdog(0.5, Path({str(tmp_path / "hang-0.txt")!r})) as watchdog:
            for _ in range(4):
                time.sleep(0.25)
                watchdog.beat("step 7")
            wait_for_the_others()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == HUNG
    for text in (done.stderr, (tmp_path / "hang-0.txt").read_text()):
        assert "since: step 7" in text
        assert "in wait_for_the_others" in text


def test_training_never_forks(tmp_path: Path) -> None:
    forks: list[str] = []
    os.register_at_fork(before=lambda: forks.append("fork"))
    train(tiny_config(shared_cube(), run={"steps": 2}), tmp_path / "run")
    assert forks == []
