"""Sample stores hold labelled patches, or one labelled scene, for tasks that are not cut from a cube.

    image      (sample, band, y, x)   stored numbers: uint8, uint16 or float32
    label      (sample,)              class index; (sample, class) 0/1 where a sample has several classes;
                                      (sample, y, x) where pixels are labelled, 0 = not labelled
    valid      (sample, y, x)         1 where a pixel holds data, else 0 and the image is 0; only where some do not
    longitude, latitude (sample,)     degrees, centre of the sample; nan where unknown
    name       (sample,)              where the sample came from

A store appears whole or not at all. Every sample is one chunk with a checksum, so that samples are read in any order
at the cost of their own bytes, and a damaged one is named.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from zarr_store.backends import open_store
from zarr_store.bounded import load_json
from zarr_store.errors import IntegrityError, InvalidInput, NotACube
from zarr_store.group import read_array
from zarr_store.promises import check_array, read_document
from zarr_store.read import await_read, read_tensorstore
from zarr_store.store import Store

__all__ = [
    "SAMPLE_DTYPES",
    "Labelled",
    "Sample",
    "SampleSpec",
    "SampleStore",
    "is_sample_store",
    "open_samples",
    "write_samples",
]

Labelled = Literal["one", "several", "pixels"]
"""A sample has one class, several classes, or a class for each of its pixels."""

_FORMAT, _MASKED = 1, 2
"""Format of a store whose pixels all hold data, and of one with `valid`, which older releases refuse."""
_SHARD_BYTES = 64 << 20
_MOST_WHOLE = 4 << 30
"""Bytes of an array that is read at once: labels, places and names of all samples."""
SAMPLE_DTYPES = ("uint8", "uint16", "float32")
"""Types of the numbers that a store holds."""
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})


@dataclass(frozen=True)
class SampleSpec:
    """The description of a store, which fixes its arrays.

    Attributes:
        count: Number of samples.
        bands: Names, in order.
        size: (height, width) of each sample, pixels.
        dtype: Type of the image: uint8, uint16 or float32.
        classes: Names, by class index; for labelled pixels the name of label value i + 1.
        labelled: Kind of the label of a sample.
        masked: Whether some pixels hold no data, which the array `valid` marks.
        scales: (scale, offset, unit) of each band: physical = stored · scale + offset; none where nothing is stated.
    """

    count: int
    bands: tuple[str, ...]
    size: tuple[int, int]
    dtype: str
    classes: tuple[str, ...]
    labelled: Labelled = "one"
    masked: bool = False
    scales: tuple[tuple[float, float, str], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in SAMPLE_DTYPES:
            raise InvalidInput(f"samples of type {self.dtype}: expected one of {', '.join(SAMPLE_DTYPES)}")
        if self.count < 1 or not self.bands or min(self.size) < 1:
            raise InvalidInput(f"a sample store needs samples with bands and pixels, got {self}")
        if len(set(self.bands)) != len(self.bands):
            raise InvalidInput(f"bands must have unique names, got {', '.join(self.bands)}")
        if not 1 <= len(self.classes) <= 254 or len(set(self.classes)) != len(self.classes):
            raise InvalidInput(f"expected 1 to 254 different classes, got {len(self.classes)}: {self.classes[:12]}")
        if self.labelled not in get_args(Labelled):
            raise InvalidInput(f"labelled {self.labelled!r}: expected one of {', '.join(get_args(Labelled))}")
        if self.scales and len(self.scales) != len(self.bands):
            raise InvalidInput(f"expected a scale for each of {len(self.bands)} bands, got {len(self.scales)}")
        for scale, offset, _ in self.scales:
            if not (math.isfinite(scale) and math.isfinite(offset) and scale != 0):
                raise InvalidInput(f"expected finite scales other than 0 and finite offsets, got {scale}, {offset}")

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the array `label`."""
        more = {"one": (), "several": (len(self.classes),), "pixels": self.size}[self.labelled]
        return (self.count, *more)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form without later fields at their defaults, so that it equals that of older stores."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in data.items() if value or name not in ("masked", "scales")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        height, width = data["size"]
        return cls(
            count=int(data["count"]),
            bands=tuple(data["bands"]),
            size=(int(height), int(width)),
            dtype=data["dtype"],
            classes=tuple(data["classes"]),
            labelled=data["labelled"],
            masked=bool(data.get("masked", False)),
            scales=tuple((float(scale), float(offset), str(unit)) for scale, offset, unit in data.get("scales", ())),
        )


