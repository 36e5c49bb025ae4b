"""Prepare a collection for computing: physical numbers, NaN where nothing was observed, blocks for Dask.

Everything here stays lazy. A block reads its stored integers, and its status where that is asked for, and becomes
float32 in the same step: one block is one task. Dask is loaded by xarray, and only where blocks are asked for.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from xarray.backends import BackendArray
from xarray.core import indexing

from zarr_store.errors import UnknownName
from zarr_store.spec import STATUS_OBSERVED, CubeSpec

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Blocks", "cut_into_blocks", "decode"]

Blocks = Literal["shards", "chunks"]
"""One block of a Dask array is a whole shard (one file) or a chunk (the unit of compression)."""

_HOW_STORED = ("reflectance_scale", "reflectance_offset", "index_scale", "index_nodata", "comment")
"""Attributes with the factors of stored numbers; they are dropped from arrays that hold physical numbers."""
_OF_INTEGERS = ("_FillValue",)
"""Attributes that are wrong for floats, in which NaN is no data."""


def cut_into_blocks(dataset: xr.Dataset, spec: CubeSpec, blocks: Blocks) -> xr.Dataset:
    """Turn the arrays of a dataset into Dask arrays whose blocks are whole shards or chunks; coordinates stay.

    Raises:
        UnknownName: `blocks` is neither "shards" nor "chunks".
    """
    if blocks not in get_args(Blocks):
        raise UnknownName.of("kind of blocks", str(blocks), get_args(Blocks))
    t, y, x = spec.layout.shard if blocks == "shards" else spec.layout.chunk
    sizes = {"time": t, "band": -1, "y": y, "x": x}
    # The pixels under a path change when a cube grows or is repaired. A cluster may still hold a block of an earlier
    # opening, and must not take it for one of this opening, so no name is used twice.
    opening = uuid.uuid4().hex
    arrays = {
        name: array.chunk(
            {dim: sizes[str(dim)] for dim in array.dims}, name_prefix="terrashard-", token=f"{opening}-{name}"
        )
        for name, array in dataset.data_vars.items()
    }
    return dataset.assign(arrays)


def decode(dataset: xr.Dataset, spec: CubeSpec, *, scaled: bool, masked: bool) -> xr.Dataset:
    """Turn bands and indices into float32; class layers, status and sources stay whole numbers.

    Args:
        dataset: The arrays as they are stored.
        spec: Spec of the collection.
        scaled: Give physical numbers (stored · scale + offset), and NaN where there is no data.
        masked: Give NaN wherever the status is not observed.
    """
    import xarray as xr

    status = dataset["status"].variable if masked else None
    of_bands = (len(spec.bands), 1, 1)
    rules: dict[str, tuple[Any, Any, float | None]] = {
        spec.kind: (
            np.array([band.scale for band in spec.bands], np.float32).reshape(of_bands),
            np.array([band.offset for band in spec.bands], np.float32).reshape(of_bands),
            spec.bands[0].nodata,
        ),
        **{index.name: (np.float32(index.scale), np.float32(0.0), index.nodata) for index in spec.derived},
    }
    arrays = {}
    for name, rule in rules.items():
        stored = dataset[name].variable
        lazy = indexing.LazilyIndexedArray(_Decoded(stored, status, rule if scaled else None))
        dropped = (*_OF_INTEGERS, *(_HOW_STORED if scaled else ()))
        attributes = {key: value for key, value in stored.attrs.items() if key not in dropped}
        # the encoding is that of whole numbers: floats written with it would be cut to integers
        encoding = {key: value for key, value in stored.encoding.items() if key in ("grid_mapping", "coordinates")}
        arrays[name] = xr.Variable(stored.dims, lazy, {**attributes, **({"units": "1"} if scaled else {})}, encoding)
    return dataset.assign(arrays)


class _Decoded(BackendArray):
    """Lazy view of a stored array as float32 numbers, computed when a window is read."""

    def __init__(
        self, stored: xr.Variable, status: xr.Variable | None, rule: tuple[Any, Any, float | None] | None
    ) -> None:
        self.shape = stored.shape
        self.dtype = np.dtype(np.float32)
        self._stored = stored
        self._status = status
        self._rule = rule

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> npt.NDArray[np.float32]:
        # a band that is asked for by its number must not cost the axis that scales lie on
        whole = tuple(slice(k, k + 1) if isinstance(k, int | np.integer) else k for k in key)
        stored = np.asarray(self._stored[whole].values)
        values = stored.astype(np.float32)
        if self._rule is not None:
            scale, offset, empty = self._rule
            if np.ndim(scale):
                scale, offset = scale[whole[1]], offset[whole[1]]
            values *= scale
            values += offset
            if empty is not None and np.isfinite(empty):
                values[stored == empty] = np.nan
        if self._status is not None:
            place = (whole[0], *whole[-2:])
            hidden = np.asarray(self._status[place].values) != STATUS_OBSERVED
            np.copyto(values, np.float32(np.nan), where=hidden[:, None] if values.ndim == 4 else hidden)
            if stored.dtype.kind == "f":  # cubes of earlier releases may mark infinity as observed
                np.copyto(values, np.float32(np.nan), where=~np.isfinite(values))
        return values[tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key)]
