"""`TrainingData` is the one interface of all kinds of data for training and evaluation.

There are three kinds: one cube (`CubeData`), several cubes (`CubesData`) and a store of labelled samples
(`SampleData`). Everything after them reads rows through a `Reader` and need not know the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from jaxtrain.config import RunConfig, TrainConfig
from jaxtrain.data.arrays import Reader
from jaxtrain.data.classes import Classes
from jaxtrain.data.ground import Ground
from jaxtrain.data.numbers import BandNumbers
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.reader import OnUnreadable
from jaxtrain.data.shuffle import ChunkOrder, chunk_numbers
from jaxtrain.data.splits import Part
from jaxtrain.data.statistics import Statistics
from jaxtrain.data.task import Task
from jaxtrain.data.windows import Counted, WindowPlan, Windows
from jaxtrain.models.modality import Modality
from zarr_store.errors import InvalidInput, NothingFound
from zarr_store.grid import Grid

__all__ = ["EvaluationSet", "LearnedFrom", "TrainingData", "TrainingSet", "check_digest", "no_rows"]


class LearnedFrom(Protocol):
    """The part of a model card about the training data; `ModelCard` has it."""

    @property
    def config(self) -> TrainConfig:
        """The whole configuration of the run."""

    @property
    def cube(self) -> str:
        """Path of the cube or sample store; of several cubes, of the first."""

    @property
    def cube_digest(self) -> str:
        """Digest of all bytes of the training data."""

    @property
    def bands(self) -> tuple[str, ...]:
        """Names, in the order of the network's channels."""

    @property
    def numbers(self) -> tuple[BandNumbers, ...]:
        """Meaning of the stored numbers of each band; none of runs that did not keep it."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band, in stored numbers."""

    @property
    def std(self) -> tuple[float, ...]:
        """Spread of each band, in stored numbers."""

    @property
    def classes(self) -> Classes:
        """The learned classes."""

    @property
    def grid(self) -> Grid | None:
        """Grid of the first cube; None of a sample store."""

    @property
    def split(self) -> Counted:
        """Split of the data into the parts of the run."""

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Facts about the training part; `leakage` among them where the split leaks."""

    @property
    def task(self) -> Task:
        """Task of the network."""

    @property
    def grounds(self) -> tuple[Ground, ...]:
        """The cubes, if there are several."""

    @property
    def edges(self) -> bool:
        """Whether windows reach over the edge of a grid, and only training needs `min_labelled`."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities of the network multimodal; none of other networks."""

    def of(self, number: int) -> LearnedFrom:
        """Return the card as if cube `number` of several were the only one."""


@dataclass(frozen=True)
class TrainingSet:
    """Training data that are ready for a run.

    Attributes:
        digest: SHA-256 over every byte of the training data.
        bands: Names, in the order of the network's channels.
        classes: Learned classes, by class index.
        task: Task of the network; for values, `statistics` adds their mean and spread.
        plan: The windows or samples of each part.
        reader: Reads them.
        statistics: Computes mean, spread and class counts of the training part; may read pixels.
        count: Counts the labels of each class in a part; may read labels. None where no classes are learned.
        grounds: The cubes; none of a sample store.
        leakage: Distance of test from training data, if the split does not rule out leakage.
        chunk: (time, y, x) pixels that are decoded together; None where an order by chunks gains nothing.
        numbers: Meaning of the stored numbers of each band.
        modalities: What each branch of the network multimodal gets.
    """

    digest: str
    bands: tuple[str, ...]
    classes: Classes
    task: Task
    plan: WindowPlan
    reader: Reader
    statistics: Callable[[], Statistics]
    count: Callable[[Part], npt.NDArray[np.int64]] | None = None
    grounds: tuple[Ground, ...] = ()
    leakage: Mapping[str, Any] | None = None
    chunk: tuple[int, int, int] | None = None
    numbers: tuple[BandNumbers, ...] = ()
    modalities: tuple[Modality, ...] = ()

    def order(self, run: RunConfig) -> SampleOrder | ChunkOrder:
        """Return the order of the training part: `run.shuffle`, seeded by `run.seed`."""
        windows = self.plan.parts["train"]
        if run.shuffle == "windows" or not len(windows) or self.chunk is None:
            return SampleOrder(run.seed, len(windows))
        chunks = chunk_numbers(windows.rows, windows.patch, self.chunk)
        return ChunkOrder(run.seed, chunks, run.batch_size, run.mixed_chunks)


