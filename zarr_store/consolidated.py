"""`with_labels`: the copy of all metadata in a cube's root, completed by its label layers.

xarray finds groups and arrays by this copy alone. A cube is made and grown without its label layers, so they are added
whenever one of the two changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from zarr_store.bounded import load_json
from zarr_store.store import Store

__all__ = ["LABELS", "list_labels", "with_labels"]

LABELS = "labels"
"""Group of a cube that holds its label layers."""

_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_ARRAYS = ("label", "y", "x", "spatial_ref")


def list_labels(store: Store, names: Iterable[str]) -> None:
    """Add the label layers of these names to the metadata in the root of a cube; only under the cube's lock."""
    if store.kind == "icechunk":  # label layers lie beside the repository, and its readers do not look there
        return
    if store.read(f"{LABELS}/zarr.json") is None:
        store.write(f"{LABELS}/zarr.json", json.dumps(_GROUP, indent=2).encode())
    root = store.read("zarr.json")
    if root is not None and (complete := with_labels(store, root, names)) != root:
        store.write("zarr.json", complete)


def with_labels(store: Store, root: bytes, names: Iterable[str]) -> bytes:
    """Return the metadata of a cube's root with those of its label layers.

    Args:
        store: The cube.
        root: Its zarr.json.
        names: All its label layers; one that cannot be read is left out.
    """
    document = load_json(root, store.where("zarr.json"))
    copy = document.get("consolidated_metadata")
    if not isinstance(copy, dict) or not isinstance(copy.get("metadata"), dict):
        return root
    labels: dict[str, Any] = {}
    for name in sorted(names):
        keys = [f"{LABELS}/{name}", *(f"{LABELS}/{name}/{array}" for array in _ARRAYS)]
        parts = {key: store.read(f"{key}/zarr.json") for key in keys}
        if all(parts.values()):
            labels |= {key: load_json(data, store.where(f"{key}/zarr.json")) for key, data in parts.items()}
    metadata = {key: value for key, value in copy["metadata"].items() if key.partition("/")[0] != LABELS}
    if labels:
        metadata |= {LABELS: dict(_GROUP), **labels}
    if metadata == copy["metadata"]:
        return root
    complete = document | {"consolidated_metadata": copy | {"metadata": metadata}}
    return json.dumps(complete, indent=2, ensure_ascii=False).encode()
