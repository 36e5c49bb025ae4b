"""Compile the step of one strategy, without data and without its machine, and keep the counts of the programs.

A strategy without a pipeline is one program. A pipeline is a forward, a backward and an update program for each part;
each runs on the devices of its stage, and what one part hands to the next is a copy between stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.learn.modalities import modality_shapes
from jaxtrain.learn.state import Program
from jaxtrain.learn.step import make_pipeline, make_train_step
from jaxtrain.models.narrow import without_pairs
from jaxtrain.parallel.links import shape_of
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.rehearsal import compile_parts
from jaxtrain.planner.collectives import Collective, Dialect, activation_gathers, find_collectives, result_bytes
from jaxtrain.planner.hlo import Instruction, Module, read_module
from jaxtrain.planner.layers import layer_of
from jaxtrain.planner.operations import Operation, find_operations

__all__ = ["Compiled", "Facts", "HandOver", "batch_shapes", "compile_facts", "fullest"]


@dataclass(frozen=True)
class Compiled:
    """One program, as one of its devices runs it."""

    name: str
    """step, or forward, backward or update of a part."""
    stage: int
    """Stage whose devices run it; 0 without a pipeline."""
    part: int
    """Part of the network; 0 without a pipeline."""
    runs: int
    """Executions in one step of training."""
    work: tuple[tuple[float, float, float, int], ...]
    """Each instruction's operations of convolutions and products, operations of the rest, bytes, and turns."""
    collectives: tuple[Collective, ...]
    result_bytes: Mapping[str, int]
    """Bytes of collectives as the compiler printed them, by kind, each execution."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    gathers: tuple[str, ...]
    """Gathers of activations, each with the layer that causes it; a sound program has none."""
    kinds: tuple[str, ...] = ()
    """Kind of each instruction of `work`, one of `operations.KINDS`; none where it is not known."""
    kept_bytes: int | None = None
    """Bytes of the results of a forward pass that stay until its backward pass; None where all of them do."""
    borrowed_bytes: int = 0
    """Bytes of the inputs of a forward pass, besides the state, that stay until its backward pass."""

    @property
    def flops(self) -> float:
        """Operations of convolutions and products in one execution."""
        return sum(flops * count for flops, _, _, count in self.work)

    @property
    def peak_bytes(self) -> int:
        """Bytes that one execution needs at once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


@dataclass(frozen=True)
class HandOver:
    """The arrays that one part of a pipeline gives to another for one microbatch."""

    source: int
    target: int
    """Stages."""
    bytes: int
    """Bytes that each device sends."""
    part: int | None = None
    """Part of the network that gives; None in a chain with one part for each stage."""
    arrays: int = 1
    """Arrays that the bytes are of; each is a message of its own."""

    @property
    def giver(self) -> int:
        """Part of the network that gives."""
        return self.source if self.part is None else self.part


