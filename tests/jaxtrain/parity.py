"""Ten steps of a small network on any mesh, and what it means that two such runs are the same.

Also run by worker processes, which have no pytest: `python parity.py MESH MODEL OUT`, with both as JSON.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxtrain.config import TrainConfig
from jaxtrain.data.batches import local_rows, put_batch
from jaxtrain.parallel.mesh import batch_sharding, make_mesh
from jaxtrain.state import Program, TrainState, build_program
from jaxtrain.step import TrainStep, make_train_step

CHANNELS, CLASSES, SIDE, BATCH, STEPS = 3, 4, 16, 8, 10
UNET: dict[str, Any] = {"name": "unet", "width": 8, "depth": 1}
CNN: dict[str, Any] = {"name": "cnn", "width": 8, "depth": 2}


class Outcome(NamedTuple):
    """A run of ten steps."""

    program: Program
    step: TrainStep
    state: TrainState
    losses: list[float]
    gradient: dict[str, np.ndarray]
    """Of the first step, by parameter path."""
    params: dict[str, np.ndarray]
    """After the last step."""
    statistics: dict[str, np.ndarray]


@cache
def make_batch() -> dict[str, np.ndarray]:
    """Blocks of classes with their own spectra; labels are spread unevenly over samples and over rows."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, CLASSES, (BATCH, SIDE // 4, SIDE // 4)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    spectra = rng.integers(500, 4500, (CLASSES, CHANNELS))
    image = (spectra[label] + rng.normal(0, 150, (*label.shape, CHANNELS))).clip(1, 65535).astype(np.uint16)
    label[rng.random(label.shape) < np.linspace(0, 0.9, BATCH)[:, None, None]] = 255
    label[:, SIDE * 3 // 4 :] = 255  # with four parts of the rows, one has nothing to learn
    return {"image": image, "label": label, "observed": np.ones(label.shape, bool)}


def make_program(mesh: dict[str, Any], model: dict[str, Any], **optim: Any) -> Program:
    """The program of a small configuration; plain momentum, because Adam turns rounding into signs."""
    config = TrainConfig.model_validate(
        {
            "data": {"cube": "none.zarr", "patch": SIDE},
            "model": model,
            "mesh": mesh,
            "optim": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0, "warmup_steps": 0, "clip_norm": 0.5}
            | optim,
            "run": {"batch_size": BATCH, "steps": STEPS},
        }
    )
    mean, std = np.full(CHANNELS, 2500.0), np.full(CHANNELS, 1400.0)
    return build_program(config, channels=CHANNELS, classes=CLASSES, mesh=make_mesh(config.mesh), mean=mean, std=std)


def train(program: Program) -> Outcome:
    """Ten steps on the one batch, each with its own turns."""
    step, state = make_train_step(program), program.init(jax.random.key(0))
    sharding = batch_sharding(program.mesh)
    mine = local_rows(sharding, BATCH)
    batch = put_batch({name: array[mine] for name, array in make_batch().items()}, sharding, BATCH)
    losses, gradient = [], {}
    for index in range(STEPS):
        state, metrics = step(state, batch, key=jax.random.fold_in(jax.random.key(1), index))
        losses.append(float(metrics["loss"]))
        if not index:  # momentum after one step is the clipped gradient
            scale = max(1.0, float(metrics["gradient_norm"]) / 0.5)
            gradient = {name: leaf * scale for name, leaf in whole(optax.tree.get(state.opt_state, "trace")).items()}
    return Outcome(program, step, state, losses, gradient, whole(state.params), whole(state.model_state))


def whole(tree: Any) -> dict[str, np.ndarray]:
    """Arrays by path, each put together from the parts that this process sees; a part that it does not see is nan."""

    def read(leaf: jax.Array) -> np.ndarray:
        full = np.full(leaf.shape, np.nan, np.float32)
        for shard in leaf.addressable_shards:
            full[shard.index] = shard.data
        return full

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): read(leaf) for path, leaf in leaves}


def assert_same(got: Outcome, one: Outcome, *, complete: bool = True) -> None:
    """Loss within 1e-5, gradients within 1e-4 of their norm, parameters after ten steps within rounding."""
    np.testing.assert_allclose(got.losses, one.losses, rtol=0, atol=1e-5)
    assert one.losses[-1] < 0.9 * one.losses[0], "nothing was learnt, so nothing was compared"
    assert got.gradient.keys() == one.gradient.keys()
    for name, expected in one.gradient.items():
        seen = ~np.isnan(got.gradient[name])
        assert seen.all() or not complete, f"{name} is not whole"
        norm = np.linalg.norm(expected)
        assert norm > 0, f"{name} has no gradient"
        assert np.linalg.norm((got.gradient[name] - expected)[seen]) <= 1e-4 * norm, f"gradient of {name}"
    for tree in ("params", "statistics"):
        for name, expected in getattr(one, tree).items():
            found = getattr(got, tree)[name]
            seen = ~np.isnan(found)
            np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-4, atol=1e-5, err_msg=f"{tree}/{name}")


if __name__ == "__main__":
    from jaxtrain.parallel.processes import start_distributed

    start_distributed(timeout_s=60)
    outcome = train(make_program(json.loads(sys.argv[1]), json.loads(sys.argv[2])))
    arrays = {
        f"{kind}:{name}": leaf
        for kind in ("gradient", "params", "statistics")
        for name, leaf in getattr(outcome, kind).items()
    }
    np.savez(Path(sys.argv[3]) / f"{jax.process_index()}.npz", losses=outcome.losses, **arrays)