class Sample(NamedTuple):
    """One sample: image (band, y, x), label as in the spec, degrees (nan if unknown), its origin, and valid pixels.

    `valid` is bool (y, x); None where every pixel holds data.
    """

    image: npt.NDArray[Any]
    label: npt.NDArray[np.uint8]
    longitude: float
    latitude: float
    name: str
    valid: npt.NDArray[np.bool_] | None = None


def write_samples(url: str | Path, spec: SampleSpec, samples: Iterable[Sample]) -> str:
    """Write a store; it appears at `url` once all samples are in it.

    Args:
        url: URL of the new store; nothing may exist there.
        spec: Description of the arrays.
        samples: `spec.count` of them.

    Returns:
        The digest of all samples.

    Raises:
        InvalidInput: Something is at `url`, or a sample does not have the shape of the spec.
    """
    store = open_store(url)
    if store.exists():
        raise InvalidInput(f"{store.url} exists; give another path, or remove it first")
    sample_bytes = len(spec.bands) * spec.size[0] * spec.size[1] * np.dtype(spec.dtype).itemsize
    together = int(np.clip(_SHARD_BYTES // max(sample_bytes, 1), 1, spec.count))
    digest = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode())
    places = np.full((spec.count, 2), np.nan)
    names: list[str] = []
    label = np.zeros(spec.label_shape, np.uint8)
    with store.beside() as fresh:
        root = zarr.create_group(fresh.zarr())
        image = _pixels(root, "image", (len(spec.bands), *spec.size), spec, together)
        valid = _pixels(root, "valid", spec.size, spec, together) if spec.masked else None
        block: list[npt.NDArray[Any]] = []
        valid_block: list[npt.NDArray[np.uint8]] = []
        for number, sample in enumerate(samples):
            _check(spec, number, sample)
            label[number], places[number] = sample.label, (sample.longitude, sample.latitude)
            names.append(sample.name)
            digest.update(np.ascontiguousarray(sample.image).tobytes())
            block.append(sample.image)
            if valid is not None:
                valid_block.append(np.ones(spec.size, np.uint8) if sample.valid is None else sample.valid.astype("u1"))
                digest.update(valid_block[-1].tobytes())
            if len(block) == together or number + 1 == spec.count:
                rows = slice(number + 1 - len(block), number + 1)
                image[rows] = np.stack(block)
                if valid is not None:
                    valid[rows] = np.stack(valid_block)
                block, valid_block = [], []
        if len(names) != spec.count:
            raise InvalidInput(f"{store.url}: expected {spec.count} samples, got {len(names)}")
        dims = {"one": (), "several": ("class",), "pixels": ("y", "x")}[spec.labelled]
        _small(root, "label", label, ("sample", *dims))
        _small(root, "longitude", places[:, 0], ("sample",), {"units": "degrees_east"})
        _small(root, "latitude", places[:, 1], ("sample",), {"units": "degrees_north"})
        _small(root, "band", np.array(spec.bands, object), ("band",))
        _small(root, "name", np.array(names, object), ("sample",))
        digest.update(label.tobytes() + places.tobytes())
        form = _MASKED if spec.masked else _FORMAT
        root.attrs["terrashard"] = {"samples": form, "spec": spec.to_dict(), "digest": digest.hexdigest()}
    return digest.hexdigest()


def _check(spec: SampleSpec, number: int, sample: Sample) -> None:
    expected = (len(spec.bands), *spec.size)
    if number >= spec.count:
        raise InvalidInput(f"{sample.name}: expected {spec.count} samples, but there are more")
    if sample.image.shape != expected or str(sample.image.dtype) != spec.dtype:
        raise InvalidInput(
            f"{sample.name}: expected {spec.dtype} of shape {expected} (band, y, x), "
            f"got {sample.image.dtype} of {sample.image.shape}"
        )
    if sample.valid is not None and (not spec.masked or sample.valid.shape != spec.size):
        raise InvalidInput(
            f"{sample.name}: expected valid pixels of shape {spec.size} and a spec that is masked, got "
            f"{sample.valid.shape}"
        )
    label = np.asarray(sample.label)
    if label.shape != spec.label_shape[1:]:
        raise InvalidInput(f"{sample.name}: expected a label of shape {spec.label_shape[1:]}, got {label.shape}")
    most = {"one": len(spec.classes) - 1, "several": 1, "pixels": len(spec.classes)}[spec.labelled]
    if label.size and int(label.max()) > most:
        raise InvalidInput(f"{sample.name}: label {int(label.max())}, but there are {len(spec.classes)} classes")


def _pixels(root: zarr.Group, name: str, shape: tuple[int, ...], spec: SampleSpec, together: int) -> Any:
    """Create an array of pixels whose chunk is one sample."""
    return root.create_array(
        name,
        shape=(spec.count, *shape),
        chunks=(1, *shape),
        shards=(together, *shape),
        dtype=spec.dtype if name == "image" else "uint8",
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()],
        dimension_names=("sample", "band", "y", "x") if name == "image" else ("sample", "y", "x"),
        config={"write_empty_chunks": True},  # so that a chunk that is absent is damage, not a black image
    )


