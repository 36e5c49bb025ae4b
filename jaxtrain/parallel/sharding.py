"""Place parameters by an ordered table of (regular expression on its path, mesh axis per dimension).

The first rule that matches a parameter's path (`encoder/level0/conv1/kernel`) decides; a parameter without a rule lies
whole on every device. Rules of the configuration come before the defaults. A rule of the user that cannot be applied
is an error; a default that does not fit (8 filters over 3 devices) leaves the parameter whole.

The defaults are filter parallelism in pairs, as Megatron-LM does for linear layers (Shoeybi et al. 2019,
arXiv:1909.08053): kernels are HWIO; `conv1` is split by its outputs O, the norm after it works on local filters, and
`conv2` is split by its inputs I and sums them with one all-reduce. So no activation is ever gathered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.parallel.mesh import spec
from zarr_store.errors import InvalidInput

__all__ = ["DEFAULT_RULES", "Rule", "check_split", "partition_specs", "path_name"]

Rule = tuple[str, tuple[str | None, ...]]

DEFAULT_RULES: tuple[Rule, ...] = (
    (r"(^|/)conv1/kernel$", (None, None, None, "model")),
    (r"(^|/)conv1/bias$", ("model",)),
    (r"(^|/)norm1/(scale|bias|mean|var)$", ("model",)),
    (r"(^|/)conv2/kernel$", (None, None, "model", None)),
)


def path_name(path: Sequence[Any]) -> str:
    """Return a path such as `encoder/level0/conv1/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def partition_specs(tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), *, known: Sequence[str] = ()) -> Any:
    """Return a `PartitionSpec` for each array of a tree.

    Args:
        tree: Nested dict of arrays or `jax.ShapeDtypeStruct`.
        mesh: Mesh with the axes and their sizes.
        rules: Rules of the user, in order; they must apply.
        known: further paths that a rule may be meant for, so that it need not match anything here.

    Raises:
        InvalidInput: a rule is not a regular expression, matches nothing, names no axis of the mesh, or does not fit
            the parameter; the message names rule, parameter, shape, axis size and reason.
    """
    compiled = [(_compile(rule), rule) for rule in rules]
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, rule in compiled:
        if not any(pattern.search(name) for name in [*names, *known]):
            raise InvalidInput(
                f"mesh.rules: {rule[0]!r} matches no parameter; the parameters are {', '.join(names[:6])}, …"
            )

    def resolve(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name, shape = path_name(path), tuple(leaf.shape)
        for pattern, (text, axes) in compiled:
            if pattern.search(name):
                if reason := _misfit(shape, axes, mesh.shape):
                    raise InvalidInput(
                        f"mesh.rules: {text!r} → {axes} cannot be applied to parameter {name} of shape {shape}: "
                        f"{reason}; change the rule, the mesh or model.width"
                    )
                return spec(*axes)
        for text, axes in DEFAULT_RULES:
            if re.search(text, name):
                return spec() if _misfit(shape, axes, mesh.shape) else spec(*axes)
        return spec()

    return jax.tree_util.tree_map_with_path(resolve, tree)


def check_split(tree: Any, specs: Any, mesh: Mesh) -> None:
    """Refuse devices along `model` if no parameter is split over them: they would all do the same work.

    Args:
        tree: Nested dict of arrays or `jax.ShapeDtypeStruct`.
        specs: Result of `partition_specs` for the tree.
        mesh: Mesh with the axes and their sizes.

    Raises:
        InvalidInput: nothing is split; the message names a parameter, its shape, the axis size and the reason.
    """
    size = mesh.shape.get("model", 1)
    lies = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    if size == 1 or any("model" in one for one in lies):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = path_name(path), tuple(leaf.shape)
        for text, axes in DEFAULT_RULES:
            if re.search(text, name) and (reason := _misfit(shape, axes, mesh.shape)):
                raise InvalidInput(
                    f"mesh.model = {size} splits no parameter of this network: {name} of shape {shape}: {reason}; "
                    "choose a multiple in model.width, or another mesh.model"
                )
    raise InvalidInput(
        f"mesh.model = {size} splits no parameter of this network: none is named in mesh.rules or has a rule by "
        f"default ({', '.join(text for text, _ in DEFAULT_RULES)}); use mesh.data, or name some in mesh.rules"
    )


def _compile(rule: Rule) -> re.Pattern[str]:
    try:
        return re.compile(rule[0])
    except re.error as error:
        raise InvalidInput(f"mesh.rules: {rule[0]!r} is not a regular expression: {error}") from error


def _misfit(shape: tuple[int, ...], axes: Sequence[str | None], sizes: Mapping[Any, int]) -> str | None:
    """Return why the axes do not fit the shape; None if they fit."""
    if len(axes) != len(shape):
        return f"it has {len(shape)} dimensions, the rule names {len(axes)}"
    used = [axis for axis in axes if axis is not None]
    for axis in used:
        if axis not in sizes:
            return f"the mesh has no axis {axis!r}, only {', '.join(map(repr, sizes))}"
        if used.count(axis) > 1:
            return f"axis {axis!r} is named twice"
    for position, (extent, split) in enumerate(zip(shape, axes, strict=True)):
        if split is not None and extent % sizes[split]:
            return f"dimension {position} of size {extent} is not a multiple of axis {split!r} of size {sizes[split]}"
    return None
