"""Arrays between groups of devices: the parts of one mesh along `pipe`, each the home of some stages.

A group is a mesh of its own with the other axes; the n-th device of one group sends to the n-th of another, so a batch
that is split over `data` stays split, and images over `space`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.parallel.mesh import batch_sharding, replicated

__all__ = ["groups_of", "init_by_group", "join", "lies_of", "part_of", "send", "shape_of"]

Arrays = tuple[jax.Array, ...]


def groups_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """The groups of a mesh along its first axis, `pipe`."""
    types = mesh.axis_types[1:]
    return tuple(Mesh(devices, mesh.axis_names[1:], axis_types=types) for devices in mesh.devices)


def send(arrays: Arrays, target: Mesh) -> Arrays:
    """Copy arrays to a group, device by device; the host does not wait for it."""
    sent: Arrays = jax.device_put(arrays, tuple(lies_of(leaf, target) for leaf in arrays))
    return sent


def part_of(array: Any, mesh: Mesh, lies: PartitionSpec) -> jax.Array:
    """What a group holds of an array that is the same on all groups; a numpy array is put there."""
    sharding = NamedSharding(mesh, lies)
    if not isinstance(array, jax.Array):
        there: jax.Array = jax.device_put(array, sharding)
        return there
    devices = set(mesh.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def join(parts: Sequence[jax.Array], sharding: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
    """One array of the whole mesh of each group's part."""
    shards = [shard.data for part in parts for shard in part.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def init_by_group(init: Callable[[jax.Array], Any], shapes: Any, shardings: Any, key: jax.Array, options: Any) -> Any:
    """What `init` makes, each leaf on the group that its sharding names.

    Args:
        init: function of a key, traced once for each group.
        shapes: of its result.
        shardings: of its result, of meshes of any groups.
        key: of the new state.
        options: of the compiler.
    """
    lies = jax.tree.leaves(shardings)
    found: list[Any] = [None for _ in lies]
    for mesh in dict.fromkeys(where.mesh for where in lies):
        mine = tuple(i for i, where in enumerate(lies) if where.mesh == mesh)

        def part(key: jax.Array, mine: tuple[int, ...] = mine) -> list[Any]:
            leaves = jax.tree.leaves(init(key))
            return [leaves[i] for i in mine]

        made = jax.jit(part, out_shardings=[lies[i] for i in mine], compiler_options=options)(key)
        for i, leaf in zip(mine, made, strict=True):
            found[i] = leaf
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """The shape and type of an array that is not there yet."""
    make: Callable[..., Any] = jax.ShapeDtypeStruct
    return make(shape, dtype)


def lies_of(array: Any, mesh: Mesh) -> NamedSharding:
    """How a carry lies on a group: images split by samples, rows and columns as the batch is; the rest by samples."""
    dimensions = len(array.shape)
    return batch_sharding(mesh, image=dimensions >= 4) if dimensions else replicated(mesh)
