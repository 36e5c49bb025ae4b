"""`terrashard classify`: images of a folder or a store become a table of classes and probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli.main import main
from jaxtrain.inference.classify import Classifier
from zarr_store.samples import Sample, SampleSpec

COLOURS = {"field": (60, 160, 50), "lake": (30, 50, 150), "town": (170, 140, 140)}
SIDE, COUNT = 16, 13


def picture(name: str, seed: int, side: int = SIDE) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 8, (side, side, 3))
    return np.clip(noise + COLOURS[name], 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images by class, its store, and a run on it."""
    root = tmp_path_factory.mktemp("classify")
    places = ["file,latitude,longitude"]
    for place, name in enumerate(COLOURS):
        (root / "in" / name).mkdir(parents=True)
        for i in range(COUNT):
            Image.fromarray(picture(name, i)).save(root / f"in/{name}/{i}.png")
            places.append(f"{name}/{i}.png,{40 + i},{10 + place}")
    (root / "in/coordinates.csv").write_text("\n".join(places))
    assert main(["samples", str(root / "in"), str(root / "s.zarr"), "-q"]) == 0
    (root / "c.toml").write_text(
        f'[data]\ncube = "{root}/s.zarr"\n[model]\nname = "mlp"\nwidth = 16\ndepth = 1\n'
        "[optim]\nlearning_rate = 0.05\nwarmup_steps = 2\n"
        "[run]\nsteps = 30\nbatch_size = 16\nevaluate_every = 30\ncheckpoint_every = 30\n"
    )
    assert main(["train", str(root / "c.toml"), "--out", str(root / "run"), "-q"]) == 0
    return root


def test_a_folder_and_its_store_get_the_same_answers(trained: Path, tmp_path: Path, run) -> None:
    tables = {}
    for source in ("in", "s.zarr"):
        out = tmp_path / f"{source}.parquet"
        done = run("classify", trained / "run", trained / source, out, "--json")
        assert (done.code, done.json["images"], done.json["without_data"]) == (0, 3 * COUNT, 0)
        tables[source] = pq.read_table(out).sort_by("image")
    assert tables["in"].equals(tables["s.zarr"])
    table = tables["in"].to_pydict()
    assert list(table) == ["image", "longitude", "latitude", "class", "probability",
                           "probability_field", "probability_lake", "probability_town"]  # fmt: skip
    assert (
        np.mean([name.split("/")[0] == label for name, label in zip(table["image"], table["class"], strict=True)]) > 0.9
    )
    assert sum(done.json["classes"].values()) == 3 * COUNT
    at = table["image"].index("town/3.png")
    assert (table["longitude"][at], table["latitude"][at]) == (12.0, 43.0)
    every = np.array([table[f"probability_{name}"] for name in COLOURS])
    np.testing.assert_allclose(every.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(every.max(axis=0), np.array(table["probability"]))
    assert json.loads(tables["in"].schema.metadata[b"terrashard"])["classes"] == list(COLOURS)


def test_images_that_do_not_fit_the_model_are_refused_or_insisted_on(trained: Path, tmp_path: Path, run) -> None:
    small, deep, grey = (tmp_path / name for name in ("small", "deep", "grey"))
    for folder in (small, deep, grey):
        folder.mkdir()
    Image.fromarray(picture("lake", 0, 8)).save(small / "a.png")
    out = tmp_path / "out.parquet"
    line = run("classify", trained / "run", small, out).error_line()
    assert "have 8 × 8 pixels, and the model was trained on images of 16" in line
    assert "use them as they are with --allow-mismatch" in line
    insisted = run("classify", trained / "run", small, out, "--allow-mismatch")
    assert (insisted.code, pq.read_table(out)["class"].to_pylist()) == (0, ["lake"])
    assert "used as they are (--allow-mismatch)" in insisted.err
    Image.fromarray(np.full((SIDE, SIDE), 9000, np.uint16)).save(deep / "a.png")
    assert "lake" not in run("classify", trained / "run", deep, tmp_path / "no.parquet").error_line()
    Image.fromarray(picture("lake", 0)[..., 0]).save(grey / "a.png")
    assert "band" in run("classify", trained / "run", grey, tmp_path / "no.parquet").error_line()
    assert not (tmp_path / "no.parquet").exists()


def test_what_cannot_be_used_is_one_line_and_nothing_is_written(trained: Path, tmp_path: Path, run) -> None:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(picture("town", 1)).save(folder / "deeper/a.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n")
    out = tmp_path / "out.parquet"
    assert "b.png" in run("classify", trained / "run", folder, out).error_line()
    assert "a .parquet file" in run("classify", trained / "run", folder, tmp_path / "out.csv").error_line()
    assert not list(tmp_path.glob("*out*"))
    done = run("classify", trained / "run", folder, out, "--skip-bad")
    assert "left out" in done.err
    assert pq.read_table(out).select(["image", "longitude", "class"]).to_pylist() == [
        {"image": "deeper/a.png", "longitude": None, "class": "town"}]  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert run("classify", trained / "run", tmp_path / "empty", out).code == 4
    assert "is not a folder" in run("classify", trained / "run", tmp_path / "none", out).error_line()
    assert "--skip-bad are for a folder" in run("classify", trained / "run", trained / "s.zarr", out, "--skip-bad").err


def test_an_image_without_data_has_no_probability(trained: Path) -> None:
    spec = SampleSpec(2, ("red", "green", "blue"), (SIDE, SIDE), "uint8", ("none",), masked=True)
    image = np.moveaxis(picture("field", 3), -1, 0)
    samples = [Sample(image, np.uint8(0), math.nan, math.nan, name, np.full((SIDE, SIDE), there))  # type: ignore[arg-type]
               for name, there in (("a", True), ("b", False))]  # fmt: skip
    (answers,) = Classifier.open(trained / "run", spec, "two").answers(samples, 2)
    assert answers.names == ("a", "b")
    assert np.isfinite(answers.probability[0]).all()
    assert np.isnan(answers.probability[1]).all()
