"""Replicas that train together: threads of this process with a real group between them."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import TrainEvent, train
from jaxtrain.config import TrainConfig
from jaxtrain.hetero.coordinator import Coordinator
from jaxtrain.hetero.history import read_events, read_shares
from jaxtrain.runs.checkpoint import CheckpointStore, name_leaves, target_of
from jaxtrain.runs.events import TrainingResult
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import load_card, program_of

from ..cube_factory import shared_cube, tiny_config

SECRET = "a secret of this test, long enough"
STEPS, CHUNKS = 12, 4


def hetero_config(**sections: Any) -> TrainConfig:
    values = tiny_config(shared_cube()).model_dump(exclude_unset=True)
    values["hetero"] = {"enabled": True, "chunk": 2, "silence_s": 20.0}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig.model_validate(values)


def run_group(
    config: TrainConfig,
    out: Path,
    names: tuple[str, ...] = ("a", "b"),
    *,
    on_event: Callable[[str, TrainEvent], None] = lambda _name, _event: None,
    least: int = 1,
) -> dict[str, TrainingResult | BaseException]:
    """Train in one thread for each name; what each of them returned or raised."""
    found: dict[str, TrainingResult | BaseException] = {}
    with Coordinator("127.0.0.1:0", SECRET, min_members=least, max_members=4, expected=len(names)) as coordinator:

        def one(name: str) -> None:
            environment = {
                "TERRASHARD_HETERO_COORDINATOR": coordinator.address,
                "TERRASHARD_HETERO_SECRET": SECRET,
                "TERRASHARD_HETERO_NAME": name,
            }
            try:
                with jax.numpy_dtype_promotion("strict"):
                    found[name] = train(
                        config, out, environment=environment, on_event=lambda event: on_event(name, event)
                    )
            except BaseException as error:  # noqa: BLE001  looked at by the test
                found[name] = error

        threads = [threading.Thread(target=one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=200)
        assert not any(thread.is_alive() for thread in threads)
    return found


def params_of(run: Path) -> dict[str, np.ndarray]:
    card = load_card(run)
    restored = CheckpointStore(run / "checkpoints").restore(target_of(program_of(card, card.config)))
    assert restored is not None
    return {name: np.asarray(leaf) for name, leaf in name_leaves(restored.state).items()}


def results(found: Mapping[str, TrainingResult | BaseException]) -> dict[str, TrainingResult]:
    for error in found.values():
        if isinstance(error, BaseException):
            raise error
    return {name: result for name, result in found.items() if isinstance(result, TrainingResult)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TrainingResult], list[Any]]:
    """A run of two replicas, with what each of them reported."""
    out = tmp_path_factory.mktemp("hetero") / "run"
    told: list[Any] = []
    found = run_group(hetero_config(), out, on_event=lambda name, event: told.append((name, event)))
    return out, results(found), told


def test_replicas_train_one_run(trained: tuple[Path, dict[str, TrainingResult], list[Any]]) -> None:
    out, found, told = trained
    (leader,) = [name for name, result in found.items() if result.leads]
    assert {result.steps for result in found.values()} == {STEPS}
    assert {name for name, event in told if event.kind != "warning"} == {leader}
    lines = [line for line in read_metrics(out) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(sum(line["shares"].values()) == CHUNKS and set(line["shares"]) == {"a", "b"} for line in lines)
    assert set(lines[-1]["rates"]) <= {"a", "b"}
    assert set(lines[-1]["waiting"]) == {"a", "b"}
    assert 0 < lines[-1]["efficiency"] <= 1.5
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    result = found[leader].to_dict()
    assert sum(result["shares"].values()) == CHUNKS
    assert result["recompiles"] == 0
    assert result["efficiency"] == lines[-1]["efficiency"]
    assert not (out / "run.lock").exists()


def test_each_sample_is_seen_once(trained: tuple[Path, dict[str, TrainingResult], list[Any]]) -> None:
    out, _, _ = trained
    recorded = read_shares(out)
    assert sorted(recorded) == list(range(STEPS))
    for shares in recorded.values():
        assert Counter(chunk for chunks in shares.values() for chunk in chunks) == Counter(range(CHUNKS))


def test_nothing_is_compiled_after_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares that move at every step: JAX compiles no program from the first step to the last."""
    moving = {step: {"a": (0, 1, 2, 3)[: step % 5], "b": (0, 1, 2, 3)[step % 5 :]} for step in range(8)}
    monkeypatch.setattr("jaxtrain.hetero.replica.read_shares", lambda _out, first: moving)
    compiled: list[tuple[int, str]] = []
    reached = [0]

    def listen(event: str, _seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((reached[0], event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        config = hetero_config(run={"steps": 8, "evaluate_every": 8, "checkpoint_every": 8})

        def on_event(_name: str, event: TrainEvent) -> None:
            if event.kind == "step":
                reached[0] = event.step

        found = results(run_group(config, tmp_path / "run", on_event=on_event))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [line["shares"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"] == [
        {name: len(chunks) for name, chunks in moving[step].items()} for step in range(8)
    ]
    assert any(step == 0 for step, _ in compiled)  # the listener hears
    assert [step for step, _ in compiled if 1 <= step < 8] == []
    assert {result.recompiles for result in found.values()} == {0}


def test_recorded_shares_are_repeated_bit_by_bit(
    trained: tuple[Path, dict[str, TrainingResult], list[Any]], tmp_path: Path
) -> None:
    """A run that lost its last checkpoints repeats the steps after them with the shares that it had."""
    out, _, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    for step in CheckpointStore(copy / "checkpoints").steps():
        if step > 5:
            shutil.rmtree(copy / "checkpoints" / f"{step:08d}")
    lines = (copy / "shares.jsonl").read_text().splitlines()
    uneven = {5: ([0, 1, 2], [3]), 6: ([0], [1, 2, 3]), 7: ([], [0, 1, 2, 3])}
    for step, (a, b) in uneven.items():
        lines.append(json.dumps({"step": step, "shares": {"a": a, "b": b}, "leader": "a"}))
    (copy / "shares.jsonl").write_text("\n".join(lines) + "\n")
    twin = tmp_path / "twin"
    shutil.copytree(copy, twin)
    for run in (copy, twin):
        found = results(run_group(hetero_config(), run))
        assert {result.resumed_from for result in found.values()} == {5}
    assert read_shares(copy) == read_shares(twin)
    assert read_shares(copy)[6] == {"a": (0,), "b": (1, 2, 3)}
    one, other, first = params_of(copy), params_of(twin), params_of(out)
    for name, leaf in one.items():
        assert leaf.tobytes() == other[name].tobytes(), name
        np.testing.assert_allclose(leaf, first[name], rtol=1e-3, atol=1e-4, err_msg=name)
