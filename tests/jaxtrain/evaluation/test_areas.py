"""Areas of classes with confidence intervals, against the worked example of Olofsson et al. (2014)."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtrain.evaluation.areas import estimate_areas
from zarr_store.errors import InvalidInput

# Table 8 of the paper, rows are the map: deforestation, forest gain, stable forest, stable non-forest; pixels of 30 m
BY_MAP = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000])
NAMES = ("deforestation", "forest gain", "stable forest", "stable non-forest")


def test_the_papers_areas_and_accuracies() -> None:
    made = estimate_areas(BY_MAP.T, PIXELS * 900 / 10_000, NAMES)
    assert made.area.round().tolist() == [21_158, 11_686, 285_770, 581_386]  # hectares
    assert np.abs(made.half_width - [6_158, 3_756, 15_510, 16_282]).max() < 1
    assert made.users.round(2).tolist() == [0.88, 0.73, 0.93, 0.96]
    assert (1.96 * made.users_se).round(2).tolist() == [0.07, 0.10, 0.04, 0.02]
    assert made.producers.round(2).tolist() == [0.75, 0.85, 0.93, 0.96]
    assert round(1.96 * made.producers_se[0], 2) == 0.21
    assert (round(made.overall, 2), round(1.96 * made.overall_se, 2)) == (0.95, 0.02)
    deforestation = estimate_areas(BY_MAP.T, PIXELS, NAMES)
    assert (round(deforestation.area[0]), round(1.96 * deforestation.area_se[0])) == (235_086, 68_418)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """With enough samples; where two of 325 samples show an omission, a normal interval is too narrow."""
    rng = np.random.default_rng(7)
    truth = BY_MAP / BY_MAP.sum(axis=1, keepdims=True)
    weight = PIXELS / PIXELS.sum()
    real = weight @ truth
    real_producers = np.diagonal(truth) * weight / real
    hits = np.zeros((2, 4))
    for _ in range(400):
        drawn = np.stack([rng.multinomial(20 * n, share) for n, share in zip((75, 75, 165, 325), truth, strict=True)])
        made = estimate_areas(drawn.T, weight)
        hits[0] += np.abs(made.area - real) <= made.half_width
        hits[1] += np.abs(made.producers - real_producers) <= 1.96 * made.producers_se
    assert ((hits > 0.92 * 400) & (hits < 0.98 * 400)).all(), hits / 400


def test_what_has_no_estimate() -> None:
    untested = estimate_areas([[5, 0], [2, 0]], [3.0, 4.0], ["a", "b"])
    assert untested.untested == ("b",)
    document = untested.to_dict()
    assert document["classes"]["a"]["area_ha"] is None
    assert document["classes"]["a"]["users_accuracy"] == pytest.approx(5 / 7, abs=1e-6)
    assert document["classes"]["b"]["users_accuracy"] is None
    absent = estimate_areas([[5, 0], [2, 0]], [3.0, 0.0], ["a", "b"])  # the map has no b, so it needs no sample
    assert absent.untested == ()
    assert absent.area.sum() == pytest.approx(3.0)
    with pytest.raises(InvalidInput, match="2 × 2 classes"):
        estimate_areas(BY_MAP, [1.0, 2.0])
    with pytest.raises(InvalidInput, match="must have some area"):
        estimate_areas([[1]], [0.0])
