"""The steps: the same numbers on every mesh, one compilation, and a network that learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.data.arrays import as_images
from jaxtrain.data.augment import augment
from jaxtrain.learn.losses import cross_entropy
from jaxtrain.learn.metrics import ConfusionMatrix
from jaxtrain.learn.step import make_eval_step, make_predict_step, make_train_step
from zarr_store.errors import InvalidInput

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def assert_same_run(got, one):
    np.testing.assert_allclose([m["loss"] for m in got[3]], [m["loss"] for m in one[3]], atol=1e-5)
    for name in ("gradient_norm", "learning_rate", "labelled", "accuracy"):
        np.testing.assert_allclose([m[name] for m in got[3]], [m[name] for m in one[3]], rtol=1e-4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[4]), jax.tree.leaves(one[4]), strict=True):
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), jax.tree_util.keystr(path)
    for tree in ("params", "model_state"):
        for a, b in zip(jax.tree.leaves(getattr(got[1], tree)), jax.tree.leaves(getattr(one[1], tree)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_every_mesh_trains_as_one_device_does(run_of, data, model):
    assert_same_run(run_of(data, model), run_of(1, 1))


def test_one_compilation_for_all_steps(run_of):
    _, state, step, metrics, _ = run_of(4, 2)
    assert step.jitted._cache_size() == 1
    assert int(state.step) == 5
    assert [m["finite"] for m in metrics] == [1.0] * 5
    assert metrics[0]["loss"] == pytest.approx(np.log(4), abs=0.15)


def test_the_state_is_donated_and_keeps_its_place(program_of, batch, run_of):
    program, state, step, _, _ = run_of(2, 4)
    new, _ = step(jax.tree.map(jnp.copy, state), batch, key=jax.random.key(7))
    assert jax.tree.map(lambda leaf: leaf.sharding, new) == program.shardings
    throwaway = jax.device_put(jax.tree.map(np.asarray, new), program.shardings)
    step(throwaway, batch, key=jax.random.key(7))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(throwaway.params))


WEIGHTS = np.array([1, 2, 3, 4], np.float32)


@pytest.fixture(scope="module")
def weighted(program_of):
    program = program_of(
        class_weights=WEIGHTS,
        model={"name": "cnn", "width": 8, "depth": 1},
        data={"cube": "none.zarr", "patch": 32, "augment": False},
        optim={"warmup_steps": 0, "learning_rate": 0.03, "clip_norm": None, "label_smoothing": 0.1},
    )
    return program, make_train_step(program)


def test_gradient_is_of_the_weighted_masked_mean(weighted, batch):
    """The whole step against its parts, written out again."""
    program, step = weighted
    state = program.init(jax.random.key(0))
    x = (as_images(batch["image"]).astype(np.float64) - program.mean) / program.std
    x = jnp.asarray(np.where(batch["observed"][..., None], x, 0), jnp.float32)

    @jax.jit
    def loss_of(params):
        logits, _ = program.apply(params, state.model_state, x, train=True, key=jax.random.key(0))
        return cross_entropy(logits, jnp.asarray(batch["label"]), class_weights=WEIGHTS, label_smoothing=0.1)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    _, metrics = step(state, batch, key=jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert int(metrics["labelled"]) == int((batch["label"] != 255).sum())


def test_dropout_follows_the_key(run_of, batch):
    program, state, step, _, _ = run_of(1, 1)
    losses = []
    for key in (0, 0, 1):
        _, metrics = step(jax.tree.map(jnp.copy, state), batch, key=jax.random.key(key))
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(InvalidInput, match="dropout needs a key"):
        program.apply(state.params, state.model_state, jnp.zeros((1, 32, 32, 3)), train=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_stored_integers_are_turned_inside_the_step(program_of, batch, monkeypatch, wanted):
    seen = []

    def spy(arrays, *, key, **how):
        seen.append([a.dtype for a in arrays])
        return augment(arrays, key=key, **how)

    monkeypatch.setattr("jaxtrain.learn.step.augment", spy)
    program = program_of(data={"cube": "none.zarr", "patch": 32, "augment": wanted})
    jax.eval_shape(make_train_step(program).jitted, program.shapes, batch, jax.random.key(0))
    assert seen == ([[jnp.uint16, jnp.uint8, jnp.bool]] if wanted else [])


def test_a_batch_without_labels_is_zero_loss_not_nan(run_of, batch):
    _, state, step, _, _ = run_of(1, 1)
    empty = {**batch, "label": np.full_like(batch["label"], 255)}
    _, metrics = step(jax.tree.map(jnp.copy, state), empty, key=jax.random.key(0))
    for name, value in {"loss": 0, "gradient_norm": 0, "labelled": 0, "accuracy": 0, "finite": 1}.items():
        assert float(metrics[name]) == value, name


def test_a_step_that_is_not_finite_is_reported_and_changes_nothing(run_of, batch):
    _, state, step, _, _ = run_of(1, 1)
    broken = jax.tree.map(jnp.copy, state)
    broken.params["head"]["bias"] = jnp.full_like(broken.params["head"]["bias"], jnp.inf)
    before = jax.tree.map(np.asarray, broken)
    after, metrics = step(broken, batch, key=jax.random.key(0))
    assert not bool(metrics["finite"])
    assert not np.isfinite(metrics["loss"])
    assert int(after.step) == int(before.step) + 1
    for tree in ("params", "model_state", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, tree), getattr(before, tree))


def test_evaluation_and_prediction_agree_on_every_mesh(run_of, batch):
    reference = None
    for data, model in [(1, 1), (4, 2)]:
        program, state, _, _, _ = run_of(data, model)
        sums = make_eval_step(program)(state, batch)
        probabilities = np.asarray(make_predict_step(program)(state, batch["image"]))
        assert probabilities.shape == (*batch["label"].shape, 4)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
        # evaluation counts what prediction says
        counted = ConfusionMatrix("abcd").update(batch["label"], probabilities.argmax(axis=-1)).counts
        np.testing.assert_array_equal(sums["confusion"], counted)
        labelled = batch["label"] != 255
        p = np.take_along_axis(probabilities, np.where(labelled, batch["label"], 0)[..., None], axis=-1)[..., 0]
        assert float(sums["loss_sum"]) == pytest.approx(-np.log(p[labelled]).sum(), rel=1e-4)
        assert int(sums["labelled"]) == labelled.sum()
        reference = reference if reference is not None else probabilities
        np.testing.assert_allclose(probabilities, reference, atol=1e-5)


def test_unobserved_pixels_count_as_the_mean_whatever_they_hold(run_of, batch):
    program, state, _, _, _ = run_of(1, 1)
    predict = make_predict_step(program)
    hidden = ~batch["observed"]
    noisy = batch["image"].copy()
    as_images(noisy)[hidden] = 60000
    given = predict(state, noisy, observed=batch["observed"])
    np.testing.assert_array_equal(given, predict(state, batch["image"]))  # 0 in all bands says it by itself
    assert (np.asarray(predict(state, noisy)) != np.asarray(given)).any()


def test_floating_images_with_nan_are_read_as_unobserved(run_of, batch):
    """Backscatter is float32, with nan where nothing was observed."""
    program, state, _, _, _ = run_of(1, 1)
    predict = make_predict_step(program)
    image = batch["image"].astype(np.float32)
    as_images(image)[~batch["observed"]] = np.nan
    np.testing.assert_allclose(predict(state, image), predict(state, batch["image"]), atol=1e-6)


def test_statistics_and_weights_are_checked(program_of):
    for weights, message in ([1, 2], r"class_weights must be 4 finite numbers"), ([1, 1, 1, -1], "must be positive"):
        with pytest.raises(InvalidInput, match=message):
            program_of(class_weights=weights)


def learn(program, step, state, batch):
    for index in range(40):
        state, metrics = step(state, batch, key=jax.random.key(index))
    return state, {name: float(value) for name, value in metrics.items()}


def test_the_unet_learns_with_augmentation_and_dropout(run_of, batch):
    program, start, step, first, _ = run_of(1, 1)
    state, metrics = learn(program, step, jax.tree.map(jnp.copy, start), batch)
    assert metrics["loss"] < 0.15 < first[0]["loss"]
    assert metrics["accuracy"] > 0.95
    evaluated = make_eval_step(program)(state, batch)
    assert ConfusionMatrix("abcd", evaluated["confusion"]).miou > 0.9


def test_the_cnn_learns(weighted, batch):
    program, step = weighted
    _, metrics = learn(program, step, program.init(jax.random.key(0)), batch)
    assert metrics["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("mesh", "remat"), [((2, {"zero": 3}), False), ((1, {}), True), ((2, {"zero": 3}), True), ((4, {"zero": 1}), True)]
)
def test_dropout_draws_the_same_where_the_forward_pass_is_computed_again(program_of, batch, mesh, remat):
    data, more = mesh
    model = {"width": 8, "depth": 1, "dropout": 0.3}
    found = []
    for program in (program_of(model=model), program_of(model=model | {"remat": remat}, mesh={"data": data, **more})):
        _, row = make_train_step(program)(program.init(jax.random.key(0)), batch, key=jax.random.key(1))
        found.append((float(row["loss"]), float(row["gradient_norm"])))
        assert bool(row["finite"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
