"""Create a cube: one writer lays out every array, coordinate and attribute once, and writes no pixel.

In a folder `create_cube` makes the cube appear in one rename, in a bucket by its last key. The pixels come after, whole
shards at a time (`zarr_store.write`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from zarr_store.attributes import pack_attribute, pack_long
from zarr_store.backends import open_store, store_for
from zarr_store.conventions import Level, multiscales
from zarr_store.errors import CubeMismatch, InvalidInput
from zarr_store.georeference import georeference
from zarr_store.keys import RESERVED_NAMES
from zarr_store.nesting import check_nesting
from zarr_store.pack import BLOSC_BLOCK_BYTES, OVERVIEW_LEVEL
from zarr_store.read import is_cube, open_cube
from zarr_store.spec import OVERVIEW_FACTOR, ArraySpec, CubeSpec
from zarr_store.steps import is_imported, step_coordinates
from zarr_store.store import Kind, Store

__all__ = ["FORMAT_VERSION", "create_cube", "describe", "lay_out", "list_differences", "record_provenance"]

FORMAT_VERSION = 1
"""Version of the layout of groups, attributes and ledger; readers refuse a newer one."""

_READABLE = 120
"""Largest length of a value in a message about differences."""
_TIME_CHUNK = 1024
"""Number of dates in one object of the time coordinate; appending a date rewrites one small object, or adds one."""

Items = Mapping[str, Sequence[Mapping[str, Any]]]


def create_cube(
    url: str | Path,
    specs: Sequence[CubeSpec],
    *,
    items: Items,
    provenance: Mapping[str, Any],
    kind: Kind | None = None,
) -> None:
    """Create the metadata of a cube, or find that it exists already.

    Args:
        url: URL of the cube. It appears complete, or not at all.
        specs: One per collection; all on one grid, or on grids that nest in that of the first.
        items: Collection → item table; `source_item` counts its rows. Each row has at least "id" and "datetime".
        provenance: Origin of the cube (plan digest, configuration, version); JSON.
        kind: Plain files or objects, or an Icechunk repository; None for files, or the kind of an existing cube.

    Raises:
        CubeMismatch: A cube of another grid, band list, time axis or item table is there; the message is the diff.
        InvalidInput: Something else is there, or the specs do not fit together.

    Example:
        >>> from zarr_store import BandSpec, CubeSpec, Grid
        >>> grid = Grid.from_bounds("EPSG:32633", (600_000, 5_000_000, 601_280, 5_001_280), resolution=10)
        >>> spec = CubeSpec("s2", "reflectance", (BandSpec("red", 0, 1e-4),), grid, ("2023-08-10T09:57:57",))
        >>> create_cube("made.zarr", [spec], items={"s2": [{"id": "A", "datetime": "2023-08-10T09:57:57Z"}]},
        ...             provenance={"made": "by hand"})
    """
    store = store_for(url, kind)
    _check_specs(specs)
    described = describe(specs, items)
    if store.exists():
        _check_existing(store, described)
        if kind is not None and kind != store.kind:
            raise CubeMismatch(
                f"{store.url} is held by {store.kind}, not {kind} (--store): nothing was changed. Leave --store out, "
                "or choose another path"
            )
        return
    with store.beside() as fresh:
        target = fresh.zarr()
        if not isinstance(target, str):
            lay_out(target, specs, described, provenance)
            return
        # in memory first: zarr-python hands each small file to a thread of its own, which takes twice the time
        files: dict[str, Buffer] = {}
        lay_out(MemoryStore(files), specs, described, provenance)
        for key, value in files.items():
            path = Path(target, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.to_bytes())


def describe(specs: Sequence[CubeSpec], items: Items) -> dict[str, Any]:
    """Return spec and item table of each collection, as the attributes of its group hold them."""
    described = {
        spec.collection: {"spec": spec.to_dict(), "items": [dict(i) for i in items[spec.collection]]} for spec in specs
    }
    result: dict[str, Any] = json.loads(json.dumps(described))  # tuples become lists, as they will read back
    return result


def lay_out(
    target: Any,
    specs: Sequence[CubeSpec],
    described: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    time_chunks: Mapping[str, int] | None = None,
) -> None:
    """Write all metadata and coordinates of a cube, and no pixel.

    Args:
        target: Empty Zarr store, or the path of one.
        specs: One per collection.
        described: Result of `describe`.
        provenance: Origin of the cube.
        time_chunks: Collection → dates in one object of its time coordinate, where that is not the usual number.
    """
    root = zarr.create_group(
        target,
        attributes={
            "terrashard": {
                "format": FORMAT_VERSION,
                "collections": [s.collection for s in specs],
                "provenance": pack_long(dict(provenance)),
            },
            **_pyramids(specs),
        },
    )
    overviews = root.create_group("overview")
    root.create_group("_terrashard")
    for spec in specs:
        group = root.create_group(
            spec.collection,
            attributes={
                **georeference(spec.grid.to_dict(), spec.grid.bounds, spec.grid.wkt),
                "terrashard": pack_attribute(described[spec.collection]),
            },
        )
        time_chunk = (time_chunks or {}).get(spec.collection, _TIME_CHUNK)
        _write_coordinates(group, spec, spec.grid, time_chunk)
        radar = spec.kind == "backscatter"
        of_steps = step_coordinates(described[spec.collection]["items"], len(spec.times)) if radar else {}
        for name, (data, attributes) in of_steps.items():
            _write_along_time(group, name, data, attributes, time_chunk)
        for array in spec.arrays():
            _create_array(group, spec, array, " ".join(("spatial_ref", *of_steps)))
        _create_overview(overviews, spec, time_chunk)
    _consolidate(target, ["", *(s.collection for s in specs), *(f"overview/{s.collection}" for s in specs)])


def record_provenance(url: str | Path, provenance: Mapping[str, Any]) -> None:
    """Replace the provenance of a cube after a run that continued it; only under the cube's lock."""
    store = open_store(url)
    document = json.loads(store.read("zarr.json") or b"{}")
    document["attributes"]["terrashard"]["provenance"] = pack_long(dict(provenance))
    store.write("zarr.json", json.dumps(document, indent=2, ensure_ascii=False).encode())


