"""Experiment trackers beside TensorBoard and JSONL: MLflow and Weights & Biases, for runs with `run.track`.

Neither is installed with terrashard; a run that names one that is absent ends before anything is written. Their own
variables (MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_PROJECT …) set where they send data; by default MLflow writes into the
run's folder.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zarr_store.errors import InvalidInput

__all__ = ["TRACKERS", "Tracker", "check_trackers", "start_trackers"]


class Tracker(Protocol):
    """A receiver of the metrics of a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of a step."""
        ...

    def close(self) -> None:
        """End the run at the tracker."""
        ...


class _MLflow:
    def __init__(self, module: Any, run: Path, config: Mapping[str, Any]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run / 'mlflow.db').absolute()}"
        self._client = module.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "terrashard")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        kept = run / "mlflow.run"  # a run that is continued stays in the same place
        if kept.exists():
            self._id = kept.read_text(encoding="utf-8").strip()
        else:
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            kept.write_text(self._id, encoding="utf-8")
            for key, value in flatten(config).items():
                self._client.log_param(self._id, key, str(value)[:500])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandB:
    def __init__(self, module: Any, run: Path, config: Mapping[str, Any]) -> None:
        kept = run / "wandb.run"
        identity = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "terrashard"), name=run.name, id=identity, resume="allow",
            dir=str(run), config=dict(config), settings=module.Settings(silent=True),
        )  # fmt: skip
        kept.write_text(str(self._run.id), encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Any, Path, Mapping[str, Any]], Tracker]]] = {
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _WandB),
}
"""Name in the configuration → module and maker."""


def check_trackers(names: Sequence[str]) -> dict[str, Any]:
    """Import the modules of the trackers; called before anything is written.

    Raises:
        InvalidInput: One is not installed; the message names the extra that holds it.
    """
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(TRACKERS[name][0])
        except ImportError as error:
            raise InvalidInput(
                f"run.track names {name!r}, which is not installed: pip install 'terrashard[{name}]', or leave it out "
                "(TensorBoard and metrics.jsonl are always written)"
            ) from error
    return modules


def start_trackers(modules: Mapping[str, Any], run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Begin or continue the run at each tracker."""
    return [TRACKERS[name][1](module, run, config) for name, module in modules.items()]


def flatten(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name.

    >>> flatten({"run": {"steps": 3}, "x": 1})
    {'run.steps': 3, 'x': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{at}.{key}" if at else key
        if isinstance(value, Mapping):
            flat |= flatten(value, name)
        else:
            flat[name] = value
    return flat
