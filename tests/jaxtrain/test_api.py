"""The public functions, used the way a notebook does: by name from the package, also inside a running event loop."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import jaxtrain
from jaxtrain import EvaluationReport, MapResult, Run, TrainingResult
from zarr_store.errors import InvalidInput
from zarr_store.notebook import facts_table
from zarr_store.read import open_cube

from .cube_factory import make_cube, shared_cube, shared_run, tiny_config

ROOT = Path(__file__).parents[2]
FUNCTIONS = ("train", "evaluate", "predict", "embed", "load_run")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(jaxtrain, name)
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    assert {*parameters, "return"} <= hints.keys()
    required = [p for p in parameters.values() if p.default is p.empty]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values() if p not in required), "options are named"
    text = inspect.getdoc(function)
    assert text is not None
    for heading in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{heading}\n" in text, f"{name} has no {heading}"
    for parameter in parameters:
        assert f"    {parameter}: " in text, f"{name} does not describe {parameter}"


def test_every_public_name_is_there_and_hidden_by_no_module() -> None:
    for name in jaxtrain.__all__:
        assert not inspect.ismodule(getattr(jaxtrain, name)), name
        assert getattr(jaxtrain, name).__name__ == name
    assert set(jaxtrain.__all__) <= set(dir(jaxtrain))
    modules = {module.name for module in pkgutil.iter_modules(jaxtrain.__path__)}
    assert modules & set(jaxtrain.__all__) == {"train"}, "only the command may share a name, as it cannot be imported"
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        jaxtrain.fit  # noqa: B018


def test_names_are_importable_in_any_order_and_the_package_alone_starts_nothing() -> None:
    code = """
import sys
import jaxtrain
assert not {"jax", "flax", "orbax"} & set(sys.modules), "importing the package imports JAX"
from jaxtrain import TrainConfig, read_train_config
assert "jax" not in sys.modules, "reading a configuration imports JAX"
import jaxtrain.loop, jaxtrain.evaluation.scores, jaxtrain.inference.scene
assert not {"matplotlib", "jinja2"} & set(sys.modules), "what draws a report is imported when it is drawn"
try:
    import jaxtrain.train
except ImportError as error:
    assert "from jaxtrain import train" in str(error)
else:
    raise SystemExit("the command can be imported, and would hide the function")
from jaxtrain import embed, evaluate, load_run, predict, train
assert all(callable(f) for f in (embed, evaluate, load_run, predict, train, jaxtrain.train))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def cell(name: str, value: object) -> str:
    """The row of a notebook's table, as `zarr_store.notebook` writes it."""
    (line,) = re.findall(r"<tr>.*</tr>", facts_table("", [("NAME", "VALUE")]))
    return str(line).replace("NAME", name).replace("VALUE", str(value))


def test_the_examples_of_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(
        shared_cube(), data={"classes": {}}, model={"name": "autoencoder", "code": 2}, optim={"loss": "mse"},
        run={"steps": 2},
    )  # fmt: skip
    jaxtrain.train(config, tmp_path / "runs" / "autoencoder")
    shutil.copytree(shared_run(), tmp_path / "runs" / "zagreb")
    (tmp_path / "zagreb.zarr").symlink_to(shared_cube())
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    heard: list[str] = []
    for name in jaxtrain.__all__:
        value = getattr(jaxtrain, name)
        home = vars(importlib.import_module(value.__module__))
        for found in finder.find(value, name, module=False, globs=dict(home)):
            runner.run(found, out=heard.append)
    assert runner.tries > 25
    assert not runner.failures, "".join(heard)


