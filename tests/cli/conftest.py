"""Running commands in this process, as a shell would see them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from zarr_store import BandSpec, CubeSpec, Grid, Layout, ShardWriter, SourceOutcome, create_cube


@dataclass(frozen=True)
class Outcome:
    """What a shell sees of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def error_line(self) -> str:
        """The one line that says what is wrong; nothing of a traceback may stand beside it."""
        assert "Traceback" not in self.out + self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs a command: `run("info", path)` is `terrashard info path`."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Every file below a folder with its time of change and content, to see that nothing was touched."""

    def take(folder: Path) -> dict[str, tuple[int, bytes]]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    return take


def _make_cube(path: Path, *, skip: tuple[int, ...] = (), partial: tuple[int, ...] = ()) -> CubeSpec:
    """A cube of three dates and 64 × 96 pixels; dates in `skip` are not written, those in `partial` lack one scene."""
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (64, 96))
    bands = tuple(BandSpec(name, 0, 1e-4) for name in ("blue", "green", "red"))
    times = ("2023-08-10T10:00:00Z", "2023-08-15T10:00:00Z", "2023-08-18T10:00:00Z")
    spec = CubeSpec(
        "sentinel-2-l2a", "reflectance", bands, grid, times, ("scl",), Layout("train", (1, 32, 32), (1, 64, 96))
    )
    items = [{"id": f"S2_{t}", "datetime": moment} for t, moment in enumerate(times)]
    create_cube(path, [spec], items={spec.collection: items}, provenance={"made": "by a test"})
    writer = ShardWriter(str(path), spec.collection)
    rows, columns = np.mgrid[0:64, 0:96]
    for index, region in spec.shards().items():
        t = index[0]
        if t in skip:
            continue
        image = np.stack([rows * 20 + 100, columns * 20 + 200, (rows + columns) * 10 + 300])[np.newaxis] + 500 * t
        status = np.ones(region.shape, np.uint8)
        status[0, :8] = 0
        status[0, 8:16] = 2
        lost = t in partial
        if lost:
            status[0, 40:50] = 3
        image[0, :, status[0] % 3 == 0] = 0
        outcome = SourceOutcome(
            t, f"S2_{t}", "missing" if lost else "read", "B04" if lost else None, "HTTP 404" if lost else None
        )
        writer.write(
            region,
            {
                "reflectance": image.astype(np.uint16),
                "scl": np.full(region.shape, 4, np.uint8),
                "status": status,
                "source_item": np.where(status % 3 == 0, -1, t).astype(np.int16),
            },
            key=f"key-{t}",
            sources=(outcome,),
        )
    return spec


@pytest.fixture
def make_cube() -> Callable[..., CubeSpec]:
    """`make_cube(path, skip=(2,), partial=(1,))`."""
    return _make_cube


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    """A complete cube."""
    path = tmp_path / "cube.zarr"
    _make_cube(path)
    return path
