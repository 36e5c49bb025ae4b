"""What a user can get wrong with `predict`: one line, an exit code, and nothing half made is taken for whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from jaxtrain import predict
from jaxtrain.inference.making import making_folder
from jaxtrain.inference.maps import MapWriter
from zarr_store.lock import CubeLock

from ..cube_factory import make_cube, shared_cube, shared_run

Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str]) -> Typed:
    """`typed(cube, map, …)` is `terrashard predict RUN cube map …`: its exit code and its only line of error."""

    def call(cube: object, *more: object) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["predict", str(shared_run()), str(cube), *map(str, more)])
        error = capfd.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == (code != 0), error
        return code, lines[0] if lines else ""

    return call


def polygon(path: Path, x: float, y: float) -> Path:
    ring = [[x, y], [x + 0.01, y], [x + 0.01, y + 0.01], [x, y]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


def test_areas_that_cannot_be_mapped(typed: Typed, tmp_path: Path) -> None:
    out = tmp_path / "m.zarr"
    for what, message in [
        (("--aoi", polygon(tmp_path / "far.geojson", 3.0, 40.0)), "far.geojson"),
        (("--aoi", polygon(tmp_path / "metres.geojson", 500_000.0, 4_999_000.0)), "state the CRS in the file"),
        (("--aoi", tmp_path / "absent.gpkg"), "absent.gpkg"),
        (("--bbox", "1,2,3,4"), "--bbox 1,2,3,4"),
        (("--bbox", "1,2,3,4", "--aoi", tmp_path / "far.geojson"), "give one of them"),
    ]:
        code, line = typed(shared_cube(), out, *what)
        assert (code, message in line) == (2, True), line
        assert not out.exists()
        assert not making_folder(out).exists()


def test_options_of_processes_that_contradict_each_other(typed: Typed, tmp_path: Path) -> None:
    for what, message in [
        (("--dask", "127.0.0.1:8786"), "with its scheme"),
        (("--dask", "tcp://127.0.0.1:8786", "--cluster", "local"), "give one of them"),
        (("--dashboard", ":8787"), "--dashboard is for --cluster"),
        (("--tls", tmp_path), "--tls is for --cluster"),
        (("--cluster-option", "queue=short"), "--cluster-option is for --cluster"),
        (("--cluster", "local", "--dashboard", "x:y"), "expected :PORT or HOST:PORT"),
        (("--cluster", "moon"), "moon"),
    ]:
        code, line = typed(shared_cube(), tmp_path / "m.zarr", *what)
        assert (code, message in line) == (2, True), line
        assert not list(tmp_path.iterdir())


def test_a_map_of_another_grid_is_not_added_to(typed: Typed, tmp_path: Path) -> None:
    out = tmp_path / "days.zarr"
    make_cube(tmp_path / "small.zarr", shape=(1, 64, 64))
    assert typed(tmp_path / "small.zarr", out, "--each-date") == (0, "")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, line = typed(shared_cube(), out, "--each-date", "--append")
    assert (code, "another model, grid or options" in line) == (2, True), line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_second_command_and_a_full_disk(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.zarr"
    with CubeLock(making_folder(out), "terrashard predict"):
        code, line = typed(shared_cube(), out)
        assert (code, "is held by" in line) == (5, True), line
    filled: list[str] = []
    real = MapWriter.put

    def put(self: MapWriter, *args: Any, **more: Any) -> None:
        filled.append("there is no space")
        real(self, *args, **more)
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(MapWriter, "put", put)
        code, line = typed(shared_cube(), out)
    assert (code, bool(filled)) == (7, True), line
    assert not out.exists()  # and what the disk still took has no row in the ledger
    assert typed(shared_cube(), out) == (0, "")
    predict(shared_run(), shared_cube(), tmp_path / "whole.zarr")
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert all((out / name).read_bytes() == (tmp_path / "whole.zarr" / name).read_bytes() for name in names)
