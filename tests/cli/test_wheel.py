"""A wheel has all that the commands need: installed alone, away from the checkout, it runs the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from .test_demo import SMALL

PACKAGES = ("cli", "ingest", "jaxtrain", "zarr_store")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the backend itself, without isolation: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing of ours but the wheel; the libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    # not as a .pth: the one here would run the hook of the editable install, which leads to the checkout
    for entry in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for library in entry.iterdir():
            ours = "terrashard" in library.name.lower() or library.suffix == ".pth" or library.name == "__pycache__"
            if ours or (packages / library.name).exists():
                continue
            (packages / library.name).symlink_to(library)
            if sys.pycache_prefix and library.is_dir():  # their bytecode is here already; parsing them takes long
                bytecode = Path(sys.pycache_prefix + str(library))
                bytecode.mkdir(parents=True, exist_ok=True)
                place = Path(str(folder / "pycache") + str(packages)) / library.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(bytecode)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return folder


def run_python(installed: Path, folder: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PYTHONPYCACHEPREFIX"] = str(installed / "pycache")
    return subprocess.run(
        [installed / "bin" / "python", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def test_nothing_of_the_checkout_is_imported(installed: Path, repository: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{name}.__file__' for name in PACKAGES)}))"
    done = run_python(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    for place in done.stdout.split():
        assert Path(place).is_relative_to(installed), f"{place} is not of the wheel"
        assert not Path(place).is_relative_to(repository)


def test_the_wheel_has_every_file_of_the_packages(wheel: Path, repository: Path) -> None:
    """Data files too: only tests, documents and the like stay out."""
    tracked = subprocess.run(
        ["git", "ls-files", "--", *PACKAGES], cwd=repository, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout, so nobody says which files are the packages'")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    there = {name for name in tracked.stdout.split("\n") if name and (repository / name).exists()}
    assert there - inside == set()
    assert "cli/demo_landcover.toml" in inside
    entries = next(name for name in inside if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "terrashard = cli.main:main" in archive.read(entries).decode()
        assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in inside)


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    small = dict(text.split("=", 1) for text in SMALL) | {"train.run.steps": "4", "train.model.depth": "1"}
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    code = "import sys; from cli.main import main; sys.exit(main())"
    done = run_python(installed, tmp_path, "-c", code, "demo", "--out", "X", "--json", *settings, timeout=220)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name in ("map", "quicklook", "report", "cube"):
        assert (tmp_path / result[name]).exists(), name