def _check_specs(specs: Sequence[CubeSpec]) -> None:
    names = [spec.collection for spec in specs]
    if not specs or len(set(names)) != len(names) or set(RESERVED_NAMES) & set(names):
        raise InvalidInput(
            f"a cube needs collections of different names, none called overview, labels or _terrashard; got {names}"
        )
    check_nesting(specs)


def _check_existing(store: Store, described: Mapping[str, Any]) -> None:
    if not is_cube(store):
        raise InvalidInput(
            f"{store.url} exists and is not a terrashard cube; nothing was changed: choose another path or remove it"
        )
    cube = open_cube(store.url)
    there = {
        name: {"spec": cube.spec(name).to_dict(), "items": cube.items(name)}
        for name in cube.collections
        if name in described or not is_imported(cube.items(name))
    }
    there = json.loads(json.dumps(there))
    differences = list_differences(there, dict(described))
    if differences:
        shown = "; ".join(differences[:6]) + (f"; and {len(differences) - 6} more" if len(differences) > 6 else "")
        raise CubeMismatch(
            f"{store.url} holds another cube (there → asked for): {shown}. Nothing was changed: write to another "
            "path, repeat with the options the cube was made with, or replace the cube with --overwrite"
        )


def list_differences(there: Any, asked: Any, path: str = "") -> list[str]:
    """Return the paths at which two JSON values differ, with both values, cut to a readable length."""
    if isinstance(there, dict) and isinstance(asked, dict):
        found = []
        for key in sorted({*there, *asked}):
            at = f"{path}.{key}" if path else str(key)
            found += list_differences(there.get(key), asked.get(key), at)
        return found
    if (
        isinstance(there, list)
        and isinstance(asked, list)
        and len(there) == len(asked)
        and there
        and isinstance(there[0], dict)
    ):
        return [
            d for i, (a, b) in enumerate(zip(there, asked, strict=True)) for d in list_differences(a, b, f"{path}[{i}]")
        ]
    if there == asked:
        return []

    return [f"{path}: {_in_words(there)} → {_in_words(asked)}"]