def _small(
    root: zarr.Group, name: str, data: npt.NDArray[Any], dims: Sequence[str], attributes: dict[str, Any] | None = None
) -> None:
    array = root.create_array(
        name,
        shape=data.shape,
        chunks=data.shape,
        dtype="str" if data.dtype == object else data.dtype,
        compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=tuple(dims),
        attributes=attributes or {},
    )
    array[...] = data


def is_sample_store(url: str | os.PathLike[str]) -> bool:
    """Return whether `url` holds a sample store."""
    try:
        return "samples" in _attributes(open_store(url))
    except NotACube:
        return False


def open_samples(url: str | os.PathLike[str]) -> SampleStore:
    """Open a store for reading.

    Raises:
        NotACube: There is nothing at `url`, or something else.
    """
    store = open_store(url)
    found = _attributes(store)
    if "samples" not in found:
        raise NotACube(f"{store.url} is not a sample store; make one with `terrashard samples`")
    if found["samples"] not in (_FORMAT, _MASKED):
        raise NotACube(f"{store.url} has sample format {found['samples']}, this release reads {_FORMAT} and {_MASKED}")
    return SampleStore(store, found)


def _attributes(store: Store) -> dict[str, Any]:
    data = store.read("zarr.json")
    if data is None:
        kind = "holds no zarr.json" if store.exists() else "does not exist"
        raise NotACube(f"{store.url} {kind}: expected a store made by `terrashard samples`")
    try:
        found = load_json(data, store.where("zarr.json"))["attributes"].get("terrashard", {})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise NotACube(f"{store.where('zarr.json')}: unreadable metadata ({type(error).__name__}: {error})") from error
    return found if isinstance(found, dict) else {}


