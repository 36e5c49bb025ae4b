"""Label layers hold reference data from outside a cube, on the cube's grid.

    CUBE/labels/NAME/label (y, x)   uint8 class value, 255 = not labelled; or float32 value, nan = not labelled
    CUBE/labels/index.json          name → digest of every layer

A layer holds for all dates and all collections of the cube, and lies on the cube's grid, the finest one. Static layers,
which are inputs and no labels (`zarr_store.layers`), are kept in the same way. A layer is a Zarr group of its own with
coordinates, so xarray opens it by its path, and it appears whole or not at all: the index names it last, so that a run
that dies in between leaves at most a layer that the index does not list, which the same command then finds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from zarr_store.attributes import pack_attribute, unpack_attribute
from zarr_store.backends import open_store
from zarr_store.bounded import load_json
from zarr_store.consolidated import LABELS, list_labels
from zarr_store.crash import crashpoint
from zarr_store.errors import CubeMismatch, IntegrityError, InvalidInput, UnknownName
from zarr_store.folder import FolderStore
from zarr_store.georeference import georeference, write_axes
from zarr_store.grid import Grid
from zarr_store.lock import CubeLock
from zarr_store.promises import check_array, read_document
from zarr_store.read import Cube, await_read, open_cube
from zarr_store.regions import Region, iterate_boxes
from zarr_store.stac_item import LayerClasses, cube_item, write_item
from zarr_store.store import Store
from zarr_store.temporary import remove_folder

__all__ = [
    "NOT_LABELLED",
    "LabelKind",
    "LabelLayer",
    "LabelSpec",
    "find_labels",
    "label_boxes",
    "open_label",
    "verify_labels",
    "write_cube_item",
    "write_label",
]

NOT_LABELLED = 255
"""Value of a pixel without a class."""

LabelKind = Literal["classes", "values"]
Box = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

_FORMAT = 1
_FOLDER, _INDEX, _ARRAY = LABELS, "index.json", "label"
_DTYPES: dict[LabelKind, str] = {"classes": "uint8", "values": "float32"}
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})


@dataclass(frozen=True)
class LabelSpec:
    """The description of a layer.

    Attributes:
        name: Letters, digits, "-" and "_".
        kind: classes, or values (numbers such as biomass).
        classes: (value, name) of each class, ascending; none of values.
        origin: JSON: where it comes from and how it was put on the grid; the same origin gives the same layer.
    """

    name: str
    kind: LabelKind
    classes: tuple[tuple[int, str], ...]
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_layer_name(self.name)
        values, names = [value for value, _ in self.classes], [name for _, name in self.classes]
        if values != sorted(set(values)) or any(not 0 <= v < NOT_LABELLED for v in values):
            raise InvalidInput(f"label layer {self.name}: class values must be 0 … 254 and named once, got {values}")
        if len(set(names)) != len(names):
            raise InvalidInput(f"label layer {self.name}: classes must have unique names, got {names}")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = {"name": self.name, "kind": self.kind, "classes": [list(c) for c in self.classes], "origin": self.origin}
        plain: dict[str, Any] = json.loads(json.dumps(data))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        classes = tuple((int(value), str(name)) for value, name in data["classes"])
        return cls(str(data["name"]), data["kind"], classes, data["origin"])


@dataclass(frozen=True)
class LabelLayer:
    """A layer that is open for reading.

    Attributes:
        spec: Its description.
        digest: SHA-256 of spec and pixels.
        labelled: Pixels with a label.
        counts: Class name → pixels; of values empty.
        shards: Key of each object of the array → its SHA-256, None where all pixels of it are without a label.
        shape: (height, width) of the cube's grid.
        moments: Of values: count, mean, std, least and most over the pixels that have one; None in layers of
            earlier releases.
    """

    store: Store
    spec: LabelSpec
    digest: str
    labelled: int
    counts: Mapping[str, int]
    shards: Mapping[str, str | None]
    shape: tuple[int, int]
    moments: Mapping[str, float] | None = None

    def array(self) -> ts.TensorStore:
        """Return the array of pixels (y, x), read-only."""
        # absent shards are those without a label; `verify` distinguishes them from lost ones
        self.store.check_inside(_ARRAY)
        key = f"{_ARRAY}/zarr.json"
        where = self.store.where(key)
        check_array(read_document(self.store.read(key), where), where, shape=self.shape, dtype=_DTYPES[self.spec.kind])
        spec = {"driver": "zarr3", "kvstore": self.store.tensorstore(_ARRAY), "recheck_cached_data": "open"}
        return ts.open(spec, open=True, read=True, write=False, context=_CONTEXT).result()

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> Box:
        """Read the pixels of a box.

        Raises:
            CorruptShard: A chunk does not match its checksum.
        """
        return await_read(self.array()[rows, columns].read(), f"{self.store.url} rows {rows.start}:{rows.stop}")


def label_boxes(cube: Cube) -> list[Region]:
    """Return the boxes of a layer of the cube in the order of writing; time is 0."""
    spec = cube.spec(cube.collections[0])
    shape = (1, *spec.grid.shape)
    return [box for _, box in iterate_boxes(shape, (1, *spec.layout.fitted(spec.shape).shard[1:]))]


def find_labels(cube: Cube) -> tuple[str, ...]:
    """Return the names of the label layers of a cube, sorted."""
    return tuple(sorted(_read_index(_folder(cube.url))))


def open_label(cube: Cube, name: str) -> LabelLayer:
    """Open a layer.

    Raises:
        UnknownName: The cube has no such layer.
        IntegrityError: It is listed, and is absent, damaged or of another grid.
    """
    known = _read_index(_folder(cube.url))
    if name not in known:
        raise UnknownName.of("label layer", name, sorted(known), f"cube {cube.url}")
    layer = _open(cube.url, name)
    if layer is None:
        raise IntegrityError(f"{cube.url}: label layer {name} is listed, but does not exist; make it again")
    if layer.digest != known[name]:
        raise IntegrityError(
            f"{layer.store.url} is another layer than the one that the cube lists (digest {known[name][:12]} → "
            f"{layer.digest[:12]}); make it again with `terrashard labels`"
        )
    return layer


def write_label(
    url: str | os.PathLike[str],
    spec: LabelSpec,
    boxes: Callable[[], Iterable[tuple[Region, Box]]],
    *,
    describe: Callable[[Mapping[int, int]], LabelSpec] | None = None,
    replace: bool = False,
) -> tuple[LabelLayer, bool]:
    """Write a layer, or check that the existing one is the same; a damaged one of the same origin is written again.

    Args:
        url: The cube.
        spec: Description of the layer.
        boxes: Gives the pixels of each of `label_boxes(cube)`, in that order.
        describe: Called with the pixels of each class value once they are known; gives the spec that is kept.
        replace: Whether a layer of this name that has another origin, or cannot be read, is replaced.

    Returns:
        The layer, and whether it was written now.

    Raises:
        CubeMismatch: A layer of this name and another origin is there.
        IntegrityError: A layer that cannot be read is there, and `replace` is not set.
        InvalidInput: An array of the cube has the name.
        Locked: Another run writes to the cube.
    """
    cube = open_cube(url)
    for collection in cube.collections:
        if spec.name in [array.name for array in cube.spec(collection).arrays()]:
            raise InvalidInput(f"{cube.url}: {collection} has an array {spec.name}; give the label layer another name")
    folder = _folder(cube.url)
    with CubeLock(cube.url, "labels"):
        store = _place(cube.url, spec.name)
        try:
            there = _open(cube.url, spec.name)
        except IntegrityError:
            if not replace:
                raise
            there = None
        if there is not None:
            same = _same(there.spec.origin, spec.origin)
            if same and not any(find_damage(there)):
                _list(folder, spec.name, there.digest)
                list_labels(open_store(cube.url), _read_index(folder))
                write_cube_item(cube.url)
                return there, False
            if not same and not replace:
                raise CubeMismatch(
                    f"{there.store.url} exists and has another origin ({_origin(there.spec)}); nothing was "
                    "changed: give another --name, or --replace"
                )
        aside = _set_aside(store) if store.exists() else None
        with store.beside() as fresh:
            _fill(fresh, cube, spec, boxes(), describe)
            if aside is not None:
                crashpoint("before a label layer is replaced")
                aside()
        layer = _open(cube.url, spec.name)
        assert layer is not None
        _list(folder, spec.name, layer.digest)
        crashpoint("before a label layer is in the root's metadata")
        list_labels(open_store(cube.url), _read_index(folder))
        write_cube_item(cube.url)
    return layer, True


def write_cube_item(url: str | os.PathLike[str]) -> None:
    """Write the STAC item of a cube with its label layers; only under the cube's lock.

    Args:
        url: The cube.
    """
    cube = open_cube(url)
    layers: list[LayerClasses] = []
    for name in find_labels(cube):
        try:
            layers.append((name, open_label(cube, name).spec.classes))
        except IntegrityError:  # `verify` reports it, and a damaged layer must not stop a run
            continue
    write_item(open_store(url), cube_item(cube, layers))


def verify_labels(cube: Cube) -> tuple[int, list[tuple[str, str, str]]]:
    """Check the hashes of all objects of all layers.

    Returns:
        Bytes that were read, and (layer, state, place) of each object that is missing or corrupt.
    """
    size, damage = 0, []
    for name in find_labels(cube):
        try:
            layer = open_label(cube, name)
        except IntegrityError:
            damage.append((name, "corrupt", _place(cube.url, name).where("zarr.json")))
            continue
        for key, read, lost in _checked(layer):
            size += read
            if lost is not None:
                damage.append((name, lost, layer.store.where(key)))
    return size, damage


def find_damage(layer: LabelLayer) -> Iterator[str]:
    """Yield the key of each object of a layer that is missing or corrupt."""
    return (key for key, _, lost in _checked(layer) if lost is not None)


def _checked(layer: LabelLayer) -> Iterator[tuple[str, int, str | None]]:
    """Yield each object of a layer: its key, its bytes, and "missing" or "corrupt" unless it is as it was written."""
    for key, expected in layer.shards.items():
        data = layer.store.read(key)
        whole = (None if data is None else hashlib.sha256(data).hexdigest()) == expected
        yield key, len(data or b""), None if whole else "missing" if data is None else "corrupt"


def _fill(
    fresh: Store,
    cube: Cube,
    spec: LabelSpec,
    boxes: Iterable[tuple[Region, Box]],
    describe: Callable[[Mapping[int, int]], LabelSpec] | None,
) -> None:
    """Write a whole layer into an empty store; its attributes, which list what was written, come last."""
    first = cube.spec(cube.collections[0])
    grid, layout = first.grid, first.layout.fitted(first.shape)
    dtype = np.dtype(_DTYPES[spec.kind])
    root = zarr.create_group(fresh.zarr(), attributes=georeference(grid.to_dict(), grid.bounds, grid.wkt))
    write_axes(root, grid)
    array = root.create_array(
        _ARRAY, shape=grid.shape, chunks=layout.chunk[1:], shards=layout.shard[1:], dtype=dtype,
        fill_value=np.nan if spec.kind == "values" else NOT_LABELLED,
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()],
        dimension_names=("y", "x"),
        attributes={"grid_mapping": "spatial_ref", "coordinates": "spatial_ref", "long_name": spec.name},
    )  # fmt: skip
    digest, labelled = hashlib.sha256(), 0
    moments = _Moments()
    tally = np.zeros(256, np.int64)
    expected = label_boxes(cube)
    written = []
    for at, (box, pixels) in zip(expected, boxes, strict=True):
        if box != at or pixels.shape != box.shape[1:] or pixels.dtype != dtype:
            raise InvalidInput(f"label layer {spec.name}: expected {dtype} of {at}, got {pixels.dtype} of {box}")
        if np.issubdtype(pixels.dtype, np.floating):
            labelled += int(np.isfinite(pixels).sum())
            moments.add(pixels)
        else:
            tally += np.bincount(pixels.ravel(), minlength=256)
        digest.update(np.ascontiguousarray(pixels).tobytes())
        array[box.y0 : box.y1, box.x0 : box.x1] = pixels
        written.append(f"{_ARRAY}/c/{box.y0 // layout.shard[1]}/{box.x0 // layout.shard[2]}")
        crashpoint("while a label layer is written")
    if spec.kind == "classes":
        labelled = int(tally[:NOT_LABELLED].sum())
        if describe is not None:
            spec = describe({int(v): int(tally[v]) for v in np.flatnonzero(tally[:NOT_LABELLED])})
    digest.update(json.dumps(spec.to_dict(), sort_keys=True).encode())
    if spec.kind == "classes":
        array.attrs.update({"flag_values": [v for v, _ in spec.classes],
                            "flag_meanings": " ".join(name.replace(" ", "_") for _, name in spec.classes)})  # fmt: skip
    root.attrs["terrashard"] = pack_attribute(
        {
            "labels": _FORMAT,
            "spec": spec.to_dict(),
            "grid": grid.to_dict(),
            "digest": digest.hexdigest(),
            "labelled": labelled,
            "counts": {name: int(tally[value]) for value, name in spec.classes},
            "shards": {key: fresh.digest(key) for key in written},
            **({"moments": moments.to_dict()} if moments.count else {}),
        }
    )


class _Moments:
    """Count, mean, spread and range of values, box by box (Chan, Golub & LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = 0.0
        self.least, self.most = np.inf, -np.inf

    def add(self, pixels: Box) -> None:
        """Add the finite values of a box."""
        values = pixels[np.isfinite(pixels)].astype(np.float64)
        if not values.size:
            return
        mean = float(values.mean())
        total, apart = self.count + values.size, mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + apart**2 * self.count * values.size / total
        self.mean += apart * values.size / total
        self.count = total
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))

    def to_dict(self) -> dict[str, float]:
        """Return the JSON form."""
        std = float(np.sqrt(self.squares / self.count))
        return {"count": self.count, "mean": self.mean, "std": std, "least": self.least, "most": self.most}


