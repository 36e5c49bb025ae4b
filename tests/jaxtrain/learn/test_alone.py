"""The loss of a training step that also asks each modality alone (`model.alone`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxtrain.config import ModelConfig, OptimConfig
from jaxtrain.data.task import Task
from jaxtrain.learn.modalities import prepare_modalities
from jaxtrain.learn.objective import Objective
from jaxtrain.learn.state import Program
from tests.jaxtrain.parallel.parity import MULTIMODAL, by_modality, make_batch, make_program

ALONE = 0.4


@pytest.fixture(scope="module")
def program() -> Program:
    made = make_program({}, MULTIMODAL | {"alone": ALONE})
    data = made.config.data.model_copy(update={"modality_dropout": 0.0})
    return replace(made, config=made.config.model_copy(update={"data": data}))


def test_a_label_is_asked_of_a_modality_where_that_saw_the_pixel(program: Program) -> None:
    batch = by_modality(make_batch())
    batch["observed_s2"] = batch["observed_s2"] * (np.arange(16) < 5).astype(np.uint8)  # a part of the columns
    batch["observed_s1"] = batch["observed_s1"].copy()
    batch["observed_s1"][:2] = 0
    _, labels = prepare_modalities(program, batch, jax.random.key(0), program.mesh)
    assert [float(share) for _, share in labels] == pytest.approx([1 - ALONE, ALONE / 2, ALONE / 2])
    known = batch["label"] < 255
    # windows are turned on the way, and keep their pixels
    wanted = [known, known & (batch["observed_s2"] == 1), known & (batch["observed_s1"] == 1)]
    assert [int((label < 255).sum()) for label, _ in labels] == [int(one.sum()) for one in wanted]
    whole, *others = (np.asarray(label) for label, _ in labels)
    assert all((other[other < 255] == whole[other < 255]).all() for other in others)


@pytest.mark.parametrize("answers", [1, 3])
def test_the_loss_is_one_mean_over_the_shares_of_all_answers(answers: int) -> None:
    """A mean of means would not add up over the parts of a batch."""
    rng = np.random.default_rng(0)
    views = rng.normal(size=(2, answers, 4, 4, 5)).astype(np.float32)
    several = [rng.choice([0, 3, 255], (2, 4, 4), p=[0.3, p, 0.7 - p]).astype(np.uint8) for p in (0.6, 0.1, 0.3)]
    shares = (0.5, 0.3, 0.2)
    objective = Objective(Task(), OptimConfig())

    def sums(part: slice) -> Any:
        logits = jnp.asarray(views[part].reshape(-1, 4, 4, 5))
        return objective.blend(
            logits, [(jnp.asarray(one[part]), jnp.float32(s)) for one, s in zip(several, shares, strict=True)]
        )

    found, parts = sums(slice(None)), [sums(slice(i, i + 1)) for i in range(2)]
    loss = weight = 0.0
    for number, (label, share) in enumerate(zip(several, shares, strict=True)):
        own = objective.terms(jnp.asarray(views[:, number % answers]), jnp.asarray(label))
        loss, weight = loss + share * float(own.loss), weight + share * float((label < 255).sum())
    assert float(found.mean()) == pytest.approx(loss / weight, rel=1e-5)
    assert float(sum(one.loss for one in parts)) == pytest.approx(float(found.loss), rel=1e-5)
    assert float(sum(one.weight for one in parts)) == pytest.approx(float(found.weight), rel=1e-5)
    assert int(found.labelled) == (several[0] < 255).sum()


@pytest.mark.parametrize("norm", ["batch", "local"])
def test_statistics_of_batches_do_not_fit_views_of_one_modality(norm: str) -> None:
    with pytest.raises(ValidationError, match="use norm = 'group', or alone = 0"):
        ModelConfig.model_validate({"name": "multimodal", "alone": 0.5, "norm": norm})
    assert ModelConfig.model_validate({"name": "multimodal", "norm": norm}).alone == 0
