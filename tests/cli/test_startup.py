"""What commands import: counted in modules, because seconds depend on what else the machine does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ingest.run.loop import run

from ..ingest.small_scenes import land, make_scene, plan_of, write_items, write_tif

_COUNT = (
    "import json, sys; from cli.main import main; code = main(sys.argv[1:]); "
    "sys.stderr.write('\\n' + json.dumps([code, sorted(sys.modules)]))"
)


def imported(*words: str) -> list[str]:
    """Names of the modules beside the standard library that are there when a command has ended well."""
    command = [sys.executable, "-c", _COUNT, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    code, names = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]


def assert_light(names: Sequence[str], most: int, absent: set[str]) -> None:
    there = {name.partition(".")[0] for name in names}
    assert not there & absent
    assert len(names) <= most, f"{len(names)} modules are imported"


def test_the_list_of_commands() -> None:
    assert_light(imported("--help"), 75, {"rich", "numpy", "pydantic", "zarr_store", "ingest", "jaxtrain"})


def test_info_and_status(cube: Path) -> None:
    heavy = {"xarray", "pandas", "dask", "distributed", "rasterio", "shapely", "scipy", "jax", "jaxtrain", "ingest"}
    assert_light(imported("info", str(cube)), 490, heavy)
    assert_light(imported("status", str(cube)), 490, heavy)


def test_an_ingest_that_finds_nothing_to_do(tmp_path: Path) -> None:
    source = write_items(tmp_path, make_scene("S1", {"blue": write_tif(tmp_path / "blue.tif", land())}))
    assert run(plan_of(source), tmp_path / "cube.zarr").exit_code == 0
    names = imported("ingest", str(source), str(tmp_path / "cube.zarr"), "--bands", "blue", "--mask", "none")
    most = 1200 if sys.version_info < (3, 12) else 1260  # newer Pythons have newer libraries
    assert_light(names, most, {"xarray", "pandas", "dask", "distributed", "bokeh", "jax"})
