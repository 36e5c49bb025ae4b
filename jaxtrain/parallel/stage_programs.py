"""The compiled programs of a pipeline: those of one part (`make_stage`), and those that all parts share.

Every maker returns functions of a few named tuples, so that donation and shardings are stated once, where
the program is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.models.modality import views_of
from jaxtrain.models.units import Carry
from jaxtrain.parallel.links import lies_of
from jaxtrain.parallel.mesh import constrain, replicated, spec, stored_sharding
from jaxtrain.parallel.parts import Changed, Held, Parts, PipelinedProgram, Tree
from jaxtrain.parallel.residuals import Pull, vjp_apart
from jaxtrain.parallel.spatial import over_space
from jaxtrain.parallel.stages import Layout
from jaxtrain.parallel.zero import gather_for_use

__all__ = ["Counted", "Entry", "Settled", "SharedPrograms", "StagePrograms", "Verdict", "make_shared", "make_stage",
           "make_units"]  # fmt: skip

Units = Callable[..., tuple[Carry, Tree]]


class Entry(NamedTuple):
    """The input of a forward pass of one part: one microbatch."""

    carry: Carry
    key: jax.Array
    """Random key for dropout."""
    answers: Any
    """Labels, and the share of the loss of each; () but for the last part."""


class Counted(NamedTuple):
    """The output of the last part for one microbatch."""

    loss: jax.Array
    right: jax.Array
    labelled: jax.Array


class Verdict(NamedTuple):
    """The numbers that all groups must know before they update."""

    counters: list[Any]
    """Counters of the optimiser."""
    scale: jax.Array
    """Factor of the gradient that keeps its norm under the limit."""
    finite: jax.Array


class Settled(NamedTuple):
    """The input of an update besides the part, its moments and its gradient."""

    summed: Tree
    """New batch statistics."""
    verdict: Verdict


@dataclass(frozen=True)
class StagePrograms:
    """The compiled programs of one part.

    Attributes:
        forward: (held, summed, entry) → (carry or Counted, summed statistics, what pulls gradients back).
        backward: (pull, what it borrows, returned, gradient) → (gradient of the carry, summed gradient); the gradient
            is donated.
        blank: (held) → gradient and statistics of zeros.
        total: (gradient) → the gradient of all replicas, which they summed apart until here; donated.
        update: (held, moments, gradient, settled) → Changed; moments and gradient are donated.
        look: (held, carry) → carry, without training.
    """

    forward: Any
    backward: Any
    blank: Any
    total: Any
    update: Any
    look: Any


def sums_apart(program: PipelinedProgram) -> bool:
    """Return whether each replica sums its own gradient over the microbatches, so that it travels once a step.

    With `zero = 3` no device has room for a whole gradient. Norms over the batch need all replicas.
    """
    config = program.config
    mesh = config.mesh
    return mesh.data > 1 and mesh.zero < 3 and mesh.microbatches > 1 and config.model.norm == "group"


def make_units(program: PipelinedProgram, layout: Layout, k: int, *, apart: bool = False) -> Units:
    """Return the units of one part as a function of (params, statistics, carry, train=, key=).

    Args:
        program: the whole network.
        layout: its parts.
        k: the part.
        apart: the program is that of one replica, inside a `shard_map` along `data`.
    """

    def units(params: Tree, statistics: Tree, carry: Carry, *, train: bool, key: jax.Array) -> tuple[Carry, Tree]:
        with over_space(layout.mesh(k), apart=apart):
            return program.apply_units(params, statistics, carry, span=layout.span(k), train=train, key=key)

    return units


def make_stage(
    program: PipelinedProgram, layout: Layout, parts: Parts, optimizer: optax.GradientTransformation, *, k: int
) -> StagePrograms:
    """Make the programs of part `k`; results have exactly the shardings of the arguments of the next call.

    If they did not, each call would be compiled again.
    """
    zero = program.config.mesh.zero
    summed = parts.of(program.shardings.model_state, k)
    gradient = parts.of(program.parts if zero else program.whole, k)
    apart = sums_apart(program)
    mine = jax.tree.map(lambda at: NamedSharding(at.mesh, spec("data", *at.spec)), parts.of(program.whole, k))
    own = mine if apart else gradient
    # the new parameters take the gradient's place, where they lie as it does
    spent = (1,) if zero == 1 else (1, 2)
    return StagePrograms(
        forward=jax.jit(_forward(program, layout, parts, k), out_shardings=(None, summed, None)),
        backward=jax.jit(_backward(layout, k, apart=apart), donate_argnums=3, out_shardings=(None, own)),
        blank=jax.jit(partial(_blank, program.config.mesh.data if apart else 0), out_shardings=(own, summed)),
        # with zero = 1 a part of the sum cannot take the place of the whole
        total=jax.jit(_total, donate_argnums=() if zero else 0, out_shardings=gradient) if apart else None,
        update=jax.jit(_update(program, parts, optimizer, k), donate_argnums=spent, out_shardings=parts.homes(k)),
        look=jax.jit(_look(program, layout, parts, k)),
    )


def _forward(program: PipelinedProgram, layout: Layout, parts: Parts, k: int) -> Callable[..., Any]:
    apart, mesh = sums_apart(program), layout.mesh(k)
    units, last, objective = make_units(program, layout, k, apart=apart), layout.chunks - 1, program.objective
    microbatches = program.config.mesh.microbatches

    def passed(held: Held, entry: Entry) -> Any:
        key = entry.key
        if apart and program.config.model.dropout:  # replicas drop other features
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))

        def run(params: Tree, carry: Carry) -> Any:
            carry, new = units(params, held.statistics, carry, train=True, key=key)
            if k != last:
                return (carry if apart else _placed(carry, mesh)), (new, None)
            labels, shares = entry.answers
            terms = objective.blend(carry[0], list(zip(labels, shares, strict=True)))
            right = objective.right(views_of(carry[0], labels[0].shape[0])[0], labels[0])
            return terms.loss, (new, (right, terms.labelled))

        if program.config.mesh.zero == 3:
            run = gather_for_use(run, parts.of(program.whole, k))
        if layout.needs(k):
            out, pull, aux = jax.vjp(run, held.params, entry.carry, has_aux=True)
        else:  # nobody learns from the gradient of an image
            out, pull, aux = jax.vjp(lambda params: run(params, entry.carry), held.params, has_aux=True)
        return (out, *aux), pull

    def of_all(held: Held, entry: Entry) -> tuple[Any, Pull]:
        results, pull = vjp_apart(passed, held, entry)
        return results, _by_samples(pull, entry.carry[0].shape[0], program.views, mesh)

    def of_each(held: Held, entry: Entry) -> tuple[Any, Pull]:
        whole, split = spec(), spec("data")
        lies = (whole, Entry(split, whole, (split, whole) if k == last else ()))  # type: ignore[arg-type]  # places

        def local(held: Held, entry: Entry) -> tuple[Any, Pull]:
            labels, shares = entry.answers or ((), ())
            trees = ((held, whole), (entry.carry, split), (entry.key, whole), (labels, split), (shares, whole))
            every = [jax.tree.map(lambda _, at=at: at, tree) for tree, at in trees]
            (out, new, counted), pull = vjp_apart(passed, held, entry, lies=jax.tree.leaves(every))
            if k == last:
                out, counted = jax.lax.psum((out, counted), "data")  # type: ignore[no-untyped-call]  # of jax
            return (out, new, counted), Pull(tuple(leaf[None] for leaf in pull.kept), pull.recipe)

        outs = ((whole if k == last else split, whole, whole), split)
        found: tuple[Any, Pull] = _each(local, mesh, lies, outs)(held, entry)
        return found

    def forward(held: Held, summed: Tree, entry: Entry) -> tuple[Any, Tree, Pull]:
        (out, new, counted), pull = (of_each if apart else of_all)(held, entry)
        total = jax.tree.map(lambda total, now: total + now / microbatches, summed, new)
        return (_placed(out, mesh) if counted is None else Counted(out, *counted)), total, pull

    return forward


def _each(local: Callable[..., Any], mesh: Mesh, given: Any, found: Any) -> Callable[..., Any]:
    """Run a function on each replica, with its samples; the other axes are left to the compiler."""
    over: Any = jax.shard_map
    # what is not split is used by each replica for itself: its gradient must not be summed here
    result: Callable[..., Any] = over(
        local, mesh=mesh, in_specs=given, out_specs=found, axis_names={"data"}, check_vma=False
    )
    return result


def _placed(carry: Carry, mesh: Mesh) -> Carry:
    return tuple(constrain(leaf, lies_of(leaf, mesh)) for leaf in carry)


def _by_samples(pull: Pull, samples: int, views: int, mesh: Mesh) -> Pull:
    """Split what is kept as the batch is; the compiler would put whole on every device what it finds to be constant."""
    rest: Any = PartitionSpec.UNCONSTRAINED

    def place(leaf: Any) -> Any:
        # in training a sample has several views after the merge of its modalities
        if not leaf.ndim or leaf.shape[0] not in (samples, samples * views):
            return leaf
        return constrain(leaf, NamedSharding(mesh, spec("data", *[rest] * (leaf.ndim - 1))))

    return Pull(tuple(map(place, pull.kept)), pull.recipe)


def _backward(layout: Layout, k: int, *, apart: bool) -> Callable[..., Any]:
    last, mesh, taking = layout.chunks - 1, layout.mesh(k), bool(layout.needs(k))

    def of_all(pull: Pull, borrowed: tuple[Any, ...], returned: Any) -> tuple[Any, Any]:
        found, *carry = pull.whole(borrowed)(jnp.float32(1) if k == last else returned)
        return found, carry[0] if taking else ()

    def of_each(pull: Pull, borrowed: tuple[Any, ...], returned: Any) -> tuple[Any, Any]:
        def local(pull: Pull, borrowed: tuple[Any, ...], returned: Any) -> tuple[Any, Any]:
            mine = Pull(tuple(leaf[0] for leaf in pull.kept), pull.recipe)
            found, back = of_all(mine, borrowed, returned)
            return jax.tree.map(lambda leaf: leaf[None], found), back

        split = spec("data")
        given = (split, pull.recipe.lies, split)
        result: tuple[Any, Any] = _each(local, mesh, given, (split, split))(pull, borrowed, returned)
        return result

    def backward(pull: Pull, borrowed: tuple[Any, ...], returned: Any, gradient: Tree) -> tuple[Any, Tree]:
        found, carry = (of_each if apart else of_all)(pull, borrowed, returned)
        return (_placed(carry, mesh) if taking else None), jax.tree.map(jnp.add, gradient, found)

    return backward


def _blank(replicas: int, held: Held) -> tuple[Tree, Tree]:
    """Return zeros for the gradient, of each replica if they sum theirs apart, and for the statistics."""
    several = (replicas,) if replicas else ()
    gradient = jax.tree.map(lambda leaf: jnp.zeros((*several, *leaf.shape), leaf.dtype), held.params)
    return gradient, jax.tree.map(jnp.zeros_like, held.statistics)


def _total(own: Tree) -> Tree:
    return {name: leaf.sum(axis=0) for name, leaf in own.items()}


def _update(
    program: PipelinedProgram, parts: Parts, optimizer: optax.GradientTransformation, k: int
) -> Callable[..., Changed]:
    def update(held: Held, moments: Any, gradient: Tree, settled: Settled) -> Changed:
        counters, scale, finite = settled.verdict
        opt = parts.opt_state(k, moments, counters)
        gradient = jax.tree.map(lambda leaf: leaf * scale, gradient)
        if program.config.mesh.zero:
            gradient = constrain(gradient, parts.of(program.parts, k))
        updates, new_opt = optimizer.update(gradient, opt, held.params)
        new_params = jax.tree.map(lambda leaf, update: leaf + update.astype(leaf.dtype), held.params, updates)
        changed = Changed(new_params, jax.tree.leaves(new_opt), settled.summed)
        kept = Changed(held.params, jax.tree.leaves(opt), held.statistics)
        result: Changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        return result

    return update


def _look(program: PipelinedProgram, layout: Layout, parts: Parts, k: int) -> Callable[..., Carry]:
    units = make_units(program, layout, k)

    def look(held: Held, carry: Carry) -> Carry:
        run: Callable[..., Any] = partial(units, train=False, key=jax.random.key(0))
        if program.config.mesh.zero == 3:
            run = gather_for_use(run, parts.of(program.whole, k))
        result: Carry = run(held.params, held.statistics, carry)[0]
        return tuple(constrain(leaf, lies_of(leaf, layout.mesh(k))) for leaf in result)

    return look


@dataclass(frozen=True)
class SharedPrograms:
    """The compiled programs that all parts share.

    Attributes:
        images: For each part that takes an image: (batch, key) → its carry for each microbatch, from normalised images.
        labels: (batch, key) → for each label its microbatches, and its share of the loss; on the last group.
        enter: For each part that takes an image: (batch) → its carry, without training.
        sums: (logits, batch) → the sums of an evaluation, on the last group.
        answer: The answer of the objective, on the last group.
        partial: (gradients, counts of a group) → its row of the numbers that all must know.
        finish: (numbers of all groups, labelled, step) → metrics, scale, finite, step.
        row: A tree with a leading axis of one.
        add: Sums over the leading axis, known to all groups.
    """

    images: Mapping[int, Any]
    labels: Any
    enter: Mapping[int, Any]
    sums: Any
    answer: Any
    partial: Any
    finish: Any
    row: Any
    add: Any


def make_shared(
    program: PipelinedProgram,
    layout: Layout,
    prepare: Callable[..., Any],
    normalise: Callable[..., Any],
    seen: Callable[..., jax.Array] | None = None,
) -> SharedPrograms:
    """Make the programs that all parts share; arguments are those of `Pipeline`."""
    everywhere = replicated(program.mesh)
    entries = [k for k in range(layout.chunks) if not layout.needs(k)]

    def sums(logits: jax.Array, batch: Tree) -> dict[str, jax.Array]:
        found = program.objective.sums(logits, batch["label"])
        return found if seen is None else found | {"seen": seen(batch)}

    return SharedPrograms(
        images={k: jax.jit(_images(program, layout, prepare, k)) for k in entries},
        labels=jax.jit(_labels(program, layout, prepare)),
        enter={k: jax.jit(_enter(layout, normalise, k)) for k in entries},
        sums=jax.jit(sums),
        answer=jax.jit(program.objective.answer),
        partial=jax.jit(_partial),
        finish=jax.jit(_finish(program), out_shardings=everywhere),
        row=jax.jit(partial(jax.tree.map, lambda leaf: leaf[None])),
        add=jax.jit(partial(jax.tree.map, lambda rows: rows.sum(axis=0)), out_shardings=everywhere),
    )


def _images(program: PipelinedProgram, layout: Layout, prepare: Callable[..., Any], k: int) -> Callable[..., Any]:
    def images(batch: Tree, key: jax.Array) -> tuple[Carry, ...]:
        mesh = layout.mesh(k)
        entered = _entered(prepare(batch, key, mesh)[0], layout.parts[k].source)
        cut = [_cut(program, leaf, lies_of(leaf, mesh)) for leaf in entered]
        return tuple(zip(*cut, strict=True))

    return images


def _enter(layout: Layout, normalise: Callable[..., Any], k: int) -> Callable[..., Carry]:
    def enter(batch: Tree) -> Carry:
        return _entered(normalise(batch), layout.parts[k].source)

    return enter


def _entered(inputs: Any, source: str) -> Carry:
    """Return what a part takes of the inputs of the network: the one image, or what a branch has of its own."""
    mine = inputs[source] if source else inputs
    return tuple(mine) if isinstance(mine, (tuple, list)) else (mine,)


def _labels(program: PipelinedProgram, layout: Layout, prepare: Callable[..., Any]) -> Callable[..., Any]:
    def labels(batch: Tree, key: jax.Array) -> list[tuple[tuple[jax.Array, ...], jax.Array]]:
        objective, mesh = program.objective, layout.mesh(layout.chunks - 1)
        several = prepare(batch, key, mesh)[1]
        shape = several[0][0].shape
        size = shape if objective.task.several else (*shape, program.classes)
        weight = objective.blend(jnp.zeros(size, jnp.float32), several).weight
        weight = jnp.where(weight > 0, weight, jnp.float32(1))
        return [(_cut(program, label, stored_sharding(mesh, label.ndim)), share / weight) for label, share in several]

    return labels


def _cut(program: PipelinedProgram, array: jax.Array, lies: NamedSharding) -> tuple[jax.Array, ...]:
    """Cut an array into microbatches; each device cuts its own samples, so none travel."""
    parts, m = program.config.mesh.data, program.config.mesh.microbatches
    split = array.reshape(parts, m, array.shape[0] // (parts * m), *array.shape[1:])
    # without a constraint the compiler may put each microbatch whole on every device
    return tuple(constrain(split[:, i].reshape(array.shape[0] // m, *array.shape[1:]), lies) for i in range(m))


def _partial(gradients: list[Tree], counts: list[Counted]) -> tuple[jax.Array, jax.Array]:
    squares = sum((jnp.square(leaf).sum() for tree in gradients for leaf in tree.values()), jnp.float32(0))
    loss = sum((one.loss for one in counts), jnp.float32(0))
    right = sum((one.right for one in counts), jnp.float32(0))
    labelled = sum((one.labelled for one in counts), jnp.int32(0))
    return jnp.stack([squares, loss, right])[None], labelled[None]


def _finish(program: PipelinedProgram) -> Callable[..., dict[str, Any]]:
    def finish(numbers: jax.Array, labelled: jax.Array, step: jax.Array) -> dict[str, Any]:
        squares, loss, right = numbers.sum(axis=0)
        count, norm = labelled.sum(), jnp.sqrt(squares)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        limit = program.config.optim.clip_norm
        scale = jnp.float32(1) if limit is None else jnp.where(norm < limit, 1, limit / norm)
        metrics = {
            "loss": loss,
            program.objective.score: right / jnp.maximum(count, 1).astype(jnp.float32),
            "gradient_norm": norm,
            "learning_rate": program.schedule(step),
            "labelled": count,
            "finite": finite,
        }
        return {"metrics": metrics, "scale": scale, "finite": finite, "step": step + 1}

    return finish
