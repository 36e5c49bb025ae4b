"""Places of flagged samples and vectors: each is a place of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtrain.tasks.places import Place
from jaxtrain.tasks.score_store import ScoreStore
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import SampleTable, VectorTable
from zarr_store.errors import TerrashardError

__all__ = ["place_rows"]


def place_rows(table: Table, made: ScoreStore, *, most: int, least_pixels: int) -> tuple[tuple[Place, ...], int]:
    """Rank the flagged samples or vectors of a table.

    Returns:
        The places by falling score, and the number of all of them.
    """
    found: list[tuple[float, int, float, int]] = []  # largest score, number, sum, pixels
    for rows, scores, _ in made.strips():
        _, mask = made.read(rows)
        flat, flagged = scores.reshape(len(scores), -1), mask.reshape(len(mask), -1)
        for at in np.flatnonzero(flagged.sum(axis=1) >= max(1, least_pixels)):
            values = flat[at][flagged[at]]
            found.append((float(values.max()), rows.start + int(at), float(values.sum(dtype=np.float64)), len(values)))
    found.sort(key=lambda one: (-one[0], one[1]))
    names = table.store.names() if isinstance(table, SampleTable) else ()
    places: dict[str, Any] = table.places if isinstance(table, VectorTable) else {}
    degrees = _to_degrees(table)
    listed = []
    for rank, (score, number, total, pixels) in enumerate(found[:most]):
        x, y = (float(places[name][number]) if name in places else float("nan") for name in ("x", "y"))
        lon, lat = degrees(x, y)
        name = str(names[number]) if number < len(names) else str(places["name"][number]) if "name" in places else ""
        date = str(places["time"][number])[:10] if "time" in places else ""
        nowhere = (float("nan"),) * 4
        listed.append(Place(rank + 1, x, y, lon, lat, date, score, total / pixels, pixels, float("nan"), nowhere,
                            number, -1, name))  # fmt: skip
    return tuple(listed), len(found)


def _to_degrees(table: Table) -> Any:
    """Return a function from coordinates of the vectors' cube to degrees; it gives nan where the cube is gone."""
    from zarr_store.crs import transformer_between
    from zarr_store.read import open_cube

    if isinstance(table, VectorTable) and "x" in table.places:
        try:
            cube = open_cube(str(table.about.get("data", "")))
            grid = cube.spec(cube.collections[0]).grid
        except TerrashardError:
            return lambda x, y: (float("nan"), float("nan"))
        return transformer_between(grid.crs, "OGC:CRS84").transform
    return lambda x, y: (float("nan"), float("nan"))
