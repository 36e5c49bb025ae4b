"""Overviews of a map: coarser copies of its layers, so that viewers and GIS programs draw a large map from few chunks.

    MAP.zarr/overview/4/class    (y_4, x_4)      the middle pixel of every 4 × 4 of the map
    MAP.zarr/overview/16/class   (y_16, x_16)    the middle pixel of every 4 × 4 of that; and so on

They are made from the finished layers, so their bytes depend on the map alone. The attribute `multiscales` of the root
names them. Each pixel is one of the map's own, so class and confidence of an overview belong to the same pixel. The
dimensions have names of their own, because `xarray.open_datatree` refuses a child whose `y` and `x` differ from its
parent's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from zarr_store.bounded import load_json
from zarr_store.conventions import Level, multiscales
from zarr_store.folder import FolderStore
from zarr_store.georeference import georeference, write_axes
from zarr_store.grid import Grid

__all__ = ["FACTOR", "write_overviews"]

FACTOR = 4
"""Side of a pixel of a level in pixels of the level before: all levels together add a fifteenth."""
_GROUP = "overview"


def write_overviews(store: FolderStore, names: Sequence[str], side: int) -> None:
    """Write the overviews of a map whose layers are complete; those of a call that was interrupted are replaced.

    Args:
        store: The map.
        names: Names of its layers.
        side: Side of its chunks. A map that is no larger gets no overview.
    """
    store.clear(_GROUP)
    root = zarr.open_group(str(store.root), mode="r+", use_consolidated=False)
    about: Any = root.attrs["terrashard_map"]
    grid = Grid.from_dict(about["grid"])
    factors = _factors(grid, side)
    if not factors:
        return
    levels = [Level(name, grid) for name in names]
    before, prefix = root, ""
    overviews = root.create_group(_GROUP)
    for factor in factors:
        grid = grid.coarsen(FACTOR)
        dims = (f"y_{factor}", f"x_{factor}")
        group = overviews.create_group(
            str(factor), attributes=georeference(grid.to_dict(), grid.bounds, grid.wkt, dims=dims)
        )
        for name in names:
            _write_level(before, group, name, grid, dims)
            place = f"{_GROUP}/{factor}/{name}"
            levels.append(Level(place, grid, f"{prefix}{name}", FACTOR))
        write_axes(group, grid, dims=dims)
        if "time" in root:
            _copy_times(root, group)
        before, prefix = group, f"{_GROUP}/{factor}/"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        for factor in factors:
            zarr.consolidate_metadata(str(store.root), path=f"{_GROUP}/{factor}")
    _list_in_root(store, [_GROUP, *(f"{_GROUP}/{key}" for key in _nodes(overviews))], levels)


def _nodes(overviews: zarr.Group) -> list[str]:
    return sorted(path for path, _ in overviews.members(max_depth=None))


def _list_in_root(store: FolderStore, nodes: Sequence[str], levels: Sequence[Level]) -> None:
    """Name the levels in the root of a map, and copy their metadata into the root's copy of all metadata.

    zarr-python could make that copy itself, but it fails at the folder of the ledger.
    """
    document = load_json(store.read("zarr.json") or b"{}", store.where("zarr.json"))
    document["attributes"] |= json.loads(json.dumps(multiscales(levels, document["attributes"])))
    metadata = document["consolidated_metadata"]["metadata"]
    kept = {key: value for key, value in metadata.items() if key.partition("/")[0] != _GROUP}
    for node in nodes:
        own = load_json(store.read(f"{node}/zarr.json") or b"{}", store.where(f"{node}/zarr.json"))
        kept[node] = {key: value for key, value in own.items() if key != "consolidated_metadata"}
    document["consolidated_metadata"]["metadata"] = kept
    store.write("zarr.json", json.dumps(document, indent=2, ensure_ascii=False).encode())


def _factors(grid: Grid, side: int) -> list[int]:
    """Return the side of a pixel of each level in pixels of the map.

    >>> made = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (10_980, 9_000))
    >>> _factors(made, 512), _factors(made, 20_000)
    ([4, 16, 64], [])
    """
    found: list[int] = []
    while max(grid.shape) > side:
        grid = grid.coarsen(FACTOR)
        found.append(FACTOR ** (len(found) + 1))
    return found


def _middles(size: int) -> npt.NDArray[np.int64]:
    """Return the rows or columns of a level of `size` pixels that the next one keeps."""
    return np.minimum(np.arange(0, size, FACTOR) + FACTOR // 2, size - 1)


def _write_level(source: zarr.Group, target: zarr.Group, name: str, grid: Grid, dims: tuple[str, str]) -> None:
    """Write one layer of one level, chunk by chunk, so that memory does not grow with the map."""
    full: Any = source[name]
    shape = (*full.shape[:-2], *grid.shape)
    chunks = tuple(min(chunk, length) for chunk, length in zip(full.chunks, shape, strict=True))
    array: Any = target.create_array(
        name, shape=shape, chunks=chunks, dtype=full.dtype, fill_value=full.fill_value,
        compressors=[ZstdCodec(level=3, checksum=True)],
        dimension_names=(*full.metadata.dimension_names[:-2], *dims), attributes=dict(full.attrs),
    )  # fmt: skip
    rows, columns = (_middles(length) for length in full.shape[-2:])
    for box in _boxes(shape, chunks):
        *outer, y, x = box
        array[box] = full.oindex[(*outer, rows[y], columns[x])]


def _boxes(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the chunks of an array as slices."""
    counts = [-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True)]
    for index in np.ndindex(*counts):
        yield tuple(
            slice(i * chunk, min((i + 1) * chunk, length))
            for i, chunk, length in zip(index, chunks, shape, strict=True)
        )


def _copy_times(root: zarr.Group, group: zarr.Group) -> None:
    times: Any = root["time"]
    group.create_array(
        "time", shape=times.shape, dtype=times.dtype, dimension_names=("time",),
        compressors=[ZstdCodec(level=3, checksum=True)], attributes=dict(times.attrs),
    )[...] = times[...]  # fmt: skip
