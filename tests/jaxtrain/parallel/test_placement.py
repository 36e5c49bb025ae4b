"""Every placement of a network with branches gives the answer of one device, and branches compute at the same time."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

from jaxtrain.learn.step import make_eval_step
from jaxtrain.parallel.schedule import Work, trace
from jaxtrain.runs.checkpoint import CheckpointStore, target_of
from zarr_store.errors import InvalidInput

from .parity import Outcome, assert_same, make_program, mesh_of, model_of, of_one_device, put, train

LATE, MIDDLE = "multimodal", "multimodal group middle"


@cache
def apart() -> Outcome:
    """Branches on two groups, the fusion on a third; two microbatches, one branch in two parts, two replicas."""
    return train(make_program(mesh_of("groups=s2.1,s1/s2.2/fusion data=2 microbatches=2"), model_of(LATE)))


def test_a_placement_trains_as_one_device_does():
    assert_same(apart(), of_one_device(LATE))


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        ("groups=s2,fusion/s1 model=2", "multimodal batch"),
        ("pipe=2 microbatches=2", MIDDLE),
        ("data=2 zero=3", LATE),
        ("groups=s2,fusion/s1 data=2 zero=1", LATE),
        ("groups=s2,fusion/s1 data=2 microbatches=2", "multimodal group late 0.5"),
    ],
)
def test_hybrids_and_stages_train_as_one_device_does(mesh, model):
    """Also with a norm over the batch, all levels of encoders handed over, ZeRO, and each modality asked alone."""
    assert_same(train(make_program(mesh_of(mesh), model_of(model))), of_one_device(model))


def test_each_part_lies_on_its_group_and_branches_run_at_once():
    pipeline, layout = apart().step.jitted.__self__, apart().program.layout
    assert [(part.name, part.group) for part in layout.parts] == [("s2.1", 0), ("s2.2", 1), ("s1", 0), ("fusion", 2)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(apart().state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.sharding.device_set == set(layout.mesh(layout.owner[name]).devices.flat)
    assert pipeline.log == pipeline.walk
    found = {interval.work: interval for interval in trace(pipeline.orders, chunks=4, after=layout.after)}
    one, other = found[Work("forward", 1, 0)], found[Work("forward", 2, 0)]
    assert one.start < other.end
    assert other.start < one.end


def test_it_scores_as_one_device_does():
    sums = [make_eval_step(run.program)(run.state, put(run.program)) for run in (apart(), of_one_device(LATE))]
    np.testing.assert_allclose(sums[0]["loss_sum"], sums[1]["loss_sum"], rtol=1e-4)
    assert int(sums[0]["labelled"]) == int(sums[1]["labelled"])


def test_a_checkpoint_of_one_placement_opens_in_another(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(10, apart().state, {})
    other = make_program(mesh_of("groups=s2/s1,fusion"), model_of(LATE))
    for program in of_one_device(LATE).program, other:
        restored = store.restore(target_of(program))
        for got, saved in zip(jax.tree.leaves(restored.state), jax.tree.leaves(apart().state), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(saved))


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ("groups=s2,fusion/s3", LATE, "names 's3', which this network does not have: its branches are s2, s1"),
        ("groups=s2.1,s2.2,s2.3,s2.4,s2.5,s2.6,s2.7,s2.8,s2.9/s1,fusion", LATE, "cuts the branch s2 into 9 parts, but"),
        ("pipe=2 schedule=interleaved", LATE, "'interleaved' is for a network without branches"),
        ("groups=s2,fusion/s1 data=8 microbatches=1", LATE, "needs 16 devices, JAX sees 8"),
        ("groups=s2,fusion/s1", "unet", "model.name = 'unet' has no branches"),
    ],
)
def test_placements_that_cannot_be_are_refused_in_one_line(mesh, model, message):
    with pytest.raises(InvalidInput) as caught:
        make_program(mesh_of(mesh), model_of(model))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
