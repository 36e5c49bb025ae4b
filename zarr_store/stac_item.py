"""`write_item` keeps a STAC item in a cube or a map, so that a catalogue can list it without opening an array.

    CUBE/item.json, MAP/item.json     STAC 1.1 with the extensions projection, raster and classification

Hrefs are relative to the item. It has no clock time, no path of a machine and no address of a source, so equal cubes
have equal items. Reference: https://github.com/radiantearth/stac-spec/blob/v1.1.0/item-spec/item-spec.md
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zarr_store.errors import IntegrityError
from zarr_store.grid import Grid
from zarr_store.outline import outline_of
from zarr_store.read import Cube
from zarr_store.spec import CubeSpec
from zarr_store.store import ITEM_KEY, Store

__all__ = ["ZARR_TYPE", "LayerClasses", "classes_of", "cube_item", "item_of", "place_of", "projection_of", "utc",
           "write_item"]  # fmt: skip

ZARR_TYPE = "application/vnd.zarr; version=3"
"""Media type of a group or an array."""

LayerClasses = tuple[str, tuple[tuple[int, str], ...]]
"""Name of a label layer, and (value, name) of its classes; no classes where it holds values."""

_EXTENSIONS = {
    "proj:": "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "raster:": "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
    "classification:": "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "mlm:": "https://stac-extensions.github.io/mlm/v1.5.0/schema.json",
}
"""Extension by the prefix of its fields."""
_STATUS = ("nodata", "observed", "masked", "missing")
_MOST_BYTES = 16 << 20
"""Largest item, bytes: a thousand label layers of 250 classes have about 20 MB, and no reader wants those."""


def write_item(store: Store, item: Mapping[str, Any]) -> None:
    """Write an item into a store, in one step; nothing is written where it is so already.

    Raises:
        IntegrityError: The item holds a number that JSON has not, or is too large.
    """
    try:
        data = (json.dumps(item, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise IntegrityError(f"{store.where(ITEM_KEY)}: a number of the grid or of a band is not finite") from error
    if len(data) > _MOST_BYTES:
        raise IntegrityError(f"{store.where(ITEM_KEY)} would have {len(data)} bytes; expected at most {_MOST_BYTES}")
    if store.read(ITEM_KEY) != data:
        store.write(ITEM_KEY, data)


def cube_item(cube: Cube, layers: Iterable[LayerClasses] = ()) -> dict[str, Any]:
    """Describe a cube: an asset for each collection, its status, its overview, and each label layer.

    Args:
        cube: The cube.
        layers: Its label layers.
    """
    specs = [cube.spec(name) for name in cube.collections]
    first = specs[0]
    # what a cube keeps while it grows
    begun = {"grid": first.grid.to_dict(), "bands": list(first.band_names), "first": first.times[0]}
    assets: dict[str, Any] = {}
    for spec in specs:
        assets |= _assets_of(spec, own_grid=spec.grid != first.grid)
    for name, classes in layers:
        assets[f"label-{name}"] = _layer_asset(name, classes)
    return item_of(
        f"{first.collection}-{_digest(begun)}",
        first.grid,
        [time for spec in specs for time in spec.times],
        {
            "title": f"Cube of {', '.join(spec.collection for spec in specs)}",
            "terrashard:scenes": {spec.collection: len(cube.items(spec.collection)) for spec in specs},
            "terrashard:dates": {spec.collection: len(spec.times) for spec in specs},
        },
        assets,
    )


def item_of(
    identifier: str,
    grid: Grid,
    times: Sequence[str],
    properties: Mapping[str, Any],
    assets: Mapping[str, Any],
    links: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return an item of something on a grid.

    Args:
        identifier: Its id.
        grid: Its grid.
        times: Its dates, ISO 8601, at least one.
        properties: Further properties.
        assets: By name.
        links: Where it comes from.
    """
    first, last = utc(min(times)), utc(max(times))
    when = {"datetime": first if first == last else None, "start_datetime": first, "end_datetime": last}
    metres = [size / grid.units_per_metre for size in grid.resolution]
    every = {**when, "gsd": round(min(metres), 6), **projection_of(grid), **properties}
    document: dict[str, Any] = {
        "type": "Feature", "stac_version": "1.1.0", "id": identifier,
        **place_of(grid), "properties": every, "links": [dict(link) for link in links], "assets": dict(assets),
    }  # fmt: skip
    used = _prefixes({"properties": every, "assets": dict(assets)})
    return document | {"stac_extensions": [url for prefix, url in _EXTENSIONS.items() if prefix in used]}


