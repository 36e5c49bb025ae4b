"""List the ways of spreading a network over a number of devices that are worth looking at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jaxtrain.config import MeshConfig, TrainConfig

__all__ = ["Candidate", "candidates", "name_of", "with_mesh"]

MOST_MODEL, MOST_SPACE, MOST_PIPE = 8, 8, 8
"""Largest size of an axis that exchanges in every layer, or that cuts the network."""


@dataclass(frozen=True)
class Candidate:
    """One strategy for one network on a number of devices."""

    strategy: str
    """data, zero-1, zero-3, filter, spatial, pipeline, or several joined by +."""
    devices: int
    config: TrainConfig | None
    """The run with this mesh; None where the configuration forbids it."""
    why_not: str = ""
    """Why it is forbidden, in one line."""

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the strategy."""
        assert self.config is not None
        return self.config.mesh


def candidates(config: TrainConfig, devices: int) -> list[Candidate]:
    """List strategies for a number of devices, the plainest first; those that cannot be have a reason.

    Args:
        config: the run; its own mesh plays no part, but its schedule, microbatches and rules do.
        devices: Number of devices, all of which are used.
    """
    found, seen = [], set()
    for values in _meshes(config, devices):
        made = with_mesh(config, values)
        key = repr(sorted(values.items()))
        if key not in seen:
            seen.add(key)
            why = made if isinstance(made, str) else ""
            found.append(Candidate(name_of(values), devices, None if why else made, why))  # type: ignore[arg-type]  # a text has a reason
    return found


def with_mesh(config: TrainConfig, values: dict[str, Any]) -> TrainConfig | str:
    """Return the run on another mesh, or why it cannot be."""
    kept = {name: getattr(config.mesh, name) for name in ("rules", "balance", "chunks", "microbatches")}
    try:
        mesh = MeshConfig.model_validate({**kept, **values})
        return TrainConfig.model_validate({**config.model_dump(), "mesh": mesh.model_dump(), "placement": {}})
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def name_of(values: dict[str, Any]) -> str:
    """Return the name of the strategy of a mesh.

    >>> name_of({"data": 4, "zero": 3, "space": (2, 1)})
    'zero-3+spatial'
    """
    names = []
    if values.get("data", 1) > 1:
        names.append(f"zero-{values['zero']}" if values.get("zero") else "data")
    space = values.get("space", 1)
    if (space if isinstance(space, int) else space[0] * space[1]) > 1:
        names.append("spatial")
    if values.get("model", 1) > 1:
        names.append("filter")
    if values.get("pipe", 1) > 1:
        names.append("pipeline")
    return "+".join(names) or "one device"


def _meshes(config: TrainConfig, n: int) -> Iterator[dict[str, Any]]:
    if n == 1:
        yield {"data": 1}
        return
    for zero in (0, 1, 3):
        yield {"data": n, "zero": zero}
    inner = [size for size in _divisors(n) if size > 1]
    for size in inner:
        if size <= MOST_SPACE:
            yield {"data": n // size, "space": (size, 1)}
        sides = [side for side in _divisors(size) if 1 < side < size and side * side <= size]
        if sides and size <= MOST_SPACE**2:
            side = sides[-1]
            yield {"data": n // size, "space": (size // side, side)}
    for size in inner:
        if size <= MOST_MODEL:
            yield {"data": n // size, "model": size}
    for size in inner:
        if size <= MOST_PIPE:
            for schedule in ("1f1b", "gpipe", "interleaved"):
                yield {"data": n // size, "pipe": size, "schedule": schedule}
    if n >= 4 and n % 4 == 0:
        yield {"data": n // 2, "zero": 3, "space": (2, 1)}
        yield {"data": n // 2, "zero": 3, "model": 2}
        if n >= 8:
            yield {"data": n // 4, "space": (2, 1), "model": 2}
            yield {"data": n // 4, "space": (2, 1), "pipe": 2, "schedule": "1f1b"}


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]
