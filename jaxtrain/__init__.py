"""Training and inference with JAX: cube → windows → mesh → Flax model → map.

The reader walks `config` → `data/` → `models/` → `losses`, `optim` → `state` → `step` → `train` → `evaluate` →
`predict`. `parallel/` says how arrays lie on the devices. Nothing here imports `ingest`, dask or rasterio; importing
this package alone does not start JAX either, so that `parallel.processes.start_distributed` can still come first.
"""

from __future__ import annotations

from jaxtrain.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SplitConfig,
    TrainConfig,
)

__all__ = ["DataConfig", "MeshConfig", "ModelConfig", "OptimConfig", "RunConfig", "SplitConfig", "TrainConfig"]
