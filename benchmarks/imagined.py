"""Networks on data that are only described and do not exist, for benchmarks of the planner."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.data.classes import Classes
from jaxtrain.data.splits import Split
from jaxtrain.data.task import Task
from jaxtrain.planner.survey import Network
from jaxtrain.runs.rundir import ModelCard


def imagine(
    *, bands: int, classes: int, windows: int, task: Task | None = None, dates: int = 0, **sections: dict[str, Any]
) -> Network:
    """Describe a run on data that nobody has read: only shapes and number types decide what a step costs.

    Args:
        bands: Channels of the images, stored as uint16.
        classes: Classes that are told apart.
        windows: Windows of an epoch.
        task: classes of pixels if not given.
        dates: Dates of a window; 0 for one image.
        sections: `data`, `model`, `optim` and `run` of the configuration.
    """
    data: dict[str, Any] = {"cube": "imagined", **({"dates": dates} if dates else {}), **sections.pop("data", {})}
    config = TrainConfig.model_validate({"data": data, **sections})
    names = [{"name": f"class {number}", "colour": "#808080", "values": [number]} for number in range(classes)]
    card = ModelCard(
        config=config, cube="imagined", cube_digest="", bands=tuple(f"band{n}" for n in range(bands)),
        classes=Classes.from_list(names), mean=(2000.0,) * bands, std=(900.0,) * bands, class_weights=None, grid=None,
        times=(), split=Split.whole((1, 1), (1, 1)), windows={"train": windows}, statistics={}, task=task or Task(),
    )  # fmt: skip
    dtypes = {"image": "uint16", "label": "uint8", "observed": "uint8", "day": "uint16"}
    return Network(config, card.to_dict(), dtypes, windows)
