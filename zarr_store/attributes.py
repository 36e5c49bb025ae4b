"""The attribute `terrashard` of a group, as text: programs copy attributes into formats that hold no nested ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zarr_store.bounded import load_json

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["flatten_attributes", "pack_attribute", "unpack_attribute"]


def pack_attribute(value: Mapping[str, Any]) -> str:
    """Turn a description into JSON text."""
    return json.dumps(value, ensure_ascii=False)


def unpack_attribute(value: Any) -> Any:
    """Inverse of `pack_attribute`; what an earlier release stored as a nested attribute is returned as it is.

    Raises:
        ValueError: The text is no JSON.
    """
    return load_json(value.encode(), "attribute terrashard") if isinstance(value, str) else value


def flatten_attributes(dataset: xr.Dataset) -> xr.Dataset:
    """Give a dataset attributes that any format can hold, netCDF 3 too: numbers, texts, and lists of numbers."""
    dataset.attrs = _all_flat(dataset.attrs)
    for variable in dataset.variables.values():
        variable.attrs = _all_flat(variable.attrs)
    return dataset


def _all_flat(attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    flat = {name: _flat(value) for name, value in attributes.items()}
    return {name: value for name, value in flat.items() if value is not None}


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return pack_attribute(value)
    if isinstance(value, list | tuple):
        if any(item is None for item in value):
            return None
        if any(not isinstance(item, int | float) for item in value):
            return " ".join(item if isinstance(item, str) else json.dumps(item) for item in value)
    return value
