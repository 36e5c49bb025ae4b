"""Pipeline parallelism: each part of the network has its own devices, and microbatches pass through them.

Each part is a separate program, compiled for its group of devices, so parts may differ like the levels of a U-Net. The
host walks through the schedule (`schedule.trace`) and hands work to the devices without waiting for results; what one
part hands to the next is copied from group to group. There are no loops on the device, because XLA:CPU runs
convolutions inside a loop forty times slower.

If a network has branches, its parts form a tree (`parallel/placement.py`): each branch takes its own image on its own
group, and the part that joins them takes the results of all, so branches on different groups compute at the same time.

Groups may lie in different processes. All processes walk through the same schedule, so copies and sums between them
come in the same order everywhere. Each process runs the work of its own groups and skips the rest, whose shapes it
knows.

A step has four parts:

1. The batch is augmented and normalised on the first group, its labels on the last.
2. Forward and backward passes run in the order of the schedule. Gradients are summed on the devices of the parameters.
3. One sum over all groups gives loss, gradient norm and metrics.
4. Each part updates its parameters.

The loss is a mean over the global batch. Its weight is known from the labels before the first microbatch, so the sum
over microbatches is the gradient of one device.

The state that goes in and comes out is that of every other strategy, a `TrainState` of the whole network; its leaves
lie on their groups. Batch statistics (norm `local`) are those of each microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxtrain.models.units import Carry
from jaxtrain.parallel.links import Links, is_here, join, part_of, shape_of, zeros_on
from jaxtrain.parallel.mesh import spec, stored_sharding
from jaxtrain.parallel.parts import Held, Parts, PipelinedProgram, Tree
from jaxtrain.parallel.processes import wait_for_all
from jaxtrain.parallel.schedule import Order, Work, order_of, order_of_tree, trace
from jaxtrain.parallel.stage_programs import Counted, Entry, Settled, Verdict, make_shared, make_stage, make_units
from jaxtrain.parallel.stages import Layout

__all__ = ["Pipeline", "orders_of"]

Batch = Mapping[str, Any]


def orders_of(layout: Layout, schedule: Order, microbatches: int) -> list[list[Work]]:
    """Return the work of each group of a layout, in order; a network with branches has one order for all schedules."""
    if layout.is_chain:
        groups = len(layout.groups)
        return order_of(schedule, groups=groups, chunks=layout.chunks, microbatches=microbatches)
    return order_of_tree(layout.after, layout.homes, microbatches=microbatches)


class Pipeline:
    """The compiled parts of a pipelined program, and the walk through its schedule.

    Args:
        program: Program with a layout.
        prepare: (batch, key, mesh) → normalised images and a list of (label, share of the loss), as a step of one
            device makes them; traced on the first and on the last group, each of which uses its part.
        normalise: batch → the inputs of the network without training: normalised images (B, H, W, C).
        optimizer: Optimiser of the program without clipping, as the norm of the whole gradient is known only here.
        seen: batch → what an evaluation counts as `seen`; None for nothing.
    """

    def __init__(
        self,
        program: PipelinedProgram,
        *,
        prepare: Callable[..., Any],
        normalise: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        seen: Callable[[Batch], jax.Array] | None = None,
    ) -> None:
        layout, mesh = program.layout, program.config.mesh
        if layout is None:
            raise ValueError("this program has no pipeline")
        self.program, self.layout = program, layout
        self.microbatches = mesh.microbatches
        self.orders = orders_of(layout, mesh.schedule, self.microbatches)
        traced = trace(self.orders, chunks=layout.chunks, after=layout.after)
        self.walk = [interval.work for interval in traced]
        self.log: list[Work] = []
        """Work of this process in the last step, in order."""
        chunks = range(layout.chunks)
        self._last = layout.chunks - 1
        self._here = [is_here(layout.mesh(k)) for k in chunks]
        self._needs = [layout.needs(k) for k in chunks]
        self._sizes: dict[int, int] = {}
        """Number of arrays that each part gives to the one that takes them."""
        self._links, self._known = Links(layout.groups), dict[Any, tuple[list[Carry], list[Carry]]]()
        self._rehearsed = False
        self.parts = Parts(program, layout, optimizer)
        self.stages = [make_stage(program, layout, self.parts, optimizer, k=k) for k in chunks]
        self.shared = make_shared(program, layout, prepare, normalise, seen)

    def compilations(self) -> dict[str, list[int]]:
        """Count the compilations of each part, by its purpose."""
        names = ("forward", "backward", "update")
        return {name: [getattr(stage, name)._cache_size() for stage in self.stages] for name in names}

    # ---- A training step

    def train(self, state: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """Run one optimiser step; see `jaxtrain.learn.step.make_train_step`."""
        last, here = self._last, [k for k in range(self.layout.chunks) if self._here[k]]
        augment_key, dropout_key = jax.random.split(key)
        held = {k: self.parts.held(state, k) for k in here}
        given, made = self._carries(batch, train=True)
        blank = {k: self.stages[k].blank(held[k]) for k in here}
        gradient, summed = ({k: trees[i] for k, trees in blank.items()} for i in range(2))
        arrived: dict[tuple[int, int], Any] = {}
        returned: dict[tuple[int, int], Any] = {}
        pulls: dict[tuple[int, int], Any] = {}
        labels: Any = ()
        counts: list[Counted] = []
        for k in self.shared.images:
            if self._here[k]:
                entries = self.shared.images[k](self._batch_on(batch, k), self._on(augment_key, k))
                arrived |= {(k, m): entry for m, entry in enumerate(entries)}
        if self._here[last]:
            labels = self.shared.labels(self._batch_on(batch, last), self._on(augment_key, last))
        if not all(self._here) and not self._rehearsed:
            answers = self._answers(labels, 0) if self._here[last] else ()
            self._rehearse(held, blank, given, made, partial(self._entry, key=augment_key, answers=answers))
        self.log = []
        for work in self.walk:
            k, m = work.chunk, work.microbatch
            if work.kind == "forward":
                entered = arrived.pop((k, m), ())
                for source in self._needs[k]:
                    entered += arrived.pop((source, m))
                out: Any = made[k]
                if self._here[k]:
                    answers = self._answers(labels, m) if k == last else ()
                    entry = self._entry(entered, k, key=jax.random.fold_in(dropout_key, m), answers=answers)
                    out, summed[k], pull = self.stages[k].forward(held[k], summed[k], entry)
                    pulls[k, m] = (pull, pull.borrow(held[k], entry))
                taker = self.layout.parts[k].after
                if taker is not None:
                    self._sizes[k] = len(out)
                    arrived[k, m] = self._pass_on(out, k, taker)
                elif self._here[k]:
                    counts.append(out)
            else:
                back: Any = None
                if self._here[k]:
                    back, gradient[k] = self.stages[k].backward(
                        *pulls.pop((k, m)), returned.pop((k, m), ()), gradient[k]
                    )
                returned.pop((k, m), None)
                for source, part in self._returned(k, made, back):
                    returned[source, m] = self._pass_on(part, k, source)
            if self._here[k]:
                self.log.append(work)
        gradient = {k: self.stages[k].total(own) if self.stages[k].total else own for k, own in gradient.items()}
        known = self._settle(gradient, counts, state.step)
        changed = {}
        for k in here:
            moments, counters = self.parts.opt_of(state.opt_state, k)
            on = partial(self._on, k=k)
            verdict = Verdict([on(leaf) for leaf in counters], on(known["scale"]), on(known["finite"]))
            changed[k] = self.stages[k].update(held[k], moments, gradient[k], Settled(summed[k], verdict))
        return self.parts.whole(state, changed, known["step"]), known["metrics"]

    def _returned(self, k: int, made: list[Carry], back: Any) -> Iterator[tuple[int, Carry]]:
        """Yield for each part that gave to part k what it gets back: gradients, or shapes in another process."""
        at = 0
        for source in self._needs[k]:
            size = self._sizes[source]
            yield source, made[source] if back is None else back[at : at + size]
            at += size

    def _entry(self, carry: Carry, k: int, *, key: jax.Array, answers: Any) -> Entry:
        return Entry(carry, self._on(key, k), answers if k == self._last else ())

    def _answers(self, labels: Any, m: int) -> tuple[list[jax.Array], list[jax.Array]]:
        return [label[m] for label, _ in labels], [share for _, share in labels]

    def _rehearse(
        self, held: Mapping[int, Held], blank: Mapping[int, Any], given: list[Carry], made: list[Carry],
        entry: Callable[..., Entry],
    ) -> None:  # fmt: skip
        """Compile all passes of this process with zeros as input, and wait until all processes have done so.

        Some parts take minutes longer to compile than others, and connections between processes time out (Gloo: 30 s).
        """

        def zeros(carry: Carry, k: int) -> Carry:
            return tuple(zeros_on(self.layout.mesh(k), leaf) for leaf in carry)

        for k, (gradient, summed) in blank.items():
            stage = self.stages[k]
            entered = entry(zeros(given[k], k), k)
            _, _, pull = stage.forward(held[k], summed, entered)
            back = () if k == self._last else zeros(made[k], k)
            stage.backward(pull, pull.borrow(held[k], entered), back, jax.tree.map(jnp.zeros_like, gradient))
        wait_for_all("the parts of the pipeline are compiled")
        self._rehearsed = True

    def _settle(self, gradient: Mapping[int, Tree], counts: list[Counted], step: jax.Array) -> dict[str, Any]:
        """Exchange once per step what all groups need from each other: a vector of three numbers and a count."""
        groups, mesh = self.layout.groups, self.program.mesh
        numbers, labelled = [], []
        for g, group in enumerate(groups):
            if not is_here(group):
                continue
            mine = [tree for k, tree in gradient.items() if self.layout.homes[k] == g]
            found = self.shared.partial(mine, counts if group is self.layout.mesh(self._last) else [])
            numbers.append(found[0])
            labelled.append(found[1])
        across = NamedSharding(mesh, spec("pipe"))
        known: dict[str, Any] = self.shared.finish(
            join(numbers, across, (len(groups), 3)), join(labelled, across, (len(groups),)), step
        )
        return known

    # ---- Evaluation and prediction: the whole batch through the parts, one after the other

    def evaluate(self, params: Any, statistics: Any, batch: Batch) -> dict[str, Any]:
        """Compute sums over a batch, known to all groups; see `jaxtrain.learn.step.make_eval_step`."""
        groups, at = self.layout.groups, self.layout.chunks - 1
        carry, found = self._through(params, statistics, batch), None
        if self._here[at]:
            found = self.shared.sums(carry[0], self._batch_on(batch, at))
        shapes = jax.eval_shape(
            self.shared.sums,
            shape_of(carry[0].shape, carry[0].dtype),
            {name: shape_of(array.shape, array.dtype) for name, array in batch.items()},
        )

        def part(group: Mesh) -> Any:
            if group is self.layout.mesh(at):
                return self.shared.row(found)
            blank = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), shapes)
            return jax.tree.map(lambda leaf: part_of(leaf, group, spec()), blank)

        across = NamedSharding(self.program.mesh, spec("pipe"))
        parts = [part(group) for group in groups if is_here(group)]
        rows = jax.tree.map(lambda leaf, *some: join(some, across, (len(groups), *leaf.shape)), shapes, *parts)
        known: dict[str, Any] = self.shared.add(rows)
        return known

    def predict(self, params: Any, statistics: Any, image: Any, observed: Any = None) -> jax.Array:
        """Predict for a batch of images, or for the arrays of several modalities, on the last group."""
        batch = dict(image) if isinstance(image, Mapping) else {"image": image, "observed": observed}
        answer: jax.Array = self.shared.answer(self._through(params, statistics, batch)[0])
        return answer

    def _through(self, params: Any, statistics: Any, batch: Batch) -> Carry:
        images = {name: array for name, array in batch.items() if name != "label"}
        _, made = self._carries(images, train=False)
        out: list[Carry] = []
        for k, part in enumerate(self.layout.parts):
            carry: Carry = tuple(leaf for source in self._needs[k] for leaf in out[source])
            if self._here[k]:
                carry = carry if self._needs[k] else self.shared.enter[k](self._batch_on(images, k))
                held = Held(self.parts.of(params, k), self.parts.of(statistics, k))
                carry = self.stages[k].look(held, carry)
            else:
                carry = made[k]
            out.append(carry if part.after is None else self._pass_on(carry, k, part.after))
        return out[-1]

    # ---- Between groups

    def _pass_on(self, carry: Carry, source: int, target: int) -> Carry:
        homes = self.layout.homes
        return carry if homes[source] == homes[target] else self._links.send(carry, homes[source], homes[target])

    def _carries(self, batch: Batch, *, train: bool) -> tuple[list[Carry], list[Carry]]:
        """Return the shapes of what each part is given and of its output, for processes that do not hold it.

        Args:
            batch: The arrays of a batch that the parts take, without labels unless `train`.
            train: Whether the batch is cut into microbatches.
        """
        count = self.layout.chunks
        if all(self._here):
            return [()] * count, [()] * count
        shapes = {name: shape_of(array.shape, array.dtype) for name, array in batch.items()}
        known = (train, *((name, leaf.shape) for name, leaf in sorted(shapes.items())))
        if known not in self._known:
            key = jax.eval_shape(lambda: jax.random.key(0))
            given: list[Carry] = []
            made: list[Carry] = []
            for k in range(count):
                entered: Carry = tuple(leaf for source in self._needs[k] for leaf in made[source])
                if not self._needs[k] and train:
                    entered = jax.eval_shape(self.shared.images[k], shapes, key)[0]
                elif not self._needs[k]:
                    entered = jax.eval_shape(self.shared.enter[k], shapes)
                given.append(tuple(shape_of(leaf.shape, leaf.dtype) for leaf in entered))
                run = partial(make_units(self.program, self.layout, k), train=train, key=jax.random.key(0))
                made.append(jax.eval_shape(run, *self.parts.shapes[k], given[k])[0])
            self._known[known] = (given, made)
        return self._known[known]

    def _on(self, array: Any, k: int) -> jax.Array:
        """Return the copy of a replicated array on the group of a part."""
        return part_of(array, self.layout.mesh(k), spec())

    def _batch_on(self, batch: Batch, k: int) -> Tree:
        mesh = self.layout.mesh(k)
        return {name: part_of(array, mesh, stored_sharding(mesh, array.ndim).spec) for name, array in batch.items()}
