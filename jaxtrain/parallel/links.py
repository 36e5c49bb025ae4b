"""Links copy arrays between groups of devices: the parts of one mesh along `pipe`, each with some stages.

A group is a mesh of its own with the other axes; the n-th device of one group sends to the n-th of another, so a batch
that is split over `data` stays split, and images over `space`.

Groups may lie in different processes. A process then holds nothing of a group without a device of its own: such arrays
are `absent`, they have a shape and a place and no content here. What crosses processes is a `ppermute` over the two
groups, which Gloo, NCCL and TPUs all know; all processes with a device in either group take part, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.parallel.mesh import batch_sharding, replicated, spec

__all__ = ["Links", "absent", "everywhere", "groups_of", "init_by_group", "is_here", "join", "lies_of", "part_of",
           "placed_shape", "shape_of", "zeros_on"]  # fmt: skip

Arrays = tuple[jax.Array, ...]


def groups_of(mesh: Mesh) -> tuple[Mesh, ...]:
    """Return the groups of a mesh along its first axis, `pipe`."""
    types = mesh.axis_types[1:]
    return tuple(Mesh(devices, mesh.axis_names[1:], axis_types=types) for devices in mesh.devices)


def is_here(mesh: Mesh) -> bool:
    """Return whether this process has a device of the mesh."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


