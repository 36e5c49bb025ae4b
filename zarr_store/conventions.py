"""Attributes of the Zarr conventions `proj`, `spatial` and `multiscales`, by which GeoZarr readers know a group.

A group lists the conventions that it follows in `zarr_conventions`; a reader knows each by its UUID. `multiscales`
names the resolution levels below a group: the full one, and its overviews. Paths in it are relative to that group and
never lead out of it (https://github.com/zarr-conventions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_store.grid import Grid

__all__ = ["Level", "list_conventions", "multiscales"]

_PLACE = "zarr-conventions/{name}"
_TAG = "v0.1"
_KNOWN = {
    "proj": ("f17cb550-5864-4468-aeb7-f3180cfb622f", "Coordinate reference system information for geospatial data"),
    "spatial": ("689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"),
    "multiscales": ("d35379db-88df-4056-af3a-620245f8e347", "Multiscale layout of zarr datasets"),
}


@dataclass(frozen=True)
class Level:
    """One resolution level of a pyramid.

    Attributes:
        asset: Path of its group or array, relative to the group that lists it.
        grid: Grid of its pixels.
        derived_from: Path of the level that it was made from; None for the full resolution.
        factor: Side of its pixels in pixels of that level.
        method: How it was made from that level.
    """

    asset: str
    grid: Grid
    derived_from: str | None = None
    factor: int = 1
    method: str = "nearest"


def list_conventions(*names: str) -> list[dict[str, str]]:
    """Return the entries of `zarr_conventions` for conventions of these names.

    >>> [(one["name"], one["uuid"][:8]) for one in list_conventions("proj", "spatial")]
    [('proj', 'f17cb550'), ('spatial', '689b58e2')]
    """
    return [
        {
            "schema_url": f"https://raw.githubusercontent.com/{_PLACE.format(name=name)}/refs/tags/{_TAG}/schema.json",
            "spec_url": f"https://github.com/{_PLACE.format(name=name)}/blob/{_TAG}/README.md",
            "uuid": _KNOWN[name][0],
            "name": name,
            "description": _KNOWN[name][1],
        }
        for name in names
    ]


def multiscales(levels: Sequence[Level], attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the attributes of a group that holds a pyramid: `multiscales`, and its entry in `zarr_conventions`.

    Args:
        levels: The full resolution, and its overviews.
        attributes: Attributes that the group has already; the conventions that they list are kept.
    """
    listed = [one for one in (attributes or {}).get("zarr_conventions", ()) if one.get("name") != "multiscales"]
    layout = [
        {
            "asset": level.asset,
            **({} if level.derived_from is None else {"derived_from": level.derived_from}),
            "transform": {"scale": [float(level.factor)] * 2},
            **({} if level.derived_from is None else {"resampling_method": level.method}),
            "spatial:shape": list(level.grid.shape),
            "spatial:transform": list(level.grid.transform),
        }
        for level in levels
    ]
    return {"zarr_conventions": [*listed, *list_conventions("multiscales")], "multiscales": {"layout": layout}}
