"""Scores are those that a slow count over every pixel of the test blocks gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import evaluate, load_run, train
from jaxtrain.data.batches import BatchStream
from jaxtrain.data.splits import PARTS, Split
from jaxtrain.evaluation.own_data import open_own
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.learn.step import make_predict_step
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.evaluations import write_evaluation
from jaxtrain.runs.rundir import load_card
from zarr_store.errors import IntegrityError, InvalidInput, NothingFound, UnknownName
from zarr_store.read import open_cube
from zarr_store.regions import Region

from ..cube_factory import COLLECTION, make_cube, shared_cube, shared_run, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_run(), tmp_path / "run"))


def count_by_hand(run: Path, part: str) -> tuple[np.ndarray, int, float]:
    """Confusion matrix, windows and mean -log p by walking over every patch of the grid, one at a time."""
    card = load_card(run)
    assert isinstance(card.split, Split)
    program, state, _, _ = restore_model(run, card)
    predict = make_predict_step(program)
    cube = open_cube(card.cube)
    times, height, width = cube.spec(COLLECTION).shape
    matrix, windows, losses = np.zeros((3, 3), int), 0, []
    for t in range(times):
        for y in range(0, height - 31, 32):
            for x in range(0, width - 31, 32):
                block = card.split.parts[y // card.split.block[0], x // card.split.block[1]]
                box = Region(t, t + 1, y, y + 32, x, x + 32)
                status, scl = cube.read(COLLECTION, "status", box)[0], cube.read(COLLECTION, "scl", box)[0]
                good = (status == 1) & np.isin(scl, (4, 5, 6))
                if block != PARTS.index(part) or good.mean() < 0.25:
                    continue
                windows += 1
                image = cube.read(COLLECTION, "reflectance", box)
                p = np.asarray(predict(state, image, observed=(status == 1)[None]))[0]
                truth = scl[good].astype(int) - 4
                np.add.at(matrix, (truth, p[good].argmax(-1)), 1)
                losses += (-np.log(p[good][np.arange(len(truth)), truth])).tolist()
    return matrix, windows, float(np.mean(losses))


@pytest.mark.parametrize("part", ["test", "validation"])
def test_scores_equal_a_count_by_hand(run: Path, part: str) -> None:
    result = evaluate(run, split=part).to_dict()
    matrix, windows, loss = count_by_hand(run, part)
    assert windows
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["samples"] == windows
    assert result["pixels"] == matrix.sum()
    assert result["accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum(), rel=1e-12)
    assert result["loss"] == pytest.approx(loss, rel=1e-4)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    assert result["miou"] == pytest.approx(np.mean((np.diag(matrix) / np.maximum(union, 1))[union > 0]), rel=1e-12)


def test_the_result_keeps_the_contract_and_is_written(run: Path) -> None:
    progress: list[tuple[int, int]] = []
    result = evaluate(run, on_batch=lambda done, total: progress.append((done, total))).to_dict()
    wanted = {"accuracy", "macro_f1", "miou", "per_class", "confusion_matrix", "classes", "samples", "seconds", "split"}
    assert wanted <= set(result)
    assert (result["split"], result["step"], result["warnings"]) == ("test", 12, [])
    assert result["classes"] == ["vegetation", "not vegetated", "water"]
    assert json.loads((run / "evaluation.json").read_bytes()) == json.loads(json.dumps(result))
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
    html = (run / "report.html").read_text()
    assert "Confusion matrix" in html
    assert f"{result['accuracy']:.3f}" in html


def test_another_cube_is_scored_as_a_whole(run: Path, tmp_path: Path) -> None:
    other = make_cube(tmp_path / "other.zarr", shape=(1, 96, 96), seed=5, masked=False)
    result = evaluate(run, data=other.url).to_dict()
    assert (result["split"], result["samples"], result["pixels"]) == ("all", 9, 96 * 96)
    assert any("overlaps the ground that the model was trained on" in text for text in result["warnings"])


@pytest.mark.parametrize("shuffle", ["windows", "chunks"])
def test_test_blocks_were_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: str) -> None:
    """Every sample that the order hands to a step, over whole epochs, lies in a training block; and all of those do."""
    seen: list[np.ndarray] = []
    real = BatchStream._begin

    def note(self: BatchStream, rows: np.ndarray) -> Any:
        if self._order is not None:  # validation reads its windows without one
            seen.append(rows.copy())
        return real(self, rows)

    monkeypatch.setattr(BatchStream, "_begin", note)
    steps = 16
    train(tiny_config(shared_cube(), run={"steps": steps, "shuffle": shuffle}), tmp_path / "run")
    card = load_card(tmp_path / "run")
    assert isinstance(card.split, Split)
    assert card.split.counts()["test"] > 0
    assert card.windows["train"] + card.windows["validation"] + card.windows["test"] == 60
    rows = np.concatenate(seen)
    assert len(rows) == steps * 8 >= 2 * card.windows["train"], "the steps of two epochs and more"
    codes = card.split.part_at(rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64))
    assert set(codes.tolist()) == {PARTS.index("train")}
    assert len(np.unique(rows, axis=0)) == card.windows["train"], "none of the others, and none left out"


def test_damage_and_absence_are_said(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/00000012/contents.json").write_text("{}")
    result = evaluate(run).to_dict()
    assert result["step"] == 10
    assert "00000012 is damaged and was passed over" in result["warnings"][0]
    for step in CheckpointStore(run / "checkpoints").steps():
        (run / f"checkpoints/{step:08d}/contents.json").write_text("{}")
    with pytest.raises(IntegrityError, match="are damaged"):
        evaluate(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(NothingFound, match="no checkpoint yet"):
        evaluate(run)
    with pytest.raises(UnknownName, match="did you mean 'test'"):
        evaluate(run, split="tset")
    with pytest.raises(InvalidInput, match=r"is not a training run: expected model\.json"):
        evaluate(tmp_path / "nowhere")
    (run / "model.json").write_text("{")
    with pytest.raises(IntegrityError, match="is damaged or of another release"):
        evaluate(run)


def test_a_run_of_many_devices_is_scored_on_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mesh of the run does not fit this machine: the numbers are the same."""
    expected = evaluate(run).to_dict()["confusion_matrix"]
    data = json.loads((run / "model.json").read_bytes())
    data["config"]["mesh"] = {"data": 16, "model": 1, "rules": []}
    data["config"]["run"]["batch_size"] = 16
    (run / "model.json").write_text(json.dumps(data))
    assert jax.device_count() == 8
    assert evaluate(run).to_dict()["confusion_matrix"] == expected


