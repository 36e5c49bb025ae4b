"""The attribute `terrashard` of a group, as text: programs copy attributes into formats that hold no nested ones.

Long texts are compressed: the item table of 100,000 scenes has 40 MB, and every reader of the cube parses it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zarr_store.bounded import load_json

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["flatten_attributes", "pack_attribute", "pack_long", "unpack_attribute"]


_LONG = 4 << 20
"""Texts of at least this length are compressed; the items of 5,000 scenes are shorter."""
_PACKED = "zlib,base64:"
_MOST_UNPACKED = 64 << 20
"""Largest size of an unpacked text, as a few kilobytes can unpack to gigabytes. 100,000 scenes have 40 MB."""


def pack_attribute(value: Mapping[str, Any]) -> str:
    """Turn a description into JSON text; compress it if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < _LONG else _PACKED + base64.standard_b64encode(zlib.compress(text.encode())).decode()


def pack_long(value: Mapping[str, Any]) -> Any:
    """Turn a description into compressed text if its JSON is long; return a short description unchanged."""
    text = pack_attribute(value)
    return text if text.startswith(_PACKED) else json.loads(text)


def unpack_attribute(value: Any) -> Any:
    """Read what `pack_attribute` wrote; a nested attribute of an earlier release is returned unchanged.

    Raises:
        ValueError: The text is not JSON, or is not compressed as `pack_attribute` does it.
        InvalidInput: It is too large.
    """
    if not isinstance(value, str):
        return value
    if not value.startswith(_PACKED):
        return load_json(value.encode(), "attribute terrashard")
    try:
        packed = base64.b64decode(value[len(_PACKED) :], validate=True)
        unpacked = zlib.decompressobj()
        data = unpacked.decompress(packed, _MOST_UNPACKED)
    except zlib.error as error:
        raise ValueError(f"its packed text is damaged ({error})") from error
    if unpacked.unconsumed_tail or not unpacked.eof:
        raise ValueError(f"its packed text is damaged, or longer than {_MOST_UNPACKED} bytes")
    return load_json(data, "attribute terrashard", most=_MOST_UNPACKED)


def flatten_attributes(dataset: xr.Dataset) -> xr.Dataset:
    """Reduce attributes to what any format can hold, also netCDF 3: numbers, texts, and lists of numbers."""
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
