"""`Classifier` gives the class probabilities of whole images by a network that was trained on a sample store.

Images come one by one, from an open store or from a folder that is being decoded, and leave in batches, so memory does
not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import put_batch
from jaxtrain.data.mismatch import check_side
from jaxtrain.data.numbers import Conversion, convert_to, sample_numbers
from jaxtrain.evaluation.scores import restore_model
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import PredictStep, make_predict_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.runs.rundir import ModelCard, load_card
from zarr_store.errors import InvalidInput
from zarr_store.lookup import find_bands
from zarr_store.samples import Sample, SampleSpec, SampleStore

__all__ = ["Answers", "Classifier", "samples_of"]

T = TypeVar("T")

_READ = 64
"""Samples of a store that are read at once."""


@dataclass(frozen=True)
class Answers:
    """Images of one batch with their class probabilities.

    Attributes:
        names: Where the images came from.
        longitude, latitude: Degrees; nan where unknown.
        probability: float32 (images, classes); nan of an image without a valid pixel.
    """

    names: tuple[str, ...]
    longitude: npt.NDArray[np.float64]
    latitude: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """A network and images that fit it.

    Attributes:
        card: The model.
        step: Step of its checkpoint.
        warnings: Warnings about limits of the answers.
    """

    card: ModelCard
    step: int
    warnings: tuple[str, ...]
    _program: Program
    _state: TrainState
    _bands: tuple[int, ...]
    _conversion: Conversion | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return self.card.classes.names

    @property
    def several(self) -> bool:
        """Whether an image may have several classes, each with a probability of its own."""
        return self.card.task.several

    @classmethod
    def open(cls, run: str | PathLike[str], spec: SampleSpec, url: str, *, allow_mismatch: bool = False) -> Self:
        """Open a run for images.

        Args:
            run: The run directory; its best or newest undamaged checkpoint is used.
            spec: Description of the images.
            url: Where they are, for messages.
            allow_mismatch: Use images of another size, or whose numbers cannot be converted, and warn.

        Raises:
            InvalidInput: The run is of another kind, or the images have another size or other units.
            UnknownName: The images lack a band of the model.
        """
        run = Path(run)
        card = load_card(run)
        if card.unit != "images" or card.task.rebuild:
            kind = {"windows": "cubes: map one with `terrashard predict`",
                    "pixels": "one labelled scene, and classifies the middle of a window"}.get(
                        card.unit, "images without classes: an autoencoder; see `terrashard embed`")  # fmt: skip
            raise InvalidInput(f"{run} was trained on {kind}; classify takes runs of sample stores of labelled images")
        bands = find_bands(card.bands, spec.bands, url)
        conversion, notes = convert_to(card.numbers, sample_numbers(spec, bands), url, insist=allow_mismatch)
        side = card.statistics.get("image_side")  # not in cards of earlier releases
        if side is not None:
            notes += check_side(spec.size, side, url, insist=allow_mismatch)
        program, state, step, passed_over = restore_model(run, card)
        return cls(card, step, (*passed_over, *notes), program, state, bands, conversion)

    def answers(
        self, samples: Iterable[Sample], count: int, on_batch: Callable[[int, int], None] | None = None
    ) -> Iterator[Answers]:
        """Classify images, in their order.

        Args:
            samples: The images.
            count: Number of them, for progress.
            on_batch: Called with (images done, all images).
        """
        predict = make_predict_step(self._program)
        axis = int(self._program.mesh.shape["data"])
        size = -(-self.card.config.run.batch_size // axis) * axis
        done = 0
        before: tuple[tuple[Sample, ...], npt.NDArray[np.bool_], jax.Array] | None = None
        for group in _grouped(samples, size):
            asked = self._ask(predict, group, size)
            if before is not None:  # one batch late: the device works while the next images are decoded
                yield _answered(*before)
            before = (group, *asked)
            done += len(group)
            if on_batch:
                on_batch(done, count)
        if before is not None:
            yield _answered(*before)

    def _ask(
        self, predict: PredictStep, group: tuple[Sample, ...], size: int
    ) -> tuple[npt.NDArray[np.bool_], jax.Array]:
        """Begin to classify a batch, which is filled up with images without data; also say which images have data."""
        chosen = list(self._bands)
        image: npt.NDArray[Any] = np.stack([np.asarray(sample.image)[chosen] for sample in group])
        observed = np.stack([
            np.ones(image.shape[2:], bool) if sample.valid is None else sample.valid.astype(bool) for sample in group
        ])  # fmt: skip
        if image.dtype.kind == "f":
            observed &= np.isfinite(image).all(axis=1)
        if self._conversion is not None:
            image = self._conversion.apply(image)
        missing = size - len(group)
        batch = {
            "image": np.concatenate([image, np.zeros((missing, *image.shape[1:]), image.dtype)]),
            "observed": np.concatenate([observed, np.zeros((missing, *observed.shape[1:]), bool)]).view(np.uint8),
        }
        there = put_batch(batch, batch_sharding(self._program.mesh), size)
        return np.asarray(observed.any(axis=(1, 2))), predict.of_batch(self._state, there)


def samples_of(store: SampleStore) -> Iterator[Sample]:
    """Yield the samples of a store in their order, some of them in memory at a time.

    Raises:
        InvalidInput: It holds a labelled scene.
        CorruptShard: A sample is damaged; the message names it.
    """
    spec, names = store.spec, store.names()
    if spec.labelled == "pixels":
        raise InvalidInput(f"{store.url} is a labelled scene; classify takes a store or a folder of whole images")
    for numbers in _grouped(range(spec.count), _READ):
        images, valid = store.images(numbers), store.valid(numbers) if spec.masked else None
        for at, number in enumerate(numbers):
            yield Sample(
                images[at], store.label[number], float(store.longitude[number]), float(store.latitude[number]),
                names[number], None if valid is None else valid[at] == 1,
            )  # fmt: skip


def _grouped(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    rest = iter(values)
    while group := tuple(islice(rest, size)):
        yield group


def _answered(group: tuple[Sample, ...], seen: npt.NDArray[np.bool_], asked: jax.Array) -> Answers:
    probability = np.array(jax.device_get(asked), np.float32)[: len(group)]
    probability[~seen] = np.nan
    places = np.array([(sample.longitude, sample.latitude) for sample in group], np.float64)
    return Answers(tuple(sample.name for sample in group), places[:, 0], places[:, 1], probability)
