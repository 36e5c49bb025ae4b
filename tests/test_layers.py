"""Who imports whom, seen from a fresh interpreter: import-linter reads the text, this runs it.

xarray imports dask itself where that is installed, so the cluster is looked for by `distributed`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING = ("jax", "flax", "optax", "orbax")
CLUSTER = ("distributed", "rasterio", "pystac", "pystac_client", "stackstac")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            ("ingest", "ingest.request.config", "ingest.scenes.search", "ingest.plan.making", "ingest.run.loop"),
            (*TRAINING, "jaxtrain", "cli"),
        ),
        (
            ("jaxtrain", "jaxtrain.loop", "jaxtrain.inference.scene"),
            ("rasterio", "pystac", "stackstac", "ingest", "cli"),
        ),
        (("zarr_store",), (*TRAINING, *CLUSTER, "ingest", "jaxtrain", "cli")),
        (("ingest", "jaxtrain"), (*TRAINING, *CLUSTER)),
    ],
)
def test_import_brings_nothing_of_the_other_side(modules: tuple[str, ...], absent: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(modules)}; sys.exit(','.join(sorted(set({absent!r}) & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
