"""Learning without labels: images are given back, what is unusual is not, on every mesh and from stores, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr
from pydantic import ValidationError

from jaxtrain import embed, evaluate, predict, train
from jaxtrain.config import TrainConfig
from jaxtrain.data.task import Task
from jaxtrain.inference.maps import open_map
from jaxtrain.learn.state import Program, build_program
from jaxtrain.learn.step import make_train_step
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.planner.collectives import activation_gathers
from zarr_store.errors import InvalidInput

from ..cube_factory import make_cube
from ..sample_factory import make_samples

MODEL = {"name": "autoencoder", "width": 8, "depth": 1, "code": 2}


def config_of(cube: Path | str = "none", **sections: dict[str, Any]) -> TrainConfig:
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": str(cube), "patch": 32, "split": {"block_m": 320}},
        "model": MODEL,
        "optim": {"loss": "mse", "warmup_steps": 2, "learning_rate": 0.02},
        "run": {"steps": 40, "batch_size": 8, "evaluate_every": 40, "checkpoint_every": 40},
    }
    return TrainConfig.model_validate({n: {**base.get(n, {}), **sections.get(n, {})} for n in {**base, **sections}})


def test_what_is_unusual_is_given_back_worst(tmp_path: Path) -> None:
    """The usual ground has a spectrum of one dimension, that of the odd corner is another."""
    make_cube(tmp_path / "cube.zarr", masked=True, noise=20.0)
    train(config_of(tmp_path / "cube.zarr"), tmp_path / "run")
    scores = evaluate(tmp_path / "run").to_dict()
    assert scores["r2"] > 0.7
    assert scores["accuracy"] is None
    report = (tmp_path / "run/report.html").read_text()
    assert "Worst tiles" in report
    odd = make_cube(tmp_path / "odd.zarr", masked=False, noise=20.0, seed=3, odd=(slice(64, 96), slice(96, 128)))
    result = predict(tmp_path / "run", odd.url, tmp_path / "map.zarr")
    made = open_map(tmp_path / "map.zarr")
    assert made.classes.names == ("reconstruction error",)
    error = made.read("value")
    assert result.values is not None
    assert result.values["mean"] == pytest.approx(float(error.mean()), rel=1e-4)
    # vectors of the windows: one for each, at its place
    vectors = embed(tmp_path / "run", odd.url, tmp_path / "vectors.zarr")
    group = xr.open_zarr(tmp_path / "vectors.zarr", consolidated=False)
    assert group["embedding"].shape == (vectors.samples, vectors.code) == (2 * 6 * 5, 2)
    assert (float(group["y"][0]), float(group["x"][0])) == (5_000_000 - 160, 500_000 + 160)
    with pytest.raises(InvalidInput, match="exists"):
        embed(tmp_path / "run", odd.url, tmp_path / "vectors.zarr")
    inside = error[66:94, 98:126].mean()
    error[60:100, 92:132] = np.nan
    assert inside > 3 * np.nanmean(error)


def test_it_learns_from_a_store_of_samples_and_scores_another(tmp_path: Path) -> None:
    make_samples(tmp_path / "a.zarr")
    make_samples(tmp_path / "b.zarr", seed=1)
    train(config_of(tmp_path / "a.zarr", run={"steps": 2, "evaluate_every": 2}), tmp_path / "run")
    assert evaluate(tmp_path / "run", data=tmp_path / "b.zarr").to_dict()["rmse"] > 0
    assert embed(tmp_path / "run", tmp_path / "b.zarr", tmp_path / "v.zarr").samples == 96
    names = xr.open_zarr(tmp_path / "v.zarr", consolidated=False)["name"].values
    assert names[:2].tolist() == ["sample-0", "sample-1"]


def program_of(**sections: dict[str, Any]) -> Program:
    config = config_of("none", **sections)
    return build_program(config, channels=3, classes=1, mesh=make_mesh(config.mesh), mean=[900] * 3, std=[300] * 3,
                         task=Task(rebuild=True))  # fmt: skip


def test_every_mesh_gives_the_same_step_and_gathers_no_activation() -> None:
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {"image": rng.integers(1, 2000, (4, 3, 16, 16)).astype(np.uint16),
             "observed": (rng.random((4, 16, 16)) < 0.9).astype(np.uint8)}  # fmt: skip
    found: dict[str, tuple[float, float]] = {}
    meshes: dict[str, dict[str, int]] = {"one": {}, "split": {"data": 2, "space": 2}}
    for name, mesh in meshes.items():
        program = program_of(mesh=mesh, data={"patch": 16}, model={"width": 4, "code": 2}, run={"batch_size": 4})
        step, state = make_train_step(program), program.init(jax.random.key(0))
        if name == "split":
            compiled = step.jitted.lower(state, batch, jax.random.key(1)).compile()
            assert activation_gathers(compiled) == ()
        state, metrics = step(state, batch, key=jax.random.key(1))
        assert int(metrics["labelled"]) == 3 * int(batch["observed"].sum()), "the loss is over what was observed"
        found[name] = (float(metrics["loss"]), float(metrics["gradient_norm"]))
    assert found["split"] == pytest.approx(found["one"], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"loss": "cross_entropy"}}, "use mse or huber"),
        ({"data": {"mix": "cutmix"}}, "learns without"),
        ({"data": {"patch": 33}}, "must be a multiple of"),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(**sections)
