"""`Ground` identifies a training cube by path, digest, grid and dates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zarr_store.grid import Grid
from zarr_store.labels import LabelLayer
from zarr_store.read import Cube

__all__ = ["Ground", "cube_digest", "overlap"]


@dataclass(frozen=True)
class Ground:
    """One cube that a run learns from: path, digest, grid and dates."""

    cube: str
    digest: str
    grid: Grid
    times: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"cube": self.cube, "digest": self.digest, "grid": self.grid.to_dict(), "times": list(self.times)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ground:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(data["cube"], data["digest"], Grid.from_dict(data["grid"]), tuple(data["times"]))


def cube_digest(cube: Cube, collection: str, label: LabelLayer | None = None) -> str:
    """Return one SHA-256 of a collection's spec, its shards' checksums and a label layer; no pixel is read."""
    digest = hashlib.sha256(json.dumps(cube.spec(collection).to_dict(), sort_keys=True).encode())
    for index, row in cube.ledger(collection).rows().items():
        digest.update(json.dumps([index, row.state, row.checksums or {}], sort_keys=True).encode())
    if label is not None:
        digest.update(label.digest.encode())
    return digest.hexdigest()


def overlap(one: Grid, other: Grid) -> bool:
    """Return whether two grids share ground, by their bounds in longitude and latitude."""
    a, b = one.lonlat_bounds(), other.lonlat_bounds()
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
