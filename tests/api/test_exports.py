"""The public names of the three packages: free of modules' names, documented, with examples, listed, in any order."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ingest.request.config import SETTINGS
from ingest.request.running import Running
from ingest.request.settings import PlanSettings, RunSettings, SearchSettings, TrustSettings, UpkeepSettings

PACKAGES = ("zarr_store", "ingest", "jaxtrain")
COMMANDS = {"jaxtrain": {"train"}}
"""Modules that hold a command alone and cannot be imported, so that they hide no export (docs/decisions/0004)."""


def public(package: str) -> list[str]:
    return list(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_export_has_the_name_of_a_submodule(package: str) -> None:
    modules = {name for _, name, _ in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    assert len(modules) > 5
    shared = modules & set(public(package))
    assert shared == COMMANDS.get(package, set()), "importing the module would put it in the place of the export"
    for name in shared:
        with pytest.raises(ImportError, match=f"from {package} import {name}"):
            importlib.import_module(f"{package}.{name}")
        assert not inspect.ismodule(getattr(importlib.import_module(package), name))


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_all_there(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(public(package))) == len(public(package))
    for name in public(package):
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_is_documented_with_an_example_and_listed(package: str, repository: Path) -> None:
    module = importlib.import_module(package)
    page = (repository / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto\w+:: +([\w.]+)", page, re.MULTILINE)
    assert {name.rpartition(".")[2] for name in listed} == set(public(package))
    lacking = [
        name
        for name in public(package)
        if callable(value := getattr(module, name))
        and (value.__doc__ is None or not re.search(r">>> |::\n", inspect.getdoc(value) or ""))
    ]
    assert not lacking, f"without an example: {', '.join(lacking)}"


@pytest.mark.parametrize(
    "code",
    [
        "from ingest import *; assert callable(run_plan); import ingest.run.loop; assert callable(ingest.run_plan)",
        "import ingest.plan, ingest.run, ingest.stack; from ingest import make_plan, run_plan, open_stack; "
        "assert all(map(callable, (make_plan, run_plan, open_stack)))",
        "from jaxtrain import *; from zarr_store import *; from ingest import *; assert callable(open_cube)",
        "from zarr_store import *; import ingest; ingest.open_stack; import ingest.stack; ingest.open_stack.__call__",
    ],
)
def test_imports_work_in_any_order(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["zarr_store", "ingest"])  # those of jaxtrain run in tests/jaxtrain/test_api.py
def test_the_examples_of_docstrings_run(package: str, workplace: Path, client: Any) -> None:
    module = importlib.import_module(package)
    finder = doctest.DocTestFinder(recurse=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    heard: list[str] = []
    with client.as_current():
        for name in public(package):
            value = getattr(module, name)
            if not callable(value):
                continue
            home = vars(importlib.import_module(value.__module__))
            for example in finder.find(value, name, module=False, globs=dict(home)):
                runner.run(example, out=heard.append)
    assert runner.tries > 20
    assert not runner.failures, "".join(heard)


def test_settings_are_the_fields_of_the_configuration() -> None:
    """What may be written as a keyword, and what `IngestConfig` checks, are the same names."""
    every = set(SETTINGS) - {"workers_least"}
    assert set(UpkeepSettings.__annotations__) == every
    assert set(PlanSettings.__annotations__) | set(RunSettings.__annotations__) == every
    trust = set(TrustSettings.__annotations__)
    assert set(RunSettings.__annotations__) - trust == set(Running.model_fields) - trust - {"workers_least", "strict"}
    assert set(SearchSettings.__annotations__) <= set(PlanSettings.__annotations__)
    for settings in (UpkeepSettings, PlanSettings):
        assert get_type_hints(settings)


def test_help_shows_the_settings_as_keywords() -> None:
    import ingest

    for function, some in (
        (ingest.find_scenes, {"bbox", "query", "headers"}),
        (ingest.make_plan, {"bands", "resolution", "mask", "allow_hosts"}),
        (ingest.run_plan, {"workers", "scheduler", "client", "progress"}),
        (ingest.append_scenes, {"datetime", "workers"}),
    ):
        parameters = inspect.signature(function).parameters
        assert some <= set(parameters)
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert inspect.signature(ingest.make_plan).parameters["mask"].default == "scl"
