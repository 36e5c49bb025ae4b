"""`open_group`: a Zarr group as a dataset of xarray, after all that its arrays promise was judged.

xarray does not read the metadata of each array but their copy in the root of the store, and it decodes the axes as soon
as it opens a group. The copy may say anything: another Zarr format, whose packings run code, or an axis of a
terabyte. So what is judged here is what zarr-python made of the very metadata that xarray will be given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zarr_store.errors import IntegrityError
from zarr_store.promises import check_array
from zarr_store.store import Store

if TYPE_CHECKING:
    import xarray as xr
    import zarr

__all__ = ["Judge", "axis_judges", "open_array", "open_group"]

Judge = Callable[[Any, str], None]
"""Raises IntegrityError where a document (of one array) promises what it must not; the second is its place."""


def axis_judges(height: int, width: int, *, bands: int | None = None) -> dict[str, Judge]:
    """Judges of the axes that a group of ours has; `bands` is None where it has no bands and no time."""
    judges: dict[str, Judge] = {
        "y": partial(check_array, shape=(height,), dtype="float64"),
        "x": partial(check_array, shape=(width,), dtype="float64"),
        "spatial_ref": partial(check_array, shape=(), dtype="int64"),
    }
    if bands is not None:
        judges["time"] = partial(check_array, shape=(None,), dtype="int64")
        judges["band"] = partial(check_array, shape=(bands,), dtype="string")
        # backscatter says of each step from where it was seen (`steps.step_coordinates`)
        judges["relative_orbit"] = partial(check_array, shape=(None,), dtype="int16")
        for name in ("orbit_direction", "platform"):
            judges[name] = partial(check_array, shape=(None,), dtype="string")
    return judges


def open_group(store: Store, group: str, judges: Mapping[str, Judge]) -> xr.Dataset:
    """Open a group lazily, as stored integers.

    Args:
        store: The cube or map.
        group: Path in the store; empty for its root.
        judges: By name of array. Arrays of other names are not read.

    Raises:
        IntegrityError: An array promises what it must not.
        ValueError, KeyError, TypeError: The metadata cannot be used.
    """
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
        if name in judges:
            judges[name](_document(array), store.where(f"{group}/{name}" if group else name))
        else:
            others.append(name)
    found: xr.Dataset = xr.open_zarr(
        place, group=group or None, chunks=None, mask_and_scale=False, consolidated=consolidated, zarr_format=3,
        drop_variables=others,
    )  # fmt: skip
    return found


def open_array(store: Store, path: str, judge: Judge) -> zarr.Array[Any]:
    """Open one array.

    Raises:
        IntegrityError: It promises what it must not, or its metadata cannot be used.
    """
    import zarr

    where = store.where(path)
    try:
        array = zarr.open_array(store.zarr(), path=path, mode="r", zarr_format=3)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise IntegrityError(f"{where}: unusable metadata ({type(error).__name__}: {str(error)[:300]})") from error
    judge(_document(array), where)
    return array


def _document(array: Any) -> Any:
    """The metadata of an array as JSON has them."""
    return json.loads(json.dumps(array.metadata.to_dict(), default=str))
