"""Series of dates: classes that no single date tells apart, on every mesh, with clouds and irregular dates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxtrain import evaluate, predict, train
from jaxtrain.config import TrainConfig
from jaxtrain.data.reader import WindowReader
from jaxtrain.data.targets import label_classes, resolve_target
from jaxtrain.inference.maps import open_map
from jaxtrain.learn.state import Program, build_program
from jaxtrain.learn.step import make_predict_step, make_train_step
from jaxtrain.models.temporal import neighbours, series_of
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.planner.collectives import activation_gathers
from zarr_store import BandSpec, Cube, CubeSpec, Grid, Layout, ShardWriter, create_cube, open_cube
from zarr_store.errors import InvalidInput
from zarr_store.labels import LabelSpec, label_boxes, write_label

from ..cube_factory import COLLECTION, ground

DATES = ("2023-01-03", "2023-02-20", "2023-05-01", "2023-05-11", "2023-08-30")
SIDE = 96


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Cube:
    return make_series(tmp_path_factory.mktemp("series") / "cube.zarr")


def make_series(url: Path, *, never_seen: int = 0) -> Cube:
    """Two crops that are green in winter and in summer: their mean over the year is the same. Clouds on most dates,
    and on all over the last rows and columns that are `never_seen`.
    """
    rng = np.random.default_rng(1)
    crop = (ground(SIDE, SIDE, 3) == 4).astype(np.uint8)
    level = rng.uniform(0.8, 1.2, (SIDE, SIDE))
    green = np.array([0.9, 0.8, 0.5, 0.4, 0.1])
    course = np.where(crop[None] == 1, green[:, None, None], 1 - green[:, None, None])
    main = np.stack([900 - 500 * course, 1500 + 1800 * course], axis=1) * level + rng.normal(0, 40, (5, 2, SIDE, SIDE))
    status = np.ones((5, SIDE, SIDE), np.uint8)
    for t in range(5):
        y, x = rng.integers(0, 64, 2)
        status[t, y : y + 30, x : x + 30] = 2
    status[:, SIDE - never_seen :, SIDE - never_seen :] = 2
    main[np.repeat((status == 2)[:, None], 2, axis=1)] = 6000
    status[1, :20, :20] = 0
    main[1, :, :20, :20] = 0
    times = tuple(f"{date}T10:00:00" for date in DATES)
    spec = CubeSpec(COLLECTION, "reflectance", (BandSpec("red"), BandSpec("nir")),
                    Grid("EPSG:32633", (10.0, 0, 500_000, 0, -10.0, 5_000_000), (SIDE, SIDE)), times, ("scl",),
                    Layout("tiny", (1, 32, 32), (1, 96, 96)))  # fmt: skip
    create_cube(url, [spec], items={COLLECTION: [{"id": t, "datetime": t} for t in times]}, provenance={})
    scl = np.where(status == 1, crop[None] + 4, 9).astype(np.uint8)
    arrays: dict[str, np.ndarray] = {"reflectance": main.clip(0, 65535).astype(np.uint16), "scl": scl, "status": status,
              "source_item": np.zeros(status.shape, np.int16)}  # fmt: skip
    for index, region in spec.shards().items():
        if index[0] == 3:
            continue  # a date that was never written
        dates, rows, columns = region.slices
        cut = {name: a[dates, ..., rows, columns] for name, a in arrays.items()}
        ShardWriter(url, COLLECTION).write(region, cut, key="k", sources=())
    opened = open_cube(url)
    named = LabelSpec("crop", "classes", ((0, "winter"), (1, "summer")), {"file": "made here"})
    write_label(url, named, lambda: [(box, crop[box.y0 : box.y1, box.x0 : box.x1]) for box in label_boxes(opened)])
    return opened


def config_of(cube: Cube | None = None, **sections: dict[str, Any]) -> TrainConfig:
    base: dict[str, dict[str, Any]] = {
        "data": {"cube": "none" if cube is None else cube.url, "label": "crop", "patch": 16, "dates": "all",
                 "split": {"block_m": 160}},
        "model": {"name": "temporal", "width": 16, "depth": 2, "taps": 3},
        "optim": {"warmup_steps": 2, "learning_rate": 0.02},
        "run": {"steps": 40, "batch_size": 8, "evaluate_every": 40, "checkpoint_every": 40},
    }  # fmt: skip
    return TrainConfig.model_validate({n: {**base.get(n, {}), **sections.get(n, {})} for n in {**base, **sections}})


def test_a_batch_is_the_cube(cube: Cube) -> None:
    config = config_of(cube)
    target = resolve_target(cube, config.data)
    reader = WindowReader.of(cube, config.data, label_classes(config.data, target), target)
    batch = reader.read(np.array([[0, 0, 0], [0, 16, 48]], np.int32))
    data = cube.dataset(COLLECTION)
    for i, (y, x) in enumerate([(0, 0), (16, 48)]):
        box = (slice(y, y + 16), slice(x, x + 16))
        image = data["reflectance"].values[(slice(None), slice(None), *box)]
        status = data["status"].values[(slice(None), *box)]
        np.testing.assert_array_equal(batch["image"][i], image)
        np.testing.assert_array_equal(batch["observed"][i], status == 1)
        assert batch["day"][i].tolist() == [3, 51, 121, 131, 242]
        truth = ground(SIDE, SIDE, 3)[box] == 4
        np.testing.assert_array_equal(batch["label"][i], np.where((status == 1).any(axis=0), truth, 255))
    assert not batch["observed"][:, 3].any(), "the date that was never written reads as not observed"


def test_what_was_never_seen_is_not_trained_on(tmp_path: Path) -> None:
    cube = make_series(tmp_path / "c.zarr", never_seen=8)
    config = config_of(cube)
    target = resolve_target(cube, config.data)
    reader = WindowReader.of(cube, config.data, label_classes(config.data, target), target)
    label = reader.read(np.array([[0, SIDE - 16, SIDE - 16]], np.int32))["label"][0]
    hidden = np.zeros((16, 16), bool)
    hidden[8:, 8:] = True
    np.testing.assert_array_equal(label == 255, hidden)


def test_of_a_layer_with_dates_the_last_label_counts(cube: Cube) -> None:
    config = config_of(cube, data={"label": "scl", "classes": {"4": "winter", "5": "summer", "9": "cloud"}, "dates": 2})
    target = resolve_target(cube, config.data)
    reader = WindowReader.of(cube, config.data, label_classes(config.data, target), target)
    data, hidden = cube.dataset(COLLECTION).isel(time=slice(1, 3)), 0
    for y in range(0, SIDE, 16):
        for x in range(0, SIDE, 16):
            label = reader.read(np.array([[1, y, x]], np.int32))["label"][0]
            box = data.isel(y=slice(y, y + 16), x=slice(x, x + 16))
            scl, seen = box["scl"].values, box["status"].values == 1
            expected = np.full((16, 16), 255)
            for t in range(2):
                expected = np.where(seen[t], scl[t] - 4, expected)
            np.testing.assert_array_equal(label, expected)
            hidden += int((seen[0] & ~seen[1]).sum())
    assert hidden, "somewhere the last date has the class of a cloud, which was not seen through"


def test_it_learns_what_one_date_does_not_show_and_maps_it(cube: Cube, tmp_path: Path) -> None:
    train(config_of(cube), tmp_path / "run")
    scores = evaluate(tmp_path / "run").to_dict()
    assert scores["accuracy"] > 0.95
    assert "Worst tiles" in (tmp_path / "run/report.html").read_text()
    result = predict(tmp_path / "run", cube.url, tmp_path / "map.zarr")
    assert result.dates == tuple(f"{date}T10:00:00" for date in DATES)
    found = open_map(tmp_path / "map.zarr").read()
    truth = ground(SIDE, SIDE, 3) == 4
    assert (found != 255).all()
    assert (found == truth).mean() > 0.95
    with pytest.raises(InvalidInput, match="looks at 5 dates at once"):
        predict(tmp_path / "run", cube.url, tmp_path / "one.zarr", time="2023-05-01")


def program_of(**sections: dict[str, Any]) -> Program:
    config = config_of(None, **sections)
    return build_program(config, channels=2, classes=2, mesh=make_mesh(config.mesh), mean=[700, 2400], std=[300, 900])


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    observed = (rng.random((8, 5, 16, 16)) < 0.7).astype(np.uint8)
    observed[0, :, 0, 0] = 0  # never seen
    image = rng.integers(100, 4000, (8, 5, 2, 16, 16)).astype(np.uint16)
    return {"image": image, "observed": observed, "label": rng.integers(0, 2, (8, 16, 16)).astype(np.uint8),
            "day": np.tile(np.array([3, 51, 121, 131, 242], np.uint16), (8, 1))}  # fmt: skip


def test_every_mesh_gives_the_same_step_and_gathers_no_activation() -> None:
    model = {"context": 1, "width": 8, "depth": 1, "pooling": "mean"}
    batch, found = make_batch(), {}
    meshes: dict[str, dict[str, int]] = {"one": {}, "split": {"data": 2, "space": 2, "zero": 1}}
    for name, mesh in meshes.items():
        program = program_of(model=model, mesh=mesh)
        step = make_train_step(program)
        state = program.init(jax.random.key(0))
        if name == "split":
            compiled = step.jitted.lower(state, batch, jax.random.key(1)).compile()
            local = [leaf.shape for leaf in jax.tree.leaves(program.shapes.params)]
            assert activation_gathers(compiled, local) == ()
        state, metrics = step(state, batch, key=jax.random.key(1))
        assert bool(metrics["finite"])
        found[name] = (float(metrics["loss"]), float(metrics["gradient_norm"]))
    for name, (loss, norm) in found.items():
        assert loss == pytest.approx(found["one"][0], rel=1e-5), name
        assert norm == pytest.approx(found["one"][1], rel=1e-4), name


def test_unobserved_dates_say_nothing_and_any_number_of_dates_does() -> None:
    program, batch = program_of(model={"precision": "bfloat16"}), make_batch()
    predict_step, state = make_predict_step(program), program.init(jax.random.key(0))
    first = np.asarray(predict_step(state, batch["image"], observed=batch["observed"], day=batch["day"]))
    changed = np.where(batch["observed"][:, :, None] == 1, batch["image"], 60_000).astype(np.uint16)
    again = np.asarray(predict_step(state, changed, observed=batch["observed"], day=batch["day"]))
    np.testing.assert_array_equal(first, again)
    fewer = predict_step(state, batch["image"][:, :3], observed=batch["observed"][:, :3], day=batch["day"][:, :3])
    assert np.isfinite(np.asarray(fewer)).all()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"dates": 1}}, "learns from several dates"),
        ({"model": {"name": "unet"}}, "other networks from one"),
        ({"model": {"taps": 4}}, "must be odd"),
        ({"data": {"mix": "mixup"}}, "use cutmix or none"),
        ({"data": {"split": {"test_dates": ["2023-01"]}}}, "split by blocks"),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(**sections)


def test_strategies_that_cannot_apply_are_refused(cube: Cube) -> None:
    with pytest.raises(InvalidInput, match=r"mesh.pipe cuts cnn per pixel, resnet and unet, not temporal"):
        program_of(mesh={"pipe": 2, "microbatches": 2})
    config = config_of(cube, data={"dates": 9})
    with pytest.raises(InvalidInput, match="has 5 dates"):
        WindowReader.of(cube, config.data, label_classes(config.data, resolve_target(cube, config.data)))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_a_date_on_which_nothing_was_seen_does_not_count(pooling: str) -> None:
    """Without neighbours that it could take a place from, it may be there or not."""
    program = program_of(model={"pooling": pooling, "taps": 1})
    predict_step, state = make_predict_step(program), program.init(jax.random.key(0))
    # beyond the small start of the scores and the head, so that weights of dates differ
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), state.params)
    state = replace(state, params=params)
    batch = make_batch()
    seen = np.ones_like(batch["observed"][:, :3])
    three = predict_step(state, batch["image"][:, :3], observed=seen, day=batch["day"][:, :3])
    more = np.concatenate([seen, np.zeros_like(batch["observed"][:, 3:])], axis=1)
    five = predict_step(state, batch["image"], observed=more, day=batch["day"])
    assert np.asarray(three).std() > 0.01
    np.testing.assert_allclose(three, five, atol=1e-5)


def test_beside_the_bands_are_what_was_seen_and_the_time_of_the_year() -> None:
    x, observed = jnp.full((1, 1, 1, 3, 2), 5.0), jnp.asarray([[[[1, 0, 1]]]], jnp.uint8)
    day = jnp.asarray([[1, 92, 300]], jnp.uint16)
    angle = 2 * np.pi * np.array([1, 92, 300]) / 365.25
    made = np.asarray(series_of(x, observed, day))[0, 0, 0]
    np.testing.assert_array_equal(made[:, :3], [[5, 5, 1], [5, 5, 0], [5, 5, 1]])
    np.testing.assert_allclose(made[:, 3:], np.stack([np.sin(angle), np.cos(angle)], axis=-1), atol=1e-5)


def test_the_first_and_last_date_have_nothing_beyond_them() -> None:
    x = jnp.arange(1, 9, dtype=jnp.float32).reshape(1, 1, 1, 4, 2)
    made = np.asarray(neighbours(x, 3))[0, 0, 0]
    np.testing.assert_array_equal(
        made, [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 0, 0]]
    )


def test_a_date_on_which_nothing_was_seen_says_nothing_to_its_neighbours() -> None:
    """Of three dates only the first was seen: the time of the third would reach it by way of the second."""
    program = program_of(model={"depth": 2, "taps": 3})
    predict_step, state = make_predict_step(program), program.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), state.params)
    state, batch = replace(state, params=params), make_batch()
    seen = np.zeros_like(batch["observed"][:, :3])
    seen[:, 0] = 1
    answers = []
    for days in ([3, 51, 121], [3, 51, 300], [200, 51, 121]):
        day = np.tile(np.array(days, np.uint16), (8, 1))
        answers.append(np.asarray(predict_step(state, batch["image"][:, :3], observed=seen, day=day)))
    np.testing.assert_array_equal(answers[0], answers[1])
    assert (answers[0] != answers[2]).any(), "the time of the date that was seen counts"