def place_of(grid: Grid) -> dict[str, Any]:
    """Return `geometry` and `bbox` of a grid; only an empty geometry where it has no place in degrees."""
    found = outline_of(grid)
    return {"geometry": None} if found is None else {"geometry": found[0], "bbox": found[1]}


def projection_of(grid: Grid) -> dict[str, Any]:
    """Return the fields of the extension projection."""
    code = {"proj:code": grid.crs} if grid.crs.startswith("EPSG:") else {"proj:code": None, "proj:wkt2": grid.wkt}
    return {**code, "proj:shape": list(grid.shape), "proj:transform": list(grid.transform),
            "proj:bbox": list(grid.bounds)}  # fmt: skip


def classes_of(classes: Iterable[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """Return `classification:classes` of (value, name, colour as #rrggbb, or nothing).

    >>> classes_of([(0, "tree cover", "#006400"), (1, "tree-cover", "")])[0]
    {'value': 0, 'name': 'tree_cover', 'description': 'tree cover', 'color_hint': '006400'}
    """
    made: list[dict[str, Any]] = []
    taken: set[str] = set()
    for value, name, colour in classes:
        slug = re.sub(r"[^0-9A-Za-z_-]", "_", name) or "_"
        if slug in taken:
            slug = f"{slug}_{value}"
        taken.add(slug)
        hint = {"color_hint": colour.lstrip("#").upper()} if colour else {}
        made.append({"value": value, "name": slug, "description": name or slug, **hint})
    return made


def utc(time: str) -> str:
    """Return a time of a cube with the mark of UTC, as RFC 3339 wants it."""
    return time if time.endswith("Z") else f"{time}Z"


def _assets_of(spec: CubeSpec, *, own_grid: bool) -> dict[str, Any]:
    """Return the assets of a collection; one on another grid than the item says where it lies."""
    where = projection_of(spec.grid) if own_grid else {}
    resolution = round(min(spec.grid.resolution) / spec.grid.units_per_metre, 6)
    bands = [
        {
            "name": band.name, "data_type": spec.array(spec.kind).dtype, "raster:scale": band.scale,
            "raster:offset": band.offset, "raster:spatial_resolution": resolution,
            **({} if band.nodata is None else {"nodata": "nan" if math.isnan(band.nodata) else band.nodata}),
            **({} if band.unit in ("", "1") else {"unit": band.unit}),
        }
        for band in spec.bands
    ]  # fmt: skip
    name = spec.collection
    return {
        name: {"href": f"./{name}", "type": ZARR_TYPE, "title": f"{spec.kind} of {name}", "roles": ["data"],
               "bands": bands, **where},
        f"{name}-status": {"href": f"./{name}/status", "type": ZARR_TYPE, "title": "what is known of each pixel",
                           "roles": ["data-mask", "metadata"], "data_type": "uint8",
                           "classification:classes": classes_of((i, one, "") for i, one in enumerate(_STATUS)),
                           **where},
        f"{name}-overview": {"href": f"./overview/{name}", "type": ZARR_TYPE, "roles": ["overview"],
                             "title": f"{name}, one pixel of each block"},
    }  # fmt: skip


def _layer_asset(layer: str, named: Iterable[tuple[int, str]]) -> dict[str, Any]:
    classes = classes_of((value, name, "") for value, name in named)
    held: dict[str, Any] = {"data_type": "uint8", "nodata": 255}
    if not classes:
        held = {"data_type": "float32", "nodata": "nan"}
    return {"href": f"./labels/{layer}/label", "type": ZARR_TYPE, "title": f"label layer {layer}",
            "roles": ["data"], **held, **({"classification:classes": classes} if classes else {})}  # fmt: skip


def _prefixes(value: Any) -> set[str]:
    """Return the prefixes of extensions among all names in a JSON value."""
    if isinstance(value, dict):
        own = {prefix for prefix in _EXTENSIONS for name in value if name.startswith(prefix)}
        return own.union(*(_prefixes(one) for name, one in value.items() if not name.startswith("mlm:")))
    return set().union(*map(_prefixes, value)) if isinstance(value, list) else set()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
