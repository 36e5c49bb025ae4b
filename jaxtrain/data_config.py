"""`DataConfig` says what a run is trained on: bands, dates, classes, split, augmentation, modalities."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DataConfig", "ModalityConfig", "Positive", "Share", "SplitConfig", "Strict"]

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """Settings that do not change and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SplitConfig(Strict):
    """The split of the data into training, validation and test; a block belongs to one part on every date.

    Example:
        >>> SplitConfig(block_m=5000, test=0.2).kind
        'blocks'
    """

    kind: Literal["blocks", "checkerboard", "random"] = Field(
        "blocks",
        description="blocks (for sample stores: cells of degrees) · checkerboard: every other block is test · random: "
        "leaks, because samples of all parts are neighbours; the report gives the leakage",
    )
    block_m: float = Field(10_000.0, gt=0, description="side of a square block, metres; blocks hold whole patches")
    validation: Share = Field(0.15, description="share of blocks for validation during training")
    test: Share = Field(0.15, description="share of blocks for the test split, which `terrashard evaluate` scores")
    seed: int = Field(0, description="seed of the choice of blocks; independent of the training seed")
    cell_deg: float = Field(0.5, gt=0, le=90, description="side of a cell of a sample store with coordinates, degrees")
    block_px: Positive = Field(15, description="side of a block of a labelled scene, pixels")
    buffer_m: float = Field(
        0.0, ge=0, description="training samples or windows closer than this to held-out ones are left out, metres"
    )
    buffer_px: int = Field(
        0,
        ge=0,
        description="for a labelled scene: training pixels this close to held-out ones are left out, pixels",
    )
    near_m: float = Field(
        1000.0, gt=0, description="the leakage figure counts test samples with a training sample nearer than this"
    )
    folds: int = Field(
        0,
        ge=0,
        description="number of folds of a cross-validation over all data but the test split; 0: no folds, "
        "data.split.validation is used",
    )
    fold: int = Field(0, ge=0, description="number of the fold that is validated on, from 0; the others are trained on")
    test_dates: tuple[str, ...] = Field(
        (),
        description="dates, their beginnings, or ranges for the test split, in place of blocks; not trained on",
    )

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation + test must leave a share for training, got {self.validation} + {self.test}")
        if self.folds == 1:
            raise ValueError("folds = 1 leaves nothing to train on: take 2 or more, or 0 for no folds")
        if self.fold and self.fold >= self.folds:
            raise ValueError(f"fold = {self.fold}, but there are folds = {self.folds}, numbered from 0")
        return self

    @property
    def validation_range(self) -> tuple[float, float]:
        """Part of all ground, by rank, that is validated on; the test part comes first.

        >>> SplitConfig(test=0.2, folds=4, fold=1).validation_range
        (0.4, 0.6)
        """
        if not self.folds:
            return (self.test, self.test + self.validation)
        rest = 1 - self.test
        ends = (self.test + rest * number / self.folds for number in (self.fold, self.fold + 1))
        first, last = (round(end, 12) for end in ends)
        return (first, last)

    def count_parts(self, total: int) -> tuple[int, int, int]:
        """Return how many of `total` blocks, by rank, are for the test, and the first and last that are validated on.

        Each part whose share is not 0 gets one at least.
        """
        test = max(1, round(self.test * total)) if self.test else 0
        if self.folds:
            rest = total - test
            return (test, test + rest * self.fold // self.folds, test + rest * (self.fold + 1) // self.folds)
        validation = max(1, round(self.validation * total)) if self.validation else 0
        return (test, test, test + validation)


class ModalityConfig(Strict):
    """The data of one modality of the network multimodal: where they are read, and which dates.

    Example:
        >>> ModalityConfig(collection="sentinel-1-rtc", bands=("vv", "vh")).most_days
        6.0
    """

    collection: str = Field("", description="group of the cube; empty for data.collection, or for a layer")
    layer: str = Field("", description="static layer of the cube (`terrashard stack`) in place of a collection")
    cube: str = Field("", description="path or URL of another cube with the modality; empty for data.cube")
    bands: tuple[str, ...] = Field((), description="bands, in order; empty means all")
    dates: int | Literal["all"] = Field(
        0,
        ge=0,
        description="dates of a window: 1: the nearest in time, without a time axis · another number: that many "
        "nearest dates, as a series · all · 0: as data.dates",
    )
    most_days: float = Field(
        6.0,
        ge=0,
        description="dates that are more than this number of days from the date of the window count as missing",
    )
    decibel: bool = Field(False, description="turn stored power into decibels, 10 log10, before anything else")
    dropout: Annotated[float, Field(ge=0, lt=1)] | Literal["common"] = Field(
        "common",
        description="probability in training that the modality of a sample is hidden; common: data.modality_dropout",
    )
    min_observed: Share = Field(
        0.0,
        description="smallest share of a training window's pixels that the modality observed; windows with less are "
        "not used in training; validation and test keep them",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> ModalityConfig:
        if self.layer and (self.collection or self.dates):
            raise ValueError(
                f"layer = {self.layer!r} has no dates and lies in no collection: leave out collection and dates"
            )
        return self


class DataConfig(Strict):
    """The data that are read, and what the model learns from them.

    Example:
        >>> DataConfig(cube="zagreb.zarr", bands=("red", "nir")).label
        'scl'
    """

    cube: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="path or URL of the cube or sample store, or a list of cubes with the same collection and bands; a "
        "relative path is relative to the configuration file"
    )
    collection: str = Field("sentinel-2-l2a", description="group of the cube")
    bands: tuple[str, ...] = Field((), description="bands of the main array, in order; empty means all")
    label: str = Field(
        "scl",
        description="the label: a class layer or an index of the collection, or a label layer of the cube "
        "(`terrashard labels`)",
    )
    classes: dict[str, str] = Field(
        default_factory=dict,
        description='class value → name, e.g. {"4" = "vegetation"}; values without a name are not trained on. '
        "Empty for all classes of a label layer, or to learn values",
    )
    colours: dict[str, str] = Field(default_factory=dict, description='class name → "#rrggbb" for maps and reports')
    learn_masked: bool = Field(False, description="also train on masked pixels (needed if clouds are classes)")
    patch: Positive = Field(128, description="side of a square window, pixels")
    dates: Positive | Literal["all"] = Field(
        1,
        description="dates in a window: 1; for model temporal also a number of consecutive dates, or all; for model "
        "multimodal 1: a window for each date of the collection, or all: one window for all dates",
    )
    modalities: dict[str, ModalityConfig] = Field(
        default_factory=dict, description="for multimodal: name of each modality → where its data are"
    )
    modality_dropout: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="for multimodal: probability in training that a modality of a sample is hidden; one always stays. "
        "With model.alone, which trains each modality alone in every step, 0 works well",
    )
    min_labelled: Share = Field(
        0.25,
        description="smallest share of labelled pixels of a training window; validation and test use every label",
    )
    split: SplitConfig = SplitConfig()
    cache: Literal["auto", "device", "host", "none"] = Field(
        "auto",
        description="where windows or samples are kept once they were read: device · host (memory) · none · auto: on "
        "a GPU or TPU if they fill at most 30 % of its free memory, else on the host if at most 25 %",
    )
    augment: bool = Field(True, description="random flips and quarter turns, on the device")
    zoom: float = Field(0.0, ge=0, le=1, description="random zoom by up to this share, in or out")
    jitter: float = Field(
        0.0, ge=0, le=1, description="random gain of a sample and offset of each band, in standard deviations"
    )
    band_dropout: Share = Field(0.0, description="probability that a band of a sample is hidden")
    mix: Literal["none", "mixup", "cutmix"] = Field("none", description="blend pairs of samples, or paste parts")
    mix_alpha: float = Field(0.2, gt=0, description="parameter of the beta distribution of the shares")
