"""Coordinates of time steps besides the time, and pairs of steps of two sensors. Pure.

Radar looks from one side: the same ground is bright from one orbit and in shadow from another. So a backscatter
collection has, for each step, the orbit direction, the relative orbit and the platform as coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from zarr_store.read import Cube

__all__ = ["Pairing", "is_imported", "nearest_times", "pair_collections", "step_coordinates"]

MIXED_ORBIT = -1


@dataclass(frozen=True)
class Pairing:
    """The nearest step of another collection for each time step of one.

    Attributes:
        index: (T,) step of the other collection, -1 where none is near enough.
        gap_s: (T,) its time minus ours, seconds; 0 where there is none.
    """

    index: npt.NDArray[np.int64]
    gap_s: npt.NDArray[np.int64]


def nearest_times(
    ours: npt.NDArray[np.datetime64], theirs: npt.NDArray[np.datetime64], *, most_days: float | None = None
) -> Pairing:
    """Pair each of `ours` with the nearest of `theirs`; the earlier one where two are equally near.

    Args:
        ours: Ascending datetime64.
        theirs: Ascending datetime64; may be empty.
        most_days: Pairs further apart than this do not count; None for any distance.

    >>> days = np.array(["2023-08-01", "2023-08-10"], "datetime64[s]")
    >>> pairing = nearest_times(days, days + np.timedelta64(86_400, "s"), most_days=2)
    >>> pairing.index.tolist(), pairing.gap_s.tolist()
    ([0, 1], [86400, 86400])
    """
    if most_days is not None and not most_days >= 0:
        raise InvalidInput(f"the longest gap of a pair must be 0 days or more, got {most_days}")
    mine, other = (times.astype("datetime64[s]").astype(np.int64) for times in (ours, theirs))
    if not len(other):
        return Pairing(np.full(len(mine), -1), np.zeros(len(mine), np.int64))
    after = np.clip(np.searchsorted(other, mine), 0, len(other) - 1)
    before = np.maximum(after - 1, 0)
    index = np.where(np.abs(other[before] - mine) <= np.abs(other[after] - mine), before, after)
    gap = other[index] - mine
    near = np.abs(gap) <= (np.inf if most_days is None else most_days * 86_400)
    return Pairing(np.where(near, index, -1), np.where(near, gap, 0))


def pair_collections(cube: Cube, ours: str, theirs: str, *, most_days: float | None = None) -> Pairing:
    """Pair the steps of two collections of a cube, e.g. each Sentinel-2 step with the nearest Sentinel-1 step.

    Raises:
        UnknownName: The cube has no such collection.
    """
    return nearest_times(cube.spec(ours).time_values, cube.spec(theirs).time_values, most_days=most_days)


def step_coordinates(
    items: Sequence[Mapping[str, Any]], steps: int
) -> dict[str, tuple[npt.NDArray[Any], dict[str, Any]]]:
    """Return arrays along time with their attributes, from the item table; none if an item has no step.

    A step that holds several platforms names all of them ("sentinel-1a,sentinel-1b"); a relative orbit that is unknown
    or mixed is -1, a direction "" or both.

    Args:
        items: Rows with "step", "orbit_direction", "relative_orbit" and "platform".
        steps: Length of the time axis.
    """
    members: list[list[Mapping[str, Any]]] = [[] for _ in range(steps)]
    for item in items:
        step = item.get("step")
        if not isinstance(step, int) or not 0 <= step < steps:
            return {}
        members[step].append(item)

    def words(name: str) -> npt.NDArray[Any]:
        texts = [",".join(sorted({str(row[name]) for row in rows if row.get(name)})) for rows in members]
        return np.array(texts, dtype=object)

    orbits = [{row.get("relative_orbit") for row in rows} for rows in members]
    numbers = [
        int(found) if len(one) == 1 and (found := next(iter(one))) is not None else MIXED_ORBIT for one in orbits
    ]
    return {
        "orbit_direction": (words("orbit_direction"), {"long_name": "orbit direction: ascending or descending"}),
        "relative_orbit": (
            np.array(numbers, np.int16),
            {"long_name": "relative orbit, -1 where unknown or mixed", "valid_min": MIXED_ORBIT},
        ),
        "platform": (words("platform"), {"long_name": "satellites, separated by commas"}),
    }


def is_imported(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an item table is that of an imported collection (`zarr_store.imported`), which no plan knows."""
    return bool(rows) and all(row.get("provider") == "import" for row in rows)