def absent(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    """Return an array on devices of other processes, of which only shape and place are known here."""
    return _assemble(shape, sharding, [], dtype)


def zeros_on(mesh: Mesh, leaf: Any) -> jax.Array:
    """Return a carry of zeros on a group, of the shape of `leaf`, without communication between processes."""
    sharding = lies_of(leaf, mesh)
    shape = sharding.shard_shape(leaf.shape)
    shards = [jax.device_put(jnp.zeros(shape, leaf.dtype), device) for device in sharding.addressable_devices]
    return _assemble(leaf.shape, sharding, shards, leaf.dtype)


class Links:
    """Copies between groups; the host does not wait for them."""

    def __init__(self, groups: Sequence[Mesh]) -> None:
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._groups = groups

    def send(self, arrays: Arrays, source: int, target: int) -> Arrays:
        """Copy arrays from one group to another; absent arrays where this process has no device of it.

        Of several processes, all call it in the same order; those without a device of the source give shapes.
        """
        if (source, target) not in self._pairs:
            self._pairs[source, target] = _Pair(self._groups[source], self._groups[target])
        return self._pairs[source, target].send(arrays)


class _Pair:
    """One direction between two groups."""

    def __init__(self, source: Mesh, target: Mesh) -> None:
        self._target = target
        types = (*source.axis_types[:1], *source.axis_types)
        devices = np.stack([source.devices, target.devices])
        self._both = Mesh(devices, ("pipe", *source.axis_names), axis_types=types)
        self._processes = {device.process_index for device in devices.flat}
        self._blanks: dict[tuple[tuple[int, ...], Any], list[jax.Array]] = {}

    def send(self, arrays: Arrays) -> Arrays:
        lies = tuple(lies_of(leaf, self._target) for leaf in arrays)
        if jax.process_index() not in self._processes:
            return tuple(absent(leaf.shape, leaf.dtype, at) for leaf, at in zip(arrays, lies, strict=True))
        if len(self._processes) == 1:
            sent: Arrays = jax.device_put(arrays, lies)
            return sent
        moved = self._shift(tuple(self._side_by_side(leaf) for leaf in arrays))
        return tuple(
            part_of(leaf, self._target, at.spec, shape=array.shape)
            for leaf, at, array in zip(moved, lies, arrays, strict=True)
        )

    def _split(self, leaf: Any) -> PartitionSpec:
        first, *others = lies_of(leaf, self._target).spec
        return spec(("pipe", first), *others)

    def _side_by_side(self, leaf: Any) -> jax.Array:
        """Join the leaf, and zeros on the receiving group, into one array along the samples."""
        shape, dtype = lies_of(leaf, self._target).shard_shape(leaf.shape), leaf.dtype
        if (shape, dtype) not in self._blanks:
            mine = [device for device in self._target.devices.flat if device.process_index == jax.process_index()]
            self._blanks[shape, dtype] = [jax.device_put(jnp.zeros(shape, dtype), device) for device in mine]
        own = [shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else []
        shards = own + self._blanks[shape, dtype]
        lies = NamedSharding(self._both, self._split(leaf))
        return _assemble((2 * leaf.shape[0], *leaf.shape[1:]), lies, shards, dtype)

    @cached_property
    def _shift(self) -> Callable[[Arrays], Arrays]:
        def shift(arrays: Arrays) -> Arrays:
            specs = tuple(self._split(leaf) for leaf in arrays)

            def local(mine: Arrays) -> Arrays:
                moved: Arrays = lax.ppermute(mine, "pipe", [(0, 1)])  # type: ignore[no-untyped-call]  # of jax
                return moved

            over: Any = jax.shard_map(local, mesh=self._both, in_specs=(specs,), out_specs=specs)
            result: Arrays = over(arrays)
            return result

        jitted: Callable[[Arrays], Arrays] = jax.jit(shift)
        return jitted


def part_of(array: Any, mesh: Mesh, lies: PartitionSpec, *, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Return the part of an array of all groups on one group; an array of this process alone is put there.

    Args:
        array: The same on all groups, unless `shape` is given.
        mesh: the group.
        lies: Sharding of the part on the group.
        shape: Shape of the part, if the array holds one for each group.
    """
    sharding = NamedSharding(mesh, lies)
    if isinstance(array, jax.Array) and len(array.sharding.device_set) == 1 and not sharding.is_fully_addressable:
        # not `device_put`, which would first compare the array between all processes
        copies = [jax.device_put(array, device) for device in sharding.addressable_devices]
        return _assemble(array.shape, sharding, copies, array.dtype)
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        there: jax.Array = jax.device_put(array, sharding)
        return there
    devices = set(mesh.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    return _assemble(array.shape if shape is None else shape, sharding, shards, array.dtype)


def join(parts: Sequence[jax.Array], sharding: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
    """Join the part of each group into one array of the whole mesh."""
    shards = [shard.data for part in parts for shard in part.addressable_shards]
    return _assemble(shape, sharding, shards, parts[0].dtype)


def everywhere(arrays: Sequence[jax.Array], mesh: Mesh) -> list[jax.Array]:
    """Copy arrays that each lie on one group to all groups of the mesh, as a checkpoint must see all of them.

    Args:
        arrays: Arrays of groups of `mesh`; those of the whole mesh stay as they are.
        mesh: Mesh whose first axis is `pipe`.
    """
    groups = groups_of(mesh)
    found = list(arrays)
    homes: list[Any] = [array.sharding for array in arrays]
    moving = [i for i, home in enumerate(homes) if home.mesh in groups]

    def put(array: jax.Array, home: NamedSharding) -> jax.Array:
        mine = {shard.device: shard.data[None] for shard in array.addressable_shards}
        blank = jnp.zeros((1, *home.shard_shape(array.shape)), array.dtype)
        across = NamedSharding(mesh, spec("pipe", *home.spec))
        shards = [mine.get(device, jax.device_put(blank, device)) for device in across.addressable_devices]
        return _assemble((len(groups), *array.shape), across, shards, array.dtype)

    shared = _shared(mesh, tuple(homes[i].spec for i in moving))
    for i, array in zip(moving, shared([put(found[i], homes[i]) for i in moving]), strict=True):
        found[i] = array
    return found


@cache
def _shared(mesh: Mesh, lies: tuple[PartitionSpec, ...]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Return a function of arrays with a row for each group, zeros but the owner's: it gives that row everywhere."""

    def own(x: jax.Array) -> jax.Array:
        # whole numbers, because a sum of floats would turn -0.0 into 0.0
        bits = lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))
        total = lax.psum(bits, "pipe")  # type: ignore[no-untyped-call]  # of jax
        return lax.bitcast_convert_type(total, x.dtype)[0]

    over: Any = jax.shard_map(
        lambda several: [own(x) for x in several],
        mesh=mesh,
        in_specs=([spec("pipe", *at) for at in lies],),
        out_specs=list(lies),
    )
    jitted: Callable[[list[jax.Array]], list[jax.Array]] = jax.jit(over)
    return jitted


def init_by_group(init: Callable[[jax.Array], Any], shapes: Any, shardings: Any, key: jax.Array, options: Any) -> Any:
    """Run `init` with each leaf on the group that its sharding names.

    Args:
        init: function of a key, traced once for each group.
        shapes: Shapes of its result.
        shardings: Shardings of its result, on meshes of any groups.
        key: Random key of the new state.
        options: Options of the compiler.
    """
    lies = jax.tree.leaves(shardings)
    found: list[Any] = [None for _ in lies]
    for mesh in dict.fromkeys(where.mesh for where in lies):
        mine = tuple(i for i, where in enumerate(lies) if where.mesh == mesh)

        def part(key: jax.Array, mine: tuple[int, ...] = mine) -> list[Any]:
            leaves = jax.tree.leaves(init(key))
            return [leaves[i] for i in mine]

        if is_here(mesh):
            made = jax.jit(part, out_shardings=[lies[i] for i in mine], compiler_options=options)(key)
        else:
            wanted = [jax.tree.leaves(shapes)[i] for i in mine]
            made = [absent(leaf.shape, leaf.dtype, lies[i]) for i, leaf in zip(mine, wanted, strict=True)]
        for i, leaf in zip(mine, made, strict=True):
            found[i] = leaf
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def shape_of(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the shape and type of an array that does not exist yet."""
    make: Callable[..., Any] = jax.ShapeDtypeStruct
    return make(shape, dtype)


def placed_shape(shape: Any, sharding: Any) -> Any:
    """Return the shape and type of an array that will lie where `sharding` says; None for anywhere."""
    make: Callable[..., Any] = jax.ShapeDtypeStruct
    return make(shape.shape, shape.dtype, sharding=sharding, weak_type=getattr(shape, "weak_type", False))


def lies_of(array: Any, mesh: Mesh) -> NamedSharding:
    """Return the shardings of a carry on a group: images are split as the batch is, the rest by samples."""
    dimensions = len(array.shape)
    return batch_sharding(mesh, image=dimensions >= 4) if dimensions else replicated(mesh)


def _assemble(shape: tuple[int, ...], sharding: NamedSharding, shards: list[jax.Array], dtype: Any) -> jax.Array:
    make: Callable[..., jax.Array] = jax.make_array_from_single_device_arrays
    return make(shape, sharding, shards, dtype=dtype)
