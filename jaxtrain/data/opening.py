"""Open a path or URL as training data of its kind; this is the only place that looks at the kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtrain.data.cube_data import CubeData
from jaxtrain.data.cubes_data import CubesData
from jaxtrain.data.sample_data import SampleData
from jaxtrain.data.training_data import TrainingData
from zarr_store.errors import InvalidInput
from zarr_store.read import open_cube
from zarr_store.samples import is_sample_store, open_samples

__all__ = ["open_training_data"]


def open_training_data(url: str | Path | Sequence[str]) -> TrainingData:
    """Open a cube, several cubes, or a sample store.

    Raises:
        NotACube: It is neither.
        InvalidInput: A sample store is one of several.
    """
    if isinstance(url, str | Path):
        return SampleData(open_samples(url)) if is_sample_store(url) else CubeData(open_cube(url))
    if len(url) == 1:
        return open_training_data(url[0])
    for one in url:
        if is_sample_store(one):
            raise InvalidInput(
                f"{one} is a sample store: a list in data.cube is of cubes; name one store, or cubes only"
            )
    return CubesData(tuple(open_cube(one) for one in url))
