"""Draw images with their true and predicted class, for a model that predicts for whole images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import Reader, as_images, put_batch
from jaxtrain.data.windows import Windows
from jaxtrain.evaluation.tiles import name_shown
from jaxtrain.models.modality import finest
from jaxtrain.parallel.mesh import batch_sharding
from zarr_store.lookup import picture_bands

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxtrain.learn.state import Program, TrainState
    from jaxtrain.learn.step import PredictStep

__all__ = ["Shown", "collect_shown", "draw_shown"]

_SHOWN, _LOOKED_AT, _COLUMNS = 12, 192, 6


@dataclass(frozen=True)
class Shown:
    """One image (H, W, C) as stored, whether the answer is wrong, and the two lines under it."""

    image: npt.NDArray[Any]
    wrong: bool
    caption: str


def collect_shown(
    program: Program,
    predict: PredictStep,
    state: TrainState,
    reader: Reader,
    windows: Windows,
    names: Sequence[str],
) -> list[Shown]:
    """Collect the worst predictions among evenly spread samples, the most confident first; then right ones.

    Args:
        program: Gives the mesh.
        predict: Result of `make_predict_step(program)`.
        state: The model.
        reader: Reads samples.
        windows: Windows to choose from, usually the test part.
        names: Names of the classes.
    """
    if not len(windows) or jax.process_count() > 1:
        return []  # each process would hold only its own rows
    rows = windows.rows[np.unique(np.linspace(0, len(windows) - 1, _LOOKED_AT).astype(int))]
    axis = program.mesh.shape["data"]
    size = -(-len(rows) // axis) * axis
    batch = reader.read(np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)]))
    inputs = {name: array for name, array in batch.items() if name.startswith(("image", "observed"))}
    there = put_batch(inputs, batch_sharding(program.mesh), size)
    answer_BK = np.asarray(predict.of_batch(state, there))[: len(rows)]
    label = batch["label"][: len(rows)]
    several = label.ndim == 2
    shown = f"image_{finest(program.modalities).name}" if program.modalities else "image"
    images = as_images(batch[shown])
    predicted = answer_BK > 0.5 if several else answer_BK.argmax(axis=-1)
    wrong = (predicted != label).any(axis=-1) if several else predicted != label
    sure = np.abs(answer_BK - 0.5).max(axis=-1) if several else answer_BK.max(axis=-1)
    order = np.lexsort((-sure, ~wrong))[:_SHOWN]

    def called(value: Any) -> str:
        return ", ".join(names[int(k)] for k in np.flatnonzero(value)) if several else names[int(value)]

    captions = {i: f"{called(label[i])}\n→ {called(predicted[i])} {sure[i]:.2f}" for i in order}
    return [Shown(images[i], bool(wrong[i]), captions[i]) for i in order]


def draw_shown(shown: Sequence[Shown], bands: Sequence[str]) -> Figure:
    """Draw all images in a grid; wrong predictions have a red caption.

    Args:
        shown: Result of `collect_shown`.
        bands: Names of the image's bands.
    """
    from matplotlib.figure import Figure

    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 2.1 * rows), layout="constrained")
    for axes in (grid := figure.subplots(rows, _COLUMNS, squeeze=False)).ravel():
        axes.set_axis_off()
    for axes, one in zip(grid.ravel(), shown, strict=False):
        axes.imshow(_picture(one.image, bands), interpolation="nearest")
        axes.set_title(one.caption, fontsize=7, color="#c4281b" if one.wrong else "#222222")
    figure.suptitle(name_shown(bands), fontsize=8)
    return figure


def _picture(image: npt.NDArray[Any], bands: Sequence[str]) -> npt.NDArray[np.uint8]:
    values = image[..., list(picture_bands(bands))].astype(np.float64)
    low, high = np.percentile(values, [1, 99])
    stretched = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    return np.asarray(stretched.astype(np.uint8))
