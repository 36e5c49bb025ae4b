"""Runs that differ in numbers alone share one compiled step, and each gets the result of its own."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.learn.step import make_eval_step, make_train_step
from jaxtrain.traced import NUMBERS, numbers_of, with_numbers, without_numbers

KINDS = {
    "adamw": {"optim": {"name": "adamw", "ema": 0.9, "clip_norm": 1.0, "label_smoothing": 0.1},
              "model": {"dropout": 0.2}},
    "sgd": {"optim": {"name": "sgd", "momentum": 0.9, "loss": "focal", "weight_decay": 1e-3},
            "data": {"jitter": 0.1, "band_dropout": 0.2, "zoom": 0.2}},
    "adam": {"optim": {"name": "adam", "accumulate": 2}, "data": {"mix": "mixup"},
             "model": {"name": "cnn", "dropout": 0.1}},
    "lamb": {"optim": {"name": "lamb", "weight_decay": 0.01}, "data": {"mix": "cutmix"}},
    "muon": {"optim": {"name": "muon"}, "model": {"name": "resnet", "blocks": [1, 1], "dropout": 0.3}},
}  # fmt: skip


def moved(values):
    """Other numbers, means and spreads, all of which are still on."""
    return {name: np.asarray(value, np.float32) * np.float32(0.8) for name, value in values.items()}


def run(step, program, batch):
    state, key = program.init(jax.random.key(3)), jax.random.key(9)
    told = []
    for number in range(3):
        state, metrics = step(state, batch, key=jax.random.fold_in(key, number))
        told.append({name: float(value) for name, value in metrics.items()})
    return state, told


def batch_for(program, batch):
    """One label for each image where the network answers so."""
    if not program.objective.task.per_image:
        return batch
    return {**batch, "label": np.arange(len(batch["image"]), dtype=np.uint8) % 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_step_gives_what_its_own_step_gives(kind, program_of, batch):
    base = program_of(**KINDS[kind])
    batch = batch_for(base, batch)
    mine = base.with_values(moved(base.values()))
    shared, shared_eval = make_train_step(base, shared=True), make_eval_step(base, shared=True)
    run(shared, base, batch)
    state, told = run(replace(shared, values=(mine.values(),)), mine, batch)
    own_state, own_told = run(make_train_step(mine), mine, batch)
    assert shared.jitted._cache_size() == 1
    for one, other in zip(told, own_told, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-6)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(own_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)
    sums = replace(shared_eval, values=(mine.values(),))(state, batch)
    own_sums = make_eval_step(mine)(state, batch)
    for name in sums:
        np.testing.assert_allclose(sums[name], own_sums[name], rtol=1e-4, atol=1e-4)
    plain = run(replace(shared, values=(base.values(),)), base, batch)[1]
    assert plain[-1]["loss"] != told[-1]["loss"]


def test_a_number_that_is_off_belongs_to_another_step(config_of):
    on, off = config_of(data={"jitter": 0.1}), config_of(data={"jitter": 0.0})
    assert without_numbers(on) != without_numbers(off)
    assert without_numbers(on) == without_numbers(config_of(data={"jitter": 0.3}, optim={"learning_rate": 1.0}))
    assert set(numbers_of(on)) - set(numbers_of(off)) == {"data.jitter"}
    assert set(numbers_of(on)) <= set(NUMBERS)
    assert with_numbers(on, {"data.jitter": 0.5}).data.jitter == 0.5
    assert "model.dropout" not in numbers_of(config_of(model={"dropout": 1.0}))
