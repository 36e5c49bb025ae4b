"""The code of the documentation runs: the README's journey as a script, and the pages of the API as notebooks."""

from __future__ import annotations

import ast
import datetime as dt
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.simulate import SimulateConfig, simulate

from .pages import code_of


@pytest.mark.slow
def test_the_journey_of_the_readme_runs_as_a_script(tmp_path: Path, repository: Path) -> None:
    """Search → plan → ingest → xarray → train → evaluate → predict, in a process of its own without a main guard."""
    dates = (dt.date(2022, 4, 20), dt.date(2022, 6, 16))
    config = SimulateConfig(tiles=1, tile_px=128, overlap_px=0, dates=dates, radar_dates=())
    simulate(tmp_path / "demo" / "world", config)
    code = code_of(repository / "README.md")
    statements = [one for one in ast.parse(code).body if not isinstance(one, ast.Import | ast.ImportFrom)]
    assert len(statements) <= 10
    quick = code.replace(
        '"run": {"steps": 200}', '"model": {"width": 4, "depth": 1}, "run": {"steps": 4, "batch_size": 4}'
    )
    assert quick != code
    script = tmp_path / "journey.py"
    tail = "print(report, greenness.shape, scores.accuracy, made)\nassert report.exit_code == 0\n"
    script.write_text(f"print('once')\n{quick}\n{tail}", encoding="utf-8")
    # one device, as a reader has
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("once") == 1, "a worker ran the script once more"
    assert "2 written, 0 partial" in done.stdout
    assert (tmp_path / "land_map.zarr").is_dir()
    assert (tmp_path / "runs" / "land" / "report.html").exists()


@pytest.mark.usefixtures("environment_given_back")  # Dask puts that of its workers into this process
@pytest.mark.parametrize("page", ["xarray.md", "api/ingest.md", "api/zarr_store.md"])
def test_the_code_of_a_page_runs(page: str, workplace: Path, repository: Path, client: Any) -> None:
    place: dict[str, Any] = {"__name__": "__notebook__"}
    with warnings.catch_warnings(), client.as_current():
        exec(compile(code_of(repository / "docs" / page), page, "exec"), place)
    if page == "xarray.md":
        assert place["greenest"].shape == (64, 64)
        assert float(place["greenest"].max()) <= 1.0
        zones = place["by_zone"].values
        inside = np.nanmean(place["average"].values[:32, :32])
        np.testing.assert_allclose(zones[0], inside, rtol=1e-5)
        assert place["over_time"].shape == (4, 2)
