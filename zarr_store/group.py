"""`open_group` opens a Zarr group as a dataset of xarray, after the metadata of its arrays were checked.

xarray does not read the metadata of each array but their copy in the root of the store, and it decodes the axes as soon
as it opens a group. The copy may say anything: another Zarr format, whose codecs run code, or an axis of a
terabyte. So the check is made on what zarr-python has read from the same metadata that xarray will use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zarr_store.bounded_codecs import bounded_codecs
from zarr_store.decoding import decoding
from zarr_store.errors import IntegrityError
from zarr_store.promises import check_array
from zarr_store.store import Store

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

__all__ = ["ArrayCheck", "axis_checks", "open_group", "read_array"]

ArrayCheck = Callable[[Any, str], None]
"""Called with the metadata of one array and its place; raises IntegrityError where they promise what they must not."""


def axis_checks(height: int, width: int, *, bands: int | None = None) -> dict[str, ArrayCheck]:
    """Return the checks of the axes of a cube or map; `bands` is None where there are no bands and no time."""
    checks: dict[str, ArrayCheck] = {
        "y": partial(check_array, shape=(height,), dtype="float64"),
        "x": partial(check_array, shape=(width,), dtype="float64"),
        "spatial_ref": partial(check_array, shape=(), dtype="int64"),
    }
    if bands is not None:
        checks["time"] = partial(check_array, shape=(None,), dtype="int64")
        checks["band"] = partial(check_array, shape=(bands,), dtype="string")
        # backscatter has the orbit and platform of each time step (`steps.step_coordinates`)
        checks["relative_orbit"] = partial(check_array, shape=(None,), dtype="int16")
        for name in ("orbit_direction", "platform"):
            checks[name] = partial(check_array, shape=(None,), dtype="string")
    return checks


def open_group(store: Store, group: str, checks: Mapping[str, ArrayCheck]) -> xr.Dataset:
    """Open a group lazily, as stored integers.

    Args:
        store: The cube or map.
        group: Path in the store; empty for its root.
        checks: Checks by name of array. Arrays with other names are not read.

    Raises:
        IntegrityError: An array promises what it must not, its metadata cannot be used, or an axis cannot be decoded.
    """
    with decoding(store.where(group)), bounded_codecs():
        return _opened(store, group, checks)


def _opened(store: Store, group: str, checks: Mapping[str, ArrayCheck]) -> xr.Dataset:
    import xarray as xr
    import zarr

    place = store.zarr()
    try:
        root = zarr.open_consolidated(place, mode="r", zarr_format=3)
        consolidated, opened = True, root[group] if group else root
    except (ValueError, KeyError, FileNotFoundError):
        consolidated = False
        opened = zarr.open_group(place, path=group or None, mode="r", zarr_format=3, use_consolidated=False)
    if not isinstance(opened, zarr.Group):
        raise IntegrityError(f"{store.where(group)} is an array, not a group; restore its zarr.json")
    others = []
    for name, array in opened.arrays():
        if name in checks:
            checks[name](_document(array), store.where(f"{group}/{name}" if group else name))
        else:
            others.append(name)
    found: xr.Dataset = xr.open_zarr(
        place, group=group or None, chunks=None, mask_and_scale=False, consolidated=consolidated, zarr_format=3,
        drop_variables=others,
    )  # fmt: skip
    return found


def read_array(store: Store, path: str, check: ArrayCheck, at: Any = ...) -> np.ndarray:
    """Read one array.

    Args:
        store: The map or store of samples.
        path: Path of the array.
        check: Check of its metadata.
        at: Index of what is read, as numpy has it; all of it by default.

    Raises:
        IntegrityError: The array promises what it must not, its metadata cannot be used, or it cannot be decoded.
    """
    import numpy as np
    import zarr

    with decoding(store.where(path)), bounded_codecs():
        array = zarr.open_array(store.zarr(), path=path, mode="r", zarr_format=3)
        check(_document(array), store.where(path))
        return np.asarray(array[at])


def _document(array: Any) -> Any:
    """Return the metadata of an array as JSON values."""
    return json.loads(json.dumps(array.metadata.to_dict(), default=str))
