"""`ModelCard` and the run directory hold all that is needed to continue, evaluate or use a model.

- `config.toml`: the resolved configuration, for people and for starting such a run again
- `model.json`: the model card: bands, classes, colours, mean and std, grid, split, digest of the cube
- `metrics.jsonl`: history; `tensorboard/`: the same as events; `shares.jsonl`: which replica computed what, if unequal
- `checkpoints/`: states; `report.html`: what came out
- `evaluation.json`: the scores on the test part; those of other parts and data beside it (see `evaluations`)
- `incidents.jsonl`: what went wrong without ending the run; `hang-0.txt`: where process 0 hung
- `run.lock`: the process that trains now
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.data.classes import Classes
from jaxtrain.data.cubes import Splits
from jaxtrain.data.ground import Ground
from jaxtrain.data.numbers import BandNumbers
from jaxtrain.data.places import SampleSplit
from jaxtrain.data.splits import Split
from jaxtrain.data.targets import ITSELF, label_classes
from jaxtrain.data.task import Task
from jaxtrain.data.windows import Counted
from jaxtrain.learn.state import Program, build_program
from jaxtrain.models.modality import Modality, finest
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.placement import check_groups
from zarr_store.bounded import MOST_JSON_BYTES, load_json, read_file
from zarr_store.errors import IntegrityError, InvalidInput
from zarr_store.folder import FolderStore
from zarr_store.grid import Grid
from zarr_store.keys import refuse_links
from zarr_store.temporary import is_temporary

__all__ = ["CARD", "LOCK_KEY", "ModelCard", "clear_run", "config_differences", "find_card",
           "inference_program", "load_card", "program_of", "write_run"]  # fmt: skip

CARD, LOCK_KEY = "model.json", "run.lock"
_FORMAT = 1
_LEFTOVERS = (LOCK_KEY, "config.toml")
"""Names that a run leaves if it is killed before it writes its card."""

_MAY_CHANGE = ("mesh", "placement", "data.cube", "data.colours", "data.cache", "run.log_every", "run.evaluate_every",
               "run.checkpoint_every", "run.keep_checkpoints", "run.read_threads", "run.prefetch", "run.on_nan",
               "run.max_skipped", "run.on_corrupt", "run.max_quarantined", "run.hang_s", "run.track",
               "hetero.silence_s", "hetero.compare_every")  # fmt: skip
"""Keys that do not change the result, so a run may continue with other values. The cube is compared by digest."""


@dataclass(frozen=True)
class ModelCard:
    """The description of a run, fixed when it begins.

    Attributes:
        config: The whole configuration.
        cube: Path of the training cube or sample store; of several cubes, of the first.
        cube_digest: Digest of all its bytes, as the ledger has them; of several cubes, of all.
        bands: Names, in the order of the network's channels.
        classes: Names, colours and layer values, by class index.
        mean, std: Per band, in stored numbers.
        class_weights: Per class, or None.
        grid: Grid of the (first) cube; None of a sample store.
        times: Dates of the (first) cube; none of a sample store.
        split: Part of every block, for each of several cubes, or of every sample.
        windows: Windows or samples of each part.
        statistics: Origin of mean and std, number of pixels, pixels of each class.
    """

    config: TrainConfig
    cube: str
    cube_digest: str
    bands: tuple[str, ...]
    classes: Classes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_weights: tuple[float, ...] | None
    grid: Grid | None
    times: tuple[str, ...]
    split: Counted
    windows: Mapping[str, int]
    statistics: Mapping[str, Any]
    task: Task = field(default_factory=Task)
    """Task of the network."""
    grounds: tuple[Ground, ...] = ()
    """The cubes, if there are several."""
    numbers: tuple[BandNumbers, ...] = ()
    """Meaning of the stored numbers of each band; none of runs that did not keep it."""
    modalities: tuple[Modality, ...] = ()
    """What each branch of the network multimodal gets; none of other networks."""
    edges: bool = True
    """Whether windows reach over the edge of a grid, and only training needs `min_labelled`; not in release 0.1.0."""

    @property
    def dates(self) -> tuple[tuple[str, ...], ...]:
        """Dates of each cube."""
        return tuple(ground.times for ground in self.grounds) or (self.times,)

    @property
    def shown_bands(self) -> tuple[str, ...]:
        """Names of the bands of the image that reports show."""
        return finest(self.modalities).bands if self.modalities else self.bands

    @property
    def unit(self) -> str:
        """Name of what a batch counts: windows of a cube, images of a sample store, or pixels of a labelled scene."""
        if self.grid is not None:
            return "windows"
        return "images" if isinstance(self.split, SampleSplit) else "pixels"

    @property
    def key(self) -> str:
        """Identity of the run: a digest of the card, the same in every process of the run."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def of(self, number: int) -> ModelCard:
        """Return the card as if one of several cubes were the only one."""
        if not self.grounds or not isinstance(self.split, Splits):
            return self
        ground = self.grounds[number]
        return replace(self, cube=ground.cube, cube_digest=ground.digest, grid=ground.grid, times=ground.times,
                       split=self.split.each[number], grounds=())  # fmt: skip

    @property
    def answers(self) -> Classes:
        """Classes of a map, or the one name of the predicted value."""
        return label_classes(self.config.data, ITSELF) if self.task.rebuild else self.classes

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": _FORMAT,
            "config": self.config.model_dump(mode="json"),
            "cube": {"path": self.cube, "digest": self.cube_digest},
            "collection": self.config.data.collection,
            "bands": list(self.bands),
            "classes": self.classes.to_list(),
            "mean": list(self.mean),
            "std": list(self.std),
            "class_weights": None if self.class_weights is None else list(self.class_weights),
            "grid": None if self.grid is None else self.grid.to_dict(),
            "times": list(self.times),
            "split": self.split.to_dict(),
            "windows": dict(self.windows),
            "statistics": dict(self.statistics),
            "task": self.task.to_dict(),
            "cubes": [ground.to_dict() for ground in self.grounds],
            **({"numbers": [band.to_dict() for band in self.numbers]} if self.numbers else {}),
            **({"modalities": [one.to_dict() for one in self.modalities]} if self.modalities else {}),
            **({"edges": True} if self.edges else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelCard:
        """Make the object from its JSON form, which `to_dict` returns."""
        weights, split = data["class_weights"], data["split"]
        return cls(
            config=TrainConfig.model_validate(data["config"]),
            cube=data["cube"]["path"],
            cube_digest=data["cube"]["digest"],
            bands=tuple(data["bands"]),
            classes=Classes.from_list(data["classes"]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            class_weights=None if weights is None else tuple(weights),
            grid=None if data["grid"] is None else Grid.from_dict(data["grid"]),
            times=tuple(data["times"]),
            split=_split_of(split),
            windows=data["windows"],
            statistics=data["statistics"],
            task=Task.from_dict(data["task"]) if "task" in data else Task(),
            grounds=tuple(Ground.from_dict(ground) for ground in data.get("cubes", ())),
            numbers=tuple(BandNumbers.from_dict(band) for band in data.get("numbers", ())),
            modalities=tuple(Modality.from_dict(one) for one in data.get("modalities", ())),
            edges=bool(data.get("edges", False)),
        )


def _split_of(data: dict[str, Any]) -> Split | SampleSplit | Splits:
    if "cubes" in data:
        return Splits.from_dict(data)
    return SampleSplit.from_dict(data) if "kind" in data else Split.from_dict(data)


def find_card(run: Path) -> ModelCard | None:
    """Return the card of a run directory; None if there is no run yet.

    Raises:
        InvalidInput: The folder holds something else.
        IntegrityError: The card cannot be read, or a link leads out of the folder.
    """
    refuse_links(run, run)  # before anything is written there, too: checkpoints, history, events, reports
    path = run / CARD
    if not path.exists():
        names = sorted(entry.name for entry in run.iterdir()) if run.is_dir() else []
        others = [name for name in names if name not in _LEFTOVERS and not is_temporary(name)]
        if others or (run.exists() and not run.is_dir()):
            raise InvalidInput(
                f"{run} is not a training run (no {CARD}, but {', '.join(others[:4]) or 'a file'}); nothing was "
                "changed: give an empty or new folder"
            )
        return None
    try:
        return ModelCard.from_dict(load_json(read_file(path, MOST_JSON_BYTES), str(path)))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(
            f"{path} is damaged or of another release ({type(error).__name__}: {str(error)[:200]}); restore it"
        ) from error


def load_card(run: Path) -> ModelCard:
    """Return the card of a run that must exist.

    Raises:
        InvalidInput: There is no run at `run`.
    """
    card = find_card(run) if run.exists() else None
    if card is None:
        raise InvalidInput(f"{run} is not a training run: expected {CARD} in it, as `terrashard train` makes")
    return card


def config_differences(there: TrainConfig, asked: TrainConfig) -> list[str]:
    """List the keys at which two configurations would train differently, each as "key: there → asked"."""
    one, other = (config.model_dump(mode="json") for config in (there, asked))
    for values in (one, other):
        if values["optim"]["clip_norm"] is None:  # as config.toml has it
            values["optim"]["clip_norm"] = float("inf")
    return _differences(one, other, "")


def _differences(there: Any, asked: Any, at: str) -> list[str]:
    if at in _MAY_CHANGE or (at.startswith("data.modalities.") and at.endswith(".cube")):
        return []
    if at == "data.modalities" and list(there) != list(asked) and there.keys() == asked.keys():
        # channels and bits of maps follow this order
        return [f"{at} (their order): {', '.join(there)} → {', '.join(asked)}"]
    if at != "data.classes" and isinstance(there, dict) and isinstance(asked, dict):
        keys = [*there, *(key for key in asked if key not in there)]
        return [d for k in keys for d in _differences(there.get(k), asked.get(k), f"{at}.{k}" if at else k)]
    if there == asked and (at != "data.classes" or _by_name(there) == _by_name(asked)):
        return []
    order = " (the order of the classes)" if there == asked else ""
    return [f"{at}{order}: {json.dumps(there, ensure_ascii=False)} → {json.dumps(asked, ensure_ascii=False)}"]


def _by_name(classes: Mapping[str, str]) -> list[tuple[str, set[str]]]:
    """Return the values of each class in the order of class indices, in which two equal mappings may differ."""
    names = dict.fromkeys(classes.values())
    return [(name, {value for value in classes if classes[value] == name}) for name in names]


def clear_run(run: Path) -> None:
    """Remove the history of an earlier attempt that never reached a checkpoint; the caller holds the run's lock."""
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    for path in (*run.glob("incidents*.jsonl"), *run.glob("shares.jsonl")):
        path.unlink()


def write_run(run: Path, card: ModelCard) -> None:
    """Write config.toml and then the card, which makes the folder a run."""
    store = FolderStore(run.absolute())
    values = card.config.model_dump(mode="json")
    if values["optim"]["clip_norm"] is None:
        values["optim"]["clip_norm"] = float("inf")  # TOML has no null; a limit of infinity never clips
    header = "# The resolved configuration of this run, every default included.\n"
    store.write("config.toml", (header + tomli_w.dumps(values)).encode())
    store.write(CARD, json.dumps(card.to_dict(), indent=1, ensure_ascii=False).encode())


def program_of(card: ModelCard, config: TrainConfig, devices: Sequence[Any] | None = None) -> Program:
    """Build the program of a card on the mesh of `config`, over the first of all devices or of those given."""
    if config.placement.kind == "branches" and card.modalities:
        # a wrong name is reported before a lack of devices, which takes more work to correct
        check_groups(config.placement.groups, [one.name for one in card.modalities])
    return build_program(
        config,
        channels=len(card.bands),
        classes=len(card.classes),
        mesh=make_mesh(config.mesh, devices),
        mean=card.mean,
        std=card.std,
        class_weights=card.class_weights,
        task=card.task,
        modalities=card.modalities,
    )


def inference_program(card: ModelCard) -> Program:
    """Build the program for evaluation and prediction: on the run's own mesh if it fits here, else on one device."""
    try:
        return program_of(card, card.config)
    except InvalidInput:
        single = MeshConfig(data=1, model=1)
        return program_of(card, card.config.model_copy(update={"mesh": single}))
