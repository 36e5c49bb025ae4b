"""Units of the network `multimodal`: pieces of each branch, and pieces of what comes after the fusion.

The first unit of a branch gets the array of its modality, `(x,)`; its last one gives `(features of the coarsest level,
…, of the finest, seen)`. The first unit after the fusion gets these carries of all branches one after the other, and
the last one gives `(logits,)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxtrain.models.blocks import halve, repeat_nearest
from jaxtrain.models.modality import Encoded
from jaxtrain.models.units import Carry, Unit, halves

__all__ = ["branch_units", "fusion_units"]


def branch_units(model: Any) -> dict[str, list[Unit]]:
    """Return the units of each branch, by the name of its modality."""
    return {name: _of_branch(f"encoder_{name}", getattr(model, f"encoder_{name}")) for name in model.names}


def fusion_units(model: Any) -> list[Unit]:
    """Return the units from the fusion to the logits."""
    decoder, fusion = model.decoder, model.fusion
    levels = fusion.depth + 1

    def merge(carry: Carry, train: bool) -> Carry:
        encoded, rest = {}, carry
        for name in model.names:
            size = getattr(model, f"encoder_{name}").levels
            encoded[name] = Encoded(tuple(reversed(rest[:size])), rest[size])
            rest = rest[size + 1 :]
        levels_of: Carry = tuple(reversed(fusion(encoded, train=train)))
        return levels_of

    found = [Unit("fusion", ("fusion",), merge)]
    if decoder.down is not None:
        found += _down("decoder/down", decoder.down)
        levels = decoder.down.depth + 1
    if decoder.climb is not None:
        found += _climb("decoder/climb", decoder.climb)
    elif levels > 1:
        found.append(Unit("decoder, coarsest level", (), lambda carry, train: (carry[0],)))
    if decoder.block is not None:
        found += halves("decoder/block", decoder.block)

    def leave(carry: Carry, train: bool) -> Carry:
        del train
        x = carry[0].mean(axis=(1, 2)) if decoder.per_image else carry[0]
        x = x if decoder.mix is None else nnx.relu(decoder.mix(x))
        return (model.head(x),)

    return [*found, Unit("head", ("decoder/mix", "head"), leave)]


def _of_branch(path: str, branch: Any) -> list[Unit]:
    def enter(carry: Carry, train: bool) -> Carry:
        del train
        entered: Carry = branch.enter(carry[0])
        return entered

    found = [Unit(f"{path}, input", (f"{path}/series",), enter)]
    if branch.block is not None:
        return [*found, *halves(f"{path}/block", branch.block)]
    assert branch.down is not None
    found += _down(f"{path}/down", branch.down)
    if branch.climb is not None:
        found += _climb(f"{path}/climb", branch.climb)
    if branch.pooled:
        found.append(Unit(f"{path}, mean", (), lambda carry, train: branch.pool(carry[0], carry[-1])))
    return found


def _down(path: str, down: Any) -> list[Unit]:
    def further(carry: Carry) -> Carry:
        return (halve(carry[0]), *carry)

    found: list[Unit] = []
    for level in range(down.depth + 1):
        found += halves(f"{path}/level{level}", getattr(down, f"level{level}"), further if level else tuple)
    return found


def _climb(path: str, climb: Any) -> list[Unit]:
    def up(level: int) -> Callable[[Carry], Carry]:
        def raised(carry: Carry) -> Carry:
            x, skip, *rest = carry
            wide: jax.Array = repeat_nearest(getattr(climb, f"up{level}")(x)) + skip
            return (wide, *rest)

        return raised

    found: list[Unit] = []
    for level in reversed(range(climb.depth)):
        block = getattr(climb, f"level{level}")
        found += halves(f"{path}/level{level}", block, up(level), (f"{path}/up{level}",))
    return found
