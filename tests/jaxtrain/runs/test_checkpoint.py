"""Checkpoints come back as they were, on any mesh, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxtrain.learn.state import Program
from jaxtrain.runs.checkpoint import CheckpointStore, name_leaves, target_of
from zarr_store.errors import IntegrityError, InvalidInput

ProgramOf = Callable[..., Program]


@pytest.fixture(scope="module")
def program(program_of: ProgramOf) -> Program:
    return program_of(1, 1)


@pytest.fixture(scope="module")
def state(program: Program) -> Any:
    return program.init(jax.random.key(3))


@pytest.fixture
def store(tmp_path: Path, state: Any) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(5, state, {"next_sample": 40})
    store.save(10, state, {"next_sample": 80})
    return store


def assert_same(a: Any, b: Any) -> None:
    left, right = name_leaves(a), name_leaves(b)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[name]), err_msg=name)


def test_what_was_saved_comes_back(store: CheckpointStore, program: Program, state: Any) -> None:
    restored = store.restore(target_of(program))
    assert restored is not None
    assert (restored.step, restored.extra, restored.passed_over) == (10, {"next_sample": 80}, ())
    assert_same(restored.state, state)
    assert store.contents(10)["arrays"]["step"] == {"shape": [], "dtype": "int32"}


@pytest.mark.parametrize("mesh", [(4, 2), (2, 1)])
def test_a_state_moves_to_another_mesh_and_back(
    tmp_path: Path, store: CheckpointStore, program_of: ProgramOf, state: Any, mesh: tuple[int, int], program: Program
) -> None:
    wide = program_of(*mesh)
    restored = store.restore(target_of(wide))
    assert restored is not None
    assert_same(restored.state, state)
    for leaf, sharding in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wide.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    back = CheckpointStore(tmp_path / "other")
    back.save(1, restored.state, {})
    again = back.restore(target_of(program))
    assert again is not None
    assert_same(again.state, state)


def test_nothing_saved_is_none(tmp_path: Path, program: Program) -> None:
    assert CheckpointStore(tmp_path / "none").restore(target_of(program)) is None


def every_file(store: CheckpointStore, step: int) -> list[Path]:
    return sorted(p for p in store.path(step).rglob("*") if p.is_file())


def test_one_flipped_bit_in_any_file_is_seen(
    store: CheckpointStore, program: Program, state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    files = every_file(store, 10)
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        for at in {0, len(good) // 2, len(good) - 1} if good else set():
            bad = bytearray(good)
            bad[at] ^= 0x10
            path.write_bytes(bad)
            assert store.problems(10), f"bit {at} of {path.name} went unseen"
        path.write_bytes(good)
    assert store.problems(10) == []
    damaged = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        restored = store.restore(target_of(program))
    assert restored is not None
    assert restored.step == 5
    assert "00000010 is damaged and was passed over" in restored.passed_over[0]
    assert damaged.name in restored.passed_over[0]
    assert restored.passed_over[0] in caplog.messages
    assert_same(restored.state, state)


@pytest.mark.parametrize("harm", ["truncate", "delete", "extra", "no manifest", "renamed"])
def test_other_damage_is_seen_too(store: CheckpointStore, program: Program, harm: str) -> None:
    victim = max(every_file(store, 10), key=lambda p: p.stat().st_size)
    expected = {"truncate": "bytes, not", "delete": "is missing", "extra": "not of this checkpoint",
                "no manifest": "manifest.json is missing", "renamed": "step 5"}[harm]  # fmt: skip
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "delete":
        victim.unlink()
    elif harm == "extra":
        (store.path(10) / "state" / "payload.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    elif harm == "no manifest":
        (store.path(10) / "manifest.json").unlink()
    else:
        shutil.rmtree(store.path(10))
        shutil.copytree(store.path(5), store.path(10))
    assert expected in "; ".join(store.problems(10))
    restored = store.restore(target_of(program))
    assert restored is not None
    assert restored.step == 5


def test_all_damaged_is_an_integrity_error(store: CheckpointStore, program: Program) -> None:
    for step in (5, 10):
        (store.path(step) / "contents.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"all 2 checkpoints .* are damaged"):
        store.restore(target_of(program))


def test_the_last_good_ones_are_never_removed(store: CheckpointStore, state: Any) -> None:
    """keep=2 means two that verify: a damaged newest one does not push out an older good one."""
    (store.path(10) / "contents.json").write_text("{}")
    store.save(15, state, {})
    assert store.steps() == [5, 10, 15]
    store.save(20, state, {})
    assert store.steps() == [15, 20]
    with pytest.raises(InvalidInput, match="at least 2"):
        CheckpointStore(store.folder, keep=1)


def test_a_damaged_step_can_be_saved_again(store: CheckpointStore, state: Any) -> None:
    (store.path(10) / "contents.json").write_text("{}")
    store.save(10, state, {"again": True})
    assert store.problems(10) == []
    assert store.contents(10)["extra"] == {"again": True}


def test_runs_of_one_process_start_their_saves_one_after_the_other(
    tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that started at once mixed up orbax's numbers of saves, and trials of a population waited for ever."""
    real, inside, most = ocp.StandardCheckpointer.save, [0], []

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        inside[0] += 1
        most.append(inside[0])
        time.sleep(0.05)  # long enough for every other thread to come in, if it may
        real(self, *args, **kwargs)
        inside[0] -= 1

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", counted)
    stores = [CheckpointStore(tmp_path / str(n) / "checkpoints", keep=2) for n in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for step in (1, 2):
            list(threads.map(lambda store, step=step: store.save(step, state, {}), stores))
    assert most == [1] * 6
    assert [store.newest()[0] for store in stores] == [2, 2, 2]


def test_what_a_killed_save_leaves_is_no_checkpoint(store: CheckpointStore, program: Program) -> None:
    partial = store.folder / ".00000015.partial"
    shutil.copytree(store.path(10), partial)
    assert store.steps() == [5, 10]
    store.clear_partial()
    assert not partial.exists()
    restored = store.restore(target_of(program))
    assert restored is not None
    assert restored.step == 10


def test_another_network_is_refused_with_the_difference(
    store: CheckpointStore, program: Program, program_of: ProgramOf
) -> None:
    with pytest.raises(
        InvalidInput, match=r"holds another network \(saved → asked for\): .*\(3, 3, 3, 8\) → .*\(3, 3, 3, 16\)"
    ):
        store.restore(target_of(program_of(1, 1, model={"width": 16})))
    half = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, jnp.bfloat16 if s.dtype == jnp.float32 else s.dtype, sharding=s.sharding
        ),
        target_of(program),
    )
    with pytest.raises(InvalidInput, match=r"float32 .* → bfloat16"):  # orbax alone would cast without a word
        store.restore(half)


def test_nothing_is_pickled(store: CheckpointStore) -> None:
    for path in every_file(store, 10):
        assert path.suffix not in (".pkl", ".pickle")
        assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05")), path
    json.loads((store.path(10) / "contents.json").read_bytes())
