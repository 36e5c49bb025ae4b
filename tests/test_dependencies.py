"""The dependencies in pyproject.toml are those that are imported: none is missing, none is left over."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

OURS = ("cli", "ingest", "jaxtrain", "zarr_store")
BY_OTHERS = {"bokeh", "h5netcdf", "h5py"}
"""Distributions that another library imports: bokeh for Dask's dashboard, h5netcdf and its h5py for xarray's netCDF."""
PARTS = {"distributed": "dask"}
"""Distributions that come with an extra of another: dask[distributed]."""
OTHER_NAMES = {"sklearn": "scikit-learn"}
"""Modules that are not named after their distribution, and may not be installed."""


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def names(requirements: Iterable[str]) -> set[str]:
    """Normalised names of distributions; an extra such as `dask[distributed]` counts as its distribution."""
    return {normalised(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*folders: Path) -> dict[str, set[str]]:
    """Module → the distributions that have it, or would have it if they were installed; without our own modules."""
    there = metadata.packages_distributions()
    tops, files = set(), [path for folder in folders for path in folder.rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            tops |= {module.partition(".")[0] for module in modules}
    foreign = tops - set(sys.stdlib_module_names) - {*OURS, "tests"} - {path.stem for path in files}
    found = {top: {normalised(name) for name in there.get(top, [OTHER_NAMES.get(top, top)])} for top in foreign}
    return {top: {PARTS.get(name, name) for name in owners} for top, owners in found.items() if owners - {"terrashard"}}


def undeclared(found: dict[str, set[str]], declared: set[str]) -> list[str]:
    """Modules of which no distribution is declared."""
    return sorted(module for module, owners in found.items() if not owners & declared)


def test_every_import_of_the_product_is_declared(project: dict[str, Any], repository: Path) -> None:
    found = imported(*(repository / name for name in OURS))
    assert len(found) > 25
    extras = [r for name, rs in project["optional-dependencies"].items() if name not in ("dev", "docs") for r in rs]
    assert undeclared(found, names([*project["dependencies"], *extras])) == []


def test_every_declared_dependency_is_imported(project: dict[str, Any], repository: Path) -> None:
    found = imported(*(repository / name for name in OURS))
    assert names(project["dependencies"]) - BY_OTHERS - set().union(*found.values()) == set()


def test_every_import_of_tests_and_benchmarks_is_declared(project: dict[str, Any], repository: Path) -> None:
    found = imported(repository / "tests", repository / "benchmarks")
    extras = [requirement for some in project["optional-dependencies"].values() for requirement in some]
    assert undeclared(found, names([*project["dependencies"], *extras])) == []


def test_the_readme_has_every_extra(project: dict[str, Any], repository: Path) -> None:
    table = (repository / "README.md").read_text(encoding="utf-8").partition("| extra | for |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == set(project["optional-dependencies"]) - {"dev", "docs", "bench"}
