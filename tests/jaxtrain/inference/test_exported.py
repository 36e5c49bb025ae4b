"""Exported networks answer as `predict` does: StableHLO always, safetensors and ONNX where the extra is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pystac.validation
import pytest

from jaxtrain.data.opening import open_training_data
from jaxtrain.evaluation.scores import restore_model, select_data
from jaxtrain.inference import exported
from jaxtrain.inference.exported import export_model, exported_function
from jaxtrain.learn.modalities import modality_shapes
from jaxtrain.learn.state import Program
from jaxtrain.learn.step import answer_batch, make_predict_step
from jaxtrain.runs.rundir import load_card
from zarr_store.errors import InvalidInput

from ..cube_factory import shared_cube, shared_run

CLOSE = 1e-4


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Windows of the test part of a trained U-Net, and its answers."""
    run = shared_run()
    card = load_card(run)
    chosen = select_data(card, open_training_data(shared_cube()), part="test")
    batch = chosen.reader.read(chosen.windows.rows[:4])
    program, state, _, _ = restore_model(run, card)
    size = -(-4 // int(program.mesh.shape["data"])) * int(program.mesh.shape["data"])
    padded = {name: np.concatenate([batch[name]] * -(-size // 4))[:size] for name in ("image", "observed")}
    answers = make_predict_step(program)(state, padded["image"], observed=padded["observed"])
    return {"run": run, "image": batch["image"].astype(np.float32), "observed": batch["observed"].astype(np.float32),
            "answers": np.asarray(answers)[:4]}  # fmt: skip


def test_stablehlo_answers_as_predict_on_real_windows(real: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    made = export_model(real["run"], tmp_path / "model", formats=("stablehlo",), batch=4)
    again = export_model(real["run"], tmp_path / "again", formats=("stablehlo",), batch=4)
    assert made.files == ("model.stablehlo", "item.json")
    function = jax.export.deserialize(bytearray((tmp_path / "model" / "model.stablehlo").read_bytes()))
    found = np.asarray(function.call(real["image"], real["observed"]))
    assert np.abs(found - real["answers"]).max() < 1e-5
    for name in made.files:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert b"jaxtrain/" not in (tmp_path / "model" / name).read_bytes(), "a path of the machine it was made on"
    assert again.parameters == made.parameters > 1000


def test_the_description_has_bands_normalisation_and_classes(real: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    export_model(real["run"], tmp_path / "model", formats=("stablehlo",))
    text = (tmp_path / "model" / "item.json").read_text()
    assert str(real["run"]) not in text
    item, card = json.loads(text), load_card(real["run"])
    image = item["properties"]["mlm:input"][0]
    assert image["bands"] == list(card.bands)
    assert [row["mean"] for row in image["value_scaling"]] == pytest.approx(list(card.mean))
    assert image["input"]["shape"] == [-1, len(card.bands), card.config.data.patch, card.config.data.patch]
    classes = item["properties"]["mlm:output"][0]["classification:classes"]
    assert [one["description"] for one in classes] == list(card.classes.names)
    assert item["bbox"] == pytest.approx(list(card.grid.lonlat_bounds()), abs=1e-6)
    assert pystac.validation.validate_dict({**item, "stac_extensions": []}, extensions=[])
    model = pytest.importorskip("stac_model.schema")
    fields = {name.removeprefix("mlm:"): value for name, value in item["properties"].items() if name[:4] == "mlm:"}
    assert model.MLModelProperties(**fields).architecture == "unet"


def test_the_description_says_what_the_stored_numbers_mean() -> None:
    card = load_card(shared_run())
    shapes = {"image": (1, len(card.bands), 32, 32), "observed": (1, 32, 32)}
    item = exported._describe(card, shapes, (1, 32, 32, 3), 1, (), "digest")
    numbers = item["properties"]["terrashard:numbers"]
    assert [one["band"] for one in numbers] == list(card.bands)
    meant = {(one["kind"], one["dtype"], one["unit"], one["scale"], one["offset"]) for one in numbers}
    assert meant == {("reflectance", "uint16", "1", 1.0, 0.0)}
    height = replace(card, task=replace(card.task, value=(5.0, 2.0), unit="m"))
    made = exported._describe(height, shapes, (1, 32, 32, 1), 1, (), "digest")
    assert made["properties"]["mlm:output"][0]["description"] == "values in m"


def test_what_is_refused(real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) or "there")
    for folder, options, words in (
        ("there", {"formats": ("stablehlo",)}, "exists"),
        ("new", {"formats": ("keras",)}, "expected some of safetensors, stablehlo, onnx"),
        ("new", {"formats": ("stablehlo",), "batch": 0}, "at least 1"),
    ):
        with pytest.raises(InvalidInput, match=words):
            export_model(real["run"], tmp_path / folder, **options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InvalidInput, match=r"jax2onnx is not installed: pip install 'terrashard\[export\]'"):
        export_model(real["run"], tmp_path / "new", formats=("onnx",))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"model": {"name": "unet"}},
    "resnet": {"model": {"name": "resnet", "depth": 10}},
    "temporal": {"model": {"name": "temporal", "context": 2}, "data": {"dates": 2}},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_answers_as_jax(name: str, program_of: Callable[..., Program], tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    program = program_of(1, 1, **NETWORKS[name])
    _check_answers(program, _shapes(program), tmp_path)


def test_onnx_of_several_modalities(tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    from jaxtrain.learn.state import build_program
    from jaxtrain.models.modality import Modality
    from jaxtrain.parallel.mesh import make_mesh

    from ..modal_factory import modal_config

    modalities = (Modality("s2", ("blue", "red", "nir")), Modality("s2_20", ("swir",), ratio=2),
                  Modality("s1", ("vv", "vh"), dates=2))  # fmt: skip
    config = modal_config("none.zarr", mesh={"data": 1, "model": 1})
    program = build_program(config, channels=6, classes=3, mesh=make_mesh(config.mesh), mean=np.full(6, 2500.0),
                            std=np.full(6, 1400.0), modalities=modalities)  # fmt: skip
    _check_answers(program, modality_shapes(program, 2), tmp_path)


def test_onnx_on_real_windows(real: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    safetensors = pytest.importorskip("safetensors.numpy")
    made = export_model(real["run"], tmp_path / "model", batch=4)
    session = runtime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    assert [one.name for one in session.get_inputs()] == list(made.inputs) == ["image", "observed"]
    (found,) = session.run(["probabilities"], {"image": real["image"], "observed": real["observed"]})
    assert np.abs(found - real["answers"]).max() < CLOSE
    assert (found.argmax(-1) == real["answers"].argmax(-1)).mean() >= 0.9999
    weights = safetensors.load_file(tmp_path / "model" / "model.safetensors")
    assert sum(array.size for name, array in weights.items() if name.startswith("params.")) == made.parameters
    program, state, _, _ = restore_model(real["run"], load_card(real["run"]))
    _, expected = exported_function(program, state)
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert b"jaxtrain/" not in (tmp_path / "model" / "model.onnx").read_bytes()


LACKING = (
    NotImplementedError("[converter] No plugins registered for primitive 'svd'\nas of this release"),
    ValueError("reduce_precision: only float32 is supported"),
    RuntimeError("Primitive 'cumlogsumexp' left output 0 unbound"),
)


@pytest.mark.parametrize("lacking", LACKING, ids=lambda error: type(error).__name__)
def test_a_layer_that_onnx_lacks_is_named_and_nothing_is_left(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: Exception
) -> None:
    """The converter stops after the weights are written, by errors of several types."""
    monkeypatch.setitem(exported._WRITERS, "safetensors", lambda path, *_: path.write_bytes(b"weights"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) or "there")
    asked: list[list[str]] = []

    def to_onnx(_function: Any, _inputs: Any, **options: Any) -> None:
        (part,) = tmp_path.iterdir()
        asked.append(sorted(path.name for path in part.iterdir()))
        raise lacking

    stand_in = SimpleNamespace(to_onnx=to_onnx, __spec__=ModuleSpec("jax2onnx", None))
    monkeypatch.setitem(sys.modules, "jax2onnx", stand_in)
    line = re.escape(str(lacking).splitlines()[0])
    with pytest.raises(InvalidInput, match=rf"no counterpart of a layer of unet: {line}; leave it out") as raised:
        export_model(real["run"], tmp_path / "model", formats=("safetensors", "onnx"))
    assert "\n" not in str(raised.value)
    assert asked == [["model.safetensors"]]
    assert not list(tmp_path.iterdir())


def test_a_layer_that_jax2onnx_lacks_is_named(
    real: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax2onnx")

    def with_svd(*arguments: Any) -> jax.Array:
        made = answer_batch(*arguments)
        return made + jax.numpy.linalg.svd(made[..., :3, :3], compute_uv=False)[..., :1, None]

    monkeypatch.setattr(exported, "answer_batch", with_svd)
    with pytest.raises(InvalidInput, match=r"no counterpart of a layer of unet: .*svd"):
        export_model(real["run"], tmp_path / "model", formats=("onnx",))
    assert not list(tmp_path.iterdir())


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    patch, dates = program.config.data.patch, program.config.data.dates
    assert isinstance(dates, int)
    if dates == 1:
        return {"image": (2, program.channels, patch, patch), "observed": (2, patch, patch)}
    return {"image": (2, dates, program.channels, patch, patch), "observed": (2, dates, patch, patch),
            "day": (2, dates)}  # fmt: skip


def _check_answers(program: Program, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    function, _ = exported_function(program, program.init(jax.random.key(0)))
    arrays = {}
    for name, shape in shapes.items():
        kind = exported._dtype(name)
        arrays[name] = np.asarray(rng.uniform(0, 5000, shape) if name[:5] == "image" else rng.uniform(size=shape) < 0.9
                                  if name[:8] == "observed" else rng.integers(1, 365, shape), kind)  # fmt: skip
    specs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}

    class Card:
        class task:
            values = False

        config = program.config

    exported._write_onnx(folder / "model.onnx", function, specs, {}, Card)  # type: ignore[arg-type]
    (found,) = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, arrays)
    expected = np.asarray(jax.jit(function)(*arrays.values()))
    assert np.abs(found - expected).max() < CLOSE
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9999
