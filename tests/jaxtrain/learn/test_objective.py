"""Losses of all tasks against numpy, counts of calibration, several classes and values, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import OptimConfig
from jaxtrain.data.task import Task
from jaxtrain.learn.losses import binary_terms, cross_entropy_terms, dice_terms, huber_terms, square_terms
from jaxtrain.learn.metrics import ConfusionMatrix, SeveralCounts, ValueErrors
from jaxtrain.learn.objective import BINS, Objective
from zarr_store.errors import InvalidInput


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (6, 4, 5, 3)).astype(np.float32)
    return logits, rng.choice(np.array([0, 1, 2, 255], np.uint8), (6, 4, 5))


def softmax(logits):
    e = np.exp(logits.astype(np.float64))
    return e / e.sum(axis=-1, keepdims=True)


def test_focal_loss_is_its_formula_and_cross_entropy_at_zero(scores):
    logits, label = scores
    p = np.take_along_axis(softmax(logits), np.minimum(label, 2)[..., None].astype(int), -1)[..., 0][label < 255]
    got = cross_entropy_terms(jnp.asarray(logits), jnp.asarray(label), focal_gamma=2.0)
    assert float(got.loss) == pytest.approx((-((1 - p) ** 2) * np.log(p)).sum(), rel=1e-5)
    plain = cross_entropy_terms(jnp.asarray(logits), jnp.asarray(label))
    assert float(plain.loss) == pytest.approx(-np.log(p).sum(), rel=1e-5)
    # a sure right answer has no power to differentiate
    sure = jnp.array([[[[90.0, 0, 0]]]])
    slope = jax.grad(lambda x: cross_entropy_terms(x, jnp.zeros((1, 1, 1), jnp.uint8), focal_gamma=0.5).loss)(sure)
    assert np.isfinite(slope).all()


def test_dice_loss_is_one_minus_the_mean_overlap(scores):
    logits, label = scores
    labelled = label < 255
    p, overlaps = softmax(logits)[labelled], []
    for k in range(3):
        t = label[labelled] == k
        overlaps.append(2 * p[t, k].sum() / (p[:, k].sum() + t.sum()))
    assert float(dice_terms(jnp.asarray(logits), jnp.asarray(label)).mean()) == pytest.approx(
        1 - np.mean(overlaps), rel=1e-5
    )
    objective = Objective(Task(), OptimConfig(loss="dice"))
    both = float(objective.terms(jnp.asarray(logits), jnp.asarray(label)).mean())
    plain = float(cross_entropy_terms(jnp.asarray(logits), jnp.asarray(label)).mean())
    assert both == pytest.approx(plain + 1 - np.mean(overlaps), rel=1e-5)


def test_several_classes_cost_the_binary_cross_entropy_of_each():
    logits = np.array([[2.0, -1, 0.5], [0, 3, -2]], np.float32)
    label = np.array([[1, 0, 255], [1, 1, 0]], np.uint8)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    known = label < 255
    losses = -np.where(label == 1, np.log(p), np.log(1 - p))
    terms = binary_terms(jnp.asarray(logits), jnp.asarray(label))
    assert float(terms.mean()) == pytest.approx(losses[known].mean(), rel=1e-6)
    assert int(terms.labelled) == 5
    weighted = binary_terms(jnp.asarray(logits), jnp.asarray(label), class_weights=np.array([4, 1, 1], np.float32))
    factor = np.where((label == 1) & (np.arange(3) == 0), 4, 1)
    assert float(weighted.mean()) == pytest.approx((losses * factor)[known].sum() / factor[known].sum(), rel=1e-6)
    sums = Objective(Task(per_image=True, several=True), OptimConfig()).sums(jnp.asarray(logits), jnp.asarray(label))
    scores = SeveralCounts(["a", "b", "c"]).add_sums(sums).to_dict()
    # yes where the logit is above 0: a is right once and missed once, b is right twice, c was rightly not said
    assert scores["accuracy"] == pytest.approx(4 / 5)
    assert scores["per_class"]["a"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "iou": 0.5,
        "support": 2,
    }
    assert scores["micro_f1"] == pytest.approx(4 / 5)  # two hits, one miss


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_binary_loss_is_its_formula(gamma: float, smoothing: float) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (6, 3))
    label = rng.choice(np.array([0, 1, 255], np.uint8), (6, 3))
    p, labelled = 1 / (1 + np.exp(-logits)), label <= 1
    target = np.where(label == 1, 1 - smoothing / 2, smoothing / 2)
    entropy = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    missed = np.where(label == 1, 1 - p, p)
    terms = binary_terms(jnp.asarray(logits, jnp.float32), jnp.asarray(label), label_smoothing=smoothing,
                         focal_gamma=gamma)  # fmt: skip
    assert 0 < labelled.sum() < labelled.size
    assert float(terms.loss) == pytest.approx((entropy * missed**gamma)[labelled].sum(), rel=1e-5)
    assert int(terms.labelled) == labelled.sum()


def test_a_class_that_does_not_occur_has_no_share_in_the_dice_loss() -> None:
    logits = jnp.zeros((1, 2, 2, 3), jnp.float32)
    label = jnp.asarray([[[0, 0], [1, 255]]], jnp.uint8)
    # p is a third everywhere: overlaps 2 (2/3) / (1 + 2) of class 0, 2 (1/3) / (1 + 1) of class 1, none of class 2
    assert float(dice_terms(logits, label).mean()) == pytest.approx(1 - (4 / 9 + 1 / 3) / 2, rel=1e-6)


def test_huber_is_square_then_straight_and_leaves_nan_out():
    value, target = jnp.array([0.5, 3.0, 9.0]), jnp.array([0.0, 0.0, jnp.nan])
    terms = huber_terms(value, target, delta=1.0)
    assert float(terms.loss) == pytest.approx(0.5 * 0.25 + 2.5)
    assert int(terms.labelled) == 2
    slope = jax.grad(lambda v: huber_terms(v, target, delta=1.0).loss)(value)
    np.testing.assert_allclose(slope, [0.5, 1.0, 0.0])


def test_the_squared_error_grows_with_the_square_and_leaves_nan_out() -> None:
    value, target = jnp.array([0.5, 3.0, 9.0]), jnp.array([0.0, 1.0, jnp.nan])
    terms = square_terms(value, target)
    assert (float(terms.loss), int(terms.labelled)) == (0.25 + 4.0, 2)
    np.testing.assert_allclose(jax.grad(lambda v: square_terms(v, target).loss)(value), [1.0, 4.0, 0.0])


def test_errors_of_values_are_in_their_own_unit():
    rng = np.random.default_rng(0)
    truth = rng.normal(50, 10, (4, 8, 8)).astype(np.float32)
    truth[0, 0] = np.nan
    guess = truth + rng.normal(1, 3, truth.shape).astype(np.float32)
    guess[0, 0] = 7
    objective = Objective(Task(value=(48.0, 11.0)), OptimConfig(loss="huber"))
    logits = ((guess - 48) / 11)[..., None]
    scores = ValueErrors().add_sums(objective.sums(jnp.asarray(logits), jnp.asarray(truth))).to_dict()
    known = np.isfinite(truth)
    error = (guess - truth)[known].astype(float)
    assert scores["pixels"] == known.sum()
    assert scores["bias"] == pytest.approx(error.mean(), rel=1e-3)
    assert scores["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert scores["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    assert scores["r2"] == pytest.approx(
        1 - (error**2).sum() / ((truth[known] - truth[known].mean()) ** 2).sum(), rel=1e-3
    )
    np.testing.assert_allclose(objective.answer(jnp.asarray(logits))[..., 0], guess, rtol=1e-5)


def test_calibration_error_against_a_loop(scores):
    logits, label = scores
    sums = Objective(Task(), OptimConfig()).sums(jnp.asarray(logits), jnp.asarray(label))
    matrix = ConfusionMatrix(["a", "b", "c"]).add_sums(jax.device_get(sums))
    p, labelled = softmax(logits), label < 255
    confidence, hit = p.max(axis=-1)[labelled], (p.argmax(axis=-1) == label)[labelled]
    expected = 0.0
    for i in range(BINS):
        inside = np.minimum((confidence * BINS).astype(int), BINS - 1) == i
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert matrix.calibration_error == pytest.approx(expected, abs=1e-5)
    # the error itself may come out the same from a single bin: each bin must hold what falls into it
    counted = np.zeros((BINS, 3))
    for value, right in zip(confidence, hit, strict=True):
        counted[min(int(value * BINS), BINS - 1)] += (1, value, right)
    assert np.count_nonzero(counted[:, 0]) > 5
    assert matrix.calibration is not None
    np.testing.assert_allclose(matrix.calibration, counted, rtol=1e-4)
    recall = [(p.argmax(-1) == k)[label == k].mean() for k in range(3)]
    assert matrix.average_accuracy == pytest.approx(np.mean(recall))


def test_a_loss_that_is_not_for_the_task_is_refused():
    with pytest.raises(InvalidInput, match=r"'huber', but classes are learned: choose cross_entropy, focal or dice"):
        Objective(Task(), OptimConfig(loss="huber"))
    with pytest.raises(InvalidInput, match=r"values are learned: choose huber"):
        Objective(Task(value=(0.0, 1.0)), OptimConfig())
    with pytest.raises(InvalidInput, match=r"'dice' is for one class"):
        Objective(Task(several=True), OptimConfig(loss="dice"))