@dataclass(frozen=True)
class EvaluationSet:
    """Windows or samples of an evaluation, their reader, warnings about the scores, and the dates of each cube."""

    url: str
    windows: Windows
    reader: Reader
    warnings: tuple[str, ...]
    dates: tuple[tuple[str, ...], ...] = ()


class TrainingData(Protocol):
    """An open cube, several open cubes, or an open sample store."""

    @property
    def kind(self) -> Literal["cube", "sample store"]:
        """Kind of the data, for messages; a model is evaluated on the kind it was trained on."""

    @property
    def url(self) -> str:
        """URL of the data; of several cubes all, separated by commas."""

    def digest(self, card: LearnedFrom) -> str | None:
        """Return the digest of the data as a run with this card takes it; None where they lack what the run reads."""

    def prepare(
        self, config: TrainConfig, earlier: LearnedFrom | None, on_unreadable: OnUnreadable | None
    ) -> TrainingSet:
        """Choose the windows of each part; an earlier run keeps its own.

        Args:
            config: The run.
            earlier: Card of the run that is continued.
            on_unreadable: The argument of `WindowReader`.

        Raises:
            InvalidInput: The data are not those that the run began with, or do not fit the configuration.
            NothingFound: No window or sample has anything to learn.
        """

    def select_part(self, card: LearnedFrom, part: Part) -> EvaluationSet:
        """Return one part of the run's own data, with the split of the run.

        Raises:
            InvalidInput: The data are no longer those of the run.
            NothingFound: The part is empty.
        """

    def select_all(self, card: LearnedFrom, *, without: Sequence[str] = (), insist: bool = False) -> EvaluationSet:
        """Return all of the data, which are other data than those of the run.

        Args:
            card: Card of the run.
            without: Modalities that the network does not get; the data may lack them.
            insist: Use pixels of another size and numbers that cannot be converted as they are, and warn.

        Raises:
            InvalidInput: Bands, units, pixel size, labels or classes do not fit the model.
            NothingFound: There is nothing to evaluate on.
        """

    def places(self, collection: str, windows: Windows) -> dict[str, npt.NDArray[Any]]:
        """Return place and time of each window, or the name of each sample, as arrays with one value for each row."""


def no_rows(url: str, card: LearnedFrom, part: Part | None, rows: str) -> NothingFound:
    """Return the error for an evaluation without windows or samples; it says why there are none.

    Args:
        url: The data.
        card: Card of the run.
        part: The part of the run's own data; None for other data.
        rows: "window" or "sample".
    """
    split = card.config.data.split
    share = 1.0 if part in (None, "train") else split.test if part == "test" else split.validation or split.folds
    if not share and not (part == "test" and split.test_dates):
        return NothingFound(
            f"the run keeps nothing of {url} for the {part} part (data.split.{part} = 0): evaluate another part with "
            "--split, or other data with --data"
        )
    if rows == "sample":
        return NothingFound(f"{url} has no sample of part {part or 'test'}")
    return NothingFound(f"{url} has no labelled pixel in part {part or 'test'}; see data.split")


def check_digest(url: str, digest: str, earlier: LearnedFrom | None) -> None:
    """Refuse data that differ from those with which the run began.

    Raises:
        InvalidInput: The digests differ.
    """
    if earlier is not None and digest != earlier.cube_digest:
        raise InvalidInput(
            f"{url} is not the cube that the run began with, or has changed (digest {earlier.cube_digest[:12]} → "
            f"{digest[:12]}); restore it, or train into another folder"
        )
