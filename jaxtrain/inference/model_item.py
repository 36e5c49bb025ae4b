"""`network_fields` describes a network by the fields of STAC's extension MLM: inputs, normalisation, output, classes.

The item of an exported network has them, and that of a map that the network has made. They name no place and no path of
the run. Reference: https://github.com/stac-extensions/mlm/tree/v1.5.0
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from jaxtrain.data.classes import Classes
from jaxtrain.learn.modalities import modality_shapes
from jaxtrain.learn.state import Program
from jaxtrain.runs.rundir import ModelCard
from zarr_store.stac_item import classes_of

__all__ = ["Shapes", "class_list", "input_shapes", "list_numbers", "model_bands", "network_fields"]

Shapes = dict[str, tuple[int, ...]]
"""Shape of each input of a network, by name."""

_MOST_CLASSES = 4096
"""Largest number of classes that are listed, so that an item stays small."""

_MEANINGS = {
    "image": "stored numbers of the bands, as terrashard:numbers describes them; the function subtracts the mean and "
    "divides by the deviation itself",
    "observed": "1 where a pixel was observed, else 0",
    "day": "day of the year of each date, from 1",
}


def list_numbers(card: ModelCard) -> list[dict[str, Any]]:
    """Return kind, type, unit, scale and offset of the stored numbers of each band, in the order of the channels."""
    return [band.to_dict() for band in card.numbers]


def network_fields(card: ModelCard, shapes: Shapes, output: tuple[int, ...], parameters: int) -> dict[str, Any]:
    """Return the properties `mlm:…` of a network.

    Args:
        card: The model.
        shapes: Shape of each input, by name, with the windows of a call first.
        output: Shape of the output.
        parameters: Number of parameters.
    """
    task, name = _task(card), card.config.model.name
    result: dict[str, Any] = {
        "name": "values" if card.task.values else "probabilities",
        "tasks": [task],
        "result": {"shape": [-1, *output[1:]], "dim_order": _dims(output, per_image=card.task.per_image),
                   "data_type": "float32"},
    }  # fmt: skip
    if card.task.values:
        result["description"] = f"values in {card.task.unit}" if card.task.unit else "values without a stated unit"
    else:
        result |= class_list(card.classes)
    return {
        "mlm:name": f"{name} on {len(card.bands)} bands",
        "mlm:architecture": name,
        "mlm:tasks": [task],
        "mlm:framework": "JAX",
        "mlm:framework_version": importlib.metadata.version("jax"),
        "mlm:total_parameters": parameters,
        "mlm:pretrained": True,
        "mlm:batch_size_suggestion": card.config.run.batch_size,
        "mlm:input": _inputs(card, shapes),
        # which stored numbers the network takes: the same ground may be stored with another scale
        **({"terrashard:numbers": list_numbers(card)} if card.numbers else {}),
        "mlm:output": [result],
    }


def model_bands(card: ModelCard) -> list[dict[str, Any]]:
    """Return the bands that a network takes, as STAC 1.1 lists them: each name once, in the order of the channels.

    MLM wants them in the properties, and STAC allows them there only beside those of an asset.
    """
    return [{"name": name} for name in dict.fromkeys(card.bands)]


def class_list(classes: Classes) -> dict[str, Any]:
    """Return the field `classification:classes` of the classes of a network; no field where there are too many."""
    if len(classes) > _MOST_CLASSES:
        return {}
    named = enumerate(zip(classes.names, classes.colours, strict=True))
    return {"classification:classes": classes_of((value, name, colour) for value, (name, colour) in named)}


def input_shapes(card: ModelCard, program: Program, batch: int, side: int) -> Shapes:
    """Return the shape of each input by name, in the order in which the network takes them.

    Args:
        card: The model.
        program: Its network.
        batch: Windows of a call.
        side: Side of a window, pixels.
    """
    if program.modalities:
        return modality_shapes(program, batch)
    dates = card.config.data.dates
    if dates == 1:
        return {"image": (batch, len(card.bands), side, side), "observed": (batch, side, side)}
    series = dates if isinstance(dates, int) else len(card.times)
    return {"image": (batch, series, len(card.bands), side, side), "observed": (batch, series, side, side),
            "day": (batch, series)}  # fmt: skip


def _inputs(card: ModelCard, shapes: Shapes) -> list[dict[str, Any]]:
    """Describe each input; the function normalises by itself, by the numbers of `value_scaling`."""
    made = []
    for name, shape in shapes.items():
        bands: tuple[str, ...] = ()
        scaling: list[dict[str, Any]] = []
        if name.startswith("image"):
            first = 0
            bands = card.bands
            for one in card.modalities:
                if name == f"image_{one.name}":
                    bands = one.bands
                    break
                first += len(one.bands)
            scaling = [{"type": "z-score", "mean": float(mean), "stddev": float(std) or 1.0}
                       for mean, std in zip(card.mean[first:], card.std[first:], strict=True)]  # fmt: skip
            scaling = scaling[: len(bands)]
        letters = {
            2: ["batch", "time"],
            3: ["batch", "height", "width"],
            5: ["batch", "time", "bands", "height", "width"],
        }
        four = (
            ["batch", "bands", "height", "width"] if name.startswith("image") else ["batch", "time", "height", "width"]
        )
        made.append({
            "name": name,
            "bands": list(bands),
            "input": {"shape": [-1, *shape[1:]], "dim_order": letters.get(len(shape), four),
                      "data_type": "int32" if name.startswith("day") else "float32"},
            **({"value_scaling": scaling} if scaling else {}),
            "description": _MEANINGS[name.partition("_")[0]],
        })  # fmt: skip
    return made


def _task(card: ModelCard) -> str:
    if card.task.values:
        return "regression"
    if card.task.several:
        return "classification"
    return "scene-classification" if card.task.per_image else "semantic-segmentation"


def _dims(shape: tuple[int, ...], *, per_image: bool) -> list[str]:
    return ["batch", "class"] if per_image or len(shape) == 2 else ["batch", "height", "width", "class"]
