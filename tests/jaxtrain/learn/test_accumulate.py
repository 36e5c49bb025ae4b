"""Batches that are accumulated make the update of one large batch, however many labels each of them has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import OptimConfig
from jaxtrain.data.windows import Windows
from jaxtrain.evaluation.scores import score_windows
from jaxtrain.learn.accumulate import UNKNOWN
from jaxtrain.learn.optim import build_optimizer
from jaxtrain.learn.step import make_eval_step, make_predict_step, make_train_step
from jaxtrain.runs.checkpoint import CheckpointStore, target_of

from ..conftest import BATCH, SIDE, make_batch

PLAIN: dict[str, Any] = {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": None,
                         "learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0}  # fmt: skip
PARAMS = {"conv1": {"kernel": jnp.full((1, 1, 2, 2), 3.0)}}


def sections(accumulate: int, size: int, steps: int, **data: Any) -> dict[str, dict[str, Any]]:
    return {
        "data": {"augment": False, **data},
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "optim": {**PLAIN, "accumulate": accumulate},
        "run": {"batch_size": size, "steps": steps},
    }


def uneven() -> dict[str, np.ndarray]:
    """Labels in whole samples at first, in a few pixels of the next ones, and in none of the last."""
    batch = {name: array.copy() for name, array in make_batch().items()}
    batch["label"] = np.where(batch["label"] == 255, 0, batch["label"]).astype(np.uint8)
    batch["label"][3:7, 1:] = 255
    batch["label"][7] = 255
    return batch


def moved(program: Any, batches: list[dict[str, np.ndarray]], start: int = 0) -> Any:
    """The change of the parameters by some steps, as one vector."""
    step, state = make_train_step(program), program.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    for number, batch in enumerate(batches, start):
        state, metrics = step(state, batch, key=jax.random.fold_in(jax.random.key(1), number))
        assert bool(metrics["finite"])
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(change)])


def cut(batch: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    return [{n: a[i : i + size] for n, a in batch.items()} for i in range(0, BATCH, size)]


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 0.2, 2.0]])
def test_accumulated_batches_are_one_large_batch(program_of, weights) -> None:
    batch = uneven()
    whole = moved(program_of(class_weights=weights, **sections(1, BATCH, 1)), [batch])
    assert np.linalg.norm(whole) > 1e-3
    # the first has 1024 labelled pixels for each of its samples, the last none: means of means are another direction
    for size in (1, 2):
        parts = cut(batch, size)
        program = program_of(class_weights=weights, **sections(len(parts), size, len(parts)))
        np.testing.assert_allclose(moved(program, parts), whole, rtol=1e-3, atol=1e-6)


def test_strategies_accumulate_alike(program_of) -> None:
    batch, model = uneven(), {"name": "cnn", "width": 8, "depth": 1}
    whole = moved(program_of(**{**sections(1, BATCH, 1), "model": model}), [batch])
    parts = cut(batch, 4)
    program = program_of(**{**sections(2, 4, 2), "model": model, "mesh": {"data": 2, "model": 2, "zero": 1}})
    np.testing.assert_allclose(moved(program, parts), whole, rtol=1e-3, atol=1e-5)


def test_the_last_batches_of_a_run_are_learned_too(program_of) -> None:
    """Three steps of two accumulated batches: the third is an update of its own."""
    parts = cut(uneven(), 2)[:3]
    two = moved(program_of(**sections(2, 2, 2)), parts[:2])
    three = moved(program_of(**sections(2, 2, 3)), parts)
    assert np.abs(three - two).max() > 1e-4


def test_a_last_batch_that_is_not_finite_leaves_what_was_accumulated(program_of) -> None:
    parts = cut(uneven(), 2)[:2]
    alone = moved(program_of(**sections(2, 2, 1)), parts[:1])
    program = program_of(**sections(2, 2, 2))
    step, state = make_train_step(program), program.init(jax.random.key(0))
    before = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.params)])
    state, _ = step(state, parts[0], key=jax.random.key(1))
    broken = {**parts[1], "image": parts[1]["image"].astype(np.float32)}
    first = {**parts[0], "image": parts[0]["image"].astype(np.float32)}
    state = program.init(jax.random.key(0))
    state, _ = step(state, first, key=jax.random.key(1))
    broken["image"][0, 0] = np.inf
    state, metrics = step(state, broken, key=jax.random.key(1))
    assert not bool(metrics["finite"])
    after = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.params)])
    np.testing.assert_allclose(after - before, alone, rtol=1e-3, atol=1e-6)


def test_the_rate_of_a_short_last_update_is_that_of_its_last_batch() -> None:
    config = OptimConfig(**{**PLAIN, "learning_rate": 1.0, "schedule": "linear", "accumulate": 4})
    optimizer = build_optimizer(config, 5)
    state = optimizer.init(PARAMS)
    gradient = {"conv1": {"kernel": jnp.ones((1, 1, 2, 2))}}
    seen = []
    for number in range(5):
        updates, state = optimizer.update(gradient, state, PARAMS, weight=1.0, last=number == 4)
        seen.append(float(updates["conv1"]["kernel"][0, 0, 0, 0]))
    np.testing.assert_allclose(seen, [0, 0, 0, -0.4, -0.2], rtol=1e-6)


def test_weights_are_summed_before_the_one_division() -> None:
    optimizer = build_optimizer(OptimConfig(**{**PLAIN, "learning_rate": 1.0, "accumulate": 3}), 3)
    state = optimizer.init(PARAMS)
    for total, weight in ((6.0, 2.0), (0.0, 0.0), (5.0, 8.0)):
        gradient = {"conv1": {"kernel": jnp.full((1, 1, 2, 2), total)}}
        updates, state = optimizer.update(gradient, state, PARAMS, weight=weight)
    assert float(updates["conv1"]["kernel"][0, 0, 0, 0]) == pytest.approx(-1.1)


def test_a_checkpoint_of_before_goes_on_in_the_middle_of_an_update(program_of, tmp_path: Path) -> None:
    """Optax kept the mean of the batches and no weight; they count as batches of as many labels as the next."""
    program = program_of(**sections(3, 2, 3))
    state = program.init(jax.random.key(0))
    mean = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), state.params)
    old = optax.MultiStepsState(jnp.int32(2), jnp.int32(0), state.opt_state.inner_opt_state, mean, ())
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(2, type(state)(jnp.int32(2), state.params, state.model_state, old), {})
    assert not any("weight" in name for name in store.contents(2)["arrays"])
    restored = store.restore(target_of(program))
    assert restored is not None
    assert float(restored.state.opt_state.weight) == UNKNOWN
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 5.0 * 7), state.params)
    updates, new = program.optimizer.update(gradient, restored.state.opt_state, state.params, weight=7.0)
    # the mean of 2, 2 and 5, at a rate of 0.5
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -1.5, rtol=1e-6)
    assert float(new.weight) == 0
    assert int(new.gradient_step) == 1


def test_microbatches_weigh_classes_and_mixtures_as_one_batch_does(program_of) -> None:
    table = {**sections(1, BATCH, 1, mix="mixup", mix_alpha=2.0), "model": {"name": "cnn", "width": 8, "depth": 1}}
    weights = [1.0, 5.0, 0.2, 2.0]
    whole = moved(program_of(class_weights=weights, **table), [uneven()])
    piped = program_of(class_weights=weights, **{**table, "mesh": {"pipe": 2, "microbatches": 4}})
    np.testing.assert_allclose(moved(piped, [uneven()]), whole, rtol=1e-3, atol=1e-5)
    plain = moved(program_of(**{**table, "data": {"augment": False}}), [uneven()])
    assert np.abs(plain - whole).max() > 1e-3, "weights and mixtures matter"


class Samples:
    """Reads the samples of one batch as if each were a window of its own."""

    shows: Literal["windows", "images"] = "windows"

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.batch = batch

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[rows[:, 0]] for name, array in self.batch.items()}

    def begin(self, rows: np.ndarray) -> Any:
        return lambda: self.read(rows)


def test_scores_of_a_validation_do_not_depend_on_how_it_is_cut(program_of) -> None:
    """Loss and scores of windows of 1024, 32 and no labels are those of all pixels, not means of the windows'."""
    batch = uneven()
    rows = np.zeros((BATCH, 3), np.int32)
    rows[:, 0] = np.arange(BATCH)
    found = {}
    for size in (1, 3, BATCH):
        program = program_of(**sections(1, size, 1))
        state = program.init(jax.random.key(0))
        counts, loss = score_windows(
            program, make_eval_step(program), state, Samples(batch), Windows(SIDE, rows), tuple("abcd")
        )
        found[size] = {**counts.to_dict(), "loss": loss}
    answer = np.asarray(make_predict_step(program)(state, batch["image"], observed=batch["observed"]))
    labelled = batch["label"] != 255
    truth, p = batch["label"][labelled].astype(int), answer[labelled]
    right = p.argmax(-1) == truth
    each = [right[truth == c].mean() for c in np.unique(truth)]
    by_window = [right[np.repeat(np.arange(BATCH), labelled.sum(axis=(1, 2))) == n].mean() for n in range(BATCH - 1)]
    for scores in found.values():
        assert scores["pixels"] == labelled.sum()
        assert scores["loss"] == pytest.approx(-np.log(p[np.arange(len(truth)), truth]).mean(), rel=1e-4)
        assert scores["accuracy"] == pytest.approx(right.mean())
        assert scores["average_accuracy"] == pytest.approx(np.mean(each))
        assert scores["confusion_matrix"] == found[1]["confusion_matrix"]
    assert abs(np.mean(by_window) - right.mean()) > 0.01, "a mean of the windows' means is another number"