@dataclass(frozen=True)
class Facts:
    """Counts of one strategy that depend on no machine."""

    mesh: Mapping[str, int]
    """Axes and their sizes, outermost first."""
    programs: tuple[Compiled, ...]
    handovers: tuple[HandOver, ...]
    """What travels forward for one microbatch; as much travels back."""
    parameter_bytes: int
    """Bytes of parameters on the fullest device."""
    optimizer_bytes: int
    """Bytes of the optimiser's state on the fullest device."""
    parameters: int
    """Bytes of all parameters together."""
    batch: int
    microbatches: int
    parts: int
    schedule: str
    homes: tuple[int, ...] = ()
    """Stage of each part."""
    after: tuple[int | None, ...] = ()
    """For each part the one that takes its results; empty for a chain."""
    batch_bytes: int = 0
    """Bytes of a device's part of a batch as it was read, which a pipeline keeps beside what its programs need."""

    @property
    def takers(self) -> tuple[int | None, ...]:
        """For each part the one that takes its results; None for the last."""
        return self.after or (*range(1, self.parts), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Facts:
        """Read the JSON form, which `to_dict` returns."""
        programs = tuple(
            Compiled(
                **{
                    **one,
                    "work": tuple(map(tuple, one["work"])),
                    "gathers": tuple(one["gathers"]),
                    "kinds": tuple(one.get("kinds", ())),
                    "collectives": tuple(
                        Collective(
                            **{
                                **c,
                                "shapes": tuple(map(tuple, c["shapes"])),
                                "axes": tuple(c["axes"]),
                                "types": tuple(c["types"]),
                            }
                        )
                        for c in one["collectives"]
                    ),
                }
            )
            for one in facts["programs"]
        )
        handovers = tuple(HandOver(**one) for one in facts["handovers"])
        tree = {name: tuple(facts.get(name, ())) for name in ("homes", "after")}
        return cls(**{**facts, **tree, "programs": programs, "handovers": handovers})


def batch_shapes(program: Program, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return the shapes of a batch of the program, by name.

    Args:
        program: the network on its mesh.
        dtypes: number type of `image`, `label` and `observed`, as the data have them.
    """
    data, size = program.config.data, program.config.run.batch_size
    task, side = program.objective.task, (program.config.data.patch,) * 2
    dates = () if data.dates == 1 or program.modalities else (int(data.dates),)
    if program.modalities:
        shapes = modality_shapes(program, size)
    else:
        shapes = {"image": (size, *dates, program.channels, *side), "observed": (size, *dates, *side)}
    if not task.rebuild:
        shapes["label"] = (size, *((program.classes,) if task.several else () if task.per_image else side))
    if dates:
        shapes["day"] = (size, *dates)
    return {name: shape_of(shape, np.dtype(dtypes.get(name, "uint8"))) for name, shape in shapes.items()}


def compile_facts(program: Program, dtypes: Mapping[str, str], dialect: Dialect) -> Facts:
    """Compile what a step of the program runs, and keep the counts.

    Args:
        program: the network on its mesh; fake devices of a processor do.
        dtypes: number types of the arrays of a batch.
        dialect: how the machine that is planned for treats collectives.
    """
    with nullcontext() if dialect.pairs else without_pairs():
        return _compile_facts(program, dtypes, dialect)


def _compile_facts(program: Program, dtypes: Mapping[str, str], dialect: Dialect) -> Facts:
    config, axes = program.config, config_axes(program.config)
    batch = batch_shapes(program, dtypes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if program.layout is None:
        lowered = make_train_step(program).jitted.lower(program.shapes, batch, key)
        shapes = _gathered_shapes(program) if config.mesh.zero else []
        programs: tuple[Compiled, ...] = (_facts("step", 0, 0, 1, lowered.compile(), axes, dialect, shapes),)
        handovers: tuple[HandOver, ...] = ()
    else:
        programs, handovers = _pipeline_facts(program, batch, key, dialect)
    return Facts(
        mesh=axes,
        programs=programs,
        handovers=handovers,
        parameter_bytes=fullest(program.shapes.params, program.shardings.params),
        optimizer_bytes=fullest(program.shapes.opt_state, program.shardings.opt_state),
        parameters=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.shapes.params)),
        batch=config.run.batch_size,
        microbatches=config.mesh.microbatches if program.layout is not None else 1,
        parts=1 if program.layout is None else program.layout.chunks,
        schedule=config.mesh.schedule if program.layout is not None else "",
        homes=() if program.layout is None else program.layout.homes,
        after=() if program.layout is None else program.layout.after,
        batch_bytes=0 if program.layout is None else _batch_bytes(program, batch),
    )


def _batch_bytes(program: Program, batch: Mapping[str, Any]) -> int:
    lies = batch_sharding(program.mesh)
    return sum(math.prod(lies.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in batch.values())


def _gathered_shapes(program: Program) -> list[tuple[int, ...]]:
    """Return the shapes that parameters have where ZeRO has gathered them: whole, or the part of a split of filters."""
    leaves = jax.tree.leaves(program.shapes.params)
    places = jax.tree.leaves(program.whole)
    return [leaf.shape for leaf in leaves] + [
        place.shard_shape(leaf.shape) for leaf, place in zip(leaves, places, strict=True)
    ]


def config_axes(config: TrainConfig) -> dict[str, int]:
    """Return the axes of the mesh and their sizes, outermost first, as devices are numbered."""
    return dict(config.mesh.axes)


def _facts(
    name: str,
    stage: int,
    part: int,
    runs: int,
    compiled: Any,
    axes: Mapping[str, int],
    dialect: Dialect,
    parameters: list[tuple[int, ...]],
) -> Compiled:
    module = read_module(compiled)
    memory = compiled.memory_analysis()
    work, kinds = _joined(find_operations(module))
    return Compiled(
        name=name,
        stage=stage,
        part=part,
        runs=runs,
        work=work,
        kinds=kinds,
        collectives=find_collectives(module, axes, dialect),
        result_bytes=result_bytes(module),
        argument_bytes=int(memory.argument_size_in_bytes),
        output_bytes=int(memory.output_size_in_bytes),
        alias_bytes=int(memory.alias_size_in_bytes),
        temporary_bytes=int(memory.temp_size_in_bytes),
        gathers=tuple(
            _gather_text(module, one, "" if name == "step" else f"{name} pass of part {part}")
            for one in activation_gathers(module, parameters)
        ),
    )


def _gather_text(module: Module, gather: Instruction, otherwise: str) -> str:
    """Return the layer that causes a gather, what is gathered, and the operation of JAX that it comes from."""
    layer = layer_of(module, gather) or otherwise or "no layer"
    arrays = " and ".join(f"{one.type}[{','.join(map(str, one.dims))}]" for one in gather.results)
    return f"{layer}: {arrays} ({gather.source or gather.name})"


def _joined(
    operations: tuple[Operation, ...],
) -> tuple[tuple[tuple[float, float, float, int], ...], tuple[str, ...]]:
    """Join instructions of the same kind and work, as a network repeats its layers; return the work and the kinds."""
    found: dict[tuple[str, float, float, float], int] = {}
    for one in operations:
        if one.opcode not in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            key = (one.kind, one.flops, one.elements, one.bytes)
            found[key] = found.get(key, 0) + one.count
    return tuple((*key[1:], count) for key, count in found.items()), tuple(key[0] for key in found)


def fullest(shapes: Any, shardings: Any) -> int:
    """Return the bytes of a tree on the device that holds most of it."""
    held: dict[Any, int] = {}
    for leaf, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(at.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for device in at.device_set:
            held[device] = held.get(device, 0) + size
    return max(held.values(), default=0)


def _pipeline_facts(
    program: Program, batch: Mapping[str, Any], key: Any, dialect: Dialect
) -> tuple[tuple[Compiled, ...], tuple[HandOver, ...]]:
    pipeline = make_pipeline(program)
    mesh, layout = program.config.mesh, pipeline.layout
    axes = {name: size for name, size in config_axes(program.config).items() if name != "pipe"}
    programs, handovers = [], []
    for piece in compile_parts(pipeline, batch, key):
        stage = layout.homes[piece.part]
        parameters = [leaf.shape for leaf in piece.parameters] if mesh.zero else []
        runs = mesh.microbatches if piece.name in ("forward", "backward") else 1
        found = _facts(piece.name, stage, piece.part, runs, piece.compiled, axes, dialect, parameters)
        if piece.name == "forward":
            kept, borrowed = (sum(map(_bytes_of_part, leaves)) for leaves in (piece.keeps, piece.borrows))
            found = replace(found, kept_bytes=kept, borrowed_bytes=borrowed)
        programs.append(found)
        taker = layout.after[piece.part]
        if piece.gives and taker is not None and layout.homes[taker] != stage:
            size = sum(map(_bytes_of_part, piece.gives))
            handovers.append(HandOver(stage, layout.homes[taker], size, piece.part, len(piece.gives)))
    return tuple(programs), tuple(handovers)


def _bytes_of_part(leaf: Any) -> int:
    """Return the bytes of the part of an array on each of its devices."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * int(leaf.dtype.itemsize)
