"""Units are the smallest pieces into which a pipeline can cut a network (`parallel/pipeline.py`).

What one piece hands to the next is the carry: a tuple of arrays whose first dimension is the batch. Whatever a later
piece needs, such as the features that a skip connection takes across a U-Net, travels in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["FUSION", "Carry", "Unit", "halves", "is_owned", "streams_of", "units_of"]

FUSION = "fusion"
"""Name of the part that joins the branches of a network, with all that follows."""

Carry = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Unit:
    """A piece of a network."""

    name: str
    """Name for messages: `encoder/level0, first half`."""
    owns: tuple[str, ...]
    """Paths of its modules: `encoder/level0/conv1`. Each parameter belongs to one unit."""
    run: Callable[..., Carry]
    """`run(carry, train) -> carry`; the first gets (image,), the last gives (logits,)."""
    whole: bool = True
    """Whether each device holds all filters after the unit; otherwise no cut may follow if filters are split."""


def halves(path: str, block: Any, enter: Callable[[Carry], Carry] = tuple, owns: tuple[str, ...] = ()) -> list[Unit]:
    """Return the two halves of a block of two convolutions with a skip around it.

    Args:
        path: Path of the block.
        block: Block with `first(x, train=…)` and `second(y, x, train=…)`.
        enter: the carry before the block → one whose first array is the block's input.
        owns: Further modules that `enter` uses.
    """

    def first(carry: Carry, train: bool) -> Carry:
        x, *rest = enter(carry)
        return (block.first(x, train=train), x, *rest)

    def second(carry: Carry, train: bool) -> Carry:
        y, x, *rest = carry
        return (block.second(y, x, train=train), *rest)

    return [
        Unit(f"{path}, first half", (*owns, f"{path}/conv1", f"{path}/norm1"), first, whole=False),
        Unit(f"{path}, second half", tuple(f"{path}/{name}" for name in ("conv2", "norm2", "skip")), second),
    ]


def is_owned(name: str, unit: Unit) -> bool:
    """Return whether the path of a parameter lies in one of the unit's modules."""
    return any(name == path or name.startswith(f"{path}/") for path in unit.owns)


def streams_of(model: Any) -> dict[str, list[Unit]]:
    """Return the units of each branch of a network by its name, and of what joins them; nothing without branches."""
    return {**model.branches(), FUSION: model.joined()} if hasattr(model, "branches") else {}


def units_of(model: Any) -> list[Unit]:
    """Return all units of a network; those of branches one branch after the other, then those of what joins them."""
    streams = streams_of(model)
    found: list[Unit] = [unit for units in streams.values() for unit in units] if streams else model.units()
    return found
