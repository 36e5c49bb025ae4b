"""Training and inference with JAX: cube → windows → mesh → Flax model → map.

    from jaxtrain import TrainConfig, train, evaluate, predict, embed, load_run

    result = train(TrainConfig.model_validate({"data": {"cube": "zagreb.zarr"}}), "runs/zagreb")
    report = evaluate("runs/zagreb")
    made = predict("runs/zagreb", "zagreb.zarr", "zagreb_map.zarr")

Nothing here imports `ingest`, dask or rasterio. Importing this package imports the configuration only; a function is
imported when it is first asked for, so that `parallel.processes.start_distributed` can still come before JAX starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxtrain.config import (
    DataConfig,
    HeteroConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SplitConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from jaxtrain.evaluation.scores import EvaluationReport, evaluate
    from jaxtrain.inference.embedding import EmbeddingResult, embed
    from jaxtrain.inference.scene import MapResult, predict
    from jaxtrain.loop import train
    from jaxtrain.runs.events import TrainEvent, TrainingResult
    from jaxtrain.runs.run import Run, load_run
    from jaxtrain.settings import read_train_config

__all__ = [
    "DataConfig",
    "EmbeddingResult",
    "EvaluationReport",
    "HeteroConfig",
    "MapResult",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Run",
    "RunConfig",
    "SplitConfig",
    "TrainConfig",
    "TrainEvent",
    "TrainingResult",
    "embed",
    "evaluate",
    "load_run",
    "predict",
    "read_train_config",
    "train",
]

_HOMES = {
    "EmbeddingResult": "jaxtrain.inference.embedding",
    "EvaluationReport": "jaxtrain.evaluation.scores",
    "MapResult": "jaxtrain.inference.scene",
    "Run": "jaxtrain.runs.run",
    "TrainEvent": "jaxtrain.runs.events",
    "TrainingResult": "jaxtrain.runs.events",
    "embed": "jaxtrain.inference.embedding",
    "evaluate": "jaxtrain.evaluation.scores",
    "load_run": "jaxtrain.runs.run",
    "predict": "jaxtrain.inference.scene",
    "read_train_config": "jaxtrain.settings",
    "train": "jaxtrain.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
