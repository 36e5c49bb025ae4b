"""Draw the windows of a cube where the model errs most: image, label and prediction side by side.

Letters: H row, W column, C band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import Reader, as_images, put_batch
from jaxtrain.data.classes import UNLABELLED, Classes
from jaxtrain.data.windows import Window, Windows
from jaxtrain.models.modality import finest
from jaxtrain.parallel.mesh import batch_sharding
from zarr_store.lookup import picture_bands

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxtrain.learn.state import Program, TrainState
    from jaxtrain.learn.step import PredictStep

__all__ = ["Tile", "collect_tiles", "draw_tiles", "name_shown", "picture"]

Image = npt.NDArray[np.uint8]

_SHOWN, _LOOKED_AT = 6, 64
_LEAST_LABELLED = 0.02
_NOTHING = 236


@dataclass(frozen=True)
class Tile:
    """One window: image, label and prediction.

    Attributes:
        window: Place and time of the window.
        image: (H, W, C) as stored.
        observed: (H, W), 1 where something was seen.
        label: (H, W) class index or value; None if the image itself is the target.
        prediction: (H, W) class index or value.
        caption: Error of the prediction, in words.
    """

    window: Window
    image: npt.NDArray[Any]
    observed: npt.NDArray[np.uint8]
    label: npt.NDArray[Any] | None
    prediction: npt.NDArray[Any]
    caption: str


def collect_tiles(
    program: Program, predict: PredictStep, state: TrainState, reader: Reader, windows: Windows
) -> list[Tile]:
    """Collect the windows with the most errors among evenly spread ones, the worst first.

    Args:
        program: Gives the mesh and the task.
        predict: Result of `make_predict_step(program)`.
        state: The model.
        reader: Reads windows with labels.
        windows: Windows to choose from, usually the test part.
    """
    if not len(windows) or jax.process_count() > 1:
        return []  # each process would hold only its own rows
    rows = windows.rows[np.unique(np.linspace(0, len(windows) - 1, _LOOKED_AT).astype(int))]
    # the compiled step needs whole shares of the batch for every device, and always the same size
    axis = program.mesh.shape["data"]
    size = -(-min(program.config.run.batch_size, _LOOKED_AT) // axis) * axis
    sharding = batch_sharding(program.mesh)
    found: list[tuple[float, Tile]] = []
    for first in range(0, len(rows), size):
        chosen = rows[first : first + size]
        batch = reader.read(np.concatenate([chosen, np.repeat(chosen[-1:], size - len(chosen), axis=0)]))
        inputs = {name: array for name, array in batch.items() if name.startswith(("image", "observed", "day"))}
        answer = np.asarray(predict.of_batch(state, put_batch(inputs, sharding, size)))
        if program.modalities:
            batch |= _shown(program, batch)
        host = {name: as_images(array) for name, array in batch.items()}
        found += [
            _score_tile(program, row, {n: a[i] for n, a in host.items()}, answer[i]) for i, row in enumerate(chosen)
        ]
    worst = sorted((pair for pair in found if pair[0] >= 0), key=lambda pair: -pair[0])[:_SHOWN]
    return [tile for _, tile in worst]


def _shown(program: Program, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return the image of the modality of the finest grid, for the picture, and what any modality saw."""
    one = finest(program.modalities)
    image = batch[f"image_{one.name}"].repeat(one.ratio, axis=-2).repeat(one.ratio, axis=-1)
    seen = np.zeros((len(image), *image.shape[-2:]), np.uint8)
    for other in program.modalities:
        observed = batch[f"observed_{other.name}"]
        any_date = observed.max(axis=1) if other.dates else observed
        seen |= any_date.repeat(other.ratio, axis=-2).repeat(other.ratio, axis=-1)
    return {"image": image, "observed": np.repeat(seen[:, None], one.dates, axis=1) if one.dates else seen}


