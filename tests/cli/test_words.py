"""Small words: what a command says is about what it has before it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli.evaluate import error_lines, table
from cli.info import _lines, describe
from cli.products import Products
from cli.session import Session
from zarr_store import open_cube


@pytest.fixture
def single_names(tmp_path: Path) -> Path:
    """Images whose labels.csv has one name each."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["file,labels"]
    for number, name in enumerate(("Forest", "River", "Forest")):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{name}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def test_a_table_of_single_names_is_one_class_each_and_info_shows_the_store(
    run: Callable[..., Any], single_names: Path, tmp_path: Path
) -> None:
    assert run("samples", single_names, tmp_path / "s.zarr").code == 0
    shown = run("info", tmp_path / "s.zarr", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["labelled"] == "one"
    assert shown.json["classes"] == {"Forest": 2, "River": 1}
    assert "sample store: 3 samples × 3 bands × 8 × 8 px uint8, one class each" in shown.err
    (single_names / "labels.csv").write_text("file,labels\n0.png,Forest;River\n1.png,River\n")
    assert run("samples", single_names, tmp_path / "t.zarr").code == 0
    assert run("info", tmp_path / "t.zarr", "--json").json["classes"] == {"Forest": 1, "River": 2}


def test_images_are_counted_once(
    run: Callable[..., Any], single_names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "cli.progress.Reporter.update", lambda _self, done, total, detail="": seen.append((done, total))
    )
    assert run("samples", single_names, tmp_path / "s.zarr").code == 0
    assert {total for _, total in seen} == {3}
    assert seen[-1] == (3, 3)


def test_info_names_indices_runs_and_maps(run: Callable[..., Any], cube: Path, tmp_path: Path) -> None:
    facts = describe(open_cube(cube), "sentinel-2-l2a")
    assert "indices" not in "".join(_lines("x", facts))
    assert "; indices ndvi, ndwi" in "".join(_lines("x", {**facts, "indices": ["ndvi", "ndwi"]}))
    trained = tmp_path / "run"
    trained.mkdir()
    (trained / "model.json").write_text("{}")
    assert "is a training run, not a cube" in run("info", trained).error_line()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"unit": "images", "pixels": 133, "samples": 133}, "on 133 images, split test"),
        ({"unit": "pixels", "pixels": 1200, "samples": 1200}, "on 1,200 pixels, split test"),
        ({"pixels": 5120, "samples": 5}, "on 5,120 pixels of 5 windows, split test"),
        ({"pixels": 5120, "samples": 5, "own_data": False, "cube": "b.zarr"}, "windows, other data b.zarr, split test"),
    ],
)
def test_scores_count_what_was_scored(scores: dict[str, Any], expected: str) -> None:
    assert expected in table({"accuracy": 0.5, "split": "test", "seconds": 1.0, **scores})[0]


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ({"unit": "images", "pixels": 133, "samples": 133}, "images"),
        ({"unit": "images", "pixels": 4096, "samples": 4}, "pixels"),
        ({"unit": "windows", "pixels": 133, "samples": 133}, "pixels"),
    ],
)
def test_intervals_name_what_is_taken_as_independent(scores: dict[str, Any], what: str) -> None:
    errors = {"overall_accuracy": 0.5, "overall_accuracy_se": 0.1, "classes": {}}
    assert error_lines(errors, scores) == [f"overall accuracy 0.500 ± 0.196 (95 %, if {what} are independent)"]


def test_a_map_of_values_has_no_classes_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.products.export_cog", lambda *_: None)
    made: Any = SimpleNamespace(values=None)
    products = Products(cog=tmp_path / "m.tif")
    products.make(Session(), made)
    assert "of classes, with colours and class names" in capsys.readouterr().out
    made.values = {"mean": 1.0}
    products.make(Session(), made)
    said = capsys.readouterr().out
    assert "of values" in said
    assert "class" not in said


@pytest.mark.parametrize("text", ["16,45.9", "16,45.9,16.1,46,47", "16"])
def test_a_box_of_other_than_four_numbers(run: Callable[..., Any], tmp_path: Path, text: str) -> None:
    line = run("search", tmp_path / "none.json", "--bbox", text).error_line()
    assert f"bbox: expected four numbers in degrees, west,south,east,north, got {text.count(',') + 1}: {text!r}" in line
    assert line.count(" got ") == 1


def test_a_box_with_a_word_in_it(run: Callable[..., Any], tmp_path: Path) -> None:
    line = run("search", tmp_path / "none.json", "--bbox", "16,45.9,x,north").error_line()
    assert "bbox: expected four numbers in degrees, west,south,east,north, got x, north in '16,45.9,x,north'" in line
    assert "bbox.2" not in line


def test_a_raster_in_place_of_a_catalogue(run: Callable[..., Any], tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "scene.tif")
    Image.new("RGB", (4, 4)).save(tmp_path / "scene.png")
    for name, kind in (("scene.tif", "a TIFF"), ("scene.png", "a PNG file")):
        for command in (("ingest", tmp_path / name, tmp_path / "c.zarr"), ("search", tmp_path / name)):
            assert f"{name} is {kind}, not a catalogue: expected a STAC API URL" in run(*command).error_line()


def test_all_wrong_bands_are_named(run: Callable[..., Any], cube: Path, tmp_path: Path) -> None:
    line = run("quicklook", cube, tmp_path / "q.png", "--bands", "rad,green,bleu").error_line()
    assert "'rad', 'bleu'" in line
    assert "did you mean 'red', 'blue'?" in line


def test_a_script_that_runs_again_in_its_workers_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingest.request.config import IngestConfig
    from ingest.run.cluster import open_cluster
    from zarr_store.errors import InvalidInput

    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InvalidInput, match='call it under `if __name__ == "__main__":`'), open_cluster(IngestConfig()):
        pass


def test_a_lost_peer_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from jaxtrain.config import TrainConfig
    from jaxtrain.launch import restart_wanted
    from jaxtrain.loop import train
    from zarr_store.errors import AccessError

    def lose(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer [::1]")

    monkeypatch.setattr("jaxtrain.loop._train", lose)
    config = TrainConfig.model_validate({"data": {"cube": "c"}})
    with pytest.raises(jax.errors.JaxRuntimeError):
        train(config, "run")  # alone, a process has no peer to lose
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jaxtrain.loop.abandon", lambda _code: None)
    with pytest.raises(AccessError, match=r"lost another process of run.*the same command continues") as caught:
        train(config, "run")
    assert restart_wanted(caught.value.exit_code), "the launcher starts all again"
