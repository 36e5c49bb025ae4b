"""One small world and one server over it, shared by all tests of the simulator."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.simulate import ServerHandle, SimulateConfig, SimulatedWorld, serve, simulate

# four dates: no offset, offset, subtracted (orbit 79), mislabelled; two tiles that overlap by 40 px
SMALL = SimulateConfig(
    seed=11,
    tile_px=224,
    overlap_px=40,
    clouds=0.25,
    radiometry=("none", "offset", "subtracted", "mislabelled"),
    radar_dates=(dt.date(2022, 4, 18), dt.date(2022, 7, 23)),
    block_px=128,
)


@pytest.fixture(scope="session")
def small_config() -> SimulateConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SimulatedWorld:
    return simulate(tmp_path_factory.mktemp("simulate") / "world", SMALL)


@pytest.fixture(scope="session")
def server(small_world: SimulatedWorld) -> Iterator[ServerHandle]:
    with serve(small_world.path) as handle:
        yield handle


@pytest.fixture
def blue(small_world: SimulatedWorld) -> str:
    """Path of one band, relative to the world."""
    folder = next(Path(small_world.path).glob("sentinel-2-l2a/S2A_33TWL_*"))
    return (folder / "B02.tif").relative_to(small_world.path).as_posix()
