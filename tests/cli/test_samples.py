"""`terrashard samples`: a folder becomes a store; what cannot be used is said in one line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli.main import main


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("Forest/a.png", "River/b.jpg")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(path)
    return tmp_path / "in"


def test_a_folder_becomes_a_store(folder, tmp_path, capsys):
    assert main(["samples", str(folder), str(tmp_path / "s.zarr"), "--json"]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["classes"] == {"Forest": 1, "River": 1}
    assert report["without_place"] == 2
    assert "2 of 2 samples have no coordinates" in out.err


def test_a_bad_file_is_one_line_and_code_2(folder, tmp_path, capsys):
    (folder / "River/bad.png").write_bytes(b"\x89PNG\r\n")
    assert main(["samples", str(folder), str(tmp_path / "s.zarr")]) == 2
    err = capsys.readouterr().err
    assert "bad.png" in err
    assert "Traceback" not in err
    assert not (tmp_path / "s.zarr").exists()
    assert main(["samples", str(folder), str(tmp_path / "s.zarr"), "--skip-bad"]) == 0
    assert "left out" in capsys.readouterr().err


def test_a_file_alone_needs_labels(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((4, 4, 2)))
    assert main(["samples", str(tmp_path / "x.npy"), str(tmp_path / "s.zarr")]) == 2
    assert "a scene with --labels FILE" in capsys.readouterr().err


def test_images_of_several_classes_go_all_the_way(tmp_path, capsys):
    """labels.csv → store → run → scores, on the own store and on another whose classes come in another order."""
    colours = {"field": (60, 160, 50), "lake": (30, 50, 150), "town": (170, 140, 140)}
    rng = np.random.default_rng(0)
    for name, order in (("a", ("field", "lake", "town")), ("b", ("town", "lake", "field"))):
        folder = tmp_path / name
        folder.mkdir()
        labels, places = ["file,labels"], ["file,latitude,longitude"]
        for i in range(48):
            chosen = [kind for bit, kind in enumerate(order) if (i % 7 + 1) >> bit & 1]
            image = rng.normal(0, 8, (16, 16, 3)) + 20
            for part, kind in zip(np.array_split(np.arange(16), len(chosen)), chosen, strict=True):
                image[part] += colours[kind]
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
            labels.append(f"{i}.png,{';'.join(chosen)}")
            places.append(f"{i}.png,45.0,{10 + i // 2 + (30 if name == 'b' else 0)}")
        (folder / "labels.csv").write_text("\n".join(labels))
        (folder / "coordinates.csv").write_text("\n".join(places))
        assert main(["samples", str(folder), str(tmp_path / f"{name}.zarr")]) == 0
    (tmp_path / "c.toml").write_text(
        f'[data]\ncube = "{tmp_path}/a.zarr"\n[model]\nname = "mlp"\nwidth = 16\ndepth = 1\n'
        "[optim]\nlearning_rate = 0.05\nwarmup_steps = 2\n"
        "[run]\nsteps = 40\nbatch_size = 16\nevaluate_every = 20\ncheckpoint_every = 20\nmonitor = 'macro_f1'\n"
    )
    assert main(["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]) == 0
    for more in ([], ["--data", str(tmp_path / "b.zarr")]):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "run"), "--json", *more]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert sorted(scores["classes"]) == ["field", "lake", "town"]
        assert scores["macro_f1"] > 0.6
        assert scores["confusion_matrix"] is None
    assert scores["samples"] == 48
    assert "field" in (tmp_path / "run/report.html").read_text()
    assert main(["classify", str(tmp_path / "run"), str(tmp_path / "b"), str(tmp_path / "b.parquet")]) == 0
    rows = {row["image"]: row for row in pq.read_table(tmp_path / "b.parquet").to_pylist()}
    listed = dict(line.split(",") for line in (tmp_path / "b/labels.csv").read_text().splitlines()[1:])
    right = [set(rows[name]["classes"]) == set(text.split(";")) for name, text in listed.items()]
    assert np.mean(right) > 0.6
    assert max(len(row["classes"]) for row in rows.values()) > 1
    assert rows["3.png"]["longitude"] == 41.0