def _score_tile(
    program: Program, row: npt.NDArray[np.int32], sample: dict[str, npt.NDArray[Any]], answer: npt.NDArray[np.float32]
) -> tuple[float, Tile]:
    """Return the error of a prediction, -1 if too little is labelled, and the caption."""
    task = program.objective.task
    image, observed = _one_date(sample["image"], sample["observed"])
    seen = observed.astype(bool)
    label = sample.get("label")
    if task.value is not None and label is not None:
        known = np.isfinite(label)
        prediction: npt.NDArray[Any] = answer[..., 0]
        error = float(np.sqrt(np.square(prediction[known] - label[known]).mean())) if known.any() else 0.0
        wrong, caption = error, f"RMSE {error:.4g}"
    elif label is not None:
        known = label != UNLABELLED
        prediction = answer.argmax(axis=-1).astype(np.uint8)
        right = float((prediction[known] == label[known]).mean()) if known.any() else 1.0
        wrong, caption = 1 - right, f"{right:.1%} right"
    else:
        known, prediction = seen, answer[..., 0]
        error = float(prediction[seen].mean()) if seen.any() else 0.0
        wrong, caption = error, f"error {error:.3g}"
    window = Window.of(row)
    enough = known.mean() >= _LEAST_LABELLED
    return (wrong if enough else -1.0), Tile(window, image, observed, label, prediction, caption)


def _one_date(
    image: npt.NDArray[Any], observed: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Return the date of a series (H, W, T, C) on which most was seen; a single image stays."""
    if image.ndim == 3:
        return image, observed
    best = int(observed.sum(axis=(0, 1)).argmax())
    return image[:, :, best], observed[:, :, best]


def draw_tiles(
    tiles: Sequence[Tile], *, classes: Classes | None, bands: Sequence[str], times: Sequence[Sequence[str]], truth: str
) -> Figure:
    """Draw image, label and prediction of each tile in a row; values share one scale.

    Args:
        tiles: Result of `collect_tiles`.
        classes: Names and colours; None of values.
        bands: Names of the image's bands.
        times: Dates of each cube.
        truth: Name of the label; empty if there is none.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = [name_shown(bands), *([truth] if truth else []), "prediction" if truth else "reconstruction error"]
    figure = Figure(figsize=(2.53 * len(columns), 2.45 * len(tiles) + 0.6), layout="constrained")
    grid = figure.subplots(len(tiles), len(columns), squeeze=False)
    for row, tile in zip(grid, tiles, strict=True):
        row[0].imshow(picture(tile.image, tile.observed, bands), interpolation="nearest")
        answers = [*([] if tile.label is None else [tile.label]), tile.prediction]
        if classes is not None:
            palette = _palette(classes)
            seen = np.where(tile.observed == 1, answers[-1], np.uint8(UNLABELLED))
            for axes, values in zip(row[1:], (answers[0], seen), strict=True):
                axes.imshow(palette[values], interpolation="nearest")
        else:
            masked = [np.where(tile.observed == 1, values, np.nan) for values in answers]
            low, high = _range(masked)
            for axes, values in zip(row[1:], masked, strict=True):
                drawn = axes.imshow(values, interpolation="nearest", vmin=low, vmax=high, cmap="viridis")
                axes.set_facecolor("#ececec")
            figure.colorbar(drawn, ax=row[-1], shrink=0.8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
        window = tile.window
        where = f"cube {window.cube + 1}, " if len(times) > 1 else ""
        row[0].set_ylabel(
            f"{where}{times[window.cube][window.time][:10]}\ny {window.y}, x {window.x}\n{tile.caption}", fontsize=7
        )
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    if classes is not None:
        handles = [Patch(color=c, label=n) for n, c in zip(classes.names, classes.colours, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _range(arrays: Sequence[npt.NDArray[Any]]) -> tuple[float, float]:
    values = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays])
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99])
    return float(low), float(max(high, low + 1e-9))


def _palette(classes: Classes) -> Image:
    palette = np.full((256, 3), _NOTHING, np.uint8)
    palette[: len(classes)] = classes.rgb()
    return palette


def name_shown(bands: Sequence[str]) -> str:
    """Return the title of a picture: the bands that it shows as red, green and blue.

    >>> name_shown(["green", "red", "nir"])
    'image: nir, red, green'
    """
    names = list(dict.fromkeys(bands[position] for position in picture_bands(bands)))
    return f"image: {', '.join(names)}"


def picture(image: npt.NDArray[Any], observed: npt.NDArray[np.uint8], bands: Sequence[str]) -> Image:
    """Return the image in the colours of `picture_bands`, stretched from percentile 2 to 98."""
    values = image[..., list(picture_bands(bands))].astype(np.float64)
    seen = values[observed == 1]
    if not seen.size:
        return np.full(values.shape, _NOTHING, np.uint8)
    low, high = np.nanpercentile(seen, [2, 98])
    stretched = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    return np.where(observed[..., None] == 1, np.nan_to_num(stretched), _NOTHING).astype(np.uint8)