def _open(url: str, name: str) -> LabelLayer | None:
    store = _place(url, name)
    data = store.read("zarr.json")
    if data is None:
        return None
    try:
        about = unpack_attribute(load_json(data, store.where("zarr.json"))["attributes"]["terrashard"])
        if about["labels"] != _FORMAT:
            raise InvalidInput(f"{store.url} has label format {about['labels']}, this release reads {_FORMAT}")
        grid = Grid.from_dict(about["grid"])
        layer = LabelLayer(store, LabelSpec.from_dict(about["spec"]), str(about["digest"]), int(about["labelled"]),
                           about["counts"], about["shards"], grid.shape, about.get("moments"))  # fmt: skip
        if layer.spec.name != name or not all(str(key).startswith(f"{_ARRAY}/c/") for key in layer.shards):
            raise ValueError("it describes another layer")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise IntegrityError(
            f"{store.where('zarr.json')}: unreadable ({type(error).__name__}); make the layer again with --replace"
        ) from error
    cube = open_cube(url)
    if grid != cube.spec(cube.collections[0]).grid:
        raise IntegrityError(f"{store.url} lies on {grid}, the cube on another grid; make the layer again")
    return layer


def _set_aside(store: Store) -> Callable[[], None]:
    """Return a function that moves a layer aside just before the new one takes its place."""
    if not isinstance(store, FolderStore):
        raise InvalidInput(
            f"{store.url}: a layer in a bucket cannot be replaced in one step; give another --name, and remove this one"
        )

    def move() -> None:
        remove_folder(store.root)

    return move


