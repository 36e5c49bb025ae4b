"""Grow a cube by dates at its end and rows of its item tables; readers see the old cube or the new one.

The metadata of the grown cube are made in memory by the code that makes new cubes, and put in place file by file:
coordinates and arrays first, which a reader of the old cube does not look at beyond its own shape; then each group,
which in one file holds times, items and the consolidated metadata of its arrays; the root last. Dying in between leaves
the old cube, and repeating finishes the work. The number of files does not depend on the length of the cube.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zarr.storage import MemoryStore

from zarr_store.backends import open_store
from zarr_store.consolidated import LABELS, with_labels
from zarr_store.create import Items, describe, lay_out, list_differences
from zarr_store.errors import CubeMismatch, IntegrityError
from zarr_store.nesting import check_nesting
from zarr_store.read import Cube, open_cube
from zarr_store.spec import CubeSpec
from zarr_store.steps import is_imported
from zarr_store.store import Store

__all__ = ["grow_cube"]

_MAY_GROW = ("shape", "attributes", "consolidated_metadata")


def grow_cube(url: str | Path, specs: Sequence[CubeSpec], *, items: Items, provenance: Mapping[str, Any]) -> int:
    """Replace the metadata of a cube by those of the same cube with more dates and items; only under the cube's lock.

    Args:
        url: The cube.
        specs: Its collections; each as it is, or with more times after the present ones. Imported collections may be
            left out, and stay as they are; new ones come last.
        items: Collection → item table; each as it is, or with more rows after the present ones, and with further
            properties of rows that are there.
        provenance: Origin of the grown cube.

    Returns:
        Number of files that were written; 0 where everything was so already.

    Raises:
        CubeMismatch: The cube asked for is not this one grown; the message is the difference. Nothing was changed.
    """
    store = open_store(url)
    cube = open_cube(url)
    specs, items = _with_imported(cube, specs, items)
    _check_growth(cube, specs, items)
    fresh: dict[str, Any] = {}
    lay_out(
        MemoryStore(store_dict=fresh),
        specs,
        describe(specs, items),
        provenance,
        time_chunks={name: _time_chunk(store, name) for name in cube.collections},
    )
    documents = {key: bytes(buffer.to_bytes()) for key, buffer in fresh.items()}
    if layers := _label_layers(store):
        documents["zarr.json"] = with_labels(store, documents["zarr.json"], layers)
    changed = [key for key in sorted(documents, key=_order) if store.read(key) != documents[key]]
    for key in changed:
        if key.endswith("zarr.json"):
            _check_layout(store, key, documents[key])
    for key in changed:
        store.write(key, documents[key])
    return len(changed)


def _with_imported(cube: Cube, specs: Sequence[CubeSpec], items: Items) -> tuple[list[CubeSpec], dict[str, Any]]:
    """Return all collections in the order of the cube, also imported ones that a plan omits; new ones come last."""
    asked = {spec.collection: spec for spec in specs}
    tables: dict[str, Any] = dict(items)
    for name in cube.collections:
        if name not in asked and is_imported(cube.items(name)):
            asked[name], tables[name] = cube.spec(name), cube.items(name)
    order = [*cube.collections, *(name for name in asked if name not in cube.collections)]
    return [asked[name] for name in order if name in asked], tables


def _label_layers(store: Store) -> list[str]:
    """Return the label layers that the root's metadata must list; none for Icechunk, which has them beside it."""
    if store.kind == "icechunk":
        return []
    listed = store.read(f"{LABELS}/index.json")
    return sorted(_parsed(store, f"{LABELS}/index.json", listed)) if listed is not None else []


def _order(key: str) -> tuple[int, str]:
    """Return the rank of a key for writing: coordinates, arrays, overview groups, collections, root at the end."""
    name = key.removesuffix("zarr.json").rstrip("/")
    if not key.endswith("zarr.json"):
        return (0, key)
    if not name:
        return (5, key)
    depth = name.count("/")
    if name.startswith("overview"):
        return (1, key) if depth == 2 else (2 if depth == 1 else 3, key)
    return (1, key) if depth == 1 else (4, key)


def _check_growth(cube: Cube, specs: Sequence[CubeSpec], items: Items) -> None:
    names = [spec.collection for spec in specs]
    differences = []
    added = names[len(cube.collections) :]
    if list(cube.collections) != names[: len(cube.collections)] or not all(is_imported(items[n]) for n in added):
        differences.append(f"collections: {list(cube.collections)} → {names}")
    else:
        check_nesting(specs)
        for spec in specs[: len(cube.collections)]:
            there, asked = cube.spec(spec.collection), spec.to_dict()
            kept = asked["times"][: len(there.times)]
            differences += list_differences(
                {spec.collection: there.to_dict()}, {spec.collection: asked | {"times": kept}}
            )
            old = [row["id"] for row in cube.items(spec.collection)]
            new = [row["id"] for row in items[spec.collection]]
            if new[: len(old)] != old:
                differences.append(f"{spec.collection}: items {old[:3]}… are not the first of {new[:3]}…")
    if differences:
        raise CubeMismatch(
            f"{cube.url} cannot grow into what is asked for (there → asked for): {'; '.join(differences[:6])}. Nothing "
            "was changed: a cube keeps its grid, bands and rules, and takes new dates at its end"
        )


def _check_layout(store: Store, key: str, document: bytes) -> None:
    """Refuse to change anything of an array but its shape, as its objects exist already."""
    held = store.read(key)
    if held is None:
        return
    there, asked = _parsed(store, key, held), json.loads(document)
    if there.get("node_type") != "array":
        return
    fixed_there, fixed_asked = ({n: v for n, v in d.items() if n not in _MAY_GROW} for d in (there, asked))
    differences = list_differences(fixed_there, fixed_asked)
    if differences:
        raise CubeMismatch(
            f"{store.url}: array {key.removesuffix('/zarr.json')} was laid out by another release "
            f"({'; '.join(differences[:3])}) and cannot grow; nothing was changed: make a new cube"
        )


def _time_chunk(store: Store, collection: str) -> int:
    key = f"{collection}/time/zarr.json"
    held = _parsed(store, key, store.read(key) or b"")
    return int(held["chunk_grid"]["configuration"]["chunk_shape"][0])


def _parsed(store: Store, key: str, data: bytes) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise IntegrityError(
            f"{store.where(key)}: unreadable metadata ({error}); nothing was changed: restore the file"
        ) from error
    return document
