"""Pipeline parallelism: parts of the network on devices of their own, microbatches under way through them.

Each part is a program of its own, compiled for its group of devices, so parts may be as unlike as the levels of a U-Net
are. The host walks through the schedule (`schedule.trace`) and hands work to the devices without waiting for results;
what one part hands to the next is copied from group to group. Nothing is looped on the device: XLA:CPU runs
convolutions inside a loop forty times slower.

Groups may lie in different processes. All walk through the one schedule, so copies and sums between processes come in
the same order everywhere; each works for its own groups and passes over the rest, of which it knows the shapes.

A step is: the batch is turned and normalised on the first group, its labels on the last; forward and backward passes in
the order of the schedule, gradients summed on the devices that hold the parameters; one sum over all groups for loss,
gradient norm and metrics; each part updates its parameters. The loss is a mean over the global batch, and its weight is
known from the labels before the first microbatch, so the sum over microbatches is the gradient of one device.

The state that goes in and comes out is that of every other strategy, a `TrainState` of the whole network; its leaves
lie on their groups. Batch statistics (norm `local`) are those of each microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxtrain.optim import build_optimizer
from jaxtrain.parallel.links import Links, is_here, join, lies_of, part_of, shape_of, zeros_on
from jaxtrain.parallel.mesh import constrain, replicated, spec, stored_sharding
from jaxtrain.parallel.processes import wait_for_all
from jaxtrain.parallel.schedule import Work, order_of, trace
from jaxtrain.parallel.sharding import path_name
from jaxtrain.parallel.spatial import over_space
from jaxtrain.parallel.zero import gather_for_use

if TYPE_CHECKING:
    from jaxtrain.models.units import Carry
    from jaxtrain.state import Program, TrainState

__all__ = ["Pipeline"]

Batch = Mapping[str, Any]
Tree = dict[str, Any]


def _shape(stored_BCHW: Any) -> tuple[int, ...]:
    """Of the images (B, H, W, C) that a batch becomes."""
    b, c, h, w = stored_BCHW.shape
    return (b, h, w, c)


class Pipeline:
    """The compiled parts of a pipelined program, and the walk through its schedule.

    Args:
        program: has a layout.
        prepare: (batch, key, mesh) → normalised images and a list of (label, share of the loss), as a step of one
            device makes them; traced on the first and on the last group, each of which uses its part.
        normalise: (image, observed) of a batch → normalised images (B, H, W, C).
    """

    def __init__(self, program: Program, prepare: Callable[..., Any], normalise: Callable[..., Any]) -> None:
        if program.layout is None:
            raise ValueError("this program has no pipeline")
        self.program, self.layout = program, program.layout
        self._prepare, self._normalise = prepare, normalise
        mesh, layout = program.config.mesh, program.layout
        self.microbatches = mesh.microbatches
        self.orders = order_of(mesh.schedule, groups=mesh.pipe, chunks=layout.chunks, microbatches=self.microbatches)
        self.walk = [interval.work for interval in trace(self.orders, chunks=layout.chunks)]
        self.log: list[Work] = []
        """What this process did in the last step, in order."""
        chunks = range(layout.chunks)
        self._last = layout.chunks - 1
        self._here = [is_here(layout.mesh(k)) for k in chunks]
        self._links, self._known = Links(layout.groups), dict[Any, list[Any]]()
        self._rehearsed = False
        self._names = [[n for n, at in layout.owner.items() if at == chunk] for chunk in chunks]
        optim = program.config.optim
        # the norm of the whole gradient is known only here, so the chain's own clipping is switched off, not left out
        unclipped = optim if optim.clip_norm is None else optim.model_copy(update={"clip_norm": float("inf")})
        self._optimizer = build_optimizer(unclipped, program.config.run.steps)
        self._params = [self._of(program.shapes.params, k) for k in chunks]
        self._statistics = [self._of(program.shapes.model_state, k) for k in chunks]
        self._opt = [jax.eval_shape(self._optimizer.init, params) for params in self._params]
        self._opt_names = [
            [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in self._opt
        ]
        self._counters = {
            path_name(path)
            for path, lies in jax.tree_util.tree_leaves_with_path(program.shardings.opt_state)
            if lies.mesh == program.mesh
        }
        # results lie exactly where the arguments of the next call do, or each call would be compiled anew
        summed = [self._of(program.shardings.model_state, k) for k in chunks]
        gradient = [self._of(program.parts if mesh.zero else program.whole, k) for k in chunks]
        self._forward = [jax.jit(partial(self._run_forward, k), out_shardings=(None, summed[k], None)) for k in chunks]
        self._backward = [
            jax.jit(partial(self._run_backward, k), donate_argnums=2, out_shardings=(None, gradient[k])) for k in chunks
        ]
        self._blank = [jax.jit(self._make_blank, out_shardings=(gradient[k], summed[k])) for k in chunks]
        # the new parameters take the gradient's place, where they lie as it does
        spent = (1,) if mesh.zero == 1 else (1, 2)
        self._update = [
            jax.jit(partial(self._run_update, k), donate_argnums=spent, out_shardings=self._homes(k)) for k in chunks
        ]
        self._look = [jax.jit(partial(self._run_look, k)) for k in chunks]
        self._images, self._labels = jax.jit(self._cut_images), jax.jit(self._cut_labels)
        self._sums, self._answer = jax.jit(program.objective.sums), jax.jit(program.objective.answer)
        self._enter = jax.jit(normalise)
        self._partial = jax.jit(self._run_partial)
        self._finish = jax.jit(self._run_finish, out_shardings=replicated(program.mesh))
        self._row = jax.jit(partial(jax.tree.map, lambda leaf: leaf[None]))
        self._add = jax.jit(
            partial(jax.tree.map, lambda rows: rows.sum(axis=0)), out_shardings=replicated(program.mesh)
        )

    def compilations(self) -> dict[str, list[int]]:
        """How often each part was compiled, by what it does."""
        groups: dict[str, list[Any]] = {"forward": self._forward, "backward": self._backward, "update": self._update}
        return {name: [one._cache_size() for one in several] for name, several in groups.items()}

    # ---- A training step

    def train(self, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step; see `jaxtrain.step.make_train_step`."""
        last, here = self._last, [k for k in range(self.layout.chunks) if self._here[k]]
        augment_key, dropout_key = jax.random.split(key)
        params = {k: self._of(state.params, k) for k in here}
        statistics = {k: self._of(state.model_state, k) for k in here}
        made = self._carries(_shape(batch["image"]), self.microbatches, train=True)
        blank = {k: self._blank[k](params[k], statistics[k]) for k in here}
        gradient, summed = ({k: trees[i] for k, trees in blank.items()} for i in range(2))
        arrived: dict[tuple[int, int], Any] = {}
        returned: dict[tuple[int, int], Any] = {}
        pulls: dict[tuple[int, int], Any] = {}
        labels: Any = ()
        counts: list[Any] = []
        if self._here[0]:
            images = self._images(self._batch_on(batch, 0), self._on(augment_key, 0))
            arrived = {(0, m): (image,) for m, image in enumerate(images)}
        if self._here[last]:
            labels = self._labels(self._batch_on(batch, last), self._on(augment_key, last))
        if not all(self._here) and not self._rehearsed:
            image = _shape(batch["image"])
            entry = (shape_of((image[0] // self.microbatches, *image[1:]), jnp.float32),)
            self._rehearse((params, statistics, summed), gradient, [entry, *made], labels, augment_key)
        self.log = []
        for work in self.walk:
            k, m = work.chunk, work.microbatch
            entered = arrived.pop((k, m), ())
            given = returned.pop((k, m), ())
            if work.kind == "forward":
                out = made[k]
                if self._here[k]:
                    folded = self._on(jax.random.fold_in(dropout_key, m), k)
                    answers = self._answers(labels, m) if k == last else ()
                    out, summed[k], pulls[k, m] = self._forward[k](
                        params[k], statistics[k], summed[k], entered, folded, answers
                    )
                if k != last:
                    arrived[k + 1, m] = self._pass_on(out, k, k + 1)
                elif self._here[k]:
                    counts.append(out)
            else:
                back: Any = made[k - 1] if k else None
                if self._here[k]:
                    back, gradient[k] = self._backward[k](pulls.pop((k, m)), given, gradient[k])
                if k:
                    returned[k - 1, m] = self._pass_on(back, k, k - 1)
            if self._here[k]:
                self.log.append(work)
        metrics, scale, finite, step = self._settle(gradient, counts, state.step)
        changed = {}
        for k in here:
            moments, counters = self._opt_of(state.opt_state, k)
            there = tuple(self._on(leaf, k) for leaf in (*counters, scale, finite))
            changed[k] = self._update[k](params[k], moments, gradient[k], statistics[k], summed[k], there)
        return self._whole(state, changed, step), metrics

    def _answers(self, labels: Any, m: int) -> tuple[list[jax.Array], list[jax.Array]]:
        return [label[m] for label, _ in labels], [share for _, share in labels]

    def _rehearse(self, trees: Any, gradient: Any, carries: Any, labels: Any, key: jax.Array) -> None:
        """Compile the passes of this process's parts on zeros, and wait for the others to have done so.

        One part may take minutes longer to compile than another, and what connects processes (Gloo: 30 s) gives up.
        """

        def zeros(carry: Carry, k: int) -> Carry:
            return tuple(zeros_on(self.layout.mesh(k), leaf) for leaf in carry)

        for k in gradient:
            answers = self._answers(labels, 0) if k == self._last else ()
            own = [tree[k] for tree in trees]
            _, _, pull = self._forward[k](*own, zeros(carries[k], k), self._on(key, k), answers)
            back = () if k == self._last else zeros(carries[k + 1], k)
            self._backward[k](pull, back, jax.tree.map(jnp.zeros_like, gradient[k]))
        wait_for_all("the parts of the pipeline are compiled")
        self._rehearsed = True

    def _run_forward(
        self, k: int, params: Tree, statistics: Tree, summed: Tree, carry: Carry, key: jax.Array, answers: Any
    ) -> tuple[Any, Tree, Any]:
        def run(params: Tree, carry: Carry) -> Any:
            carry, new = self._units(k, params, statistics, carry, train=True, key=key)
            if k != self._last:
                return tuple(constrain(leaf, lies_of(leaf, self.layout.mesh(k))) for leaf in carry), (new, None)
            labels, shares = answers
            found = [self.program.objective.terms(carry[0], label) for label in labels]
            loss = sum((share * terms.loss for share, terms in zip(shares, found, strict=True)), jnp.float32(0))
            right = self.program.objective.right(carry[0], labels[0])
            return loss, (new, (right, found[0].labelled))

        if self.program.config.mesh.zero == 3:
            run = gather_for_use(run, self._of(self.program.whole, k))
        if k:
            out, pull, (new, counted) = jax.vjp(run, params, carry, has_aux=True)
        else:  # nobody learns from the gradient of an image
            out, pull, (new, counted) = jax.vjp(lambda params: run(params, carry), params, has_aux=True)
        summed = jax.tree.map(lambda total, now: total + now / self.microbatches, summed, new)
        return (out if counted is None else (out, *counted)), summed, pull

    def _run_backward(self, k: int, pull: Any, returned: Any, gradient: Tree) -> tuple[Any, Tree]:
        found, *carry = pull(jnp.float32(1) if k == self._last else returned)
        back = tuple(constrain(leaf, lies_of(leaf, self.layout.mesh(k))) for leaf in carry[0]) if k else None
        return back, jax.tree.map(jnp.add, gradient, found)

    def _make_blank(self, params: Tree, statistics: Tree) -> tuple[Tree, Tree]:
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, statistics)

    def _run_update(
        self, k: int, params: Tree, moments: Any, gradient: Tree, statistics: Tree, summed: Tree, there: Any
    ) -> tuple[Tree, Any, Tree]:
        *counters, scale, finite = there
        opt = jax.tree.unflatten(jax.tree.structure(self._opt[k]), self._merge(k, moments, counters))
        gradient = jax.tree.map(lambda leaf: leaf * scale, gradient)
        if self.program.config.mesh.zero:
            gradient = constrain(gradient, self._of(self.program.parts, k))
        updates, new_opt = self._optimizer.update(gradient, opt, params)
        new_params = jax.tree.map(lambda leaf, update: leaf + update.astype(leaf.dtype), params, updates)
        changed = (new_params, jax.tree.leaves(new_opt), summed)
        kept = (params, jax.tree.leaves(opt), statistics)
        result: tuple[Tree, Any, Tree] = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        return result

    def _homes(self, k: int) -> tuple[Any, list[Any], Any]:
        """Where the update leaves parameters, the leaves of the optimiser's state, and batch statistics."""
        lies = self.program.shardings
        moments, counters = self._opt_of(lies.opt_state, k)
        opt = self._merge(k, moments, [replicated(self.layout.mesh(k)) for _ in counters])
        return self._of(lies.params, k), opt, self._of(lies.model_state, k)

    # ---- What all groups must know of each other: once a step, a vector of three numbers and a count

    def _settle(self, gradient: Mapping[int, Tree], counts: list[Any], step: jax.Array) -> Any:
        groups, mesh = self.layout.groups, self.program.mesh
        numbers, labelled = [], []
        for g, group in enumerate(groups):
            if not self._here[g]:
                continue
            mine = [tree for k, tree in gradient.items() if k % len(groups) == g]
            found = self._partial(mine, counts if group is self.layout.mesh(self._last) else [])
            numbers.append(found[0])
            labelled.append(found[1])
        across = NamedSharding(mesh, spec("pipe"))
        result = self._finish(join(numbers, across, (len(groups), 3)), join(labelled, across, (len(groups),)), step)
        return result["metrics"], result["scale"], result["finite"], result["step"]

    def _run_partial(self, gradients: list[Tree], counts: list[Any]) -> tuple[jax.Array, jax.Array]:
        squares = sum((jnp.square(leaf).sum() for tree in gradients for leaf in tree.values()), jnp.float32(0))
        loss = sum((loss for loss, _, _ in counts), jnp.float32(0))
        right = sum((right for _, right, _ in counts), jnp.float32(0))
        labelled = sum((labelled for _, _, labelled in counts), jnp.int32(0))
        return jnp.stack([squares, loss, right])[None], labelled[None]

    def _run_finish(self, numbers: jax.Array, labelled: jax.Array, step: jax.Array) -> dict[str, Any]:
        squares, loss, right = numbers.sum(axis=0)
        count, norm = labelled.sum(), jnp.sqrt(squares)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        limit = self.program.config.optim.clip_norm
        scale = jnp.float32(1) if limit is None else jnp.where(norm < limit, 1, limit / norm)
        metrics = {
            "loss": loss,
            self.program.objective.score: right / jnp.maximum(count, 1).astype(jnp.float32),
            "gradient_norm": norm,
            "learning_rate": self.program.schedule(step),
            "labelled": count,
            "finite": finite,
        }
        return {"metrics": metrics, "scale": scale, "finite": finite, "step": step + 1}

    # ---- Evaluation and prediction: the whole batch through the parts, one after the other

    def evaluate(self, params: Any, statistics: Any, batch: Batch) -> dict[str, Any]:
        """Sums over a batch, known to all groups; see `jaxtrain.step.make_eval_step`."""
        groups, at = self.layout.groups, self.layout.chunks - 1
        carry, found = self._through(params, statistics, batch["image"], batch["observed"]), None
        if self._here[at]:
            found = self._sums(carry[0], self._batch_on({"label": batch["label"]}, at)["label"])
        label = batch["label"]
        shapes = jax.eval_shape(
            self._sums, shape_of(carry[0].shape, carry[0].dtype), shape_of(label.shape, label.dtype)
        )

        def part(group: Mesh) -> Any:
            if group is self.layout.mesh(at):
                return self._row(found)
            blank = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), shapes)
            return jax.tree.map(lambda leaf: part_of(leaf, group, spec()), blank)

        across = NamedSharding(self.program.mesh, spec("pipe"))
        parts = [part(group) for group in groups if is_here(group)]
        rows = jax.tree.map(lambda leaf, *some: join(some, across, (len(groups), *leaf.shape)), shapes, *parts)
        known: dict[str, Any] = self._add(rows)
        return known

    def predict(self, params: Any, statistics: Any, image: Any, observed: Any) -> jax.Array:
        """Answers for a batch of images, on the last group."""
        answer: jax.Array = self._answer(self._through(params, statistics, image, observed)[0])
        return answer

    def _through(self, params: Any, statistics: Any, image: Any, observed: Any) -> Carry:
        made = self._carries(_shape(image), 1, train=False)
        carry: Carry = ()
        if self._here[0]:
            there = self._batch_on({"image": image, "observed": observed}, 0)
            carry = (self._enter(there["image"], there["observed"]),)
        for k in range(self.layout.chunks):
            carry = self._look[k](self._of(params, k), self._of(statistics, k), carry) if self._here[k] else made[k]
            carry = self._pass_on(carry, k, k + 1) if k < self._last else carry
        return carry

    def _run_look(self, k: int, params: Tree, statistics: Tree, carry: Carry) -> Carry:
        run: Callable[..., Any] = partial(self._units, k, train=False, key=jax.random.key(0))
        if self.program.config.mesh.zero == 3:
            run = gather_for_use(run, self._of(self.program.whole, k))
        result: Carry = run(params, statistics, carry)[0]
        return tuple(constrain(leaf, lies_of(leaf, self.layout.mesh(k))) for leaf in result)

    # ---- Parts of the batch

    def _cut_images(self, batch: Tree, key: jax.Array) -> tuple[jax.Array, ...]:
        return self._cut(self._prepare(batch, key, self.layout.mesh(0))[0])

    def _cut_labels(self, batch: Tree, key: jax.Array) -> list[tuple[tuple[jax.Array, ...], jax.Array]]:
        objective, found = self.program.objective, []
        for label, share in self._prepare(batch, key, self.layout.mesh(self._last))[1]:
            size = label.shape if objective.task.several else (*label.shape, self.program.classes)
            weight = objective.terms(jnp.zeros(size, jnp.float32), label).weight
            found.append((self._cut(label), share / jnp.where(weight > 0, weight, jnp.float32(1))))
        return found

    def _cut(self, array: jax.Array) -> tuple[jax.Array, ...]:
        # each device cuts its own samples, so none travel
        parts, m = self.program.config.mesh.data, self.microbatches
        split = array.reshape(parts, m, array.shape[0] // (parts * m), *array.shape[1:])
        return tuple(split[:, i].reshape(array.shape[0] // m, *array.shape[1:]) for i in range(m))

    # ---- Between groups

    def _pass_on(self, carry: Carry, source: int, target: int) -> Carry:
        groups = len(self.layout.groups)
        return self._links.send(carry, source % groups, target % groups)

    def _carries(self, image: tuple[int, ...], microbatches: int, *, train: bool) -> list[Carry]:
        """Shapes of what each part hands on, for the processes in which it does not lie."""
        if all(self._here):
            return [()] * self.layout.chunks
        known = (image, microbatches)
        if known not in self._known:
            carry: Any = (shape_of((image[0] // microbatches, *image[1:]), jnp.float32),)
            found = []
            for k in range(self.layout.chunks):
                run = partial(self._units, k, train=train, key=jax.random.key(0))
                carry = jax.eval_shape(run, self._params[k], self._statistics[k], carry)[0]
                found.append(carry)
            self._known[known] = found
        return self._known[known]

    # ---- Between the whole network and its parts

    def _units(self, k: int, params: Tree, statistics: Tree, carry: Carry, *, train: bool, key: jax.Array) -> Any:
        with over_space(self.layout.mesh(k)):
            return self.program.apply_units(params, statistics, carry, span=self.layout.span(k), train=train, key=key)

    def _of(self, tree: Any, k: int) -> Tree:
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {name: found[name] for name in self._names[k] if name in found}

    def _opt_of(self, opt_state: Any, k: int) -> tuple[list[Any], list[Any]]:
        """Leaves of the optimiser's state for one part: the moments of its parameters, and the counters of all."""
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)}
        leaves = [found[name] for name in self._opt_names[k]]
        alike = list(zip(self._opt_names[k], leaves, strict=True))
        return [v for n, v in alike if n not in self._counters], [v for n, v in alike if n in self._counters]

    def _merge(self, k: int, moments: Any, counters: Any) -> list[Any]:
        own, common = iter(moments), iter(counters)
        return [next(common if name in self._counters else own) for name in self._opt_names[k]]

    def _on(self, array: Any, k: int) -> jax.Array:
        """What the group of a part holds of something that is whole everywhere."""
        return part_of(array, self.layout.mesh(k), spec())

    def _batch_on(self, batch: Batch, k: int) -> Tree:
        mesh = self.layout.mesh(k)
        return {name: part_of(array, mesh, stored_sharding(mesh, array.ndim).spec) for name, array in batch.items()}

    def _whole(self, before: TrainState, changed: Mapping[int, Any], step: jax.Array) -> TrainState:
        """The state of the whole network, put together from its parts; of other processes it knows places only."""
        found: dict[str, Any] = {"step": step}
        copies: dict[str, dict[int, jax.Array]] = {}
        for k, (params, opt, statistics) in changed.items():
            found |= {f"params/{name}": leaf for name, leaf in params.items()}
            found |= {f"model_state/{name}": leaf for name, leaf in statistics.items()}
            for name, leaf in zip(self._opt_names[k], opt, strict=True):
                if name in self._counters:
                    copies.setdefault(name, {})[k % len(self.layout.groups)] = leaf
                else:
                    found[f"opt_state/{name}"] = leaf
        for name, by_group in copies.items():
            parts = list(by_group.values())
            found[f"opt_state/{name}"] = join(parts, replicated(self.program.mesh), parts[0].shape)

        whole: TrainState = jax.tree_util.tree_map_with_path(lambda at, old: found.get(path_name(at), old), before)
        return whole
