"""Compile the programs of a pipeline on shapes alone, to see what they need before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtrain.parallel.links import lies_of, shape_of
from jaxtrain.parallel.mesh import replicated, stored_sharding
from jaxtrain.parallel.parts import Held
from jaxtrain.parallel.pipeline import Pipeline
from jaxtrain.parallel.stage_programs import Entry, Settled, Verdict

__all__ = ["Piece", "compile_parts"]


class Piece(NamedTuple):
    """One compiled program of one part."""

    name: str
    """images (the batch becomes microbatches), forward, backward, total (of the gradient) or update."""
    part: int
    compiled: Any
    parameters: tuple[Any, ...]
    """Shapes of the parameters that the part holds."""
    gives: tuple[Any, ...]
    """Shapes and places of what the part hands to the next one for a microbatch; () of other programs."""
    keeps: tuple[Any, ...] = ()
    """Results of a forward pass that stay until its backward pass."""
    borrows: tuple[Any, ...] = ()
    """Inputs of a forward pass, besides the state, that stay until its backward pass."""


def compile_parts(pipeline: Pipeline, batch: Mapping[str, Any], key: Any) -> Iterator[Piece]:
    """Compile the programs of all parts, from the first to the last.

    Args:
        pipeline: the parts of a program.
        batch: shapes of a batch.
        key: shape of a random key.
    """
    program, layout, parts = pipeline.program, pipeline.layout, pipeline.parts
    last = layout.chunks - 1

    def batch_on(k: int) -> dict[str, Any]:
        mesh = layout.mesh(k)
        return {name: _at(leaf, stored_sharding(mesh, leaf.ndim)) for name, leaf in batch.items()}

    entries: dict[int, Any] = {}
    for k, program_of_images in pipeline.shared.images.items():
        images = program_of_images.lower(batch_on(k), _at(key, replicated(layout.mesh(k))))
        compiled = images.compile()
        yield Piece("images", k, compiled, (), ())
        entries[k] = _given(images.out_info, compiled)[0]
    made: list[Any] = []
    labels = pipeline.shared.labels.lower(batch_on(last), _at(key, replicated(layout.mesh(last))))
    labels = _given(labels.out_info, labels.compile())
    for k in range(layout.chunks):
        mesh, stage = layout.mesh(k), pipeline.stages[k]
        whole = replicated(mesh)
        lies = [parts.of(tree, k) for tree in (program.shardings.params, program.shardings.model_state)]
        held = Held(*(_placed(shapes, at) for shapes, at in zip(parts.shapes[k], lies, strict=True)))
        blank = stage.blank.lower(held)
        gradient, summed = _given(blank.out_info, blank.compile())
        answers = ([found[0] for found, _ in labels], [share for _, share in labels]) if k == last else ()
        carry = entries.get(k) or tuple(leaf for source in layout.needs(k) for leaf in made[source])
        entered = tuple(_at(leaf, lies_of(leaf, mesh)) for leaf in carry)
        entry = Entry(entered, _at(key, whole), answers)
        forward = stage.forward.lower(held, summed, entry)
        compiled = forward.compile()
        out, summed, pull = _given(forward.out_info, compiled)
        mine = tuple(jax.tree.leaves(held.params))
        gives = tuple(out) if k != last else ()
        borrowed = pull.borrow(held, entry)
        # the images of a part that takes them exist as long as the step
        moving = set(map(id, jax.tree.leaves((entry.carry if layout.needs(k) else (), entry.answers))))
        borrows = tuple(leaf for leaf in borrowed if id(leaf) in moving)
        yield Piece("forward", k, compiled, mine, gives, tuple(pull.kept), borrows)
        backward = stage.backward.lower(pull, borrowed, () if k == last else gives, gradient)
        yield Piece("backward", k, backward.compile(), mine, ())
        if stage.total is not None:
            total = stage.total.lower(gradient)
            compiled = total.compile()
            yield Piece("total", k, compiled, mine, ())
            gradient = _given(total.out_info, compiled)
        moments, counters = (
            [_at(leaf, at) for leaf, at in zip(shapes, places, strict=True)]
            for shapes, places in zip(
                parts.opt_of(program.shapes.opt_state, k), parts.opt_of(program.shardings.opt_state, k), strict=True
            )
        )
        scalar, finite = (_at(shape_of((), kind), whole) for kind in (jnp.float32, jnp.bool_))
        verdict = Verdict([_at(leaf, whole) for leaf in counters], scalar, finite)
        update = stage.update.lower(held, moments, gradient, Settled(summed, verdict))
        yield Piece("update", k, update.compile(), mine, ())
        made.append(out)


def _at(leaf: Any, sharding: NamedSharding) -> Any:
    make: Callable[..., Any] = jax.ShapeDtypeStruct
    return make(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(shapes: Any, lies: Any) -> Any:
    return jax.tree.map(_at, shapes, lies)


def _given(shapes: Any, compiled: Any) -> Any:
    """Return the results of a program as shapes with the places that the compiler chose."""
    return jax.tree.map(_at, shapes, compiled.output_shardings)
