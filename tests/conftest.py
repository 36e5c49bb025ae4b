"""Settings and fixtures of all tests. The environment is set here, before any test imports JAX, GDAL or matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Eight devices on a processor, so that meshes are real; results on CPU, whatever else the machine has.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("GDAL_NUM_THREADS", None)
# Two test processes share two cores: nested thread pools would only fight.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Dask must not look for a configuration of this machine.
os.environ["DASK_CONFIG"] = os.devnull
os.environ["NO_COLOR"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scenes that lie beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("TERRASHARD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data are not here; set TERRASHARD_SHARED_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def zagreb(shared_data: Path) -> Path:
    """Static catalogue of two Sentinel-2 tiles and five dates."""
    return shared_data / "scenes" / "zagreb" / "catalog.json"
