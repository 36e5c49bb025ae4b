"""A workplace that examples run in: a simulated world, its cube, and a Dask client in this process."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ingest
from ingest.simulate import SimulateConfig, simulate

SELECTION: dict[str, Any] = {"collections": ["sentinel-2-l2a"], "bands": ["red", "nir"]}


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A cluster inside this process, as the current client."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            name="of all tests of the API",
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        yield made


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory, client: Any) -> Path:
    """A folder with `world` and the cube of its two dates, which tests copy."""
    folder = tmp_path_factory.mktemp("workplace")
    dates = (dt.date(2022, 4, 20), dt.date(2022, 6, 16))
    simulate(folder / "world", SimulateConfig(tiles=1, tile_px=64, overlap_px=0, dates=dates, radar_dates=()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plan = ingest.make_plan("world/catalog.json", **SELECTION)
        report = ingest.run_plan(plan, "cube.zarr", client=client)
    assert len(report.written) == 2
    return folder


@pytest.fixture
def workplace(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cube beside the world; the working directory of the test.

    The plan that a cube keeps names its files by their absolute paths, and those are the master's.
    """
    shutil.copytree(master / "cube.zarr", tmp_path / "cube.zarr")
    (tmp_path / "world").symlink_to(master / "world")
    monkeypatch.chdir(tmp_path)
    return tmp_path