def _in_words(value: Any) -> str:
    """Return a JSON value in the words of a person, cut to a readable length."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        name = value.get("name") or value.get("id") or value.get("collection")
        return str(name) if isinstance(name, str) else f"{len(value)} entries"
    if isinstance(value, list):
        text = ", ".join(map(_in_words, value)) or "none"
        # of many values their number and the first and last say more than a piece of the list
        return text if len(text) <= _READABLE else f"{len(value)} ({_in_words(value[0])} … {_in_words(value[-1])})"
    text = str(value)
    return text if len(text) <= _READABLE else f"{text[: _READABLE - 1]}…"


def _pyramids(specs: Sequence[CubeSpec]) -> dict[str, Any]:
    """Return the attributes that name each collection and its overview as levels of one pyramid.

    They stand in the root, as a path of `multiscales` never leads out of the group that has it. Readers match arrays of
    levels by name, so collections whose main arrays have the same name would be taken for overviews of each other: such
    cubes name none.
    """
    if len({spec.kind for spec in specs}) < len(specs):
        return {}
    levels = []
    for spec in specs:
        coarse = spec.grid.coarsen(OVERVIEW_FACTOR)
        levels += [
            Level(spec.collection, spec.grid),
            Level(f"overview/{spec.collection}", coarse, spec.collection, OVERVIEW_FACTOR),
        ]
    return multiscales(levels)


def _create_array(group: zarr.Group, spec: CubeSpec, array: ArraySpec, coordinates: str) -> None:
    group.create_array(
        array.name,
        shape=spec.array_shape(array.name),
        chunks=spec.box(array.name, spec.layout.chunk),
        shards=spec.box(array.name, spec.layout.shard),
        dtype=array.dtype,
        fill_value=array.fill,
        # bitshuffle finds the unused high bits of 12-bit samples; crc32c catches what Zarr alone would read as data
        compressors=[
            BloscCodec(
                cname=spec.layout.cname,  # type: ignore[arg-type]
                clevel=spec.layout.clevel,
                shuffle="bitshuffle",
                blocksize=BLOSC_BLOCK_BYTES,
            ),
            Crc32cCodec(),
        ],
        dimension_names=array.dims,
        attributes={**array.attributes, "grid_mapping": "spatial_ref", "coordinates": coordinates},
    )


def _write_along_time(
    group: zarr.Group, name: str, data: np.ndarray, attributes: Mapping[str, Any], time_chunk: int
) -> None:
    array = group.create_array(
        name,
        shape=data.shape,
        chunks=(time_chunk,),
        dtype="str" if data.dtype == object else data.dtype,
        dimension_names=("time",),
        compressors=[ZstdCodec(checksum=True)],
        attributes=dict(attributes),
    )
    array[...] = data


def _create_overview(overviews: zarr.Group, spec: CubeSpec, time_chunk: int) -> None:
    # Unsharded and without crc32c, so that GDAL reads it (3.12 knows neither sharding nor crc32c); zstd has its own
    # checksum. One chunk is the overview of one shard, written by the shard's only writer.
    coarse = spec.grid.coarsen(OVERVIEW_FACTOR)
    group = overviews.create_group(
        spec.collection, attributes=georeference(coarse.to_dict(), coarse.bounds, coarse.wkt)
    )
    _write_coordinates(group, spec, coarse, time_chunk)
    main = spec.array(spec.kind)
    t, y, x = spec.layout.shard
    group.create_array(
        main.name,
        shape=(len(spec.times), len(spec.bands), *coarse.shape),
        chunks=spec.box(main.name, (t, y // OVERVIEW_FACTOR, x // OVERVIEW_FACTOR)),
        dtype=main.dtype,
        fill_value=main.fill,
        compressors=[ZstdCodec(level=OVERVIEW_LEVEL, checksum=True)],
        dimension_names=main.dims,
        attributes={**main.attributes, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
    )


def _write_coordinates(group: zarr.Group, spec: CubeSpec, grid: Any, time_chunk: int) -> None:
    geographic = grid.geobox.crs.geographic
    axis = (
        (
            {"standard_name": "longitude", "units": "degrees_east"},
            {"standard_name": "latitude", "units": "degrees_north"},
        )
        if geographic
        else (
            {"standard_name": "projection_x_coordinate", "units": "m"},
            {"standard_name": "projection_y_coordinate", "units": "m"},
        )
    )
    values: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "time": (
            spec.time_values.astype("int64"),
            {"standard_name": "time", "units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        ),
        "y": (grid.y(), axis[1]),
        "x": (grid.x(), axis[0]),
    }
    for name, (data, attributes) in values.items():
        array = group.create_array(
            name,
            shape=data.shape,
            chunks=(time_chunk,) if name == "time" else "auto",
            dtype=data.dtype,
            dimension_names=(name,),
            compressors=[ZstdCodec(checksum=True)],
            attributes=attributes,
        )
        array[...] = data
    wavelengths = [b.wavelength_um for b in spec.bands]
    band = group.create_array(
        "band",
        shape=(len(spec.bands),),
        dtype="str",
        dimension_names=("band",),
        attributes={} if None in wavelengths else {"wavelength_um": wavelengths},
    )
    band[...] = np.array(spec.band_names, dtype=object)
    a, _, c, _, e, f = grid.transform
    group.create_array(
        "spatial_ref",
        shape=(),
        dtype="int64",
        attributes={
            **grid.geobox.crs.proj.to_cf(),
            "crs_wkt": grid.wkt,
            "spatial_ref": grid.wkt,
            "GeoTransform": f"{c!r} {a!r} 0.0 {f!r} 0.0 {e!r}",
        },
    )


def _consolidate(target: Any, groups: Sequence[str]) -> None:
    # `create_cube` and `grow_cube` change metadata and come through here; label layers are added by `list_labels`.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        for group in sorted(groups, key=len, reverse=True):
            zarr.consolidate_metadata(target, path=group or None)
