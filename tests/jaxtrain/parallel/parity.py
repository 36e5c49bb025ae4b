"""Ten steps of a small network on any mesh, and what it means that two such runs are the same.

Also run by worker processes, which have no pytest: `python parity.py CASES OUT`, with CASES as JSON: a list of
[mesh, network], such as ["data=2 space=2", "resnet batch"]. One start of the processes serves all cases.
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
from jaxtrain.data.arrays import local_rows, put_batch
from jaxtrain.learn.state import Program, TrainState, build_program
from jaxtrain.learn.step import TrainStep, make_eval_step, make_train_step
from jaxtrain.models.modality import Modality
from jaxtrain.parallel.mesh import batch_sharding, make_mesh

CHANNELS, CLASSES, SIDE, BATCH, STEPS = 3, 4, 16, 8, 10
UNET: dict[str, Any] = {"name": "unet", "width": 8, "depth": 1}
CNN: dict[str, Any] = {"name": "cnn", "width": 8, "depth": 2}
RESNET: dict[str, Any] = {"name": "resnet", "width": 8, "blocks": [1, 1]}
"""The blocks of a ResNet-18, one that keeps the size and one that halves it."""
MULTIMODAL: dict[str, Any] = {"name": "multimodal", "width": 8, "depth": 1}
"""A branch of two bands and one of one band."""
MODALITIES = {"s2": 2, "s1": 1}
"""Bands of each branch."""
MODELS = {"unet": UNET, "cnn": CNN, "resnet": RESNET, "multimodal": MULTIMODAL}


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


def mesh_of(text: str) -> dict[str, Any]:
    """The table `mesh` of "data=2 space=2,2 schedule=gpipe", with `groups` of "groups=s2,fusion/s1"."""

    def value(text: str) -> Any:
        if "/" in text:
            return [group.split(",") for group in text.split("/")]
        return [int(v) for v in text.split(",")] if "," in text else int(text) if text.isdecimal() else text

    return {name: value(text) for name, text in (part.split("=") for part in text.split())}


def model_of(text: str) -> dict[str, Any]:
    """The table `model` of "unet", "resnet batch", "multimodal group middle" or "multimodal group late 0.5"."""
    name, *more = text.split()
    return MODELS[name] | dict(zip(("norm", "fusion", "alone"), more or ["group"], strict=False))


@cache
def make_batch(*, per_image: bool = False) -> dict[str, np.ndarray]:
    """Blocks of classes with their own spectra; labels are spread unevenly over samples and over rows.

    With one label per image, the image is of that class but for a third of its blocks, and one sample has no label.
    """
    rng = np.random.default_rng(3)
    if per_image:
        whole = rng.integers(0, CLASSES, BATCH)
        label = np.repeat(whole, SIDE * SIDE).reshape(BATCH, SIDE, SIDE)
        other = rng.random((BATCH, SIDE // 4, SIDE // 4)).repeat(4, axis=1).repeat(4, axis=2) < 0.3
        label = np.where(other, (label + 1) % CLASSES, label)
        spectra = rng.integers(500, 4500, (CLASSES, CHANNELS))
        image = (spectra[label] + rng.normal(0, 150, (*label.shape, CHANNELS))).clip(1, 65535).astype(np.uint16)
        whole[-1] = 255
        return {
            "image": np.moveaxis(image, -1, 1),
            "label": whole.astype(np.uint8),
            "observed": np.ones(label.shape, bool),
        }
    label = rng.integers(0, CLASSES, (BATCH, SIDE // 4, SIDE // 4)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    spectra = rng.integers(500, 4500, (CLASSES, CHANNELS))
    image = (spectra[label] + rng.normal(0, 150, (*label.shape, CHANNELS))).clip(1, 65535).astype(np.uint16)
    label[rng.random(label.shape) < np.linspace(0, 0.9, BATCH)[:, None, None]] = 255
    label[:, SIDE * 3 // 4 :] = 255  # with four parts of the rows, one has nothing to learn
    return {"image": np.moveaxis(image, -1, 1), "label": label, "observed": np.ones(label.shape, bool)}


def make_program(mesh: dict[str, Any], model: dict[str, Any], **optim: Any) -> Program:
    """The program of a small configuration; plain momentum, because Adam turns rounding into signs.

    `groups` in `mesh` are those of a placement.
    """
    mesh = dict(mesh)
    groups = mesh.pop("groups", None)
    branches = model["name"] == "multimodal"
    named = {name: {"bands": [f"{name}{i}" for i in range(count)]} for name, count in MODALITIES.items()}
    config = TrainConfig.model_validate(
        {
            "data": {"cube": "none.zarr", "patch": SIDE, "modalities": named if branches else {}},
            "model": model,
            "mesh": mesh,
            "placement": {} if groups is None else {"kind": "branches", "groups": groups},
            "optim": {"name": "sgd", "learning_rate": 0.05, "weight_decay": 0, "warmup_steps": 0, "clip_norm": 0.5}
            | optim,
            "run": {"batch_size": BATCH, "steps": STEPS},
        }
    )
    mean, std = np.full(CHANNELS, 2500.0), np.full(CHANNELS, 1400.0)
    modalities = [Modality(name, tuple(one["bands"])) for name, one in named.items()] if branches else []
    return build_program(
        config, channels=CHANNELS, classes=CLASSES, mesh=make_mesh(config.mesh), mean=mean, std=std,
        modalities=modalities,
    )  # fmt: skip


def train(program: Program) -> Outcome:
    """Ten steps on the one batch, each with its own turns."""
    step, state = make_train_step(program), program.init(jax.random.key(0))
    batch = put(program)
    losses, gradient = [], {}
    for index in range(STEPS):
        state, metrics = step(state, batch, key=jax.random.fold_in(jax.random.key(1), index))
        losses.append(float(metrics["loss"]))
        if not index:  # momentum after one step is the clipped gradient
            scale = max(1.0, float(metrics["gradient_norm"]) / 0.5)
            gradient = {name: leaf * scale for name, leaf in whole(optax.tree.get(state.opt_state, "trace")).items()}
    return Outcome(program, step, state, losses, gradient, whole(state.params), whole(state.model_state))


@cache
def of_one_device(model: str) -> Outcome:
    """What all others must equal; trained once for all tests of a process."""
    return train(make_program({}, model_of(model)))


def put(program: Program) -> dict[str, jax.Array]:
    """The batch as arrays of the mesh, from the rows of this process."""
    sharding = batch_sharding(program.mesh)
    mine, batch = local_rows(sharding, BATCH), make_batch(per_image=program.objective.task.per_image)
    if program.modalities:
        batch = by_modality(batch)
    return put_batch({name: array[mine] for name, array in batch.items()}, sharding, BATCH)


def by_modality(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The bands of the batch, divided among the modalities."""
    found, first = {"label": batch["label"]}, 0
    for name, count in MODALITIES.items():
        found[f"image_{name}"] = batch["image"][:, first : first + count]
        found[f"observed_{name}"] = batch["observed"].astype(np.uint8)
        first += count
    return found


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
    assert one.losses[-1] < 0.9 * one.losses[0], "nothing was learned, so nothing was compared"
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


