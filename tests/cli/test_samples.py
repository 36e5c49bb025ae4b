"""`terrashard samples`: a folder becomes a store; what cannot be used is said in one line."""

from __future__ import annotations

import json

import numpy as np
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
