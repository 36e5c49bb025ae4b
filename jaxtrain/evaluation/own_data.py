"""Find the data of a run, which may have been moved since: by path, else by their digest.

The digest in the model card stands for every byte of the data. So data with this digest are the run's own wherever they
lie, and the split of the run holds for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingData
from jaxtrain.runs.rundir import ModelCard
from zarr_store.errors import NotACube, TerrashardError

__all__ = ["find_moved", "match_own", "open_own"]

_LEVELS = 12
"""Largest number of folders above the run, and of parts of an old path, that are tried."""


def match_own(card: ModelCard, data: TrainingData) -> ModelCard | None:
    """Return the card of the part of a run that these data are, by digest; None for other data.

    It is the run's own card, or for one of several cubes the card as if this cube were the only one.
    """
    if data.digest(card) == card.cube_digest:
        return card
    if len(card.grounds) > 1:
        for number in range(len(card.grounds)):
            one = card.of(number)
            if data.digest(one) == one.cube_digest:
                return one
    return None


def open_own(card: ModelCard, run: Path) -> TrainingData:
    """Open the data of a run where it was trained, or where they lie now.

    Raises:
        NotACube: They are neither there nor near the run.
    """
    paths = _paths(card)
    try:
        data = open_training_data(paths if len(paths) > 1 else paths[0])
    except NotACube as error:
        moved = find_moved(card, run)
        if moved is None:
            raise NotACube(
                f"{error}. The data of {run} (digest {card.cube_digest[:12]}) are not near the run or the working "
                "directory either; say where they are: --data PATH"
            ) from error
        return moved
    if match_own(card, data) is None:
        return find_moved(card, run) or data
    return data


def find_moved(card: ModelCard, run: Path) -> TrainingData | None:
    """Find the data of a run that were moved, by digest; None where they are not found.

    Places are those that the old path would have from a folder above the run or from the working directory, as when
    data and run were moved together. Only folders of this machine are looked at.
    """
    found: list[str] = []
    for number, path in enumerate(_paths(card)):
        one = card.of(number)
        place = next((place for place in _candidates(path, run) if _is_own(place, one)), None)
        if place is None:
            return None
        found.append(str(place))
    return open_training_data(found if len(found) > 1 else found[0])


def _paths(card: ModelCard) -> list[str]:
    return [ground.cube for ground in card.grounds] or [card.cube]


def _candidates(old: str, run: Path) -> Iterator[Path]:
    """Yield folders at which data of this old path may lie: the longest part of the path first, near folders first."""
    if "://" in old:
        return
    parts = [part for part in Path(old).parts if part not in ("..", "/")][-_LEVELS:]
    here = run.absolute()
    above = list(dict.fromkeys([*here.parents[:_LEVELS], here, Path.cwd(), *Path.cwd().parents[:_LEVELS]]))
    for first in range(len(parts)):
        for folder in above:
            place = folder.joinpath(*parts[first:])
            if place.is_dir():
                yield place


def _is_own(place: Path, card: ModelCard) -> bool:
    try:
        return open_training_data(str(place)).digest(card) == card.cube_digest
    except (TerrashardError, OSError):
        return False
