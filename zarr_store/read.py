"""`Cube` is an open cube. Pixels come through tensorstore (2–4× zarr-python on sharded arrays), or lazily as xarray."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tensorstore as ts

from zarr_store.attributes import flatten_attributes, unpack_attribute
from zarr_store.backends import open_store
from zarr_store.bounded import load_json
from zarr_store.decoding import decoding
from zarr_store.empty import fill_empty, read_empty
from zarr_store.errors import CorruptShard, IntegrityError, MissingShard, NotACube, UnknownName
from zarr_store.group import ArrayCheck, axis_checks, open_group
from zarr_store.index import TrainingIndex
from zarr_store.keys import RESERVED_NAMES, check_name
from zarr_store.ledger import Ledger
from zarr_store.promises import check_overview, check_promises
from zarr_store.regions import Region
from zarr_store.spec import OVERVIEW_FACTOR, CubeSpec
from zarr_store.states import ShardStates, StatesWatch, read_states
from zarr_store.store import Store

if TYPE_CHECKING:
    import xarray as xr

    from zarr_store.blocks import Blocks
    from zarr_store.grid import Grid

__all__ = ["Cube", "await_read", "is_cube", "kind_of", "open_cube", "read_tensorstore"]

# Decoded chunks shared by all arrays that a process opens: an epoch touches each chunk several times in a row.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})
_FORMAT = 1


def is_cube(store: Store) -> bool:
    """Return whether the store holds a terrashard cube with readable root metadata."""
    try:
        return "terrashard" in _root_attributes(store)
    except NotACube:
        return False


def kind_of(url: str | os.PathLike[str]) -> Literal["cube", "sample store", "map", "other"]:
    """Return what is at `url`, by its root metadata alone, without importing a reader; "other" also for nothing."""
    try:
        attributes: Any = _root_attributes(open_store(url))  # as it stands in the file
    except NotACube:
        return "other"
    if not isinstance(attributes, dict):
        return "other"
    ours = attributes.get("terrashard")
    if isinstance(ours, dict) and "samples" in ours:
        return "sample store"
    if isinstance(ours, dict) and "collections" in ours:
        return "cube"
    return "map" if "terrashard_map" in attributes else "other"


def open_cube(url: str | os.PathLike[str], *, cache_bytes: int | None = None) -> Cube:
    """Open a cube for reading.

    Args:
        url: A folder, or the URL of a bucket: s3://, gs:// or az://.
        cache_bytes: Bytes of decoded chunks that are kept for this cube alone; None shares 256 MiB with all others.

    Example:
        >>> open_cube("cube.zarr").dataset("sentinel-2-l2a").reflectance.dims
        ('time', 'band', 'y', 'x')

    Raises:
        NotACube: There is nothing at `url`, or something else.
        IntegrityError: It is a cube, but its metadata cannot be read.
    """
    store = open_store(url)
    attributes = _root_attributes(store)
    if "terrashard" not in attributes or "collections" not in attributes["terrashard"]:
        raise NotACube(f"{store.url} is {_other_kind(store.url, attributes)}")
    found = attributes["terrashard"].get("format")
    if found != _FORMAT:
        newer = isinstance(found, int) and found > _FORMAT
        what = "use the newer terrashard that made it" if newer else "make it again with `terrashard ingest`"
        raise NotACube(
            f"{store.url} has cube format {found}, this release reads format {_FORMAT}; nothing was changed: {what}"
        )
    context = _CONTEXT if cache_bytes is None else ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    return Cube(store, attributes["terrashard"], context)


def _other_kind(url: str, attributes: dict[str, Any]) -> str:
    """Describe what a Zarr group that is not a cube holds, and what to do with it."""
    if "samples" in attributes.get("terrashard", {}):
        return (
            f"a sample store, not a cube: `terrashard info {url}` shows it, and `terrashard train` and `terrashard "
            "evaluate --data` take it"
        )
    if "terrashard_map" in attributes:
        return f"a map, not a cube: show it with `terrashard quicklook {url} OUT.png`"
    return "a Zarr group, but not a terrashard cube; make one with `terrashard ingest`"


def _root_attributes(store: Store) -> dict[str, Any]:
    data = store.read("zarr.json")
    if data is None:
        if store.read("model.json") is not None:
            raise NotACube(f"{store.url} is a training run, not a cube: its scores and settings are in its report.html")
        kind = "holds no zarr.json" if store.exists() else "does not exist"
        raise NotACube(f"{store.url} {kind}: expected a cube made by `terrashard ingest`")
    return _attributes(store, "zarr.json", data)


def _attributes(store: Store, key: str, data: bytes) -> dict[str, Any]:
    try:
        attributes = load_json(data, store.where(key))["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotACube(
            f"{store.where(key)}: unreadable metadata ({type(error).__name__}: {error}); nothing is written over it: "
            "restore the file, or ingest to another path"
        ) from error
    return attributes if isinstance(attributes, dict) else {}


def _checked_names(store: Store, names: Any) -> tuple[str, ...]:
    """Return the collections that the root lists, each of which must name a group and no reserved folder."""
    where = store.where("zarr.json")
    if not isinstance(names, list) or not names:
        raise IntegrityError(f"{where} names no collections (got {str(names)[:80]}); restore the file")
    checked = tuple(check_name(name, "collection", where) for name in names)
    if len(set(checked)) != len(checked) or set(RESERVED_NAMES) & set(checked):
        raise IntegrityError(f"{where} names the collections {', '.join(checked)}; restore the file")
    return checked


class Cube:
    """A cube that is open for reading; made by `open_cube`.

    Example:
        >>> cube = open_cube("cube.zarr")
        >>> cube.collections
        ('sentinel-2-l2a',)
        >>> cube.spec("sentinel-2-l2a").band_names
        ('red', 'nir')
    """

    def __init__(self, store: Store, attributes: dict[str, Any], context: ts.Context = _CONTEXT) -> None:
        self._store = store
        self._context = context
        self.url = store.url
        self.collections: tuple[str, ...] = _checked_names(store, attributes["collections"])
        self._provenance: Any = attributes.get("provenance", {})
        self._describe = functools.cache(self._describe_uncached)
        self.spec = functools.cache(self._spec_uncached)
        self.tensorstore = functools.cache(self._tensorstore_uncached)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Origin of the cube: plan, source, settings, and statistics of its scenes."""
        try:
            found = unpack_attribute(self._provenance)
        except ValueError as error:
            raise IntegrityError(f"{self._store.where('zarr.json')}: provenance: {error}; restore the file") from error
        return found if isinstance(found, dict) else {}

    def __repr__(self) -> str:
        return f"<Cube {self.url}: {', '.join(self.collections)}>"

    def _repr_html_(self) -> str:
        from zarr_store.notebook import facts_table

        facts: list[tuple[str, object]] = []
        for name in self.collections:
            spec = self.spec(name)
            first, last = (spec.times[at].partition("T")[0] for at in (0, -1))
            states = self.states(name).count()
            bands = ", ".join((*spec.band_names, *spec.class_layers, *(index.name for index in spec.derived)))
            facts += [
                ("collection", name),
                ("grid", spec.grid),
                ("dates", f"{len(spec.times)}, {first} … {last}"),
                ("bands", bands),
                ("shards", f"{states['done']} of {states['total']} done"
                 + "".join(f", {states[state]} {state}" for state in ("partial", "failed") if states[state])),
            ]  # fmt: skip
        return facts_table(f"Cube {self.url}", facts)

    def _describe_uncached(self, collection: str) -> dict[str, Any]:
        if collection not in self.collections:
            raise UnknownName.of("collection", collection, self.collections, f"cube {self.url}")
        key = f"{collection}/zarr.json"
        data = self._store.read(key)
        if data is None:
            raise IntegrityError(f"{self._store.where(key)} is absent, but the cube lists {collection}; restore it")
        try:
            found = unpack_attribute(_attributes(self._store, key, data).get("terrashard"))
        except ValueError as error:
            raise IntegrityError(f"{self._store.where(key)}: {error}; restore the file") from error
        if not isinstance(found, dict):
            raise IntegrityError(f"{self._store.where(key)} has no terrashard attributes; restore the file")
        return found

    def _spec_uncached(self, collection: str) -> CubeSpec:
        """Return bands, grid, times and layout of a collection."""
        described = self._describe(collection)
        try:
            spec = CubeSpec.from_dict(described["spec"])
            if spec.collection != collection:
                raise ValueError(f"it describes a collection {spec.collection!r}")
            return spec
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            key = f"{collection}/zarr.json"
            raise IntegrityError(
                f"{self._store.where(key)}: its description of the collection cannot be used ({type(error).__name__}: "
                f"{error}); restore the file, or make the cube again"
            ) from error

    @property
    def grid(self) -> Grid:
        """The finest grid of the cube, which is that of its first collection, of labels and of static layers."""
        grid: Grid = self.spec(self.collections[0]).grid
        return grid

    def items(self, collection: str) -> list[dict[str, Any]]:
        """Return the item table, whose row numbers `source_item` holds."""
        with decoding(self._store.where(f"{collection}/zarr.json")):
            return list(self._describe(collection)["items"])

    def ledger(self, collection: str) -> Ledger:
        """Return the ledger, which knows the state of each shard."""
        return Ledger(self._store, collection)

    def states(self, collection: str) -> ShardStates:
        """Return the state of each shard: of a large collection without reading every row of its ledger."""
        return read_states(self._store, self.spec(collection))

    def watch_states(self, collection: str) -> StatesWatch:
        """Return a watch that looks at the state of each shard again and again, while a run writes."""
        return StatesWatch(self._store, self.spec(collection))

    def index(self, collection: str) -> TrainingIndex:
        """Return counts and moments of each chunk, from the ledger; no pixel is read."""
        return TrainingIndex.from_rows(self.spec(collection), self.ledger(collection).rows())

    def dataset(
        self, collection: str, *, chunks: Blocks | None = None, scaled: bool = False, masked: bool = False
    ) -> xr.Dataset:
        """Open the collection as a lazy xarray dataset.

        A shard that was never written reads as fill value here, as Zarr has it: `masked` hides it, `status` (0) shows
        it, and `read` raises.

        Args:
            collection: Group of the cube.
            chunks: "shards" gives Dask arrays whose blocks are whole files, which is what computing on all of a cube
                needs; "chunks" those whose blocks are what is compressed as one, for small windows. None reads without
                Dask, when values are asked for.
            scaled: Give reflectance, backscatter and indices as physical numbers (float32), and NaN where there is no
                data. Without it, bands are the stored integers.
            masked: Give NaN (so float32) wherever `status` is not observed: no data, clouds and what else was masked,
                unreadable files.

        Returns:
            Bands as (time, band, y, x), all else as (time, y, x), with `x`, `y`, `time`, `band` and `spatial_ref`.

        Example:
            >>> cube = open_cube("cube.zarr")
            >>> s2 = cube.dataset("sentinel-2-l2a", chunks="shards", scaled=True, masked=True)
            >>> red, nir = (s2.reflectance.sel(band=name) for name in ("red", "nir"))
            >>> greenest = ((nir - red) / (nir + red)).max("time").compute()
        """
        spec = self.spec(collection)
        for array in spec.arrays():
            self._check_array(collection, array.name)
        self._store.check_inside(collection)
        with decoding(self._store.where(f"{collection}/zarr.json")):
            checks = axis_checks(spec.grid.height, spec.grid.width, bands=len(spec.bands))
            for array in spec.arrays():
                checks[array.name] = self._pixel_check(spec, array.name)
            opened = flatten_attributes(open_group(self._store, collection, checks))
        if chunks is None and not (scaled or masked):
            return opened
        from zarr_store.blocks import cut_into_blocks, decode

        if scaled or masked:
            opened = decode(opened, spec, scaled=scaled, masked=masked)
        return cut_into_blocks(opened, spec, chunks) if chunks is not None else opened

    def _check_array(self, collection: str, array: str) -> None:
        spec = self.spec(collection)
        spec.array(array)
        key = f"{collection}/{array}/zarr.json"
        check_promises(self._store.read(key), spec, array, self._store.where(key))

    def overview(self, collection: str) -> xr.Dataset:
        """Open every 8th pixel of the main array of the collection, as `dataset` opens all pixels."""
        spec = self.spec(collection)
        key = f"overview/{collection}/{spec.kind}/zarr.json"
        check_overview(self._store.read(key), spec, self._store.where(key))
        self._store.check_inside(f"overview/{collection}")
        with decoding(self._store.where(f"overview/{collection}/zarr.json")):
            coarse = spec.grid.coarsen(OVERVIEW_FACTOR)
            checks = axis_checks(coarse.height, coarse.width, bands=len(spec.bands))
            checks[spec.kind] = lambda document, where: check_overview(document, spec, where, any_length=True)
            return open_group(self._store, f"overview/{collection}", checks)

    def _pixel_check(self, spec: CubeSpec, array: str) -> ArrayCheck:
        return lambda document, where: check_promises(document, spec, array, where, any_length=True)

    def _tensorstore_uncached(self, collection: str, array: str) -> ts.TensorStore:
        """Open one array, read-only; reading a chunk that was never written raises, unless its shard is empty."""
        self._check_array(collection, array)
        with decoding(self._store.where(f"{collection}/{array}/zarr.json")):
            handle = self._store.open_array(f"{collection}/{array}", self._context)
        empty = [region for region, _ in read_empty(self._store, collection).shards.values()]
        return fill_empty(handle, self.spec(collection).array(array).fill, empty)

    def read(self, collection: str, array: str, region: Region, bands: Sequence[int] | None = None) -> np.ndarray:
        """Read one box.

        Args:
            collection: Group of the cube.
            array: Array of the group.
            region: Box in pixels; must lie within the cube.
            bands: Positions of bands to read, in the order wanted; None for all. Only for the main array.

        Returns:
            (time, band, y, x) for the main array, else (time, y, x).

        Raises:
            MissingShard: A part was never written or has been deleted.
            CorruptShard: Stored bytes fail their checksum.
        """
        handle = self.tensorstore(collection, array)
        t, y, x = region.slices
        if handle.rank == 4:
            view = handle[t, :, y, x] if bands is None else handle[t, :, y, x][:, list(bands)]
        else:
            view = handle[t, y, x]
        return read_tensorstore(view, f"{self.url} {collection}/{array} {region}")


def read_tensorstore(view: ts.TensorStore, where: str) -> np.ndarray:
    """Read a view; errors of tensorstore become ours, as in `await_read`."""
    return await_read(view.read(), where)


def await_read(pending: Any, place: str | Callable[[], str]) -> np.ndarray:
    """Wait for a tensorstore read that is under way; its errors become ours.

    Args:
        pending: The future.
        place: Name of what is read, for messages; a function is called only on an error.

    Raises:
        MissingShard: NOT_FOUND. CorruptShard: DATA_LOSS or a damaged shard index.
    """
    try:
        return np.asarray(pending.result())
    except ValueError as error:
        text, where = str(error), place if isinstance(place, str) else place()
        if text.startswith("NOT_FOUND"):
            raise MissingShard(
                f"{where} holds a shard that was never written or was deleted ({_first(text)}); "
                "`terrashard status` lists what is absent, repeating the ingest writes it"
            ) from error
        if text.startswith(("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT: Error")) or "decod" in text:
            raise CorruptShard(
                f"{where} holds damaged bytes ({_first(text)}); `terrashard verify` names the shard"
            ) from error
        raise


def _first(text: str) -> str:
    return text.split(" [", 1)[0][:240]