def test_the_cube_of_the_run_is_needed(run: Path, tmp_path: Path) -> None:
    data = json.loads((run / "model.json").read_bytes())
    data["cube"]["path"] = str(tmp_path / "gone.zarr")
    (run / "model.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match=r"gone\.zarr does not exist"):
        evaluate(run)
    assert evaluate(run, data=shared_cube()).split == "test", "the same digest: the split of the run holds"


def test_data_that_moved_with_the_run_are_found_by_their_digest(tmp_path: Path) -> None:
    before = evaluate(shared_run()).to_dict()
    old, run, cube = tmp_path / "old/data/cube.zarr", tmp_path / "new/runs/a", tmp_path / "new/data/cube.zarr"
    shutil.copytree(shared_run(), run)
    shutil.copytree(shared_cube(), cube)
    card = run / "model.json"
    card.write_text(card.read_text().replace(str(shared_cube()), str(old)))
    config = load_card(run).config
    assert config.data.cube == load_card(run).cube == str(old), "as if run and cube had been made there"

    moved = evaluate(run, data=cube).to_dict()
    kept = ("split", "samples", "pixels", "confusion_matrix", "own_data")
    assert {name: moved[name] for name in kept} == {name: before[name] for name in kept}
    assert moved["warnings"] == [], "held-out ground is still held out"
    assert open_own(load_card(run), run).url == str(cube), "without --data, too"
    assert train(config, run).steps == 12, "the configuration of the run still names the old place"

    make_cube(old, shape=(1, 96, 96), seed=5, masked=False)
    assert open_own(load_card(run), run).url == str(cube), "another cube at the old place is not the run's own"
    shutil.rmtree(cube)
    shutil.rmtree(old)
    with pytest.raises(InvalidInput, match=r"cube\.zarr does not exist.*say where they are: --data PATH"):
        evaluate(run)


def test_other_data_stand_beside_the_scores_of_the_run(run: Path, tmp_path: Path) -> None:
    own = evaluate(run).to_dict()
    other = make_cube(tmp_path / "other.zarr", shape=(3, 96, 96), seed=5, masked=False)
    report = evaluate(run, data=other.url)
    assert not report.own_data
    assert json.loads((run / "evaluation.json").read_bytes()) == json.loads(json.dumps(own)), "as it was"
    html = (run / "report.html").read_text()
    assert f"<b>{own['accuracy']:.3f}</b>" in html, "the run's own score heads the report"
    assert f"<td>{other.url}</td><td>all</td>" in html
    assert f"<td>{report.accuracy:.4f}</td>" in html
    assert f"Examples of {other.url}" in html
    assert "Worst tiles" in html
    assert "model of step 12.\nNone of this ground was in training.</p>" in html

    write_evaluation(run, {**own, "split": "validation"}, own=True)
    write_evaluation(run, report.to_dict(), own=False)
    loaded = load_run(run)
    assert loaded.evaluation() == own
    assert [(one["split"], one["cube"]) for one in loaded.evaluations()] == [
        ("test", str(shared_cube())), ("validation", str(shared_cube())), ("all", other.url),
    ], "each once"  # fmt: skip

    # an earlier release wrote all scores to one file
    for path in run.glob("evaluation*.json"):
        path.unlink()
    before = {name: value for name, value in report.to_dict().items() if name not in ("own_data", "unit")}
    (run / "evaluation.json").write_text(json.dumps(before))
    assert loaded.evaluation() is None, "other data are no score of the run"
    write_evaluation(run, own, own=True)
    assert [one["split"] for one in loaded.evaluations()] == ["test", "all"]


def test_a_part_that_the_split_lacks_is_named(run: Path) -> None:
    card = run / "model.json"
    document = json.loads(card.read_text())
    document["config"]["data"]["split"]["test"] = 0.0
    document["split"] = json.loads(json.dumps(document["split"]).replace("2", "0"))
    card.write_text(json.dumps(document))
    with pytest.raises(NothingFound, match=r"data\.split\.test = 0\): evaluate another part with --split"):
        evaluate(run)


def test_a_run_that_names_a_bucket_opens_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS X06: a run may come from somebody else."""
    there = load_card(run).cube
    card = run / "model.json"
    document = json.loads(card.read_text())
    document["cube"]["path"] = "s3://of-a-stranger/cube.zarr"
    card.write_text(json.dumps(document))
    opened: list[str] = []
    asked: list[str] = []

    def open_instead(url: str) -> object:
        opened.append(str(url))
        return open_cube(there)

    monkeypatch.setattr("jaxtrain.data.opening.open_cube", open_instead)

    def ask(url: str) -> bool:
        asked.append(str(url))
        return False

    monkeypatch.setattr("jaxtrain.data.opening.is_sample_store", ask)
    with pytest.raises(InvalidInput, match="--data s3://of-a-stranger/cube"):
        evaluate(run)
    assert opened == asked == []
    assert evaluate(run, data="s3://of-a-stranger/cube.zarr").split == "test", "typed, it is the run's own"
    assert opened == ["s3://of-a-stranger/cube.zarr"]


@pytest.mark.parametrize("what", ["checkpoints", "metrics.jsonl", "tensorboard", "model.json"])
def test_a_run_with_a_link_that_leads_out_is_refused(run: Path, tmp_path: Path, what: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    shutil.move(run / what, victim / what)
    (run / what).symlink_to(victim / what)
    before = sorted(str(path) for path in victim.rglob("*"))
    with pytest.raises(IntegrityError, match="lies outside"):
        load_card(run)
    with pytest.raises(IntegrityError, match="lies outside"):
        evaluate(run)
    assert sorted(str(path) for path in victim.rglob("*")) == before


def test_the_key_of_a_run_is_the_same_once_it_is_read_back(run: Path) -> None:
    card = load_card(run)
    assert card.key.isalnum()
    assert card.key == type(card).from_dict(json.loads(json.dumps(card.to_dict()))).key
    assert card.key != replace(card, cube_digest="0" * 64).key
