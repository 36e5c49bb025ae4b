"""Cut a network for a pipeline, and assign its parts to groups of devices.

The parts should take equally long, because all wait for the slowest. What a unit of the network costs is either
estimated from its compiler's count of operations and bytes (the same on every machine), or measured on the first device
(`mesh.balance = "measured"`); the cuts make the slowest part as fast as possible. Cuts are not part of a
checkpoint: it holds the whole network and continues with other cuts, or with none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.models.units import Carry, Unit, is_owned
from jaxtrain.parallel.links import groups_of
from jaxtrain.parallel.schedule import balance_cuts
from zarr_store.errors import InvalidInput

__all__ = ["Layout", "Part", "estimate", "lay_out", "measure", "owners"]

FLOPS_PER_BYTE = 8.0
"""Number of operations in the time of moving one byte, for processors and for accelerators in float32."""

Pass = Callable[[Mapping[str, Any], Carry], Carry]


@dataclass(frozen=True)
class Part:
    """A run of units that one group of devices computes as one program."""

    name: str
    span: tuple[int, int]
    """First unit, and the first unit after it."""
    group: int
    after: int | None
    """The part that takes the results; None of the last one."""
    source: str = ""
    """Name of the input that the part takes, where it is the first of a branch; empty for the one image."""


@dataclass(frozen=True)
class Layout:
    """The parts of a network on the groups of a mesh: a chain, or a tree where the network has branches."""

    groups: tuple[Mesh, ...]
    """One mesh per group."""
    parts: tuple[Part, ...]
    """The parts; each comes before the one that takes its results."""
    units: tuple[str, ...]
    """Names of all units."""
    owner: Mapping[str, int]
    """Part of each parameter and batch statistic, by path."""

    @property
    def chunks(self) -> int:
        """Number of parts."""
        return len(self.parts)

    @property
    def homes(self) -> tuple[int, ...]:
        """Group of each part."""
        return tuple(part.group for part in self.parts)

    @property
    def after(self) -> tuple[int | None, ...]:
        """For each part the one that takes its results; None for the last."""
        return tuple(part.after for part in self.parts)

    @property
    def is_chain(self) -> bool:
        """Whether each part gives its results to the next one."""
        return self.after == (*range(1, self.chunks), None)

    def needs(self, chunk: int) -> tuple[int, ...]:
        """Return the parts whose results a part takes; none for one that takes an image."""
        return tuple(k for k, part in enumerate(self.parts) if part.after == chunk)

    def mesh(self, chunk: int) -> Mesh:
        """Return the group of a part."""
        return self.groups[self.parts[chunk].group]

    def span(self, chunk: int) -> tuple[int, int]:
        """Return the first unit of a part, and the first unit after it."""
        return self.parts[chunk].span


def lay_out(mesh: Mesh, units: Sequence[Unit], names: Sequence[str], costs: Sequence[float], *, chunks: int) -> Layout:
    """Cut a network into `chunks` parts of equal cost.

    Args:
        mesh: Mesh whose first axis is `pipe`.
        units: Units of the network.
        names: paths of all parameters and batch statistics.
        costs: Cost of each unit.
        chunks: Number of parts.

    Raises:
        InvalidInput: there are fewer places to cut than parts.
    """
    # with split filters the inside of a block lies split, and no cut may be there
    whole = [True, *(unit.whole or mesh.shape["model"] == 1 for unit in units[:-1])]
    first = [position for position, may in enumerate(whole) if may]
    ends = [*first[1:], len(units)]
    cuts = balance_cuts([sum(costs[a:b]) for a, b in zip(first, ends, strict=True)], chunks)
    starts = tuple(first[cut] for cut in cuts)
    groups = groups_of(mesh)
    ends = [*starts[1:], len(units)]
    parts = tuple(
        Part(f"part {k}", span, k % len(groups), k + 1 if k + 1 < chunks else None)
        for k, span in enumerate(zip(starts, ends, strict=True))
    )
    return Layout(groups, parts, tuple(unit.name for unit in units), owners(parts, units, names))


def owners(parts: Sequence[Part], units: Sequence[Unit], names: Sequence[str]) -> dict[str, int]:
    """Return the part of each parameter and batch statistic.

    Raises:
        InvalidInput: no unit owns one of them.
    """
    unit_of = {name: next((i for i, unit in enumerate(units) if is_owned(name, unit)), None) for name in names}
    lost = [name for name, position in unit_of.items() if position is None]
    if lost:
        raise InvalidInput(f"no unit of this network owns {', '.join(lost[:4])}: it cannot be cut, use mesh.pipe = 1")
    part_of = {i: k for k, part in enumerate(parts) for i in range(*part.span)}
    return {name: part_of[position] for name, position in unit_of.items() if position is not None}


def estimate(run: Pass, params: Mapping[str, Any], carry: Any) -> float:
    """Estimate the cost of one unit from the compiler's count for its shapes; nothing is compiled.

    Args:
        run: the unit, of its parameters and a carry.
        params: Parameters by path.
        carry: Input of the unit.
    """
    count = jax.jit(run).lower(params, carry).cost_analysis() or {}
    return float(count.get("flops", 0.0)) + FLOPS_PER_BYTE * float(count.get("bytes accessed", 0.0))


def measure(run: Pass, params: Mapping[str, Any], carry: Any, *, repeats: int = 3) -> float:
    """Measure the seconds of one unit's forward and backward pass on the first device, on arbitrary numbers."""

    @jax.jit
    def both(params: Any, carry: Any) -> Any:
        out, pull = jax.vjp(run, params, carry)
        return pull(out)

    device = jax.local_devices()[0]
    fill = jax.tree.map(lambda leaf: jax.device_put(jnp.full(leaf.shape, 0.5, leaf.dtype), device), (params, carry))
    wait: Callable[..., Any] = jax.block_until_ready
    wait(both(*fill))
    seconds = []
    for _ in range(repeats):
        # time of the processor where that is what works: another program's turn is not this unit's cost
        clock = time.process_time if device.platform == "cpu" else time.perf_counter
        began = clock()
        wait(both(*fill))
        seconds.append(clock() - began)
    return min(seconds)