class SampleStore:
    """A store that is open for reading; made by `open_samples`. Labels and places are in memory, images are not."""

    def __init__(self, store: Store, found: dict[str, Any]) -> None:
        self._store = store
        self.url = store.url
        try:
            self.spec = SampleSpec.from_dict(found["spec"])
            self.digest = str(found["digest"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{self.url}: unreadable attributes ({type(error).__name__}: {error})") from error
        self.label: npt.NDArray[np.uint8] = self._whole("label", self.spec.label_shape, "uint8")
        self.longitude: npt.NDArray[np.float64] = self._whole("longitude", (self.spec.count,), "float64")
        self.latitude: npt.NDArray[np.float64] = self._whole("latitude", (self.spec.count,), "float64")
        shape = (self.spec.count, len(self.spec.bands), *self.spec.size)
        self._image = self._open("image", shape, self.spec.dtype)
        masked = self.spec.masked
        self._valid = self._open("valid", (self.spec.count, *self.spec.size), "uint8") if masked else None

    @property
    def has_places(self) -> bool:
        """Whether the place of every sample is known."""
        return bool(np.isfinite(self.longitude).all() and np.isfinite(self.latitude).all())

    def names(self) -> list[str]:
        """Return the origin of each sample."""
        self._store.check_inside("name")
        check = partial(check_array, shape=(self.spec.count,), dtype="string", most=_MOST_WHOLE)
        return [str(name) for name in read_array(self._store, "name", check)]

    def images(
        self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]], bands: Sequence[int] | None = None
    ) -> npt.NDArray[Any]:
        """Read the images of some samples at the same time, (samples, band, y, x); of all bands, or of some positions.

        Raises:
            CorruptShard: A sample fails its checksum; the message names it.
            MissingShard: A part of the store was deleted.
        """
        count = len(self.spec.bands if bands is None else bands)
        found = np.empty((len(numbers), count, *self.spec.size), self.spec.dtype)
        self.begin(numbers, found, bands)()
        return found

    def valid(self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """Read which pixels of some samples hold data, uint8 (samples, y, x) of 0 and 1.

        Raises:
            CorruptShard, MissingShard: As `images` does.
        """
        found = np.ones((len(numbers), *self.spec.size), np.uint8)
        self._begin(self._valid, numbers, found)()
        return found

    def begin(
        self,
        numbers: Sequence[int] | npt.NDArray[np.integer[Any]],
        into: npt.NDArray[Any],
        bands: Sequence[int] | None = None,
        valid: npt.NDArray[np.uint8] | None = None,
    ) -> Callable[[], None]:
        """Start to decode the images of some samples into an array, and return a function that waits for them.

        Args:
            numbers: Numbers of the samples.
            into: (samples, band, y, x) in the type of the store.
            bands: Their positions; all of them, in order, where none are given.
            valid: (samples, y, x), which gets 1 where a pixel holds data and 0 elsewhere; None where it is not wanted.

        The returned function raises `CorruptShard` and `MissingShard` as `images` does.
        """
        image = self._begin(self._image if bands is None else self._image[:, list(bands)], numbers, into)
        if valid is None:
            return image
        valid[...] = 1
        mask = self._begin(self._valid, numbers, valid)

        def wait() -> None:
            image()
            mask()

        return wait

    def _begin(
        self,
        array: ts.TensorStore | None,
        numbers: Sequence[int] | npt.NDArray[np.integer[Any]],
        into: npt.NDArray[Any],
    ) -> Callable[[], None]:
        """Start to decode some samples of one array; nothing happens where there is none, or no sample is asked for."""
        if array is None or not len(numbers):
            return lambda: None
        chosen = [int(i) for i in numbers]
        # one operation for all of them, directly into the batch: many small ones cost more than decoding
        together = ts.stack([array[i] for i in chosen])
        with ts.Batch() as batch:
            pending = ts.array(into).write(together, batch=batch)

        def wait() -> None:
            try:
                await_read(pending, f"{self.url} samples")
            except IntegrityError:
                for i in chosen:  # which of them it is
                    await_read(array[i].read(), f"{self.url} sample {i}")
                raise

        return wait

    def _open(self, name: str, shape: tuple[int, ...], dtype: str, most: int | None = None) -> ts.TensorStore:
        self._store.check_inside(name)
        key = f"{name}/zarr.json"
        where = self._store.where(key)
        check_array(read_document(self._store.read(key), where), where, shape=shape, dtype=dtype, most=most)
        spec = {
            "driver": "zarr3",
            "kvstore": self._store.tensorstore(name),
            "fill_missing_data_reads": name not in ("image", "valid"),  # a chunk of zeros alone is not written
            "recheck_cached_data": "open",
        }
        try:
            return ts.open(spec, open=True, read=True, write=False, context=_CONTEXT).result()
        except ValueError as error:
            raise IntegrityError(
                f"{self.url}: array {name} cannot be opened ({str(error)[:160]}); import the samples again"
            ) from error

    def _whole(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return read_tensorstore(self._open(name, shape, dtype, _MOST_WHOLE)[...], f"{self.url} {name}")