def _list(folder: Store, name: str, digest: str) -> None:
    crashpoint("before a label layer is listed")
    known = _read_index(folder)
    if known.get(name) != digest:
        folder.write(_INDEX, json.dumps({**known, name: digest}, indent=1, sort_keys=True).encode())


def _read_index(folder: Store) -> dict[str, str]:
    data = folder.read(_INDEX)
    try:
        known = load_json(data or b"{}", folder.where(_INDEX))
        for name in known:
            _check_layer_name(name)
        return {str(name): str(digest) for name, digest in known.items()}
    except (ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{folder.where(_INDEX)} is unreadable; remove it and repeat `terrashard labels` for each layer"
        ) from error


def _folder(url: str) -> Store:
    return open_store(url).below(_FOLDER)


def _place(url: str, name: str) -> Store:
    return open_store(url).below(f"{_FOLDER}/{name}")


def _check_layer_name(name: Any) -> None:
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name):
        raise InvalidInput(f"label layer {name!r}: expected a name of letters, digits, '-' and '_'")


def _same(there: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    return json.dumps(there, sort_keys=True) == json.dumps(json.loads(json.dumps(asked)), sort_keys=True)


def _origin(spec: LabelSpec) -> str:
    return ", ".join(f"{key} {value}" for key, value in list(spec.origin.items())[:4])
