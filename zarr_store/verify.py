"""Verify a cube: compare the hashes of stored bytes with those in the ledger, and look for status that is not true.

A cube of an earlier release may call a pixel observed whose number is NaN or infinite. Readers leave such pixels out,
so they are no damage, but they are counted.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zarr_store.axes import find_damaged_axes
from zarr_store.backends import open_store
from zarr_store.labels import verify_labels
from zarr_store.ledger import LedgerRow
from zarr_store.read import Cube, open_cube
from zarr_store.spec import CubeSpec
from zarr_store.write import not_finite, shard_key

__all__ = ["Damage", "VerifyReport", "draw_shards", "verify_cube"]


@dataclass(frozen=True)
class Damage:
    """One stored object that differs from what was written; its state is "missing" or "corrupt"."""

    collection: str
    array: str
    index: tuple[int, int, int]
    state: str
    path: str

    def __str__(self) -> str:
        return f"{self.collection}/{self.array} shard {self.index} is {self.state}: {self.path}"


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_cube`.

    Example:
        >>> verify_cube("cube.zarr").checked_shards
        2
    """

    checked_shards: int
    checked_bytes: int
    damage: tuple[Damage, ...] = field(default_factory=tuple)
    damaged_labels: tuple[str, ...] = ()
    """One line for each object of a label layer that is missing or corrupt; they are made again, not repaired."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Pixels, by collection, that are marked as observed though a number of theirs is not finite; 0 is left out."""

    damaged_axes: tuple[str, ...] = ()
    """One line for each axis (time, band, y, x) that is missing, unreadable or wrong; `repair` writes it again."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "checked_shards": self.checked_shards,
            "checked_bytes": self.checked_bytes,
            "damage": [{**vars(d), "index": list(d.index)} for d in self.damage],
            "damaged_labels": list(self.damaged_labels),
            "not_finite": dict(self.not_finite),
            "damaged_axes": list(self.damaged_axes),
        }


def draw_shards(cube: Cube, share: float, seed: int) -> list[tuple[str, LedgerRow]]:
    """Return written shards of a cube with their collections: all, or a random part that `seed` fixes."""
    written = [
        (name, row) for name in cube.collections for row in cube.ledger(name).rows().values() if row.state != "failed"
    ]
    if share < 1 and written:
        drawn = random.Random(seed).sample(written, max(1, round(share * len(written))))
        written = sorted(drawn, key=lambda pair: (pair[0], pair[1].index))
    return written


def verify_cube(
    url: str | Path, *, share: float = 1.0, seed: int = 0, on_shard: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Re-read shards and compare their SHA-256 with the ledger.

    Args:
        url: The cube.
        share: Part of the written shards to check, 0 < share ≤ 1, drawn with `seed`.
        seed: Which shards a partial check draws.
        on_shard: Called with (checked, total) after each shard.

    Returns:
        The report; `damage` names each missing or corrupt object. Axes and label layers are always checked whole.

    Example:
        >>> verify_cube("cube.zarr").damage
        ()
    """
    cube = open_cube(url)
    store = open_store(url)
    written = draw_shards(cube, share, seed)
    size = 0
    damage: list[Damage] = []
    lost: dict[str, int] = {}
    for done, (name, row) in enumerate(written, 1):
        spec, whole = cube.spec(name), len(damage)
        for array, expected in (row.checksums or {}).items():
            key = shard_key(spec, array, row.index)
            data = store.read(key)
            size += len(data or b"")
            if data is None or hashlib.sha256(data).hexdigest() != expected:
                state = "missing" if data is None else "corrupt"
                damage.append(Damage(name, array, row.index, state, store.where(key)))
        if row.checksums and len(damage) == whole and (pixels := _not_finite(cube, spec, row)):
            lost[name] = lost.get(name, 0) + pixels
        if on_shard:
            on_shard(done, len(written))
    label_bytes, labels = verify_labels(cube)
    lines = tuple(f"label layer {name} is {state}: {place}" for name, state, place in labels)
    axes = tuple(find_damaged_axes(cube, store))
    return VerifyReport(len(written), size + label_bytes, tuple(damage), lines, lost, axes)


def _not_finite(cube: Cube, spec: CubeSpec, row: LedgerRow) -> int:
    """Count the pixels of a shard of floats that are marked as observed though a number of theirs is not finite.

    Earlier releases took such numbers into the means of the chunks, so only a shard with such a mean is decoded.
    """
    if all(math.isfinite(mean) for stats in row.stats for mean in stats.mean):
        return 0
    main, status = (cube.read(spec.collection, name, row.region) for name in (spec.kind, "status"))
    return int(not_finite(main, status).sum())
