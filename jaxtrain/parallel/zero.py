"""Split state over replicas that would otherwise each hold all of it: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

Replicas of data parallelism hold the same parameters and the same moments of the optimiser. `mesh.zero = 1` gives each
replica its part of the moments: it updates its part of the parameters, and the new parameters are gathered. With
`mesh.zero = 3` (FSDP, Zhao et al. 2023, arXiv:2304.11277) the parameters lie in parts as well: they are gathered
where a layer needs them, dropped, and gathered again for the gradient.

Parts are cut along the longest dimension that no other axis splits and that the axis `data` divides; what has no such
dimension (a bias of five classes over four replicas) stays whole, which costs memory and is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.parallel.mesh import constrain, spec

__all__ = ["gather_for_use", "share_out"]


def share_out(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    """Split each array over `data` too, where that is possible.

    Args:
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        specs: the tree's `PartitionSpec`s, as the rules have them.
        mesh: Mesh with the axis `data`.
    """
    return jax.tree.map(lambda leaf, lies: _split(tuple(leaf.shape), lies, mesh), shapes, specs)


def gather_for_use(run: Callable[..., Any], whole: Any) -> Callable[..., Any]:
    """Wrap a function of (params, …): it gathers split parameters, and again for its gradient.

    Args:
        run: function of whole parameters, and of other arguments.
        whole: shardings of the whole parameters.
    """

    def gathered(params: Any, *others: Any) -> Any:
        return run(constrain(params, whole), *others)

    return jax.checkpoint(gathered, policy=_keep)


def _keep(primitive: Any, *_: Any, **__: Any) -> bool:
    # networks hold no constraint of their own, so this is the gathered parameter; all else is kept
    return bool(primitive.name != "sharding_constraint")


def _split(shape: tuple[int, ...], lies: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    # an axis of size 1 splits nothing
    axes = [axis if mesh.shape.get(axis, 2) > 1 else None for axis in lies] + [None] * (len(shape) - len(lies))
    size = mesh.shape["data"]
    free = [i for i, (extent, axis) in enumerate(zip(shape, axes, strict=True)) if axis is None and not extent % size]
    if "data" in axes or not free:
        return lies
    # the last of equally long ones: outputs of a kernel lie side by side in memory
    axes[max(free, key=lambda i: (shape[i], i))] = "data"
    return spec(*axes)
