"""`Target` is the label of the pixels of a cube, and turns its stored numbers into labels.

`data.label` names one of three: a class layer of the collection (a date each, such as scl), a spectral index of the
collection (values), or a label layer from outside (`terrashard labels`; classes or values, the same on all dates).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from jaxtrain.config import DataConfig
from jaxtrain.data.classes import UNLABELLED, Classes
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.labels import NOT_LABELLED, LabelLayer, find_labels, open_label
from zarr_store.read import Cube
from zarr_store.spec import CubeSpec

__all__ = [
    "ITSELF",
    "LabelRows",
    "Target",
    "compare_numbers",
    "joined_classes",
    "label_classes",
    "match_classes",
    "resolve_target",
    "window_labels",
]

_ROWS = 2048


@dataclass(frozen=True)
class Target:
    """The label that a model learns.

    Attributes:
        name: As `data.label` has it.
        place: layer or index (of the collection, by date), label (of the cube, all dates) or image (no labels).
        values: Whether the label is a value, not a class.
        scale, nodata: Of an index: value = stored · scale.
        layer: The label layer.
    """

    name: str
    place: Literal["layer", "index", "label", "image"] = "layer"
    values: bool = False
    scale: float = 1.0
    nodata: int | None = None
    layer: LabelLayer | None = None

    @property
    def dtype(self) -> str:
        """Type of the stored numbers."""
        if self.place == "index":
            return "int16"
        return "float32" if self.values else "uint8"

    @property
    def unit(self) -> str:
        """Unit of the values of a label layer; empty where it is not stated."""
        return "" if self.layer is None else str(self.layer.spec.origin.get("unit", ""))

    @property
    def nothing(self) -> Any:
        """Value of a pixel without a label."""
        return np.float32(np.nan) if self.values else np.uint8(UNLABELLED)

    def count_of(self, name: str) -> int:
        """Return the number of pixels of a class of a label layer."""
        return 0 if self.layer is None else int(self.layer.counts.get(name, 0))

    def array(self, cube: Cube, collection: str) -> ts.TensorStore:
        """Open the array of stored numbers: (time, y, x), or (y, x) of a label layer."""
        return cube.tensorstore(collection, self.name) if self.layer is None else self.layer.array()

    def decode(self, stored: npt.NDArray[Any], table: npt.NDArray[np.uint8] | None) -> npt.NDArray[Any]:
        """Turn stored numbers into labels: class index uint8, or value float32; a fresh array.

        Args:
            stored: Any shape.
            table: Result of `Classes.table`; not used for values.
        """
        if not self.values and table is not None:
            # a third of the time of indexing, which first makes an int64 of each label
            learned = bytearray(np.ascontiguousarray(stored).data).translate(table.tobytes())
            return np.frombuffer(learned, np.uint8).reshape(stored.shape)
        found = stored.astype(np.float32) * np.float32(self.scale)
        if self.nodata is not None:
            found[stored == self.nodata] = np.nan
        if stored.dtype.kind == "f":
            np.copyto(found, np.float32(np.nan), where=~np.isfinite(found))
        return found

    def hide(self, label: npt.NDArray[Any], seen: npt.NDArray[np.bool_]) -> None:
        """Remove labels, in place, from pixels that the network does not see; both arrays have one shape."""
        if self.values:
            np.copyto(label, np.float32(self.nothing), where=~seen)
        else:
            # 255, all bits: a seventieth of the time of a choice pixel by pixel
            np.bitwise_or(label, seen.view(np.uint8) - np.uint8(1), out=label)


ITSELF = Target("reconstruction error", "image", values=True)
"""The target of an autoencoder: the image itself."""


def resolve_target(cube: Cube, config: DataConfig) -> Target:
    """Find the label that `data.label` names in a cube.

    Raises:
        UnknownName: It is none of the collection's layers and indices, and no label layer of the cube.
        InvalidInput: Classes are named of a layer of values.
    """
    spec, name = cube.spec(config.collection), config.label
    known = find_labels(cube)
    target = _of_collection(spec, name)
    if target is None and name in known:
        layer = open_label(cube, name)
        if layer.shape != spec.grid.shape:
            raise InvalidInput(
                f"label layer {name!r} lies on the finest grid of {cube.url} ({cube.grid}), and collection "
                f"{spec.collection} has {spec.grid}: train on {cube.collections[0]}, or on several groups at once"
            )
        target = Target(name, "label", layer.spec.kind == "values", layer=layer)
    if target is None:
        every = [*spec.class_layers, *(index.name for index in spec.derived), *known]
        raise UnknownName.of("class layer", name, every, f"collection {spec.collection} (data.label)")
    if target.values and config.classes:
        raise InvalidInput(f"data.label = {name!r} holds values, so data.classes must be empty")
    if target.place == "label" and str(NOT_LABELLED) in config.classes:
        raise InvalidInput(
            f"data.classes: {NOT_LABELLED} stands for 'no label' in label layers such as {name!r}, so it cannot be a "
            "class; make the layer again with --names, which gives the class another value"
        )
    return target


def _of_collection(spec: CubeSpec, name: str) -> Target | None:
    if name in spec.class_layers:
        return Target(name)
    index = next((index for index in spec.derived if index.name == name), None)
    return None if index is None else Target(name, "index", True, index.scale, index.nodata)


def label_classes(config: DataConfig, target: Target) -> Classes:
    """Return the classes of a target: `data.classes`, else all of its label layer; for values, its own name."""
    if target.values:
        return Classes((target.name,), ((),), (config.colours.get(target.name, "#1f77b4"),))
    named = target.layer.spec.classes if target.layer is not None else ()
    if config.classes or not named:
        return Classes.of(config)
    return Classes.of(config.model_copy(update={"classes": {str(value): name for value, name in named}}))


def joined_classes(config: DataConfig, targets: Sequence[Target]) -> Classes:
    """Return the classes of several cubes: all that a layer of any of them has, in the order of the cubes.

    Raises:
        InvalidInput: Some labels are classes and some are values, or `data.classes` names by number what the layers
            number differently.
    """
    first = targets[0]
    if any(target.values != first.values for target in targets):
        raise InvalidInput(f"data.label = {first.name!r} holds classes in some of the cubes and values in others")
    names = [dict(target.layer.spec.classes) if target.layer is not None else {} for target in targets]
    if config.classes or first.values:
        for value in config.classes:
            called = {of[int(value)]: None for of in names if value.isdecimal() and int(value) in of}
            if len(called) > 1:
                raise InvalidInput(
                    f"value {value} of label layer {first.name!r} means {' in one cube and '.join(called)} in another: "
                    "leave data.classes empty, so that classes are matched by name"
                )
        return label_classes(config, first)
    values: dict[str, int] = {}
    for of in names:
        for number, name in of.items():
            values.setdefault(name, number)
    if not values:
        return label_classes(config, first)
    # one number for each, as the layers may use a number for different classes
    numbered = {str(i): name for i, name in enumerate(values)}
    joined = Classes.of(config.model_copy(update={"classes": numbered}))
    return replace(joined, values=tuple((value,) for value in values.values()))


def match_classes(classes: Classes, config: DataConfig, target: Target) -> Classes:
    """Return the classes of a run with the numbers of another cube's label layer, which may number them differently.

    Raises:
        InvalidInput: The layer knows none of them by name.
    """
    if config.classes or target.layer is None or target.values:
        return classes
    value_of = {name: value for value, name in target.layer.spec.classes}
    if not any(name in value_of for name in classes.names):
        raise InvalidInput(
            f"label layer {target.name} has the classes {', '.join(value_of) or 'none'}, the model knows "
            f"{', '.join(classes.names[:8])}: none is the same"
        )
    values = tuple((value_of[name],) if name in value_of else () for name in classes.names)
    return Classes(classes.names, values, classes.colours)


def compare_numbers(classes: Classes, config: DataConfig, target: Target, url: str) -> list[str]:
    """Compare the numbers of `data.classes` with the names that the label layer of another cube gives them.

    Returns:
        A line where a number has a name that the model does not know.

    Raises:
        InvalidInput: A number means another class of the model there.
    """
    if not config.classes or target.layer is None or target.values:
        return []
    named = dict(target.layer.spec.classes)
    other = [
        (value, named[value], name)
        for name, values in zip(classes.names, classes.values, strict=True)
        for value in values
        if named.get(value, name) != name
    ]
    for value, there, ours in other:
        if there in classes.names:
            raise InvalidInput(
                f"value {value} of label layer {target.name!r} means {there} in {url}, and {ours} in data.classes of "
                "the run: make the layer again with `terrashard labels … --names`, numbered as the run has it"
            )
    if not other:
        return []
    each = ", ".join(f"{value} is {there} there and counts as {ours}" for value, there, ours in other[:8])
    return [f"label layer {target.name!r} of {url} has other names than data.classes of the run: {each}"]


class LabelRows(NamedTuple):
    """Labels of some rows of windows, each (rows, columns, patch · patch)."""

    pixels: npt.NDArray[Any]
    """Class indices or values."""
    inside: npt.NDArray[np.bool_]
    """Which pixels lie on the grid."""


def window_labels(
    target: Target, classes: Classes, patch: int, *, edges: bool = False
) -> Iterator[tuple[int, LabelRows]]:
    """Yield labels of a label layer, window by window: the first row of windows, and what is in the next rows.

    Only the labels are read, a byte or four a pixel, once for all dates. With `edges`, windows that reach over the edge
    of the grid come too.
    """
    layer = target.layer
    if layer is None:
        raise InvalidInput(f"{target.name} is not a label layer")
    height, width = layer.array().shape
    rows, columns = (-(-size // patch) if edges else size // patch for size in (height, width))
    table = None if target.values else classes.table()
    step = max(1, _ROWS // patch)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        stored = layer.read(slice(first * patch, min(last * patch, height)), slice(0, min(columns * patch, width)))
        shape = ((last - first) * patch, columns * patch)
        labels, inside = np.full(shape, target.nothing), np.zeros(shape, bool)
        labels[: stored.shape[0], : stored.shape[1]] = target.decode(stored, table)
        inside[: stored.shape[0], : stored.shape[1]] = True
        cut = (
            array.reshape(last - first, patch, columns, patch)
            .transpose(0, 2, 1, 3)
            .reshape(last - first, columns, patch * patch)
            for array in (labels, inside)
        )
        yield first, LabelRows(*cut)
