"""Replicas that train together: threads of this process with a real group between them."""

from __future__ import annotations

import json
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