def run_cases(cases: list[tuple[str, str]], out: Path) -> None:
    """Train each case, and write what this process sees of it."""
    names = ("gradient", "params", "statistics")
    for number, (mesh, model) in enumerate(cases):
        program = make_program(mesh_of(mesh), model_of(model))
        outcome = train(program)
        arrays = {f"{kind}:{name}": leaf for kind in names for name, leaf in getattr(outcome, kind).items()}
        if program.layout is not None:  # its stages meet in evaluation too
            sums = make_eval_step(program)(outcome.state, put(program))
            arrays |= {f"sums:{name}": np.asarray(value) for name, value in sums.items()}
        np.savez(out / f"{number}-{jax.process_index()}.npz", losses=outcome.losses, **arrays)


def compile_once_for_all() -> None:
    """Let the first process compile each program and the others load it from there: they would all make the same."""
    from jax._src import cache_key

    # a program's name has the process in it that asks, but for the program itself that is the same everywhere
    if hasattr(cache_key, "_hash_accelerator_config"):
        cache_key._hash_accelerator_config = lambda hash_obj, accelerators: hash_obj.update(
            accelerators.flat[0].device_kind.encode()
        )
        jax.config.update("jax_share_binary_between_hosts", True)


if __name__ == "__main__":
    from jaxtrain.parallel.processes import start_distributed

    start_distributed(timeout_s=60)
    compile_once_for_all()
    run_cases(json.loads(sys.argv[1]), Path(sys.argv[2]))
