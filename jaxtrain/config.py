"""`TrainConfig`: every default of a training run, in one place.

Functions take this object; `settings.py` makes it from TOML and `--set`. All models are frozen and refuse unknown keys.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from jaxtrain.data_config import DataConfig, ModalityConfig, Positive, Share, SplitConfig, Strict
from jaxtrain.placement import PlacementConfig, fill_groups, mesh_of_placement

__all__ = ["BranchConfig", "DataConfig", "HeteroConfig", "MeshConfig", "ModalityConfig", "ModelConfig", "OptimConfig",
           "PlacementConfig", "RunConfig", "SplitConfig", "TrainConfig"]  # fmt: skip


class BranchConfig(Strict):
    """The size of one branch of the network multimodal.

    Example:
        >>> BranchConfig(width=8).depth
        0
    """

    width: int = Field(0, ge=0, description="channels of the first level; 0: model.width")
    depth: int = Field(
        0, ge=0, description="number of times the image is halved; 0: down to the coarsest level of model.depth"
    )


class ModelConfig(Strict):
    """The network: its kind, its size and its precision.

    Example:
        >>> ModelConfig(name="resnet", depth=18, stem="pixel").width
        16
    """

    name: str = Field("unet", description="the network: unet, cnn, resnet, mlp, temporal, multimodal or autoencoder")
    width: Positive = Field(16, description="channels of the first level; each level doubles them")
    depth: Positive = Field(
        3, description="number of times the image is halved; for cnn, blocks; for resnet, layers: 10, 18, 34 or 50"
    )
    stem: Literal["small", "pixel", "patch", "large"] = Field(
        "small",
        description="for resnet: small keeps the size, pixel joins the bands of each pixel first (for many bands), "
        "patch folds 2 × 2 pixels to channels, large quarters it",
    )
    blocks: tuple[Positive, ...] = Field((), description="for resnet: blocks of each stage, instead of a depth")
    norm: Literal["group", "batch", "local"] = Field("group", description="group · batch (synchronised) · local batch")
    dropout: Share = Field(0.0, description="probability that an activation is dropped in training")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="number type of convolutions; parameters, norms and losses stay float32"
    )
    remat: bool = Field(False, description="compute activations again in the backward pass: less memory, more time")
    code: Positive = Field(8, description="for autoencoder: channels of the code")
    taps: Positive = Field(5, description="for temporal: dates that a convolution over dates spans, odd")
    pooling: Literal["attention", "mean"] = Field(
        "attention", description="for temporal, over dates: attention by learned heads, or mean and maximum"
    )
    context: int = Field(
        0,
        ge=0,
        description="for temporal: 3 × 3 blocks over pixels after the dates; 0 classifies each pixel by its own series",
    )
    fusion: Literal["late", "middle", "early"] = Field(
        "late",
        description="for multimodal: where modalities are merged: late, after an encoder and decoder of each; middle, "
        "between the encoders and one decoder, at every level; early, after the first block of each",
    )
    alone: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="for multimodal: share of the training loss that comes from the predictions of single modalities, "
        "through the same fusion and head; 0: none",
    )
    modalities: dict[str, BranchConfig] = Field(
        default_factory=dict, description="for multimodal: name of a modality → size of its branch, where it differs"
    )
    turns: bool = Field(
        False, description="evaluate and predict by the mean over the eight rotations and mirror images of each image"
    )

    @model_validator(mode="after")
    def _views_have_one_norm(self) -> ModelConfig:
        if self.alone and self.norm != "group":
            raise ValueError(
                f"alone = {self.alone} mixes batches of all modalities with those of each alone, and norm = "
                f"{self.norm!r} keeps statistics of batches, which would fit neither: use norm = 'group', or alone = 0"
            )
        return self


class OptimConfig(Strict):
    """The loss and the optimiser, a chain of optax.

    Example:
        >>> OptimConfig(name="sgd", learning_rate=0.1).schedule
        'cosine'
    """

    name: Literal["adamw", "adam", "sgd", "lamb", "muon"] = Field("adamw", description="the optimiser")
    learning_rate: float = Field(2e-3, gt=0, description="largest learning rate, after the warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of kernels; norms and biases have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, for sgd")
    nesterov: bool = Field(True, description="Nesterov momentum, for sgd")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up: decay to 0, or constant"
    )
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up, at most half of the run")
    clip_norm: float | None = Field(
        1.0, gt=0, description="a gradient with a larger norm is scaled down to it; none (or inf) for no clipping"
    )
    loss: Literal["cross_entropy", "focal", "dice", "huber", "mse"] = Field(
        "cross_entropy", description="dice is added to cross-entropy; huber and mse are for values"
    )
    focal_gamma: float = Field(2.0, ge=0, description="exponent of the focal loss")
    huber_delta: float = Field(1.0, gt=0, description="error where huber becomes linear, standard deviations")
    label_smoothing: Share = Field(0.0, description="share of the target that is spread over all classes")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the averaged parameters that are evaluated; 0 for none")
    accumulate: Positive = Field(1, description="batches that make one update, as one large batch would")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: inverse square root of frequency")

    @field_validator("clip_norm", mode="before")
    @classmethod
    def _without_clipping(cls, norm: Any) -> Any:
        # TOML has no null, so a word stands for it; a norm without end never clips
        if isinstance(norm, str) and norm.strip().lower() in ("none", "inf"):
            return None
        return None if isinstance(norm, float) and norm == math.inf else norm


class MeshConfig(Strict):
    """Sizes of the mesh axes; their product must equal the number of devices used.

    Example:
        >>> MeshConfig(data=2, space=(2, 2)).axes
        {'data': 2, 'space': 2, 'space_w': 2, 'model': 1}
    """

    auto: bool = Field(False, description='the planner chooses the mesh, as `mesh = "auto"` says')
    data: Positive = Field(
        1, description="number of parts into which the batch is split; each is computed by a replica"
    )
    model: Positive = Field(1, description="number of parts into which the filters are split")
    space: Positive | tuple[Positive, Positive] = Field(
        1, description="number of parts into which images are split: n parts of the rows, or [rows, columns]"
    )
    zero: Literal[0, 1, 3] = Field(
        0,
        description="also split over the axis data: 1 the optimiser's moments, 3 the parameters too",
    )
    pipe: Positive = Field(1, description="number of pipeline stages, each on its own devices")
    schedule: Literal["gpipe", "1f1b", "interleaved"] = Field("1f1b", description="order in which a pipeline computes")
    microbatches: Positive = Field(4, description="parts into which a pipeline divides a batch")
    chunks: Positive = Field(2, description="parts of the network on each stage of the schedule interleaved")
    balance: Literal["estimated", "measured"] = Field(
        "estimated", description="how a pipeline is cut: by the compiler's count, or by timing on the device"
    )
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = Field(
        (),
        description='ordered (regular expression on the parameter path, axis per dimension or ""); before the defaults',
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _without_null(cls, rules: Any) -> Any:
        # TOML has no null, so "" stands for a dimension that is not split
        if not isinstance(rules, (list, tuple)):
            return rules
        return [
            (rule[0], tuple(axis or None for axis in rule[1]))
            if isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[1], (list, tuple))
            else rule
            for rule in rules
        ]

    @property
    def spaces(self) -> tuple[int, int]:
        """Parts of the rows and of the columns of an image."""
        return self.space if isinstance(self.space, tuple) else (self.space, 1)

    @property
    def axes(self) -> dict[str, int]:
        """Name and size of each mesh axis, outermost first; `data` and `model` always, others if they split."""
        rows, columns = self.spaces
        optional = {"space": rows, "space_w": columns}
        pipe = {"pipe": self.pipe} if self.pipe > 1 else {}
        return pipe | {"data": self.data} | {name: n for name, n in optional.items() if n > 1} | {"model": self.model}

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.axes.values())

    @property
    def parts(self) -> int:
        """Number of parts into which a pipeline cuts the network."""
        return self.pipe * (self.chunks if self.schedule == "interleaved" else 1)

    @model_validator(mode="before")
    @classmethod
    def _chosen_by_the_planner(cls, values: Any) -> Any:
        if values == "auto":
            return {"auto": True}
        if isinstance(values, dict) and values.get("auto") and len(values) > 1:
            named = ", ".join(f"mesh.{name}" for name in values if name != "auto")
            raise ValueError(f"mesh = 'auto' chooses the mesh, and {named} is named too: leave one of the two out")
        return values

    @model_validator(mode="after")
    def _makes_sense(self) -> MeshConfig:
        # where data is not named, it may still become all devices: `make_mesh` checks that
        if self.zero and self.data == 1 and "data" in self.model_fields_set:
            raise ValueError(f"zero = {self.zero} splits over the axis data, whose size is 1: set data, or zero = 0")
        if self.pipe > 1 and self.schedule == "interleaved" and self.microbatches % self.pipe:
            raise ValueError(
                f"the schedule interleaved sends microbatches in rounds of pipe = {self.pipe}: microbatches "
                f"{self.microbatches} must be a multiple of it"
            )
        return self


def image_divisor(model: ModelConfig) -> int | None:
    """Return the rows of the image that one row of the coarsest level stands for; None for an unknown network.

    >>> image_divisor(ModelConfig(name="unet", depth=3)), image_divisor(ModelConfig(name="resnet", depth=18))
    (8, 8)
    """
    match model.name:
        case "unet" | "autoencoder":
            return 1 << model.depth
        case "cnn" | "temporal":
            return 1
        case "resnet":
            return {"small": 1, "pixel": 1, "patch": 2, "large": 4}[model.stem] << (len(model.blocks or (1,) * 4) - 1)
    return None


class RunConfig(Strict):
    """Length, intervals and randomness of the run.

    Example:
        >>> RunConfig(steps=1000, monitor="miou", patience=5).batch_size
        16
    """

    steps: Positive = Field(400, description="steps of the whole training")
    batch_size: Positive = Field(16, description="windows per step over all devices")
    seed: int = Field(
        0, description="seed of the order of samples, the augmentation and the first weights; any whole number"
    )
    log_every: Positive = Field(10, description="steps between lines of progress and entries of TensorBoard")
    evaluate_every: Positive = Field(100, description="steps between validations")
    checkpoint_every: Positive = Field(100, description="steps between checkpoints")
    monitor: Literal["none", "loss", "accuracy", "macro_f1", "miou", "r2", "rmse"] = Field(
        "none",
        description="validation score whose best checkpoint is kept, evaluated and used; none: the newest is used",
    )
    patience: int = Field(
        0,
        ge=0,
        description="validations without a better run.monitor after which training stops; 0: no early stop",
    )
    keep_checkpoints: int = Field(3, ge=2, description="newest verified checkpoints that are kept")
    read_threads: Positive = Field(2, description="threads that wait for batches and put them on the devices")
    prefetch: Positive = Field(2, description="batches read ahead of the device")
    shuffle: Literal["chunks", "windows"] = Field(
        "chunks", description="chunks: each chunk is decoded once per epoch · windows: any order of windows"
    )
    mixed_chunks: Positive = Field(4, description="chunks whose windows are mixed, for each position in the batch")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a loss that is not finite: stop · skip (the step changes nothing)"
    )
    max_skipped: Positive = Field(10, description="largest number of skipped steps in a run")
    on_corrupt: Literal["stop", "quarantine"] = Field(
        "stop", description="a damaged chunk: stop · quarantine (its windows are listed and left out of training)"
    )
    max_quarantined: Positive = Field(16, description="largest number of windows in quarantine, for each process")
    track: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="trackers besides TensorBoard and metrics.jsonl; each needs its extra"
    )
    deterministic: bool = Field(
        True,
        description="on GPUs: only kernels that sum in a fixed order, so a continued run equals an uninterrupted one; "
        "false makes steps up to a tenth faster",
    )
    hang_s: float = Field(1200.0, gt=0, description="seconds without progress until a run writes its stacks and ends")


class HeteroConfig(Strict):
    """Replicas of unequal speed: each process trains by itself, and its part of a batch is proportional to its speed.

    Example:
        >>> HeteroConfig(enabled=True, chunk=4).silence_s
        20.0
    """

    enabled: bool = Field(
        False, description="each process of the run is a replica; `terrashard launch` starts them and hands out shares"
    )
    chunk: int = Field(
        0,
        ge=0,
        description="windows of a chunk, the smallest part of a batch that a replica takes; it divides the batch. "
        "0: the largest that leaves 16 chunks or more",
    )
    silence_s: float = Field(20.0, gt=0, description="seconds without a sign of life until a replica is dropped")
    compare_every: Positive = Field(
        100, description="steps between comparisons of the parameters; where they differ, those of the leader are sent"
    )


class TrainConfig(Strict):
    """All settings of a training run.

    Example:
        >>> config = TrainConfig.model_validate({"data": {"cube": "zagreb.zarr"}, "run": {"steps": 200}})
        >>> config.model.name, config.run.steps
        ('unet', 200)
    """

    data: DataConfig
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    placement: PlacementConfig = PlacementConfig()
    run: RunConfig = RunConfig()
    hetero: HeteroConfig = HeteroConfig()

    @model_validator(mode="before")
    @classmethod
    def _mesh_follows_from_placement(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("placement"), (dict, PlacementConfig)):
            return values
        try:
            placement = PlacementConfig.model_validate(values["placement"])
        except ValidationError:  # its own field tells what is wrong with it
            return values
        mesh = values.get("mesh", {})
        if placement.kind == "mesh" or not isinstance(mesh, (dict, str, MeshConfig)):
            return values
        data = values.get("data")
        known = data.get("modalities") if isinstance(data, dict) else getattr(data, "modalities", None)
        placement = fill_groups(placement, list(known) if isinstance(known, dict) else [])
        table = mesh.model_dump(exclude_unset=True) if isinstance(mesh, MeshConfig) else mesh
        return {**values, "placement": placement, "mesh": mesh_of_placement(placement, table)}

    @property
    def chunk(self) -> int:
        """Windows of a chunk: those of `hetero.chunk`, or of the largest that divides the batch into 16 or more."""
        batch = self.run.batch_size
        return self.hetero.chunk or max(
            n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or batch >= 16 * n)
        )

    @property
    def unit(self) -> int:
        """Windows that the devices of one process compute at once: a batch, or a chunk where replicas are unequal."""
        return self.chunk if self.hetero.enabled else self.run.batch_size

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.run.batch_size % self.mesh.data:
            raise ValueError(
                f"run.batch_size {self.run.batch_size} must be a multiple of mesh.data {self.mesh.data}, "
                "so that each device gets whole windows"
            )
        if self.data.patch % (1 << self.model.depth) and self.model.name in ("unet", "autoencoder"):
            raise ValueError(
                f"data.patch {self.data.patch} must be a multiple of 2^model.depth = {1 << self.model.depth}"
            )
        return self

    @model_validator(mode="after")
    def _has_what_is_monitored(self) -> TrainConfig:
        if self.run.patience and self.run.monitor == "none":
            raise ValueError("run.patience waits for a better score: name it in run.monitor, e.g. 'loss' or 'macro_f1'")
        if self.run.monitor != "none" and not (self.data.split.validation or self.data.split.folds):
            raise ValueError("run.monitor needs validations, and data.split.validation is 0: give it a share")
        return self

    @model_validator(mode="after")
    def _needs_no_labels(self) -> TrainConfig:
        if self.model.name != "autoencoder":
            return self
        if self.data.mix != "none":
            raise ValueError("data.mix mixes labels, and an autoencoder learns without: use data.mix = 'none'")
        if self.optim.loss not in ("mse", "huber"):
            raise ValueError(
                f"optim.loss = {self.optim.loss!r} is for classes, autoencoder gives back numbers: use mse or huber"
            )
        return self

    @model_validator(mode="after")
    def _dates_make_sense(self) -> TrainConfig:
        if self.model.name == "multimodal":
            return self
        series = self.model.name == "temporal"
        if series != (self.data.dates != 1):
            raise ValueError(
                f"data.dates = {self.data.dates!r} with model.name = {self.model.name!r}: temporal learns from several "
                "dates (data.dates = 'all', or a number above 1), other networks from one (data.dates = 1)"
            )
        if not series:
            return self
        if self.model.taps % 2 == 0:
            raise ValueError(f"model.taps {self.model.taps} must be odd: a date and as many before as after it")
        if self.data.mix == "mixup":
            raise ValueError("data.mix = 'mixup' blends what was observed on different days: use cutmix or none")
        if self.data.split.test_dates:
            raise ValueError("data.split.test_dates holds out single dates, but a series has several: split by blocks")
        return self

    @model_validator(mode="after")
    def _modalities_make_sense(self) -> TrainConfig:
        data, model = self.data, self.model
        if model.name != "multimodal":
            if data.modalities or model.modalities:
                raise ValueError(
                    f"data.modalities and model.modalities are for model.name = 'multimodal', not {model.name!r}"
                )
            return self
        if len(data.modalities) < 1:
            raise ValueError("model.name = 'multimodal' needs modalities: a table [data.modalities.NAME] for each")
        wrong = [name for name in data.modalities if not re.fullmatch("[a-z][a-z0-9_]*", name)]
        if wrong:
            raise ValueError(
                f"data.modalities.{wrong[0]}: a name has small letters, digits and _ and begins with a letter"
            )
        unknown = [name for name in model.modalities if name not in data.modalities]
        if unknown:
            raise ValueError(
                f"model.modalities.{unknown[0]} is not a modality of the data: choose from {', '.join(data.modalities)}"
            )
        if data.dates not in (1, "all"):
            raise ValueError(f"data.dates = {data.dates} with model.name = 'multimodal': take 1 or 'all'")
        for name, one in data.modalities.items():
            if data.dates == "all" and one.dates not in (0, "all"):
                raise ValueError(
                    f"data.modalities.{name}.dates = {one.dates} with data.dates = 'all': a window of all dates has no "
                    "date of its own to be near to; take 'all', or data.dates = 1"
                )
        if data.bands:
            raise ValueError("data.bands with model.name = 'multimodal': name bands in data.modalities.NAME.bands")
        if data.mix != "none":
            raise ValueError("data.mix mixes images of one grid: use data.mix = 'none' with model.name = 'multimodal'")
        if data.patch % (1 << model.depth):
            raise ValueError(f"data.patch {data.patch} must be a multiple of 2^model.depth = {1 << model.depth}")
        return self

    @model_validator(mode="after")
    def _batch_can_be_piped(self) -> TrainConfig:
        mesh, batch = self.mesh, self.run.batch_size
        if mesh.pipe == 1:
            return self
        if batch % (mesh.microbatches * mesh.data):
            raise ValueError(
                f"run.batch_size {batch} cannot be cut into mesh.microbatches {mesh.microbatches} of whole windows for "
                f"mesh.data {mesh.data}: it must be a multiple of {mesh.microbatches * mesh.data}"
            )
        if self.model.norm == "batch" and mesh.microbatches > 1:
            raise ValueError(
                "model.norm = 'batch' needs the whole batch at once, a pipeline sees one microbatch after the other: "
                "use model.norm = 'group' or 'local', or mesh.microbatches = 1"
            )
        if self.model.remat:
            raise ValueError(
                "model.remat saves what a pipeline's few microbatches under way do not need: use model.remat = false, "
                "or mesh.pipe = 1"
            )
        if self.model.turns:
            raise ValueError(
                "model.turns is the mean over eight passes, of which a pipeline makes one: use model.turns = false, or "
                "mesh.pipe = 1"
            )
        if self.optim.accumulate > 1:
            raise ValueError(
                "optim.accumulate > 1 does for one device what mesh.microbatches do in a pipeline: raise "
                "run.batch_size and mesh.microbatches instead"
            )
        if self.optim.loss == "dice":
            raise ValueError(
                "optim.loss = 'dice' is a quotient over the whole batch, which no stage of a pipeline sees: use "
                "mesh.pipe = 1 or another loss"
            )
        return self

    @model_validator(mode="after")
    def _image_can_be_split(self) -> TrainConfig:
        parts = max(self.mesh.spaces)
        if parts == 1:
            return self
        divisor = image_divisor(self.model)
        if divisor is None:
            raise ValueError(
                "mesh.space splits the images of autoencoder, cnn, resnet, temporal, unet, not those of "
                f"{self.model.name}: use mesh.space = 1"
            )
        for n in self.mesh.spaces:
            if self.data.patch % (divisor * n):
                raise ValueError(
                    f"mesh.space {n} cannot split data.patch {self.data.patch}: the coarsest level of "
                    f"{self.model.name} has {self.data.patch / divisor:g} rows, which must be a multiple of {n}; "
                    f"data.patch must be a multiple of {divisor * n}"
                )
        return self

    @model_validator(mode="after")
    def _can_be_shared_out(self) -> TrainConfig:
        """Refuse what unequal replicas cannot compute exactly, or only together."""
        if not self.hetero.enabled:
            return self
        batch, chunk, mesh = self.run.batch_size, self.chunk, self.mesh
        if chunk > batch or batch % chunk:
            fits = [n for n in range(1, batch + 1) if batch % n == 0]
            raise ValueError(
                f"hetero.chunk {chunk} must divide run.batch_size {batch} into whole chunks: choose one of "
                f"{', '.join(map(str, fits))}, or 0 to have it chosen"
            )
        if self.model.norm == "batch":
            raise ValueError(
                "model.norm = 'batch' needs the whole batch at once, and unequal replicas each see some chunks of it: "
                "use model.norm = 'group', or 'local' (the statistics of each chunk)"
            )
        if self.optim.loss == "dice":
            raise ValueError(
                "optim.loss = 'dice' is a quotient over the whole batch, which no replica has at once: use "
                "cross_entropy or focal, or hetero.enabled = false"
            )
        if mesh.auto:
            raise ValueError(
                "mesh = 'auto' plans for equal devices, hetero.enabled is for unequal ones: leave one of the two out"
            )
        wrong = [name for name in ("pipe", "model", "space") if getattr(mesh, name) not in (1, (1, 1))]
        if wrong:
            named = ", ".join(f"mesh.{name} = {getattr(mesh, name)}" for name in wrong)
            if self.placement.kind != "mesh":
                named = f"placement.kind = {self.placement.kind!r} ({named})"
            raise ValueError(
                f"{named} with hetero.enabled: a replica splits its chunks over its own devices by mesh.data and "
                "mesh.zero only; leave the others at 1, or set hetero.enabled = false"
            )
        if chunk % mesh.data:
            raise ValueError(
                f"a chunk of {chunk} windows must be a multiple of mesh.data {mesh.data}, so that each device of a "
                "replica gets whole windows: change hetero.chunk or mesh.data"
            )
        return self