def example() -> str:
    """The Python of docs/api/jaxtrain.md, as a reader copies it."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api/jaxtrain.md").read_text(), re.DOTALL)
    return str(code)


def test_the_documented_example_runs_inside_a_running_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zagreb.zarr").symlink_to(shared_cube())
    monkeypatch.chdir(tmp_path)
    cells: dict[str, Any] = {}

    async def notebook() -> None:
        assert asyncio.get_running_loop().is_running()
        exec(example(), cells)

    asyncio.run(notebook())
    result, run, report, made = (cells[name] for name in ("result", "run", "report", "made"))
    assert isinstance(result, TrainingResult)
    assert isinstance(run, Run)
    assert isinstance(report, EvaluationReport)
    assert isinstance(made, MapResult)
    assert result.steps == run.steps == 12
    assert run.checkpoints()[-1] == report.step == 12
    assert run.config.run.steps == 12
    assert run.classes == report.classes == ("vegetation", "not vegetated", "water")
    assert run.bands == ("blue", "green", "red", "nir")
    assert run.report.exists()
    # the report is what was written beside the run
    assert run.evaluation() == report.to_dict()
    assert report.accuracy is not None
    matrix = report.confusion_matrix
    assert matrix is not None
    assert report.accuracy == pytest.approx(sum(matrix[i][i] for i in range(3)) / report.pixels)
    assert set(report.per_class) == set(report.classes)
    assert (report.rmse, report.r2) == (None, None)
    grid = open_cube(shared_cube()).spec("sentinel-2-l2a").grid
    assert made.shape == grid.shape
    assert sum(made.pixels.values()) + made.nodata == grid.shape[0] * grid.shape[1]
    assert [line["step"] for line in run.metrics() if line["kind"] == "train"] == list(range(1, 13))
    assert cell("steps", 12) in result._repr_html_()
    assert cell("water", made.pixels["water"]) in made._repr_html_()
    # a run stands for its directory
    assert jaxtrain.evaluate(run, split="validation").run == str(run.path)


def test_objects_say_what_they_are() -> None:
    from jaxtrain import load_run

    run = load_run(shared_run())
    assert repr(run) == f"<Run {shared_run()}: unet, step 12 of 12, 4 bands, 3 classes>"
    assert cell("classes", "vegetation, not vegetated, water") in run._repr_html_()
    report = EvaluationReport(
        run="<run>", split="test", step=3, data="c.zarr", samples=2, seconds=0.5, loss=None,
        scores={"accuracy": 0.75, "macro_f1": None, "miou": 0.5, "per_class": {"a<b": {"f1": 0.25}},
                "classes": ["a<b"], "confusion_matrix": [[4]], "pixels": 4},
    )  # fmt: skip
    assert repr(report) == "<EvaluationReport <run>: test, step 3, 2 samples; accuracy 0.7500, miou 0.5000>"
    html = report._repr_html_()
    assert "&lt;run&gt;" in html
    assert cell("f1 of a&lt;b", "0.2500") in html


def test_a_folder_without_a_run_is_refused_and_a_run_may_have_no_evaluation(tmp_path: Path) -> None:
    from jaxtrain import load_run

    with pytest.raises(InvalidInput, match="is not a training run"):
        load_run(tmp_path / "nowhere")
    copy = tmp_path / "run"
    shutil.copytree(shared_run(), copy)
    for path in copy.glob("evaluation*.json"):
        path.unlink()
    assert load_run(copy).evaluation() is None


def test_embed_from_the_package(tmp_path: Path) -> None:
    from jaxtrain import embed, train

    make_cube(tmp_path / "cube.zarr", shape=(1, 64, 96))
    config = tiny_config(
        tmp_path / "cube.zarr", data={"classes": {}, "split": {"block_m": 320, "validation": 0.2, "test": 0.2}},
        model={"name": "autoencoder", "width": 8, "depth": 1, "code": 2}, optim={"loss": "mse"}, run={"steps": 2},
    )  # fmt: skip
    train(config, tmp_path / "run")
    result = embed(tmp_path / "run", tmp_path / "cube.zarr", tmp_path / "vectors.zarr")
    assert result.code == 2
    assert result.samples == 6
    assert cell("samples", 6) in result._repr_html_()
