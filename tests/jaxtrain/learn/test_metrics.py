"""Scores against sets of pixels, counted one by one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.learn.metrics import ConfusionMatrix
from zarr_store.errors import InvalidInput

NAMES = ["a", "b", "c"]
PAIRS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 255]), st.integers(0, 2)), max_size=40)


def same(got: float, expected: float | None) -> bool:
    return math.isnan(got) if expected is None else got == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(1, 40))
def test_scores_equal_brute_force(pairs, cut):
    matrix = ConfusionMatrix(NAMES)
    for part in (pairs[:cut], pairs[cut:]):  # streaming does not change anything
        matrix.update(np.array([t for t, _ in part], np.uint8), np.array([p for _, p in part], np.uint8))
    pixels = [(t, p) for t, p in pairs if t != 255]
    assert matrix.total == len(pixels)
    ious, f1s = [], []
    for k, name in enumerate(NAMES):
        truth = {i for i, (t, _) in enumerate(pixels) if t == k}
        guess = {i for i, (_, p) in enumerate(pixels) if p == k}
        precision = len(truth & guess) / len(guess) if guess else None
        recall = len(truth & guess) / len(truth) if truth else None
        iou = len(truth & guess) / len(truth | guess) if truth | guess else None
        f1 = 2 * len(truth & guess) / (len(truth) + len(guess)) if truth or guess else None
        row = matrix.per_class()[name]
        assert row["support"] == len(truth)
        for score, expected in (("precision", precision), ("recall", recall), ("iou", iou), ("f1", f1)):
            assert row[score] == (None if expected is None else pytest.approx(expected))
        ious += [] if iou is None else [iou]
        f1s += [] if f1 is None else [f1]
    assert same(matrix.miou, sum(ious) / len(ious) if ious else None)
    assert same(matrix.macro_f1, sum(f1s) / len(f1s) if f1s else None)
    right = sum(t == p for t, p in pixels)
    assert same(matrix.accuracy, right / len(pixels) if pixels else None)
    assert same(matrix.kappa, brute_kappa(pixels))
    json.dumps(matrix.to_dict(), allow_nan=False)


def brute_kappa(pixels):
    n = len(pixels)
    chance = sum(t == p for t, _ in pixels for _, p in pixels) / n**2 if n else 1
    return None if chance == 1 else (sum(t == p for t, p in pixels) / n - chance) / (1 - chance)


def test_rows_are_truth():
    matrix = ConfusionMatrix(NAMES).update([0, 0, 2], [1, 1, 2])
    assert matrix.counts.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert ConfusionMatrix(NAMES, matrix.counts).add(matrix.counts).counts[0, 1] == 4


def test_counts_beyond_float32_are_exact():
    matrix = ConfusionMatrix(["a", "b"])
    step = np.array([[2**24 + 1, 0], [1, 0]], np.int32)
    for _ in range(300):
        matrix.add(step)
    assert matrix.counts[0, 0] == 300 * (2**24 + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add(np.zeros((2, 2), int)), r"shape \(3, 3\)"),
        (lambda m: m.add(np.zeros((3, 3))), "integer confusion matrix"),
        (lambda m: m.update([0, 1], [0]), "same shape"),
        (lambda m: m.update([0], [3]), r"class indices 0 … 2, got 3"),
    ],
)
def test_what_is_no_count_is_refused(call, message):
    matrix = ConfusionMatrix(NAMES)
    with pytest.raises(InvalidInput, match=message):
        call(matrix)
    assert matrix.total == 0
