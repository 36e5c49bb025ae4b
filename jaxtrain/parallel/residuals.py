"""Keep the values that a backward pass needs of its forward pass, and nothing more.

A forward and a backward pass that are two programs hand the values between them (the residuals of `jax.vjp`) over as
results. The compiler cannot know that many of them need not be kept: inputs of the forward pass, which would be copied
for every microbatch (all parameters among them), and what is made of constants and scalars, such as the zeros in the
gradient of a rectifier, which lie whole on every device however the batch is split. Here the first are borrowed from
whoever holds them, the second are made again by the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

__all__ = ["Pull", "vjp_apart"]

KEPT, BORROWED, MADE = "kept", "borrowed", "made"


@dataclass(frozen=True, eq=False)
class _Recipe:
    """The origin of each residual; compared by identity, as it belongs to one trace."""

    structure: Any
    """Structure of the function that pulls gradients back."""
    sources: tuple[tuple[str, int], ...]
    """For each leaf: kept, borrowed or made, and its number there."""
    borrowed: tuple[int, ...]
    """Numbers of the inputs that are borrowed."""
    lies: tuple[Any, ...]
    """How each borrowed input is split, if the caller said so."""
    scalars: tuple[int, ...]
    """Numbers of the borrowed inputs of which residuals are made."""
    maker: Any
    """Closed jaxpr that makes residuals from those."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Pull:
    """A function that pulls gradients back, without the values that need not be kept."""

    kept: tuple[Any, ...]
    recipe: _Recipe

    def borrow(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the leaves of the forward pass's inputs that the backward pass needs again."""
        leaves = jax.tree.leaves(inputs)
        return tuple(leaves[number] for number in self.recipe.borrowed)

    def whole(self, borrowed: tuple[Any, ...]) -> Callable[[Any], Any]:
        """Return the function that pulls gradients back, inside a jitted function.

        Args:
            borrowed: what `borrow` returned.
        """
        recipe = self.recipe
        made = jaxpr_as_fun(recipe.maker)(*(borrowed[number] for number in recipe.scalars))
        places = {KEPT: self.kept, BORROWED: borrowed, MADE: tuple(made)}
        pull: Callable[[Any], Any] = jax.tree.unflatten(
            recipe.structure, [places[kind][number] for kind, number in recipe.sources]
        )
        return pull

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Recipe]:
        """Return what is kept, and the recipe as static data."""
        return self.kept, self.recipe

    @classmethod
    def tree_unflatten(cls, recipe: _Recipe, kept: Any) -> Pull:
        """Put together what `tree_flatten` took apart."""
        return cls(tuple(kept), recipe)


def vjp_apart(run: Callable[..., tuple[Any, Callable[[Any], Any]]], *inputs: Any, lies: Any = None) -> tuple[Any, Pull]:
    """Run a function that returns results and what pulls gradients back, and keep of the latter only what is needed.

    Args:
        run: function of `inputs` → (results, a function from `jax.vjp`).
        inputs: trees of arrays, inside a jitted function.
        lies: how each leaf of the inputs is split, for a backward pass inside `shard_map`.
    """
    structures: list[Any] = []

    def flat(*leaves: Any) -> tuple[list[Any], list[Any]]:
        results, pull = run(*jax.tree.unflatten(jax.tree.structure(inputs), leaves))
        residuals, structure = jax.tree.flatten(pull)
        structures[:] = [structure]
        return results, residuals

    leaves = jax.tree.leaves(inputs)
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr, results = closed.jaxpr, len(jax.tree.leaves(shapes[0]))
    free = _independent(jaxpr)
    sources: list[tuple[str, int]] = []
    kept: dict[Any, int] = {}
    borrowed: dict[int, int] = {}
    made: dict[int, int] = {}
    inputs_at = {var: number for number, var in enumerate(jaxpr.invars)}
    for position, var in enumerate(jaxpr.outvars[results:], start=results):
        if isinstance(var, Literal) or var in free:
            sources.append((MADE, made.setdefault(position, len(made))))
        elif var in inputs_at:
            sources.append((BORROWED, borrowed.setdefault(inputs_at[var], len(borrowed))))
        else:
            sources.append((KEPT, kept.setdefault(var, len(kept))))
    first: dict[Any, int] = {}
    for position, var in enumerate(jaxpr.outvars):
        if not isinstance(var, Literal):
            first.setdefault(var, position)
    values = jaxpr_as_fun(closed)(*leaves)
    maker, needed = _only(closed, tuple(made))
    scalars = tuple(borrowed.setdefault(number, len(borrowed)) for number in needed)
    places = () if lies is None else tuple(lies[number] for number in borrowed)
    recipe = _Recipe(structures[0], tuple(sources), tuple(borrowed), places, scalars, maker)
    found = jax.tree.unflatten(jax.tree.structure(shapes[0]), values[:results])
    return found, Pull(tuple(values[first[var]] for var in kept), recipe)


def _independent(jaxpr: Jaxpr) -> set[Any]:
    """Return the variables that depend on no input but scalars; random numbers are not drawn twice."""
    key = jax.dtypes.prng_key
    avals: dict[Any, Any] = {var: var.aval for var in jaxpr.invars}
    free = {var for var, aval in avals.items() if not aval.shape and not jnp.issubdtype(aval.dtype, key)}
    depends = set(jaxpr.invars) - free
    inputs = set(free)
    free |= set(jaxpr.constvars)
    for equation in jaxpr.eqns:
        bound = any(not isinstance(var, Literal) and var in depends for var in equation.invars) or equation.effects
        (depends if bound else free).update(equation.outvars)
    return free - inputs


def _only(closed: Any, positions: tuple[int, ...]) -> tuple[Any, list[int]]:
    """Return a program for some of the results, and the numbers of the inputs that it needs."""
    wanted = [position in positions for position in range(len(closed.jaxpr.outvars))]
    reduced, used = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
    return closed.replace(jaxpr=reduced), [number for number, needed in enumerate(used) if needed]
